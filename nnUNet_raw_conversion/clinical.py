"""clinical.csv: who a case is, in the same few words everywhere (DESIGN contracts 4 and 5).

The one reader and writer of the project. Messages name file, line and field, never a cell: a table that a hospital
made may have a name, a patient number or a date of birth in any of them.
"""

from __future__ import annotations

import csv
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.files import renamed
from nnunet_fratmae.base.tables import cell_text, csv_text
from nnUNet_raw_conversion.tracers import tracer_name

SEXES = {
    **dict.fromkeys(("m", "male", "männlich", "maennlich"), "M"),
    **dict.fromkeys(("f", "female", "w", "weiblich"), "F"),
    **dict.fromkeys(("d", "divers", "diverse", "o", "other", "u"), None),
}
STAGES = {"1": "I", "2": "II", "3": "III", "4": "IV", "I": "I", "II": "II", "III": "III", "IV": "IV"}
# Where a table of the German Hodgkin Study Group has the risk group only, or the trial, of which there was one a group:
# HD16 early favourable, HD17 early unfavourable (also called intermediate), HD18 advanced. Letters and digits alone,
# without "stage" and "Stadium".
_FAVOURABLE = "(?:(?:un)?favou?rable|(?:un)?guenstig(?:es)?)?"
RISK_GROUPS = {
    "early": f"(?:early|limited|frueh(?:es)?){_FAVOURABLE}(?:intermediate)?|intermedi(?:ate|aer(?:es)?)|hd1[67]",
    "advanced": "advanced|fortgeschritten(?:es)?|hd18",
}
YEARS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}  # units of DICOM age strings (PS3.5, 6.2, AS)
# A sheet has 1,048,576 rows and 16,384 columns at most. A table of 10,000 patients with 100 columns is 30 MB unpacked.
XLSX_ROWS, XLSX_CELLS, XLSX_BYTES = 2**20, 20_000_000, 100_000_000
UNKNOWN = {"", "unknown", "unbekannt", "n/a", "na", "nan", "none", "null", "#n/a", "?", "-"}


@dataclass(frozen=True)
class ClinicalRecord:
    """One row of clinical.csv; None is unknown. Make it with `clinical_record`, which checks and normalises."""

    case_id: str
    tracer: str | None = None
    """ "18F-FDG", "18F-PSMA", "68Ga-PSMA" or the name of another tracer."""
    diagnosis: str | None = None
    age: float | None = None
    """Years, 0 to 120."""
    sex: str | None = None
    """ "M" or "F"."""
    stage: str | None = None
    """Ann Arbor or UICC stage without its suffixes: "I", "II", "III" or "IV"; "early" or "advanced" where only the risk
    group is known."""
    missing: str | None = None
    """ "CT" where the study has none and its channel is filled with air."""
    patient: str | None = None
    """A pseudonym that all studies of a patient share; None where this is the patient's only one."""


OPTIONAL = ("missing", "patient")
"""Columns that are written only if a case has them."""
COLUMNS = tuple(field.name for field in fields(ClinicalRecord))


def clinical_record(
    case_id: object,
    tracer: object = None,
    diagnosis: object = None,
    age: object = None,
    sex: object = None,
    stage: object = None,
    missing: object = None,
    patient: object = None,
) -> ClinicalRecord:
    """A checked record from what a table or a DICOM header says, in the words of this project.

    Raises:
        UserError: "FIELD: what is wrong, what to do".
    """
    name = " ".join(str(case_id).split()) if case_id is not None else ""
    if not name:
        raise UserError("case_id: is empty; every row needs the name of its case")
    return ClinicalRecord(name, _tracer(_text(tracer)), _text(diagnosis), _age(_text(age)), _sex(_text(sex)),
                          _stage(_text(stage)), _missing(_text(missing)), _text(patient))  # fmt: skip


