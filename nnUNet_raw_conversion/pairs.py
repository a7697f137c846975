"""fratmae_convert_pairs: a folder with one sub-folder a case (CT, SUV and segmentation as images) to a raw dataset.

The folders are often called as the patients are. So cases are called by pseudonyms, and the key table that tells which
folder each is lies beside the input; `--keep-names` is for those whose folders are called by pseudonyms already.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from nnunet_fratmae.base.command import UserError, run_command
from nnUNet_raw_conversion.clinical import ClinicalRecord, name_patients, read_clinical
from nnUNet_raw_conversion.conversion import CASE_NAME, Loaded, Study, convert_studies
from nnUNet_raw_conversion.folders import archives_message, count_archives
from nnUNet_raw_conversion.geometry import read_image
from nnUNet_raw_conversion.patients import in_known_words, left_out
from nnUNet_raw_conversion.pseudonyms import (
    Key,
    assign,
    check_keys,
    key_file,
    only_user,
    read_keys,
    same_number,
    write_keys,
)
from nnUNet_raw_conversion.raw_dataset import RawDataset
from nnUNet_raw_conversion.splits import SPLITS_FILE, Splits, keep_cases, read_splits, write_splits


def find_cases(source: Path, keep_names: bool) -> list[Path]:
    """The folders of the cases below `source`, by name.

    Raises:
        UserError: no folder, no cases in it, or, where the names are kept, one that nnU-Net's files cannot have.
    """
    if not source.is_dir():
        raise UserError(f"-i {source}: there is no such folder")
    folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        packed = archives_message(count_archives(source))
        raise UserError(f"-i {source}: has no sub-folders; "
                        + (packed or "put the files of every case in a folder of its name"))  # fmt: skip
    wrong = [p.name for p in folders if not CASE_NAME.fullmatch(p.name)]
    if wrong and keep_names:
        raise UserError(
            f"-i {source}: rename the folder {wrong[0]!r} ({len(wrong)} such): a case name has only letters, digits, "
            "'_', '.' and '-', and not _0000 or _seg at its end"
        )
    return folders


def load_pair(ct: Path, pet: Path, lesions: Path | None) -> Loaded:
    """Read the files of one case; no message names its folder. `lesions` is None if it has no segmentation."""
    used = {"CT": ct.name, "PET": pet.name, **({"lesions": lesions.name} if lesions else {})}
    notes: list[str] = []
    images = [None if path is None else read_image(path, path.name, notes=notes) for path in (ct, pet, lesions)]
    return Loaded(*images, notes=list(dict.fromkeys(notes)), used=used)


def make_study(folder: Path, ct: str, pet: str, seg: str | None, unlabelled: bool, record: ClinicalRecord) -> Study:
    """The case in `folder`; if its file `seg` is missing it is for pretraining, where that is allowed."""
    lesions = folder / seg if seg and (not unlabelled or (folder / seg).exists()) else None
    files = (folder / ct, folder / pet, lesions)
    return Study(record.case_id, record, "Tr" if lesions else "Pt", partial(load_pair, *files), files)


def convert_pairs(args: argparse.Namespace) -> None:
    """The command: everything that can be wrong with the call is looked at before the first image is read."""
    if args.seg is None and not args.unlabelled:
        raise UserError("--seg is missing; name the segmentation file, or say --unlabelled for images without any")
    if args.keep_names and args.key_file:
        raise UserError("--keep-names: the folders' names are kept, so there is no table of them; leave out --key-file")
    dataset = RawDataset(args.d, args.n)
    with dataset.locked():
        _convert_into(dataset, args)


def _convert_into(dataset: RawDataset, args: argparse.Namespace) -> None:
    folders = find_cases(args.i, args.keep_names)
    rows = _rows_of(folders, args.i, args.clinical, args.keep_names)
    dataset.refuse_existing()
    path = None if args.keep_names else key_file(args.key_file, args.i)
    named = _pseudonyms(path, folders, args.n) if path else [Key(f.name, "", f.name) for f in folders]
    case_of = {folder.name: key.case_id for folder, key in zip(folders, named, strict=True)}
    records = _records(rows, case_of, args)
    studies = [make_study(folder, args.ct, args.pet, args.seg, args.unlabelled, records[folder.name])
               for folder in folders]  # fmt: skip
    splits = _splits(args, case_of)

    def complete(folder: Path) -> None:
        write_splits(folder, splits)
        if path:
            check_keys(path, named)

    options = {"command": "fratmae_convert_pairs", "grid": args.grid}
    convert_studies(dataset, studies, options, args.np, strict=True, complete=complete)


def main() -> None:
    """The console script fratmae_convert_pairs."""
    parser = argparse.ArgumentParser(prog="fratmae_convert_pairs", description=__doc__.split("\n")[0])
    parser.add_argument("-i", type=Path, required=True, metavar="DIR", help="folder with one sub-folder a case")
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="dataset ID, 1 to 999")
    parser.add_argument("-n", required=True, metavar="NAME", help="dataset name, also of the pseudonyms")
    parser.add_argument("--ct", required=True, metavar="FILE", help="the CT (HU) of every case, as CTres.nii.gz")
    parser.add_argument("--pet", required=True, metavar="FILE", help="the PET (SUVbw) of every case, as SUV.nii.gz")
    parser.add_argument("--seg", metavar="FILE", help="the segmentation (0 and 1, on the grid of the PET or the CT), "
                        "as SEG.nii.gz")  # fmt: skip
    parser.add_argument("--clinical", type=Path, metavar="FILE", help="table of tracer, diagnosis, age, sex and stage, "
                        "relative to -i [clinical.csv if it is there]")  # fmt: skip
    parser.add_argument("--splits", type=Path, metavar="FILE", help="folds as nnU-Net has them, by the folders' names, "
                        "relative to -i [splits_final.json if it is there]")  # fmt: skip
    parser.add_argument("--unlabelled", action="store_true", help="cases without segmentation are for pretraining only")
    parser.add_argument("--keep-names", action="store_true", help="call the cases as their folders, which are "
                        "pseudonyms already [NAME_0001, ...]")  # fmt: skip
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="table of pseudonyms, read and written "
                        "[key_DIR.csv beside -i]")  # fmt: skip
    parser.add_argument("--grid", default="pet", metavar="GRID", help="grid of the result: pet, ct, or a spacing in mm "
                        "as 4,4,5 (left-right, front-back, foot-head) [pet]")  # fmt: skip
    parser.add_argument("-np", type=int, default=4, metavar="N", help="number of processes, up to 4 GB each [4]")
    run_command(parser, convert_pairs)


def _pseudonyms(path: Path, folders: list[Path], name: str) -> list[Key]:
    """The folders' cases, as the key table has them; it is brought up to date."""
    with only_user(path):
        keys = read_keys(path)
        named = assign(keys, [Key("", "", folder.name, "", str(folder)) for folder in folders], name)
        write_keys(path, keys)
    print(f"{len(folders)} cases; which folder each is stands in {path}")
    return named


