"""fratmae_convert_autopet: both layouts become a dataset with clinical data and splits that keep patients apart."""

import csv
import json
import pickle
import re
import shutil
from functools import partial

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from nnUNet_raw_conversion.autopet import find_scans, load_scan, main
from nnUNet_raw_conversion.clinical import read_clinical
from nnUNet_raw_conversion.splits import make_splits, shared_patients
from tests.test_convert_pairs import edit, study

# patient, study folder, what TCIA's table says: UID, date, diagnosis, age, sex
FDG = [
    ("0011f3deaf", "03-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-10445", "MELANOMA", "060Y", "F"),
    ("0011f3deaf", "01-14-2004-NA-PET-CT Ganzkoerper nativ-88001", "NEGATIVE", "061Y", "F"),
    ("01140d52d8", "08-13-2005-NA-Unspecified CT ABDOMEN-56839", "LUNG_CANCER", "071Y", "M"),
]
PSMA = [("01f3a29b7df127d2", "2018-11-30", "18F", "70"), ("01f3a29b7df127d2", "2019-01-15", "68Ga", "71")]
EXPECTED = {
    "fdg_0011f3deaf_1": ("18F-FDG", "melanoma", 60.0, "F"),
    "fdg_0011f3deaf_2": ("18F-FDG", "negative control", 61.0, "F"),
    "fdg_01140d52d8_1": ("18F-FDG", "lung cancer", 71.0, "M"),
    "psma_01f3a29b7df127d2_1": ("18F-PSMA", "prostate cancer", 70.0, "M"),
    "psma_01f3a29b7df127d2_2": ("68Ga-PSMA", "prostate cancer", 71.0, "M"),
}
RELEASE_NAME = {
    "fdg_0011f3deaf_1": f"fdg_{FDG[0][0]}_{FDG[0][1]}",
    "fdg_0011f3deaf_2": f"fdg_{FDG[1][0]}_{FDG[1][1]}",
    "fdg_01140d52d8_1": f"fdg_{FDG[2][0]}_{FDG[2][1]}",
    "psma_01f3a29b7df127d2_1": f"psma_{PSMA[0][0]}_{PSMA[0][1]}",
    "psma_01f3a29b7df127d2_2": f"psma_{PSMA[1][0]}_{PSMA[1][1]}",
}
SECRETS = re.compile(  # of the studies' names and UIDs; a hash that happens to hold 2003 is none
    r"(?<![0-9a-f])20(03|04|05|18|19)(?=\d{4}|\b)|Ganzkoerper|ABDOMEN|\b(10445|88001|56839)\b|PETCT_", re.IGNORECASE
)


def flipped_study(seed):
    """As in autoPET, the y axis runs from back to front."""
    images = study(seed)
    return {name: sitk.Flip(image, [False, True, False]) for name, image in images.items()}


