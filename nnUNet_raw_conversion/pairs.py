"""fratmae_convert_pairs: a folder with one sub-folder a case (CT, SUV and segmentation as images) to a raw dataset."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from nnunet_fratmae.base.command import UserError, run_command
from nnUNet_raw_conversion.clinical import ClinicalRecord, read_clinical
from nnUNet_raw_conversion.conversion import CASE_NAME, Loaded, Study, convert_studies
from nnUNet_raw_conversion.geometry import read_image
from nnUNet_raw_conversion.raw_dataset import RawDataset


def find_cases(source: Path) -> list[Path]:
    """The folders of the cases below `source`, by name.

    Raises:
        UserError: no folder, no cases in it, or a case name that nnU-Net's files cannot have.
    """
    if not source.is_dir():
        raise UserError(f"-i {source}: there is no such folder")
    folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UserError(f"-i {source}: has no sub-folders; put the files of every case in a folder of its name")
    wrong = [p.name for p in folders if not CASE_NAME.fullmatch(p.name)]
    if wrong:
        raise UserError(
            f"-i {source}: rename the folder {wrong[0]!r} ({len(wrong)} such): a case name has only letters, digits, "
            "'_', '.' and '-', and not _0000 or _seg at its end"
        )
    return folders


def load_pair(ct: Path, pet: Path, lesions: Path | None) -> Loaded:
    """Read the files of one case; `lesions` is None for a case without segmentation."""
    used = {"CT": ct.name, "PET": pet.name, **({"lesions": lesions.name} if lesions else {})}
    notes: list[str] = []
    images = [None if path is None else read_image(path, notes=notes) for path in (ct, pet, lesions)]
    return Loaded(*images, notes=list(dict.fromkeys(notes)), used=used)


def make_study(folder: Path, ct: str, pet: str, seg: str | None, unlabelled: bool, record: ClinicalRecord) -> Study:
    """The case in `folder`; if its file `seg` is missing it is for pretraining, where that is allowed."""
    lesions = folder / seg if seg and (not unlabelled or (folder / seg).exists()) else None
    files = (folder / ct, folder / pet, lesions)
    return Study(folder.name, record, "Tr" if lesions else "Pt", partial(load_pair, *files), files)


def convert_pairs(args: argparse.Namespace) -> None:
    """The command: everything that can be wrong with the call is looked at before the first image is read."""
    if args.seg is None and not args.unlabelled:
        raise UserError("--seg is missing; name the segmentation file, or say --unlabelled for images without any")
    dataset = RawDataset(args.d, args.n)
    folders = find_cases(args.i)
    records = _clinical_of(folders, args.i, args.clinical)
    studies = [make_study(folder, args.ct, args.pet, args.seg, args.unlabelled, records[folder.name])
               for folder in folders]  # fmt: skip
    convert_studies(dataset, studies, {"command": "fratmae_convert_pairs", "grid": args.grid}, args.np, strict=True)


def main() -> None:
    """The console script fratmae_convert_pairs."""
    parser = argparse.ArgumentParser(prog="fratmae_convert_pairs", description=__doc__)
    parser.add_argument("-i", type=Path, required=True, metavar="DIR", help="folder with one sub-folder a case")
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="dataset ID, 1 to 999")
    parser.add_argument("-n", required=True, metavar="NAME", help="dataset name")
    parser.add_argument("--ct", required=True, metavar="FILE", help="the CT (HU) of every case, as CTres.nii.gz")
    parser.add_argument("--pet", required=True, metavar="FILE", help="the PET (SUVbw) of every case, as SUV.nii.gz")
    parser.add_argument("--seg", metavar="FILE", help="the segmentation (0 and 1, on the grid of the PET or the CT), "
                        "as SEG.nii.gz")  # fmt: skip
    parser.add_argument("--clinical", type=Path, metavar="FILE", help="table of tracer, diagnosis, age, sex and stage, "
                        "relative to -i [clinical.csv if it is there]")  # fmt: skip
    parser.add_argument("--unlabelled", action="store_true", help="cases without segmentation are for pretraining only")
    parser.add_argument("--grid", default="pet", metavar="GRID", help="grid of the result: pet, ct, or a spacing in mm "
                        "as 4,4,5 (left-right, front-back, foot-head) [pet]")  # fmt: skip
    parser.add_argument("-np", type=int, default=4, metavar="N", help="number of processes, up to 4 GB each [4]")
    run_command(parser, convert_pairs)


def _clinical_of(folders: list[Path], source: Path, table: Path | None) -> dict[str, ClinicalRecord]:
    """One record a case, empty where the table has none; a row without a case is only worth a warning."""
    path = source / (table or "clinical.csv")
    rows = read_clinical(path) if table or path.exists() else {}
    records = {folder.name: rows.pop(folder.name, ClinicalRecord(folder.name)) for folder in folders}
    if rows:
        shown = ", ".join(list(rows)[:3]) + (", ..." if len(rows) > 3 else "")
        print(f"warning: {path} has rows for {len(rows)} cases that are not there: {shown}", file=sys.stderr)
    return records


if __name__ == "__main__":
    main()
