"""Pictures of predictions: PET as a maximum intensity projection with lesions, true and predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.figure import Figure

from nnUNet_raw_conversion.pictures import HU_WINDOW, SUV_WINDOW, coronal_slice, overlay, save_figure, show_ct, show_mip

HIT, MISSED, INVENTED = (0.1, 0.65, 0.1), (0.9, 0.1, 0.1), (0.15, 0.35, 1.0)  # paper figure 2: FN red, FP blue


def load(path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """An image as an array (z, y, x) = (SI, AP, LR) in LPS orientation, and its spacing (z, y, x) in mm."""
    image = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    x, y, z = image.GetSpacing()
    return sitk.GetArrayFromImage(image), (z, y, x)


def plot_prediction(ct: Path, pet: Path, truth: Path, prediction: Path, out: Path, title: str) -> None:
    """One case: CT slice, PET MIP, true lesions, and hits (green), missed (red) and invented (blue) voxels.

    Args:
        ct, pet, truth, prediction: NIfTI files on one grid.
    """
    hu, spacing = load(ct)
    suv, true, found = load(pet)[0], load(truth)[0] > 0, load(prediction)[0] > 0
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    first, *others = figure.subplots(1, 4)
    show_ct(first, hu, spacing, coronal_slice(hu, true))
    first.set_title("CT, HU {:g} to {:g}".format(*HU_WINDOW), fontsize=9)
    titles = ("PET MIP, SUV {:g} to {:g}".format(*SUV_WINDOW), "true lesions", "found, missed (red), false (blue)")
    layers = ((), ((true, HIT),), ((found & ~true, INVENTED), (true & ~found, MISSED), (true & found, HIT)))
    for panel, name, masks in zip(others, titles, layers, strict=True):
        show_mip(panel, suv, spacing)
        for mask, colour in masks:
            overlay(panel, mask, colour, spacing)
        panel.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, out)
