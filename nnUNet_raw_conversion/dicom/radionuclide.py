"""The radionuclides of PET: what they are called in DICOM headers, and their half-lives."""

from __future__ import annotations

import re

import pydicom

from nnUNet_raw_conversion.dicom.fields import text_of

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
}
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
