"""What a folder of DICOM files holds: its series, by their UIDs, whatever its folders and files are called."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.tag import Tag
from tqdm import tqdm

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.fields import field_name
from nnUNet_raw_conversion.dicom.limits import check_file
from nnUNet_raw_conversion.shown import secrets_of, shown_words

FRAME_OF_REFERENCE = Tag("FrameOfReferenceUID")
# The contours of an RTSTRUCT and the voxels: large, and no part of a header.
BULK = {Tag(k) for k in ("ROIContourSequence", "FloatPixelData", "DoubleFloatPixelData", "PixelData")}
# What the slices of one series have in common, even where their SeriesInstanceUID is not
ALIKE = ("SeriesDescription", "ImageType", "CorrectedImage", "Units", "ConvolutionKernel", "ImageOrientationPatient",
         "PixelSpacing", "Rows", "Columns")  # fmt: skip
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
    other_uids: tuple[str, ...] = ()
    """More SeriesInstanceUIDs of the same series, where every slice has one of its own."""
    lost: int = 0
    """Files beside its own that cannot be read and may be slices of it."""
    beds: tuple[Series, ...] = ()
    """More series of the same body, at other ranges of beds, see `beds.with_beds`."""
    remarks: tuple[str, ...] = ()
    """What the user should know about the choice of it, one sentence each."""

    @property
    def parts(self) -> tuple[Series, ...]:
        """The series itself and its `beds`, each of which is read by itself."""
        return (replace(self, beds=()), *self.beds)

    @property
    def uids(self) -> frozenset[str]:
        """All SeriesInstanceUIDs that an RTSTRUCT or SEG drawn on it may name."""
        return frozenset(uid for part in self.parts for uid in (part.series_uid, *part.other_uids))


def scan(
    folder: Path, progress: bool = True, messages: list[str] | None = None
) -> tuple[list[Series], int]:
    """All series below `folder`, ordered by patient, date and UIDs; how many DICOM files and folders cannot be read.

    Files are told by their content, so that names, extensions and folders do not matter; DICOMDIR and other files are
    passed over. A SOP instance that is there twice counts once. A SeriesInstanceUID that several patients, studies or
    modalities share, as happens where data are de-identified by hand, makes several series; slices that each have a
    SeriesInstanceUID of their own, and all else alike, make one. Series without StudyInstanceUID are of the study in
    whose frame of reference they are.

    Args:
        messages: what files lack that are left out is added to it.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the folder that holds the DICOM files")
    found: dict[tuple[str, ...], dict[str, Path]] = {}
    closed: list[OSError] = []
    files = sorted(_files(folder, closed))
    bad: dict[Path, str] = {}  # DICOM files that cannot be read, with their Modality as far as it can be
    strange: list[Path] = []
    lacking: Counter[str] = Counter()
    for file in tqdm(files, "reading headers", unit="file", disable=not progress, leave=False):
        modality = ""
        try:
            if not _is_dicom(file):
                strange.append(file)
                continue
            # The frame of reference is the last of what is needed here, and most of a header comes behind it.
            head = _read(file, lambda tag: tag > FRAME_OF_REFERENCE)
            if head.file_meta.get("MediaStorageSOPClassUID") == DICOMDIR:
                continue
            modality = _text(head, "Modality")
            key = tuple(_text(head, k) for k in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "Modality"))
            instance = _text(head, "SOPInstanceUID") or _text(head.file_meta, "MediaStorageSOPInstanceUID")
            missing = [k for k in ("SeriesInstanceUID", "Modality") if not _text(head, k)]
        except Exception:  # a damaged file makes pydicom raise nearly anything
            bad[file] = modality
            continue
        if missing or not instance:
            bad[file] = modality
            lacking[field_name(missing[0] if missing else "SOPInstanceUID")] += 1
            continue
        found.setdefault(key, {}).setdefault(instance, file)
    series = []
    for key, instances in found.items():
        files = tuple(instances.values())
        header = _first_header(files)
        if header is None:
            bad |= dict.fromkeys(files, key[3])
        else:
            series.append(_series(*key, files, header))
    series = _with_lost(_regrouped(_with_study(series)), bad, strange)
    if messages is not None:
        messages += [f"{count} DICOM files have no {name} and are left out; export them again"
                     for name, count in sorted(lacking.items())]  # fmt: skip
    unreadable = len(closed) + len(bad)
    return sorted(series, key=lambda s: (s.patient, s.date, s.study_uid, s.modality, s.series_uid)), unreadable


def read_header(file: Path) -> pydicom.Dataset:
    """The header of a DICOM file up to what is bulky: the contours of an RTSTRUCT (3006,0039), voxels."""
    return _read(file, lambda tag: tag in BULK)


def _first_header(files: tuple[Path, ...]) -> pydicom.Dataset | None:
    """The header of the first file that has one; that of a damaged file beside it is told when the series is read."""
    for file in files:
        try:
            header = read_header(file)
            _frame_of(header)
            return header
        except Exception:
            continue
    return None


