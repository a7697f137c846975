"""fratmae_convert_autopet: the autoPET III release, or the older per-study layout, to a raw dataset.

What is public about the data and used here (autopet-iii.grand-challenge.org, TCIA FDG-PET-CT-Lesions and
PSMA-PET-CT-Lesions): the release has imagesTr/{fdg|psma}_<patient>_<study>_000{0,1}.nii.gz, labelsTr,
splits_final.json, fdg_metadata.csv (a row a DICOM series: Subject ID, Study UID, Study Date, File Location, diagnosis,
age as 060Y, sex) and psma_metadata.csv (a row a study: Subject ID, Study Date, age, pet_radionuclide). The older layout
has PETCT_<patient>/<study>/{CTres,SUV,SEG}.nii.gz beside "Clinical Metadata FDG PET_CT Lesions.csv". <study> begins
with a (shifted) date and may go on with a description and the last five digits of the study's UID. None of that gets
into the dataset: a case is called {fdg|psma}_<patient>_<number of the study, by date>.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nnunet_fratmae.base.command import UserError, run_command
from nnUNet_raw_conversion.clinical import ClinicalRecord, clinical_record, name_patients, read_table
from nnUNet_raw_conversion.conversion import Loaded, Study, convert_studies
from nnUNet_raw_conversion.diagnoses import known_diagnosis
from nnUNet_raw_conversion.geometry import read_image
from nnUNet_raw_conversion.raw_dataset import RawDataset
from nnUNet_raw_conversion.splits import (
    SPLITS_FILE,
    Splits,
    keep_cases,
    make_splits,
    read_splits,
    shared_patients,
    write_splits,
)
from nnUNet_raw_conversion.tracers import tracer_name

COHORTS = {"petct": "fdg", "psma": "psma"}  # by the first word of a patient's folder
RELEASE_FILE = re.compile(r"((fdg|psma)_([0-9a-z]+)_(.+?))(?:_000[01])?\.nii\.gz", re.IGNORECASE)
PATIENT_FOLDER = re.compile(r"(petct|psma)_([0-9a-z]+)", re.IGNORECASE)
STUDY_FILES = ("CTres.nii.gz", "SUV.nii.gz", "SEG.nii.gz")
# Names of the tables' columns by what they mean, compared by their letters alone
MEANINGS = {
    "subject": "(subject|patient)(id)?",
    "location": "filelocation",
    "uid": "study(instance)?uid",
    "date": "studydate",
    "age": "(patient)?age",
    "sex": "(patient)?sex|gender",
    "diagnosis": "diagnosis",
    "nuclide": "(pet)?radionuclide|tracer|radiopharmaceutical",
}
FIELDS = ("tracer", "diagnosis", "age", "sex")
DIAGNOSES = {"negative": "negative control"}  # the others are our words but for case and underscore: LUNG_CANCER


@dataclass(frozen=True)
class Scan:
    """The files of one study. `study` is the part of its name that has the date; it is never shown."""

    cohort: str
    patient: str
    study: str
    ct: Path
    pet: Path
    lesions: Path


@dataclass(frozen=True)
class Row:
    """A row of a metadata table: what it says, and by what its study is known: date, end of the UID, folder name."""

    line: int
    record: ClinicalRecord
    date: str
    uid: str
    places: frozenset[str]


def find_scans(source: Path) -> tuple[Path, list[Scan]]:
    """The folder of the data, which is `source` or one folder in it, and the studies there in either layout.

    Raises:
        UserError: neither layout, or files that are not named as in it.
    """
    if not source.is_dir():
        raise UserError(f"-i {source}: there is no such folder")
    below = sorted(p for p in source.iterdir() if p.is_dir())
    found = [source] if _holds_data(source) else [folder for folder in below if _holds_data(folder)]
    if not found:
        raise UserError(f"-i {source}: is neither the autoPET III release (imagesTr with fdg_* and psma_* files, "
                        "labelsTr) nor the older layout (PETCT_*/<study>/{CTres,SUV,SEG}.nii.gz); give the folder that "
                        "holds one of them")  # fmt: skip
    if len(found) > 1:
        raise UserError(f"-i {source}: {len(found)} folders in it hold such data; convert one after the other")
    return found[0], _release_scans(found[0]) if (found[0] / "imagesTr").is_dir() else _folder_scans(found[0])


def _holds_data(folder: Path) -> bool:
    return (folder / "imagesTr").is_dir() or any(PATIENT_FOLDER.fullmatch(p.name) for p in folder.iterdir())


def _release_scans(folder: Path) -> list[Scan]:
    images, labels = folder / "imagesTr", folder / "labelsTr"
    files = [*images.glob("[!.]*.nii.gz"), *labels.glob("[!.]*.nii.gz")]
    matches = [match for file in files if (match := RELEASE_FILE.fullmatch(file.name))]
    if len(matches) < len(files) or not files:
        what = f"{len(files) - len(matches)} of {len(files)} files are not" if files else "no files"
        raise UserError(f"-i {folder}/imagesTr: {what} named {{fdg|psma}}_<patient>_<study>_000{{0,1}}.nii.gz as in "
                        "the autoPET III release; for data of your own use fratmae_convert_pairs")  # fmt: skip
    return [
        Scan(cohort.lower(), patient.lower(), study, images / f"{case}_0000.nii.gz", images / f"{case}_0001.nii.gz",
             labels / f"{case}.nii.gz")
        for case, cohort, patient, study in {match.groups() for match in matches}
    ]  # fmt: skip


def _folder_scans(folder: Path) -> list[Scan]:
    scans = []
    for patient in folder.iterdir():
        if patient.is_dir() and (match := PATIENT_FOLDER.fullmatch(patient.name)):
            cohort, name = COHORTS[match[1].lower()], match[2].lower()
            for study in patient.iterdir():
                files = [study / file for file in STUDY_FILES]
                if any(file.exists() for file in files):
                    scans.append(Scan(cohort, name, study.name, *files))
    if not scans:
        raise UserError(f"-i {folder}: no study has {', '.join(STUDY_FILES)}; make them of the DICOM files first "
                        "(tcia_dicom_to_nifti.py of autoPET), or use fratmae_convert_ghsg")  # fmt: skip
    return scans


def name_cases(scans: list[Scan]) -> dict[str, Scan]:
    """The studies by case id, in the order of the ids; those of one patient are numbered by date, from 1."""
    cases, seen = {}, Counter()
    for scan in sorted(scans, key=lambda s: (s.cohort, s.patient, _date(s.study), s.study)):
        seen[scan.cohort, scan.patient] += 1
        cases[f"{scan.cohort}_{scan.patient}_{seen[scan.cohort, scan.patient]}"] = scan
    return cases


def find_tables(source: Path, folder: Path) -> list[Path]:
    """The metadata tables beside the data, by their names."""
    names = re.compile(r"(fdg|psma)_metadata.*\.(csv|xlsx)|clinical.*metadata.*\.(csv|xlsx)", re.IGNORECASE)
    return sorted({file for place in (source, folder) for file in place.iterdir() if names.fullmatch(file.name)})


def read_metadata(path: Path) -> dict[str, list[Row]]:
    """The rows of a metadata table by patient.

    Raises:
        UserError: what `read_table` or `clinical_record` raise, or columns that a metadata table has are missing.
    """
    header, rows = read_table(path)
    letters = [re.sub("[^a-z]", "", name.lower()) for name in header]
    if twice := [name for i, name in enumerate(header) if name and header.index(name) < i and _meaning(letters[i])]:
        raise UserError(f"{path}, line 1: column {twice[0]!r} is there twice; remove one")
    position = {
        meaning: next((i for i, name in enumerate(letters) if re.fullmatch(names, name)), None)
        for meaning, names in MEANINGS.items()
    }
    if position["subject"] is None or all(position[m] is None for m in ("age", "sex", "diagnosis", "nuclide")):
        raise UserError(f"{path}, line 1: no column 'Subject ID', or none of age, sex, diagnosis and pet_radionuclide; "
                        "give a metadata table of autoPET")  # fmt: skip
    patients: defaultdict[str, list[Row]] = defaultdict(list)
    for line, cells in rows:
        said = {m: "" if i is None or cells[i] is None else str(cells[i]).strip() for m, i in position.items()}
        diagnosis = said["diagnosis"].replace("_", " ").lower()
        tracer = said["nuclide"]
        if tracer and not re.search("psma|fdg", tracer, re.IGNORECASE):
            tracer += " PSMA"
        try:
            known, _ = known_diagnosis(DIAGNOSES.get(diagnosis, diagnosis))
            record = clinical_record("?", tracer_name(tracer), known, said["age"], said["sex"])
        except UserError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
        places = frozenset(" ".join(part.split()) for part in re.split(r"[/\\]", said["location"]) if part)
        subject = re.sub("^(petct|psma|fdg)_", "", said["subject"].lower())
        patients[subject].append(Row(line, record, _date(said["date"]), said["uid"][-5:], places))
    return patients


def _meaning(letters: str) -> bool:
    return any(re.fullmatch(names, letters) for names in MEANINGS.values())


def describe(case_id: str, scan: Scan, tables: dict[Path, dict[str, list[Row]]]) -> ClinicalRecord:
    """What the tables say about a study. Of rows about other studies of the patient the sex is taken.

    The PSMA cohort are men with prostate cancer; its table says neither. A study of theirs without a lesion keeps the
    diagnosis, for it is the patient's and not to be read off the label.

    Raises:
        UserError: two rows of the same study differ.
    """
    said: dict[str, object] = {}
    for path, patients in tables.items():
        rows, names = _rows_of(scan, patients.get(scan.patient, []))
        for name in names:
            values = {getattr(row.record, name): row.line for row in rows if getattr(row.record, name) is not None}
            if len(values) > 1:
                lines = " and ".join(map(str, sorted(values.values())[:2]))
                what = "radionuclide" if name == "tracer" else name
                raise UserError(f"{path}, lines {lines}: {what} differs for the same study; correct or remove one")
            for value in values:
                said.setdefault(name, value)
    if scan.cohort == "fdg":
        said["tracer"] = "18F-FDG"
    else:
        said = {"tracer": "PSMA", "diagnosis": "prostate cancer", "sex": "M"} | said
    return clinical_record(case_id, **said)


def _rows_of(scan: Scan, rows: list[Row]) -> tuple[list[Row], tuple[str, ...]]:
    """Of the rows of a patient those of the study, and the fields that they tell."""
    digits = re.search(r"-(\d{5})$", scan.study)
    date, uid, place = _date(scan.study), digits and digits[1], " ".join(scan.study.split())
    of_study = any(not (row.date or row.uid or row.places) for row in rows)  # a table without them has a row a patient
    for same in (
        lambda row: date and row.date == date,
        lambda row: uid and row.uid == uid,
        lambda row: place in row.places,
    ):
        if found := [row for row in rows if same(row)]:
            rows, of_study = found, True
    return rows, FIELDS if of_study else ("sex",)


def _date(text: str) -> str:
    """YYYYMMDD of a text that begins with 2005-08-13, 08-13-2005, 8/13/2005 or 13.8.2005, else ""."""
    if match := re.match(r"(\d{4})[-/.]?(\d\d)[-/.]?(\d\d)(?!\d)", text):
        year, month, day = match.groups()
    elif match := re.match(r"(\d{1,2})[-/](\d{1,2})[-/](\d{4})", text):
        month, day, year = match.groups()
    elif match := re.match(r"(\d{1,2})\.(\d{1,2})\.(\d{4})", text):
        day, month, year = match.groups()
    else:
        return ""
    return f"{year}{int(month):02d}{int(day):02d}"


def load_scan(scan: Scan) -> Loaded:
    """Read the three images of a study; messages have no path, which has a date."""
    files = {"CT": scan.ct, "PET": scan.pet, "segmentation": scan.lesions}
    notes: list[str] = []
    ct, pet, lesions = (read_image(path, what, notes) for what, path in files.items())
    used = {"CT": "resampled to the PET by the authors", "PET": "SUVbw by the authors"}
    return Loaded(ct=ct, pet=pet, lesions=lesions, notes=list(dict.fromkeys(notes)), used=used, rois=[])


def convert_autopet(args: argparse.Namespace) -> None:
    """The command: what can be wrong with names, tables and splits is looked at before the first image is read."""
    folder, scans = find_scans(args.i)
    cases = name_cases(scans)
    paths = args.metadata if args.metadata is not None else find_tables(args.i, folder)
    tables = {path: read_metadata(path) for path in paths}
    records = {case: describe(case, scan, tables) for case, scan in cases.items()}
    records = name_patients(records, {case: (scan.cohort, scan.patient) for case, scan in cases.items()})
    splits = _release_splits(folder, cases)
    _print_known(list(records.values()), paths)

    dataset = RawDataset(args.d, args.n)
    # The name of the study counts as well: the number in the case id is another when the patient gets an earlier one
    studies = [
        Study(case, records[case], "Tr", partial(load_scan, scan), (scan.study, scan.ct, scan.pet, scan.lesions))
        for case, scan in cases.items()
    ]

    def complete(folder: Path) -> None:
        _write_splits(folder, splits, cases, records)

    if convert_studies(dataset, studies, {"command": "fratmae_convert_autopet"}, args.np, complete=complete):
        sys.exit(1)  # which cases, and why, has been said


def _release_splits(folder: Path, cases: dict[str, Scan]) -> Splits:
    """The release's splits with our case ids if they keep patients apart, else none, and a line that says so."""
    path = folder / SPLITS_FILE
    if not path.exists():
        return []
    splits = read_splits(path, {f"{s.cohort}_{s.patient}_{s.study}".lower(): case for case, s in cases.items()})
    if shared := shared_patients(splits, {case: scan.patient for case, scan in cases.items()}):
        print(f"warning: {path} is not used: it has {len(shared)} patients in training and in validation of the same "
              "fold; a split by patients is made instead", file=sys.stderr)  # fmt: skip
        return []
    return splits


