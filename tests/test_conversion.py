"""The runner of all converters: stopped anywhere it goes on, and one bad case is one line; pictures and the page."""

import csv
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread

import nnUNet_raw_conversion.conversion as conversion
from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.files import WriteError
from nnUNet_raw_conversion.clinical import clinical_record, read_clinical
from nnUNet_raw_conversion.conversion import Loaded, Study, convert_studies
from nnUNet_raw_conversion.pictures import draw_case, index_page
from nnUNet_raw_conversion.raw_dataset import RawDataset

SIZE, SPACING = (15, 13, 17), (11.0, 12.0, 10.5)  # x, y, z
OPTIONS = {"command": "test", "grid": "pet"}


def images(seed=0):
    """CT (HU), PET (SUV) and lesion of a leaning trunk with a lesion on its right, in front, towards the head (LPS)."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(SIZE[::-1], SPACING[::-1], strict=True)],
                          indexing="ij")  # fmt: skip
    body = ((x - 0.1 * z) / 60) ** 2 + (y / 50) ** 2 < 1
    lesion = (x + 25) ** 2 + (y + 20) ** 2 + (z - 50) ** 2 < 18**2
    ct = np.where(body, rng.normal(20, 15, x.shape), -1000) - 120 * (np.hypot(x, y) < 15)
    pet = np.where(body, 1.0, 0.02) + 8 * lesion + rng.exponential(0.03, x.shape)
    result = [sitk.GetImageFromArray(array) for array in (ct, pet.astype(np.float32), lesion.astype(np.uint8))]
    for image in result:
        image.SetSpacing(SPACING)
        image.SetOrigin((1.0, 2.0, 3.0))
    return result


def load(source: Path, fault: str = "") -> Loaded:
    """A loader that counts its calls in a file and behaves as `source` (a text file) says."""
    with source.with_suffix(".calls").open("a", encoding="utf-8") as calls:
        calls.write("x")
    words = source.read_text(encoding="utf-8").split()
    if "bad" in words:
        raise UserError("PET: (0054,1001) Units is missing; give it with --suv-override")
    if "surprise" in words:
        raise KeyError("Müller, Anna 1950")
    if "kill" in words:
        os.kill(os.getpid(), signal.SIGKILL)
    ct, pet, lesions = images(len(source.stem))
    return Loaded(None if "noct" in words else ct, pet, None if "nolesions" in words else lesions,
                  ["CT has a gantry tilt"] * ("tilt" in words), {"PET": f"<b>WB & AC</b> {source.stem}"},
                  [{"roi": "GTV", "kept": True, "ml": np.float32(1.5)}] * ("roi" in words))  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Without the pictures, which are what takes time here."""
    monkeypatch.setattr(conversion, "draw_case", lambda path, *_: path.write_bytes(b"png"))


def sources(folder: Path, **cases: str) -> list[Study]:
    """Studies with what their source says; Tr unless its first word is Ts or Pt."""
    folder.mkdir(exist_ok=True)
    studies = []
    for name, words in cases.items():
        path, part = folder / f"{name}.txt", words.split()[0] if words[:2] in ("Ts", "Pt") else "Tr"
        if not path.exists() or path.read_text(encoding="utf-8") != words:
            path.write_text(words, encoding="utf-8")
        studies.append(Study(name, clinical_record(name, age=50 + len(name)), part, partial(load, path), (path, 1.5)))
    return studies


def run(studies, options=OPTIONS, processes=1, **more):
    return convert_studies(RawDataset(7, "Test"), studies, options, processes, **more)


def calls(folder: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_size for path in folder.glob("*.calls")}


