"""The voxels of a CT or PET series as one image in LPS coordinates, or a reason why they are none."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.pixels import pixel_array

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.fields import field_name, text_of
from nnUNet_raw_conversion.dicom.index import Series

# Headers round positions to 0.1 mm at worst. 0.1 mm is 1/20 of the thinnest slices that whole-body scans have.
EVEN_MM = 0.1
COSINE_TOLERANCE = 1e-3
VOXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
FRAME_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
# What tells the frames of a dynamic or gated series at one position from each other.
FRAME_TIMES = ("AcquisitionDate", "AcquisitionTime", "AcquisitionDateTime", "FrameReferenceTime", "TriggerTime",
               "FrameReferenceDateTime", "FrameAcquisitionDateTime", "TemporalPositionIndex", "AcquisitionNumber",
               "TemporalPositionIdentifier", "NominalPercentageOfCardiacPhase")  # fmt: skip


@dataclass
class Slice:
    """One slice (one frame) as it was stored."""

    header: pydicom.Dataset
    stored: np.ndarray
    """(rows, columns) without slope and intercept."""


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
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction.ravel().tolist())
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
    volume = read_slices(series)
    return volume.image(), volume.headers, volume.notes


def read_slices(series: Series) -> Volume:
    """As `read_volume`, with the voxels still as an array."""
    what = f"{series.modality} series '{series.description}'"
    notes: list[str] = []
    slices = _images_only([one for file in series.files for one in _frames(file, what)], what, notes)
    direction = _direction(slices, what)
    positions = np.array([_numbers(one.header, "ImagePositionPatient", 3, what) for one in slices])
    order = np.argsort(positions @ direction[:, 2], kind="stable")
    slices, positions = [slices[i] for i in order], positions[order]
    slices, positions = _without_copies(slices, positions, direction[:, 2], what, notes)
    step = _slice_spacing(positions, direction, what)
    row_spacing, column_spacing = _numbers(slices[0].header, "PixelSpacing", 2, what)
    _check_count(slices, notes)
    headers = [one.header for one in slices]
    values = np.empty((len(slices), *slices[0].stored.shape), dtype=np.float32)
    for k, header in enumerate(headers):
        values[k] = _rescaled(slices[k], what)
        slices[k] = Slice(header, None)  # one copy of the voxels is enough
    return Volume(values, (column_spacing, row_spacing, step), tuple(map(float, positions[0])), direction, headers,
                  notes)  # fmt: skip


def _frames(file: Path, what: str) -> Iterator[Slice]:
    """The slices of one file; `what` begins the message of an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(file, force=True)
    except Exception:
        raise UserError(f"{what}: a file cannot be read; copy the series again") from None
    if not any(keyword in dataset for keyword in VOXELS):
        raise UserError(f"{what}: a file has no voxels, it ends too early; copy the series again")
    stored = _stored(dataset, what)
    for keyword in VOXELS:
        dataset.pop(keyword, None)
    if stored.ndim == 2:
        yield Slice(dataset, stored)
    elif len(dataset.get(FRAME_GROUPS[1], [])) != len(stored):
        raise UserError(f"{what}: is multi-frame without the positions of its frames; export it slice by slice")
    else:
        yield from (Slice(header, frame) for header, frame in zip(_unfolded(dataset), stored, strict=True))


def _stored(dataset: pydicom.Dataset, what: str) -> np.ndarray:
    """Voxels (rows, columns) or (frames, rows, columns) as stored."""
    if dataset.get("SamplesPerPixel", 1) != 1:
        raise UserError(f"{what}: is a picture in colours, not {dataset.get('Modality')} voxels; take another series")
    if "TransferSyntaxUID" not in dataset.file_meta:  # file without preamble
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = pixel_array(dataset)  # Dataset.pixel_array would keep a second copy
    except Exception:
        how = f"is {syntax.name} and cannot be decoded" if syntax.is_compressed else "ends too early or is damaged"
        hint = "`pip install python-gdcm`, or copy it again" if syntax.is_compressed else "copy it again"
        raise UserError(f"{what}: a file {how}; {hint}") from None
    frames = int(dataset.get("NumberOfFrames") or 1)
    stored = stored.reshape(frames, *stored.shape[-2:]) if frames > 1 or FRAME_GROUPS[1] in dataset else stored
    unused = 0 if stored.dtype.kind == "f" else dataset.BitsAllocated - dataset.BitsStored
    return stored << unused >> unused if unused else stored  # old CTs keep overlays in the bits above the value


def _unfolded(dataset: pydicom.Dataset) -> Iterator[pydicom.Dataset]:
    """A header for each frame, as if it were a file of its own: the functional groups' contents at the top level."""
    common = pydicom.Dataset()
    common.update({e.tag: e for e in dataset if e.keyword not in (*FRAME_GROUPS, "NumberOfFrames")})
    for own in dataset.PerFrameFunctionalGroupsSequence:
        header = pydicom.Dataset()
        header.update(common)
        for group in (*dataset.get(FRAME_GROUPS[0], []), own):
            for macro in group:
                if macro.keyword == "RealWorldValueMappingSequence":
                    header[macro.tag] = macro
                elif macro.VR == "SQ" and macro.value:
                    header.update(macro.value[0])
        _take_real_world_units(header)
        yield header


