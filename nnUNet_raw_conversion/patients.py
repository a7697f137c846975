"""What is known of the patients of a trial: their rows in the clinical table, their DICOM headers, the test list."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import pydicom

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.clinical import COLUMNS, OPTIONAL, ClinicalRecord, clinical_record, read_table
from nnUNet_raw_conversion.diagnoses import known_diagnosis
from nnUNet_raw_conversion.pseudonyms import Key, same_number
from nnUNet_raw_conversion.shown import secrets_of
from nnUNet_raw_conversion.tracers import tracer_name, tracer_of
from nnUNet_raw_conversion.trial import Visit, trial_in

PATIENT_COLUMNS = (*(name for name in COLUMNS if name not in OPTIONAL), "trial")
GHSG_TRIALS = ("HD16", "HD17", "HD18")

_WITH_TRIAL = re.compile(r"HD[ _-]?(\d\d)[\s,;/_-]+(\S.*)", re.I)


@dataclass(frozen=True)
class Table:
    """A clinical table by (trial or "", patient's number as `same_number` gives it)."""

    records: dict[tuple[str, str], ClinicalRecord]
    warnings: tuple[str, ...] = ()

    def with_trial(self, visit: Visit) -> Visit:
        """The visit with the trial that the table has for the patient, if nothing else tells it."""
        numbers = set(map(same_number, visit.numbers))
        trials = {trial for trial, number in self.records if trial and number in numbers}
        return replace(visit, trial=trials.pop()) if not visit.trial and len(trials) == 1 else visit

    def find(self, visit: Visit, case_id: str) -> ClinicalRecord | None:
        """The row of a visit's patient; rows may have pseudonyms as well."""
        for number in (*visit.numbers, case_id):
            for trial in (visit.trial, ""):
                if (trial, same_number(number)) in self.records:
                    return self.records[trial, same_number(number)]
        return None


def parse_columns(pairs: list[str]) -> dict[str, str]:
    """{"case_id": "PatNr"} of ["case_id=PatNr"].

    Raises:
        UserError: not of this form, or a name that we do not have.
    """
    columns = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    wrong = [pair for pair in pairs if "=" not in pair] + [name for name in columns if name not in PATIENT_COLUMNS]
    if wrong:
        raise UserError(f"--columns {wrong[0]}: say OURS=THEIRS with one of {', '.join(PATIENT_COLUMNS)} as ours")
    return columns


def read_patients(path: Path, columns: Mapping[str, str]) -> Table:
    """The clinical table of a trial, a row a patient; columns that we do not know are ignored.

    A stage, age or sex that makes no sense is left empty with a warning, since one typing error in hundreds of rows is
    no reason to stop; unless most of the column makes none, which then is another column.

    Args:
        columns: our names and the table's; the column `case_id` has the patients' numbers, `trial` (needed only where
            trials share numbers) HD18 or 18.

    Raises:
        UserError: naming file, line and column.
    """
    header, rows = read_table(path)
    lower = [name.lower() for name in header]
    place = {}
    for name in PATIENT_COLUMNS:
        wanted = columns.get(name, name)
        count = lower.count(wanted.lower())
        if count > 1 or (not count and (name in columns or name == "case_id")):
            what = "is there twice" if count else "is not there"
            raise UserError(f"{path}, line 1: column {wanted!r} {what}; correct it, or say --columns {name}=NAME")
        if count:
            place[name] = lower.index(wanted.lower())
    records: dict[tuple[str, str], ClinicalRecord] = {}
    odd = {name: _odd_cells([(line, cells[place[name]]) for line, cells in rows], name, path)
           for name in ("age", "sex", "stage") if name in place}  # fmt: skip
    for line, cells in rows:
        values = {name: cells[index] for name, index in place.items() if line not in odd.get(name, {})}
        trial = str(values.pop("trial", None) or "")
        try:
            record = clinical_record(**values)
            key = trial_in(trial) or trial_in(f"HD{trial.strip()}"), same_number(record.case_id)
            if key in records:
                raise UserError("case_id: is there twice; keep one row a patient, or name the column of the trial")
        except UserError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
        records[key] = record
    warnings = []
    for lines in filter(None, odd.values()):
        shown = ", ".join(map(str, list(lines)[:10])) + (", ..." if len(lines) > 10 else "")
        warnings.append(f"{path}, line {shown}: {next(iter(lines.values()))} (it is left empty now)")
    return Table(records, tuple(warnings))


def _odd_cells(cells: list[tuple[int, object]], name: str, path: Path) -> dict[int, str]:
    """What is wrong with the cells of a column that make no sense, by line.

    Raises:
        UserError: they are more than the others.
    """
    odd, good = {}, 0
    for line, cell in cells:
        try:
            good += getattr(clinical_record("-", **{name: cell}), name) is not None
        except UserError as error:
            odd[line] = str(error)
    if len(odd) > good:
        line, what = next(iter(odd.items()))
        raise UserError(f"{path}, line {line}: {what}")
    return odd


def record_of(
    case_id: str, visit: Visit, row: ClinicalRecord | None, diagnosis: str | None = None, tracer: str | None = None
) -> ClinicalRecord:
    """What is known of a case: its row, and what that leaves open from the headers.

    Args:
        row: of the user's table; what of it is no known word is left out.
        diagnosis, tracer: the user's word where neither has one.
    """
    row = in_known_words(row or ClinicalRecord(case_id), secrets_of(one.header for one in visit.series))[0]
    said = _from_header(visit.pet.header) if visit.pet else {}
    filled = {name: getattr(row, name) or said.get(name) for name in ("tracer", "age", "sex")}
    filled["tracer"] = filled["tracer"] or tracer
    return replace(row, case_id=case_id, diagnosis=row.diagnosis or diagnosis, **filled)


def in_known_words(
    row: ClinicalRecord, secrets: frozenset[str] = frozenset()
) -> tuple[ClinicalRecord, tuple[str, ...]]:
    """A row of a user's table as it may be written, and the names of the fields of which something was left out."""
    diagnosis, shortened = known_diagnosis(row.diagnosis, secrets)
    tracer = tracer_name(row.tracer)
    left = ("diagnosis",) * shortened + ("tracer",) * (tracer is None and row.tracer is not None)
    return replace(row, diagnosis=diagnosis, tracer=tracer), left


def diagnosis_of(visit: Visit, tracer: str | None) -> str | None:
    """The diagnosis that a trial is about: of those of the German Hodgkin Study Group, where the PET is one of FDG."""
    return "Hodgkin lymphoma" if visit.trial in GHSG_TRIALS and tracer in (None, "18F-FDG") else None


def left_out(shortened: Mapping[str, Sequence[str]], path: Path | None) -> list[str]:
    """What to say of fields that had other than known words: `shortened` has the cases by field."""
    return [
        f"{path}: {name} of {_few(cases)} has words that are none that we know, they are left out, for they could be "
        f"names; say --{name} for what all cases have, or write it in other words"
        for name, cases in shortened.items()
    ]


def still_unknown(records: Sequence[ClinicalRecord]) -> list[str]:
    """What to say of cases without tracer or diagnosis."""
    lacking = {name: [r.case_id for r in records if getattr(r, name) is None] for name in ("tracer", "diagnosis")}
    return [
        f"{name} of {_few(cases)} is unknown and stays empty; give it by --clinical, or --{name} for all that have none"
        for name, cases in lacking.items()
        if cases
    ]


def _few(cases: Sequence[str]) -> str:
    return f"{len(cases)} case{'s' * (len(cases) > 1)} ({', '.join(cases[:3])}{', ...' if len(cases) > 3 else ''})"


def other_sex(visit: Visit, row: ClinicalRecord | None) -> bool:
    """Whether the header of a visit's PET says another sex than its row, so that it may be the row of another."""
    said = _from_header(visit.pet.header)["sex"] if visit.pet else None
    return bool(row and row.sex and said and row.sex != said)


def read_test_list(path: Path, cases: Mapping[str, Visit]) -> set[str]:
    """The case ids of the patients in a file with one a line: number, trial and number ("HD18 12"), or pseudonym.

    Empty lines and what follows a # do not count. All time points of a patient are test cases.

    Raises:
        UserError: naming the line, never what is in it.
    """
    called: dict[str, set[tuple[str, str]]] = {}
    for case_id, visit in cases.items():
        names = {case_id.casefold(), *map(same_number, visit.numbers)}
        names |= {f"{visit.trial} {same_number(number)}".casefold() for number in visit.numbers if visit.trial}
        for name in names:
            called.setdefault(name, set()).add((visit.trial, visit.patient))
    chosen = set()
    for number, text in _test_lines(path):
        with_trial = _WITH_TRIAL.fullmatch(text)
        names = [same_number(text), text.casefold()]
        names += [f"hd{with_trial[1]} {same_number(with_trial[2])}"] if with_trial else []
        found = set().union(*(called.get(name, set()) for name in names))
        if len(found) != 1:
            what = (
                "patients of several trials; write the trial before the number, as HD18 12" if found else "no patient"
            )
            raise UserError(f"--test-list {path}, line {number}: is {what}{'' if found else ' of the input'}")
        chosen |= found
    return {case_id for case_id, visit in cases.items() if (visit.trial, visit.patient) in chosen}


def known_numbers(table: Table, keys: Iterable[Key], test_list: Path | None) -> set[str]:
    """All numbers of patients in the clinical table, the key table and the test list, as `same_number` gives them."""
    numbers = {number for _, number in table.records} | {same_number(key.patient.split("/")[-1]) for key in keys}
    for _, text in _test_lines(test_list) if test_list else ():
        with_trial = _WITH_TRIAL.fullmatch(text)
        numbers.add(same_number(with_trial[2] if with_trial else text))
    return numbers - {""}


def _test_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a test list that are not empty, each with its number.

    Raises:
        UserError: the file is missing or no text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"--test-list {path}: cannot be read as UTF-8 text; give a file with a patient a line"
        ) from None
    texts = [(number, line.split("#")[0].strip().strip(",;").strip()) for number, line in enumerate(lines, 1)]
    return [(number, text) for number, text in texts if text]


def _from_header(header: pydicom.Dataset) -> dict[str, object]:
    """Tracer, age in years and sex of a PET's header, as far as it says them."""
    said: dict[str, object] = {"tracer": tracer_of(header)}
    for name, keyword in (("age", "PatientAge"), ("sex", "PatientSex")):
        try:
            said[name] = getattr(clinical_record("-", **{name: str(header.get(keyword) or "")}), name)
        except UserError:  # a header that makes no sense is as good as none
            said[name] = None
    if said["age"] is None:
        said["age"] = _age(str(header.get("PatientBirthDate") or ""), str(header.get("StudyDate") or ""))
    return said


def _age(birth: str, study: str) -> float | None:
    """Completed years between two DICOM dates."""
    try:
        born, day = (datetime.strptime(text, "%Y%m%d") for text in (birth, study))
    except ValueError:
        return None
    years = day.year - born.year - ((day.month, day.day) < (born.month, born.day))
    return float(years) if 0 <= years <= 120 else None
