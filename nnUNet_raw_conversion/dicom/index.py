"""What a folder of DICOM files holds: its series, by their UIDs, whatever its folders and files are called."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.tag import Tag
from tqdm import tqdm

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.shown import secrets_of, shown_words

FRAME_OF_REFERENCE = Tag("FrameOfReferenceUID")
# The contours of an RTSTRUCT and the voxels: large, and no part of a header.
BULK = {Tag(k) for k in ("ROIContourSequence", "FloatPixelData", "DoubleFloatPixelData", "PixelData")}
DICOMDIR = "1.2.840.10008.1.3.10"


@dataclass(frozen=True)
class Series:
    """The files of one series. Only `modality` and `description` may be shown to anybody."""

    modality: str
    """ "CT", "PT", "RTSTRUCT", "SEG", ..."""
    patient: str
    """PatientID or ""; to tell patients apart, never shown."""
    study_uid: str
    series_uid: str
    frame_uid: str
    """Frame of reference of the images, or that an RTSTRUCT refers to; "" if there is none."""
    description: str
    """What may be shown of SeriesDescription, see `shown.shown_words`."""
    date: str
    """StudyDate YYYYMMDD or ""; to put studies in order, never shown."""
    files: tuple[Path, ...]
    """In the order of their names."""
    header: pydicom.Dataset
    """Of the first file, up to its contours or voxels."""


def scan(folder: Path, progress: bool = True) -> tuple[list[Series], int]:
    """All series below `folder`, ordered by patient, date and UIDs; how many DICOM files and folders cannot be read.

    Files are told by their content, so that names, extensions and folders do not matter; DICOMDIR and other files are
    passed over. A SOP instance that is there twice counts once. A SeriesInstanceUID that several patients, studies or
    modalities share, as happens where data are de-identified by hand, makes several series.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the folder that holds the DICOM files")
    found: dict[tuple[str, ...], dict[str, Path]] = {}
    closed: list[OSError] = []
    files = sorted(_files(folder, closed))
    unreadable = len(closed)
    for file in tqdm(files, "reading headers", unit="file", disable=not progress, leave=False):
        try:
            if not _is_dicom(file):
                continue
            # The frame of reference is the last of what is needed here, and most of a header comes behind it.
            head = _read(file, lambda tag: tag > FRAME_OF_REFERENCE)
            if head.file_meta.get("MediaStorageSOPClassUID") == DICOMDIR:
                continue
            key = tuple(_text(head, k) for k in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "Modality"))
            instance = _text(head, "SOPInstanceUID")
        except Exception:  # a damaged file makes pydicom raise nearly anything
            unreadable += 1
            continue
        if not all(key[1:]) or not instance:
            unreadable += 1
            continue
        found.setdefault(key, {}).setdefault(instance, file)
    series = []
    for key, instances in found.items():
        try:
            series.append(_series(*key, tuple(instances.values())))
        except Exception:
            unreadable += len(instances)
    return sorted(series, key=lambda s: (s.patient, s.date, s.study_uid, s.modality, s.series_uid)), unreadable


def read_header(file: Path) -> pydicom.Dataset:
    """The header of a DICOM file up to what is bulky: the contours of an RTSTRUCT (3006,0039), voxels."""
    return _read(file, lambda tag: tag in BULK)


def _series(patient: str, study: str, series: str, modality: str, files: tuple[Path, ...]) -> Series:
    header = read_header(files[0])
    frame = _text(header, "FrameOfReferenceUID")
    for reference in header.get("ReferencedFrameOfReferenceSequence") or []:
        frame = frame or _text(reference, "FrameOfReferenceUID")
    return Series(modality, patient, study, series, frame, _description(header), _text(header, "StudyDate"), files,
                  header)  # fmt: skip


def _files(folder: Path, closed: list[OSError]) -> Iterator[Path]:
    """All files below `folder`, through links as well, each folder once; `closed` gets those that cannot be read."""
    seen = set()
    for path, folders, names in os.walk(folder, onerror=closed.append, followlinks=True):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (Path(path, name) for name in names)


def _is_dicom(file: Path) -> bool:
    """Whether the file has DICOM's mark, or begins like the files without preamble of early PACS (group 0008)."""
    if not file.is_file():  # sockets, broken links
        return False
    with file.open("rb") as stream:
        start = stream.read(132)
    return start[128:] == b"DICM" or (start[:2] in (b"\x08\x00", b"\x02\x00") and start[3:4] == b"\x00")


def _read(file: Path, stop: Callable[[int], bool]) -> pydicom.FileDataset:
    with file.open("rb") as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they may quote what is in the file
        try:
            return read_partial(stream, stop_when=lambda tag, vr, length: stop(tag))
        except InvalidDicomError:
            stream.seek(0)
            return read_partial(stream, stop_when=lambda tag, vr, length: stop(tag), force=True)


def _text(header: pydicom.Dataset, keyword: str) -> str:
    return str(header.get(keyword) or "").strip()


def _description(header: pydicom.Dataset) -> str:
    return shown_words(_text(header, "SeriesDescription"), secrets_of([header]))
