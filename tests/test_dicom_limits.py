"""Padding, codecs, and files that would take the whole memory or hours."""

from __future__ import annotations

import time

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom import Dataset, Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom import limits
from nnUNet_raw_conversion.dicom.index import scan
from nnUNet_raw_conversion.dicom.rtstruct import read_rois
from nnUNet_raw_conversion.dicom.volume import read_volume
from tests.dicom_files import positions, trunk_hu, write_ct, write_pet
from tests.trial_files import LESION, write_rtstruct

SHAPE = (5, 24, 30)
HU = trunk_hu(positions(SHAPE, (8.0, 8.0, 6.0), (-110.0, -92.0, 0.0)))
Y, X = np.ogrid[: SHAPE[1], : SHAPE[2]]
OUTSIDE = ((Y - 11.5) / 12) ** 2 + ((X - 14.5) / 15) ** 2 > 1


def read(folder):
    [series], unreadable = scan(folder, progress=False)
    assert unreadable == 0
    return read_volume(series)


def padded(folder, value, signed, declared=None, limit=None, bits=16, where=OUTSIDE, intercept=-1024.0, hu=HU):
    """A CT with `value` stored outside of its circle, declared as (VR, value)."""
    for file in write_ct(folder, hu, spacing=(8.0, 8.0, 6.0), signed=signed, intercept=intercept):
        dataset = pydicom.dcmread(file)
        stored = dataset.pixel_array.copy()
        stored[where] = value
        dataset.PixelData = stored.tobytes()
        dataset.BitsStored, dataset.HighBit = bits, bits - 1
        for tag, known in ((0x00280120, declared), (0x00280121, limit)):
            if known:
                dataset.add_new(tag, *known)
        dataset.save_as(file)


@pytest.mark.parametrize(
    ("value", "signed", "declared", "limit", "bits"),
    [
        (32767, True, ("SS", 32767), None, 16),
        (63536, False, ("US", 63536), None, 16),  # -2000, unsigned
        (63536, False, ("SS", -2000), None, 16),  # the other sign than the voxels
        (-2000, True, ("US", 63536), None, 16),
        (63536, False, ("US", 63536), None, 12),  # more bits than the value has
        (-2000, True, ("SS", -2000), None, 16),
        (3000, True, ("SS", 2900), ("SS", 3100), 16),  # a range
        (3000, True, ("SS", 3100), ("SS", 2900), 16),
        (1024, True, ("SS", 1024), None, 16),  # 0 HU, as of water, but at the rim
        (32767, True, None, None, 16),  # not declared, but no tissue has it
    ],
)
def test_padding_of_ct_is_air(tmp_path, value, signed, declared, limit, bits):
    padded(tmp_path, value, signed, declared, limit, bits)
    found = sitk.GetArrayFromImage(read(tmp_path)[0])
    np.testing.assert_array_equal(found, np.where(OUTSIDE, -1024, HU))


def test_tissue_that_has_the_padding_value_stays(tmp_path):
    """Water of 0 HU inside of the body, where 0 is declared and stands outside of the circle."""
    hu = HU.copy()
    hu[:, 10:13, 12:17] = 0
    padded(tmp_path, 1024, True, ("SS", 1024), hu=hu)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)[0]), np.where(OUTSIDE, -1024, hu))


def test_padding_below_air_that_is_not_declared_is_raised_and_told(tmp_path):
    padded(tmp_path, -2000, True)
    image, _, notes = read(tmp_path)
    assert sitk.GetArrayFromImage(image).min() == -1024 and "padding below -1024" in notes[0]


def test_padding_of_pet_is_0(tmp_path):
    for file in write_pet(tmp_path, slopes=2.0, signed=True):
        dataset = pydicom.dcmread(file)
        stored = dataset.pixel_array.copy()
        stored[0] = -32768
        dataset.PixelData = stored.tobytes()
        dataset.add_new(0x00280120, "SS", -32768)
        dataset.save_as(file)
    found = sitk.GetArrayFromImage(read(tmp_path)[0])
    assert found.min() == 0 and not found[:, 0].any() and found[:, 1:].all()


# ---- too large


def items(count, **tags):
    """A sequence of `count` items, of undefined or defined length."""
    item = Dataset()
    for keyword, value in tags.items():
        setattr(item, keyword, value)
    return Sequence([item] * count)


