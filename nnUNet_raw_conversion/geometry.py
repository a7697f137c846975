"""Where the voxels of two images lie in the patient, and how to bring one image onto the grid of another."""

from __future__ import annotations

import zlib
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnUNet_raw_conversion.command import UserError

# Headers are rounded to single precision and moved through quaternions; an offset of 1% of a PET voxel is none.
GRID_TOLERANCE_MM = 0.05


def read_image(path: Path) -> sitk.Image:
    """Read a scalar 3D image, with the voxel type that the file has.

    Raises:
        UserError: the file is missing, cannot be read to its end, is not a scalar 3D image, or (NIfTI) has NaN voxels.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; add it or correct its name")
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        # ITK's exceptions are many lines; the last one says what happened.
        reason = str(error).strip().splitlines()[-1].split("): ")[-1]
        raise UserError(f"{path}: cannot be read; is the file complete? ({reason})") from None
    if path.name.endswith((".nii", ".nii.gz")):
        _check_nifti(path)
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        what = f"{image.GetDimension()}D with {image.GetNumberOfComponentsPerPixel()} values a voxel"
        raise UserError(f"{path}: is {what}; give one 3D image with one value a voxel")
    return image


def check_finite(voxels: np.ndarray, what: str) -> None:
    """Raises UserError, beginning with `what`, if there are voxels that are NaN or infinite."""
    bad = voxels.size - np.count_nonzero(np.isfinite(voxels))
    if bad:
        raise UserError(f"{what}: has {bad} voxels that are NaN or infinite; set them to air in CT, to 0 else")


def same_grid(a: sitk.Image, b: sitk.Image) -> bool:
    """Whether two 3D images have the same size and their corners lie at the same places (within 0.05 mm)."""
    if a.GetSize() != b.GetSize():
        return False
    corners = np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in a.GetSize()], indexing="ij"), -1).reshape(-1, 3)
    return bool(np.abs(_to_physical(a, corners) - _to_physical(b, corners)).max() < GRID_TOLERANCE_MM)


def overlap_fraction(a: sitk.Image, b: sitk.Image) -> float:
    """The share (0 to 1) of the volume of `a` that lies inside `b`, for any directions of their axes.

    Measured at 32 x 32 x 32 points spread evenly over `a`, thus to about 3% along each axis.
    """
    n = (np.arange(32) + 0.5) / 32
    points = np.stack(np.meshgrid(*[n * size - 0.5 for size in a.GetSize()], indexing="ij"), -1).reshape(-1, 3)
    matrix, origin = _affine(b)
    index = np.linalg.solve(matrix, (_to_physical(a, points) - origin).T).T
    return float(np.all((index >= -0.5) & (index <= np.array(b.GetSize()) - 0.5), axis=1).mean())


def resample_to(moving: sitk.Image, reference: sitk.Image, fill: float) -> sitk.Image:
    """`moving` on the grid of `reference`, linearly interpolated, as float32; `fill` where `moving` ends.

    Each axis of `moving` that is finer than `reference` is smoothed first. Linear interpolation looks at the two
    nearest voxels only, so that a CT of 1 mm brought to a PET of 4 mm would else keep its noise in full and fold
    structures below 8 mm into false ones (aliasing). The Gaussian gives the result the point spread that a voxel of
    the reference has: FWHM^2 = reference^2 - moving^2 (Cardoso et al., Scale factor point spread function matching:
    beyond aliasing in image resampling, MICCAI 2015).
    """
    moving_axes = np.reshape(moving.GetDirection(), (3, 3))
    reference_axes = np.reshape(reference.GetDirection(), (3, 3))
    nearest_axis = np.abs(moving_axes.T @ reference_axes).argmax(1)
    spacing, target = np.array(moving.GetSpacing()), np.array(reference.GetSpacing())[nearest_axis]
    fwhm = np.sqrt(np.maximum(target**2 - spacing**2, 0)) / spacing  # voxels of `moving`
    sigma = fwhm / np.sqrt(8 * np.log(2))
    smooth = sitk.Cast(moving, sitk.sitkFloat32)
    if sigma.any():
        array = ndimage.gaussian_filter(sitk.GetArrayViewFromImage(smooth), sigma[::-1], mode="nearest")
        smooth = sitk.GetImageFromArray(array)
        smooth.CopyInformation(moving)
    return sitk.Resample(smooth, reference, sitk.Transform(), sitk.sitkLinear, fill)


def _check_nifti(path: Path) -> None:
    """Look for two faults of NIfTI files that ITK (5.4) hides: it reads zeros where the file was cut off, and zeros
    for NaN and infinity, so that a CT padded with NaN would have water around the patient."""
    try:
        voxels = np.asanyarray(nibabel.load(path).dataobj.get_unscaled())
    except (nibabel.filebasedimages.ImageFileError, EOFError, OSError, ValueError, zlib.error):
        raise UserError(f"{path}: ends too early; copy or download it again") from None
    if voxels.dtype.kind == "f":
        check_finite(voxels, str(path))


def _affine(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (3, 3) and origin (3,): position in mm = matrix @ index (x, y, z) + origin."""
    return np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing(), np.array(image.GetOrigin())


def _to_physical(image: sitk.Image, index: np.ndarray) -> np.ndarray:
    """Positions in mm (N, 3) of continuous indices (N, 3), both in the order x, y, z."""
    matrix, origin = _affine(image)
    return index @ matrix.T + origin
