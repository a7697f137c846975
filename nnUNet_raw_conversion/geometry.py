"""Where the voxels of two images lie in the patient, and how to bring one image onto the grid of another."""

from __future__ import annotations

import zlib
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.files import as_text

# Headers are rounded to single precision and moved through quaternions; an offset of 1% of a PET voxel is none.
GRID_TOLERANCE_MM = 0.05
# The axes x, y, z of every image that we write run to the patient's left, back and head, as those of axial DICOM slices
# do. Where nothing is oblique the direction matrix is then the identity, which even readers that ignore it get right.
ORIENTATION = "LPS"


def read_image(path: Path, called: str | None = None) -> sitk.Image:
    """Read a scalar 3D image, with the voxel type that the file has.

    Args:
        called: what messages say instead of the path, where names of folders and files may be those of patients.

    Raises:
        UserError: the file is missing, cannot be read to its end, is not a scalar 3D image, or (NIfTI) has NaN voxels.
    """
    path = Path(path)
    name = called or str(path)
    if not path.is_file():
        raise UserError(f"{name}: there is no such file; add it or correct its name")
    try:
        with as_text(path) as readable:
            image = sitk.ReadImage(str(readable))
    except RuntimeError as error:
        # ITK's exceptions are many lines; the last one says what happened.
        reason = "" if called else f" ({str(error).strip().splitlines()[-1].split('): ')[-1]})"
        raise UserError(f"{name}: cannot be read; is the file complete?{reason}") from None
    if path.name.endswith((".nii", ".nii.gz")):
        _check_nifti(path, name)
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        what = f"{image.GetDimension()}D with {image.GetNumberOfComponentsPerPixel()} values a voxel"
        raise UserError(f"{name}: is {what}; give one 3D image with one value a voxel")
    return image


def check_finite(voxels: np.ndarray, what: str) -> None:
    """Raises UserError, beginning with `what`, if there are voxels that are NaN or infinite."""
    bad = voxels.size - np.count_nonzero(np.isfinite(voxels))
    if bad:
        raise UserError(f"{what}: has {bad} voxels that are NaN or infinite; set them to air in CT, to 0 else")


def canonical(image: sitk.Image) -> sitk.Image:
    """The image with its axes in the order and senses of `ORIENTATION`, or nearest to them where it is oblique.

    Axes are exchanged and flipped only: every voxel keeps its value and its place in the patient.
    """
    return sitk.DICOMOrient(image, ORIENTATION)


def grid_distance(a: sitk.Image, b: sitk.Image) -> float:
    """How far (mm, along one axis of space) a corner of `a` lies from the same corner of `b`, two 3D images; infinite
    where their numbers of voxels differ. It is the most by which any voxel lies elsewhere."""
    if a.GetSize() != b.GetSize():
        return np.inf
    corners = _corners(a)
    return float(np.abs(_to_physical(a, corners) - _to_physical(b, corners)).max())


def same_grid(a: sitk.Image, b: sitk.Image) -> bool:
    """Whether two 3D images have the same size and their corners lie at the same places (within 0.05 mm)."""
    return grid_distance(a, b) < GRID_TOLERANCE_MM


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
        UserError: `grid` cannot be understood, or asks for the CT's where there is no CT or none inside the PET.
    """
    chosen = parse_grid(grid)
    if chosen == "pet":
        return canonical(pet)
    if chosen == "ct":
        if ct is None:
            raise UserError("--grid ct: there is no CT; say --grid pet or a spacing")
        return _cut_to(canonical(ct), pet)
    pet = canonical(pet)
    extent = np.array(pet.GetSize()) * pet.GetSpacing()
    size = np.ceil(extent / chosen - 1e-3).astype(int)
    result = sitk.Image(size.tolist(), sitk.sitkUInt8)
    result.SetSpacing(chosen)
    result.SetDirection(pet.GetDirection())
    # Both grids have one middle
    middle = _to_physical(pet, (np.array(pet.GetSize()) - 1) / 2)
    result.SetOrigin((middle - _affine(result)[0] @ ((size - 1) / 2)).tolist())
    return result


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


def _check_nifti(path: Path, name: str) -> None:
    """Look for two faults of NIfTI files that ITK (5.4) hides: it reads zeros where the file was cut off, and zeros
    for NaN and infinity, so that a CT padded with NaN would have water around the patient."""
    try:
        voxels = np.asanyarray(nibabel.load(path).dataobj.get_unscaled())
    except (nibabel.filebasedimages.ImageFileError, EOFError, OSError, ValueError, zlib.error):
        raise UserError(f"{name}: ends too early; copy or download it again") from None
    if voxels.dtype.kind == "f":
        check_finite(voxels, name)


def _cut_to(image: sitk.Image, box: sitk.Image) -> sitk.Image:
    """The part of `image` whose voxels lie within the bounds of `box` along the axes of `image`."""
    matrix, origin = _affine(image)
    index = np.linalg.solve(matrix, (_to_physical(box, _corners(box)) - origin).T).T
    low = np.maximum(np.ceil(index.min(0) - 1e-3), 0).astype(int)
    high = np.minimum(np.floor(index.max(0) + 1e-3) + 1, image.GetSize()).astype(int)
    if np.any(high <= low):
        raise UserError("CT and PET do not overlap: different subjects or wrong pairing; pair the files anew")
    return sitk.RegionOfInterest(image, (high - low).tolist(), low.tolist())


def _corners(image: sitk.Image) -> np.ndarray:
    """Continuous indices (8, 3), x, y, z, of the outer corners of the corner voxels."""
    return np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in image.GetSize()], indexing="ij"), -1).reshape(-1, 3)


def _affine(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (3, 3) and origin (3,): position in mm = matrix @ index (x, y, z) + origin."""
    return np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing(), np.array(image.GetOrigin())


def _to_physical(image: sitk.Image, index: np.ndarray) -> np.ndarray:
    """Positions in mm (N, 3) of continuous indices (N, 3), both in the order x, y, z."""
    matrix, origin = _affine(image)
    return index @ matrix.T + origin
