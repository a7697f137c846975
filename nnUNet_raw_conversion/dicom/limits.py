"""How large a DICOM file may be before it is read: a small file can ask for the whole memory, or for hours.

pydicom makes an object of every item of a sequence, inflates a deflated file as a whole, and believes the header's
numbers of rows and frames. What real studies have is far below these limits, so that nothing else is refused.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian

from nnunet_fratmae.base.command import UserError

# An enhanced PET of 2000 frames has 30 000 items, an RTSTRUCT of 60 organs in thin slices 50 000. pydicom needs about
# 10 s and 0.5 GB for as many as this.
MOST_ITEMS = 200_000
MOST_INFLATED = 1 << 29
"""Bytes of a deflated file when inflated: 1000 slices of 512 x 512."""
MOST_ROWS = 4096
MOST_VOXELS = 10**9
"""Of one series or file: 3800 slices of 512 x 512."""
ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")
"""Of an item (FFFE,E000), little and big endian."""
_ITEM_BYTES = 8
_META_BYTES = 1 << 16
_PREAMBLE_BYTES = 144
"""In front of the elements that FileMetaInformationGroupLength (0002,0000) counts, itself included (PS3.10 7.1)."""
_CHUNK = 1 << 22


def check_file(file: Path) -> None:
    """Raises UserError if reading the file would take unreasonable memory or time; an OSError if it cannot be read."""
    inflated = _inflated(file)
    if inflated is None:
        if file.stat().st_size < MOST_ITEMS * _ITEM_BYTES:  # a slice of 512 x 512 is smaller, and need not be searched
            return
        inflated = _chunks(file)
    size, items, end = 0, 0, b""
    for chunk in inflated:
        size += len(chunk)
        text = end + chunk
        items += sum(map(text.count, ITEM_TAGS))
        end = text[-3:]
        if items > MOST_ITEMS:
            raise UserError(f"a DICOM file has more than {MOST_ITEMS} items in its sequences, which no image or "
                            "contour needs; export it again, or remove it", "DICOM_TOO_LARGE")  # fmt: skip
        if size > MOST_INFLATED and isinstance(inflated, _Inflated):
            raise UserError(f"a deflated DICOM file has more than {MOST_INFLATED >> 20} MB when it is inflated; export "
                            "it without compression, or remove it", "DICOM_TOO_LARGE")  # fmt: skip


def check_pixels(dataset: pydicom.Dataset, what: str) -> None:
    """Raises UserError, beginning with `what`, if the header asks for more voxels than any image has."""
    rows, columns, frames = (int(dataset.get(k) or 1) for k in ("Rows", "Columns", "NumberOfFrames"))
    if not (0 < rows <= MOST_ROWS and 0 < columns <= MOST_ROWS and 0 < frames * rows * columns <= MOST_VOXELS):
        raise UserError(f"{what}: a file says that it has {columns} x {rows} pixels in {frames} frames, which cannot "
                        "be (Rows (0028,0010), Columns (0028,0011), NumberOfFrames (0028,0008)); export it again",
                        "DICOM_TOO_LARGE")  # fmt: skip


class _Inflated:
    """The content of a deflated file in parts, so that no more than one part is in memory."""

    def __init__(self, file: Path, start: int) -> None:
        self._file, self._start = file, start

    def __iter__(self) -> Iterator[bytes]:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        with self._file.open("rb") as stream:
            stream.seek(self._start)
            while (data := stream.read(_CHUNK // 64)) and not inflate.eof:
                while data:
                    try:
                        yield inflate.decompress(data, _CHUNK)
                    except zlib.error:
                        raise UserError("a deflated DICOM file is damaged; copy it again", "SLICE_UNREADABLE") from None
                    data = inflate.unconsumed_tail


def _inflated(file: Path) -> _Inflated | None:
    """What a file holds when inflated; None if it is not deflated (PS3.5 A.5)."""
    with file.open("rb") as stream:
        if DeflatedExplicitVRLittleEndian.encode() not in stream.read(_META_BYTES):
            return None
    try:
        meta = pydicom.filereader.read_file_meta_info(file)
    except Exception:  # damaged, which its reader will say
        return None
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return None
    return _Inflated(file, _PREAMBLE_BYTES + int(meta.get("FileMetaInformationGroupLength") or 0))


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while data := stream.read(_CHUNK):
            yield data
