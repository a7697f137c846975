"""The voxels of one DICOM file, decoded, without padding, in the unit of the modality."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels import get_decoder, pixel_array
from scipy import ndimage

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.hu_suv import AIR_HU
from nnUNet_raw_conversion.dicom.fields import field_name
from nnUNet_raw_conversion.dicom.limits import check_file, check_pixels

VOXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
FRAME_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
EMPTY = {"CT": float(AIR_HU), "PT": 0.0}
"""What padding becomes: air in HU, no activity."""
# The lowest and the highest value that tissue, air, bone and metal have: the extended scale of CT ends at 30 710 HU.
# In PET nothing is below 0 but noise.
PLAUSIBLE = {"CT": (float(AIR_HU), 31000.0), "PT": (0.0, np.inf)}
# What decodes a compressed syntax where pydicom cannot, by what pydicom says that it misses
INSTALL = {"openjpeg": "pylibjpeg pylibjpeg-openjpeg", "gdcm": "python-gdcm", "libjpeg": "python-gdcm"}


@dataclass
class Slice:
    """One slice (one frame) as it was stored."""

    header: pydicom.Dataset
    stored: np.ndarray
    """(rows, columns) without slope and intercept."""


def read_frames(file: Path, what: str) -> Iterator[Slice]:
    """The slices of one file; `what` begins the message of an error.

    Raises:
        UserError: the file cannot be read or decoded, or is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_file(file)
            dataset = pydicom.dcmread(file, force=True)
    except UserError as error:
        raise UserError(f"{what}: {error}", error.code) from None
    except MemoryError:
        raise
    except Exception:
        raise UserError(f"{what}: a file cannot be read; copy the series again", "SLICE_UNREADABLE") from None
    if not any(keyword in dataset for keyword in VOXELS):
        raise UserError(f"{what}: a file has no voxels, it ends too early; copy the series again", "SLICE_UNREADABLE")
    stored = _stored(dataset, what)
    for keyword in VOXELS:
        dataset.pop(keyword, None)
    if stored.ndim == 2:
        yield Slice(dataset, stored)
    elif len(dataset.get(FRAME_GROUPS[1], [])) != len(stored):
        raise UserError(f"{what}: is multi-frame without the positions of its frames; export it slice by slice",
                        "FRAMES_WITHOUT_PLACES")  # fmt: skip
    else:
        yield from (Slice(header, frame) for header, frame in zip(_unfolded(dataset), stored, strict=True))


def rescaled(one: Slice, what: str) -> np.ndarray:
    """Voxels in the unit of the modality (PS3.3 C.11.1: stored x RescaleSlope + RescaleIntercept), float32.

    Padding, which lies outside of the field of view and means nothing, becomes air in CT and 0 in PET.
    """
    header = one.header
    if "ModalityLUTSequence" in header:
        raise UserError(f"{what}: has a ModalityLUTSequence (0028,3000) in place of a slope; export it with "
                        "RescaleSlope (0028,1053)", "RESCALE_MISSING")  # fmt: skip
    slope = numbers_of(header, "RescaleSlope", 1, what)[0]
    intercept = numbers_of(header, "RescaleIntercept", 1, what)[0] if header.get("RescaleIntercept") else 0
    if slope == 0:
        raise UserError(f"{what}: RescaleSlope (0028,1053) is 0; export it again", "RESCALE_MISSING")
    values = (one.stored * slope + intercept).astype(np.float32)
    modality = str(header.get("Modality"))
    if modality in EMPTY:
        padding = _padding(header, one.stored, values, *PLAUSIBLE[modality])
        if padding is not None:
            values[padding] = EMPTY[modality]
    return values


def numbers_of(header: pydicom.Dataset, keyword: str, count: int, what: str) -> list[float]:
    """The `count` finite numbers of a field.

    Raises:
        UserError: they are not there.
    """
    try:
        value = header.get(keyword)
        numbers = [float(v) for v in (value if count > 1 else [value])]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise UserError(f"{what}: {field_name(keyword)} is missing or not a number in some slices; export it again",
                        "FIELD_MISSING")  # fmt: skip
    return numbers


