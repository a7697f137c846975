"""A body in several series is joined, or it is said that it is not; CTs that do not fit; slices that cannot be read."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.beds import join
from nnUNet_raw_conversion.dicom.choose import choose_pet
from nnUNet_raw_conversion.dicom.index import scan
from nnUNet_raw_conversion.dicom.place import check_place
from nnUNet_raw_conversion.dicom.reading import read_ct, read_pet
from tests.dicom_files import (
    CT_ORIGIN,
    CT_SHAPE,
    CT_SPACING,
    HALF_LIFE_S,
    PET_FACTOR,
    PET_ORIGIN,
    PET_SHAPE,
    PET_SPACING,
    positions,
    trunk_hu,
    trunk_suv,
    write_ct,
    write_pet,
)
from tests.test_ghsg import Trial
from tests.trial_files import LESION, write_patient, write_rtstruct

PLACES = positions(PET_SHAPE, PET_SPACING, PET_ORIGIN)
TRUTH = trunk_suv(PLACES) / PET_FACTOR


@pytest.fixture
def trial(tmp_path, monkeypatch, capfd) -> Trial:
    return Trial(tmp_path, monkeypatch, capfd)


def origin_at(slice_number, origin=PET_ORIGIN, spacing=PET_SPACING):
    return (origin[0], origin[1], origin[2] + spacing[2] * slice_number)


def write_beds(folder, first, last, name, later_s=0, **tags):
    """The slices `first` to `last` of the trunk as a PET series that begins `later_s` after the usual one."""
    clock = f"{13 + (900 + later_s) // 3600:02d}{(900 + later_s) % 3600 // 60:02d}00"
    times = {"SeriesTime": clock, "AcquisitionTime": clock}
    values = TRUTH[first:last] * 0.5 ** (later_s / HALF_LIFE_S)  # as it is decay-corrected to its own start
    write_pet(folder, values, origin=origin_at(first), SeriesDescription=name, series=name, names=name + "{:03d}",
              **times | tags)  # fmt: skip


def pet_of(folder):
    series, unreadable = scan(folder, progress=False)
    assert unreadable == 0
    return choose_pet(series)


@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_two_ranges_of_beds_are_one_body(tmp_path, overlap):
    """Each is converted by its own times: the second began 20 min later."""
    write_beds(tmp_path, 0, 12, "legs")
    write_beds(tmp_path, 12 - overlap, PET_SHAPE[0], "head", later_s=1200)
    image, notes = read_pet(pet_of(tmp_path)[0])
    assert image.GetSize() == PET_SHAPE[::-1]
    np.testing.assert_allclose(image.GetOrigin(), PET_ORIGIN, atol=1e-6)
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), trunk_suv(PLACES), atol=2e-3)
    (said,) = [note for note in notes if "joined from 2 series" in note]
    assert "'legs'" in said and "'head'" in said


def test_three_ranges_are_one_body(tmp_path):
    write_beds(tmp_path, 0, 6, "a")
    write_beds(tmp_path, 14, PET_SHAPE[0], "c")
    write_beds(tmp_path, 6, 14, "b")
    np.testing.assert_allclose(sitk.GetArrayFromImage(read_pet(pet_of(tmp_path)[0])[0]), trunk_suv(PLACES), atol=2e-3)


def test_ranges_of_other_frames_of_reference_that_abut_in_one_plane(tmp_path):
    write_beds(tmp_path, 0, 12, "legs")
    write_beds(tmp_path, 12, PET_SHAPE[0], "head", FrameOfReferenceUID="1.2.3")
    image, notes = read_pet(pet_of(tmp_path)[0])
    assert image.GetSize()[2] == PET_SHAPE[0] and any("of several frames of reference" in note for note in notes)


@pytest.mark.parametrize(
    ("first", "last", "more", "why"),
    [
        (0, PET_SHAPE[0], {"later_s": 3600}, None),  # a late phase of the same range
        (3, 12, {"later_s": 3600}, None),  # of a part of it
        (6, PET_SHAPE[0], {"later_s": 3600}, "60 min earlier or later"),
        (14, PET_SHAPE[0], {}, "a gap of 13 mm"),
        (12, PET_SHAPE[0], {"spacing": (6.0, 9.0, 6.5)}, "another size"),
        (12, PET_SHAPE[0], {"direction": np.array([[1, 0, 0], [0, -1, 0], [0, 0, 1]])}, "another direction"),
        (12, PET_SHAPE[0], {"PatientWeight": 80.0}, "another weight"),
        (12, PET_SHAPE[0], {"RadiopharmaceuticalStartTime": "113000", "RadionuclideTotalDose": 90e6},
         "another injected dose and time of injection"),
    ],
)  # fmt: skip
def test_other_ranges_are_not_joined_but_told(tmp_path, first, last, more, why):
    write_beds(tmp_path, 0, PET_SHAPE[0] if why is None else 12, "early")
    write_beds(tmp_path, first, last, "other", **more)
    pet, _ = pet_of(tmp_path)
    assert not pet.beds
    assert [("not joined" in note and why in note) for note in pet.remarks] == ([] if why is None else [True])


def test_planes_between_those_of_the_first_are_interpolated():
    """A ramp along every axis comes out as it is, whatever the lattice of the second range."""

    def ramp(origin, size, spacing):
        values = positions(size[::-1], spacing, origin) @ (1.0, 10.0, 100.0)
        image = sitk.GetImageFromArray(values.astype(np.float32))
        image.SetOrigin(origin)
        image.SetSpacing(spacing)
        return image

    one = ramp((0.0, 0.0, 0.0), (9, 8, 7), (2.0, 3.0, 4.0))
    other = ramp((0.0, 0.0, 27.3), (9, 8, 6), (2.0, 3.0, 4.0))
    whole = join([one, other], 0)
    assert whole.GetSize() == (9, 8, 13)
    expected = sitk.GetArrayFromImage(ramp((0.0, 0.0, 0.0), (9, 8, 13), (2.0, 3.0, 4.0)))
    inner = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]  # 7 lies in front of the first centre of `other`, 12 behind the last
    np.testing.assert_allclose(sitk.GetArrayFromImage(whole)[inner], expected[inner], rtol=1e-5)
    assert np.abs(sitk.GetArrayFromImage(whole)[7] - expected[7]).max() <= 100 * 2


def write_ct_part(folder, first, last, name, **tags):
    hu = trunk_hu(positions(CT_SHAPE, CT_SPACING, CT_ORIGIN))[first:last]
    write_ct(folder, hu, origin=origin_at(first, CT_ORIGIN, CT_SPACING), SeriesDescription=name, series=name,
             names=name + "{:03d}", **tags)  # fmt: skip


def ct_of(folder, **how):
    series, _ = scan(folder, progress=False)
    pet, _ = choose_pet(series)
    ct, _, why, notes = read_ct(series, pet, read_pet(pet)[0], **how)
    return ct, why, notes


def test_two_ranges_of_ct_are_one_body(tmp_path):
    write_pet(tmp_path / "pet")
    write_ct_part(tmp_path / "ct", 0, 15, "CT legs")
    write_ct_part(tmp_path / "ct", 12, CT_SHAPE[0], "CT head")
    ct, why, notes = ct_of(tmp_path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ct), trunk_hu(positions(CT_SHAPE, CT_SPACING, CT_ORIGIN)))
    assert "covers 100% of the PET" in why and "CT joined from 2 series" in notes[0]


def interleave(folder, name):
    """A second pass over the same places, with other voxels, in the same series."""
    for file in sorted(folder.glob(f"{name}*"))[::2]:
        dataset = pydicom.dcmread(file)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID + ".1"
        dataset.PixelData = (np.frombuffer(dataset.PixelData, "<i2") + 7).astype("<i2").tobytes()
        dataset.save_as(file.with_name(f"again{file.name}"))


def test_the_next_best_ct_is_taken_and_the_fault_told(tmp_path):
    write_pet(tmp_path / "pet")
    write_ct_part(tmp_path / "ct", 0, CT_SHAPE[0], "CT low dose")
    interleave(tmp_path / "ct", "CT low dose")
    with pytest.raises(UserError, match="two different slices"):
        ct_of(tmp_path)
    write_ct_part(tmp_path / "ct", 0, 12, "CT half")  # shows too little to take its place
    with pytest.raises(UserError, match="two different slices"):
        ct_of(tmp_path)
    write_ct_part(tmp_path / "ct", 0, CT_SHAPE[0], "CT diagnostic", ContrastBolusAgent="x")
    ct, why, notes = ct_of(tmp_path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ct), trunk_hu(positions(CT_SHAPE, CT_SPACING, CT_ORIGIN)))
    assert why.startswith("'CT diagnostic'") and "'CT low dose' is passed over" in notes[0]


def test_a_ct_of_another_frame_of_reference(trial):
    """Refused with the flag that takes it, taken with it where its body lies in the PET's place, else refused."""
    write_patient(trial.input / "a", "1")
    for file in (trial.input / "a" / "a").iterdir():
        dataset = pydicom.dcmread(file)
        dataset.FrameOfReferenceUID = "1.2.3"
        dataset.save_as(file)
    assert "--trust-study" in trial.convert(fails=True)
    trial.convert("--trust-study")
    row = trial.report(trial.case("1"))
    assert row["status"] == "done" and "taken by --trust-study" in row["notes"]
    np.testing.assert_allclose(trial.voxels(f"imagesTr/{row['case_id']}_0001"), trunk_suv(PLACES), atol=2e-3)


