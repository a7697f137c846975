"""clinical.csv: who a case is, in the same few words everywhere (DESIGN contracts 4 and 5)."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from nnUNet_raw_conversion.command import UserError

# A tracer is compared by its letters and digits alone: "[18F]F-PSMA-1007" is "18ffpsma1007" here.
_F18, _GA68 = "(?:18f|f18)f?", "(?:68ga|ga68)(?:ga)?"
_FDG = "(?:fdg|fluoro?de[sz]?oxyglu[ck]ose)"
TRACERS = {
    "18F-FDG": f"(?:{_F18})?{_FDG}(?:{_F18})?",
    "18F-PSMA": f"{_F18}(?:rh)?psma[0-9]*|(?:rh)?psma(?:1007|7|73)?{_F18}|psma1007|(?:{_F18})?dcfpyl",
    "68Ga-PSMA": f"{_GA68}psma(?:11|617|it)?|psma(?:11|617|it)?{_GA68}|psma11",
}
SEXES = {
    **dict.fromkeys(("m", "male", "männlich", "maennlich"), "M"),
    **dict.fromkeys(("f", "female", "w", "weiblich"), "F"),
    **dict.fromkeys(("d", "divers", "diverse", "o", "other", "u"), None),
}
STAGES = {"1": "I", "2": "II", "3": "III", "4": "IV", "I": "I", "II": "II", "III": "III", "IV": "IV"}
UNKNOWN = {"", "unknown", "unbekannt", "n/a", "na", "nan", "none", "?", "-"}


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
    """Ann Arbor or UICC stage without its suffixes: "I", "II", "III" or "IV"."""


COLUMNS = tuple(field.name for field in fields(ClinicalRecord))


def clinical_record(
    case_id: object,
    tracer: object = None,
    diagnosis: object = None,
    age: object = None,
    sex: object = None,
    stage: object = None,
) -> ClinicalRecord:
    """A checked record from what a table or a DICOM header says, in the words of this project.

    Raises:
        UserError: "FIELD 'VALUE': what is wrong, what to do".
    """
    name = " ".join(str(case_id).split()) if case_id is not None else ""
    if not name:
        raise UserError("case_id is empty; every row needs the name of its case")
    return ClinicalRecord(name, _tracer(_text(tracer)), _text(diagnosis), _age(_text(age)), _sex(_text(sex)),
                          _stage(_text(stage)))  # fmt: skip


def read_clinical(path: Path) -> dict[str, ClinicalRecord]:
    """The records of a clinical.csv by case_id.

    The file is UTF-8 (with or without byte order mark), separated by commas or semicolons; its columns are case_id
    and any of tracer, diagnosis, age, sex, stage. An absent column and an empty cell are unknown.

    Raises:
        UserError: naming file, line and field.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as 'CSV UTF-8'") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a csv file") from None
    header = text.split("\n", 1)[0]
    # Not split at every character that Python takes for a line end: only \n and \r end a row of a csv file.
    lines = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$", text)
    reader = csv.DictReader(lines, delimiter=";" if ";" in header and "," not in header else ",")
    _check_columns(path, reader)
    records: dict[str, ClinicalRecord] = {}
    try:
        for row in reader:
            if row.pop(None, None):
                raise UserError("more cells than columns; put a text that has the separator in it in quotes")
            if not any(row.values()):  # spreadsheets leave such rows at the end
                continue
            record = clinical_record(**row)
            if record.case_id in records:
                raise UserError(f"case_id {record.case_id!r} is there twice; keep one of the rows")
            records[record.case_id] = record
    except (UserError, csv.Error) as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    return records


def write_clinical(path: Path, records: Iterable[ClinicalRecord]) -> None:
    """Write clinical.csv with all columns; the file is there whole or not at all.

    Raises:
        UserError: a record that `read_clinical` would refuse, or a case that is there twice.
    """
    rows: dict[str, tuple] = {}
    for record in records:
        record = clinical_record(*astuple(record))
        if record.case_id in rows:
            raise UserError(f"{path}: case_id {record.case_id!r} is there twice; keep one of the records")
        rows[record.case_id] = astuple(record)
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        # whole years as "61", not "61.0"; None is written as an empty cell
        writer.writerows([int(v) if isinstance(v, float) and v.is_integer() else v for v in row]
                         for row in rows.values())  # fmt: skip
    os.replace(partial, path)


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


def _check_columns(path: Path, reader: csv.DictReader) -> None:
    """Bring the column names of `reader` into shape; UserError for an unknown, doubled or missing one."""
    reader.fieldnames = names = [name.strip().lower() for name in reader.fieldnames or []]
    known = ", ".join(COLUMNS)
    for name in names:
        if name not in COLUMNS:
            raise UserError(f"{path}, line 1: unknown column {name!r}; rename or remove it (known columns: {known})")
        if names.count(name) > 1:
            raise UserError(f"{path}, line 1: column {name!r} is there twice; remove one")
    if "case_id" not in names:
        raise UserError(f"{path}, line 1: no column case_id; name the columns in the first line (known: {known})")


def _text(value: object) -> str | None:
    text = " ".join(str(value).split()) if value is not None else ""
    return None if text.lower() in UNKNOWN else text


def _tracer(text: str | None) -> str | None:
    key = re.sub("[^a-z0-9]", "", (text or "").lower())
    return next((name for name, pattern in TRACERS.items() if re.fullmatch(pattern, key)), text)


def _age(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        age = float(text.replace(",", "."))
    except ValueError:
        age = -1.0
    if not 0 <= age <= 120:
        raise UserError(f"age {text!r}: is not a number of years from 0 to 120; mend it, or leave it empty if unknown")
    return age


def _sex(text: str | None) -> str | None:
    if text is not None and text.lower() not in SEXES:
        raise UserError(f"sex {text!r}: is not M or F; mend it, or leave it empty if unknown")
    return SEXES.get((text or "d").lower())


def _stage(text: str | None) -> str | None:
    """The suffixes of Ann Arbor (A, B, E, S, X) and UICC (A, B, C, with a digit) are dropped; "3.0" is III."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:STAGE |STADIUM )?(IV|I{1,3}|[1-4])(?:[ABCESX]+\d?|\.0)?", text.upper())
    if not match:
        raise UserError(f"stage {text!r}: is not I, II, III or IV; mend it, or leave it empty if unknown")
    return STAGES[match[1]]
