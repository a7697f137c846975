"""fratmae_convert_pairs: good studies become a dataset nnU-Net accepts; bad ones end in one line and leave nothing."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnUNet_raw_conversion.checks import outline_agreement
from nnUNet_raw_conversion.pairs import main

REAL = Path(__file__).parents[2] / "shared" / "data" / "sts_petct"
SIZE, SPACING = (24, 18, 21), (7.0, 9.0, 6.5)  # x, y, z


def place(size=SIZE, spacing=SPACING):
    """x, y, z of every voxel (arrays z, y, x) in mm from the middle."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(size[::-1], spacing[::-1], strict=True)]
    return np.meshgrid(*axes, indexing="ij")[::-1]


def image(array, spacing=SPACING, shift=(0, 0, 0)):
    result = sitk.GetImageFromArray(array)
    result.SetSpacing(spacing)
    size = np.array(array.shape[::-1])
    result.SetOrigin((np.array(shift) - (size - 1) / 2 * spacing).tolist())
    return result


def body(x, y, z):
    """An oval trunk that leans, so that no flip of it is itself."""
    return ((x - 0.2 * z - 10) / 55) ** 2 + ((y + 8) / 45) ** 2 < 1


def study(seed=0):
    """CT, PET and lesion of one patient as images of one grid."""
    rng = np.random.default_rng(seed)
    x, y, z = place()
    inside = body(x, y, z)
    lesion = inside & ((x - 20) ** 2 + y**2 + z**2 < 15**2)
    ct = np.where(inside, rng.normal(30, 20, x.shape), -1000).round().astype(np.int16)
    pet = (np.where(inside, 0.8, 0.02) + 6 * lesion + rng.exponential(0.05, x.shape)).astype(np.float32)
    return {"CT": image(ct), "PET": image(pet), "SEG": image(lesion.astype(np.uint8))}


def write(folder, images):
    folder.mkdir(parents=True)
    for name, content in images.items():
        sitk.WriteImage(content, folder / f"{name}.nii.gz")


def edit(path, change):
    """Change the array of the image at `path`."""
    old = sitk.ReadImage(path)
    new = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(old)))
    new.CopyInformation(old)
    sitk.WriteImage(new, path)


@pytest.fixture
def source(tmp_path):
    """Two good patients."""
    write(tmp_path / "in" / "pat-1", study(1))
    write(tmp_path / "in" / "pat.2", study(2))
    return tmp_path / "in"


@pytest.fixture
def convert(source, monkeypatch):
    def call(*more, np=1, seg=("--seg", "SEG.nii.gz"), folder=source, keep=("--keep-names",)):
        files = ["--ct", "CT.nii.gz", "--pet", "PET.nii.gz", *seg]
        command = ["fratmae_convert_pairs", "-i", str(folder), "-d", "7", "-n", "Test", *files, "-np", str(np)]
        command += [*keep, *more]
        monkeypatch.setattr("sys.argv", command)
        main()

    return call


def refused(convert, raw, *more, **options):
    """The message of a run that must fail and leave nothing behind."""
    before = sorted(raw.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        convert(*more, **options)
    assert isinstance(stop.value.code, str)  # printed to stderr by Python, exit code 1
    assert sorted(raw.rglob("*")) in (before, [])
    return stop.value.code


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(path))


@pytest.mark.parametrize("processes", [1, 2])
def test_good_studies_become_a_dataset(convert, source, raw, capsys, processes):
    (source / "clinical.csv").write_text("case_id;tracer;age\npat.2;FDG;61\nnobody;FDG;30\n", encoding="utf-8")
    convert(np=processes)
    dataset = raw / "Dataset007_Test"
    files = {str(p.relative_to(dataset)) for p in dataset.rglob("*") if p.is_file()}
    cases = {f"imagesTr/{c}_000{i}.nii.gz" for c in ("pat-1", "pat.2") for i in (0, 1)}
    labels = {f"labelsTr/{c}.nii.gz" for c in ("pat-1", "pat.2")}
    others = {name for name in files if not name.startswith("conversion")}
    assert others == {"dataset.json", "clinical.csv"} | cases | labels
    looks = {f"conversion/{name}" for name in ("index.html", "pat-1.png", "pat.2.png", "pat-1.json", "pat.2.json")}
    assert files >= looks | {"conversion_report.csv"}
    for name, target in (("CT", "imagesTr/pat.2_0000"), ("PET", "imagesTr/pat.2_0001"), ("SEG", "labelsTr/pat.2")):
        np.testing.assert_array_equal(read(dataset / f"{target}.nii.gz"), read(source / "pat.2" / f"{name}.nii.gz"))
    description = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    assert description["numTraining"] == 2
    assert description["fratmae"] == {"modalities": ["CT", "PET"], "units": ["HU", "SUVbw"]}
    assert (dataset / "clinical.csv").read_text(encoding="utf-8").splitlines()[1:] == [
        "pat-1,,,,,",
        "pat.2,18F-FDG,,61,,",
    ]
    assert [p.name for p in raw.iterdir()] == ["Dataset007_Test"]
    out, err = capsys.readouterr()
    assert "2 labelled and 0 unlabelled" in out
    assert "fratmae_plan_and_preprocess -d 7" in out
    assert "warning" in err
    assert "nobody" in err


