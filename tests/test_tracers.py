"""One name for each tracer, whatever tables, headers and codes call it; no other text is a tracer."""

from __future__ import annotations

import time

import pytest
from pydicom import Dataset, Sequence

from nnUNet_raw_conversion.tracers import tracer_name, tracer_of
from tests.dicom_files import code


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        ("F-18 FDG|[18F]FDG|18FDG|Fludeoxyglucose F 18 injection|FDG -- fluorodeoxyglucose", "18F-FDG"),
        ("Piflufolastat F 18|[18F]DCFPyL|18F-PSMA-1007|rhPSMA-7.3 (18F)|Flotufolastat F 18|18F-PSMA-11", "18F-PSMA"),
        ("Gallium Ga 68 Gozetotide|[68Ga]Ga-PSMA-11|Ga68-PSMA-HBED-CC|PSMA I&T|^68^Gallium PSMA", "68Ga-PSMA"),
        ("68Ga-DOTATATE|DOTA-TATE|Dotatate Ga^68^|NETSPOT", "68Ga-DOTATATE"),
        ("Copper Cu 64 dotatate|64Cu-DOTATATE", "64Cu-DOTATATE"),
        ("Ga-68 edotreotide|68Ga-DOTATOC", "68Ga-DOTATOC"), ("68Ga-DOTANOC", "68Ga-DOTANOC"),
        ("18F-FES|Fluoroestradiol F 18|16a-[18F]fluoro-17b-estradiol", "18F-FES"),
        ("[11C]choline|C-11 choline|Choline C^11^", "11C-choline"), ("18F-FCH|Fluorocholine F^18^", "18F-choline"),
        ("FACBC|fluciclovine F 18", "18F-fluciclovine"), ("FLT|Thymidine F^18^", "18F-FLT"),
        ("6-[18F]fluoro-L-DOPA|F-DOPA", "18F-FDOPA"), ("Sodium fluoride F 18|18F-NaF", "18F-NaF"),
        ("68Ga-FAPI-46", "68Ga-FAPI"), ("18F-FAPI-74", "18F-FAPI"), ("florbetapir F 18|Amyvid", "18F-florbetapir"),
        ("PSMA", "PSMA"),
    ],
)  # fmt: skip
def test_synonyms(texts, name):
    assert {text: tracer_name(text) for text in texts.split("|")} == dict.fromkeys(texts.split("|"), name)
    assert tracer_name(name) == name


@pytest.mark.parametrize("text", ["Kettler", "FDG Kettler", "18F-Kettler", "F18", "Solution", "Glucose", "", None])
def test_what_is_no_tracer(text):
    assert tracer_name(text) is None


def pet(text=None, drug=None, nuclide=None) -> Dataset:
    item, header = Dataset(), Dataset()
    if text:
        item.Radiopharmaceutical = text
    if drug:
        item.RadiopharmaceuticalCodeSequence = code(*drug)
    if nuclide:
        item.RadionuclideCodeSequence = code(*nuclide)
    header.RadiopharmaceuticalInformationSequence = Sequence([item])
    return header


GA68, CU64 = ("35337001", "SCT", ""), ("C-127A2", "SRT", "")


@pytest.mark.parametrize(
    ("header", "tracer"),
    [
        (pet(drug=("C-B1031", "SRT", "Kettler")), "18F-FDG"),  # the code counts, not what the header says of it
        (pet(drug=("C116352", "NCIt", "")), "18F-PSMA"), (pet(drug=("C118961", "NCIt", "x")), "68Ga-PSMA"),
        (pet(drug=("C152969", "NCIt", "Gallium Ga 68 Gozetotide")), "68Ga-PSMA"),
        (pet(drug=("724025002", "SCT", "")), "68Ga-DOTATATE"), (pet(drug=("C2713594", "UMLS", "")), "68Ga-DOTATOC"),
        (pet(drug=("926372005", "SCT", "")), "18F-FES"), (pet(drug=("126703", "DCM", "")), "11C-choline"),
        (pet(drug=("457000009", "SCT", "")), "18F-fluciclovine"),
        (pet(drug=("129511002", "SCT", "")), "11C-carfentanil"),
        (pet("PSMA", nuclide=GA68), "68Ga-PSMA"), (pet("DOTATATE", nuclide=CU64), "64Cu-DOTATATE"),
        (pet("Kettler FDG", ("K1", "99KETTLER", "Kettler FDG"), ("77004003", "SCT", "Kettler")), None), (pet(), None),
        (Dataset(), None),
    ],
)  # fmt: skip
def test_the_tracer_of_a_header(header, tracer):
    assert tracer_of(header) == tracer


def test_no_text_takes_long():
    start = time.perf_counter()
    for text in ("fdg" * 200 + "x", "18f" * 200, "fluorodeoxyglucose" * 50, "[" * 500, "18F-" * 100 + "FDG"):
        tracer_name(text)
    assert time.perf_counter() - start < 1
