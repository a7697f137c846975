"""NIfTI files are read as every reader sees them, or refused in one line that names the field."""

import gzip
import struct
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fratmae.base import nifti
from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.grids import check_size
from nnunet_fratmae.base.volumes import read_image

AFFINE = np.array([[-4.0, 0, 0, 30], [0, -5, 0, 40], [0, 0, 6, -50], [0, 0, 0, 1]])  # LPS axes, RAS numbers
SHAPE = (7, 8, 9)  # x, y, z


def voxels(dtype=np.float32, shape=SHAPE):
    return (np.random.default_rng(0).normal(size=shape) * 100).astype(dtype)


def write(path: Path, array=None, change=lambda header: None, affine=AFFINE, kind=nibabel.Nifti1Image):
    """A NIfTI file whose bytes (a bytearray, header first) `change` has edited."""
    array = voxels() if array is None else array
    image = kind(array, affine, dtype=array.dtype)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    nibabel.save(image, path)
    content = bytearray(path.read_bytes())
    if content[:2] == b"\x1f\x8b":
        content = bytearray(gzip.decompress(bytes(content)))
        change(content)
        path.write_bytes(gzip.compress(bytes(content), 1))
    else:
        change(content)
        path.write_bytes(content)
    return path


def put(form: str, *fields):
    """Fields to be packed at offsets: put("f", (112, 2.0), ...)."""

    def change(header):
        for offset, *values in fields:
            struct.pack_into(f"<{len(values)}{form}", header, offset, *values)

    return change


DIM, DATATYPE, PIXDIM, VOX_OFFSET, SLOPE, INTER, UNITS = 40, 70, 76, 108, 112, 116, 123
QFORM, SFORM, QUATERN, QOFFSET, SROW = 252, 254, 256, 268, 280

HEADERS = {
    "pixdim 0": (put("f", (PIXDIM + 4, 0.0)), "pixdim is 0x5x6"),
    "pixdim NaN": (put("f", (PIXDIM + 8, np.nan)), "pixdim is 4xnanx6"),
    "pixdim negative": (put("f", (PIXDIM + 12, -6.0)), "pixdim is 4x5x-6"),
    "pixdim infinite": (put("f", (PIXDIM + 12, np.inf)), "pixdim is 4x5xinf"),
    "sform of zeros": (put("f", (SROW, *[0.0] * 12)), "sform .* singular"),
    "sform with a row of zeros": (put("f", (SROW, *[0.0] * 4)), "sform .* singular"),
    "sform NaN": (put("f", (SROW + 12, np.nan)), "sform .* singular"),
    "qform no rotation": (put("f", (QUATERN, 3.0)), "qform .* no rotation"),
    "qform NaN": (put("f", (QOFFSET, np.nan)), "qform .* no rotation"),
    "slope NaN": (put("f", (SLOPE, np.nan)), "scl_slope is nan"),
    "slope infinite": (put("f", (SLOPE, np.inf)), "scl_slope is inf"),
    "intercept NaN": (put("f", (SLOPE, 1.0, np.nan)), "scl_inter nan"),
    "dim 0": (put("h", (DIM, 3, 7, 0, 9)), "dim is 3 7 0 9"),
    "dim negative": (put("h", (DIM, 3, 7, -8, 9)), "dim is 3 7 -8 9"),
    "eight dimensions": (put("h", (DIM, 8)), "dim is 8"),
    "no dimension": (put("h", (DIM, 0)), "dim is 0"),
    "four dimensions": (put("h", (DIM, 4, 7, 8, 3, 3)), "is 4D with 1 values"),
    "two dimensions": (put("h", (DIM, 2, 7, 72)), "is 2D with 1 values"),
    "a vector": (put("h", (DIM, 5, 7, 8, 3, 1, 3)), "is 3D with 3 values"),
    "colours": (put("h", (DATATYPE, 128, 24)), "voxels are colours"),
    "complex": (put("h", (DATATYPE, 32, 64)), "voxels are complex"),
    "float128": (put("h", (DATATYPE, 1536, 128)), "voxels are complex or 128-bit"),
    "no known type": (put("h", (DATATYPE, 77, 32)), "datatype is 77"),
    "too large": (put("h", (DIM, 3, 20000, 20000, 2000)), "20000x20000x2000 voxels by its header, 3.2e.03 GB"),
    "longer than it is": (put("h", (DIM, 3, 7, 8, 10)), "ends too early"),
    "voxels that begin nowhere": (put("f", (VOX_OFFSET, np.nan)), "vox_offset is nan"),
    "metres": (put("B", (UNITS, 1)), "xyzt_units says metres"),
    "micrometres": (put("B", (UNITS, 3 + 8)), "xyzt_units says metres or micrometres"),
    "no magic": (put("B", (344, 0)), "magic is not"),
}


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".NII.GZ"])
@pytest.mark.parametrize(("change", "said"), HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_cannot_be_is_one_line(change, said, ending, tmp_path):
    path = write(tmp_path / "whole.nii.gz", change=change)
    content = gzip.decompress(path.read_bytes())
    path = tmp_path / f"PET{ending}"
    path.write_bytes(content if ending == ".nii" else gzip.compress(content))
    with pytest.raises(UserError, match=f"PET{ending}: .*{said}") as error:
        read_image(path)
    assert "\n" not in str(error.value) and error.value.code
    with pytest.raises(UserError, match="^the PET: ") as error:
        read_image(path, called="the PET")
    assert str(tmp_path) not in str(error.value)


def check_read(path, array, affine):
    """The voxels are there, the first where nibabel has it (in LPS), and nothing is odd."""
    notes = []
    image = read_image(path, notes=notes)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array.T)
    assert image.GetSpacing() == (4, 5, 6) and not notes
    np.testing.assert_allclose(image.GetOrigin(), affine[:3, 3] * (-1, -1, 1), atol=1e-4)