def test_what_nnunet_says_about_it(convert, raw):
    from nnunetv2.experiment_planning import verify_dataset_integrity as nnunet
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient

    convert()
    dataset = raw / "Dataset007_Test"
    nnunet.verify_dataset_integrity(str(dataset), num_processes=1)
    cts = [str(dataset / "imagesTr" / f"pat-1_000{i}.nii.gz") for i in (0, 1)]
    assert nnunet.check_cases(cts, str(dataset / "labelsTr" / "pat-1.nii.gz"), 2, SimpleITKIOWithReorient)


def test_without_a_table_all_fields_are_empty(convert, raw):
    convert()
    assert (raw / "Dataset007_Test" / "clinical.csv").read_text(encoding="utf-8").splitlines()[1:] == [
        "pat-1,,,,,",
        "pat.2,,,,,",
    ]


def test_unlabelled_cases_are_for_pretraining(convert, source, raw, capsys):
    (source / "pat.2" / "SEG.nii.gz").unlink()
    assert "pat.2: " in refused(convert, raw)
    convert("--unlabelled")
    dataset = raw / "Dataset007_Test"
    assert sorted(p.name for p in (dataset / "imagesPt").iterdir()) == ["pat.2_0000.nii.gz", "pat.2_0001.nii.gz"]
    assert [p.name for p in (dataset / "labelsTr").iterdir()] == ["pat-1.nii.gz"]
    assert "pat.2" in (dataset / "clinical.csv").read_text(encoding="utf-8")
    assert "1 labelled and 1 unlabelled" in capsys.readouterr().out


def test_no_segmentation_at_all_needs_the_flag(convert, raw):
    assert "--unlabelled" in refused(convert, raw, seg=())
    convert("--unlabelled", seg=())
    assert len(list((raw / "Dataset007_Test" / "imagesPt").iterdir())) == 4
    assert json.loads((raw / "Dataset007_Test" / "dataset.json").read_text(encoding="utf-8"))["numTraining"] == 0


def test_a_ct_on_its_own_grid_comes_to_the_pet(convert, source, raw, capsys):
    size, spacing = (61, 50, 33), (3.0, 3.5, 5.0)
    x, y, z = place(size, spacing)
    ct = np.where(body(x, y, z), 40, -1000)
    ct[np.hypot(x, y) > 90] = -3024  # padding outside of the field of view, as GE writes it
    fine = image(ct.astype(np.int16), spacing)
    sitk.WriteImage(fine[:, ::-1, :], source / "pat-1" / "CT.nii.gz")  # stored the other way round, the same in space
    convert()
    dataset = raw / "Dataset007_Test"
    ct, pet = (sitk.ReadImage(dataset / "imagesTr" / f"pat-1_000{i}.nii.gz") for i in (0, 1))
    assert ct.GetSize() == pet.GetSize() == SIZE
    assert ct.GetOrigin() == pet.GetOrigin()
    hu, inside = sitk.GetArrayFromImage(ct), body(*place())
    assert np.mean((hu > -300) == inside) > 0.97
    assert hu.min() == -1024
    out = capsys.readouterr().out
    assert "resampled to the PET's grid: pat-1\n" in out
    assert "padding" in out


def test_small_undershoots_of_the_pet_are_clipped(convert, source, raw, capsys):
    edit(source / "pat.2" / "PET.nii.gz", lambda a: np.where(np.arange(a.shape[2]) == 0, -0.01, a))
    convert()
    assert read(raw / "Dataset007_Test" / "imagesTr" / "pat.2_0001.nii.gz").min() == 0
    assert "negative" in capsys.readouterr().out


def set_voxel(value, kind=np.float32):
    def change(array):
        array = array.astype(kind)
        array[3, 4, 5] = value
        return array

    return change


