"""Small synthetic DICOM series on disk: a leaning trunk with one hot lesion, as CT and as PET, told as by any scanner.

`write_ct(folder)` and `write_pet(folder)` write the same patient with default settings. Any further keyword is a DICOM
keyword that is set in every file (None removes it), also those of the radiopharmaceutical's sequence:

    write_pet(folder, Units="CNTS", RadionuclideTotalDose=None, DecayCorrection="ADMIN")
    write_pet(folder, slopes=[1, 5.5, ...], per_slice=[{"AcquisitionTime": "120100"}, ...])
    write_pet(folder, private={(0x7053, "Philips PET Private Group", 0x00): ("DS", "0.00038")})
    write_ct(folder, direction=oblique, enhanced=True, transfer_syntax=RLELossless)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydicom import Dataset, FileMetaDataset, Sequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedPETImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    generate_uid,
)

# Names that must never be seen in any output; tests search for them.
PATIENT, NAME, BIRTH = "PID-4711", "Muster^Erika", "19641122"
DATE, SERIES_TIME, INJECTION_TIME = "20210304", "131500", "121500"  # 1 h from injection to scan
WEIGHT_KG, DOSE_BQ, HALF_LIFE_S = 70.0, 350e6, 6586.2
# SUVbw = Bq/ml x weight in g / (dose x 2^-(1 h / half-life)): what the default PET needs
PET_FACTOR = 1000 * WEIGHT_KG / (DOSE_BQ * 0.5 ** (3600 / HALF_LIFE_S))
CT_SHAPE, CT_SPACING, CT_ORIGIN = (33, 36, 40), (4.5, 5.0, 5.0), (-91.0, -87.0, -83.0)  # z, y, x; x, y, z in mm
PET_SHAPE, PET_SPACING, PET_ORIGIN = (21, 18, 24), (7.0, 9.0, 6.5), (-80.5, -76.5, -65.0)
LESION_CENTRE, LESION_RADIUS = (20.0, 0.0, 5.0), 15.0  # mm, LPS
AXIAL = np.eye(3)
RADIOPHARMACEUTICAL = {
    "Radiopharmaceutical": "FDG",
    "RadiopharmaceuticalStartTime": INJECTION_TIME,
    "RadiopharmaceuticalStartDateTime": DATE + INJECTION_TIME,
    "RadionuclideTotalDose": DOSE_BQ,
    "RadionuclideHalfLife": HALF_LIFE_S,
    "RadionuclidePositronFraction": 0.97,
    "RadionuclideCodeSequence": ("C-111A1", "SRT", "^18^Fluorine"),
    "RadiopharmaceuticalStopTime": None,
    "RadiopharmaceuticalCodeSequence": None,
    "RadiopharmaceuticalVolume": None,
    "RadiopharmaceuticalStopDateTime": None,
}


def positions(shape: tuple, spacing: tuple, origin: tuple, direction: np.ndarray = AXIAL) -> np.ndarray:
    """Positions (z, y, x, 3) in mm, LPS, of the voxels of a grid; the columns of `direction` are its axes x, y, z."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)[..., ::-1]
    return index * np.array(spacing) @ np.asarray(direction).T + origin


def trunk_hu(mm: np.ndarray) -> np.ndarray:
    """The patient's CT at positions (..., 3): soft tissue 30 HU with a rim of fat of -100 HU in air of -1000 HU."""
    radius = _trunk(mm)
    return np.where(radius < 0.8, 30.0, np.where(radius < 1, -100.0, -1000.0))


def trunk_suv(mm: np.ndarray) -> np.ndarray:
    """The patient's PET at positions (..., 3): SUV 0.8, 7 in the lesion, 0.02 in air."""
    return np.where(_trunk(mm) < 1, 0.8, 0.02) + 6.2 * lesion(mm)


def lesion(mm: np.ndarray) -> np.ndarray:
    """Whether positions (..., 3) lie in the lesion."""
    return np.linalg.norm(mm - np.array(LESION_CENTRE), axis=-1) < LESION_RADIUS


def write_ct(
    folder: Path, hu: np.ndarray | None = None, *, shape: tuple = CT_SHAPE, spacing: tuple = CT_SPACING,
    origin: tuple = CT_ORIGIN, direction: np.ndarray = AXIAL, **options,
) -> list[Path]:  # fmt: skip
    """Write a CT series, by default with the trunk on its own grid; see `write_series`."""
    if hu is None:
        hu = trunk_hu(positions(shape, spacing, origin, direction))
    standard = {
        "Modality": "CT", "SeriesDescription": "WB CT 3.0", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "KVP": 120, "ConvolutionKernel": "B30f", "Manufacturer": "SIEMENS", "RescaleType": "HU",
    }  # fmt: skip
    return write_series(folder, hu, spacing, origin, direction, **{"slopes": 1.0, "intercept": -1024.0}
                        | standard | options)  # fmt: skip


