"""The voxels of a CT or PET series as one image in LPS coordinates, or a reason why they are none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pydicom
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.fields import text_of
from nnUNet_raw_conversion.dicom.index import Series
from nnUNet_raw_conversion.dicom.limits import MOST_VOXELS
from nnUNet_raw_conversion.dicom.voxels import EMPTY, Slice, numbers_of, read_frames, rescaled

# Headers round positions to 0.1 mm at worst. 0.1 mm is 1/20 of the thinnest slices that whole-body scans have.
EVEN_MM = 0.1
COSINE_TOLERANCE = 1e-3
SLAB = 32
"""Slices that are made voxels of an image at a time."""
# What tells the frames of a dynamic or gated series at one position from each other.
FRAME_TIMES = ("AcquisitionDate", "AcquisitionTime", "AcquisitionDateTime", "FrameReferenceTime", "TriggerTime",
               "FrameReferenceDateTime", "FrameAcquisitionDateTime", "TemporalPositionIndex", "AcquisitionNumber",
               "TemporalPositionIdentifier", "NominalPercentageOfCardiacPhase")  # fmt: skip


@dataclass
class Volume:
    """A series in the order of its slices along the normal of their plane."""

    values: np.ndarray
    """float32 (z, y, x) in the unit of the modality."""
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: np.ndarray
    """(3, 3), its columns are the axes x, y, z in LPS."""
    headers: list[pydicom.Dataset]
    """One a slice."""
    notes: list[str]

    def image(self) -> sitk.Image:
        image = sitk.GetImageFromArray(self.values)
        _place(image, self)
        return image


def read_volume(series: Series) -> tuple[sitk.Image, list[pydicom.Dataset], list[str]]:
    """A CT or PET series as float32 image in the unit of the modality (HU, or the PET's Units).

    Slope and intercept are applied slice by slice in floating point, since PET slopes may differ by a factor of 1e4
    between the slices of a series (SimpleITK's series reader takes the voxel type of the first slice and overflows).
    Slices are put in order by ImagePositionPatient (0020,0032) along the normal of ImageOrientationPatient
    (0020,0037); the axes of the image are those of the slices (PS3.3 C.7.6.2.1.1, LPS as in ITK). Enhanced multi-frame
    images (PS3.3 C.7.6.16) are taken apart into their frames.

    Returns:
        The image, the headers of its slices in their order (those of a frame of a multi-frame image with the functional
        groups unfolded into them), and what the user should know, one sentence each.

    Raises:
        UserError: the series is a localizer or no image; a file cannot be decoded or ends too early; slices are
            missing, uneven, of several sizes or directions; the gantry was tilted; several frames (dynamic, gated) or
            contradicting copies of one slice.
    """
    stack = _stack(series)
    slices, what = stack.slices, stack.what
    rows, columns = slices[0].stored.shape
    image = sitk.Image([columns, rows, len(slices)], sitk.sitkFloat32)
    lowest = EMPTY["CT"] if series.modality == "CT" else -np.inf
    low = False
    for first in range(0, len(slices), SLAB):
        slab = np.stack([rescaled(one, what) for one in slices[first : first + SLAB]])
        low |= bool(slab.min() < lowest)
        image[:, :, first : first + SLAB] = sitk.GetImageFromArray(np.maximum(slab, lowest, dtype=np.float32))
        slices[first : first + SLAB] = [None] * len(slab)  # one copy of the voxels is enough
    _place(image, stack)
    return image, stack.headers, stack.notes + [f"CT padding below {lowest:g} HU raised to {lowest:g}"] * low


def read_slices(series: Series) -> Volume:
    """As `read_volume`, with the voxels still as an array."""
    stack = _stack(series)
    values = np.empty((len(stack.slices), *stack.slices[0].stored.shape), dtype=np.float32)
    for k in range(len(values)):
        values[k] = rescaled(stack.slices[k], stack.what)
        stack.slices[k] = None
    return Volume(values, stack.spacing, stack.origin, stack.direction, stack.headers, stack.notes)


@dataclass
class _Stack:
    """The slices of a series in their order, and where they lie."""

    slices: list[Slice | None]
    headers: list[pydicom.Dataset]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: np.ndarray
    notes: list[str]
    what: str


def _stack(series: Series) -> _Stack:
    what = f"{series.modality} series '{series.description}'"
    notes: list[str] = []
    slices = _images_only(_all_frames(series, what), what, notes)
    direction = _direction(slices, what)
    positions = np.array([numbers_of(one.header, "ImagePositionPatient", 3, what) for one in slices])
    order = np.argsort(positions @ direction[:, 2], kind="stable")
    slices, positions = [slices[i] for i in order], positions[order]
    slices, positions = _without_copies(slices, positions, direction[:, 2], what, notes)
    step = _slice_spacing(positions, direction, what)
    row_spacing, column_spacing = numbers_of(slices[0].header, "PixelSpacing", 2, what)
    _check_count(slices, notes)
    origin = tuple(map(float, positions[0]))
    headers = [one.header for one in slices]
    return _Stack(slices, headers, (column_spacing, row_spacing, step), origin, direction, notes, what)


def _place(image: sitk.Image, where: Volume | _Stack) -> None:
    image.SetSpacing(where.spacing)
    image.SetOrigin(where.origin)
    image.SetDirection(where.direction.ravel().tolist())


def _all_frames(series: Series, what: str) -> list[Slice]:
    slices: list[Slice] = []
    voxels = 0
    for file in series.files:
        for one in read_frames(file, what):
            voxels += one.stored.size
            if voxels > MOST_VOXELS:
                raise UserError(f"{what}: has more than {MOST_VOXELS:.0e} voxels, which no scan has; export it again",
                                "DICOM_TOO_LARGE")  # fmt: skip
            slices.append(one)
    return slices


def _images_only(slices: list[Slice], what: str, notes: list[str]) -> list[Slice]:
    kept = [one for one in slices if "LOCALIZER" not in (one.header.get("ImageType") or [])
            and "Secondary Capture" not in pydicom.uid.UID(one.header.get("SOPClassUID", "")).name]  # fmt: skip
    if len(kept) < 2:
        kind = "has only one slice" if kept else "is a localizer or a screenshot"
        raise UserError(f"{what}: {kind}; take the series of axial slices", "NO_VOLUME")
    if len(kept) < len(slices):
        notes.append(f"{len(slices) - len(kept)} localizers or screenshots in the {what} left out")
    sizes = Counter(one.stored.shape for one in kept)
    if len(sizes) > 1:
        shown = " and ".join(f"{n} of {columns}x{rows}" for (rows, columns), n in sizes.most_common(2))
        raise UserError(f"{what}: has slices of several sizes ({shown}); export each stack as a series of its own",
                        "SLICES_DIFFER")  # fmt: skip
    return kept


def _direction(slices: list[Slice], what: str) -> np.ndarray:
    """Unit axes (3, 3) of the slices, as columns."""
    cosines = np.array([numbers_of(one.header, "ImageOrientationPatient", 6, what) for one in slices])
    if np.abs(cosines - cosines[0]).max() > COSINE_TOLERANCE:
        raise UserError(f"{what}: its slices lie in several directions; export each stack as a series of its own",
                        "SLICES_DIFFER")  # fmt: skip
    row, column = cosines.mean(axis=0).reshape(2, 3)
    lengths = np.array([row @ row, column @ column, row @ column + 1])
    if np.abs(lengths - 1).max() > COSINE_TOLERANCE:
        raise UserError(f"{what}: ImageOrientationPatient (0020,0037) is not a pair of perpendicular unit vectors; "
                        "export the series again", "SLICES_DIFFER")  # fmt: skip
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row  # digits lost by rounding; ITK wants exactly perpendicular axes
    column /= np.linalg.norm(column)
    return np.stack([row, column, np.cross(row, column)], axis=1)


def _without_copies(
    slices: list[Slice], positions: np.ndarray, normal: np.ndarray, what: str, notes: list[str]
) -> tuple[list[Slice], np.ndarray]:
    """Drop slices that are there twice with the same voxels; they are in order along `normal`."""
    kept = [0]
    for i in range(1, len(slices)):
        if (positions[i] - positions[kept[-1]]) @ normal > EVEN_MM / 2:
            kept.append(i)
            continue
        one, other = slices[kept[-1]], slices[i]
        if np.array_equal(rescaled(one, what), rescaled(other, what)):
            continue
        if any(text_of(one.header, keyword) != text_of(other.header, keyword) for keyword in FRAME_TIMES):
            raise UserError(f"{what}: has several frames at one position (dynamic or gated); take a static series, "
                            "or export one frame", "SERIES_DYNAMIC")  # fmt: skip
        raise UserError(f"{what}: has two different slices at one position; export the series again",
                        "SLICES_CONTRADICT")  # fmt: skip
    if len(kept) < len(slices):
        notes.append(f"{len(slices) - len(kept)} slices that are twice in the {what} counted once")
    if len(kept) < 2:
        raise UserError(f"{what}: has only one slice; take the series of axial slices", "NO_VOLUME")
    return [slices[i] for i in kept], positions[kept]


def _slice_spacing(positions: np.ndarray, direction: np.ndarray, what: str) -> float:
    """Distance in mm between the slices at `positions` (N, 3), which are in order.

    The slices of a tilted gantry are shifted against each other and lie on no grid that NIfTI knows. They are refused
    and not resampled: whole-body PET/CT is never tilted, so that a tilt means a wrong series.
    """
    offsets = (positions - positions[0]) @ direction  # in the directions of row, column, normal
    drift = np.abs(offsets[:, :2] - offsets[0, :2]).max()
    if drift > EVEN_MM:
        angle = np.degrees(np.arctan2(np.linalg.norm(offsets[-1, :2]), offsets[-1, 2]))
        raise UserError(f"{what}: its slices are shifted against each other by up to {drift:.1f} mm (gantry tilt of "
                        f"{angle:.1f} degrees?); take an untilted series or resample it", "GANTRY_TILT")  # fmt: skip
    steps = np.diff(offsets[:, 2])
    usual = float(np.median(steps))
    if steps.max() > 1.5 * usual:
        raise UserError(f"{what}: slices are missing, there is a gap of {steps.max():.2f} mm between slices every "
                        f"{usual:.2f} mm; copy or export the whole series again", "SLICES_MISSING")  # fmt: skip
    even = np.linspace(0, offsets[-1, 2], len(offsets))
    if np.abs(offsets[:, 2] - even).max() > EVEN_MM:
        raise UserError(f"{what}: its slices are uneven, {steps.min():.2f} to {steps.max():.2f} mm apart; "
                        "reconstruct it with one slice distance", "SLICES_UNEVEN")  # fmt: skip
    return float(offsets[-1, 2] / (len(offsets) - 1))


def _check_count(slices: list[Slice], notes: list[str]) -> None:
    """Slices that are missing at the ends leave no gap; a PET says in NumberOfSlices (0054,0081) how many it has."""
    expected = slices[0].header.get("NumberOfSlices")
    if isinstance(expected, int) and expected > len(slices):
        notes.append(f"PET has {len(slices)} slices, but says it has {expected} (0054,0081); is it complete?")
