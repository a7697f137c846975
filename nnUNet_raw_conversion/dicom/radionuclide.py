"""The radionuclides of PET: what they are called in DICOM headers, and their half-lives."""

from __future__ import annotations

import re

import pydicom

from nnUNet_raw_conversion.dicom.fields import text_of

HALF_LIFE_TOLERANCE = 0.02  # headers have 6580 to 6588 s for F-18; 1% is a SUV error of 0.4% after an hour
# Half-lives in s (Decay Data Evaluation Project, rounded; F-18 and Ga-68 as scanners have them) and the codes of the
# radionuclides in SRT/SNM3/99SDM and SNOMED CT (PS3.16 CID 4020).
RADIONUCLIDES = {
    "F-18": (6586.2, "C-111A1", "77004003"),
    "Ga-68": (4057.7, "C-131A3", "35337001"),
    "C-11": (1221.8, "C-105A1", "40565003"),
    "N-13": (597.9, "C-107A1", "21576001"),
    "O-15": (122.24, "C-B1038", "129504001"),
    "Cu-64": (45721.0, "C-127A2", "3932008"),
    "Y-86": (53064.0, "C-162A3", "10738001"),
    "Zr-89": (282276.0, "C-168A4", "63360001"),
    "I-124": (360806.0, "C-114A5", "40937006"),
    "Rb-82": (75.9, "C-159A2", "79197006"),
    "Y-90": (230688.0, "C-162A7", "14691008"),
}
# How long after the injection, in h, a scan can begin. Protocols end well before: F-18 at 4 h (late PSMA, NaF), Ga-68
# at 3 h, C-11 at 1 h; later too little is left to be seen (F-18 10 % after 6 h), and a time is wrong. The long-lived
# ones are imaged for days: I-124 and Zr-89 up to 10 days (antibodies), Cu-64 up to 3, Y-90 after therapy up to a week.
LONGEST_UPTAKE_H = {"F-18": 6.0, "Ga-68": 4.5, "C-11": 1.7, "N-13": 0.8, "O-15": 0.17, "Rb-82": 0.1, "Cu-64": 72.0,
                    "Y-86": 96.0, "Zr-89": 336.0, "I-124": 480.0, "Y-90": 320.0}  # fmt: skip
MOST_HALF_LIVES = 5  # of a radionuclide that is not in the table: 3% of the dose is left
ELEMENTS = {"fluorine": "F", "gallium": "Ga", "carbon": "C", "nitrogen": "N", "oxygen": "O", "copper": "Cu",
            "yttrium": "Y", "zirconium": "Zr", "iodine": "I", "rubidium": "Rb"}  # fmt: skip


def radionuclide(drug: pydicom.Dataset) -> str | None:
    """The radionuclide by its code or its name ("18F", "^18^Fluorine", "Ga-68", "FDG"), None if not known."""
    phrases = [text_of(drug, "Radiopharmaceutical")]
    for item in drug.get("RadionuclideCodeSequence") or []:
        code = text_of(item, "CodeValue")
        for nuclide, (_, *codes) in RADIONUCLIDES.items():
            if code in codes:
                return nuclide
        phrases.insert(0, text_of(item, "CodeMeaning"))
    for phrase in phrases:
        words = re.sub(r"[^a-z0-9]+", " ", phrase.lower())
        for name, symbol in ELEMENTS.items():
            words = words.replace(name, symbol.lower())
        for nuclide in RADIONUCLIDES:
            symbol, mass = nuclide.lower().split("-")
            if re.search(rf"(?<![a-z0-9])(?:{symbol} ?{mass}|{mass} ?{symbol})(?![a-z0-9])", words):
                return nuclide
        if "fdg" in words:
            return "F-18"
    return None


def longest_uptake_s(half_life: float) -> float:
    """The longest time in s from injection to scan that can be, by the radionuclide that has this half-life in s."""
    for nuclide, (known, *_) in RADIONUCLIDES.items():
        if abs(half_life / known - 1) < HALF_LIFE_TOLERANCE:
            return 3600 * LONGEST_UPTAKE_H[nuclide]
    return MOST_HALF_LIVES * half_life
