"""From studies to a raw dataset, one case at a time: what all converters share, and what a killed run goes on with."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_fratmae.base.command import UserError, dataset_number
from nnunet_fratmae.base.files import WriteError, writing_to
from nnunet_fratmae.base.memory import fitting
from nnunet_fratmae.base.pool import KILLED, map_cases
from nnunet_fratmae.base.tables import csv_text
from nnUNet_raw_conversion.checks import checked_case
from nnUNet_raw_conversion.clinical import ClinicalRecord, write_clinical
from nnUNet_raw_conversion.geometry import parse_grid
from nnUNet_raw_conversion.pictures import draw_case, index_page
from nnUNet_raw_conversion.raw_dataset import (
    PARTS,
    RawDataset,
    case_files,
    new_file,
    read_json,
    remove_case,
    write_case,
    write_text,
)

# Those two ends nnU-Net takes for parts of other files' names
CASE_NAME = re.compile(r"[A-Za-z0-9_.-]+(?<!_0000)(?<!_seg)")
REPORT, ROIS = "conversion_report.csv", "conversion_rois.csv"
COLUMNS = ("case_id", "status", "part", "used", "notes", "error", "code", "grid", "lesion_ml", "suv_max", "seconds")


TASTED, TASTE = 8, 4096
"""Files of a case, and bytes from the middle of each, that tell whether it is the same case as before."""


@dataclass
class Loaded:
    """The images of one study as a loader found them."""

    ct: sitk.Image | None
    """HU, any grid; None where it is missing and may be."""
    pet: sitk.Image
    """SUVbw in g/ml."""
    lesions: sitk.Image | None
    """0 and 1 on the grid of `pet` or `ct`."""
    notes: list[str] = field(default_factory=list)
    """What the user should know, one sentence each."""
    used: dict[str, str] = field(default_factory=dict)
    """What was taken: {"PET": "FDG WB AC, 299 slices, BQML, decay START"}."""
    rois: list[dict] = field(default_factory=list)
    """Rows of the table of ROIs, by column name."""


@dataclass(frozen=True)
class Study:
    """A case to be made. Nothing of it that is shown (case_id, record, messages of `load`) may identify a patient."""

    case_id: str
    record: ClinicalRecord
    part: str
    """ "Tr" labelled training, "Ts" test, "Pt" images for pretraining."""
    load: Callable[[], Loaded]
    """Picklable (a functools.partial of a module's function); a UserError of it is told as the case's error."""
    inputs: Sequence[object] = ()
    """What the case is made of: files, of which size and time of change count, and settings of this case alone, by
    their repr. The case is converted anew when they change."""
    memory: int = 0
    """Bytes that converting it needs at most, 0 if that is not known."""


def convert_studies(
    dataset: RawDataset,
    studies: Sequence[Study],
    options: dict,
    processes: int,
    strict: bool = False,
    complete: Callable[[Path], None] | None = None,
) -> int:
    """Convert all studies into `dataset`, with clinical.csv, a report, and pictures; the number of cases that failed.

    A run that was stopped, even killed, goes on where it was with the same call: cases that are done are kept while
    `Study.inputs` and part are the same. A case that fails does not stop the others; it is in the report.

    Args:
        options: what holds for all cases, as JSON, "grid" (see `geometry.target_grid`) among them. A dataset that was
            begun with others is refused.
        strict: the dataset must be new, and one case that fails ends in a UserError with all errors and no dataset.
        complete: called with the folder of the dataset when all cases are in it, before it takes its place.

    Raises:
        UserError: as above, doubled or unusable case names, cases in the dataset that are no studies any more, no case
            that can be converted, or a target that cannot be written to.
    """
    check_names([study.case_id for study in studies])
    parse_grid(options.get("grid", "pet"))
    if processes < 1:
        raise UserError(f"-np {processes}: give at least 1 process")
    with dataset.locked():
        return _convert_all(dataset, studies, options, processes, strict, complete)


def _convert_all(
    dataset: RawDataset,
    studies: Sequence[Study],
    options: dict,
    processes: int,
    strict: bool,
    complete: Callable[[Path], None] | None,
) -> int:
    """`convert_studies`, while no other command writes the dataset."""
    if strict:
        dataset.refuse_existing()
    rows = _resume(dataset, studies, options)
    folder = dataset.where
    todo = [study for study in studies if study.case_id not in rows]
    if rows:
        print(f"{len(rows)} of {len(studies)} cases are done already")
    processes, line = fitting(min(processes, max(len(todo), 1)), max((study.memory for study in todo), default=0))
    if line:
        print(line, file=sys.stderr)
    convert = partial(convert_study, folder=folder, grid=options.get("grid", "pet"))
    try:
        with tqdm(total=len(studies), initial=len(rows), desc="cases", smoothing=0, disable=not todo) as progress:
            for row in map_cases(convert, todo, processes, partial(_killed, folder=folder)):
                rows[row["case_id"]] = row
                progress.update()
                if row["error"] and not strict:
                    progress.write(f"{row['case_id']}: {row['error']}", sys.stderr)
    except KeyboardInterrupt:
        print(f"stopped; say the same again to go on (what is done is kept in {folder})", file=sys.stderr)
        raise
    failed = sorted(case_id for case_id, row in rows.items() if row["error"])
    if failed and strict:
        shutil.rmtree(folder)
        errors = [f"{case_id}: {rows[case_id]['error']}" for case_id in failed]
        bad = f"{len(failed)} of {len(studies)} cases cannot be converted, so nothing was written:"
        raise UserError("\n".join([bad, *errors]))
    ordered = [rows[study.case_id] for study in studies]
    _write_tables(folder, studies, ordered, dataset.folder.name)
    if len(failed) == len(studies):
        raise UserError(f"none of {len(studies)} cases could be converted; the reasons are in {folder / REPORT}")
    if complete:
        complete(folder)
    dataset.finish()
    _print_summary(dataset.folder, ordered, failed)
    return len(failed)


def convert_study(study: Study, folder: Path, grid: str) -> dict:
    """Load, check, write and draw one case below `folder`, and last its row as conversion/<case_id>.json.

    Returns:
        The row: `COLUMNS`, rois, missing_ct, inputs (a hash) and files (sizes by name). Errors of the case are in it.

    Raises:
        WriteError: the target cannot be written to, which is no fault of this case.
    """
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK's warnings name files, whose folders may be patients' names
    started = time.monotonic()
    row = _new_row(study)
    _write_row(folder, {**row, "status": "begun"})  # so that the next run knows whose files it may find
    try:
        _convert(study, folder, grid, row)
    except WriteError:
        raise
    except UserError as error:
        row["error"], row["code"] = str(error), error.code
        row["rois"] = getattr(error, "rois", row["rois"])  # of dicom.lesions.RoisError
    except MemoryError:
        row["error"] = "the memory is too small for it; try a smaller -np"
    except Exception as error:  # of one broken file in hundreds; its text may name a patient and is not shown
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}"
        row["error"] = f"cannot be converted ({what}); are its files damaged? if not, please report this"
    row["seconds"] = round(time.monotonic() - started, 2)
    return _finished(row, folder)


def _killed(study: Study, folder: Path) -> dict:
    """The row of a case whose process was killed."""
    return _finished({**_new_row(study), "error": f"its {KILLED}; try a smaller -np"}, folder)


def _new_row(study: Study) -> dict:
    return {**dict.fromkeys(COLUMNS), "case_id": study.case_id, "part": study.part, "used": {}, "notes": [], "rois": [],
            "missing_ct": False, "inputs": _fingerprint(study), "files": {}}  # fmt: skip


def _finished(row: dict, folder: Path) -> dict:
    if row["error"]:
        remove_case(folder, row["case_id"])
    row["status"] = "failed" if row["error"] else "done"
    _write_row(folder, row)
    return row


def check_names(case_ids: Sequence[str]) -> None:
    """Raises UserError if nnU-Net cannot have files of these names, or one is there twice."""
    if not case_ids:
        raise UserError("there is no case to convert")
    wrong = [name for name in case_ids if not CASE_NAME.fullmatch(name)]
    if wrong:
        raise UserError(f"rename the case {wrong[0]!r} ({len(wrong)} such): a case name has only letters, digits, "
                        "'_', '.' and '-', and not _0000 or _seg at its end")  # fmt: skip
    seen: set[str] = set()
    for name in case_ids:
        if name.lower() in seen:  # file systems may not tell Case from case
            raise UserError(f"the case {name} is there twice; give every case a name of its own")
        seen.add(name.lower())


def _convert(study: Study, folder: Path, grid: str, row: dict) -> None:
    """All of `convert_study` that may fail; fills `row` as it goes."""
    if study.part not in PARTS:
        raise ValueError(f"part {study.part!r}")
    loaded = study.load()
    row.update(used=loaded.used, notes=list(loaded.notes), rois=loaded.rois, missing_ct=loaded.ct is None)
    lesions = None if study.part == "Pt" else loaded.lesions
    ct, pet, lesions, notes = checked_case(loaded.ct, loaded.pet, lesions, grid)
    del loaded  # a CT on its own grid takes more memory than all that follows
    row["notes"] += notes
    files = write_case(folder, study.case_id, ct, pet, lesions, study.part)

    suv, hu = sitk.GetArrayViewFromImage(pet), sitk.GetArrayViewFromImage(ct)
    mask = None if lesions is None else sitk.GetArrayViewFromImage(lesions) > 0
    spacing = pet.GetSpacing()
    row["grid"] = f"{'x'.join(map(str, pet.GetSize()))} of {' x '.join(f'{s:.4g}' for s in spacing)} mm"
    row["suv_max"] = round(float(suv.max()), 3)
    if mask is not None:
        row["lesion_ml"] = round(float(np.count_nonzero(mask) * np.prod(spacing) / 1000), 3)
    title = study.case_id if mask is None else f"{study.case_id}: lesions {row['lesion_ml']:.1f} ml (red)"
    files.append(f"conversion/{study.case_id}.png")
    with new_file(folder, files[-1]) as path:
        draw_case(path, title, suv, None if row["missing_ct"] else hu, mask, spacing[::-1])
    row["files"] = {name: (folder / name).stat().st_size for name in files}


def _resume(dataset: RawDataset, studies: Sequence[Study], options: dict) -> dict[str, dict]:
    """Open the dataset, unless no case of it is to be done, and remove what is left of those that are not done; the
    rows of the others, by case_id."""
    kept, others = _kept_rows(dataset.where, studies)  # what is refused is refused before anything moves
    dataset.refuse_other_options(options)
    if dataset.folder.exists() and len(kept) == len(studies) and not others:
        return kept
    dataset.resume(options)
    with writing_to(dataset.staging):
        for case_id in others:
            remove_case(dataset.staging, case_id)
            for ending in (".png", ".json"):  # the row last: it says whose files these are
                (dataset.staging / "conversion" / f"{case_id}{ending}").unlink(missing_ok=True)
    return kept


def _kept_rows(folder: Path, studies: Sequence[Study]) -> tuple[dict[str, dict], list[str]]:
    """The rows of the cases that are done and need not be converted again, and the names of others that may have files.

    Raises:
        UserError: there are cases that are done and not among the studies.
    """
    current = {study.case_id: study for study in studies}
    kept, others, gone = {}, [], []
    for path in sorted((folder / "conversion").glob("*.json")):
        row = read_row(path)
        study = current.get(row["case_id"])
        if study and row["status"] == "done" and row["inputs"] == _fingerprint(study) and _is_whole(folder, row):
            kept[study.case_id] = row
        else:
            others.append(row["case_id"])
            gone += [row["case_id"]] * (study is None and row["status"] == "done")
    if gone:
        shown = ", ".join(gone[:3]) + (", ..." if len(gone) > 3 else "")
        raise UserError(f"{folder} has {len(gone)} cases that are not among the studies any more ({shown}); give the "
                        "same studies again, choose another -d, or remove that folder")  # fmt: skip
    return kept, others


def read_row(path: Path) -> dict:
    """The row of a case that `convert_study` wrote, of which the names of files are those that a case has.

    Raises:
        UserError: the file is damaged, or names other files, which somebody might have removed or replaced by it.
    """
    row = read_json(path)
    case_id = path.stem
    allowed = {*case_files(case_id), f"conversion/{case_id}.png"}
    files = row.get("files") if isinstance(row, dict) else None
    whole = isinstance(files, dict) and all(isinstance(size, int) for size in files.values())
    whole = whole and set(files) <= allowed and row.get("case_id") == case_id and CASE_NAME.fullmatch(case_id)
    if not whole or row.get("status") not in ("begun", "done", "failed") or not _is_shown(row):
        raise UserError(f"{path}: is damaged, or not of this case; remove this file, then say the same again: the case "
                        "is converted anew", "ROW_DAMAGED")  # fmt: skip
    return row


def _is_shown(row: dict) -> bool:
    """Whether the parts of a row of which tables and pages are made are of the kinds that they have."""
    numbers = [row.get(key) for key in ("lesion_ml", "suv_max", "seconds")]
    texts = [row.get(key) for key in ("error", "grid", "code", "part")]
    rois, used, notes = row.get("rois"), row.get("used"), row.get("notes")
    return (
        all(value is None or isinstance(value, (int, float)) for value in numbers)
        and all(value is None or isinstance(value, str) for value in texts)
        and isinstance(used, dict)
        and isinstance(rois, list) and all(isinstance(roi, dict) for roi in rois)
        and isinstance(notes, list) and all(isinstance(note, str) for note in notes)
        and isinstance(row.get("missing_ct"), bool)
        and row["part"] in PARTS
    )  # fmt: skip


def _is_whole(folder: Path, row: dict) -> bool:
    """Whether the files of a case are there with the sizes they had (a machine may lose power)."""
    paths = {folder / name: size for name, size in row["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _fingerprint(study: Study) -> str:
    """A hash of what a case is made of; without the names of files, which may be those of patients."""
    parts, paths = [study.part], [item for item in study.inputs if isinstance(item, Path)]
    for item in study.inputs:
        if isinstance(item, Path):
            found = item.stat() if item.exists() else None
            parts.append(str(found and (found.st_size, found.st_mtime_ns)))
        else:
            parts.append(repr(item))
    # Two patients' files may have the same sizes and, from one archive, the same times; not the same voxels
    parts += [_taste(path) for path in paths[:: max(1, len(paths) // TASTED)]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _taste(path: Path) -> str:
    """A hash of the middle of a file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size // 2 - TASTE // 2))
            return hashlib.sha256(file.read(TASTE)).hexdigest()
    except OSError:  # which the conversion will tell
        return ""


def _write_row(folder: Path, row: dict) -> None:
    text = json.dumps(row, indent=1, default=lambda number: number.item())  # of numpy
    write_text(folder, f"conversion/{row['case_id']}.json", text)


def _write_tables(folder: Path, studies: Sequence[Study], rows: list[dict], title: str) -> None:
    """clinical.csv of the cases that are done; the report, the table of ROIs and the page of pictures of all."""
    records = [
        replace(study.record, case_id=study.case_id, missing="CT" if row["missing_ct"] else study.record.missing)
        for study, row in zip(studies, rows, strict=True)
        if row["status"] == "done"
    ]
    with writing_to(folder):
        write_clinical(folder / "clinical.csv", records)
    report = [
        {**row, "used": "; ".join(f"{k}: {v}" for k, v in row["used"].items()), "notes": "; ".join(row["notes"])}
        for row in rows
    ]
    write_text(folder, REPORT, csv_text(COLUMNS, report))
    rois = [{"case_id": row["case_id"], **roi} for row in rows for roi in row["rois"]]
    (folder / ROIS).unlink(missing_ok=True)
    if rois:
        write_text(folder, ROIS, csv_text(list(dict.fromkeys(key for roi in rois for key in roi)), rois))
    write_text(folder, "conversion/index.html", index_page(title, rows))


def _print_summary(folder: Path, rows: list[dict], failed: list[str]) -> None:
    """What had to be changed, one line a kind (a thousand cases with their own CT grid are not a thousand lines), what
    is there now, and what to do next."""
    cases_of: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        for note in row["notes"]:
            cases_of[note].append(row["case_id"])
    kinds = sorted(cases_of.items(), key=lambda kind: (-len(kind[1]), kind[0]))
    for note, cases in kinds[:10]:
        print(f"{note}: {_shown(cases)}")
    if len(kinds) > 10:
        print(f"{len(kinds) - 10} other kinds of notes are in {REPORT}")
    count = {part: sum(row["part"] == part and row["status"] == "done" for row in rows) for part in PARTS}
    test = f" and {count['Ts']} test" if count["Ts"] else ""
    print(f"{count['Tr']} labelled{',' if test else ' and'} {count['Pt']} unlabelled{test} cases are in {folder}")
    print(f"Look at them: {folder / 'conversion' / 'index.html'}")
    if failed:
        print(f"{len(failed)} of {len(rows)} cases failed ({_shown(failed)}); the reasons are in {folder / REPORT}; "
              "mend them and say the same again: only these are converted", file=sys.stderr)  # fmt: skip
    print(f"Next: fratmae_plan_and_preprocess -d {dataset_number(folder.name)}")


def _shown(cases: list[str]) -> str:
    return f"{', '.join(sorted(cases)[:3])}{f' and {len(cases) - 3} more' if len(cases) > 3 else ''}"