@pytest.mark.parametrize("shift", [(0, 0, 0), (35, 0, 0), (0, -40, 0), (300, 0, 0)])
def test_the_place_of_a_ct_is_checked(shift):
    shape, spacing, origin = (30, 40, 44), (6.0, 6.0, 5.0), (-130.0, -120.0, -75.0)
    places = positions(shape, spacing, origin)
    images = []
    for values in (trunk_hu(places), trunk_suv(places)):
        images.append(sitk.GetImageFromArray(values.astype(np.float32)))
        images[-1].SetSpacing(spacing)
        images[-1].SetOrigin(origin)
    ct, pet = images
    ct.SetOrigin((np.array(origin) + shift).tolist())
    if not any(shift):
        assert "agree (1.00)" in check_place(ct, pet)
    else:
        with pytest.raises(UserError) as error:
            check_place(ct, pet)
        assert error.value.code == "CT_OTHER_FRAME"


# ---- slices that cannot be read


@pytest.mark.parametrize("what", ["cut", "empty", "zeros", "text"])
@pytest.mark.parametrize("where", ["a", "b"])
def test_an_end_slice_that_cannot_be_read_fails_its_case(trial, what, where):
    write_patient(trial.input / "one", "1")
    write_patient(trial.input / "two", "2")
    file = sorted((trial.input / "one" / where).iterdir())[0]
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:500], "empty": b"", "zeros": bytes(len(whole)), "text": b"not found " * 50}[what])
    output = trial.convert(fails=True)
    assert trial.report(trial.case("1"))["code"] == "SLICE_UNREADABLE"
    assert trial.report(trial.case("2"))["status"] == "done"
    assert "1 file beside its slices cannot be read" in output


