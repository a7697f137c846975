"""What may be shown of a free text: known words and small numbers, and nothing that tells who a patient is."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydicom import Dataset

from nnUNet_raw_conversion.diagnoses import known_diagnosis
from nnUNet_raw_conversion.shown import HIDDEN, secrets_of, shown_text, shown_words, without_secrets
from nnUNet_raw_conversion.vocabulary import known_parts


def header(**tags) -> Dataset:
    dataset = Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


PERSON = {"PatientName": "Müller^Änne^^Dr", "PatientID": "K-4711/08", "PatientBirthDate": "19641122"}


@pytest.mark.parametrize(
    "text",
    ["PET Mueller WB", "GTV_MÜLLER_1", "GTVmuller", "GTVLee", "GTV李", "roi Anne", "k-4711", "*19641122",
     "GTV 22111964", "born 22.11.1964", "GTV 221164", "17 Kettler 64", "22.11.64", "22NOV1964", "GTV 22 Nov 64",
     "Lesion 1964-11", "LN 11/64", "22-11-64", "roi LiAn",
     "uid 1.2.840.113619.2.55.3", "AENNE", "on 2019-02-03", "GTV Mu\u0308ller", "Nov. 1964", "ROI 4711", "LN4711",
     "Lesion 22 11 64"],
)  # fmt: skip
def test_what_identifies_is_hidden(text):
    shown = shown_text(text)
    low = shown.lower()
    assert HIDDEN in shown
    secrets = "muell müll mull u\u0308ll anne aenne lee 李 lian 4711 64 113619 2019 nov"
    assert not [secret for secret in secrets.split() if secret in low]


@pytest.mark.parametrize(
    "text", ["PET AC, 3.75 mm", "GTV_Mass_left", "WB CT 3.0", "Lesion 1 41%", "external iliac LN", "18F-FDG PET",
             "CT 5.0 Br36 3", "PET AC 3D 2i21s 400x400", "Läsion 3", "Rechte Niere", "vertebrae_L1", "PTV_50Gy"],
)  # fmt: skip
def test_what_is_known_is_shown(text):
    assert shown_text(text) == text


LETTERS = st.characters(categories=["Lu", "Ll", "Lo"], max_codepoint=0x9FFF)


@given(name=st.text(LETTERS, min_size=2, max_size=12), glue=st.sampled_from("_- ./^"))
def test_any_unknown_word_is_hidden_in_any_case(name, glue):
    for form in (name, name.upper(), name.lower(), name.title()):
        assume(not known_parts(form))
        assert form not in shown_text(f"roi{glue}{form}{glue}7").replace("roi", "")


@given(st.text(max_size=60))
def test_any_text_can_be_shown(text):
    shown = shown_text(text)
    assert len(shown) <= 40 and shown.isprintable() and not set(shown) & set("<>&\"'=@|;")


def test_known_words_that_the_patient_is_called_are_hidden():
    secrets = secrets_of([header(PatientName="Bone^Li", StationName="PET", PatientID="18")])
    assert shown_text("Bone met li 18", secrets) == "… met …"
    assert shown_text("PET bone met", secrets) == "PET … met"


def test_names_are_found_at_any_depth():
    item = header(OtherPatientIDs="X", PatientName="Kettler^Jo")
    secrets = secrets_of([header(RequestAttributesSequence=[item], PerformingPhysicianName="Eisenbart")])
    assert {"kettler", "jo", "eisenbart"} <= secrets


def test_words_of_a_series():
    assert shown_words("PET Kettler WB_(AC)") == "PET WB AC"
    assert (shown_words("Kettler"), shown_words("")) == (HIDDEN, "")


@pytest.mark.parametrize(
    "message",
    ["give weight_kg with --suv-override", "PatientWeight (0010,1030) is missing or 0",
     "21 slices, 180 min, slope 1.25",
     "done for each slice from its acquisition time"],
)  # fmt: skip
def test_our_own_words_are_never_hidden(message):
    assert without_secrets(message, secrets_of([header(**PERSON)])) == message


def test_the_net_below_messages():
    secrets = secrets_of([header(**PERSON)])
    message = without_secrets("Units is Müller of 1964-11-22, uid 1.2.840.113619.2.55.3", secrets)
    assert message == "Units is … of …, uid …"


@pytest.mark.parametrize(
    ("text", "shown", "shortened"),
    [
        ("Hodgkin lymphoma", "Hodgkin lymphoma", False), ("Non-Hodgkin-Lymphom", "Non-Hodgkin-Lymphom", False),
        ("Seminom rechts, groß", "Seminom rechts, groß", False), ("C81.1", "C81.1", False),
        ("Prostata-Ca, G3 pT2N1M0", "Prostata-Ca, G3 pT2N1M0", False), ("soft tissue sarcoma",) * 2 + (False,),
        ("Hodgkin-Lymphom, nodulär-sklerosierend, Stadium IIB",) * 2 + (False,), ("negative control",) * 2 + (False,),
        ("NS Hodgkin (Frau Muster; 4711)", "NS Hodgkin", True), ("lymphoma of Kettler", "lymphoma", True),
        ("Kettler: melanoma *30.11.1952", "melanoma", True), ("Tumor 301152", "Tumor", True), ("Kettler", None, True),
        ("30.11.1952", None, True), (None, None, False),
    ],
)  # fmt: skip
def test_diagnoses_are_shown_in_known_words(text, shown, shortened):
    assert known_diagnosis(text) == (shown, shortened)


def test_a_diagnosis_does_not_show_whom_it_is_called_after():
    assert known_diagnosis("Richter transformation of CLL", frozenset({"cll"})) == (None, True)


@pytest.mark.parametrize("name", ["times", "Weight^Missing", "Series", "Injection", "Override^Give"])
def test_a_patient_may_be_called_by_a_word_of_ours(name):
    """A patient or a folder may be called by a word of our messages."""
    message = ("PET: several injections, which differ in their times; weight is missing, give weight_kg with "
               "--suv-override for the series")  # fmt: skip
    secrets = secrets_of([header(**PERSON | {"PatientName": name, "PatientID": f"two_{name}_Kettler"})])
    assert without_secrets(message, secrets) == message
    assert "Kettler" not in without_secrets(f"{message}: Kettler", secrets)