def _series(
    patient: str, study: str, series: str, modality: str, files: tuple[Path, ...], header: pydicom.Dataset
) -> Series:
    return Series(modality, patient, study, series, _frame_of(header), _description(header), _text(header, "StudyDate"),
                  files, header)  # fmt: skip


def _frame_of(header: pydicom.Dataset) -> str:
    frame = _text(header, "FrameOfReferenceUID")
    for reference in header.get("ReferencedFrameOfReferenceSequence") or []:
        frame = frame or _text(reference, "FrameOfReferenceUID")
    return frame


def _with_study(series: list[Series]) -> list[Series]:
    """Series without StudyInstanceUID put into the study of their patient that has their frame of reference, else all
    of a frame into one of its own: a frame is of one session at one scanner."""
    studies = {(one.patient, one.frame_uid): one.study_uid for one in series if one.study_uid and one.frame_uid}
    told = []
    for one in series:
        if not one.study_uid:
            frame = studies.get((one.patient, one.frame_uid)) or (one.frame_uid and f"frame {one.frame_uid}")
            how = "the frame of reference tells what belongs to it" if frame else "nothing tells what belongs to it"
            said = f"{field_name('StudyInstanceUID')} is missing; {how}"
            one = replace(one, study_uid=frame or f"series {one.series_uid}", remarks=(*one.remarks, said))
        told.append(one)
    return told


def _regrouped(series: list[Series]) -> list[Series]:
    """Slices that each have a SeriesInstanceUID of their own (as some programs write them) put together.

    They are CT or PET of one file each that have patient, study, frame of reference, description, kind, size, spacing
    and orientation in common, and the SeriesNumber, unless that is another one for every slice as well.
    """
    singles: dict[tuple, list[Series]] = {}
    for one in series:
        if one.modality in ("CT", "PT") and len(one.files) == 1 and "NumberOfFrames" not in one.header:
            same = tuple(_text(one.header, keyword) for keyword in ALIKE)
            singles.setdefault((one.patient, one.study_uid, one.modality, one.frame_uid, same), []).append(one)
    joined: dict[str, Series] = {}
    for alike in singles.values():
        numbers: dict[str, list[Series]] = {}
        for one in alike:
            numbers.setdefault(_text(one.header, "SeriesNumber"), []).append(one)
        groups = [alike] if all(len(group) == 1 for group in numbers.values()) else list(numbers.values())
        for first, *others in groups:
            files = tuple(sorted(file for one in (first, *others) for file in one.files))
            uids = tuple(one.series_uid for one in others)
            joined |= dict.fromkeys((first.series_uid, *uids), replace(first, files=files, other_uids=uids))
    kept = {id(joined.get(one.series_uid, one)): joined.get(one.series_uid, one) for one in series}
    return list(kept.values())


def _with_lost(series: list[Series], bad: dict[Path, str], strange: list[Path]) -> list[Series]:
    """Count for each CT and PET the files of its folders that cannot be read and may be slices of it; `bad` gets those
    of `strange`, which have no DICOM in them, but are called like the slices beside them (empty or overwritten files).

    Of a file whose Modality can be read it is that; else the name tells it, or all series of the folder may miss it.
    """
    images: dict[Path, list[int]] = {}
    names: dict[tuple[Path, str], Counter] = {}
    for i, one in enumerate(series):
        if one.modality in ("CT", "PT"):
            for file in one.files:
                names.setdefault((file.parent, _pattern(file)), Counter())[i] += 1
            for folder in {file.parent for file in one.files}:
                images.setdefault(folder, []).append(i)
    for file in strange:
        if not file.name.startswith(".") and sum(names.get((file.parent, _pattern(file)), {}).values()) > 1:
            bad[file] = ""
    lost: Counter[int] = Counter()
    beside: Counter[int] = Counter()
    for file, modality in bad.items():
        here = [i for i in images.get(file.parent, ()) if modality in ("", series[i].modality)]
        called_so = [i for i in here if i in names.get((file.parent, _pattern(file)), {})]
        lost.update(called_so or here)
        if not images.get(file.parent):  # in a folder of its own, as contours are
            near = {i for folder, found in images.items() if folder.parent == file.parent.parent for i in found}
            beside.update(near if len({series[i].patient for i in near}) == 1 else ())
    said = "{} DICOM files in folders beside the images cannot be read; if contours are among them, copy them again"
    return [replace(one, lost=lost[i], remarks=(*one.remarks, *([said.format(beside[i])] if beside[i] else ())))
            for i, one in enumerate(series)]  # fmt: skip


def _pattern(file: Path) -> str:
    """What the names of a series' files have in common: IM#.dcm, or .dcm where they are called by hashes."""
    digits = re.sub(r"\d+", "#", file.name)
    is_hash = re.fullmatch(r"[0-9a-fA-F]{16,}|[0-9a-fA-F-]{36}", file.stem)
    return f"*{file.suffix}" if is_hash else digits


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
    check_file(file)
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
