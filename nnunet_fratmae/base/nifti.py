"""NIfTI files as every reader sees them: the header is looked at field by field, and the voxels are counted.

ITK (5.4), by which nnU-Net reads, hides much of what can be wrong: it reads zeros where a file was cut off and for NaN
and infinity, takes 1 mm for a pixdim of 0 and 1 for a slope of NaN, and chooses silently between qform and sform.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk
from nibabel.nifti1 import Nifti1PairHeader
from nibabel.spatialimages import HeaderDataError

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.grids import corners, times, to_physical

# Of the voxels, with 4 bytes each at least, as they are worked on. A CT of 512 x 512 x 2300 is below, and a float64 PET
# of a total-body scanner (400 x 400 x 1000) by half.
LARGEST_BYTES = 2_500_000_000
CHUNK_BYTES = 1 << 24  # of a file that is read for its length and for NaN only
NIFTI_ENDINGS = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz")
NIFTI1_SIZE, NIFTI2_SIZE = 348, 540  # bytes, which are also the first number in the file


def checked_nifti(path: Path, name: str) -> Nifti1PairHeader:
    """The header of a NIfTI-1 file (or Analyze 7.5) whose fields can be and whose voxels are all there."""
    with _opened(path, name) as (header_file, voxel_file):
        header = _read_header(header_file, path, name)
        check_dimensions(*_dimensions(header, name), name)
        dtype = _voxel_type(header, name)
        shape = header["dim"][1:4]
        check_bytes(shape, dtype.itemsize, name)
        if not _is_analyze(header):
            _check_fields(header, name)
        offset = float(header["vox_offset"])
        if not 0 <= offset < LARGEST_BYTES:
            raise _bad_field(name, f"vox_offset is {offset:g}")
        if voxel_file is header_file:
            offset = max(int(offset), NIFTI1_SIZE + 4)
        _check_voxels(voxel_file, int(offset), int(np.prod(shape, dtype=np.int64)), dtype, name)
    return header


@contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file with the header and the one with the voxels, which is the same but for pairs of .hdr and .img.

    Raises:
        UserError: a partner is missing, an kind does not say what the file is, or the compressed data are damaged.
    """
    try:
        kind = ending(path)
        if kind in (".nii", ".nii.gz"):
            with _open(path, name) as file:
                yield file, file
            return
        is_header = kind.startswith(".hdr")
        wanted = kind.replace(*((".hdr", ".img") if is_header else (".img", ".hdr")))
        beside = [other for other in path.parent.iterdir() if ending(other) == wanted]
        partner = next((other for other in beside if other.name[: -len(kind)] == path.name[: -len(kind)]), None)
        if partner is None:
            raise UserError(f"{name}: its partner {wanted} is not beside it; add it", "IMAGE_CUT_OFF")
        header, voxels = (path, partner) if is_header else (partner, path)
        with _open(header, name) as first, _open(voxels, name) as second:
            yield first, second
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{name}: ends too early or is damaged; copy or download it again", "IMAGE_CUT_OFF") from None


def _open(path: Path, name: str) -> BinaryIO:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    kind = ending(path)
    if path.stat().st_size == 0:
        raise UserError(f"{name}: cannot be read, it is empty; copy or download it again", "IMAGE_CUT_OFF")
    if compressed and not kind.endswith(".gz"):
        raise UserError(f"{name}: is compressed (gzip) though it is called {kind}; rename it to {kind}.gz",
                        "IMAGE_NAME")  # fmt: skip
    if not compressed and kind.endswith(".gz"):
        with path.open("rb") as file:
            begin = file.read(4)
        if NIFTI1_SIZE not in (int.from_bytes(begin, "little"), int.from_bytes(begin, "big")):
            raise UserError(f"{name}: cannot be read, it is no NIfTI file; copy or export it again", "IMAGE_FORMAT")
        raise UserError(f"{name}: is not compressed though it is called {kind}; rename it to {kind[:-3]}, or "
                        "compress it (gzip)", "IMAGE_NAME")  # fmt: skip
    return gzip.open(path) if compressed else path.open("rb")


