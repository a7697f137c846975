"""Where the voxels of images lie, and whether an image can be as large as it says."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError

# Headers are rounded to single precision and moved through quaternions; an offset of 1% of a PET voxel is none.
GRID_TOLERANCE_MM = 0.05
# mm. The finest CT has voxels of 0.2 mm; slices of 10 mm with gaps are at most 20 mm apart.
SPACING_MM = (0.15, 30.0)
# mm along each axis. A total-body scan of two ranges is 2.2 m long; the smallest real case of ours is 150 mm wide.
EXTENT_MM = (25.0, 2500.0)


def grid_distance(a: sitk.Image, b: sitk.Image) -> float:
    """How far (mm, along one axis of space) a corner of `a` lies from the same corner of `b`, two 3D images; infinite
    where their numbers of voxels differ. It is the most by which any voxel lies elsewhere."""
    if a.GetSize() != b.GetSize():
        return np.inf
    there = corners(a.GetSize())
    return float(np.abs(to_physical(a, there) - to_physical(b, there)).max())


def same_grid(a: sitk.Image, b: sitk.Image) -> bool:
    """Whether two 3D images have the same size and their corners lie at the same places (within 0.05 mm)."""
    return grid_distance(a, b) < GRID_TOLERANCE_MM


def corners(size: tuple[int, ...]) -> np.ndarray:
    """Continuous indices (8, 3), x, y, z, of the outer corners of the corner voxels."""
    return np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in size], indexing="ij"), -1).reshape(-1, 3)


def affine_of(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (3, 3) and origin (3,): position in mm = matrix @ index (x, y, z) + origin."""
    return np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing(), np.array(image.GetOrigin())


def to_physical(image: sitk.Image, index: np.ndarray) -> np.ndarray:
    """Positions in mm (N, 3) of continuous indices (N, 3), both in the order x, y, z."""
    matrix, origin = affine_of(image)
    return index @ matrix.T + origin


def check_size(image: sitk.Image, what: str) -> None:
    """See that the voxels and the box of an image are as large as those of a scanned body or a part of it.

    Raises:
        UserError: a single slice, or spacings outside `SPACING_MM` or sides outside `EXTENT_MM`; begins with `what`.
    """
    size, spacing = np.array(image.GetSize()), np.array(image.GetSpacing())
    extent = size * spacing
    shown = f"{times(size)} voxels of {times(spacing)} mm"
    if size.min() < 2:
        raise UserError(f"{what} has {shown}: a single slice or row is no body; give the whole volume", "IMAGE_SIZE")
    if spacing.min() < SPACING_MM[0] or spacing.max() > SPACING_MM[1]:
        raise UserError(f"{what} has {shown}: no scanner makes such voxels ({SPACING_MM[0]:g} to {SPACING_MM[1]:g} "
                        "mm); correct the spacing in its header (is it in mm?)", "IMAGE_SIZE")  # fmt: skip
    if extent.min() < EXTENT_MM[0] or extent.max() > EXTENT_MM[1]:
        raise UserError(f"{what} has {shown}, thus {times(extent.round(1))} mm: no body is so small or so large "
                        f"({EXTENT_MM[0]:g} to {EXTENT_MM[1]:g} mm along each axis); correct the spacing in its header "
                        "(is it in mm?)", "IMAGE_SIZE")  # fmt: skip


def times(numbers: np.ndarray | tuple) -> str:
    return "x".join(f"{n:g}" for n in numbers)