def _take_real_world_units(header: pydicom.Dataset) -> None:
    """Write Units and slope of an enhanced PET as an ordinary PET has them.

    It says its unit by a UCUM code of the Real World Value Mapping (PS3.3 C.7.6.16.2.11), Bq/ml before SUV.
    """
    if header.get("Modality") != "PT" or header.get("Units"):
        return
    mappings = {}
    for mapping in header.get("RealWorldValueMappingSequence") or []:
        for unit in mapping.get("MeasurementUnitsCodeSequence", []) if "RealWorldValueSlope" in mapping else []:
            mappings[str(unit.get("CodeValue")).strip()] = mapping
    for code, units in (("Bq/ml", "BQML"), ("{SUVbw}g/ml", "GML"), ("g/ml{SUVbw}", "GML"), ("{counts}", "CNTS")):
        if code in mappings:
            header.Units = units
            header.RescaleSlope = float(mappings[code].RealWorldValueSlope)
            header.RescaleIntercept = float(mappings[code].get("RealWorldValueIntercept") or 0)
            return


def _images_only(slices: list[Slice], what: str, notes: list[str]) -> list[Slice]:
    kept = [one for one in slices if "LOCALIZER" not in (one.header.get("ImageType") or [])
            and "Secondary Capture" not in pydicom.uid.UID(one.header.get("SOPClassUID", "")).name]  # fmt: skip
    if len(kept) < 2:
        kind = "has only one slice" if kept else "is a localizer or a screenshot"
        raise UserError(f"{what}: {kind}; take the series of axial slices")
    if len(kept) < len(slices):
        notes.append(f"{len(slices) - len(kept)} localizers or screenshots in the {what} left out")
    sizes = Counter(one.stored.shape for one in kept)
    if len(sizes) > 1:
        shown = " and ".join(f"{n} of {columns}x{rows}" for (rows, columns), n in sizes.most_common(2))
        raise UserError(f"{what}: has slices of several sizes ({shown}); export each stack as a series of its own")
    return kept


def _direction(slices: list[Slice], what: str) -> np.ndarray:
    """Unit axes (3, 3) of the slices, as columns."""
    cosines = np.array([_numbers(one.header, "ImageOrientationPatient", 6, what) for one in slices])
    if np.abs(cosines - cosines[0]).max() > COSINE_TOLERANCE:
        raise UserError(f"{what}: its slices lie in several directions; export each stack as a series of its own")
    row, column = cosines.mean(axis=0).reshape(2, 3)
    lengths = np.array([row @ row, column @ column, row @ column + 1])
    if np.abs(lengths - 1).max() > COSINE_TOLERANCE:
        raise UserError(f"{what}: ImageOrientationPatient (0020,0037) is not a pair of perpendicular unit vectors; "
                        "export the series again")  # fmt: skip
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
        if np.array_equal(_rescaled(one, what), _rescaled(other, what)):
            continue
        if any(text_of(one.header, keyword) != text_of(other.header, keyword) for keyword in FRAME_TIMES):
            raise UserError(f"{what}: has several frames at one position (dynamic or gated); take a static series, "
                            "or export one frame")  # fmt: skip
        raise UserError(f"{what}: has two different slices at one position; export the series again")
    if len(kept) < len(slices):
        notes.append(f"{len(slices) - len(kept)} slices that are twice in the {what} counted once")
    if len(kept) < 2:
        raise UserError(f"{what}: has only one slice; take the series of axial slices")
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
                        f"{angle:.1f} degrees?); take an untilted series or resample it")  # fmt: skip
    steps = np.diff(offsets[:, 2])
    usual = float(np.median(steps))
    if steps.max() > 1.5 * usual:
        raise UserError(f"{what}: slices are missing, there is a gap of {steps.max():.2f} mm between slices every "
                        f"{usual:.2f} mm; copy or export the whole series again")  # fmt: skip
    even = np.linspace(0, offsets[-1, 2], len(offsets))
    if np.abs(offsets[:, 2] - even).max() > EVEN_MM:
        raise UserError(f"{what}: its slices are uneven, {steps.min():.2f} to {steps.max():.2f} mm apart; "
                        "reconstruct it with one slice distance")  # fmt: skip
    return float(offsets[-1, 2] / (len(offsets) - 1))


def _check_count(slices: list[Slice], notes: list[str]) -> None:
    """Slices that are missing at the ends leave no gap; a PET says in NumberOfSlices (0054,0081) how many it has."""
    expected = slices[0].header.get("NumberOfSlices")
    if isinstance(expected, int) and expected > len(slices):
        notes.append(f"PET has {len(slices)} slices, but says it has {expected} (0054,0081); is it complete?")


def _rescaled(one: Slice, what: str) -> np.ndarray:
    """Voxels in the unit of the modality (PS3.3 C.11.1: stored x RescaleSlope + RescaleIntercept)."""
    if "ModalityLUTSequence" in one.header:
        raise UserError(f"{what}: has a ModalityLUTSequence (0028,3000) in place of a slope; export it with "
                        "RescaleSlope (0028,1053)")  # fmt: skip
    slope = _numbers(one.header, "RescaleSlope", 1, what)[0]
    intercept = _numbers(one.header, "RescaleIntercept", 1, what)[0] if one.header.get("RescaleIntercept") else 0
    if slope == 0:
        raise UserError(f"{what}: RescaleSlope (0028,1053) is 0; export it again")
    return (one.stored * slope + intercept).astype(np.float32)


def _numbers(header: pydicom.Dataset, keyword: str, count: int, what: str) -> list[float]:
    """The `count` finite numbers of a field."""
    try:
        value = header.get(keyword)
        numbers = [float(v) for v in (value if count > 1 else [value])]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise UserError(f"{what}: {field_name(keyword)} is missing or not a number in some slices; export it again")
    return numbers