def _read_header(file: BinaryIO, path: Path, name: str) -> Nifti1PairHeader:
    block = file.read(NIFTI1_SIZE)
    size = block[:4]
    if NIFTI2_SIZE in (int.from_bytes(size, "little"), int.from_bytes(size, "big")):
        raise UserError(f"{name}: is NIfTI-2, which nnU-Net's reader (ITK) does not know; save it as NIfTI-1: "
                        "nibabel.save(nibabel.Nifti1Image.from_image(nibabel.load(OLD)), NEW)", "NIFTI_2")  # fmt: skip
    if len(block) < NIFTI1_SIZE or NIFTI1_SIZE not in (int.from_bytes(size, "little"), int.from_bytes(size, "big")):
        raise UserError(f"{name}: cannot be read, it is no NIfTI file; copy or export it again", "IMAGE_FORMAT")
    order = "<" if int.from_bytes(size, "little") == NIFTI1_SIZE else ">"
    header = Nifti1PairHeader(block, endianness=order, check=False)
    if _is_analyze(header) and ending(path) in (".nii", ".nii.gz"):
        raise _bad_field(name, "magic is not n+1")
    return header


def _is_analyze(header: Nifti1PairHeader) -> bool:
    """Analyze 7.5, the format before NIfTI, which has no fields for places and slopes."""
    return header["magic"].item() not in (b"n+1", b"ni1")


def _dimensions(header: Nifti1PairHeader, name: str) -> tuple[int, int]:
    """Number of axes that count, and values a voxel."""
    dim = header["dim"].astype(int)
    axes = int(dim[0])
    if not 1 <= axes <= 7 or np.any(dim[1 : axes + 1] < 1):
        raise _bad_field(name, f"dim is {' '.join(map(str, dim))}")
    while axes > 3 and dim[axes] == 1:
        axes -= 1
    values = dim[5] if axes == 5 and dim[4] == 1 else 1  # how NIfTI stores vectors
    return (3, int(values)) if values > 1 else (axes, 1)


def _voxel_type(header: Nifti1PairHeader, name: str) -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except (KeyError, HeaderDataError):
        raise _bad_field(name, f"datatype is {int(header['datatype'])}") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        what = "colours" if dtype.names else "complex or 128-bit numbers"
        raise UserError(f"{name}: its voxels are {what} (datatype {int(header['datatype'])}); give one number a voxel",
                        "NIFTI_HEADER")  # fmt: skip
    return dtype


def _check_fields(header: Nifti1PairHeader, name: str) -> None:
    """Of the fields that ITK and nibabel mend silently, each in a way of its own."""
    spacing = header["pixdim"][1:4]
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise _bad_field(name, f"pixdim is {times(spacing)}, which gives no size of a voxel")
    if int(header["xyzt_units"]) % 8 in (1, 3):  # which ITK heeds and nibabel does not
        raise _bad_field(name, "xyzt_units says metres or micrometres; images of bodies are in mm")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope != 0 and not (np.isfinite(slope) and np.isfinite(intercept)):  # 0 means: not scaled
        raise _bad_field(name, f"scl_slope is {slope:g} and scl_inter {intercept:g}, so the values are unknown")
    if header["sform_code"] > 0:
        matrix = header.get_sform()[:3]
        lengths = np.linalg.norm(matrix[:, :3], axis=0)
        if not np.isfinite(matrix).all() or lengths.min() < 1e-6 or abs(np.linalg.det(matrix[:, :3] / lengths)) < 1e-3:
            raise _bad_field(name, "sform (srow_x, srow_y, srow_z) is singular, so the voxels have no place")
    numbers = [float(header[field]) for field in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
                                                  "qoffset_z")]  # fmt: skip
    if header["qform_code"] > 0 and (not np.isfinite(numbers).all() or np.square(numbers[:3]).sum() > 1.001):
        raise _bad_field(name, "qform (quatern_b, c, d and qoffset) is no rotation, so the voxels have no place")