def _write_splits(folder: Path, splits: Splits, cases: dict[str, Scan], records: dict[str, ClinicalRecord]) -> None:
    """splits_final.json for the cases that could be converted."""
    there = {case for case in cases if (folder / "labelsTr" / f"{case}.nii.gz").exists()}
    kept = keep_cases(splits, there)
    made = kept or make_splits(
        {case: cases[case].patient for case in there},
        {case: f"{records[case].tracer} {records[case].diagnosis}" for case in there},
    )
    write_splits(folder, made)
    if not made:
        print(f"no {SPLITS_FILE}: it takes studies of two patients")
        return
    whose = "the release's" if kept else "made by patients"
    print(f"{SPLITS_FILE}: {len(made)} folds, {whose}; no patient is in training and validation of the same fold")


def _print_known(records: list[ClinicalRecord], paths: list[Path]) -> None:
    if not paths:
        print("warning: no metadata table found (fdg_metadata.csv, psma_metadata.csv or 'Clinical Metadata FDG PET_CT "
              "Lesions.csv'), so age, sex and diagnosis stay unknown; name it with --metadata",
              file=sys.stderr)  # fmt: skip
    known = {name: sum(getattr(r, name) is not None for r in records) for name in FIELDS}
    print(f"{len(records)} studies; known: " + ", ".join(f"{name} of {n}" for name, n in known.items()))


def main() -> None:
    """The console script fratmae_convert_autopet."""
    parser = argparse.ArgumentParser(
        prog="fratmae_convert_autopet", description="The autoPET III release (imagesTr, labelsTr, metadata), or the "
        "older layout (PETCT_*/<study>/{CTres,SUV,SEG}.nii.gz), to a raw dataset. Cases are called "
        "{fdg|psma}_<patient>_<number of the study, by date>. A run that was stopped goes on where it was.",
    )  # fmt: skip
    parser.add_argument("-i", type=Path, required=True, metavar="DIR", help="folder of the unpacked data")
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="dataset ID, 1 to 999")
    parser.add_argument("-n", default="AutoPET", metavar="NAME", help="dataset name [AutoPET]")
    parser.add_argument("--metadata", type=Path, nargs="+", metavar="FILE", help="metadata tables, csv or xlsx "
                        "[fdg_metadata.csv, psma_metadata.csv, Clinical Metadata*.csv beside the data]")  # fmt: skip
    parser.add_argument("-np", type=int, default=4, metavar="N", help="number of processes, up to 4 GB each [4]")
    run_command(parser, convert_autopet)


if __name__ == "__main__":
    main()