@pytest.mark.parametrize("undefined", [False, True])
def test_a_sequence_of_a_million_items(tmp_path, undefined):
    files = write_pet(tmp_path)
    dataset = pydicom.dcmread(files[4])
    dataset.ReferencedImageSequence = items(1)
    dataset["ReferencedImageSequence"].is_undefined_length = undefined
    dataset.save_as(files[4])
    content = files[4].read_bytes()
    (item,) = (b"\xfe\xff\x00\xe0" + bytes(4),)
    start = content.index(b"\x08\x00\x40\x11SQ")
    length = b"\xff" * 4 if undefined else (8 * 10**6).to_bytes(4, "little")
    end = b"\xfe\xff\xdd\xe0" + bytes(4) if undefined else b""
    rest = content[start + 12 + 8 + (8 if undefined else 0) :]
    rest = rest if undefined is False else content[content.index(b"\xfe\xff\xdd\xe0") + 8 :]
    files[4].write_bytes(content[: start + 8] + length + item * 10**6 + end + rest)
    began = time.monotonic()
    [series], unreadable = scan(tmp_path, progress=False)
    assert time.monotonic() - began < 5
    assert unreadable == 1 and series.lost == 1


def test_an_rtstruct_of_a_million_contours(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MOST_ITEMS", 20)
    file = write_rtstruct(tmp_path / "RS", write_pet(tmp_path / "pet")[0], {str(i): LESION for i in range(9)})
    with pytest.raises(UserError, match="more than 20 items") as error:
        read_rois(file)
    assert error.value.code == "DICOM_TOO_LARGE"


def test_a_deflated_file_that_inflates_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MOST_INFLATED", 1 << 20)
    files = write_ct(tmp_path, HU, spacing=(8.0, 8.0, 6.0), transfer_syntax=ExplicitVRLittleEndian)
    for file in files:
        dataset = pydicom.dcmread(file)
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.save_as(file, enforce_file_format=True)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(tmp_path)[0]), HU)  # a right one is read
    dataset.add_new(0x00091010, "OB", bytes(1 << 21))
    dataset.save_as(file, enforce_file_format=True)
    assert file.stat().st_size < 1 << 14
    with pytest.raises(UserError, match="deflated") as error:
        limits.check_file(file)
    assert error.value.code == "DICOM_TOO_LARGE"
    [series], unreadable = scan(tmp_path, progress=False)
    assert unreadable == 1 and series.lost == 1
    content = file.read_bytes()
    start = 144 + dataset.file_meta.FileMetaInformationGroupLength
    file.write_bytes(content[:start] + b"\xff" * 1000)
    with pytest.raises(UserError, match="damaged"):
        limits.check_file(file)


@pytest.mark.parametrize(
    "tags", [{"Rows": 65535, "Columns": 65535}, {"NumberOfFrames": 10**9}, {"Rows": 4000, "NumberOfFrames": 60000}]
)
def test_absurd_sizes(tmp_path, tags):
    files = write_ct(tmp_path, HU, spacing=(8.0, 8.0, 6.0))
    dataset = pydicom.dcmread(files[2])
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.save_as(files[2])
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert error.value.code == "DICOM_TOO_LARGE"


@pytest.mark.parametrize("tags", [{"Rows": 23}, {"Rows": 25}, {"BitsAllocated": 8}, {"Columns": 0}])
def test_sizes_that_contradict_the_voxels(tmp_path, tags):
    files = write_ct(tmp_path, HU, spacing=(8.0, 8.0, 6.0))
    dataset = pydicom.dcmread(files[2])
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.save_as(files[2])
    with pytest.raises(UserError):
        read(tmp_path)


@pytest.mark.parametrize(
    ("syntax", "words", "code"),
    [
        ("1.2.840.10008.1.2.4.201", "pip install pylibjpeg pylibjpeg-openjpeg", "CODEC_MISSING"),  # HTJ2K
        ("1.2.840.10008.1.2.4.102", "export it without compression", "CODEC_MISSING"),  # a video
        ("1.2.840.10008.1.2.5", "is damaged; copy it again", "SLICE_UNREADABLE"),  # RLE, which it is not
    ],
)
def test_what_cannot_be_decoded_says_what_to_do(tmp_path, syntax, words, code):
    for file in write_ct(tmp_path, HU, spacing=(8.0, 8.0, 6.0)):
        dataset = pydicom.dcmread(file)
        dataset.PixelData = pydicom.encaps.encapsulate([b"\x01" * 100])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(file, enforce_file_format=True)
    if "openjpeg" in words:
        assert not pydicom.pixels.get_decoder(syntax).is_available, "installed here: test another way"
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path)
    assert error.value.code == code


