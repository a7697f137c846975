"""Files that lack the UIDs by which they are put together: read by what else tells it, or the field is named."""

from __future__ import annotations

from pathlib import Path

import pydicom
import pytest

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.trial import find_visits
from tests.dicom_files import write_ct, write_pet
from tests.test_ghsg import Trial, trial  # noqa: F401 (a fixture)
from tests.trial_files import LESION, write_patient

PET, CT = (6, 18, 24), (9, 36, 40)


def remove(folder: Path, *keywords: str, modalities: tuple[str, ...] = ("PT", "CT", "RTSTRUCT")) -> None:
    """Take fields out of all files of a folder; of SOPInstanceUID also that in front of the header stays."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        dataset = pydicom.dcmread(file)
        if dataset.Modality in modalities:
            for keyword in keywords:
                dataset.pop(keyword, None)
            dataset.save_as(file)


@pytest.mark.parametrize("modalities", [("PT", "CT", "RTSTRUCT"), ("PT",), ("CT",), ("PT", "RTSTRUCT")])
def test_without_study_uid(trial, modalities):  # noqa: F811
    """As it is with it, of two patients."""
    for patient in ("a", "b"):
        write_patient(trial.input / patient, patient, rois={"Lesion": LESION})
    remove(trial.input, "StudyInstanceUID", modalities=modalities)
    trial.convert()
    rows = trial.table("conversion_report")
    assert [(row["status"], row["part"], float(row["lesion_ml"]) > 0) for row in rows] == [("done", "Tr", True)] * 2
    said = "StudyInstanceUID (0020,000d) is missing; the frame of reference tells what belongs to it"
    assert ("PT" not in modalities) or all(said in row["notes"] for row in rows)


def test_without_study_uid_and_frame_nothing_is_guessed(tmp_path):
    write_pet(tmp_path / "pet", patient="a", shape=PET)
    write_ct(tmp_path / "ct", patient="a", shape=CT)
    remove(tmp_path, "StudyInstanceUID", "FrameOfReferenceUID")
    [visit], *_ = find_visits([tmp_path], progress=False)
    assert visit.pet.remarks == ("StudyInstanceUID (0020,000d) is missing; nothing tells what belongs to it",)
    assert len({one.study_uid for one in visit.series}) == 2  # the CT is not taken for that of this PET


@pytest.mark.parametrize(("keyword", "name"), [("SeriesInstanceUID", "(0020,000e)"), ("Modality", "(0008,0060)")])
def test_what_cannot_be_told_is_named(tmp_path, keyword, name):
    write_pet(tmp_path / "pet", patient="a", shape=PET)
    remove(tmp_path, keyword)
    with pytest.raises(UserError, match="6 DICOM files have no .* and are left out; export them again") as error:
        find_visits([tmp_path], progress=False)
    assert name in str(error.value)
    write_pet(tmp_path / "other", patient="b", shape=PET)
    visits, _, messages = find_visits([tmp_path], progress=False)
    assert [visit.patient for visit in visits] == ["b"]
    assert any(name in message for message in messages) and any("6 DICOM files" in message for message in messages)


def test_without_instance_uid_the_files_own_meta_information_counts(tmp_path):
    write_pet(tmp_path / "pet", patient="a", shape=PET)
    for file in (tmp_path / "pet").iterdir():
        dataset = pydicom.dcmread(file)
        del dataset.SOPInstanceUID
        dataset.save_as(file, enforce_file_format=False)
    [visit], *_ = find_visits([tmp_path], progress=False)
    assert len(visit.pet.files) == 6
