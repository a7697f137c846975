"""fratmae_convert_ghsg from DICOM trees and NIfTI folders to the raw dataset."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import openpyxl
import pydicom
import pytest
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion import ghsg
from nnUNet_raw_conversion.dicom.choose import choose_ct, choose_lesions, choose_pet
from nnUNet_raw_conversion.dicom.index import Series, scan
from nnUNet_raw_conversion.patients import parse_columns, read_patients, read_test_list, record_of
from nnUNet_raw_conversion.raw_dataset import RawDataset
from nnUNet_raw_conversion.trial import ALL, Visit, find_visits, select, trial_in
from tests.dicom_files import PET_ORIGIN, PET_SHAPE, PET_SPACING, lesion, positions, trunk_suv, write_ct, write_pet
from tests.trial_files import LESION, write_patient, write_rtstruct

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


class Trial:
    """Folders of a test, and the command run in them."""

    def __init__(self, folder: Path, monkeypatch, capfd) -> None:
        self.input, self.raw, self.keys = folder / "in", folder / "raw", folder / "key_in.csv"
        self.input.mkdir()
        self.dataset = self.raw / "Dataset522_GHSG"
        self._monkeypatch, self._capfd = monkeypatch, capfd
        monkeypatch.setenv("nnUNet_raw", str(self.raw))
        for variable in ("nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.delenv(variable, raising=False)

    def convert(self, *arguments: str, fails: bool = False) -> str:
        """What the command prints (stdout and stderr)."""
        command = ["fratmae_convert_ghsg", "-i", str(self.input), "-d", "522", "-np", "1", *map(str, arguments)]
        self._monkeypatch.setattr("sys.argv", command)
        self._capfd.readouterr()
        failed = False
        try:
            ghsg.main()
        except SystemExit as error:
            failed = True
            if isinstance(error.code, str):
                os.write(2, (error.code + "\n").encode())
        output = "".join(self._capfd.readouterr())
        assert failed == fails, output
        return output

    def table(self, name: str) -> list[dict]:
        path = self.keys if name == "keys" else self.dataset / f"{name}.csv"
        with path.open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def case(self, patient: str, trial: str = "") -> str:
        (found,) = [r["case_id"] for r in self.table("keys") if r["patient"] == patient and r["trial"] == trial]
        return found

    def voxels(self, name: str) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(self.dataset / f"{name}.nii.gz")))

    def report(self, case_id: str) -> dict:
        (row,) = [row for row in self.table("conversion_report") if row["case_id"] == case_id]
        return row


@pytest.fixture
def trial(tmp_path, monkeypatch, capfd) -> Trial:
    return Trial(tmp_path, monkeypatch, capfd)


def test_a_trial_in_one_command(trial, tmp_path):
    """Two patients of the same number in two trials, folders that say nothing, many series, table, test list, rerun."""
    one = trial.input / "export1"
    tags = {"patient": "12", "ClinicalTrialProtocolID": "HD16", "PatientSex": "M", "PatientAge": None}
    write_patient(one, **tags)
    write_pet(
        one / "b", series="nac", SeriesDescription="PET NAC", CorrectedImage=["NORM", "DECY"], names="N{}", **tags
    )
    write_ct(one / "a", SeriesDescription="CT Lunge", ConvolutionKernel="B70f", names="L{}", **tags)
    write_patient(trial.input / "export2" / "x" / "y", "12", "20200101", StudyDescription="GHSG HD18 staging")
    sheet = openpyxl.Workbook()
    for row in (["Studie", "PatNr", "AnnArbor", "Name", "Alter"],
                [16, 12, "IIB", "Erika", 34], ["HD18", "0012", "IVBE", "Hans", 51]):  # fmt: skip
        sheet.active.append(row)
    sheet.save(tmp_path / "table.xlsx")
    (tmp_path / "test.txt").write_text("# the test patients\nHD18 12\n", encoding="utf-8")
    options = ["--clinical", tmp_path / "table.xlsx", "--test-list", tmp_path / "test.txt", "--columns",
               "case_id=PatNr", "stage=AnnArbor", "trial=Studie", "age=Alter"]  # fmt: skip
    trial.convert(*options)

    train, test = trial.case("12", "HD16"), trial.case("12", "HD18")
    assert sorted(p.relative_to(trial.dataset).as_posix() for p in trial.dataset.glob("*s??/*")) == [
        f"imagesTr/{train}_0000.nii.gz", f"imagesTr/{train}_0001.nii.gz",
        f"imagesTs/{test}_0000.nii.gz", f"imagesTs/{test}_0001.nii.gz",
        f"labelsTr/{train}.nii.gz", f"labelsTs/{test}.nii.gz",
    ]  # fmt: skip
    places = positions(PET_SHAPE, PET_SPACING, PET_ORIGIN)
    for part, case in (("Tr", train), ("Ts", test)):
        suv, mask = trial.voxels(f"images{part}/{case}_0001"), trial.voxels(f"labels{part}/{case}") > 0
        np.testing.assert_allclose(suv, trunk_suv(places), atol=2e-3)
        assert 2 * np.sum(mask & lesion(places)) / (mask.sum() + lesion(places).sum()) > 0.95
    clinical = {row["case_id"]: row for row in trial.table("clinical")}
    assert clinical[train] == {"case_id": train, "tracer": "18F-FDG", "diagnosis": "Hodgkin lymphoma", "age": "34",
                               "sex": "M", "stage": "II"}  # fmt: skip
    assert (clinical[test]["stage"], clinical[test]["sex"]) == ("IV", "F")
    used = trial.report(train)["used"]
    for words in (
        "'PET WB AC'",
        "'PET NAC' (not attenuation-corrected)",
        "'CT Lunge' (lung or bone kernel)",
        "RTSTRUCT",
    ):
        assert words in used

    # A patient more: those who are there keep their pseudonyms and are not converted again
    written = (trial.dataset / f"imagesTr/{train}_0001.nii.gz").stat().st_mtime_ns
    write_patient(trial.input / "export0", "7", ClinicalTrialProtocolID="HD17", rois={})
    output = trial.convert(*options)
    assert (trial.case("12", "HD16"), trial.case("12", "HD18")) == (train, test)
    assert (trial.dataset / f"imagesTr/{train}_0001.nii.gz").stat().st_mtime_ns == written
    assert "1 cases have no row" in output and "pretraining only" in output
    assert (trial.dataset / f"imagesPt/{trial.case('7', 'HD17')}_0001.nii.gz").exists()


def test_failing_patients_do_not_stop_the_others(trial):
    write_patient(trial.input / "good", "good")
    pet = write_pet(trial.input / "mixed", patient="x1", date="20200101")
    ct = write_ct(trial.input / "mixed" / "ct", patient="x1", date="20200101")
    write_pet(
        trial.input / "mixed" / "b", patient="x2", SeriesInstanceUID=_uid(pet[0]), StudyInstanceUID=_uid(ct[0], "Study")
    )
    write_pet(trial.input / "no ct", patient="no_ct")
    write_pet(trial.input / "nac", patient="nac", SeriesDescription="PET NAC")
    write_ct(trial.input / "ct only", patient="ct_only")
    truncated = write_pet(trial.input / "short", patient="short")[3]
    truncated.write_bytes(truncated.read_bytes()[:-200])
    write_ct(trial.input / "short" / "ct", patient="short")
    shutil.copytree(trial.input / "good" / "b", trial.input / "gap")
    output = trial.convert(fails=True)
    errors = {row["patient"]: trial.report(row["case_id"])["error"] for row in trial.table("keys")}
    assert errors["good"] == ""
    for patient, words in {
        "x1": "two patients", "x2": "two patients", "no_ct": "--allow-missing-ct", "nac": "not attenuation-corrected",
        "ct_only": "no PET series", "short": "PET",
    }.items():  # fmt: skip
        assert words in errors[patient], patient
        assert errors[patient].count("\n") == 0
    assert "Traceback" not in output
    assert [row["case_id"] for row in trial.table("clinical")] == [trial.case("good")]


def test_pet_without_ct(trial):
    write_patient(trial.input / "p1", "p1")
    pet = write_pet(trial.input / "p2", patient="p2")
    write_ct(trial.input / "p2" / "ct", patient="p2", FrameOfReferenceUID="1.2.3")
    write_rtstruct(trial.input / "p2" / "RS", pet[0], {"Lesion": LESION})
    trial.convert("--allow-missing-ct")
    missing = {row["case_id"]: row["missing"] for row in trial.table("clinical")}
    assert missing == {trial.case("p1"): "", trial.case("p2"): "CT"}
    assert np.all(trial.voxels(f"imagesTr/{trial.case('p2')}_0000") == -1024)
    assert "another frame of reference" in trial.report(trial.case("p2"))["used"]


def test_time_points_and_splits(trial):
    for patient in "ab":
        write_patient(trial.input / f"{patient}2", patient, "20211001")
        write_patient(trial.input / f"{patient}1", patient, "20210301", PatientAge="055Y")
    output = trial.convert()
    assert "2 PET studies at other time points" in output
    baseline = {row["patient"]: row["case_id"] for row in trial.table("keys")}
    assert {row["age"] for row in trial.table("clinical")} == {"55"}
    shutil.rmtree(trial.dataset)
    trial.convert("--timepoint", "all")
    cases = {row["case_id"]: row["patient"] for row in trial.table("keys")}
    assert len(cases) == 4 and set(baseline.values()) < set(cases)
    for fold in json.loads((trial.dataset / "splits_final.json").read_text(encoding="utf-8")):
        assert {cases[c] for c in fold["train"]}.isdisjoint({cases[c] for c in fold["val"]})
        assert len(fold["train"]) + len(fold["val"]) == 4


def test_splits_come_with_the_dataset_and_go_when_they_are_not_needed(trial, monkeypatch):
    for date in ("20210301", "20211001"):
        write_patient(trial.input / date, "a", date)
    write_patient(trial.input / "b", "b")
    there = []
    finish = RawDataset.finish

    def watched(dataset):
        there.append((dataset.where / "splits_final.json").exists())
        finish(dataset)

    monkeypatch.setattr(RawDataset, "finish", watched)
    trial.convert("--timepoint", "all")
    (trial.input / "test.txt").write_text("a\n", encoding="utf-8")  # its two studies are test cases now
    trial.convert("--timepoint", "all", "--test-list", trial.input / "test.txt")
    assert there == [True, False]


def test_grid_and_lesion_roi(trial):
    rois = {"GTV_Mass": LESION, "Edema": (LESION[0], 25.0), "Koerper": ((0.0, 0.0, 0.0), 50.0)}
    write_patient(trial.input / "p", "p", rois=rois)
    trial.convert("--grid", "5,5,5", "--lesion-roi", "^gtv_")
    case = trial.case("p")
    image = sitk.ReadImage(str(trial.dataset / f"labelsTr/{case}.nii.gz"))
    assert image.GetSpacing() == (5, 5, 5)
    volume = np.count_nonzero(sitk.GetArrayFromImage(image)) * 0.125
    assert volume == pytest.approx(4 / 3 * np.pi * 1.5**3, rel=0.1)
    kept = {row["name"]: row["kept"] for row in trial.table("conversion_rois")}
    assert kept == {"GTV_Mass": "True", "Edema": "False", "Koerper": "False"}


def test_override_by_pseudonym_converts_one_case_anew(trial, tmp_path):
    write_patient(trial.input / "p1", "p1")
    write_patient(trial.input / "p2", "p2", PatientWeight=None)
    trial.convert(fails=True)
    case = trial.case("p2")
    assert "PatientWeight" in trial.report(case)["error"]
    (tmp_path / "suv.csv").write_text(f"case_id,weight_kg\n{case},140\n", encoding="utf-8")
    trial.convert("--suv-override", tmp_path / "suv.csv")
    ratio = trial.voxels(f"imagesTr/{case}_0001") / trial.voxels(f"imagesTr/{trial.case('p1')}_0001")
    np.testing.assert_allclose(ratio, 2, rtol=0.02)
    (tmp_path / "suv.csv").write_text("case_id,weight_kg\np2,140\n", encoding="utf-8")
    assert "pseudonyms" in trial.convert("--suv-override", tmp_path / "suv.csv", fails=True)


def nifti(path: Path, values: np.ndarray, spacing: tuple = PET_SPACING, origin: tuple = PET_ORIGIN) -> sitk.Image:
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return image


def write_nifti_case(folder: Path, ct="CTres", pet="SUV", seg: str | None = "SEG") -> None:
    places = positions(PET_SHAPE, PET_SPACING, PET_ORIGIN)
    x, y, z = np.moveaxis(places, -1, 0)
    body = ((x - 0.2 * z - 10) / 55) ** 2 + ((y + 8) / 45) ** 2
    nifti(folder / f"{ct}.nii.gz", np.where(body < 0.8, 30, np.where(body < 1, -100, -1000)).astype(np.int16))
    nifti(folder / f"{pet}.nii.gz", trunk_suv(places).astype(np.float32))
    if seg:
        nifti(folder / f"{seg}.nii.gz", lesion(places).astype(np.uint8))


def test_nifti_folders(trial):
    write_nifti_case(trial.input / "HD16" / "0012")
    write_nifti_case(trial.input / "HD18" / "0012", "0012_ct", "0012_pet_suv", "0012_lesion_mask")
    write_nifti_case(trial.input / "HD18_7", "CT/volume_ct", "PET/volume_PET", "Seg/volume_seg")
    write_nifti_case(trial.input / "twice")
    write_nifti_case(trial.input / "twice", seg="mask")
    write_nifti_case(trial.input / "unclear", pet="volume")
    trial.convert(fails=True)
    keys = {(row["trial"], row["patient"]): row["case_id"] for row in trial.table("keys")}
    places = positions(PET_SHAPE, PET_SPACING, PET_ORIGIN)
    for key in (("HD16", "0012"), ("HD18", "0012"), ("HD18", "HD18_7")):
        np.testing.assert_array_equal(trial.voxels(f"labelsTr/{keys[key]}"), lesion(places))
    assert "2 NIfTI files could be the lesions" in trial.report(keys["", "twice"])["error"]
    assert "SUV or PET" in trial.report(keys["", "unclear"])["error"]


def test_links_only_to_what_is_the_same(trial):
    write_nifti_case(trial.input / "p1")
    write_nifti_case(trial.input / "p2")
    image = sitk.ReadImage(str(trial.input / "p2" / "SUV.nii.gz"))
    sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat64), str(trial.input / "p2" / "SUV.nii.gz"))
    seg = nibabel.load(trial.input / "p2" / "SEG.nii.gz")
    seg.header["descrip"] = b"Muster Erika"
    nibabel.save(
        nibabel.Nifti1Image(np.asarray(seg.dataobj), seg.affine, seg.header), trial.input / "p2" / "SEG.nii.gz"
    )
    packed = trial.input / "p2" / "CTres.nii.gz"  # as gzip does it, with the name of what was packed in its header
    content = gzip.decompress(packed.read_bytes())
    with gzip.GzipFile("Muster_Erika.nii", "wb", fileobj=packed.open("wb")) as file:
        file.write(content)
    assert b"Muster_Erika" in packed.read_bytes()
    output = trial.convert("--link")
    assert "3 files are links" in output, output
    one, two = trial.case("p1"), trial.case("p2")
    for name, source, same in (
        (f"imagesTr/{one}_0000", "p1/CTres", True), (f"imagesTr/{one}_0001", "p1/SUV", True),
        (f"labelsTr/{one}", "p1/SEG", True), (f"imagesTr/{two}_0000", "p2/CTres", False),
        (f"imagesTr/{two}_0001", "p2/SUV", False), (f"labelsTr/{two}", "p2/SEG", False),
    ):  # fmt: skip
        target = trial.dataset / f"{name}.nii.gz"
        assert os.path.samefile(target, trial.input / f"{source}.nii.gz") == same, name
        assert not target.is_symlink()
    assert "converting" not in trial.convert("--link")  # the sizes that make a case done were brought up to date


def test_nifti_mask_in_a_dicom_tree(trial):
    write_patient(trial.input / "p1", "p1", rois={})
    places = positions(PET_SHAPE, PET_SPACING, PET_ORIGIN)
    nifti(trial.input / "p1" / "annotation" / "lesions.nii.gz", lesion(places).astype(np.uint8))
    trial.convert()
    np.testing.assert_array_equal(trial.voxels(f"labelsTr/{trial.case('p1')}"), lesion(places))


def test_contours_of_another_frame_of_reference_are_told(trial):
    write_patient(trial.input / "p1", "p1", rois={})
    stranger = write_pet(trial.input.parent / "elsewhere", patient="p1", study="2")[0]
    write_rtstruct(trial.input / "p1" / "RS", stranger, {"Lesion": LESION})
    output = trial.convert()
    report = trial.report(trial.case("p1"))
    assert report["part"] == "Pt" and "no RTSTRUCT or SEG refers to this PET" in report["used"]
    assert "none refers to this PET" in report["notes"] and "none refers to this PET" in output


def test_rows_that_may_be_of_others_are_told(trial, tmp_path):
    """The folder of a centre has the number of a patient, whose row would go to all patients there."""
    for patient in ("A1", "A2", "7"):
        write_patient(trial.input / "12" / patient, patient, rois={})
    (tmp_path / "t.csv").write_text("case_id,sex\n12,F\n7,M\n", encoding="utf-8")
    output = trial.convert("--clinical", tmp_path / "t.csv")
    [line] = [line for line in output.splitlines() if "may be of others" in line]
    assert trial.case("7") in line and (trial.case("A1") in line) != (trial.case("A2") in line)


def test_nifti_beside_dicom_is_no_patient_of_its_own(tmp_path):
    pet_only(tmp_path / "site" / "p1" / "dicom", "7")
    write_nifti_case(tmp_path / "site" / "p1" / "nifti")
    write_nifti_case(tmp_path / "site" / "p2")
    visits, messages = visits_of(tmp_path / "site")
    assert {(v.patient, tuple(v.files)) for v in visits} == {("7", ("lesions",)), ("p2", ("CT", "PET", "lesions"))}
    (tmp_path / "site" / "p1" / "nifti" / "SEG.nii.gz").unlink()
    visits, messages = visits_of(tmp_path / "site")
    assert {v.patient for v in visits} == {"7", "p2"} and "left out" in messages[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--columns", "stage:AnnArbor"], "OURS=THEIRS"),
        (["--columns", "name=Name"], "OURS=THEIRS"),
        (["--clinical", "no.csv"], "no such file"),
        (["--grid", "mri"], "--grid"),
        (["--timepoint", "0"], "--timepoint"),
        (["--test-list", "no.txt"], "--test-list"),
        (["--key-file", "Dataset522_GHSG/keys.csv"], "--key-file"),
        (["-np", "0"], "-np"),
        (["-d", "1000"], "-d 1000"),
    ],
)
def test_bad_calls_are_one_line(trial, options, words):
    write_patient(trial.input / "p1", "p1")
    output = trial.convert(*options, fails=True)
    assert words in output and "Traceback" not in output
    assert not trial.dataset.exists()


def test_empty_and_missing_input(trial):
    assert "neither DICOM nor NIfTI" in trial.convert(fails=True)
    trial.input.rmdir()
    assert "no such folder" in trial.convert(fails=True)
    assert not trial.keys.exists()


# ---- which series


def series_of(folder: Path) -> list[Series]:
    return scan(folder, progress=False)[0]


def _uid(file: Path, of: str = "Series") -> str:
    return pydicom.dcmread(file, stop_before_pixels=True)[f"{of}InstanceUID"].value


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"CorrectedImage": ["NORM", "DECY"]}, "not attenuation-corrected"),
        ({"CorrectedImage": None, "SeriesDescription": "WB_NAC"}, "not attenuation-corrected"),
        ({"SeriesDescription": "PET uncorrected"}, "not attenuation-corrected"),
        ({"SeriesType": ["DYNAMIC", "IMAGE"]}, "dynamic"),
        ({"SeriesType": ["GATED", "IMAGE"]}, "gated"),
        ({"SeriesType": None, "NumberOfTimeSlices": 24}, "dynamic or gated"),
        ({"SeriesDescription": "PET MIP"}, "MIP"),
        ({"ImageType": ["DERIVED", "SECONDARY", "MIP"]}, "MIP"),
        ({"shape": (4, 18, 24)}, "4 slices only"),
        ({"ImageType": ["DERIVED", "PRIMARY"]}, "derived"),
        ({"shape": (15, 18, 24)}, "shorter"),
        ({"Units": "PROPCPS"}, "unit"),
        ({"Units": "GML", "SUVType": "LBM"}, "unit"),
        ({"CorrectedImage": None}, "not stated"),
        ({"SeriesNumber": 9}, "later series number"),
    ],
)
def test_the_corrected_whole_body_pet_is_taken(tmp_path, tags, why):
    write_pet(tmp_path / "good", SeriesDescription="good")
    write_pet(tmp_path / "other", **{"SeriesDescription": "other"} | tags)
    pet, said = choose_pet(series_of(tmp_path))
    assert pet.description == "good"
    assert why in said.split("left:")[1]


def test_beds_of_a_static_ge_scan_are_no_frames(tmp_path):
    write_pet(tmp_path, SeriesType=["STATIC", "IMAGE"], NumberOfTimeSlices=6)
    assert choose_pet(series_of(tmp_path))[0].modality == "PT"


@pytest.mark.parametrize("description", ["Screening WB AC", "PET protocol HD18"])
def test_words_of_a_trial_are_no_screen_shot(tmp_path, description):
    write_pet(tmp_path, SeriesDescription=description)
    assert choose_pet(series_of(tmp_path))[0]


def test_no_usable_pet_says_why(tmp_path):
    write_pet(tmp_path, SeriesDescription="PET NAC")
    with pytest.raises(UserError, match="no usable PET series: 'PET NAC' \\(not attenuation-corrected\\)"):
        choose_pet(series_of(tmp_path))


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"FrameOfReferenceUID": "1.2.3"}, "another frame of reference"),
        ({"ConvolutionKernel": "Br64d"}, "lung or bone kernel"),
        ({"ConvolutionKernel": "BONEPLUS"}, "lung or bone kernel"),
        ({"SeriesDescription": "Thorax Lunge"}, "lung or bone kernel"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "scout"),
        ({"SeriesDescription": "Topogram"}, "scout"),
        ({"SeriesDescription": "Bolus tracking"}, "bolus"),
        ({"shape": (15, 36, 40)}, "covers less"),
        ({"SeriesDescription": "CT venous", "ContrastBolusAgent": "Imeron"}, "not low-dose"),
        ({"SeriesDescription": "CT diagnostic"}, "not low-dose"),
    ],
)
def test_the_ct_of_the_pet_is_taken(tmp_path, tags, why):
    write_pet(tmp_path / "pet")
    write_ct(tmp_path / "good", SeriesDescription="CT low dose good", SeriesNumber=7)
    write_ct(tmp_path / "other", **{"SeriesDescription": "other"} | tags)
    series = series_of(tmp_path)
    ct, said = choose_ct(series, choose_pet(series)[0])
    assert ct.description == "CT low dose good" and "low-dose, covers 100%" in said
    assert why in said.split("left:")[1]


def test_a_lung_kernel_is_better_than_half_a_body(tmp_path):
    write_pet(tmp_path / "pet")
    write_ct(tmp_path / "lung", SeriesDescription="lung", ConvolutionKernel="B70f")
    write_ct(tmp_path / "half", SeriesDescription="half", shape=(15, 36, 40))
    series = series_of(tmp_path)
    assert choose_ct(series, choose_pet(series)[0])[0].description == "lung"


def contours_of(folder: Path) -> tuple[list[str], str]:
    series = series_of(folder)
    pet = choose_pet([one for one in series if one.description == "PET WB AC"])[0]
    files, why = choose_lesions(series, pet, [one for one in series if one.modality == "CT"])
    return [file.name for _, file in files], why


def test_contours_on_the_pet_before_those_on_the_ct(tmp_path):
    pet, ct = write_pet(tmp_path / "pet")[0], write_ct(tmp_path / "ct")[0]
    write_rtstruct(tmp_path / "on_ct", ct, {"GTV": LESION})
    assert contours_of(tmp_path) == (["on_ct"], "1 RTSTRUCT drawn on the CT")
    write_rtstruct(tmp_path / "on_pet", pet, {"GTV": LESION})
    assert contours_of(tmp_path) == (["on_pet"], "1 RTSTRUCT drawn on the PET; left: 1 not drawn on the PET")


def test_contours_by_frame_of_reference_are_of_the_same_patient(tmp_path):
    pet = write_pet(tmp_path / "pet")[0]
    late = {"StudyInstanceUID": "1.2.9", "StudyDate": "20220101"}
    struct = {"ReferencedFrameOfReferenceSequence": [], "FrameOfReferenceUID": None}
    frame = pydicom.dcmread(pet, stop_before_pixels=True).FrameOfReferenceUID
    write_rtstruct(tmp_path / "stranger", pet, {"GTV": LESION}, PatientID="other", **late, **struct)
    assert contours_of(tmp_path)[0] == []
    write_rtstruct(tmp_path / "later", pet, {"GTV": LESION}, **late, **struct | {"FrameOfReferenceUID": frame})
    assert contours_of(tmp_path) == (["later"], "1 RTSTRUCT in the PET's frame of reference")


def test_dicom_seg(trial):
    """A SEG of highdicom, drawn on the PET; the source images tell on which series."""
    empty = dict.fromkeys(("AccessionNumber", "StudyID", "ReferringPhysicianName", "PositionReferenceIndicator"), "")
    write_patient(trial.input / "p", "p", rois={}, **empty)
    images = [pydicom.dcmread(file) for file in (trial.input / "p" / "b").iterdir()]
    images.sort(key=lambda image: image.ImagePositionPatient[2])
    mask = lesion(positions(PET_SHAPE, PET_SPACING, PET_ORIGIN))
    write_seg(trial.input / "p" / "SEG1", images, mask, "Lesion", "SEG", "20210305")
    trial.convert()
    np.testing.assert_array_equal(trial.voxels(f"labelsTr/{trial.case('p')}"), mask)
    assert "1 SEG drawn on the PET" in trial.report(trial.case("p"))["used"]


def test_older_versions_of_contours_are_left_out(tmp_path):
    pet = write_pet(tmp_path / "pet")[0]
    write_rtstruct(tmp_path / "old", pet, {"GTV": LESION}, StructureSetDate="20210401")
    write_rtstruct(tmp_path / "new", pet, {"GTV": LESION, "GTV2": LESION}, StructureSetDate="20210501")
    write_rtstruct(tmp_path / "more", pet, {"spleen": LESION}, StructureSetDate="20210301")
    assert contours_of(tmp_path) == (
        ["new", "more"],
        "2 RTSTRUCT drawn on the PET, united, the newest first: 'RTstruct', 'RTstruct'; "
        "left: 1 older with the same ROI names",
    )


def test_what_is_united_is_told(trial):
    write_patient(trial.input / "p", "p", rois={"GTV": LESION})
    pet = next((trial.input / "p" / "b").iterdir())
    tags = {"SeriesDescription": "Nachtrag Muster", "StructureSetDate": "20210601"}
    write_rtstruct(trial.input / "p" / "d" / "RS2", pet, {"GTV 2": LESION}, **tags)
    output = trial.convert()
    assert "united, the newest first: 'Nachtrag', 'RTstruct'; take away what is an older version" in output


def write_seg(file: Path, images: list, mask: np.ndarray, label: str, description: str, date: str) -> None:
    """A SEG of one segment by highdicom on the slices of a series."""
    code = pydicom.sr.codedict.codes.SCT
    segment = highdicom.seg.SegmentDescription(
        1, label, code.MorphologicallyAbnormalStructure, code.Lesion, highdicom.seg.SegmentAlgorithmTypeValues.MANUAL
    )
    seg = highdicom.seg.Segmentation(
        images, mask, "BINARY", [segment], pydicom.uid.generate_uid(), 9, pydicom.uid.generate_uid(), 1, "maker",
        "model", "1", "serial", series_description=description,
    )  # fmt: skip
    seg.ContentDate = date
    seg.save_as(file)


def test_older_versions_of_seg_are_left_out(tmp_path):
    empty = dict.fromkeys(("AccessionNumber", "StudyID", "ReferringPhysicianName", "PositionReferenceIndicator"), "")
    images = [pydicom.dcmread(file) for file in write_pet(tmp_path / "pet", **empty)]
    mask = lesion(positions(PET_SHAPE, PET_SPACING, PET_ORIGIN))
    for name, label, description, date in (
        ("old", "Lesion", "reader A", "20210401"), ("new", "Lesion", "reader A", "20210501"),
        ("b", "Lesion", "reader B", "20210301"), ("more", "Liver lesion", "reader A", "20210201"),
    ):  # fmt: skip
        write_seg(tmp_path / name, images, mask, label, description, date)
    assert contours_of(tmp_path) == (
        ["new", "b", "more"],
        "3 SEG drawn on the PET, united, the newest first: 'reader A', 'reader B', 'reader A'; "
        "left: 1 older with the same ROI names",
    )


# ---- whose they are


def visits_of(*folders: Path) -> tuple[list[Visit], list[str]]:
    visits, _, messages = find_visits(folders, progress=False)
    return visits, messages


def pet_only(folder: Path, patient: str, date: str = "20210304", study: str = "1", **tags) -> None:
    write_pet(folder, patient=patient, date=date, study=study, shape=(6, 18, 24), **tags)


@pytest.mark.parametrize("dummy", ["", "ANONYMOUS", "Anonym", "anonymized^", "0000", "unknown", "XXXX"])
def test_dummy_numbers_fall_back_on_folders(tmp_path, dummy):
    for folder, study in (("Muster", "1"), ("Muster", "2"), ("Schmidt", "3")):
        pet_only(tmp_path / "DICOM" / folder / f"PET{study}", dummy, study=study, date=f"2021030{study}")
    visits, messages = visits_of(tmp_path)
    assert sorted((v.patient, v.timepoint) for v in visits) == [
        ("Muster", "20210301"), ("Muster", "20210302"), ("Schmidt", "20210303")]  # fmt: skip
    assert messages == [
        "3 studies have an empty PatientID or the same dummy as others: 2 folders are taken for patients"
    ]


def test_numbers_that_begin_like_a_dummy_are_patients(tmp_path):
    for number, date in ((12, "20200101"), (12, "20210101"), (13, "20210301")):
        pet_only(tmp_path / f"study{date}", f"ANONYM_{number:04d}", date)
    visits, messages = visits_of(tmp_path)
    assert sorted(v.patient for v in visits) == ["ANONYM_0012", "ANONYM_0012", "ANONYM_0013"] and not messages


def test_dummy_numbers_without_folders_fall_back_on_studies(tmp_path):
    pet_only(tmp_path, "anon", study="1", names="a{}")
    pet_only(tmp_path, "anon", study="2", names="b{}")
    visits, messages = visits_of(tmp_path)
    assert len({v.patient for v in visits}) == 2 and "each is a patient" in messages[0]


def test_one_number_for_different_people_is_a_dummy_or_refused(tmp_path):
    pet_only(tmp_path / "a", "Z", study="1", PatientBirthDate="19500101")
    pet_only(tmp_path / "b", "Z", study="2", PatientBirthDate="19600101")
    assert {v.patient for v in visits_of(tmp_path)[0]} == {"a", "b"}
    pet_only(tmp_path / "c", "Y", study="3")
    visits = {v.patient: v for v in visits_of(tmp_path)[0]}
    assert not visits["Y"].problem and "different sex, birth date or age" in visits["Z"].problem


@pytest.mark.parametrize(
    ("one", "other", "different"),
    [
        ({"PatientAge": "056Y"}, {"PatientAge": "031Y"}, True),
        ({"PatientAge": "056Y"}, {"PatientAge": "058Y", "date": "20230301"}, False),  # a follow-up
        ({"PatientAge": "056Y"}, {"PatientAge": "056Y", "date": "20250301"}, True),
        ({"InstitutionName": "Klinik Köln"}, {"InstitutionName": "UK Bonn"}, True),
        ({"InstitutionName": "Klinik Köln"}, {"InstitutionName": "KLINIK KÖLN "}, False),
        ({"InstitutionName": "Köln", "PatientAge": "056Y"}, {"InstitutionName": "Bonn", "PatientAge": "056Y"}, False),
        ({"InstitutionName": "Köln", "ClinicalTrialSubjectID": "HD18-7"},
         {"InstitutionName": "Bonn", "ClinicalTrialSubjectID": "HD18-7"}, False),
        ({"PatientAge": "056Y", "date": "19000101"}, {"PatientAge": "061Y", "date": "19000101"}, False),  # no dates
    ],
)  # fmt: skip
def test_the_same_number_at_two_centres(tmp_path, one, other, different):
    nothing = {"PatientBirthDate": None, "PatientAge": None, "SpecificCharacterSet": "ISO_IR 192"}
    pet_only(tmp_path / "a", "0012", study="1", **nothing | one)
    pet_only(tmp_path / "b", "0012", study="2", **nothing | other)
    pet_only(tmp_path / "c", "0013", study="3")
    visits = [visit for visit in visits_of(tmp_path)[0] if visit.patient != "0013"]
    assert [("institutions" in visit.problem) for visit in visits] == [different] * 2


def test_number_in_the_trial_is_for_all_series_of_a_patient(tmp_path):
    pet_only(tmp_path / "pet", "hospital-7", ClinicalTrialSubjectID="HD18-0044")
    write_ct(tmp_path / "ct", patient="hospital-7", shape=(9, 36, 40))
    (visit,), _ = visits_of(tmp_path)
    assert (visit.patient, visit.trial) == ("HD18-0044", "HD18")
    assert {one.modality for one in visit.series} == {"CT", "PT"}
    assert {"HD18-0044", "hospital-7"} <= set(visit.numbers)


@pytest.mark.parametrize(
    ("where", "tags", "found"),
    [
        ("x", {"ClinicalTrialProtocolName": "GHSG HD-17"}, "HD17"),
        ("HD16", {"StudyDescription": "PET HD 18"}, "HD18"),
        ("GHSG_HD16/p", {}, "HD16"),
        ("HD16_0007", {}, "HD16"),
        ("x", {"StudyDescription": "PET HD 18F-FDG"}, ""),
        ("HD16 or HD17", {}, ""),
    ],
)
def test_trial_by_tags_description_and_folder(tmp_path, where, tags, found):
    pet_only(tmp_path / where, "p", **tags)
    (visit,), _ = visits_of(tmp_path)
    assert visit.trial == found


@pytest.mark.parametrize("text", ["HD18", "hd 18", "ghsg-HD18-study", "x_HD18_7"])
def test_trial_in_texts(text):
    assert trial_in(text) == "HD18"


def test_baseline_is_the_earliest_with_a_usable_pet(tmp_path):
    pet_only(tmp_path / "0", "p", "20200101", CorrectedImage=["DECY"])
    pet_only(tmp_path / "1", "p", "20210601")
    pet_only(tmp_path / "2", "p", "20210301")
    visits, _ = visits_of(tmp_path)
    assert [v.timepoint for v in select(visits, 1)[0]] == ["20210301"]
    assert [v.timepoint for v in select(visits, 2)[0]] == ["20210601"]
    assert [v.timepoint for v in select(visits, ALL)[0]] == ["20210301", "20210601"]
    assert select(visits, 3) == ([], ["2 PET studies at other time points are left out (--timepoint)",
                                      "1 patients have no time point 3 and are left out",
                                      "1 studies that cannot be used are left out, their patients have others",
                                      ])  # fmt: skip


def test_a_baseline_that_cannot_be_used_is_told(tmp_path):
    pet_only(tmp_path / "0", "p", "20200101", CorrectedImage=["DECY"])
    pet_only(tmp_path / "1", "p", "20210301")
    (chosen,), messages = select(visits_of(tmp_path)[0], 1)
    assert "another study of the patient cannot be used: no usable PET series: 'PET WB AC' (not att" in chosen.why
    assert messages == ["1 studies that cannot be used are left out, their patients have others"]


def test_one_patient_as_dicom_and_as_nifti(tmp_path):
    pet_only(tmp_path / "a" / "x", "12")
    write_nifti_case(tmp_path / "b" / "12")
    visits, _ = visits_of(tmp_path / "a", tmp_path / "b")
    (chosen,), _ = select(visits, 1)
    assert "some as DICOM and some as NIfTI" in chosen.problem
    assert len(select(visits, ALL)[0]) == 2


def test_folders_of_training_and_test_cases_are_no_patients(tmp_path):
    for name in ("train/0001", "train/0002", "test/0003"):
        write_nifti_case(tmp_path / name)
    assert sorted(v.patient for v in select(visits_of(tmp_path)[0], 1)[0]) == ["0001", "0002", "0003"]


def test_two_studies_on_one_day_and_none_dated(tmp_path):
    pet_only(tmp_path / "a" / "1", "p", study="1", AcquisitionTime="150000")
    pet_only(tmp_path / "a" / "2", "p", study="2", AcquisitionTime="090000")
    visits, _ = visits_of(tmp_path / "a")
    assert [(v.timepoint, Path(v.source).name) for v in select(visits, ALL)[0]] == [
        ("20210304", "2"),
        ("20210304b", "1"),
    ]
    pet_only(tmp_path / "b" / "1", "p", study="1")
    pet_only(tmp_path / "b" / "2", "p", study="2", StudyDate=None)
    (chosen,), _ = select(visits_of(tmp_path / "b")[0], 1)
    assert "without StudyDate" in chosen.problem


def test_several_inputs_and_links(tmp_path):
    pet_only(tmp_path / "site1" / "p", "p1")
    pet_only(tmp_path / "site2" / "p", "p2")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "site2")
    write_nifti_case(tmp_path / "site2" / "q")
    visits, _ = visits_of(tmp_path / "site1", tmp_path / "in")
    assert {v.patient for v in visits} == {"p1", "p2", "link"}
    assert not any(v.problem for v in visits)


def test_the_same_nifti_patient_in_two_folders_is_refused(tmp_path):
    for site in ("site1", "site2"):
        write_nifti_case(tmp_path / site / "0012")
    visits, _ = visits_of(tmp_path / "site1", tmp_path / "site2")
    assert len(visits) == 2 and all("two folders" in v.problem for v in visits)


# ---- what is known of them


def table(tmp_path: Path, text: str, *columns: str):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    return read_patients(tmp_path / "t.csv", parse_columns(list(columns)))


def visit(patient: str, trial: str = "", *others: str) -> Visit:
    return Visit(trial, patient, "", "", numbers=(patient, *others))


def test_rows_are_found_by_any_number_and_trial(tmp_path):
    rows = table(tmp_path, "PatNr;Studie;Stadium\n0012;HD16;IIB\n12;HD18;4\n33;;early\n", "case_id=PatNr",
                 "trial=Studie", "stage=Stadium")  # fmt: skip
    assert rows.find(visit("12", "HD16"), "G_0001").stage == "II"
    assert rows.find(visit("KIS-99", "HD18", "012"), "G_0001").stage == "IV"
    assert rows.find(visit("33", "HD17"), "G_0001").stage == "early"
    assert rows.find(visit("12", "HD17"), "G_0001") is None
    assert rows.with_trial(visit("12")).trial == ""
    one = table(tmp_path, "case_id,trial\n7,HD17\n")
    assert one.with_trial(visit("07")).trial == "HD17"


@pytest.mark.parametrize(
    ("text", "columns", "words"),
    [
        ("PatNr,stage\n1,II\n", [], "line 1: column 'case_id'"),
        ("PatNr,stage\n1,II\n", ["case_id=Nr"], "line 1: column 'Nr' is not there"),
        ("case_id,stage,stage\n1,II,I\n", [], "line 1: column 'stage' is there twice"),
        ("case_id,stage\nErika,II\nErika,I\n", [], "line 3: case_id: is there twice"),
        ("case_id,stage\nErika,Stadium Erika\n", [], "line 2: stage"),
        ("case_id,age\nErika,1964-11-22\n", [], "line 2: age"),
        ("case_id,stage\n1,II\n2,Erika\n3,Erika\n", [], "line 3: stage"),  # most: another column
    ],
)
def test_bad_tables_are_named_without_their_cells(tmp_path, text, columns, words):
    with pytest.raises(UserError, match=words) as error:
        table(tmp_path, text, *columns)
    assert "Erika" not in str(error.value) and "1964" not in str(error.value)


def test_one_odd_cell_is_left_empty_and_told(trial, tmp_path):
    rows = table(tmp_path, "case_id,stage,age,sex\n1,IIB/E,34,F\n2,Erika,1964-11-22,F\n3,IV,51,x\n4,,,\n")
    assert [(r.stage, r.age, r.sex) for r in rows.records.values()] == [
        ("II", 34, "F"), (None, None, "F"), ("IV", 51, None), (None, None, None)]  # fmt: skip
    write_patient(trial.input / "2", "2", rois={})
    output = trial.convert("--clinical", tmp_path / "t.csv")
    assert all(f"t.csv, line {words}" in output for words in ("3: stage", "3: age", "4: sex"))
    assert "left empty" in output and "Erika" not in output and "1964" not in output


@pytest.mark.parametrize(
    ("tags", "tracer", "age"),
    [
        ({}, "18F-FDG", 56),
        ({"Radiopharmaceutical": "x", "RadiopharmaceuticalCodeSequence": ("C-B1031", "SRT", "x")}, "18F-FDG", 56),
        ({"Radiopharmaceutical": "F18", "RadiopharmaceuticalCodeSequence": ("35321007", "SCT", "")}, "18F-FDG", 56),
        ({"RadiopharmaceuticalCodeSequence": ("126758", "DCM", "PSMA-1007 F^18^")}, "18F-PSMA", 56),
        ({"Radiopharmaceutical": "for Erika", "PatientAge": None}, None, 56),
        ({"PatientAge": "", "PatientBirthDate": "19640305"}, "18F-FDG", 56),
        ({"PatientAge": "018M"}, "18F-FDG", 1.5),
        ({"PatientAge": "999Y", "PatientBirthDate": None}, "18F-FDG", None),
    ],
)  # fmt: skip
def test_headers_fill_what_the_table_leaves_open(tmp_path, tags, tracer, age):
    pet_only(tmp_path, "p", **tags)
    (found,), _ = visits_of(tmp_path)
    record = record_of("G_0001", found, None, "Hodgkin lymphoma")
    assert (record.case_id, record.tracer, record.age, record.sex) == ("G_0001", tracer, age, "F")
    assert record.diagnosis == "Hodgkin lymphoma"


def test_names_in_a_table_are_not_passed_on(tmp_path):
    pet_only(tmp_path / "Kettler_J", "4711")
    (found,), _ = visits_of(tmp_path)
    row = table(tmp_path, "case_id,diagnosis\n4711,NS Hodgkin (Frau Muster; 4711)\n").find(found, "G_0001")
    assert record_of("G_0001", found, row, "Hodgkin lymphoma").diagnosis == "NS Hodgkin"


CASES = {"G_0001": visit("0012", "HD16"), "G_0002": visit("12", "HD18"), "G_0003": visit("12", "HD18"),
         "G_0004": visit("Muster", "", "PID9")}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HD18 12\n", {"G_0002", "G_0003"}),
        ("hd-16, 012 # comment\n\n", {"G_0001"}),
        ("g_0002\npid9\n", {"G_0002", "G_0003", "G_0004"}),
        ("MUSTER\r\n", {"G_0004"}),
    ],
)
def test_test_list(tmp_path, text, expected):
    (tmp_path / "test.txt").write_text(text, encoding="utf-8")
    assert read_test_list(tmp_path / "test.txt", CASES) == expected


@pytest.mark.parametrize(("text", "words"), [("Muster\nErika\n", "line 2: is no patient"), ("12\n", "several trials")])
def test_bad_test_lists_are_refused_without_their_content(tmp_path, text, words):
    (tmp_path / "test.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as error:
        read_test_list(tmp_path / "test.txt", CASES)
    assert "Erika" not in str(error.value)


def test_an_unknown_roi_waits_and_is_listed(trial):
    """Even beside a lesion: a label without it would be wrong. What the user says goes."""
    write_patient(trial.input / "p", "p", rois={"Lesion": LESION, "boost": LESION, "Urinary bladder": LESION})
    output = trial.convert(fails=True)
    assert "ROI 2 '…': not known whether this is a lesion" in output and "--lesion-roi" in output
    folder = trial.raw / ".partial_Dataset522_GHSG"
    with (folder / "conversion_report.csv").open(encoding="utf-8") as file:
        assert [row["code"] for row in csv.DictReader(file)] == ["ROI_UNKNOWN"]
    with (folder / "conversion_rois.csv").open(encoding="utf-8") as file:
        rows = [(row["number"], row["name"], row["note"]) for row in csv.DictReader(file)]
    assert [row[:2] for row in rows] == [("1", "Lesion"), ("2", "…"), ("3", "Urinary bladder")]
    assert rows[1][2] == "unknown"
    trial.convert("--lesion-roi", "lesion|boost")
    assert [row["kept"] for row in trial.table("conversion_rois")] == ["True", "True", "False"]


def test_the_diagnosis_is_unknown_unless_the_trial_says_it(trial):
    psma = {"Radiopharmaceutical": "Piflufolastat F 18"}
    write_patient(trial.input / "1", "1", PatientSex="M", **psma)
    write_patient(trial.input / "2", "2")
    write_patient(trial.input / "3", "3", ClinicalTrialProtocolID="HD17")
    write_patient(trial.input / "4", "4", ClinicalTrialProtocolID="HD18", **psma)
    output = trial.convert()
    rows = {row["case_id"]: (row["tracer"], row["diagnosis"]) for row in trial.table("clinical")}
    who = {row["patient"]: rows[row["case_id"]] for row in trial.table("keys")}
    assert who == {"1": ("18F-PSMA", ""), "2": ("18F-FDG", ""), "3": ("18F-FDG", "Hodgkin lymphoma"),
                   "4": ("18F-PSMA", "")}  # fmt: skip
    assert "diagnosis of 3 cases" in output and "--diagnosis" in output


# ---- real data


@pytest.mark.skipif(not (SHARED / "sts_dicom").is_dir(), reason="no shared data")
def test_real_patients_match_ibsi(trial):
    """Two sarcoma patients: SUV, lesions and grid are those of IBSI's NIfTI files."""
    for patient in ("STS_003", "STS_019"):
        (trial.input / patient).symlink_to(SHARED / "sts_dicom" / patient)
    trial.convert("--lesion-roi", "GTV_Mass", "--diagnosis", "soft tissue sarcoma")
    for patient in ("STS_003", "STS_019"):
        case, reference = trial.case(patient), SHARED / "sts_petct" / patient
        suv = sitk.DICOMOrient(sitk.ReadImage(str(reference / "SUV.nii.gz")), "LPS")
        seg = sitk.DICOMOrient(sitk.ReadImage(str(reference / "SEG.nii.gz")), "LPS")
        image = sitk.ReadImage(str(trial.dataset / f"imagesTr/{case}_0001.nii.gz"))
        assert np.abs(np.subtract(image.GetOrigin(), suv.GetOrigin())).max() < 0.01
        np.testing.assert_allclose(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(suv), atol=1e-3)
        np.testing.assert_array_equal(trial.voxels(f"labelsTr/{case}"), sitk.GetArrayFromImage(seg) > 0)
