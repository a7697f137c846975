"""Which folders are patients where nothing but their names can tell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.folders import PatientFolders
from nnUNet_raw_conversion.patients import Table, known_numbers
from nnUNet_raw_conversion.pseudonyms import Key
from nnUNet_raw_conversion.trial import find_visits, select
from tests.test_ghsg import Trial, pet_only, trial, write_nifti_case  # noqa: F401 (a fixture)

ROOT = Path("/in")


def split(*folders: str, known=(), level=None) -> list[tuple[str, str]]:
    """(patient, time point) of each folder below the input."""
    paths = [ROOT / folder for folder in folders]
    people = PatientFolders(ROOT, paths, [], known, level)
    return [(patient, timepoint) for patient, _, timepoint in map(people.split, paths)]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["12", "13", "HD18_14"], [("12", ""), ("13", ""), ("HD18_14", "")]),
        (["Koeln/1", "Koeln/2", "Bonn/3"], [("1", ""), ("2", ""), ("3", "")]),
        (["Koeln/1", "Koeln/2", "12"], [("1", ""), ("2", ""), ("12", "")]),
        (["export/0012", "export/0013"], [("0012", ""), ("0013", "")]),
        (["HD16/Koeln/1", "HD16/Koeln/2"], [("1", ""), ("2", "")]),
        (["Koeln/Kettler_J/baseline", "Koeln/Kettler_J/followup 2", "Koeln/Hanssen/PET0"],
         [("Kettler_J", "baseline"), ("Kettler_J", "followup 2"), ("Hanssen", "PET0")]),
        (["a/PET0", "a/PET2", "b/PET0"], [("a", "PET0"), ("a", "PET2"), ("b", "PET0")]),
        (["a/2021-03-04", "a/20210901", "b/04.03.2021 PET-CT"],
         [("a", "2021-03-04"), ("a", "20210901"), ("b", "04.03.2021 PET-CT")]),
        (["PETCT_0a/03-23-2003-NA-PET-CT Ganzkoerper primaer mit KM-12698", "PETCT_0a/09-15-2004-NA-PET-CT-1"],
         [("PETCT_0a", "03-23-2003-NA-PET-CT Ganzkoerper primaer mit KM-12698"),
          ("PETCT_0a", "09-15-2004-NA-PET-CT-1")]),
        (["a/1.2.840.1.1", "a/1.2.840.1.2"], [("a", "1.2.840.1.1"), ("a", "1.2.840.1.2")]),
        (["a", "a/followup"], [("a", ""), ("a", "followup")]),
        (["a/x", "b/y"], [("a", "x"), ("b", "y")]),  # one study each: nothing can be lost
        (["Koeln/PET001", "Koeln/PET002"], [("PET001", ""), ("PET002", "")]),
        (["", "12"], [("", ""), ("12", "")]),
    ],
)  # fmt: skip
def test_by_names(folders, expected):
    assert split(*folders) == expected


@pytest.mark.parametrize(
    "folders",
    [
        ["a/1", "a/2", "b/1", "b/2"],  # time points, or numbers that begin anew in each centre
        ["a/followup", "a/12"],
        ["a/Kettler 20210304", "a/Hanssen 20210304"],
        ["Koeln/Kettler/x", "Koeln/Kettler/y", "Koeln/Hanssen/z"],
        ["a/followup", "Koeln/12", "Koeln/13"],
        ["a", "a/12"],
    ],
)
def test_what_is_not_plain_is_refused(folders):
    with pytest.raises(UserError, match="--patient-level N") as error:
        split(*folders)
    message = str(error.value)
    assert not any(text in message for text in ("\n", "Kettler", "Hanssen", "Koeln"))


@pytest.mark.parametrize(
    ("folders", "known", "expected"),
    [
        (["a/1", "a/2", "b/1"], {"a", "b"}, [("a", "1"), ("a", "2"), ("b", "1")]),
        (["a/001", "a/2", "b/HD18_7"], {"1", "2", "7"}, [("001", ""), ("2", ""), ("HD18_7", "")]),
        (["1/100", "1/101", "2/102"], {"1", "100", "101"}, [("100", ""), ("101", ""), ("102", "")]),
        (["a/1", "a/2", "b/1"], {"1", "2"}, [("a/1", ""), ("2", ""), ("b/1", "")]),  # never two people in one
    ],
)
def test_known_numbers_decide(folders, known, expected):
    assert split(*folders, known=known) == expected


def test_the_user_decides():
    folders = ["a/1", "a/2", "data/b/1"]
    assert split(*folders, level=1) == [("a", "1"), ("a", "2"), ("data", "b/1")]
    assert split(*folders, level=2) == [("1", ""), ("2", ""), ("b", "1")]
    assert split("a/1", "b/1", "c", level=2) == [("a/1", ""), ("b/1", ""), ("c", "")]


def test_numbers_of_tables_and_lists(tmp_path):
    (tmp_path / "test.txt").write_text("HD18 007\n# 8\nG_0009\n", encoding="utf-8")
    keys = [Key("G_0001", "", "0012"), Key("G_0002", "", "Koeln/13")]
    known = known_numbers(Table({("HD18", "5"): None}), keys, tmp_path / "test.txt")
    assert known == {"5", "7", "g_0009", "12", "13"}


def found(root: Path, **options) -> set[tuple[str, str]]:
    visits = find_visits([root], progress=False, **options)[0]
    assert not any(visit.problem for visit in visits)
    return {(visit.patient, visit.timepoint) for visit in visits}


def test_no_patient_of_a_centre_is_lost(tmp_path):
    for folder in ("Koeln/1", "Koeln/2", "Bonn/3"):
        write_nifti_case(tmp_path / "nifti" / folder)
        pet_only(tmp_path / "dicom" / folder / "CT und PET", "ANONYM", study=folder)
    visits, _, messages = find_visits([tmp_path / "nifti"], progress=False)
    assert {visit.patient for visit in select(visits, 1)[0]} == {"1", "2", "3"}
    assert "folders 2 levels below it are taken for patients" in messages[0]
    assert {patient for patient, _ in found(tmp_path / "dicom")} == {"1", "2", "3"}
    assert {patient for patient, _ in found(tmp_path / "dicom", level=1)} == {"Koeln", "Bonn"}
    assert {patient for patient, _ in found(tmp_path / "dicom", known={"koeln"})} == {"Koeln", "Bonn"}


def test_patients_with_numbers_of_their_own_need_no_folders(tmp_path):
    """Nor do lesions as NIfTI in their folders."""
    for number, folder in enumerate(("Koeln/1", "Koeln/2", "Bonn/1", "Bonn/2")):
        pet_only(tmp_path / folder / "x", f"P{number}", study=folder)
        write_nifti_case(tmp_path / folder / "masks")
    assert {patient for patient, _ in found(tmp_path)} == {"P0", "P1", "P2", "P3"}


def test_a_study_whose_series_lie_apart_is_one(tmp_path):
    """CT and PET on top of the patients, and no number of the patient."""
    for patient in ("Kettler", "Hanssen"):
        for modality in ("CT", "PET"):
            pet_only(tmp_path / modality / patient, "", study=patient, series=modality, names=f"{modality}{{}}")
    visits = find_visits([tmp_path], progress=False)[0]
    assert len(visits) == 2 and all(len(visit.series) == 2 for visit in visits)


def test_the_command_asks_for_the_level(trial):  # noqa: F811
    for folder in ("Koeln/1", "Koeln/2", "Bonn/1"):
        write_nifti_case(trial.input / folder)
    output = trial.convert(fails=True)
    assert "say --patient-level N" in output and "Koeln" not in output and not trial.keys.exists()
    assert "--patient-level" in trial.convert("--patient-level", "0", fails=True)
    trial.convert("--patient-level", "2")
    assert {row["patient"] for row in trial.table("keys")} == {"Koeln/1", "2", "Bonn/1"}
    trial.convert()  # the key table knows them now
    assert {row["patient"] for row in trial.table("keys")} == {"Koeln/1", "2", "Bonn/1"}