def write_pet(
    folder: Path, values: np.ndarray | None = None, *, shape: tuple = PET_SHAPE, spacing: tuple = PET_SPACING,
    origin: tuple = PET_ORIGIN, direction: np.ndarray = AXIAL, **options,
) -> list[Path]:  # fmt: skip
    """Write a PET series of `values` in its Units, by default Bq/ml of the trunk (`PET_FACTOR` makes SUV of them).

    The slopes differ from slice to slice unless `slopes` says otherwise.
    """
    if values is None:
        values = trunk_suv(positions(shape, spacing, origin, direction)) / PET_FACTOR
    slopes = np.maximum(values.max(axis=(1, 2)), 1) / 32767
    standard = {
        "Modality": "PT", "SeriesDescription": "PET WB AC", "ImageType": ["ORIGINAL", "PRIMARY"],
        "Units": "BQML", "DecayCorrection": "START", "Manufacturer": "SIEMENS", "SeriesType": ["WHOLE BODY", "IMAGE"],
        "CorrectedImage": ["NORM", "DTIM", "ATTN", "SCAT", "DECY", "RAN"], "CountsSource": "EMISSION",
        "ActualFrameDuration": 120000, "DecayFactor": 1.0, "FrameReferenceTime": 60000,
    }  # fmt: skip
    return write_series(folder, values, spacing, origin, direction, **{"slopes": slopes, "intercept": 0.0}
                        | standard | options)  # fmt: skip


def write_series(
    folder: Path, values: np.ndarray, spacing: tuple, origin: tuple, direction: np.ndarray = AXIAL, *,
    slopes: float | Iterable[float] = 1.0, intercept: float | Iterable[float] = 0.0, patient: str = PATIENT,
    date: str = DATE, study: str = "1", series: str | None = None, per_slice: list[dict] | None = None,
    private: dict | None = None, omit_slices: Iterable[int] = (), enhanced: bool = False, signed: bool | None = None,
    transfer_syntax: str = ExplicitVRLittleEndian, names: str = "IM{:04d}", **tags,
) -> list[Path]:  # fmt: skip
    """Write one series, a file a slice (or one file if `enhanced`), and return the files from the first slice on.

    Files are named against the order of the slices. Series of one patient, date and `study` share the study UID and
    the frame of reference; `series` makes another series of what would else be the same.

    Args:
        values: (z, y, x) in the unit of the modality; stored as round((value - intercept) / slope).
        direction: its columns are the axes x, y, z of `values` in LPS.
        slopes, intercept: one number, or one a slice. signed: stored as int16 (default where values need it).
        per_slice: DICOM keywords of single slices, one dict a slice. omit_slices: slices that are not written.
        private: {(group, creator, element): (VR, value)}.
        names: of the files. tags: any DICOM keyword; None removes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    slopes = np.broadcast_to(np.asarray(slopes, dtype=float), len(values))
    intercepts = np.broadcast_to(np.asarray(intercept, dtype=float), len(values))
    stored = np.round((values - intercepts[:, None, None]) / slopes[:, None, None])
    signed = bool(stored.min() < 0 or stored.max() <= 32767) if signed is None else signed
    stored = stored.astype(np.int16 if signed else np.uint16)
    direction = np.asarray(direction, dtype=float)
    header = _header(tags, patient, date, study, f"{series} {tags['Modality']} {tags.get('SeriesDescription')}")
    _set_pixels(header, stored, spacing, signed)
    for (group, creator, element), (vr, value) in (private or {}).items():
        header.private_block(group, creator, create=True).add_new(element, vr, value)
    kept = [i for i in range(len(values)) if i not in set(omit_slices)]
    slices = [
        {"ImagePositionPatient": _numbers(np.asarray(origin) + i * spacing[2] * direction[:, 2]),
         "ImageOrientationPatient": _numbers(direction.T[:2].ravel()), "InstanceNumber": len(values) - i,
         "RescaleSlope": _number(slopes[i]), "RescaleIntercept": _number(intercepts[i]),
         "SOPInstanceUID": generate_uid(entropy_srcs=[header.SeriesInstanceUID, str(i)])}
        | (per_slice[i] if per_slice else {}) for i in range(len(values))
    ]  # fmt: skip
    if enhanced:
        file = folder / names.format(1)
        _save(_enhanced(header, [slices[i] for i in kept], stored[kept], spacing), stored[kept], file, transfer_syntax)
        return [file]
    files = []
    for i in kept:
        dataset = Dataset()
        dataset.update(header)
        _set(dataset, slices[i])
        files.append(folder / names.format(len(values) - i))
        _save(dataset, stored[i], files[-1], transfer_syntax)
    return files


def _trunk(mm: np.ndarray) -> np.ndarray:
    """Below 1 inside of the patient: an oval trunk that leans, so that no flip of it is itself."""
    x, y, z = np.moveaxis(mm, -1, 0)
    return ((x - 0.2 * z - 10) / 55) ** 2 + ((y + 8) / 45) ** 2


def _header(tags: dict, patient: str, date: str, study: str, series: str) -> Dataset:
    modality = tags["Modality"]
    header = Dataset()
    header.SOPClassUID = CTImageStorage if modality == "CT" else PositronEmissionTomographyImageStorage
    standard = {
        "PatientID": patient, "PatientName": NAME, "PatientBirthDate": BIRTH, "PatientSex": "F", "PatientAge": "056Y",
        "PatientWeight": WEIGHT_KG, "PatientSize": 1.7, "StudyDate": date, "SeriesDate": date, "AcquisitionDate": date,
        "StudyTime": "120000", "SeriesTime": SERIES_TIME, "AcquisitionTime": SERIES_TIME, "PatientPosition": "HFS",
        "StudyInstanceUID": generate_uid(entropy_srcs=[patient, date, study]),
        "SeriesInstanceUID": generate_uid(entropy_srcs=[patient, date, study, series]),
        "FrameOfReferenceUID": generate_uid(entropy_srcs=[patient, date, study, "frame"]), "SeriesNumber": 4,
    }  # fmt: skip
    if modality == "PT":
        item = Dataset()
        drug = RADIOPHARMACEUTICAL | {"RadiopharmaceuticalStartDateTime": date + INJECTION_TIME}
        for keyword, default in drug.items():
            value = tags.pop(keyword, default)
            if keyword.endswith("CodeSequence") and value is not None:
                value = code(*value)
            _set(item, {keyword: value})
        standard["RadiopharmaceuticalInformationSequence"] = Sequence([item])
    _set(header, standard | tags)
    return header


def code(value: str, scheme: str, meaning: str) -> Sequence:
    """A code sequence of one item."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return Sequence([item])