def write_table(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def fdg_table(path):
    """A row a DICOM series, with columns that nobody needs, as TCIA has it."""
    header = ["Series UID", "Collection", "Subject ID", "Study UID", "Study Description", "Study Date", "Modality",
              "File Location", "diagnosis", "age", "sex"]  # fmt: skip
    rows = []
    for patient, folder, diagnosis, age, sex in FDG:
        date = "/".join(part.lstrip("0") for part in folder.split("-")[:3])
        for number, modality in enumerate(("CT", "PT", "SEG")):
            place = f"./FDG-PET-CT-Lesions/PETCT_{patient}/{folder.replace('  ', ' ')}/{number}.000000-x-1"
            rows.append([f"1.2.{number}", "FDG-PET-CT-Lesions", f"PETCT_{patient}", f"1.3.6.1.4{folder[-5:]}",
                         "PET, CT", date, modality, place, diagnosis, age, sex])  # fmt: skip
    write_table(path, header, rows)


def psma_table(path):
    header = ["Subject ID", "Study Date", "age", "manufacturer_model_name", "pet_radionuclide", "ct_contrast_agent"]
    write_table(path, header, [[f"PSMA_{p}", date, age, "Biograph 64", n, "yes"] for p, date, n, age in PSMA])


@pytest.fixture
def release(tmp_path):
    """The layout of autoPET III, with the splits of the release."""
    folder = tmp_path / "in" / "psma-fdg-pet-ct-lesions"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for seed, name in enumerate(RELEASE_NAME.values()):
        images = flipped_study(seed)
        sitk.WriteImage(images["CT"], folder / "imagesTr" / f"{name}_0000.nii.gz")
        sitk.WriteImage(images["PET"], folder / "imagesTr" / f"{name}_0001.nii.gz")
        sitk.WriteImage(images["SEG"], folder / "labelsTr" / f"{name}.nii.gz")
    (folder / "imagesTr" / "._fdg_0.nii.gz").touch()  # of a Mac
    fdg_table(folder / "fdg_metadata.csv")
    psma_table(folder / "psma_metadata.csv")
    write_release_splits(folder, ["fdg_01140d52d8_1"])
    return folder


@pytest.fixture
def older(tmp_path):
    """The layout of autoPET I and II; the table lies beside the folder of the patients."""
    for seed, (patient, folder, *_) in enumerate(FDG):
        place = tmp_path / "in" / "FDG-PET-CT-Lesions" / f"PETCT_{patient}" / folder
        place.mkdir(parents=True)
        for name, image in zip(("CTres", "SUV", "SEG"), flipped_study(seed).values(), strict=True):
            sitk.WriteImage(image, place / f"{name}.nii.gz")
        shutil.copy(place / "SUV.nii.gz", place / "PET.nii.gz")
    fdg_table(tmp_path / "in" / "Clinical Metadata FDG PET_CT Lesions.csv")
    return tmp_path / "in"


def write_release_splits(folder, *held_out):
    names = list(RELEASE_NAME)
    folds = [{"train": [n for n in names if n not in val], "val": list(val)} for val in held_out]
    folds = [{side: [RELEASE_NAME[n] for n in fold[side]] for side in fold} for fold in folds]
    (folder / "splits_final.json").write_text(json.dumps([*folds, folds[0]]), encoding="utf-8")


@pytest.fixture
def convert(monkeypatch):
    def call(source, *more, np=1):
        command = ["fratmae_convert_autopet", "-i", str(source), "-d", "21", "-np", str(np), *more]
        monkeypatch.setattr("sys.argv", command)
        main()

    return call


def refused(convert, raw, *call, **options):
    """The message of a call that must end before the first image and leave nothing behind."""
    with pytest.raises(SystemExit) as stop:
        convert(*call, **options)
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    assert not list(raw.rglob("*.nii.gz"))
    return stop.value.code


def failed(convert, *call):
    with pytest.raises(SystemExit) as stop:
        convert(*call)
    return stop.value.code


def known(dataset):
    return {case: (r.tracer, r.diagnosis, r.age, r.sex) for case, r in read_clinical(dataset / "clinical.csv").items()}


def splits_of(dataset):
    return json.loads((dataset / "splits_final.json").read_text(encoding="utf-8"))


def assert_no_secrets(dataset, printed):
    """Dates, descriptions and UIDs of the folder names are in no output: names, texts, or the terminal."""
    files = [p for p in dataset.rglob("*") if p.is_file()]
    texts = [p.read_text(encoding="utf-8") for p in files if p.suffix in (".csv", ".json", ".html")]
    for text in (printed.replace(str(dataset.parents[1]), ""), *(str(p.relative_to(dataset)) for p in files), *texts):
        assert not SECRETS.search(text), text


def test_the_release(convert, release, raw, capfd):
    convert(release)
    dataset = raw / "Dataset021_AutoPET"
    assert known(dataset) == EXPECTED
    images = {f"{case}_000{i}.nii.gz" for case in EXPECTED for i in (0, 1)}
    assert {p.name for p in (dataset / "imagesTr").iterdir()} == images
    assert {p.name for p in (dataset / "labelsTr").iterdir()} == {f"{case}.nii.gz" for case in EXPECTED}
    printed = "".join(capfd.readouterr())
    assert "tracer of 5, diagnosis of 5, age of 5, sex of 5" in printed
    assert "fratmae_plan_and_preprocess -d 21" in printed
    assert_no_secrets(dataset, printed)


def test_images_keep_their_place_and_the_release_its_splits(convert, release, raw, capfd):
    convert(release.parent)  # the folder that the archive was unpacked in serves as well
    dataset = raw / "Dataset021_AutoPET"
    for case, name in (("fdg_0011f3deaf_2", "imagesTr/{}_0001"), ("psma_01f3a29b7df127d2_1", "labelsTr/{}")):
        before = sitk.ReadImage(release / f"{name.format(RELEASE_NAME[case])}.nii.gz")
        after = sitk.ReadImage(dataset / f"{name.format(case)}.nii.gz")
        assert before.GetDirection()[4] == -1
        np.testing.assert_allclose(after.GetDirection(), np.eye(3).ravel(), atol=1e-6)
        there = sitk.Resample(before, after, sitk.Transform(), sitk.sitkNearestNeighbor)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(there), sitk.GetArrayFromImage(after))
    first = splits_of(dataset)[0]
    assert first["val"] == ["fdg_01140d52d8_1"]
    assert sorted(first["train"]) == sorted(set(EXPECTED) - {"fdg_01140d52d8_1"})
    assert "the release's" in capfd.readouterr().out


