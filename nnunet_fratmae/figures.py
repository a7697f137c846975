"""Pictures to look at: PET as a maximum intensity projection with lesions, true and predicted."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import SimpleITK as sitk  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

HIT, MISSED, INVENTED = (0.1, 0.65, 0.1), (0.9, 0.1, 0.1), (0.15, 0.35, 1.0)  # paper figure 2: FN red, FP blue
SUV_WINDOW, HU_WINDOW = (0.0, 7.0), (-200.0, 300.0)


def load(path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """An image as an array (z, y, x) = (SI, AP, LR) in LPS orientation, and its spacing (z, y, x) in mm."""
    image = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    x, y, z = image.GetSpacing()
    return sitk.GetArrayFromImage(image), (z, y, x)


def show_mip(axes: Axes, suv: np.ndarray, spacing: tuple[float, float, float]) -> None:
    """Coronal maximum intensity projection, dark = hot, head up, the patient's right on the viewer's left."""
    aspect = spacing[0] / spacing[2]
    axes.imshow(suv.max(axis=1), cmap="gray_r", vmin=SUV_WINDOW[0], vmax=SUV_WINDOW[1], origin="lower", aspect=aspect)
    axes.set_xticks([])
    axes.set_yticks([])


def overlay(axes: Axes, mask: np.ndarray, colour: tuple[float, float, float], aspect: float) -> None:
    """A projected mask (z, y, x) in one colour over a coronal projection."""
    picture = np.zeros((mask.shape[0], mask.shape[2], 4))
    picture[mask.any(axis=1)] = (*colour, 0.75)
    axes.imshow(picture, origin="lower", aspect=aspect, interpolation="nearest")


def plot_prediction(ct: Path, pet: Path, truth: Path, prediction: Path, out: Path, title: str) -> None:
    """One case: CT slice, PET MIP, true lesions, and hits (green), missed (red) and invented (blue) voxels.

    Args:
        ct, pet, truth, prediction: NIfTI files on one grid.
    """
    hu, spacing = load(ct)
    suv, true, found = load(pet)[0], load(truth)[0] > 0, load(prediction)[0] > 0
    aspect = spacing[0] / spacing[2]
    figure, axes = plt.subplots(1, 4, figsize=(11, 6.2), layout="constrained")
    body = np.flatnonzero((hu > -300).any(axis=(0, 2)))
    slice_index = int(np.median(np.nonzero(true)[1])) if true.any() else int(np.median(body))
    axes[0].imshow(hu[:, slice_index], cmap="gray", vmin=HU_WINDOW[0], vmax=HU_WINDOW[1], origin="lower", aspect=aspect)
    axes[0].set_title(f"CT, HU {HU_WINDOW[0]:g} to {HU_WINDOW[1]:g}", fontsize=9)
    titles = ("PET MIP, SUV {:g} to {:g}".format(*SUV_WINDOW), "true lesions", "found, missed (red), false (blue)")
    layers = ((), ((true, HIT),), ((found & ~true, INVENTED), (true & ~found, MISSED), (true & found, HIT)))
    for panel, name, masks in zip(axes[1:], titles, layers, strict=True):
        show_mip(panel, suv, spacing)
        for mask, colour in masks:
            overlay(panel, mask, colour, aspect)
        panel.set_title(name, fontsize=9)
    for panel in axes:
        panel.set_xticks([])
        panel.set_yticks([])
    figure.suptitle(title, fontsize=10)
    partial = out.with_name(f".partial_{out.name}")
    figure.savefig(partial, dpi=110, bbox_inches="tight", facecolor="white", format="png")
    plt.close(figure)
    os.replace(partial, out)
