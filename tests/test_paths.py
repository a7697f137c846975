"""Names of files and folders are bytes, may be packed or closed to us, and rows that name files may lie."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.files import as_text
from nnUNet_raw_conversion import folders
from nnUNet_raw_conversion.conversion import index_page
from nnUNet_raw_conversion.geometry import read_image
from nnUNet_raw_conversion.raw_dataset import OPTIONS, remove_case
from tests.test_conversion import quick, run, sources  # noqa: F401 - a fixture
from tests.test_ghsg import Trial, trial  # noqa: F401
from tests.trial_files import write_patient

LATIN1 = os.fsdecode(b"M\xfcller_J\xfcrgen")


# ------------------------------------------------------------------------------------------------------ bytes, not text


def test_a_folder_name_that_is_no_utf8(trial, monkeypatch):  # noqa: F811
    write_patient(trial.input / "A", "A")
    write_patient(trial.input / LATIN1, "B")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    trial.convert()
    assert {row["patient"]: row["source"].split("/in/")[1] for row in trial.table("keys")} == {
        "A": "A/b", "B": r"M\xfcller_J\xfcrgen/b"}  # fmt: skip
    cases = {row["case_id"] for row in trial.table("keys")}
    trial.convert()
    assert {row["case_id"] for row in trial.table("keys")} == cases and len(cases) == 2
    for file in trial.dataset.rglob("*.*"):
        assert b"ller_J" not in file.read_bytes()


def test_the_input_itself_is_no_utf8(trial):  # noqa: F811
    trial.input = trial.input.rename(trial.input.with_name(LATIN1))
    write_patient(trial.input / "A", "", rois={})
    trial.convert()
    assert (trial.input.parent / f"key_{LATIN1}.csv").is_file()


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha"])
def test_an_image_below_such_a_folder_is_read(tmp_path, ending):
    import SimpleITK as sitk

    image = sitk.Image(3, 4, 5, sitk.sitkFloat32) + 1
    sitk.WriteImage(image, str(tmp_path / f"pet{ending}"))
    (tmp_path / LATIN1).mkdir()
    odd = (tmp_path / f"pet{ending}").rename(tmp_path / LATIN1 / f"{LATIN1}{ending}")
    assert read_image(odd, "the PET").GetSize() == (3, 4, 5)
    with as_text(odd) as path:
        str(path).encode()
    assert not path.exists()


# ----------------------------------------------------------------------------------------------------- packed or closed


def test_archives_beside_patients_are_named(trial):  # noqa: F811
    write_patient(trial.input / "A", "A")
    for name in ("B.zip", "sub/C.ZIP", "D.tar.gz", "._B.zip", "E.7z"):
        (trial.input / name).parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(trial.input / name, "w"):
            pass
    assert "4 archives (.7z, .tar.gz, .zip) are not looked into; unpack them" in trial.convert()


def test_archives_alone_are_named_in_the_error(trial):  # noqa: F811
    (trial.input / "A.zip").write_bytes(b"PK")
    assert "neither DICOM nor NIfTI; 1 archives (.zip) are not looked into" in trial.convert(fails=True)


@pytest.fixture
def close(monkeypatch):
    """A function after which a folder cannot be listed, as without the right to read it (which root always has)."""
    scandir = os.scandir

    def close(folder: Path) -> None:
        def refuse(path="."):
            if not isinstance(path, int) and Path(os.fsdecode(path)) == folder:
                raise PermissionError(13, "Permission denied", str(folder))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)

    return close


def test_a_patient_whose_folder_is_closed_is_a_case_that_failed(trial, close):  # noqa: F811
    for name in ("A", "B", "C"):
        write_patient(trial.input / name, name)
    close(trial.input / "B")
    output = trial.convert(fails=True)
    case = trial.case("B")
    assert "cannot be read; permit it" in trial.report(case)["error"] and f"{case}: one of its folders" in output
    assert [row["status"] for row in trial.table("conversion_report")].count("done") == 2


def test_a_closed_folder_of_a_patient_fails_the_patient(trial, close):  # noqa: F811
    """Else the CT would be filled with air."""
    for name in ("A", "B"):
        write_patient(trial.input / name, name)
    close(trial.input / "B" / "a")
    trial.convert("--allow-missing-ct", fails=True)
    assert "one of its folders cannot be read" in trial.report(trial.case("B"))["error"]
    assert trial.report(trial.case("A"))["status"] == "done" and len(trial.table("keys")) == 2


def test_the_input_is_closed(trial, close):  # noqa: F811
    write_patient(trial.input / "A", "A")
    close(trial.input)
    with pytest.raises(UserError, match="cannot be read .Permission denied"):
        folders.unreadable_folders(trial.input)


# ------------------------------------------------------------------------------------------- rows that name other files


ROW = {"case_id": "a", "status": "done", "part": "Tr", "used": {}, "notes": [], "rois": [], "missing_ct": False,
       "inputs": "", "files": {}, "error": None, "grid": None}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "3", "[" * 100_000, "\x00",
        *[json.dumps({**ROW, **change}) for change in (
            {"case_id": "../../victim"}, {"case_id": "/etc/x"}, {"case_id": None}, {"case_id": ["a"]}, {"case_id": "b"},
            {"files": {"../../victim/x.nii.gz": 1}}, {"files": {"imagesTr/b_0000.nii.gz": 1}}, {"files": None},
            {"files": {"imagesTr/a_0000.nii.gz": "1"}}, {"status": "x"}, {"part": "<script>"}, {"notes": "x"},
            {"notes": [1]}, {"used": []}, {"rois": [1]}, {"error": {}}, {"missing_ct": "no"}, {"suv_max": "high"})],
        json.dumps({}),
    ],
)  # fmt: skip
def test_a_row_that_is_damaged_or_lies_removes_nothing(raw, tmp_path, quick, content):  # noqa: F811
    studies = sources(tmp_path / "in", a="", c="")
    run(studies)
    for folder in (raw, tmp_path):
        (folder / "victim").mkdir()
        for name in ("x.nii.gz", "x_0000.nii.gz", "victim.json"):
            (folder / "victim" / name).write_text("kept", encoding="utf-8")
    dataset = raw / "Dataset007_Test"
    (dataset / "conversion" / "a.json").write_text(content, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="a.json: is damaged, or not of this case; remove this file") as error:
        run(studies)
    assert error.value.code == "ROW_DAMAGED" and sorted(tmp_path.rglob("*")) == before
    (dataset / "conversion" / "a.json").unlink()  # as it says
    assert run(studies) == 0
    assert json.loads((dataset / "conversion" / "a.json").read_text(encoding="utf-8"))["status"] == "done"


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "", "..", "a\x00b"])
def test_no_file_is_removed_by_a_name_that_leads_elsewhere(tmp_path, name):
    with pytest.raises(UserError, match="is no name of a folder or file"):
        remove_case(tmp_path, name)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000])
def test_damaged_options_are_one_line(raw, tmp_path, quick, content):  # noqa: F811
    studies = sources(tmp_path / "in", a="")
    run(studies)
    (raw / "Dataset007_Test" / OPTIONS).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"{OPTIONS}: is damaged"):
        run(studies)
    assert (raw / "Dataset007_Test" / "imagesTr" / "a_0000.nii.gz").exists()


def test_two_patients_with_files_of_one_size_and_time_are_two(raw, tmp_path, quick):  # noqa: F811
    """As out of an archive: a case whose files are another patient's now is converted anew."""
    studies = sources(tmp_path / "in", a="tilt", b="")
    run(studies)
    source = tmp_path / "in" / "a.txt"
    times = source.stat()
    source.write_text("noct", encoding="utf-8")
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert source.stat().st_size == times.st_size
    run(studies)
    row = json.loads((raw / "Dataset007_Test" / "conversion" / "a.json").read_text(encoding="utf-8"))
    assert row["missing_ct"]


def test_html_and_formulas_are_inert(tmp_path):
    evil = "<script>alert(1)</script>"
    row = {**ROW, "case_id": evil, "used": {evil: evil}, "notes": [evil], "grid": evil, "lesion_ml": None,
           "suv_max": None, "seconds": None}  # fmt: skip
    page = index_page(evil, [row, {**row, "status": "failed", "error": f"'\"{evil}"}])
    assert "<script" not in page and page.count("&lt;script&gt;") > 8


def test_rois_of_a_spreadsheet_attack(trial):  # noqa: F811
    """What a contour is called goes into tables and a page; neither may execute it."""
    write_patient(trial.input / "A", "A", rois={"=HYPERLINK(1)": ((0, 0, 0), 20), "<b>x</b>": ((0, 0, 0), 20)})
    trial.convert("--lesion-roi", ".*")
    for name in ("conversion_report.csv", "conversion_rois.csv", "clinical.csv"):
        lines = (trial.dataset / name).read_text(encoding="utf-8").splitlines()
        assert not any(cell.startswith(("=", '"=')) for line in lines for cell in line.split(","))
    assert "<b>" not in (trial.dataset / "conversion" / "index.html").read_text(encoding="utf-8")