def _set_pixels(header: Dataset, stored: np.ndarray, spacing: tuple, signed: bool) -> None:
    header.Rows, header.Columns = stored.shape[1:]
    header.PixelSpacing = _numbers([spacing[1], spacing[0]])  # between rows, between columns
    header.SliceThickness = _number(spacing[2])
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.PixelRepresentation = int(signed)


def _enhanced(header: Dataset, slices: list[dict], stored: np.ndarray, spacing: tuple) -> Dataset:
    """One multi-frame dataset: geometry, slopes and times in the functional groups (PS3.3 C.7.6.16)."""
    dataset = Dataset()
    dataset.update(header)
    dataset.SOPClassUID = EnhancedCTImageStorage if header.Modality == "CT" else EnhancedPETImageStorage
    dataset.SOPInstanceUID = slices[0]["SOPInstanceUID"]
    dataset.NumberOfFrames = len(slices)
    shared = Dataset()
    shared.PixelMeasuresSequence = _item(PixelSpacing=dataset.PixelSpacing, SliceThickness=_number(spacing[2]))
    del dataset.PixelSpacing, dataset.SliceThickness
    shared.PlaneOrientationSequence = _item(ImageOrientationPatient=slices[0]["ImageOrientationPatient"])
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for number, one in enumerate(slices):
        group = Dataset()
        group.PlanePositionSequence = _item(ImagePositionPatient=one["ImagePositionPatient"])
        group.PixelValueTransformationSequence = _item(
            RescaleSlope=one["RescaleSlope"], RescaleIntercept=one["RescaleIntercept"], RescaleType="US"
        )
        more = {k: v for k, v in one.items() if k.startswith(("Frame", "Temporal"))}
        group.FrameContentSequence = _item(StackID="1", InStackPositionNumber=number + 1, **more)
        frames.append(group)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return dataset


def _item(**tags) -> Sequence:
    item = Dataset()
    _set(item, tags)
    return Sequence([item])


def _set(dataset: Dataset, tags: dict) -> None:
    for keyword, value in tags.items():
        if value is not None:
            setattr(dataset, keyword, value)
        elif keyword in dataset:
            delattr(dataset, keyword)


def _save(dataset: Dataset, stored: np.ndarray, file: Path, transfer_syntax: str) -> None:
    big = transfer_syntax == ExplicitVRBigEndian
    dataset.PixelData = stored.astype(stored.dtype.newbyteorder(">" if big else "<")).tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if transfer_syntax == RLELossless else transfer_syntax
    if transfer_syntax == RLELossless:
        dataset.compress(RLELossless)
    dataset.save_as(file, enforce_file_format=True)


def _number(value: float) -> str:
    """A number as a DICOM decimal string, which has at most 16 characters."""
    return f"{value:.10g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.8e}"


def _numbers(values: Iterable[float]) -> list[str]:
    return [_number(v) for v in values]