def test_splits_with_a_patient_on_both_sides_are_made_anew(convert, release, raw, capfd):
    write_release_splits(release, ["fdg_0011f3deaf_1"], ["fdg_01140d52d8_1"])
    convert(release)
    splits = splits_of(raw / "Dataset021_AutoPET")
    assert not shared_patients(splits, {case: case.split("_")[1] for case in EXPECTED})
    assert sorted(case for fold in splits for case in fold["val"]) == sorted(EXPECTED)
    assert len(splits) == 3  # patients
    assert "1 patients in training and in validation" in capfd.readouterr().err


def test_the_older_layout(convert, older, raw, capfd):
    convert(older, "-n", "FDG")
    dataset = raw / "Dataset021_FDG"
    assert known(dataset) == {case: row for case, row in EXPECTED.items() if case.startswith("fdg")}
    pet = sitk.GetArrayFromImage(sitk.ReadImage(dataset / "imagesTr" / "fdg_01140d52d8_1_0001.nii.gz"))
    np.testing.assert_array_equal(pet, sitk.GetArrayFromImage(study(2)["PET"]))
    splits = splits_of(dataset)
    assert [fold["val"] for fold in splits] in (
        [["fdg_0011f3deaf_1", "fdg_0011f3deaf_2"], ["fdg_01140d52d8_1"]],
        [["fdg_01140d52d8_1"], ["fdg_0011f3deaf_1", "fdg_0011f3deaf_2"]],
    )
    assert_no_secrets(dataset, "".join(capfd.readouterr()))


def test_a_table_elsewhere_is_named_and_without_any_the_tracer_is_known(convert, older, raw, capfd):
    shutil.move(older / "Clinical Metadata FDG PET_CT Lesions.csv", older.parent / "t.csv")
    convert(older / "FDG-PET-CT-Lesions")
    assert set(known(raw / "Dataset021_AutoPET").values()) == {("18F-FDG", None, None, None)}
    assert "--metadata" in capfd.readouterr().err
    shutil.rmtree(raw)
    convert(older, "--metadata", str(older.parent / "t.csv"))
    assert known(raw / "Dataset021_AutoPET")["fdg_0011f3deaf_2"] == EXPECTED["fdg_0011f3deaf_2"]
    assert "more.csv: there is no such file" in failed(convert, older, "--metadata", "more.csv")


def test_other_names_of_columns_and_a_study_that_the_table_does_not_have(convert, release, raw):
    """A row about another study tells the sex; a table that does not tell studies has one row a patient."""
    (release / "psma_metadata.csv").unlink()
    rows = [[PSMA[0][0].upper(), "F18-PSMA-1007", "61,5"]]
    write_table(release / "PSMA_metadata_v2.csv", ["PatientID", "Radiopharmaceutical", "Patient age"], rows)
    rows = [["PETCT_0011f3deaf", "1/14/2004", "61", "w"], ["petct_0011f3deaf", "2/2/2006", "63", "f"]]
    write_table(release / "fdg_metadata.csv", ["subject id", "study date", "AGE", "SEX"], rows)
    write_table(release / "metadata.csv", ["Series UID", "Subject ID"], [["1.2", "PETCT_0011f3deaf"]])  # of NBIA
    convert(release)
    assert known(raw / "Dataset021_AutoPET") == {
        "fdg_0011f3deaf_1": ("18F-FDG", None, None, "F"),
        "fdg_0011f3deaf_2": ("18F-FDG", None, 61.0, "F"),
        "fdg_01140d52d8_1": ("18F-FDG", None, None, None),
        "psma_01f3a29b7df127d2_1": ("18F-PSMA", "prostate cancer", 61.5, "M"),
        "psma_01f3a29b7df127d2_2": ("18F-PSMA", "prostate cancer", 61.5, "M"),
    }


