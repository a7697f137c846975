"""Where the voxels of two images lie in the patient, and how to bring one image onto the grid of another."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.grids import affine_of, corners, grid_distance, same_grid, to_physical  # noqa: F401
from nnunet_fratmae.base.volumes import check_finite, read_image  # noqa: F401 - to converters, all of it is geometry

# Voxels of a case as it is written, 1.2 GB as float32 and several times that while it is made; a CT of 512 x 512 x 1100
# is below. `--grid ct` with fine CTs, and files whose spacing is wrong, ask for more.
LARGEST_GRID = 300_000_000
# The axes x, y, z of every image that we write run to the patient's left, back and head, as those of axial DICOM slices
# do. Where nothing is oblique the direction matrix is then the identity, which even readers that ignore it get right.
ORIENTATION = "LPS"
AT_ONCE = 1 << 26
"""Voxels that are resampled in one piece: 256 MB as float32."""


def canonical(image: sitk.Image) -> sitk.Image:
    """The image with its axes in the order and senses of `ORIENTATION`, or nearest to them where it is oblique.

    Axes are exchanged and flipped only: every voxel keeps its value and its place in the patient. An image that is so
    already is given back itself.
    """
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    if code == ORIENTATION:
        return image
    return sitk.DICOMOrient(image, ORIENTATION)


def parse_grid(grid: str) -> str | tuple[float, float, float]:
    """What `--grid` says: "pet", "ct", or the spacing along the patient's left-right, front-back and foot-head axis.

    Raises:
        UserError: it is none of these.
    """
    if grid in ("pet", "ct"):
        return grid
    try:
        spacing = tuple(float(number) for number in grid.split(","))
    except ValueError:
        spacing = ()
    if len(spacing) != 3 or not all(1 <= s <= 20 for s in spacing):
        raise UserError(f"--grid {grid}: say pet, ct, or three spacings from 1 to 20 mm (left-right, front-back, "
                        "foot-head), as 4,4,5")  # fmt: skip
    return spacing


def target_grid(ct: sitk.Image | None, pet: sitk.Image, grid: str = "pet") -> sitk.Image:
    """The grid on which a case is written, in canonical orientation; the voxels of the image returned mean nothing.

    Args:
        grid: "pet"; "ct", which is cut to the box in which the PET lies, because a PET that were 0 below the thighs
            would be a lie; or "x,y,z" in mm, which has the axes and the middle of the PET and all of it inside.

    Raises:
        UserError: `grid` cannot be understood, or asks for the CT's where there is no CT or none inside the PET, or for
            more than `LARGEST_GRID` voxels.
    """
    chosen = parse_grid(grid)
    if chosen == "pet":
        _check_number(pet.GetSize(), grid)
        return _empty(canonical(pet))
    if chosen == "ct":
        if ct is None:
            raise UserError("--grid ct: there is no CT; say --grid pet or a spacing")
        return _cut_to(canonical(ct), pet)
    pet = canonical(pet)
    extent = np.array(pet.GetSize()) * pet.GetSpacing()
    size = np.ceil(extent / chosen - 1e-3).astype(int)
    _check_number(size, grid)
    result = sitk.Image(size.tolist(), sitk.sitkUInt8)
    result.SetSpacing(chosen)
    result.SetDirection(pet.GetDirection())
    # Both grids have one middle
    middle = to_physical(pet, (np.array(pet.GetSize()) - 1) / 2)
    result.SetOrigin((middle - affine_of(result)[0] @ ((size - 1) / 2)).tolist())
    return result


def overlap_fraction(a: sitk.Image, b: sitk.Image) -> float:
    """The share (0 to 1) of the volume of `a` that lies inside `b`, for any directions of their axes.

    Measured at 32 x 32 x 32 points spread evenly over `a`, thus to about 3% along each axis.
    """
    n = (np.arange(32) + 0.5) / 32
    points = np.stack(np.meshgrid(*[n * size - 0.5 for size in a.GetSize()], indexing="ij"), -1).reshape(-1, 3)
    matrix, origin = affine_of(b)
    index = np.linalg.solve(matrix, (to_physical(a, points) - origin).T).T
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
    if moving.GetNumberOfPixels() <= AT_ONCE:
        return _resampled(moving, reference, sigma, fill)
    # A whole CT would be there four times in float32, so its part for some planes of the result is taken at a time
    columns, rows, planes = reference.GetSize()
    step = max(1, AT_ONCE // 4 // (columns * rows))
    result = sitk.Image(reference.GetSize(), sitk.sitkFloat32)
    result.CopyInformation(reference)
    for first in range(0, planes, step):
        slab = sitk.Image([columns, rows, min(step, planes - first)], sitk.sitkUInt8)
        slab.SetSpacing(reference.GetSpacing())
        slab.SetDirection(reference.GetDirection())
        slab.SetOrigin(reference.TransformIndexToPhysicalPoint([0, 0, first]))
        part = _part_for(moving, slab, np.ceil(4 * sigma) + 2)  # the Gaussian ends at 4 sigma
        values = _resampled(part, slab, sigma, fill) if part else sitk.Cast(slab, sitk.sitkFloat32) + fill
        result[:, :, first : first + step] = values
    return result


def as_float(image: sitk.Image) -> sitk.Image:
    """The image in float32, itself where it is so."""
    return image if image.GetPixelID() == sitk.sitkFloat32 else sitk.Cast(image, sitk.sitkFloat32)


def _resampled(moving: sitk.Image, reference: sitk.Image, sigma: np.ndarray, fill: float) -> sitk.Image:
    """Smoothed by a Gaussian of `sigma` voxels (x, y, z), then linearly interpolated."""
    smooth = as_float(moving)
    if sigma.any():
        array = ndimage.gaussian_filter(sitk.GetArrayViewFromImage(smooth), sigma[::-1], mode="nearest")
        smooth = sitk.GetImageFromArray(array)
        smooth.CopyInformation(moving)
    return sitk.Resample(smooth, reference, sitk.Transform(), sitk.sitkLinear, fill)


def _empty(image: sitk.Image) -> sitk.Image:
    """The grid of an image, with a quarter of its memory."""
    grid = sitk.Image(image.GetSize(), sitk.sitkUInt8)
    grid.CopyInformation(image)
    return grid


def _part_for(image: sitk.Image, box: sitk.Image, margin: np.ndarray) -> sitk.Image | None:
    """The part of `image` that lies in `box` or within `margin` voxels (x, y, z) of it; None if there is none."""
    matrix, origin = affine_of(image)
    index = np.linalg.solve(matrix, (to_physical(box, corners(box.GetSize())) - origin).T).T
    low = np.maximum(np.floor(index.min(0) - margin), 0).astype(int)
    high = np.minimum(np.ceil(index.max(0) + margin) + 1, image.GetSize()).astype(int)
    return None if np.any(high <= low) else sitk.RegionOfInterest(image, (high - low).tolist(), low.tolist())


def _cut_to(image: sitk.Image, box: sitk.Image) -> sitk.Image:
    """The part of `image` whose voxels lie within the bounds of `box` along the axes of `image`."""
    matrix, origin = affine_of(image)
    index = np.linalg.solve(matrix, (to_physical(box, corners(box.GetSize())) - origin).T).T
    low = np.maximum(np.ceil(index.min(0) - 1e-3), 0).astype(int)
    high = np.minimum(np.floor(index.max(0) + 1e-3) + 1, image.GetSize()).astype(int)
    if np.any(high <= low):
        raise UserError("CT and PET do not overlap: different subjects or wrong pairing; pair the files anew")
    _check_number(high - low, "ct")
    return sitk.RegionOfInterest(image, (high - low).tolist(), low.tolist())


def _check_number(size: np.ndarray | tuple[int, ...], grid: str) -> None:
    if np.prod(size, dtype=float) > LARGEST_GRID:
        raise UserError(f"--grid {grid}: this case would have {'x'.join(map(str, size))} voxels, at most "
                        f"{LARGEST_GRID / 1e6:g} million are written; say a coarser grid, as --grid 4,4,5",
                        "GRID_TOO_LARGE")  # fmt: skip