def _stored(dataset: pydicom.Dataset, what: str) -> np.ndarray:
    """Voxels (rows, columns) or (frames, rows, columns) as stored."""
    if dataset.get("SamplesPerPixel", 1) != 1:
        raise UserError(f"{what}: is a picture in colours, not {dataset.get('Modality')} voxels; take another series",
                        "NO_VOLUME")  # fmt: skip
    check_pixels(dataset, what)
    if "TransferSyntaxUID" not in dataset.file_meta:  # file without preamble
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Dataset.pixel_array would keep a second copy; the bits above the value may be those of padding
            stored = pixel_array(dataset, correct_unused_bits=False)
    except MemoryError:
        raise
    except Exception:
        raise _undecodable(dataset.file_meta.TransferSyntaxUID, what) from None
    frames = int(dataset.get("NumberOfFrames") or 1)
    stored = stored.reshape(frames, *stored.shape[-2:]) if frames > 1 or FRAME_GROUPS[1] in dataset else stored
    unused = 0 if stored.dtype.kind == "f" else dataset.BitsAllocated - dataset.BitsStored
    if not unused:
        return stored
    value = stored << unused >> unused  # old CTs keep overlays in the bits above the value
    padded = _is_declared(dataset, stored)  # -2000 needs more bits than the 12 of the value
    return value if padded is None else np.where(padded, stored, value)


def _undecodable(syntax: pydicom.uid.UID, what: str) -> UserError:
    """Why voxels cannot be decoded: nothing that is installed can, or they are damaged."""
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return UserError(f"{what}: is stored as {syntax.name}, which cannot be read here; export it without "
                         "compression (Explicit VR Little Endian)", "CODEC_MISSING")  # fmt: skip
    if not decoder.is_available:
        missing = " ".join(decoder.missing_dependencies)
        package = next((name for part, name in INSTALL.items() if part in missing), "pylibjpeg")
        return UserError(f"{what}: is {syntax.name}; to read it, `pip install {package}`, or export it without "
                         "compression", "CODEC_MISSING")  # fmt: skip
    how = f"is {syntax.name} and" if syntax.is_compressed else "ends too early or"
    return UserError(f"{what}: a file {how} is damaged; copy it again", "SLICE_UNREADABLE")


def _padding(
    header: pydicom.Dataset, stored: np.ndarray, values: np.ndarray, lowest: float, highest: float
) -> np.ndarray | None:
    """Where the voxels of a slice are padding: bool (rows, columns), or None where none is.

    What no tissue can have is padding wherever it is declared. A value that tissue can have as well (0 HU) is padding
    only where it reaches the rim of the slice; so is one that is too high even for metal and not declared.
    """
    declared = _is_declared(header, stored)
    absurd = values > highest
    if declared is None and not absurd.any():
        return None
    declared = np.zeros(stored.shape, bool) if declared is None else declared
    sure = declared & ((values < lowest) | absurd)
    doubtful = (declared | absurd) & (values != lowest) & ~sure
    if doubtful.any():
        rim = np.zeros(stored.shape, bool)
        rim[[0, -1]] = rim[:, [0, -1]] = True
        sure |= ndimage.binary_propagation(rim & doubtful, mask=doubtful)
    return sure


def _is_declared(header: pydicom.Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Where voxels have the Pixel Padding Value (0028,0120), or lie between it and its Range Limit (0028,0121).

    PS3.3 C.7.5.1.1.2. The value is stored as signed or unsigned like the voxels, but scanners mix them up (63536 for
    -2000), so that the bits are compared. None where nothing is declared.
    """
    bounds = []
    kinds = ("Float", "DoubleFloat") if stored.dtype.kind == "f" else ("",)
    for kind in kinds:
        for keyword in (f"{kind}PixelPaddingValue", f"{kind}PixelPaddingRangeLimit"):
            try:
                bounds.append(np.array(header[keyword].value).astype(stored.dtype).reshape(()))
            except (KeyError, ValueError, TypeError, OverflowError):
                continue
    if not bounds:
        return None
    return (stored >= min(bounds)) & (stored <= max(bounds))


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