MISTAKES = {
    "PET in Bq/ml": ("PET", lambda a: a * 4000, "Bq/ml"),
    "PET scaled": ("PET", lambda a: a / 1000, "SUVbw"),
    "PET all zero": ("PET", lambda a: a * 0, "zero"),
    "PET normalised": ("PET", lambda a: (a - a.mean()) / a.std(), "negative"),
    "PET with NaN": ("PET", set_voxel(np.nan), "PET.*NaN"),
    "PET with inf": ("PET", set_voxel(np.inf), "PET.*NaN"),
    "CT with NaN": ("CT", set_voxel(np.nan), "CT.*NaN"),
    "CT without intercept": ("CT", lambda a: a + 1024, "rescale intercept"),
    "CT without intercept but with padding": ("CT", lambda a: np.where(a < -900, -2000, a + 1024), "rescale intercept"),
    "CT windowed": ("CT", lambda a: np.clip((a + 160) / 400 * 255, 0, 255), "normalised"),
    "CT normalised": ("CT", lambda a: (a - a.mean()) / a.std(), "normalised"),
    "CT of air": ("CT", lambda a: a * 0 - 1000, "no body"),
    "other labels": ("SEG", set_voxel(3, np.uint8), "value 3 "),
    "interpolated labels": ("SEG", set_voxel(0.5), "0.5.*nearest"),
    "labels with NaN": ("SEG", set_voxel(np.nan), "SEG.*NaN"),
    "another body": ("CT", lambda a: np.roll(a, 11, 2), "disagree"),
}


@pytest.mark.parametrize(("name", "change", "named"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_the_images_is_one_line(convert, source, raw, name, change, named):
    edit(source / "pat.2" / f"{name}.nii.gz", change)
    first, *lines = refused(convert, raw).splitlines()
    assert "1 of 2 cases" in first
    assert len(lines) == 1
    assert re.match(rf"pat\.2: .*{named}", lines[0])


def test_ct_and_pet_of_different_places(convert, source, raw):
    ct = study()["CT"]
    ct.SetOrigin((900.0, 0.0, 0.0))
    sitk.WriteImage(ct, source / "pat-1" / "CT.nii.gz")
    assert "pat-1: CT and PET hardly overlap: different subjects or wrong pairing" in refused(convert, raw)


def test_segmentation_on_another_grid(convert, source, raw):
    sitk.WriteImage(study()["SEG"][1:], source / "pat-1" / "SEG.nii.gz")
    assert "pat-1: segmentation (23x18x21 voxels) is not on the grid of the PET" in refused(convert, raw)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_bad_case_is_told(convert, source, raw, processes):
    (source / "pat-1" / "CT.nii.gz").unlink()
    pet = source / "pat.2" / "PET.nii.gz"
    pet.write_bytes(pet.read_bytes()[:-500])
    lines = refused(convert, raw, np=processes).splitlines()
    assert len(lines) == 3
    assert "pat-1: " in lines[1]
    assert "CT.nii.gz: there is no such file" in lines[1]
    assert "pat.2: " in lines[2]
    assert "PET.nii.gz: ends too early" in lines[2]


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ("case_id,wieght\npat-1,70\n", "wieght"),
        ("case_id\npat-1\npat-1\n", "line 3"),
        ("case_id,age\npat-1,200\n", "age"),
    ],
)
def test_a_bad_table_stops_before_the_images(convert, source, raw, table, named):
    (source / "clinical.csv").write_text(table, encoding="utf-8")
    (source / "pat-1" / "CT.nii.gz").unlink()
    message = refused(convert, raw)
    assert "clinical.csv" in message
    assert named in message
    assert "pat-1: " not in message


def test_a_table_that_was_asked_for_must_be_there(convert, source, raw, tmp_path):
    assert "more.csv" in refused(convert, raw, "--clinical", "more.csv")
    (tmp_path / "table.csv").write_text("case_id,sex\npat-1,w\n", encoding="utf-8")
    convert("--clinical", str(tmp_path / "table.csv"))
    assert "pat-1,,,,F," in (raw / "Dataset007_Test" / "clinical.csv").read_text(encoding="utf-8")