def test_a_case_that_lacks_a_file_is_told_and_the_others_are_converted(convert, release, raw, capfd):
    pet = release / "imagesTr" / f"{RELEASE_NAME['psma_01f3a29b7df127d2_1']}_0001.nii.gz"
    pet.rename(release / "kept")
    edit(release / "labelsTr" / f"{RELEASE_NAME['fdg_01140d52d8_1']}.nii.gz", lambda a: a * 7)
    assert failed(convert, release) == 1
    out, message = capfd.readouterr()
    assert "2 of 5 cases failed (fdg_01140d52d8_1, psma_01f3a29b7df127d2_1)" in message
    dataset = raw / "Dataset021_AutoPET"
    assert len(list((dataset / "labelsTr").iterdir())) == 3
    assert set(known(dataset)) == {"fdg_0011f3deaf_1", "fdg_0011f3deaf_2", "psma_01f3a29b7df127d2_2"}
    assert {case for fold in splits_of(dataset) for case in fold["train"] + fold["val"]} == set(known(dataset))
    report = (dataset / "conversion_report.csv").read_text(encoding="utf-8")
    assert "PET: there is no such file" in report
    assert "value 7" in report
    assert_no_secrets(dataset, out + message)

    (release / "kept").rename(pet)
    edit(release / "labelsTr" / f"{RELEASE_NAME['fdg_01140d52d8_1']}.nii.gz", lambda a: a // 7)
    convert(release)
    assert known(dataset) == EXPECTED
    assert splits_of(dataset)[0]["val"] == ["fdg_01140d52d8_1"]


def change_table(path, change):
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    write_table(path, *change(header, rows))


def without(column):
    def change(header, rows):
        index = header.index(column)
        header, *rows = ([*cells[:index], *cells[index + 1 :]] for cells in (header, *rows))
        return header, rows

    return change


BAD_TABLES = {
    "no subject": ("psma_metadata.csv", without("Subject ID"), "no column 'Subject ID'"),
    "another table": ("fdg_metadata.csv", lambda h, r: (["Subject ID"], [["PETCT_1"]]), "age, sex, diagnosis"),
    "doubled study": ("psma_metadata.csv", lambda h, r: (h, [*r, [*r[0][:2], "75", *r[0][3:]]]), "lines 2 and 4: age"),
    "doubled series": ("fdg_metadata.csv", lambda h, r: (h, [*r, [*r[0][:-1], "M"]]), "sex differs for the same study"),
    "doubled patient": ("psma_metadata.csv", without("Study Date"), "lines 2 and 3: radionuclide"),
    "bad age": ("psma_metadata.csv", lambda h, r: (h, [r[0], [*r[1][:2], "1948-03-04", *r[1][3:]]]), "line 3: age"),
    "bad sex": ("fdg_metadata.csv", lambda h, r: (h, [[*r[0][:-1], "both"]]), "line 2: sex"),
    "empty": ("fdg_metadata.csv", lambda h, r: ([], []), "no column 'Subject ID'"),
}


@pytest.mark.parametrize(("name", "change", "named"), BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_a_bad_table_stops_before_the_images(convert, release, raw, name, change, named):
    change_table(release / name, change)
    message = refused(convert, raw, release)
    assert name in message
    assert named in message
    assert not SECRETS.search(message.replace(str(release), ""))


@pytest.mark.parametrize("content", ["no json", '{"train": []}', '[{"train": ["a"]}]', '[{"train": [1], "val": []}]'])
def test_bad_splits_stop_before_the_images(convert, release, raw, content):
    (release / "splits_final.json").write_text(content, encoding="utf-8")
    assert "splits_final.json: is no list of folds" in refused(convert, raw, release)


def test_unknown_layouts(convert, release, older, raw, tmp_path):
    assert "there is no such folder" in refused(convert, raw, tmp_path / "nowhere")
    (tmp_path / "other" / "patient1").mkdir(parents=True)
    assert "neither the autoPET III release" in refused(convert, raw, tmp_path / "other")
    assert "2 folders in it hold such data" in refused(convert, raw, tmp_path / "in")
    for file in (older / "FDG-PET-CT-Lesions").rglob("S*.nii.gz"):
        file.unlink()
    for file in (older / "FDG-PET-CT-Lesions").rglob("CTres.nii.gz"):
        file.rename(file.with_name("1-001.dcm"))
    assert "DICOM" in refused(convert, raw, older / "FDG-PET-CT-Lesions")
    shutil.copy(release / "fdg_metadata.csv", release / "imagesTr" / "case_12.nii.gz")
    assert "1 of 16 files are not named" in refused(convert, raw, release)
    shutil.rmtree(release / "imagesTr")
    shutil.rmtree(release / "labelsTr")
    (release / "imagesTr").mkdir()
    assert "no files named" in refused(convert, raw, release)


def test_loading_can_be_left_to_another_process(release):
    _, scans = find_scans(release)
    load = pickle.loads(pickle.dumps(partial(load_scan, scans[0])))
    assert load().pet.GetSize() == (24, 18, 21)


def test_calls_that_cannot_work(convert, release, raw):
    assert "-np 0" in refused(convert, raw, release, np=0)
    (raw / "Dataset021_Other").mkdir(parents=True)
    assert "taken" in refused(convert, raw, release)


def test_a_patient_gets_an_earlier_study(convert, release, raw):
    """The number of a study in its case id depends on the patient's other studies."""
    first = list(release.rglob(f"{RELEASE_NAME['fdg_0011f3deaf_1']}*"))
    for path in first:
        path.rename(release / path.name)
    convert(release)
    dataset = raw / "Dataset021_AutoPET"
    assert known(dataset)["fdg_0011f3deaf_1"] == EXPECTED["fdg_0011f3deaf_2"]
    untouched = dataset / "imagesTr" / "fdg_01140d52d8_1_0001.nii.gz"
    before = untouched.stat().st_mtime_ns

    for path in first:
        (release / path.name).rename(path)
    convert(release)
    assert known(dataset) == EXPECTED
    for number, seed in ((1, 0), (2, 1)):
        image = sitk.ReadImage(dataset / "imagesTr" / f"fdg_0011f3deaf_{number}_0001.nii.gz")
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(study(seed)["PET"]))
    assert untouched.stat().st_mtime_ns == before

    for path in first:
        path.unlink()
    assert "fdg_0011f3deaf_2" in failed(convert, release)


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("ab")), min_size=1, max_size=60), st.integers(2, 6))
def test_made_splits_keep_patients_apart_and_mixtures_alike(cases, folds):
    patient_of = {f"c{i:02d}": str(patient) for i, (patient, _) in enumerate(cases)}
    stratum_of = {f"c{i:02d}": stratum for i, (_, stratum) in enumerate(cases)}
    splits = make_splits(patient_of, stratum_of, folds)
    patients = set(patient_of.values())
    if len(patients) == 1:
        assert splits == []
        return
    assert len(splits) == min(folds, len(patients))
    assert not shared_patients(splits, patient_of)
    assert sorted(case for fold in splits for case in fold["val"]) == sorted(patient_of)
    assert all(sorted(fold["train"] + fold["val"]) == sorted(patient_of) for fold in splits)
    sizes = [len({patient_of[c] for c in fold["val"]}) for fold in splits]
    assert max(sizes) - min(sizes) <= 1
    first = {patient: min(c for c in patient_of if patient_of[c] == patient) for patient in patients}
    shares = [sum(stratum_of[first[p]] == "a" for p in {patient_of[c] for c in f["val"]}) for f in splits]
    assert max(shares) - min(shares) <= 1
    assert make_splits(dict(reversed(patient_of.items())), stratum_of, folds) == splits