def _splits(args: argparse.Namespace, case_of: dict[str, str]) -> Splits:
    """The user's folds with the cases' names in place of the folders'.

    Raises:
        UserError: the file is no list of folds, or names a case that is not there.
    """
    path = args.i / (args.splits or SPLITS_FILE)
    if not (args.splits or path.exists()):
        return []
    splits = read_splits(path, {folder.lower(): case_id for folder, case_id in case_of.items()})
    if not keep_cases(splits, case_of.values()):
        raise UserError(f"{path}: a fold has no case of {args.i} for training or for validation; correct or remove it")
    return splits


def _rows_of(
    folders: list[Path], source: Path, table: Path | None, keep_names: bool
) -> dict[str, ClinicalRecord]:
    """The rows of the clinical table by folder; a row without a folder is only worth a warning.

    A row is found by the folder's name, as it is written or as a spreadsheet leaves it ("0012" is 12)."""
    path = source / (table or "clinical.csv")
    rows = read_clinical(path) if table or path.exists() else {}
    found = {folder.name: rows.pop(folder.name) for folder in folders if folder.name in rows}
    others = {same_number(name): name for name in rows}
    for folder in folders:
        if folder.name not in found and same_number(folder.name) in others:
            found[folder.name] = rows.pop(others.pop(same_number(folder.name)))
    if rows:
        shown = f": {', '.join(list(rows)[:3])}{', ...' if len(rows) > 3 else ''}" if keep_names else ""
        print(f"warning: {path} has rows for {len(rows)} cases that are not there{shown}", file=sys.stderr)
    return found


def _records(
    rows: dict[str, ClinicalRecord], case_of: dict[str, str], args: argparse.Namespace
) -> dict[str, ClinicalRecord]:
    """One record a folder, empty where the table has none, in known words and under the case's name."""
    records, shortened = {}, {}
    for folder, case_id in case_of.items():
        row, left = in_known_words(rows.get(folder, ClinicalRecord(case_id)))
        for name in left:
            shortened.setdefault(name, []).append(case_id)
        records[folder] = replace(row, case_id=case_id)
    for message in left_out(shortened, args.i / (args.clinical or "clinical.csv")):
        print(f"warning: {message}", file=sys.stderr)
    if args.keep_names:
        return records
    # Who shares a patient is told by the cases' names, not by the table's
    patients = {folder: record.patient or f"folder {folder}" for folder, record in records.items()}
    named = name_patients({case_of[f]: replace(r, patient=None) for f, r in records.items()},
                          {case_of[f]: who for f, who in patients.items()})  # fmt: skip
    return {folder: named[case_id] for folder, case_id in case_of.items()}


if __name__ == "__main__":
    main()
