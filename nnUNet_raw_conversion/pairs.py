"""fratmae_convert_pairs: a folder with one sub-folder a case (CT, SUV and segmentation as images) to a raw dataset."""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from nnUNet_raw_conversion.checks import checked_case
from nnUNet_raw_conversion.clinical import ClinicalRecord, read_clinical, write_clinical
from nnUNet_raw_conversion.command import UserError, map_cases, run_command
from nnUNet_raw_conversion.geometry import read_image
from nnUNet_raw_conversion.raw_dataset import RawDataset, write_case


@dataclass(frozen=True)
class Case:
    """The files of one case; `lesions` is None for a case without segmentation (images for pretraining only)."""

    case_id: str
    ct: Path
    pet: Path
    lesions: Path | None


@dataclass
class Outcome:
    """What became of one case: `error` is None if it was written, `notes` say what had to be changed."""

    case_id: str
    notes: list[str] = field(default_factory=list)
    error: str | None = None


def find_cases(source: Path, ct: str, pet: str, seg: str | None, unlabelled: bool) -> list[Case]:
    """The cases below `source`, by name; a case whose file `seg` is missing counts as unlabelled if that is allowed.

    Raises:
        UserError: no folder, no cases in it, or a case name that nnU-Net's files cannot have.
    """
    if not source.is_dir():
        raise UserError(f"-i {source}: there is no such folder")
    folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UserError(f"-i {source}: has no sub-folders; put the files of every case in a folder of its name")
    ends = ("_0000", "_seg")  # which nnU-Net takes for parts of other files' names
    wrong = [p.name for p in folders if not re.fullmatch(r"[A-Za-z0-9_.-]+", p.name) or p.name.endswith(ends)]
    if wrong:
        raise UserError(
            f"-i {source}: rename the folder {wrong[0]!r} ({len(wrong)} such): a case name has only letters, digits, "
            "'_', '.' and '-', and not _0000 or _seg at its end"
        )
    cases = []
    for folder in folders:
        lesions = folder / seg if seg and (not unlabelled or (folder / seg).exists()) else None
        cases.append(Case(folder.name, folder / ct, folder / pet, lesions))
    return cases


def convert_case(case: Case, folder: Path) -> Outcome:
    """Read, check and write one case below `folder`; a user's error is in the outcome, not raised."""
    try:
        ct, pet = read_image(case.ct), read_image(case.pet)
        lesions = read_image(case.lesions) if case.lesions else None
        ct, pet, lesions, notes = checked_case(ct, pet, lesions)
        try:
            write_case(folder, case.case_id, ct, pet, lesions)
        except (RuntimeError, OSError) as error:
            raise UserError(f"cannot be written to {folder}; is the disk full? ({error})") from None
    except UserError as error:
        return Outcome(case.case_id, error=str(error))
    except MemoryError:
        return Outcome(case.case_id, error="the memory is too small for it; try a smaller -np")
    return Outcome(case.case_id, notes)


def convert_pairs(args: argparse.Namespace) -> None:
    """The command: everything that can be wrong with the call is looked at before the first image is read."""
    if args.seg is None and not args.unlabelled:
        raise UserError("--seg is missing; name the segmentation file, or say --unlabelled for images without any")
    dataset = RawDataset(args.d, args.n)
    cases = find_cases(args.i, args.ct, args.pet, args.seg, args.unlabelled)
    clinical = _clinical_of(cases, args.i, args.clinical)
    with dataset:
        convert = partial(convert_case, folder=dataset.staging)
        outcomes = list(tqdm(map_cases(convert, cases, args.np), "cases", len(cases)))
        errors = sorted(f"{o.case_id}: {o.error}" for o in outcomes if o.error)
        if errors:
            bad = f"{len(errors)} of {len(cases)} cases cannot be converted, so nothing was written:"
            raise UserError("\n".join([bad, *errors]))
        write_clinical(dataset.staging / "clinical.csv", clinical)
    _print_notes(outcomes)
    labelled = sum(case.lesions is not None for case in cases)
    print(f"{labelled} labelled and {len(cases) - labelled} unlabelled cases are in {dataset.folder}")
    print(f"Next: fratmae_plan_and_preprocess -d {args.d}")


def main() -> None:
    """The console script fratmae_convert_pairs."""
    parser = argparse.ArgumentParser(prog="fratmae_convert_pairs", description=__doc__)
    parser.add_argument("-i", type=Path, required=True, metavar="DIR", help="folder with one sub-folder a case")
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="dataset ID, 1 to 999")
    parser.add_argument("-n", required=True, metavar="NAME", help="dataset name")
    parser.add_argument("--ct", required=True, metavar="FILE", help="the CT (HU) of every case, as CTres.nii.gz")
    parser.add_argument("--pet", required=True, metavar="FILE", help="the PET (SUVbw) of every case, as SUV.nii.gz")
    parser.add_argument("--seg", metavar="FILE", help="the segmentation (0 and 1, on the PET's grid), as SEG.nii.gz")
    parser.add_argument("--clinical", type=Path, metavar="FILE", help="table of tracer, diagnosis, age, sex and stage, "
                        "relative to -i [clinical.csv if it is there]")  # fmt: skip
    parser.add_argument("--unlabelled", action="store_true", help="cases without segmentation are for pretraining only")
    parser.add_argument("-np", type=int, default=4, metavar="N", help="number of processes, up to 4 GB each [4]")
    run_command(parser, convert_pairs)


def _clinical_of(cases: list[Case], source: Path, table: Path | None) -> list[ClinicalRecord]:
    """One record a case, empty where the table has none; a row without a case is only worth a warning."""
    path = source / (table or "clinical.csv")
    rows = read_clinical(path) if table or path.exists() else {}
    records = [rows.pop(case.case_id, ClinicalRecord(case.case_id)) for case in cases]
    if rows:
        shown = ", ".join(list(rows)[:3]) + (", ..." if len(rows) > 3 else "")
        print(f"warning: {path} has rows for {len(rows)} cases that are not there: {shown}", file=sys.stderr)
    return records


def _print_notes(outcomes: list[Outcome]) -> None:
    """What had to be changed, one line a kind: a thousand cases with their own CT grid are not a thousand lines."""
    cases_of: defaultdict[str, list[str]] = defaultdict(list)
    for outcome in outcomes:
        for note in outcome.notes:
            cases_of[note].append(outcome.case_id)
    for note, cases in sorted(cases_of.items()):
        print(f"{note}: {', '.join(sorted(cases)[:3])}{f' and {len(cases) - 3} more' if len(cases) > 3 else ''}")


if __name__ == "__main__":
    main()
