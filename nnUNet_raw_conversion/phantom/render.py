"""From organ labels and lesions to images: what a CT and a PET scanner would make of this patient.

Works on any label volume in the coding of `organs`, hence also on real organ maps that are brought into it.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from nnUNet_raw_conversion.phantom.lesions import LesionMaps
from nnUNet_raw_conversion.phantom.organs import BONES, CORTICAL_HU, LABEL, ORGANS, labels_of
from nnUNet_raw_conversion.phantom.shapes import Grid, SmoothField

FWHM = 1 / np.sqrt(8 * np.log(2))  # standard deviation of a Gaussian whose full width at half maximum is 1
PET_FWHM = 6.0  # mm, reconstructed resolution of a clinical PET/CT
PET_NOISE = 0.14  # standard deviation at SUV 1; it grows with the square root of the activity
CT_BLUR = 1.2  # mm, standard deviation


def render(
    organs: np.ndarray, lesions: LesionMaps, uptake: np.ndarray, hu: np.ndarray, grid: Grid, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Make the images of one patient.

    Args:
        organs: organ labels (z, y, x).
        uptake: mean SUVbw by organ label, from `draw_uptake` for the tracer.
        hu: mean HU by organ label, from `draw_hu`.

    Returns:
        CT in HU and PET in SUVbw (>= 0), float32 (z, y, x).
    """
    texture = 3 * SmoothField(rng, 16).on(grid)  # standard deviation 1 in space
    breath, ct_noise, pet_noise = rng.uniform(0, 9), rng.uniform(8, 16), PET_NOISE * rng.uniform(0.75, 1.3)
    ct = blur(_densities(organs, lesions, hu, texture, grid), CT_BLUR, grid)
    ct += np.float32(ct_noise) * unit_noise(rng, 1.5, grid)
    activity = blur(_activities(organs, lesions, uptake, texture, breath, grid), PET_FWHM * FWHM, grid)
    return np.clip(ct, -1024, 3071), add_pet_noise(activity, pet_noise, grid, rng)


def blur(volume: np.ndarray, sigma: float, grid: Grid) -> np.ndarray:
    """Gaussian blur with a standard deviation of `sigma` mm."""
    return ndimage.gaussian_filter(volume, [sigma / s for s in grid.spacing[::-1]], truncate=3, mode="nearest")


def unit_noise(rng: np.random.Generator, sigma: float, grid: Grid) -> np.ndarray:
    """Gaussian noise of standard deviation 1 that is correlated over `sigma` mm."""
    noise = blur(rng.standard_normal(grid.shape, np.float32), sigma, grid)
    return noise / noise.std()


def add_pet_noise(activity: np.ndarray, level: float, grid: Grid, rng: np.random.Generator) -> np.ndarray:
    """Counting noise: its standard deviation is `level` times the root of the activity, like that of a Poisson count.

    A hundredth of SUV 1 is added under the root for scatter and randoms, so that air is not free of noise.
    """
    noise = unit_noise(rng, PET_FWHM * FWHM, grid)
    return np.maximum(activity + np.float32(level) * np.sqrt(activity + np.float32(0.01)) * noise, 0)


def _densities(organs: np.ndarray, lesions: LesionMaps, hu: np.ndarray, texture: np.ndarray, grid: Grid) -> np.ndarray:
    ct = hu[organs] + np.float32([organ.hu_texture for organ in ORGANS])[organs] * texture
    # Bone near its surface is cortical: the outer 2-3 mm, and all of a thin bone. A coarse grid does not resolve it.
    bone = labels_of(*BONES)[organs].astype(np.float32)
    edge = bone * (1 - blur(bone, 2.0, grid)) * 2
    ct += np.clip(edge, 0, 1) * (np.float32(CORTICAL_HU) - ct)
    ct = np.where(lesions.mask > 0, lesions.hu + 4 * texture, ct)
    return _with_table(ct, organs, grid)


def _with_table(ct: np.ndarray, organs: np.ndarray, grid: Grid) -> np.ndarray:
    """Lay the patient on a table: a hollow tray, its upper sheet bent, the lower one flat, with foam between."""
    y, x = grid.axes()[1:]
    back = y[np.flatnonzero(organs.any((0, 2)))[-1]] + grid.spacing[1] / 2 + 4 if organs.any() else 0
    y, x = y[:, None], x[None]
    upper, lower = back - x**2 / 1400, np.float32(back + 28)
    sheets = 900 * (np.exp(-(((y - upper) / 3) ** 2)) + np.exp(-(((y - lower) / 3) ** 2)))
    tray = -1000 + np.maximum(np.where((y > upper) & (y < lower), 60, 0), sheets)
    return np.where((organs == LABEL["air"]) & (np.abs(x) < 205), tray.astype(np.float32), ct)


def _activities(
    organs: np.ndarray, lesions: LesionMaps, uptake: np.ndarray, texture: np.ndarray, breath: float, grid: Grid
) -> np.ndarray:
    mottle = np.float32([organ.mottle for organ in ORGANS])
    activity = uptake[organs] * np.maximum(1 + mottle[organs] * texture, 0.2)
    activity = _raise_diaphragm(activity, organs, breath, grid)
    return np.where(lesions.mask > 0, lesions.suv * (1 + 0.12 * texture), activity)


def _raise_diaphragm(activity: np.ndarray, organs: np.ndarray, breath: float, grid: Grid) -> np.ndarray:
    """PET averages free breathing, CT is a moment of it: around the dome of the liver PET lies `breath` mm higher."""
    slices = np.flatnonzero((organs == LABEL["liver"]).any((1, 2)))
    if not len(slices):
        return activity
    z = np.arange(grid.size[2]) * grid.spacing[2]
    source = (z - breath * np.exp(-(((z - z[slices[-1]]) / 50) ** 2))) / grid.spacing[2]
    below = np.clip(np.floor(source).astype(int), 0, grid.size[2] - 2)
    share = np.float32(source - below)[:, None, None]
    return (1 - share) * activity[below] + share * activity[below + 1]
