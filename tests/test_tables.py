"""Tables that others made: csv and xlsx that are damaged, endless, or would be executed by a spreadsheet."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path

import openpyxl
import pytest

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion import clinical
from nnUNet_raw_conversion.autopet import read_metadata
from nnUNet_raw_conversion.clinical import ClinicalRecord, read_clinical, read_table, write_clinical

HEADER = "case_id,diagnosis,age\n"


def table(folder: Path, text: str) -> Path:
    (folder / "t.csv").write_bytes(text.encode())
    return folder / "t.csv"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f'{HEADER}a,x,1\nb,"Hodgkin,2\nc,y,3\n', 3),  # open to the end
        (f'{HEADER}a,"x,1\nb,"y",2\n', 2),  # closed by the next, in the middle of a cell
        (f'{HEADER}a,"x,1\nb,y",2\nc,z,3\n', 2),  # closed at the end of a cell: three columns, and one patient less
        (f'{HEADER}"a,x,1\nb",y,2\n', 2),
        (f'{HEADER}a,x,"1\nb,y,"2\nc,z,3\n', 2),
        (f'{HEADER}a,"x,1', 2),
        (f'{HEADER}a,"x,1\r\nb,y,2\r\nc,z,3\r\n', 2),
        ('case_id;diagnosis;age\na;"x;1\nb;y";2\n', 2),
        ('case_id\tdiagnosis\tage\na\t"x\t1\nb\ty"\t2\n', 2),
        (f'{HEADER}a,"{"x" * 200_000},1\nb,y,2\n', 2),  # longer than a cell may be
    ],
)
def test_a_quotation_mark_that_swallows_a_patient_is_refused_with_its_line(tmp_path, text, line):
    with pytest.raises(UserError, match=f"t.csv, line {line}: .*quotation mark") as error:
        read_table(table(tmp_path, text))
    assert error.value.code == "TABLE_QUOTE" and "\n" not in str(error.value) and "Hodgkin" not in str(error.value)


@pytest.mark.parametrize(
    ("cells", "diagnosis"),
    [('"two\nlines"', "two\nlines"), ('"a, b"', "a, b"), ('"say ""x"", twice"', 'say "x", twice'), ('""', ""),
     ('"x" later', "x later"), ('"a, b\nc, d, e"', "a, b\nc, d, e"), ('5" mass', '5" mass'),
     ('"line\r\n\r\nline"', "line\n\nline")],
)  # fmt: skip
def test_quotation_marks_that_are_right_or_do_no_harm(tmp_path, cells, diagnosis):
    for end in ("", "b,y,2\n"):
        _, rows = read_table(table(tmp_path, f"{HEADER}a,{cells},1\n{end}"))
        assert rows[0][1] == ["a", diagnosis, "1"] and len(rows) == 1 + bool(end)


def test_zero_bytes_are_refused(tmp_path):
    for text in ("case_id,age\na,\x001\n", "\x00", "case_id,age\na,1\n".encode("utf-16-le").decode("latin-1")):
        with pytest.raises(UserError, match="save it as 'CSV UTF-8'"):
            read_table(table(tmp_path, text))


@pytest.mark.parametrize("age", ["NaN", "nan", " NAN ", "inf", "-inf", "Infinity", "1e999", "1e9"])
def test_ages_that_are_no_numbers(tmp_path, age):
    with pytest.raises(UserError, match="line 3: age: is "):
        read_clinical(table(tmp_path, f"case_id,age\na,1\nb,{age}\n"))


def test_formulas_are_inert_in_clinical_csv_and_come_back(tmp_path):
    record = ClinicalRecord("=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", 61.0)
    write_clinical(tmp_path / "c.csv", [record])
    assert (tmp_path / "c.csv").read_text(encoding="utf-8").splitlines()[
        1
    ] == "'=1+1,'@SUM(A1),'+cmd|' /C calc'!A0,61,,"
    assert read_clinical(tmp_path / "c.csv") == {"=1+1": record}
    book = openpyxl.Workbook()  # as if opened and saved as xlsx: the apostrophes are text there
    for row in (["case_id", "diagnosis"], ["'=1+1", "'-x"]):
        book.active.append(row)
    book.save(tmp_path / "c.xlsx")
    assert read_clinical(tmp_path / "c.xlsx") == {"=1+1": ClinicalRecord("=1+1", diagnosis="-x")}


def sheet(path: Path, *places: str, merged: str = "") -> Path:
    """A workbook with a table of two columns and one row, and `x` at `places` besides."""
    book = openpyxl.Workbook()
    for row in (["case_id", "age"], ["a", 61.0]):
        book.active.append(row)
    for place in places:
        book.active[place] = "x"
    book.save(path)
    if merged:
        edit_sheet(path, "</sheetData>", f'</sheetData><mergeCells count="1"><mergeCell ref="{merged}"/></mergeCells>')
    return path


def edit_sheet(path: Path, old: str, new: str) -> None:
    with zipfile.ZipFile(path) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    parts["xl/worksheets/sheet1.xml"] = parts["xl/worksheets/sheet1.xml"].replace(old.encode(), new.encode())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        for name, content in parts.items():
            book.writestr(name, content)


@pytest.mark.parametrize("place", ["XFD1048576", "XFD3", "C1048576", "ZZ2", "XFD1"])
def test_one_cell_far_out_takes_no_time(tmp_path, place):
    path, started = sheet(tmp_path / "t.xlsx", place), time.monotonic()
    with pytest.raises(UserError, match="more cells than columns|unknown column"):
        read_clinical(path)
    assert time.monotonic() - started < 15


def test_a_merge_of_all_cells_takes_no_time(tmp_path):
    started = time.monotonic()
    assert read_clinical(sheet(tmp_path / "t.xlsx", merged="D1:XFD1048576"))["a"].age == 61
    assert time.monotonic() - started < 5


def test_a_row_number_without_end_is_refused(tmp_path):
    path, started = sheet(tmp_path / "t.xlsx"), time.monotonic()
    edit_sheet(path, '<row r="2"', '<row r="99999999999"')
    with pytest.raises(UserError, match="line 1048577: more rows or columns"):
        read_table(path)
    assert time.monotonic() - started < 15


def test_an_xlsx_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = sheet(tmp_path / "t.xlsx")
    edit_sheet(path, "</sheetData>", " " * 3_000_000 + "</sheetData>")
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(clinical, "XLSX_BYTES", 2_000_000)
    with pytest.raises(UserError, match="has 3 MB when unpacked, at most 2 are read") as error:
        read_table(path)
    assert error.value.code == "TABLE_TOO_LARGE"


@pytest.mark.parametrize("damage", ["<row", "</sheetData>"])
def test_a_damaged_xlsx_is_one_line(tmp_path, damage):
    path = sheet(tmp_path / "t.xlsx")
    edit_sheet(path, damage, "<<&nonsense;")
    with pytest.raises(UserError, match="t.xlsx: cannot be read as xlsx"):
        read_table(path)


def test_two_columns_of_one_name_in_autopet_tables(tmp_path):
    with pytest.raises(UserError, match="line 1: .*'age'.* twice"):
        read_metadata(table(tmp_path, "Subject ID,age,sex,age\n1,060Y,M,061Y\n"))
    assert read_metadata(table(tmp_path, "Subject ID,age,sex\n1,nan,M\n"))["1"][0].record.age is None
