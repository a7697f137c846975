"""Contours of another frame of reference that name this very series are believed where they lie on its slices."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest

from tests.dicom_files import PET_ORIGIN, PET_SHAPE, PET_SPACING, lesion, positions
from tests.test_dicom_segmentation import headers, write_seg
from tests.test_ghsg import Trial
from tests.trial_files import LESION, write_patient, write_rtstruct

PLACES = positions(PET_SHAPE, PET_SPACING, PET_ORIGIN)


@pytest.fixture
def trial(tmp_path, monkeypatch, capfd) -> Trial:
    return Trial(tmp_path, monkeypatch, capfd)


def with_another_frame(file, shift=(0.0, 0.0, 0.0)):
    dataset = pydicom.dcmread(file)
    for item in (*dataset.get("ReferencedFrameOfReferenceSequence", ()), dataset):
        if "FrameOfReferenceUID" in item:
            item.FrameOfReferenceUID = "1.2.99"
    for roi in dataset.get("StructureSetROISequence", ()):
        roi.ReferencedFrameOfReferenceUID = "1.2.99"
    for contour in (c for roi in dataset.get("ROIContourSequence", ()) for c in roi.ContourSequence):
        points = np.reshape(contour.ContourData, (-1, 3)).astype(float) + shift
        contour.ContourData = [f"{v:.4f}" for v in points.ravel()]
    for frame in dataset.get("PerFrameFunctionalGroupsSequence", ()):
        place = frame.PlanePositionSequence[0]
        place.ImagePositionPatient = [float(v) + s for v, s in zip(place.ImagePositionPatient, shift, strict=True)]
    dataset.save_as(file)


@pytest.mark.parametrize("kind", ["RTSTRUCT", "SEG"])
@pytest.mark.parametrize("drawn_on", ["a", "b"])
def test_believed_on_its_slices(trial, kind, drawn_on):
    write_patient(trial.input / "p", "1", rois={})
    sources = sorted((trial.input / "p" / drawn_on).iterdir(), reverse=True)
    if kind == "RTSTRUCT" and drawn_on == "b":
        with_another_frame(write_rtstruct(trial.input / "p" / "RS", sources[0], {"Lesion": LESION}))
    elif kind == "SEG":
        slices = sorted(headers(sources), key=lambda one: one.ImagePositionPatient[2])
        grid = (len(slices), slices[0].Rows, slices[0].Columns)
        spacing = (*[float(v) for v in slices[0].PixelSpacing[::-1]], float(slices[0].SliceThickness))
        mask = lesion(positions(grid, spacing, tuple(map(float, slices[0].ImagePositionPatient))))
        with_another_frame(write_seg(trial.input / "p" / "SEG", [mask], slices, labels=("Lesion",)))
    else:
        pytest.skip("write_rtstruct draws on the PET")
    trial.convert()
    row = trial.report(trial.case("1"))
    assert row["part"] == "Tr" and "lie on its slices" in row["notes"]
    mask = trial.voxels(f"labelsTr/{row['case_id']}") > 0
    assert 2 * np.sum(mask & lesion(PLACES)) / (mask.sum() + lesion(PLACES).sum()) > 0.9


@pytest.mark.parametrize("shift", [(0.0, 0.0, 2.5), (200.0, 0.0, 0.0)])
@pytest.mark.parametrize("kind", ["RTSTRUCT", "SEG"])
def test_not_believed_elsewhere(trial, kind, shift):
    write_patient(trial.input / "p", "1", rois={})
    sources = sorted((trial.input / "p" / "b").iterdir(), reverse=True)
    if kind == "RTSTRUCT":
        file = write_rtstruct(trial.input / "p" / "RS", sources[0], {"Lesion": LESION})
    else:
        slices = sorted(headers(sources), key=lambda one: one.ImagePositionPatient[2])
        file = write_seg(trial.input / "p" / "SEG", [lesion(PLACES)], slices, labels=("Lesion",))
    with_another_frame(file, shift)
    assert "is in another frame of reference than the image" in trial.convert(fails=True)