@pytest.mark.parametrize("change", [put("h", (DIM, 4, *SHAPE, 1)), put("h", (DIM, 7, *SHAPE, 1, 1, 1, 1)),
                                    put("f", (SLOPE, 0.0)), put("f", (SLOPE, 0.0, np.nan)),
                                    put("h", (QFORM, 0)), put("h", (SFORM, 0))])  # fmt: skip
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_headers_that_are_right_are_read(dtype, change, tmp_path):
    array = abs(voxels(np.int16)).astype(dtype)
    check_read(write(tmp_path / "a.nii.gz", array, change), array, AFFINE)


def test_a_mirrored_grid_is_read(tmp_path):
    """Its pixdim begins with -1 (qfac), and its third axis runs to the feet."""
    affine = AFFINE * (1, 1, -1, 1)
    path = write(tmp_path / "a.nii.gz", affine=affine)
    assert nibabel.load(path).header["pixdim"][0] == -1
    check_read(path, voxels(), affine)


@pytest.mark.parametrize("order", ["<", ">"])
def test_pairs_of_hdr_and_img(order, tmp_path):
    """The header in one file, the voxels in the other; named by either."""
    array = voxels(np.dtype(f"{order}f4"))
    image = nibabel.Nifti1Pair(array, AFFINE, nibabel.nifti1.Nifti1PairHeader(endianness=order))
    nibabel.save(image, tmp_path / "a.img")
    for ending in (".hdr", ".img"):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_image(tmp_path / f"a{ending}")), array.T)
    content = (tmp_path / "a.img").read_bytes()
    for damaged, said in ((content[: len(content) // 2], "ends too early"),
                          (np.where(array > 250, np.nan, array).astype(f"{order}f4").tobytes("F"), "NaN")):  # fmt: skip
        (tmp_path / "a.img").write_bytes(damaged)
        for ending in (".hdr", ".img"):
            with pytest.raises(UserError, match=f"a{ending}: .*{said}"):
                read_image(tmp_path / f"a{ending}")
    (tmp_path / "a.img").unlink()
    with pytest.raises(UserError, match="its partner .img is not beside it"):
        read_image(tmp_path / "a.hdr")


def test_other_formats_are_read_whole_or_refused(tmp_path):
    image = sitk.GetImageFromArray(voxels())
    for ending in (".mha", ".mhd", ".nrrd", ".nhdr", ".gipl", ".vtk", ".mnc"):
        path = tmp_path / f"a{ending}"
        sitk.WriteImage(image, path)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_image(path)), sitk.GetArrayFromImage(image))
        data = path.with_suffix(".raw") if ending in (".mhd", ".nhdr") else path
        data.write_bytes(data.read_bytes()[:-400])
        with pytest.raises(UserError, match=f"a{ending}: "):
            read_image(path)
    sitk.WriteImage(sitk.GetImageFromArray(np.where(voxels() > 200, np.nan, 1.0)), tmp_path / "b.mha")
    with pytest.raises(UserError, match="b.mha: has .* NaN"):
        read_image(tmp_path / "b.mha")
    sitk.WriteImage(image, tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a.tif: of this format \(.tif\) it cannot be seen whether a file is whole"):
        read_image(tmp_path / "a.tif")


def test_files_that_are_called_otherwise_than_they_are(tmp_path):
    path = write(tmp_path / "a.nii.gz")
    content = path.read_bytes()
    plain = gzip.decompress(content)
    for name, data, said in (
        ("a.nii.gz", plain, "is not compressed though it is called .nii.gz; rename it to .nii"),
        ("b.nii", content, "is compressed .gzip. though it is called .nii; rename it to .nii.gz"),
        ("c.Nii", plain, "write it in small letters"),
        ("d.nii.gz", b"", "it is empty"),
        ("e.nii.gz", b"<html>" * 90, "is no NIfTI file"),
        ("f.nii", b"<html>" * 90, "is no NIfTI file"),
        ("g.nii.gz", gzip.compress(b"<html>" * 90), "is no NIfTI file"),
        ("h.nii.gz", content[:300], "ends too early"),
        ("i.NII.GZ", content[: len(content) // 2], "ends too early"),
        ("j.NII", plain[: len(plain) // 2], "ends too early"),
        ("k.nii.gz", content[:-8] + b"12345678", "is damaged"),  # the checksum
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: .*{said}"):
            read_image(tmp_path / name)
    write(tmp_path / "l.nii.gz", kind=nibabel.Nifti2Image)
    with pytest.raises(UserError, match="l.nii.gz: is NIfTI-2"):
        read_image(tmp_path / "l.nii.gz")
    (tmp_path / "m.NII.GZ").write_bytes(content)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_image(tmp_path / "m.NII.GZ")), voxels().T)


def test_a_sheared_grid_is_named_by_its_angle(tmp_path):
    def shear(header):
        put("f", (SROW, -4, 0.5, 0, 30))(header)
        put("h", (QFORM, 0))(header)

    with pytest.raises(UserError, match=r"not at right angles \(sform is sheared by 5.7 degrees\).*resample"):
        read_image(write(tmp_path / "a.nii.gz", change=shear))


@settings(max_examples=25, deadline=None)
@given(shift=st.tuples(*[st.floats(-40, 40)] * 3), codes=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_two_places_in_one_header(shift, codes, tmp_path_factory):
    """Refused where readers see a voxel half a voxel or more elsewhere, whichever form they take; told below."""

    def change(header):
        put("h", (QFORM, *codes))(header)
        put("f", *((SROW + 12 + 16 * i, AFFINE[i, 3] + shift[i]) for i in range(3)))(header)

    path = write(tmp_path_factory.mktemp("a") / "a.nii.gz", change=change)
    notes, off = [], max(map(abs, shift))
    if off > 2.001:
        with pytest.raises(UserError, match="qform and sform in its header put voxels up to .* mm apart") as error:
            read_image(path)
        assert f"{off:.3g} mm apart" in str(error.value)
    elif off < 1.999:
        read_image(path, notes=notes)
        assert bool(notes) == (off > 0.4) or abs(off - 0.4) < 1e-3


def test_sform_and_pixdim_that_differ(tmp_path):
    """Where there is no qform ITK takes the size of voxels from pixdim, other readers from the sform."""

    def change(header):
        put("h", (QFORM, 0))(header)
        put("f", (PIXDIM + 4, 1, 8, 10))(header)

    with pytest.raises(UserError, match="sform and pixdim in its header put voxels up to"):
        read_image(write(tmp_path / "a.nii.gz", change=change))


def test_a_header_without_places_is_told(tmp_path):
    notes = []
    read_image(write(tmp_path / "a.nii.gz", change=put("h", (QFORM, 0, 0))), notes=notes)
    assert len(notes) == 1 and "neither qform nor sform" in notes[0]


def test_no_more_is_read_than_the_header_tells(tmp_path, monkeypatch):
    """A file that unpacks to 400 MB behind its voxels is read as fast as one that does not."""
    path = write(tmp_path / "a.nii.gz")
    with gzip.open(path, "ab", 1) as file:
        for _ in range(25):
            file.write(bytes(1 << 24))
    started = time.monotonic()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_image(path)), voxels().T)
    monkeypatch.setattr(nifti, "LARGEST_BYTES", 4 * 7 * 8 * 9 - 1)
    with pytest.raises(UserError, match="7x8x9 voxels by its header"):
        read_image(path)
    assert time.monotonic() - started < 0.5


def volume(size, spacing):
    image = sitk.Image(size, sitk.sitkUInt8)
    image.SetSpacing(spacing)
    return image


@pytest.mark.parametrize(
    ("size", "spacing", "said"),
    [
        ((40, 50, 1), (4, 4, 5), "a single slice"),
        ((1, 1, 1), (60, 60, 60), "a single slice"),
        ((500, 500, 500), (0.1, 0.1, 0.1), "no scanner makes such voxels"),
        ((40, 50, 60), (4, 4, 50), "no scanner makes such voxels"),
        ((40, 50, 60), (0.4, 0.4, 0.33), "no body is so small or so large"),
        ((400, 400, 900), (2, 2, 3.4), "no body is so small or so large"),
    ],
)
def test_sizes_that_no_body_has(size, spacing, said):
    with pytest.raises(UserError, match=f"^PET has {'x'.join(map(str, size))} voxels of .*{said}"):
        check_size(volume(size, spacing), "PET")


@pytest.mark.parametrize(("size", "spacing"), [((168, 168, 900), (4.07, 4.07, 2)), ((512, 512, 400), (0.3, 0.3, 0.2)),
                                               ((38, 30, 47), (4, 4, 3.27)), ((700, 2, 90), (1, 20, 20))])  # fmt: skip
def test_sizes_of_bodies_and_parts(size, spacing):
    check_size(volume(size, spacing), "PET")