def _check_voxels(file: BinaryIO, offset: int, count: int, dtype: np.dtype, name: str) -> None:
    """See that `count` voxels follow, and that none of them is NaN or infinite; no more than that is read."""
    file.seek(offset)
    left, bad = count * dtype.itemsize, 0
    while left:
        chunk = file.read(min(left, CHUNK_BYTES))
        if not chunk or len(chunk) % dtype.itemsize:
            raise UserError(f"{name}: ends too early; copy or download it again", "IMAGE_CUT_OFF")
        left -= len(chunk)
        if dtype.kind == "f":
            bad += len(chunk) // dtype.itemsize - np.count_nonzero(np.isfinite(np.frombuffer(chunk, dtype)))
    file.read(1)  # at the end of a gzip file its checksum is compared
    refuse_not_finite(bad, name)


def check_places(header: Nifti1PairHeader, image: sitk.Image, name: str, notes: list[str]) -> None:
    """Compare where ITK has put the voxels with where qform and sform, each by itself, put them."""
    forms = {"qform": header.get_qform(coded=True)[0], "sform": header.get_sform(coded=True)[0]}
    if _is_analyze(header):
        forms = {}
    there = corners(image.GetSize())
    places = {"ITK": to_physical(image, there)}
    for form, affine in forms.items():
        if affine is not None:  # NIfTI runs to right, front, head; ITK and DICOM to left, back, head
            places[form] = (there @ affine[:3, :3].T + affine[:3, 3]) * (-1, -1, 1)
    if len(places) == 1:
        notes.append("a NIfTI header has neither qform nor sform: which side is left is a guess; look at the pictures")
        return
    every = np.stack(list(places.values()))
    apart, half = float(np.ptp(every, axis=0).max()), min(image.GetSpacing()) / 2
    if apart > half:
        which = "qform and sform" if len(places) == 3 else f"{list(places)[1]} and pixdim"
        raise UserError(f"{name}: {which} in its header put voxels up to {apart:.3g} mm apart, so that nnU-Net (ITK) "
                        "and other programs (nibabel, SPM, FSL) see them at different places; keep the right one and "
                        "copy it over the other (nibabel: image.set_qform(image.get_sform()) or image.set_sform("
                        "image.get_qform()), then save)", "NIFTI_PLACES")  # fmt: skip
    if apart > half / 5:
        notes.append("qform and sform of a NIfTI header differ by less than half a voxel")


def check_dimensions(axes: int, values: int, name: str) -> None:
    if axes != 3 or values != 1:
        raise UserError(f"{name}: is {axes}D with {values} values a voxel; give one 3D image with one value a voxel",
                        "IMAGE_NOT_3D")  # fmt: skip


def check_bytes(size: tuple[int, ...], item: int, name: str) -> None:
    needed = np.prod(size, dtype=float) * max(item, 4)
    if needed > LARGEST_BYTES:
        raise UserError(f"{name}: has {times(size)} voxels by its header, {needed / 1e9:.3g} GB; at most "
                        f"{LARGEST_BYTES / 1e9:g} GB are read; is the header right? else resample it to larger voxels",
                        "IMAGE_TOO_LARGE")  # fmt: skip


def refuse_not_finite(bad: int, what: str) -> None:
    if bad:
        raise UserError(f"{what}: has {bad} voxels that are NaN or infinite; set them to air in CT, to 0 else",
                        "IMAGE_NOT_FINITE")  # fmt: skip


def _bad_field(name: str, what: str) -> UserError:
    return UserError(f"{name}: in its NIfTI header {what}; correct the header, or export the image again",
                     "NIFTI_HEADER")  # fmt: skip


def ending(path: Path) -> str:
    """The kind of a file in small letters, with what is before a .gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])