def test_calls_that_cannot_work(convert, source, raw, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert "no sub-folders" in refused(convert, raw, folder=tmp_path / "empty")
    assert "no such folder" in refused(convert, raw, folder=tmp_path / "nowhere")
    assert "-np 0" in refused(convert, raw, np=0)
    write(source / "Müller, Anna", {})
    assert "rename" in refused(convert, raw)
    (source / "Müller, Anna").rename(source / "a_0000")
    assert "rename" in refused(convert, raw)
    (source / "a_0000").rmdir()
    (raw / "Dataset007_Other").mkdir(parents=True)
    assert "taken" in refused(convert, raw)
    monkeypatch.delenv("nnUNet_raw")
    assert "nnUNet_raw is not set" in refused(convert, raw)


def test_cases_are_called_by_pseudonyms(convert, source, raw, tmp_path, capsys):
    """Folders are called as patients are; the key table, the clinical table and the folds go by the folders' names."""
    (source / "pat-1").rename(source / "Kettler, Josephine")
    (source / "pat.2").rename(source / "0012")
    (source / "clinical.csv").write_text(
        "case_id,tracer,diagnosis,age,patient\n\"Kettler, Josephine\",FDG,Hodgkin lymphoma of Kettler,61,Kettler\n"
        "12,Kettler,melanoma,50,Kettler\nHanssen,FDG,,,\n", encoding="utf-8",
    )
    folds = [{"train": ["Kettler, Josephine"], "val": ["0012"]}, {"train": ["0012"], "val": ["Kettler, Josephine"]}]
    (source / "splits_final.json").write_text(json.dumps(folds), encoding="utf-8")
    convert(keep=())
    out, err = capsys.readouterr()
    keys = (tmp_path / "key_in.csv").read_text(encoding="utf-8")
    case = {line.split(",", 2)[2].split("/in/")[1].strip('"'): line.split(",")[0] for line in keys.splitlines()[1:]}
    assert sorted(case.values()) == ["Test_0001", "Test_0002"]
    dataset = raw / "Dataset007_Test"
    kettler, other = case["Kettler, Josephine"], case["0012"]
    rows = dict(line.split(",", 1) for line in (dataset / "clinical.csv").read_text(encoding="utf-8").splitlines()[1:])
    assert rows == {kettler: f"18F-FDG,Hodgkin lymphoma,61,,,{min(case.values(), key=list(rows).index)}",
                    other: f",melanoma,50,,,{min(case.values(), key=list(rows).index)}"}  # fmt: skip
    assert json.loads((dataset / "splits_final.json").read_text(encoding="utf-8"))[0] == {
        "train": [kettler],
        "val": [other],
    }
    assert "diagnosis of 1 case (" in err and "tracer of 1 case (" in err and "1 cases that are not there" in err
    texts = [out, err, *(str(p) for p in dataset.rglob("*"))]
    texts += [p.read_text(encoding="utf-8") for p in dataset.rglob("*") if p.suffix in (".csv", ".json", ".html")]
    assert not any(name in text for text in texts for name in ("Kettler", "Josephine", "Hanssen"))


def test_messages_on_pseudonymous_cases_do_not_name_the_folder(convert, source, raw):
    (source / "pat.2" / "PET.nii.gz").write_bytes((source / "pat.2" / "PET.nii.gz").read_bytes()[:-100])
    message = refused(convert, raw, keep=())
    assert "Test_000" in message and "PET.nii.gz" in message and "pat.2" not in message


def test_pseudonyms_stay_with_the_folders(convert, source, raw, tmp_path):
    convert(keep=())
    keys = (tmp_path / "key_in.csv").read_text(encoding="utf-8")
    write(source / "another", study(3))
    shutil.rmtree(raw)
    convert(keep=())
    assert set(keys.splitlines()) < set((tmp_path / "key_in.csv").read_text(encoding="utf-8").splitlines())


@pytest.mark.skipif(not REAL.exists(), reason="the real patients are not here")
def test_real_patients(raw, tmp_path, monkeypatch):
    for case in ("STS_002", "STS_019"):
        (tmp_path / "real").mkdir(exist_ok=True)
        (tmp_path / "real" / case).symlink_to(REAL / case)
    files = ["--ct", "CTres.nii.gz", "--pet", "SUV.nii.gz", "--seg", "SEG.nii.gz"]
    command = ["fratmae_convert_pairs", "-i", str(tmp_path / "real"), "-d", "7", "-n", "STS", *files, "--keep-names"]
    monkeypatch.setattr("sys.argv", [*command, "--clinical", str(REAL / "clinical.csv")])
    main()
    assert "STS_002,18F-FDG,soft tissue sarcoma,61,M," in (raw / "Dataset007_STS" / "clinical.csv").read_text(
        encoding="utf-8"
    )
    np.testing.assert_array_equal(
        read(raw / "Dataset007_STS" / "imagesTr" / "STS_019_0001.nii.gz"), read(REAL / "STS_019" / "SUV.nii.gz")
    )


@pytest.mark.skipif(not REAL.exists(), reason="the real patients are not here")
def test_real_bodies_agree_and_those_of_different_patients_do_not():
    ct, pet = (sitk.ReadImage(REAL / "STS_036" / f"{name}.nii.gz") for name in ("CTres", "SUV"))
    assert outline_agreement(ct, pet) > 0.95
    noise = np.random.default_rng(0).normal(0, 1, pet.GetSize()[::-1])  # SUV 1, as strong as the body itself
    noisy = sitk.GetImageFromArray(np.maximum(sitk.GetArrayFromImage(pet) + noise, 0))
    noisy.CopyInformation(pet)
    assert outline_agreement(ct, noisy) > 0.85
    moved = sitk.Resample(pet, ct, sitk.TranslationTransform(3, (0, 90, 0)))
    assert outline_agreement(ct, moved) < 0.75
    assert outline_agreement(ct * 0, pet) is None  # no air: nothing to say