def read_clinical(path: Path, columns: Mapping[str, str] | None = None) -> dict[str, ClinicalRecord]:
    """The records of a clinical table (.csv or .xlsx, see `read_table`) by case_id.

    The columns are case_id and any of tracer, diagnosis, age, sex, stage, missing, patient. An absent column and an
    empty cell are unknown.

    Args:
        columns: for a table with names of its own, our names and its: {"case_id": "PatNr", "stage": "AnnArbor"}. Other
            columns are then read if they have our names and ignored if not.

    Raises:
        UserError: naming file, line and field.
    """
    header, rows = read_table(path)
    position = _find_columns(path, header, columns)
    records: dict[str, ClinicalRecord] = {}
    first_line: dict[str, int] = {}
    for line, cells in rows:
        try:
            said = {name: cells[index] for name, index in position.items()}
            if str(said.get("age")).strip().lower() == "nan":  # what a program computed, not what somebody left empty
                raise UserError("age: is NaN, no number; give years from 0 to 120, or leave it empty if unknown")
            record = clinical_record(**said)
        except UserError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
        if record.case_id in records:
            there = first_line[record.case_id]
            raise UserError(f"{path}, line {line}: case_id: is there twice, as in line {there}; keep one of the rows")
        records[record.case_id], first_line[record.case_id] = record, line
    return records


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[object]]]]:
    """The column names of a table (its first line) and its rows that are not empty, each with the number of its line.

    .xlsx: the first sheet; cells are text, numbers, dates or None. Else UTF-8 text (with or without byte order mark),
    separated by commas, semicolons or tabs; cells are text. All rows are as long as the first.

    Raises:
        UserError: the file is missing or cannot be read, or a row has more cells than there are columns.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give the path of a csv or xlsx file")
    if path.suffix.lower() == ".xls":
        raise UserError(f"{path}: the old Excel format is not read; save it as xlsx or as 'CSV UTF-8'")
    lines = _xlsx_lines(path) if path.suffix.lower() == ".xlsx" else _csv_lines(path)
    _, first = next(iter(lines), (1, []))
    header = [" ".join(str(name).split()) if name is not None else "" for name in first]
    while header and not header[-1] and all(_is_empty(cell) for _, cells in lines for cell in cells[len(header) - 1 :]):
        header.pop()  # spreadsheets also leave empty columns at the end
    rows = []
    for line, cells in lines[1:]:
        if any(not _is_empty(cell) for cell in cells[len(header) :]):
            raise UserError(f"{path}, line {line}: more cells than columns; put a text that has the separator in it "
                            "in quotes, and give every column a name")  # fmt: skip
        if any(not _is_empty(cell) for cell in cells):  # spreadsheets leave empty rows at the end
            rows.append((line, (cells + [None] * len(header))[: len(header)]))
    return header, rows


def write_clinical(path: Path, records: Iterable[ClinicalRecord]) -> None:
    """Write clinical.csv, with the `OPTIONAL` columns only if a case has them; it is there whole or not at all.

    Raises:
        UserError: a record that `read_clinical` would refuse, or a case that is there twice.
    """
    rows: dict[str, tuple] = {}
    for record in records:
        record = clinical_record(*astuple(record))
        if record.case_id in rows:
            raise UserError(f"{path}: case_id {record.case_id!r} is there twice; keep one of the records")
        rows[record.case_id] = astuple(record)
    kept = [i for i, name in enumerate(COLUMNS) if name not in OPTIONAL or any(row[i] for row in rows.values())]
    # whole years as "61", not "61.0"; None is written as an empty cell
    cells = ([int(v) if isinstance(v, float) and v.is_integer() else v for v in (row[i] for i in kept)]
             for row in rows.values())  # fmt: skip
    content, path = csv_text([COLUMNS[i] for i in kept], cells).encode(errors="backslashreplace"), Path(path)
    if path.is_file() and path.read_bytes() == content:
        return
    with renamed(path) as partial:
        partial.write_bytes(content)


def name_patients(records: Mapping[str, ClinicalRecord], patient_of: Mapping[str, object]) -> dict[str, ClinicalRecord]:
    """The records by case, with `patient` set where a patient has several cases: the first of them gives the name.

    Args:
        patient_of: who a case is, in any form; it is not written.
    """
    first: dict[object, str] = {}
    for case_id in records:
        first.setdefault(patient_of[case_id], case_id)
    count = Counter(patient_of[case_id] for case_id in records)
    return {
        case_id: replace(record, patient=first[patient_of[case_id]]) if count[patient_of[case_id]] > 1 else record
        for case_id, record in records.items()
    }


def prompt(record: ClinicalRecord) -> str:
    """The text that pretraining aligns with the PET: `<tracer> 18F FDG <diagnosis> melanoma <age> 61 <sex> M`.

    A field that is unknown is left out with its tag; the age is in completed years (FratMAE paper, section 3).
    """
    values = {
        "tracer": record.tracer and record.tracer.replace("-", " "),
        "diagnosis": record.diagnosis,
        "age": None if record.age is None else int(record.age),
        "sex": record.sex,
    }
    return " ".join(f"<{tag}> {value}" for tag, value in values.items() if value is not None)


def _csv_lines(path: Path) -> list[tuple[int, list[object]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as 'CSV UTF-8'") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a csv or xlsx file") from None
    if "\0" in text:
        raise UserError(f"{path}: has zero bytes and is no UTF-8 text; save it as 'CSV UTF-8'", "TABLE_UNREADABLE")
    header = text.split("\n", 1)[0]
    # Not split at every character that Python takes for a line end: only \n and \r end a row of a csv file.
    lines = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$", text)
    separator = next((c for c in ",;\t" if c in header), ",")
    reader, rows, begin, columns = csv.reader(lines, delimiter=separator), [], 0, 0
    try:
        for row in reader:
            columns = columns or len(row)
            if _is_swallowed(lines[begin : reader.line_num], separator, columns, reader.line_num == len(lines)):
                raise UserError(f"{path}, line {begin + 1}: a quotation mark is opened and not closed, which makes one "
                                "row of this and the next; close or remove it", "TABLE_QUOTE")  # fmt: skip
            rows.append((reader.line_num, [cell_text(cell) for cell in row]))
            begin = reader.line_num
    except csv.Error as error:
        raise UserError(f"{path}, line {begin + 1}: {error}; is a quotation mark opened there and not closed? mend it, "
                        "or save it as 'CSV UTF-8' again", "TABLE_QUOTE") from None  # fmt: skip
    return rows


def _is_swallowed(lines: list[str], separator: str, columns: int, is_last: bool) -> bool:
    """Whether the lines of one row are more than one row, put together by a quotation mark that is not closed.

    Cells may have line ends in them. So the mark must be open at the end of the file, or closed in the middle of a
    cell, or each line have as many separators as a row.
    """
    if len(lines) == 1 and not is_last:
        return False
    try:
        list(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error:
        return len(lines) > 1 or lines[0].count('"') % 2 == 1
    return len(lines) > 1 and all(line.count(separator) == columns - 1 for line in lines)


def _xlsx_lines(path: Path) -> list[tuple[int, list[object]]]:
    """The rows of the first sheet that are not empty, and the first in any case."""
    import openpyxl  # only here: most tables are csv

    lines: list[tuple[int, list[object]]] = []
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
        if size > XLSX_BYTES:
            raise UserError(f"{path}: has {size / 1e6:.0f} MB when unpacked, at most {XLSX_BYTES / 1e6:.0f} are read; "
                            "leave the one sheet with a row a patient, or save that as 'CSV UTF-8'",
                            "TABLE_TOO_LARGE")  # fmt: skip
        # Read row by row: as a whole, one cell far out would make a table of 17 thousand million cells
        book = openpyxl.load_workbook(path, data_only=True, read_only=True)
        try:
            sheet, cells = book.worksheets[0], 0
            sheet.reset_dimensions()  # which the file may say wrongly
            for line, row in enumerate(sheet.iter_rows(values_only=True), 1):
                cells += len(row) + 1
                if line > XLSX_ROWS or cells > XLSX_CELLS:
                    raise UserError(f"{path}, line {line}: more rows or columns than a table of patients has; remove "
                                    "what is far out, or save it as 'CSV UTF-8'", "TABLE_TOO_LARGE")  # fmt: skip
                row = list(row)
                while row and row[-1] is None:
                    row.pop()
                if row or line == 1:
                    lines.append((line, [_xlsx_cell(cell) for cell in row]))
        finally:
            book.close()
    except (UserError, MemoryError):
        raise
    except Exception:  # a damaged file makes openpyxl raise nearly anything
        raise UserError(f"{path}: cannot be read as xlsx; save it without a password, or as 'CSV UTF-8'",
                        "TABLE_UNREADABLE") from None  # fmt: skip
    return lines


def _xlsx_cell(cell: object) -> object:
    if isinstance(cell, str):
        return cell_text(cell)
    # A spreadsheet has no whole numbers: patient 12 may be 12.0 in the file
    return int(cell) if isinstance(cell, float) and cell.is_integer() else cell


def _find_columns(path: Path, header: list[str], columns: Mapping[str, str] | None) -> dict[str, int]:
    """The position of each of our columns that the table has; UserError for an unknown, doubled or missing one."""
    known = ", ".join(COLUMNS)
    for name in columns or {}:
        if name not in COLUMNS:
            raise UserError(f"columns: {name!r} is none of ours; name one of {known}")
    lower = [name.lower() for name in header]
    position: dict[str, int] = {}
    for name in COLUMNS:
        wanted = (columns or {}).get(name, name)
        found = [index for index, there in enumerate(lower) if there == " ".join(wanted.split()).lower()]
        if len(found) > 1:
            raise UserError(f"{path}, line 1: column {wanted!r} is there twice; remove one")
        if found:
            position[name] = found[0]
        elif name in (columns or {}):
            raise UserError(f"{path}, line 1: no column {wanted!r}, which shall be {name}; correct the name")
    unknown = [name for name in header if name.lower() not in COLUMNS]
    if unknown and not columns:
        raise UserError(f"{path}, line 1: unknown column {unknown[0]!r}; rename or remove it (known: {known})")
    if "case_id" not in position:
        raise UserError(f"{path}, line 1: no column case_id; name the columns in the first line (known: {known})")
    return position


def _is_empty(cell: object) -> bool:
    return cell is None or not str(cell).strip()


def _text(value: object) -> str | None:
    text = " ".join(str(value).split()) if value is not None else ""
    return None if text.lower() in UNKNOWN else text


def _letters(text: str | None) -> str:
    """Letters and digits alone, in lower case, umlauts as two letters."""
    text = (text or "").lower().translate(str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss"}))
    return re.sub("[^a-z0-9]", "", text)


def _tracer(text: str | None) -> str | None:
    return tracer_name(text) or text


def _age(text: str | None) -> float | None:
    """Years, from a number (also with a decimal comma) or a DICOM age string such as 061Y, 018M, 003W, 010D."""
    if text is None:
        return None
    if match := re.fullmatch(r"(\d{1,3}) ?([DWMY])", text.upper()):
        age = int(match[1]) * YEARS[match[2]]
    else:
        try:
            age = float(text.replace(",", "."))
        except ValueError:
            age = -1.0
    if not 0 <= age <= 120:
        what = "is a date or a year" if re.search(r"\d{4}|\d[./-]\d+[./-]\d", text) else "is not a number"
        raise UserError(f"age: {what}; give years from 0 to 120 (or 061Y, 018M), or leave it empty if unknown")
    return age


def _sex(text: str | None) -> str | None:
    if text is not None and text.lower() not in SEXES:
        raise UserError("sex: is not M or F; mend it, or leave it empty if unknown")
    return SEXES.get((text or "d").lower())


def _stage(text: str | None) -> str | None:
    """The suffixes of Ann Arbor (A, B, E, S, X) and UICC (A, B, C, with a digit) are dropped; "3.0" is III."""
    if text is None:
        return None
    stage, suffixes = r"(?:(?:STAGE|STADIUM)[ :]*)?(IV|I{1,3}|[1-4])", r"(?:\.0|(?:[ /_.,()+-]*[ABCESX]\d?)*\)?)"
    if match := re.fullmatch(stage + suffixes, text.upper()):
        return STAGES[match[1]]
    key = re.sub("stage|stadium", "", _letters(text))
    for group, pattern in RISK_GROUPS.items():
        if re.fullmatch(pattern, key):
            return group
    raise UserError("stage: is not I, II, III, IV, early or advanced; mend it, or leave it empty if unknown")


def _missing(text: str | None) -> str | None:
    if text is not None and text.upper() != "CT":
        raise UserError("missing: is not CT; write CT for a study without one, or leave it empty")
    return text and "CT"
