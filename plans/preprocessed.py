"""What a preprocessed dataset holds: its FratMAE plans, its dataset.json and nnU-Net's cross-validation folds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnunet_fratmae.base.command import UserError, dataset_number, nnunet_folder
from nnunet_fratmae.base.files import renamed

PLANS_NAME = "FratMAEPlans"


def load_plans(preprocessed: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """FratMAEPlans.json and dataset.json.

    Raises:
        UserError: they are not there, or no JSON.
    """
    path = preprocessed / f"{PLANS_NAME}.json"
    if not path.is_file():
        dataset_id = dataset_number(preprocessed.name)
        raise UserError(f"{path} is not there; run fratmae_plan_and_preprocess -d {dataset_id} first")
    return read_json(path), read_json(preprocessed / "dataset.json")


def read_json(path: Path) -> Any:
    """The content of a file that a user may have edited.

    Raises:
        UserError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); mend it there, or plan again without it") from None


def check_splits(raw: Path) -> None:
    """See that the folds of a raw dataset are those that were preprocessed, as nnU-Net wants it, too.

    Raises:
        UserError: they changed since.
    """
    ours, theirs = raw / "splits_final.json", nnunet_folder("nnUNet_preprocessed") / raw.name / "splits_final.json"
    if ours.is_file() and theirs.is_file():
        before, now = ([{side: sorted(fold[side]) for side in ("train", "val")} for fold in read_json(path)]
                       for path in (theirs, ours))  # fmt: skip
        if before[: len(now)] != now:
            raise UserError(f"{theirs}: has other folds than {ours} has by now; models trained so far validate by the "
                            "first; remove it to take over the second, and train them anew")  # fmt: skip


def stored_cases(folder: Path) -> set[str]:
    """Case ids of a folder that nnU-Net preprocessed."""
    return {f.stem for f in folder.glob("*.b2nd") if not f.stem.endswith("_seg")}


def validation_cases(preprocessed: Path, plans: dict[str, Any], fold: int) -> set[str]:
    """Case ids that nnU-Net validates on in `fold`, none where nothing is labelled.

    splits_final.json is made as nnU-Net makes it where it is missing.

    Raises:
        UserError: there is no such fold.
    """
    path = preprocessed / "splits_final.json"
    if not path.is_file():
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        folder = preprocessed / plans["configurations"]["3d_fullres"]["data_identifier"]
        cases = sorted(stored_cases(folder))
        if not cases:
            return set()
        if len(cases) < 5:
            raise UserError(f"-f {fold}: {preprocessed.name} has {len(cases)} labelled cases, too few for 5 folds")
        splits = generate_crossval_split(cases, seed=12345, n_splits=5)
        with renamed(path) as partial:
            partial.write_text(json.dumps(splits, indent=4, default=str))
    splits = read_json(path)
    if not 0 <= fold < len(splits):
        raise UserError(f"-f {fold}: {path} has folds 0 to {len(splits) - 1}")
    return set(splits[fold]["val"])
