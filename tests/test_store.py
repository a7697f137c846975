"""The whole-body grid: resizing, and the store on disk."""

import json

import blosc2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.units import PRETRAINING_UNITS
from plans.store import check_preprocessed, check_units, list_raw_studies, resize_to_grid
from pretraining.data import list_cases


def test_resizing_averages_and_keeps_place_and_mean():
    """Shrinking by whole factors keeps the mean of a smooth volume; a hot voxel is spread, not lost."""
    volume = np.zeros((1, 12, 20, 32), dtype=np.float32)
    volume[0, 5, 11, 22] = 100.0
    small = resize_to_grid(volume, (6, 10, 8))
    assert small.shape == (1, 6, 10, 8)
    assert small.sum() * (2 * 2 * 4) == pytest.approx(100.0, rel=0.05)
    centre = [np.average(np.arange(n), weights=small[0].sum(axis=tuple(a for a in range(3) if a != i)))
              for i, n in enumerate(small.shape[1:])]  # fmt: skip
    expected = [(v + 0.5) / f - 0.5 for v, f in zip((5, 11, 22), (2, 2, 4), strict=True)]
    np.testing.assert_allclose(centre, expected, atol=0.15)


@settings(deadline=None, max_examples=20)
@given(st.tuples(st.integers(3, 20), st.integers(3, 20), st.integers(3, 20)), st.floats(-3, 3))
def test_resizing_keeps_a_constant(shape, value):
    np.testing.assert_allclose(resize_to_grid(np.full((2, *shape), value, np.float32), (5, 7, 9)), value, atol=1e-5)


def test_resizing_labels_invents_none():
    labels = np.random.default_rng(0).choice([-1, 0, 3], size=(1, 9, 11, 13)).astype(np.int8)
    assert set(np.unique(resize_to_grid(labels, (4, 16, 6), is_labels=True))) <= {-1, 0, 3}


def test_studies_are_listed_with_and_without_labels(tmp_path):
    dataset_json = {"channel_names": {"0": "CT", "1": "CT"}, "file_ending": ".nii.gz"}
    for folder, names in (
        ("imagesTr", ["a_0000", "a_0001"]), ("labelsTr", ["a"]), ("imagesPt", ["b_0000", "b_0001", "c_0000", "c_0001"]),
    ):  # fmt: skip
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.nii.gz").touch()
    studies = list_raw_studies(tmp_path, dataset_json)
    assert {case: labels is not None for case, (_, labels) in studies.items()} == {"a": True, "b": False, "c": False}
    assert all(len(images) == 2 for images, _ in studies.values())
    for channel in ("0000", "0001"):
        (tmp_path / "imagesPt" / f"a_{channel}.nii.gz").touch()
    with pytest.raises(UserError, match="case a is in imagesTr and in imagesPt"):
        list_raw_studies(tmp_path, dataset_json)


def test_missing_files_are_named(tmp_path):
    dataset_json = {"channel_names": {"0": "CT", "1": "CT"}, "file_ending": ".nii.gz"}
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "a_0001.nii.gz").touch()
    with pytest.raises(UserError, match="case a has the images a_0001.nii.gz; CT and PET are needed"):
        list_raw_studies(tmp_path, dataset_json)
    (tmp_path / "imagesTr" / "a_0000.nii.gz").touch()
    with pytest.raises(UserError, match="labelsTr/a.nii.gz is not there"):
        list_raw_studies(tmp_path, dataset_json)


def test_studies_that_cannot_be_hu_and_suv_are_refused():
    ct, pet = np.zeros((2, 4, 5, 6), np.float32)
    check_units("a", {"CT": ct, "PET": pet})
    pet[:2] = (25 - PRETRAINING_UNITS["PET"].mean) / PRETRAINING_UNITS["PET"].std
    for volumes in ({"CT": ct, "PET": pet}, {"PET": pet}):
        with pytest.raises(UserError, match="case a: 50% of the PET"):
            check_units("a", volumes)
    check_units("a", {"CT": pet})
    ct[0, 0, 0] = np.nan
    for volumes in ({"CT": ct, "PET": pet}, {"CT": ct}):
        with pytest.raises(UserError, match="case a: the CT has NaN"):
            check_units("a", volumes)


def test_datasets_of_one_modality_are_checked_as_they_were_preprocessed(tmp_path):
    highest = (25 - PRETRAINING_UNITS["PET"].mean) / PRETRAINING_UNITS["PET"].std
    for case, value in (("a", 1.0), ("b", highest)):
        data = np.full((1, 4, 5, 6), value, np.float32)
        nnUNetDatasetBlosc2.save_case(data, np.zeros((1, 4, 5, 6), np.int8), {}, str(tmp_path / case),
                                      chunks=data.shape, blocks=data.shape)  # fmt: skip
    with pytest.raises(UserError, match="case b: 100% of the PET is above SUV 25"):
        check_preprocessed(tmp_path, {"channel_names": {"0": "PET"}})
    check_preprocessed(tmp_path, {"channel_names": {"0": "CT"}})


def test_padding_is_air_without_uptake():
    """nnU-Net pads with 0, which must be air in our units."""
    assert (PRETRAINING_UNITS["CT"].mean, PRETRAINING_UNITS["PET"].mean) == (-1024, 0)


def test_store_of_the_phantoms(phantoms):
    """Every study is there, on the grid, in pretraining units, and the axes are H W D = AP LR SI."""
    preprocessed = phantoms.preprocessed / "Dataset007_Phantom"
    plans = json.loads((preprocessed / "FratMAEPlans.json").read_text(encoding="utf-8"))
    cases = list_cases(preprocessed, plans, json.loads((preprocessed / "dataset.json").read_text(encoding="utf-8")))
    assert len(cases) == 6
    volume = blosc2.open(str(cases[0].path))
    assert volume.shape == (2, 32, 48, 64) and volume.chunks == (1, 1, 48, 64) and volume.dtype == np.float16
    ct, pet = volume[0].astype(float), volume[1].astype(float)
    units = PRETRAINING_UNITS
    assert ct.min() == pytest.approx((-1024 - units["CT"].mean) / units["CT"].std, abs=0.05)
    suv = pet * units["PET"].std + units["PET"].mean
    assert suv.min() == pytest.approx(0, abs=0.01) and 3 < suv.max() <= 25.1
    body = ct * units["CT"].std + units["CT"].mean > -300
    extent = [np.ptp(np.flatnonzero(body.any(axis=tuple(a for a in range(3) if a != i)))) + 1 for i in range(3)]
    assert extent[2] >= 62, "the body spans the grid from the thighs to the head along D"
    assert suv[:, :, 48:].max() > 0 and body[:, :, :16].any()