def test_contours_that_cannot_be_read_are_told(trial):
    write_patient(trial.input / "one", "1")
    file = trial.input / "one" / "c" / "RS1"
    file.write_bytes(file.read_bytes()[:400])
    trial.convert(fails=True)  # the case is there, without its lesions; the exit code tells
    row = trial.report(trial.case("1"))
    assert (row["status"], row["part"]) == ("done", "Pt") and "if contours are among them" in row["notes"]


def test_what_is_no_slice_does_no_harm(trial):
    """What lies on the CDs of a PACS beside the images, and in their folders."""
    write_patient(trial.input / "one", "1")
    for name in ("README", "README.TXT", "viewer.exe", ".DS_Store", "._IM0003", "Thumbs.db", "IM0003.jpg", "INDEX.HTM"):
        for folder in (trial.input, trial.input / "one" / "b"):
            (folder / name).write_bytes(b"\x00\x01nothing")
    (trial.input / "one" / "b" / "DICOMDIR").write_bytes(b"")
    trial.convert()
    assert trial.report(trial.case("1"))["status"] == "done"


def test_a_series_uid_for_every_slice(trial):
    for folder, write, shape in (("ct", write_ct, CT_SHAPE), ("pet", write_pet, PET_SHAPE)):
        write(trial.input / folder, patient="1", per_slice=[{"SeriesInstanceUID": f"1.2.{shape[0]}.{i}"}
                                                           for i in range(shape[0])])  # fmt: skip
    write_rtstruct(trial.input / "RS", next((trial.input / "pet").iterdir()), {"Lesion": LESION})
    trial.convert()
    row = trial.report(trial.case("1"))
    assert row["part"] == "Tr" and "drawn on the PET" in row["used"]
    np.testing.assert_allclose(trial.voxels(f"imagesTr/{row['case_id']}_0001"), trunk_suv(PLACES), atol=2e-3)
