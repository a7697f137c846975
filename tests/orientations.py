"""One study stored in four orientations, and whether the predictions for them are the same in space."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

ORIENTATIONS = {
    "identity": lambda image: image,
    "y_flipped": lambda image: sitk.Flip(image, [False, True, False]),
    "x_and_z_flipped": lambda image: sitk.Flip(image, [True, False, True]),
    "axes_permuted": lambda image: sitk.PermuteAxes(image, [2, 0, 1]),
}


def store_in_all_orientations(images: Path, case: str, folder: Path) -> None:
    """Write CT and PET of `case` to `folder` once for every orientation; the patient lies where he lay."""
    folder.mkdir(parents=True)
    for how, stored in ORIENTATIONS.items():
        for channel in ("0000", "0001"):
            image = sitk.ReadImage(str(images / f"{case}_{channel}.nii.gz"))
            sitk.WriteImage(stored(image), str(folder / f"{how}_{channel}.nii.gz"))


def least_agreement(images: Path, predictions: Path) -> float:
    """The least Dice, in physical space, between the prediction for the first orientation and for another.

    Asserts that each prediction is on the grid of its own image, and that the probabilities (where they are saved) are
    equal and say something.
    """
    first, *others = ORIENTATIONS
    reference = sitk.ReadImage(str(predictions / f"{first}.nii.gz"))
    expected = np.load(predictions / f"{first}.npz")["probabilities"]
    assert np.ptp(expected) > 0.01, "the network says something"
    agreement = 1.0
    for how in others:
        image = sitk.ReadImage(str(predictions / f"{how}.nii.gz"))
        stored = sitk.ReadImage(str(images / f"{how}_0001.nii.gz"))
        assert image.GetDirection() == stored.GetDirection() and image.GetSize() == stored.GetSize()
        np.testing.assert_allclose(np.load(predictions / f"{how}.npz")["probabilities"], expected, atol=1e-5)
        back = sitk.Resample(image, reference, sitk.Transform(), sitk.sitkNearestNeighbor, 255)
        a, b = sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(reference)
        assert not (a == 255).any()
        agreement = min(agreement, 2 * (a & b).sum() / max(1, a.sum() + b.sum()) if (a | b).any() else 1.0)
    return agreement
