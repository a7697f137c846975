"""splits_final.json: cross-validation with every patient on one side only (nnU-Net draws studies, not patients)."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.files import writing_to
from nnUNet_raw_conversion.raw_dataset import write_text

Splits = list[dict[str, list[str]]]
SPLITS_FILE = "splits_final.json"
SEED = 12345


def make_splits(patient_of: Mapping[str, str], stratum_of: Mapping[str, str], folds: int = 5) -> Splits:
    """Folds of about the same number of patients, in each the same mixture of strata as far as that goes.

    Args:
        patient_of: the patient of each case. stratum_of: what shall be spread evenly, say tracer and diagnosis; the
            first case of a patient speaks for all.

    Returns:
        {"train": cases, "val": cases} a fold; fewer folds where there are fewer patients, none for a single patient.
    """
    cases_of: defaultdict[str, list[str]] = defaultdict(list)
    for case in sorted(patient_of):
        cases_of[patient_of[case]].append(case)
    patients = sorted(cases_of)
    random.Random(SEED).shuffle(patients)
    patients.sort(key=lambda patient: stratum_of[cases_of[patient][0]])  # stable: shuffled within a stratum
    folds = min(folds, len(patients))
    if folds < 2:
        return []
    held_out = [sorted(case for patient in patients[k::folds] for case in cases_of[patient]) for k in range(folds)]
    return [{"train": sorted(set(patient_of) - set(val)), "val": val} for val in held_out]


def read_splits(path: Path, case_of: Mapping[str, str]) -> Splits:
    """The folds of a splits_final.json with the names in it replaced by our case ids; names without one are left out.

    Raises:
        UserError: the file is no list of folds with train and val.
    """
    try:
        folds = json.loads(path.read_text(encoding="utf-8"))
        return [
            {side: [case_of[n.lower()] for n in fold[side] if n.lower() in case_of] for side in ("train", "val")}
            for fold in folds
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: is no list of folds with train and val, as nnU-Net has it; "
                        "get it anew, or remove it for a split by patients") from None  # fmt: skip


def shared_patients(splits: Splits, patient_of: Mapping[str, str]) -> set[str]:
    """The patients with studies in training and validation of the same fold."""
    return {
        patient
        for fold in splits
        for patient in {patient_of[c] for c in fold["train"]} & {patient_of[c] for c in fold["val"]}
    }


def keep_cases(splits: Splits, cases: Collection[str]) -> Splits:
    """The folds with these cases alone; none at all if that leaves a side of a fold empty."""
    kept = [{side: [case for case in names if case in cases] for side, names in fold.items()} for fold in splits]
    return kept if all(fold["train"] and fold["val"] for fold in kept) else []


def write_splits(folder: Path, splits: Splits) -> None:
    """Write splits_final.json to a raw dataset folder, from where fratmae_plan_and_preprocess hands it to nnU-Net; for
    no splits, remove what an earlier run wrote.

    Raises:
        WriteError: the disk is full, or the like.
    """
    if splits:
        write_text(folder, SPLITS_FILE, json.dumps(splits, indent=1))
    else:
        with writing_to(folder):
            (folder / SPLITS_FILE).unlink(missing_ok=True)
