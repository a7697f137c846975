"""DICOM series become images with the right voxels at the right places, or are refused in one line without a name."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage
from scipy.spatial.transform import Rotation

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.index import scan
from nnUNet_raw_conversion.dicom.volume import read_volume
from tests.dicom_files import (
    BIRTH,
    NAME,
    PATIENT,
    PET_FACTOR,
    PET_ORIGIN,
    PET_SHAPE,
    PET_SPACING,
    code,
    positions,
    trunk_hu,
    trunk_suv,
    write_ct,
    write_pet,
)

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
N = PET_SHAPE[0]


def only(folder):
    """The one series of a folder."""
    [series], unreadable = scan(folder, progress=False)
    assert unreadable == 0
    return series


def refused(folder):
    """The message of a series that must be refused: one line, nothing of the patient, nothing of the path."""
    with pytest.raises(UserError) as error:
        read_volume(only(folder))
    message = str(error.value)
    assert "\n" not in message
    assert not re.search("|".join(map(re.escape, (PATIENT, *NAME.split("^"), BIRTH, str(folder), "1.2.826"))), message)
    return message


def voxel_positions(image):
    """Positions (z, y, x, 3) in mm of the voxels of an image, by its header."""
    z, y, x = (np.arange(n) for n in image.GetSize()[::-1])
    index = np.stack(np.meshgrid(z, y, x, indexing="ij"), -1)[..., ::-1]
    matrix = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    return index @ matrix.T + image.GetOrigin()


rotations = st.lists(st.floats(-3.1, 3.1), min_size=3, max_size=3).map(lambda v: Rotation.from_rotvec(v).as_matrix())


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(direction=rotations, head_first=st.booleans(), enhanced=st.booleans())
def test_every_voxel_lies_where_it_was(tmp_path, direction, head_first, enhanced):
    shutil.rmtree(tmp_path, ignore_errors=True)
    direction = direction * np.array([1, 1, 1 if head_first else -1])  # slices may be stacked against their normal
    write_ct(tmp_path, shape=(7, 9, 11), direction=direction, origin=(-30.0, -20.0, 12.0), enhanced=enhanced)
    image, headers, notes = read_volume(only(tmp_path))
    assert image.GetPixelID() == sitk.sitkFloat32
    assert image.GetSize() == (11, 9, 7)
    np.testing.assert_allclose(image.GetSpacing(), (4.5, 5.0, 5.0), atol=1e-6)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), trunk_hu(voxel_positions(image)))
    assert len(headers) == 7 and notes == []
    along_normal = [np.dot(h.ImagePositionPatient, np.reshape(image.GetDirection(), (3, 3))[:, 2]) for h in headers]
    assert along_normal == sorted(along_normal)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
@pytest.mark.parametrize("enhanced", [False, True])
def test_transfer_syntaxes(tmp_path, syntax, enhanced):
    write_pet(tmp_path, transfer_syntax=syntax, enhanced=enhanced)
    values = sitk.GetArrayFromImage(read_volume(only(tmp_path))[0])
    truth = trunk_suv(positions(PET_SHAPE, PET_SPACING, PET_ORIGIN)) / PET_FACTOR
    # half of the biggest slope, plus single precision
    np.testing.assert_allclose(values, truth, atol=truth.max() / 32767 / 2 * 1.01)


def test_slopes_that_differ_by_slice(tmp_path):
    """A series whose first slice has slope 1 and whose others need 16 bits and slopes far from 1."""
    slopes = np.where(np.arange(N) == 0, 1.0, 10.0 ** np.linspace(-3, 4, N))
    stored = np.random.default_rng(0).integers(0, 32767, PET_SHAPE)
    intercepts = np.linspace(-5, 5, N)
    write_pet(tmp_path, stored * slopes[:, None, None] + intercepts[:, None, None], slopes=slopes, intercept=intercepts)
    values = sitk.GetArrayFromImage(read_volume(only(tmp_path))[0])
    expected = stored * slopes[:, None, None] + intercepts[:, None, None]
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-3)


def test_unsigned_and_overlay_bits(tmp_path):
    """12 bits of 16 are the value; the bits above hold an overlay in old CTs."""
    hu = np.full((4, 5, 6), 100.0)
    for file in write_ct(tmp_path, hu, signed=False, BitsStored=12, HighBit=11):
        dataset = pydicom.dcmread(file)
        pixels = np.frombuffer(dataset.PixelData, "<u2") | 0x8000
        dataset.PixelData = pixels.astype("<u2").tobytes()
        dataset.BitsStored, dataset.HighBit = 12, 11
        dataset.save_as(file)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(only(tmp_path))[0]), hu)


def test_positions_rounded_to_a_tenth_of_a_millimetre(tmp_path):
    places = [{"ImagePositionPatient": [-80.5, -76.5, round(-65 + 3.27 * i, 1)]} for i in range(N)]
    write_pet(tmp_path, spacing=(7, 9, 3.27), per_slice=places)
    image = read_volume(only(tmp_path))[0]
    assert image.GetSpacing()[2] == pytest.approx(3.27, abs=0.1 / (N - 1))


def test_the_same_slice_twice_counts_once(tmp_path):
    files = write_pet(tmp_path / "a")
    shutil.copy(files[3], tmp_path / "a" / "copy")  # the same SOP instance: not even seen
    image, headers, notes = read_volume(only(tmp_path))
    assert len(headers) == N and notes == []
    again = pydicom.dcmread(files[5])
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    again.save_as(tmp_path / "another")
    again, headers, notes = read_volume(only(tmp_path))
    assert len(headers) == N and "1 slices that are twice" in notes[0]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(again), sitk.GetArrayFromImage(image))


def change_pixels(file, **tags):
    """A copy of a slice beside it, as another instance with other voxels."""
    dataset = pydicom.dcmread(file)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    pixels = np.frombuffer(dataset.PixelData, "<i2") // 2
    dataset.PixelData = pixels.astype("<i2").tobytes()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.save_as(file.with_name("other"))


def test_two_different_slices_at_one_place(tmp_path):
    change_pixels(write_pet(tmp_path)[4])
    assert "two different slices at one position" in refused(tmp_path)


def test_dynamic_series(tmp_path):
    change_pixels(write_pet(tmp_path)[4], AcquisitionTime="140000")
    assert "several frames at one position (dynamic or gated)" in refused(tmp_path)


def test_missing_slice(tmp_path):
    write_pet(tmp_path, omit_slices=[9])
    assert "a gap of 13.00 mm between slices every 6.50 mm" in refused(tmp_path)


def test_missing_slices_at_the_end_are_noted(tmp_path):
    write_pet(tmp_path, omit_slices=[N - 1, N - 2], NumberOfSlices=N)
    assert f"PET has {N - 2} slices, but says it has {N}" in read_volume(only(tmp_path))[2][0]


def test_uneven_slices(tmp_path):
    z = -65 + 6.5 * np.arange(N) + np.where(np.arange(N) > 10, 1.0, 0)
    write_pet(tmp_path, per_slice=[{"ImagePositionPatient": [-80.5, -76.5, v]} for v in z])
    assert "uneven, 6.50 to 7.50 mm apart" in refused(tmp_path)


def test_gantry_tilt(tmp_path):
    places = [{"ImagePositionPatient": [-80.5, -76.5 + 6.5 * i * np.tan(np.radians(12)), -65 + 6.5 * i]}
              for i in range(N)]  # fmt: skip
    write_ct(tmp_path, np.zeros(PET_SHAPE), spacing=PET_SPACING, per_slice=places)
    assert "gantry tilt of 12.0 degrees" in refused(tmp_path)


def test_slices_in_several_directions(tmp_path):
    write_ct(tmp_path / "axial", shape=(5, 6, 7))
    write_ct(tmp_path / "coronal", shape=(5, 6, 7), origin=(0, 0, 200), SOPInstanceUID="1.2.3",
             direction=np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]))  # fmt: skip
    for i, file in enumerate((tmp_path / "coronal").iterdir()):
        dataset = pydicom.dcmread(file)
        dataset.SOPInstanceUID = f"1.2.3.{i}"
        dataset.save_as(file)
    assert "several directions" in refused(tmp_path)


def test_slices_of_several_sizes(tmp_path):
    write_ct(tmp_path / "a", shape=(5, 6, 7))
    for i, file in enumerate(write_ct(tmp_path / "b", shape=(2, 8, 7), origin=(0, 0, 200))):
        dataset = pydicom.dcmread(file)
        dataset.SOPInstanceUID = f"1.2.3.{i}"
        dataset.save_as(file)
    assert "several sizes (5 of 7x6 and 2 of 7x8)" in refused(tmp_path)


@pytest.mark.parametrize("tags", [{"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
                                  {"SOPClassUID": SecondaryCaptureImageStorage}])  # fmt: skip
def test_localizers_and_screenshots(tmp_path, tags):
    write_ct(tmp_path, shape=(5, 6, 7), **tags)
    assert "is a localizer or a screenshot" in refused(tmp_path)


def test_a_localizer_among_the_slices_is_left_out(tmp_path):
    kinds = [{"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER" if i == 0 else "AXIAL"]} for i in range(5)]
    write_ct(tmp_path, shape=(5, 6, 7), per_slice=kinds)
    image, _, notes = read_volume(only(tmp_path))
    assert image.GetSize() == (7, 6, 4)
    assert "1 localizers" in notes[0]


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"per_slice": [{"PixelSpacing": None}] * N}, "PixelSpacing (0028,0030) is missing"),
        ({"per_slice": [{"ImagePositionPatient": None}] * N}, "ImagePositionPatient (0020,0032) is missing"),
        ({"per_slice": [{"RescaleSlope": None}] * N}, "RescaleSlope (0028,1053) is missing"),
        ({"per_slice": [{"RescaleSlope": 0}] * N}, "RescaleSlope (0028,1053) is 0"),
        ({"per_slice": [{"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}] * N}, "perpendicular unit vectors"),
        ({"omit_slices": range(1, N)}, "only one slice"),
    ],
)
def test_headers_that_make_no_image(tmp_path, tags, message):
    write_pet(tmp_path, **tags)
    assert message in refused(tmp_path)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, RLELossless])
@pytest.mark.parametrize("left", [0.5, 0.97])
def test_truncated_file(tmp_path, syntax, left):
    files = write_pet(tmp_path, shape=(5, 60, 70), transfer_syntax=syntax)
    data = files[2].read_bytes()
    files[2].write_bytes(data[: int(left * len(data))])
    assert "copy" in refused(tmp_path)


def test_file_cut_within_its_header(tmp_path):
    files = write_pet(tmp_path)
    files[2].write_bytes(files[2].read_bytes()[:600])
    [series], unreadable = scan(tmp_path, progress=False)
    assert unreadable == 1 and len(series.files) == N - 1
    with pytest.raises(UserError, match="a gap of"):
        read_volume(series)


def test_scan_groups_by_uids_whatever_the_layout(tmp_path, capfd):
    write_ct(tmp_path / "x" / NAME, names="{}", shape=(5, 6, 7))
    write_pet(tmp_path / "x" / NAME, names="{}.IMA", shape=(4, 6, 7))
    other = write_pet(tmp_path / "deep" / "er", patient="Zqvwk", date="20200101", shape=(3, 6, 7),
                      SeriesDescription=f"PET {NAME} Zqvwk WB_(AC)" + " x" * 20)  # fmt: skip
    (tmp_path / "x" / "moved").mkdir()
    other[1].rename(tmp_path / "x" / "moved" / "file")
    (tmp_path / "notes.txt").write_text("no DICOM", encoding="utf-8")
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    pydicom.dcmread(other[0]).save_as(tmp_path / "x" / "moved" / "DICOMDIR")
    directory = pydicom.dcmread(tmp_path / "x" / "moved" / "DICOMDIR")
    directory.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    directory.save_as(tmp_path / "x" / "moved" / "DICOMDIR", enforce_file_format=True)
    found, unreadable = scan(tmp_path, progress=False)
    assert unreadable == 0
    assert [(s.modality, s.patient, s.date, len(s.files)) for s in found] == [
        ("CT", PATIENT, "20210304", 5), ("PT", PATIENT, "20210304", 4), ("PT", "Zqvwk", "20200101", 3)]  # fmt: skip
    ct, pet, _ = found
    assert ct.frame_uid == pet.frame_uid and ct.study_uid == pet.study_uid and ct.series_uid != pet.series_uid
    assert found[2].description == "PET WB AC" + " x" * 15  # without name, ID, punctuation; at most 40 characters
    assert pet.header.Units == "BQML" and "PixelData" not in pet.header
    assert capfd.readouterr() == ("", "")


def test_folders_that_cannot_be_read_are_counted(tmp_path, monkeypatch):
    write_pet(tmp_path / "a", shape=(3, 6, 7))
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    series, unreadable = scan(tmp_path, progress=False)
    assert len(series) == 1 and unreadable == 1


def test_one_series_uid_of_two_patients(tmp_path):
    uid = {"SeriesInstanceUID": "1.2.3", "StudyInstanceUID": "1.2"}
    write_pet(tmp_path / "a", shape=(3, 6, 7), **uid)
    write_pet(tmp_path / "b", shape=(4, 6, 7), patient="other", **uid)
    found, _ = scan(tmp_path, progress=False)
    assert sorted(len(s.files) for s in found) == [3, 4]


def test_files_without_preamble(tmp_path):
    for file in write_pet(tmp_path, transfer_syntax=ImplicitVRLittleEndian, shape=(3, 6, 7)):
        dataset = pydicom.dcmread(file)
        bare = pydicom.Dataset()
        bare.update(dataset)
        bare.save_as(file, implicit_vr=True, little_endian=True, enforce_file_format=False)
        assert file.read_bytes()[128:132] != b"DICM"
    assert read_volume(only(tmp_path))[0].GetSize() == (7, 6, 3)


def test_enhanced_frames_with_private_and_shared_tags(tmp_path):
    slopes = np.linspace(0.5, 2, N)
    times = [{"FrameAcquisitionDateTime": f"202103041315{i:02d}"} for i in range(N)]
    write_pet(tmp_path, slopes=slopes, enhanced=True, per_slice=times)
    _, headers, _ = read_volume(only(tmp_path))
    np.testing.assert_allclose([h.RescaleSlope for h in headers], slopes, rtol=1e-8)
    assert [h.FrameAcquisitionDateTime[-2:] for h in headers] == [f"{i:02d}" for i in range(N)]
    assert all(h.Units == "BQML" and "PerFrameFunctionalGroupsSequence" not in h for h in headers)


@pytest.mark.parametrize("more_units", [[], ["{SUVbw}g/ml"]])
def test_enhanced_units_by_real_world_value_mapping(tmp_path, more_units):
    """Enhanced PET has no Units (0054,1001); what it stores becomes Bq/ml by a mapping beside the rescale slope."""
    [file] = write_pet(tmp_path, enhanced=True, Units=None, slopes=1.0)
    dataset = pydicom.dcmread(file)
    mappings = []
    for number, unit in enumerate([*more_units, "Bq/ml"]):
        mapping = pydicom.Dataset()
        mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = (number + 1) * 1.5, 2.0
        mapping.MeasurementUnitsCodeSequence = code(unit, "UCUM", unit)
        mappings.append(mapping)
    dataset.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence = mappings
    dataset.save_as(file)
    image, headers, _ = read_volume(only(tmp_path))
    expected = dataset.pixel_array * 1.5 * len(mappings) + 2
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), expected, rtol=1e-6)
    assert {h.Units for h in headers} == {"BQML"}


def test_frames_without_positions(tmp_path):
    [file] = write_pet(tmp_path, enhanced=True)
    dataset = pydicom.dcmread(file)
    del dataset.PerFrameFunctionalGroupsSequence
    dataset.save_as(file)
    assert "multi-frame without the positions" in refused(tmp_path)


def test_dynamic_enhanced(tmp_path):
    [file] = write_pet(tmp_path, enhanced=True)
    dataset = pydicom.dcmread(file)
    for i, group in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 5 * (i % 7)]
        group.FrameContentSequence[0].TemporalPositionIndex = i // 7 + 1
    dataset.save_as(file)
    assert "several frames" in refused(tmp_path)


@pytest.mark.parametrize("compressed", ["MR_small_jpeg_ls_lossless.dcm", "MR_small_jp2klossless.dcm"])
def test_archives_compress(tmp_path, compressed):
    """JPEG-LS and JPEG 2000, which pydicom decodes with GDCM; the same image is there uncompressed."""
    pytest.importorskip("gdcm")
    files = Path(pydicom.__file__).parent / "data" / "test_files"
    if not (files / compressed).is_file():
        pytest.skip("pydicom is installed without its test files")
    for i in range(3):
        dataset = pydicom.dcmread(files / compressed)
        dataset.Modality, dataset.RescaleSlope, dataset.RescaleIntercept = "CT", 1, -1000
        dataset.SOPInstanceUID = f"1.2.3.{i}"
        dataset.ImageOrientationPatient, dataset.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2.5 * i]
        dataset.save_as(tmp_path / str(i))
    values = sitk.GetArrayFromImage(read_volume(only(tmp_path))[0])
    truth = pydicom.dcmread(files / "MR_small.dcm").pixel_array
    np.testing.assert_array_equal(values, [truth - 1000.0] * 3)


@pytest.mark.skipif(not REAL.is_dir(), reason="shared data not there")
@pytest.mark.parametrize("patient", ["STS_002", "STS_003", "STS_008", "STS_019"])
def test_real_ct_as_simpleitk_reads_it(patient):
    folder = REAL / "sts_dicom" / patient / "CT" / "image"
    image = read_volume(only(folder))[0]
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    other = reader.Execute()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(other))
    np.testing.assert_allclose(voxel_positions(image), voxel_positions(other), atol=1e-3)