def tree(folder: Path) -> dict[str, bytes]:
    """The contents of all files, without the seconds that the cases took."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    for name, content in files.items():
        if name.endswith(".json") and "seconds" in (row := json.loads(content)):
            files[name] = json.dumps({**row, "seconds": 0}).encode()
        elif name.endswith(("report.csv", "index.html")):
            files[name] = b""
    return files


def report(dataset: Path) -> dict[str, dict]:
    return {row["case_id"]: row for row in csv.DictReader((dataset / "conversion_report.csv").open(encoding="utf-8"))}


def test_parts_go_where_nnunet_looks_for_them(raw, tmp_path, capsys):
    studies = sources(tmp_path / "in", a="roi tilt", bb="Ts", ccc="Pt", d="noct tilt", ee="Ts nolesions")
    assert run(studies) == 0
    dataset = raw / "Dataset007_Test"
    assert [p.name for p in raw.iterdir()] == ["Dataset007_Test"]  # nothing hidden is left
    found = {name: sorted(p.name for p in (dataset / name).iterdir()) for name in
             ("imagesTr", "labelsTr", "imagesTs", "labelsTs", "imagesPt")}  # fmt: skip
    pairs = {part: [f"{c}_000{i}.nii.gz" for c in cases for i in (0, 1)]
             for part, cases in (("Tr", "ad"), ("Ts", ("bb", "ee")), ("Pt", ("ccc",)))}  # fmt: skip
    assert found == {"imagesTr": pairs["Tr"], "labelsTr": ["a.nii.gz", "d.nii.gz"], "imagesTs": pairs["Ts"],
                     "labelsTs": ["bb.nii.gz"], "imagesPt": pairs["Pt"]}  # fmt: skip
    assert json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))["numTraining"] == 2
    records = read_clinical(dataset / "clinical.csv")
    missing = {name: record.missing for name, record in records.items()}
    assert missing == {"a": None, "bb": None, "ccc": None, "d": "CT", "ee": None}
    assert np.all(sitk.GetArrayFromImage(sitk.ReadImage(dataset / "imagesTr" / "d_0000.nii.gz")) == -1024)
    rows = report(dataset)
    assert rows["a"]["used"] == "PET: <b>WB & AC</b> a"
    volume = np.prod(SPACING) / 1000 * sitk.GetArrayFromImage(images()[2]).sum()
    assert float(rows["a"]["lesion_ml"]) == pytest.approx(volume, abs=0.01)
    assert rows["ccc"]["lesion_ml"] == ""
    assert "15x13x17 of 11 x 12 x 10.5 mm" in rows["bb"]["grid"]
    assert list(csv.reader((dataset / "conversion_rois.csv").open(encoding="utf-8"))) == [
        ["case_id", "roi", "kept", "ml"], ["a", "GTV", "True", "1.5"]]  # fmt: skip
    page = (dataset / "conversion" / "index.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;WB &amp; AC&lt;/b&gt;" in page and "<b>" not in page and "http" not in page
    assert {p.stem for p in (dataset / "conversion").glob("*.png")} == {"a", "bb", "ccc", "d", "ee"}
    out = capsys.readouterr().out
    assert "2 labelled, 1 unlabelled and 2 test cases are in" in out
    assert "CT has a gantry tilt: a, d\n" in out


def test_a_bad_case_does_not_stop_the_others_and_is_done_when_mended(raw, tmp_path, capsys):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    folder, dataset = tmp_path / "in", raw / "Dataset007_Test"
    words = {"a": "", "b": "bad", "c": "surprise", "d": "nolesions", "e": ""}
    assert run(sources(folder, **words)) == 3
    verify_dataset_integrity(str(dataset), num_processes=1)
    rows = report(dataset)
    assert [row["status"] for row in rows.values()] == ["done", "failed", "failed", "failed", "done"]
    assert "(0054,1001)" in rows["b"]["error"]
    assert "KeyError in test_conversion.py" in rows["c"]["error"]
    assert "segmentation" in rows["d"]["error"]
    assert set(read_clinical(dataset / "clinical.csv")) == {"a", "e"}
    out, err = capsys.readouterr()
    assert "b: PET: (0054,1001)" in err and "3 of 5 cases failed (b, c, d)" in err
    written = [p.read_text(encoding="utf-8") for p in dataset.rglob("*") if p.suffix in (".csv", ".json", ".html")]
    assert len(written) > 5
    for text in (out, err, *written):
        assert "Anna" not in text and "1950" not in text
    page = (dataset / "conversion" / "index.html").read_text(encoding="utf-8")
    assert page.index(">b<") < page.index(">a<") and "3 failed" in page

    assert run(sources(folder, **{**words, "b": "", "c": "mended"})) == 1
    assert calls(folder) == {"a": 1, "b": 2, "c": 2, "d": 2, "e": 1}
    assert json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))["numTraining"] == 4
    assert run(sources(folder, a="", b="", c="mended", e="")) == 0  # a case that failed may be left out
    assert set(report(dataset)) == {"a", "b", "c", "e"}
    assert not list(dataset.rglob("d*.nii.gz")) + list(dataset.rglob("d.*"))


def test_only_what_changed_is_converted_again(raw, tmp_path, quick):
    folder, dataset = tmp_path / "in", raw / "Dataset007_Test"
    studies = sources(folder, a="", b="", c="", d="")
    run(studies)
    before = tree(dataset)
    run(studies)
    assert calls(folder) == dict.fromkeys("abcd", 1) and tree(dataset) == before
    (dataset / "imagesTr" / "a_0001.nii.gz").unlink()
    path = dataset / "labelsTr" / "b.nii.gz"
    path.write_bytes(path.read_bytes()[:-7])
    studies[2] = Study("c", studies[2].record, "Tr", studies[2].load, (*studies[2].inputs[:1], 2.5))
    run(studies)
    assert calls(folder) == {"a": 2, "b": 2, "c": 2, "d": 1}
    after = tree(dataset)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["conversion/c.json"]
    run(sources(folder, a="", b="Ts", c="bad", d=""))
    assert sorted(p.name for p in (dataset / "labelsTr").iterdir()) == ["a.nii.gz", "d.nii.gz"]
    assert [p.name for p in (dataset / "labelsTs").iterdir()] == ["b.nii.gz"]
    assert len(list((dataset / "imagesTr").iterdir())) == 4


class Stopped(BaseException):
    """The plug is pulled."""


def test_stopped_at_any_step_it_goes_on_and_is_the_same_in_the_end(raw, tmp_path, quick, monkeypatch):
    """Every file comes into being by a rename, so stopping before each of them is stopping everywhere."""
    studies, dataset = sources(tmp_path / "in", a="", b="noct", c="Ts"), raw / "Dataset007_Test"
    run(studies)
    expected, rename, path_rename = tree(dataset), os.replace, Path.rename
    for step in range(100):
        dataset.rename(dataset.with_name("gone"))
        left = step

        def count(call, *args):
            nonlocal left
            left -= 1
            if left < 0:
                raise Stopped
            return call(*args)

        monkeypatch.setattr(os, "replace", partial(count, rename))
        monkeypatch.setattr(Path, "rename", lambda *args: count(path_rename, *args))
        try:
            run(studies)
        except Stopped:
            assert not dataset.exists()
        else:
            break
        finally:
            monkeypatch.setattr(os, "replace", rename)
            monkeypatch.setattr(Path, "rename", path_rename)
        run(studies)
        assert tree(dataset) == expected, step
        subprocess.run(["rm", "-r", raw / "gone"], check=True)
    assert 20 < step < 100


def test_killed_it_goes_on(raw, tmp_path, quick):
    folder = tmp_path / "in"
    sources(folder, a="", b="kill", c="")
    code = ("from pathlib import Path; from tests.test_conversion import *;"
            f"run(sources(Path({str(folder)!r}), a='', b='kill', c=''))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    partial_folder = raw / ".partial_Dataset007_Test"
    assert [p.name for p in raw.iterdir()] == [partial_folder.name]
    (partial_folder / ".writing" / "123_imagesTr_b_0000.nii.gz").write_bytes(b"half a file")
    (partial_folder / "imagesTr" / "b_0000.nii.gz").write_bytes(b"")  # without a row that says that it is done
    assert run(sources(folder, a="", b="", c="")) == 0
    assert calls(folder) == {"a": 1, "b": 2, "c": 1}
    dataset = raw / "Dataset007_Test"
    assert not (dataset / ".writing").exists()
    assert all(nibabel.load(p).get_fdata().shape == SIZE for p in (dataset / "imagesTr").iterdir())


def test_a_case_whose_process_is_killed_does_not_stop_the_others(raw, tmp_path, capsys):
    folder = tmp_path / "in"
    assert run(sources(folder, a="", b="kill", c="", d="kill", e=""), processes=2) == 2
    rows = report(raw / "Dataset007_Test")
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys("ace", "done") | dict.fromkeys(
        "bd", "failed"
    )
    assert rows["b"]["error"] == "its process was killed, most likely for want of memory; try a smaller -np"
    assert not list(raw.rglob("b_000*"))
    assert run(sources(folder, a="", b="", c="", d="", e="")) == 0


def test_nothing_is_moved_if_nothing_is_to_be_done(raw, tmp_path, quick, monkeypatch):
    studies = sources(tmp_path / "in", a="", b="")
    run(studies)
    before = {path: path.stat().st_mtime_ns for path in raw.rglob("*")}
    monkeypatch.setattr(Path, "rename", None)
    monkeypatch.setattr(os, "replace", None)
    assert run(studies) == 0
    assert {path: path.stat().st_mtime_ns for path in raw.rglob("*")} == before
    monkeypatch.undo()
    monkeypatch.setenv("nnUNet_raw", str(raw))
    studies[0] = Study("a", clinical_record("a", age=3), "Tr", studies[0].load, studies[0].inputs)
    assert run(studies) == 0  # a better clinical table needs no case anew
    assert read_clinical(raw / "Dataset007_Test" / "clinical.csv")["a"].age == 3
    assert calls(tmp_path / "in") == {"a": 1, "b": 1}
    assert [path.name for path in raw.iterdir()] == ["Dataset007_Test"]


def test_a_full_disk_is_one_line_and_what_is_done_is_kept(raw, tmp_path, quick, capsys):
    folder = tmp_path / "in"
    studies = sources(folder, a="", b="", c="")
    run(studies[:1])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
    try:
        with pytest.raises(WriteError, match=r"Dataset007_Test cannot be written to \(File too large\)") as error:
            run(studies)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(error.value)
    assert run(studies) == 0
    assert calls(folder) == {"a": 1, "b": 2, "c": 1}


def test_a_target_that_cannot_be_written_to_is_one_line(raw, tmp_path, quick, monkeypatch):
    studies = sources(tmp_path / "in", a="")
    raw.write_text("not a folder", encoding="utf-8")
    with pytest.raises(UserError, match="raw cannot be written to"):
        run(studies)
    raw.unlink()

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(UserError, match=r"raw cannot be written to \(Read-only file system\)"):
            run(studies)
    assert run(studies) == 0


def test_what_is_refused(raw, tmp_path, quick):
    folder, dataset = tmp_path / "in", raw / "Dataset007_Test"
    studies = sources(folder, a="", b="", c="")
    for wrong, message in (([], "no case"), ([*studies, studies[0]], "twice"),
                           ([Study("x y", *[None] * 3)], "rename"),
                           ([Study("x_0000", *[None] * 3)], "rename")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run(wrong)
    for grid in ("4,4", "PET", "0,4,4", "4,4,nan"):
        with pytest.raises(UserError, match=f"--grid {grid}: say"):
            run(studies, {"grid": grid})
    with pytest.raises(UserError, match="-np 0"):
        run(studies, processes=0)
    assert not raw.exists()
    with pytest.raises(UserError, match="none of 1 cases could be converted.*conversion_report.csv"):
        run(sources(folder, bad="bad"), {"grid": "ct"})
    assert not dataset.exists()
    run(studies)  # other options, but nothing was converted with them
    before = tree(dataset)
    with pytest.raises(UserError, match="was begun with grid=pet, now it is ct"):
        run(studies, {**OPTIONS, "grid": "ct"})
    assert tree(dataset) == before
    with pytest.raises(UserError, match="has 1 cases that are not among the studies any more .b."):
        run([studies[0], studies[2]])
    assert tree(dataset) == before
    with pytest.raises(UserError, match="there already"):
        run(studies, strict=True)
    run(studies)
    assert tree(dataset) == before
    with pytest.raises(UserError, match="taken"):
        RawDataset(7, "Other")


def test_strict_means_all_or_nothing(raw, tmp_path, quick):
    folder = tmp_path / "in"
    studies = sources(folder, a="", b="bad", c="bad", d="")
    with pytest.raises(UserError) as error:
        run(studies, strict=True)
    assert str(error.value).splitlines()[0] == "2 of 4 cases cannot be converted, so nothing was written:"
    assert [line[:3] for line in str(error.value).splitlines()[1:]] == ["b: ", "c: "]
    assert list(raw.iterdir()) == []


def test_processes_do_not_matter(raw, tmp_path):
    studies = sources(tmp_path / "in", a="", b="", c="noct")
    run(studies)
    (raw / "Dataset007_Test").rename(raw / "one")
    run(studies, processes=2)
    assert tree(raw / "one") == tree(raw / "Dataset007_Test")


def test_images_on_another_grid(raw, tmp_path):
    studies = sources(tmp_path / "in", a="")
    run(studies, {**OPTIONS, "grid": "8,9,10"})
    loaded = [sitk.ReadImage(p) for p in (raw / "Dataset007_Test").glob("*Tr/*.gz")]
    assert {image.GetSpacing() for image in loaded} == {(8.0, 9.0, 10.0)}
    assert {image.GetSize() for image in loaded} == {(21, 18, 18)}


def red(picture):
    r, g, b = np.moveaxis(picture[..., :3], -1, 0)
    return (r - g > 0.25) & (abs(g - b) < 0.1)


def test_the_picture_shows_the_lesion_where_the_patient_has_it(tmp_path):
    """The patient's right on the viewer's left, head up, front on the left of the sagittal view."""
    ct, pet, lesions = (sitk.GetArrayFromImage(image) for image in images())
    path = tmp_path / "a.png"
    draw_case(path, "a", pet, ct, lesions > 0, SPACING[::-1])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    picture = imread(path)
    height, width = picture.shape[:2]
    # One scale for all panels: the first third is coronal, the last has no lesion
    rows, columns = np.nonzero(red(picture))
    assert np.median(rows) < height * 0.5
    extents = np.array(pet.shape) * SPACING[::-1]
    coronal = columns[columns < width * 0.36]
    assert coronal.size and np.median(coronal) < width * 0.18
    sagittal = columns[columns > width * 0.36]
    middle = width * (extents[2] + extents[1] / 2) / (2 * extents[2] + extents[1])
    assert sagittal.size and np.median(sagittal) < middle
    plain = tmp_path / "b.png"
    draw_case(plain, "b", pet, None, None, SPACING[::-1])
    assert not red(imread(plain)).any()


def test_odd_pictures_do_not_fail(tmp_path):
    for shape in ((1, 1, 1), (3, 200, 2), (300, 4, 5)):
        draw_case(tmp_path / "a.png", "$_{x", np.zeros(shape, np.float32), None, np.zeros(shape, bool), (3.0, 2.0, 1.0))
        size = imread(tmp_path / "a.png").shape
        assert 50 < size[0] < 1500 and 200 < size[1] < 2000


def test_the_page_escapes_what_it_shows():
    row = {"case_id": "a.b", "status": "done", "part": "Tr", "used": {"<i>": "\"'&<script>"}, "notes": ["<u>"],
           "error": None, "grid": None, "lesion_ml": 1.0, "suv_max": None, "seconds": 0.5}  # fmt: skip
    page = index_page("A<B>", [row])
    assert not any(tag in page for tag in ("<i>", "<script", "<u>", "<B>"))
    assert "src='a.b.png'" in page


def test_pictures_need_no_image_library():
    """Pretraining, which uses them, must not need SimpleITK."""
    code = "import sys, nnUNet_raw_conversion.pictures; sys.exit(any(m in sys.modules for m in sys.argv[1:]))"
    code = [code, "SimpleITK", "matplotlib.pyplot"]
    assert subprocess.run([sys.executable, "-c", *code], check=False).returncode == 0
