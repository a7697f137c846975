"""All real DICOM studies through fratmae_convert_ghsg with one command, against IBSI's NIfTI files of them (slow).

python -m pytest -m slow tests/test_real_dicom.py
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.conftest import Workspace

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PATIENTS = ("STS_001", "STS_002", "STS_003", "STS_008", "STS_019")  # the first is the whole-body PET, without a CT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (SHARED / "sts_dicom").is_dir(), reason="no shared data")]


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, tuple[Path, dict[str, str]]]:
    """The dataset's folder and the row of the report by the patient's folder."""
    workspace = Workspace(tmp_path_factory.mktemp("dicom"))
    keys, folders = workspace.folder / "keys.csv", f"{SHARED}/sts_dicom {SHARED}/wholebody_fdg_dicom"
    workspace.run(f"fratmae_convert_ghsg -i {folders} -d 522 -np 2 --key-file {keys} --lesion-roi GTV_Mass "
                  "--allow-missing-ct --diagnosis sarcoma")  # fmt: skip
    dataset = workspace.raw / "Dataset522_GHSG"
    report = {row["case_id"]: row for row in csv.DictReader((dataset / "conversion_report.csv").open(encoding="utf-8"))}
    who = {
        next(p for p in PATIENTS if p in row["source"]): row["case_id"]
        for row in csv.DictReader(keys.open(encoding="utf-8"))
    }
    return {patient: (dataset, report[case_id]) for patient, case_id in who.items()}


def test_all_are_converted(converted):
    assert sorted(converted) == sorted(PATIENTS)
    assert {row["status"] for _, row in converted.values()} == {"done"}
    assert [patient for patient in PATIENTS if "no CT" in converted[patient][1]["notes"]] == ["STS_001"]


@pytest.mark.parametrize("patient", PATIENTS)
def test_suv_and_lesions_are_those_of_ibsi(converted, patient):
    dataset, row = converted[patient]
    truth, true_mask = (sitk.DICOMOrient(sitk.ReadImage(str(SHARED / "sts_petct" / patient / name)), "LPS")
                        for name in ("SUV.nii.gz", "SEG.nii.gz"))  # fmt: skip
    suv, mask = (sitk.ReadImage(str(dataset / f"{name}.nii.gz"))
                 for name in (f"imagesTr/{row['case_id']}_0001", f"labelsTr/{row['case_id']}"))  # fmt: skip
    volume = sitk.GetArrayFromImage(mask).sum()
    corner = suv.TransformPhysicalPointToIndex(truth.GetOrigin())  # IBSI's are crops of the whole-body PET
    suv, mask = (sitk.RegionOfInterest(image, truth.GetSize(), corner) for image in (suv, mask))
    np.testing.assert_allclose(suv.GetOrigin(), truth.GetOrigin(), atol=0.01)
    np.testing.assert_allclose(sitk.GetArrayFromImage(suv), sitk.GetArrayFromImage(truth), atol=1e-3)
    mask, true_mask = (sitk.GetArrayFromImage(image) > 0 for image in (mask, true_mask))
    assert 2 * np.sum(mask & true_mask) / (volume + true_mask.sum()) >= 0.97
    assert volume == pytest.approx(true_mask.sum(), rel=0.02)
