"""What studies are classified by: labels from clinical.csv, who trains and who validates, the plans of the network."""

from __future__ import annotations

import json
from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_fratmae.base.command import UserError, dataset_number
from nnunet_fratmae.base.files import renamed
from nnUNet_raw_conversion.clinical import COLUMNS, UNKNOWN, read_clinical, read_table
from nnUNet_raw_conversion.splits import make_splits
from plans.front_door import hwd_axes
from plans.preprocessed import PLANS_NAME, read_splits, stored_cases, validation_cases
from plans.settings import Settings
from plans.vit_pair import JOINT_NETWORK

NETWORK = "nnunet_fratmae.networks.staging.FratMAEStaging"
STAGING_CONFIGURATION = "wholebody"
RISK_OF_STAGE = {
    **dict.fromkeys(("I", "II", "early"), "early"),
    **dict.fromkeys(("III", "IV", "advanced"), "advanced"),
}  # paper section 2.4
CLASSES = {"risk": ["early", "advanced"], "stage": ["I", "II", "III", "IV"]}
MOST_CLASSES = 20  # a column with more has names, dates or numbers in it


@dataclass(frozen=True)
class Cohort:
    """Cases of a fold with the number of the class of each, and what the user should know about it."""

    classes: list[str]
    training: dict[str, int]
    validation: dict[str, int]
    notes: list[str]


def read_labels(table: Path, target: str, cases: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """The classes, in the order of the network's outputs, and the class of each of `cases` that has one.

    Args:
        target: "risk", "stage" or a column of the table, which may have more than clinical.csv knows.

    Raises:
        UserError: no table, no such column, or one that has no classes.
    """
    if not table.is_file():
        raise UserError(f"{table} is not there; put a table with case_id and the labels there (in the raw dataset it "
                        "is copied by fratmae_plan_and_preprocess)")  # fmt: skip
    if target == "risk" or target in COLUMNS:
        records = read_clinical(table, columns={"case_id": "case_id"})
        values = {case: getattr(record, "stage" if target == "risk" else target) for case, record in records.items()}
        if target == "risk":
            values = {case: RISK_OF_STAGE.get(value) for case, value in values.items()}
        elif target == "stage":  # where only the risk group is known, the stage is not
            values = {case: value if value in CLASSES["stage"] else None for case, value in values.items()}
    else:
        values = _read_column(table, target)
    labels = {case: values[case] for case in sorted(cases) if values.get(case) is not None}
    classes = CLASSES.get(target) or sorted(set(labels.values()))
    if len(set(labels.values())) < 2:
        what = f"has {len(set(labels.values()))} class(es)"
    elif len(classes) > MOST_CLASSES:
        what = f"has {len(classes)} different values"
    else:
        return classes, labels
    raise UserError(f"{table}: staging.target {target} {what} among {len(cases)} studies; choose a column with 2 to "
                    f"{MOST_CLASSES} classes, or fill it in")  # fmt: skip


def _read_column(table: Path, name: str) -> dict[str, str | None]:
    """The texts of a column of the user's own by case_id, None where unknown."""
    header, rows = read_table(table)
    for wanted in ("case_id", name):
        if header.count(wanted) != 1:
            raise UserError(f"{table}, line 1: staging.target {name} needs one column {wanted}; name it so, or set "
                            "fratmae.staging.target in the plans")  # fmt: skip
    key, value = header.index("case_id"), header.index(name)
    texts = {" ".join(str(cells[key]).split()): " ".join(str(cells[value] or "").split()) for _, cells in rows}
    return {case: None if text.lower() in UNKNOWN else text for case, text in texts.items()}


def read_patients(table: Path, cases: Collection[str]) -> dict[str, str]:
    """The patient of each case: a pseudonym where clinical.csv has the column, else each case is a patient."""
    known = _read_column(table, "patient") if "patient" in read_table(table)[0] else {}
    return {case: f"patient {known[case]}" if known.get(case) else case for case in cases}


def read_cohort(preprocessed: Path, plans: dict[str, Any], fold: int | str) -> Cohort:
    """Who trains and who validates in `fold`: nnU-Net's splits_final.json, restricted to cases with a label.

    Cases that have no segmentation (imagesPt) are in no fold of nnU-Net; with a label they train in every fold and
    validate in none. Where no case has a segmentation, splits_final.json is made anew, by patients (column `patient` of
    clinical.csv) and with the classes spread evenly. No patient trains who also validates, whatever the split says.
    Fold "all" trains and validates on all.

    Raises:
        UserError: what `read_labels` and `validation_cases` raise, no store, or a side of the fold without labels.
    """
    target, configurations = Settings.from_json(plans["fratmae"]).staging.target, plans["configurations"]
    stored = stored_cases(preprocessed / configurations[STAGING_CONFIGURATION]["data_identifier"])
    if not stored:
        name = "" if plans["plans_name"] == PLANS_NAME else f" -plans_name {plans['plans_name']}"
        raise UserError(f"{preprocessed}: no whole-body studies there; run fratmae_plan_and_preprocess -d "
                        f"{dataset_number(preprocessed.name)}{name}")  # fmt: skip
    classes, labels = read_labels(preprocessed / "clinical.csv", target, stored)
    segmented = stored_cases(preprocessed / configurations["3d_fullres"]["data_identifier"])
    patients, notes = read_patients(preprocessed / "clinical.csv", stored), []
    if fold == "all":
        training = validation = set(stored)
    else:
        split_unsegmented(preprocessed, plans)
        validation = validation_cases(preprocessed, plans, fold)
        splits = read_splits(preprocessed / "splits_final.json")
        in_a_fold = {case for split in splits for side in split.values() for case in side}
        training = set(splits[fold]["train"]) | (stored - segmented - in_a_fold)
        validated = {patients.get(case, case) for case in validation}
        shared = {case for case in training if patients.get(case, case) in validated}
        training -= shared
        if shared:
            notes.append(f"{len(shared)} studies of patients who validate do not train in this fold")
    left_out = sorted((training | validation) - labels.keys())
    if left_out:
        named = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        notes.append(f"{len(left_out)} cases without {target} in clinical.csv are left out: {named}")
    extra = sorted((training - segmented) & labels.keys()) if segmented else []
    if extra and fold != "all":
        notes.append(f"{len(extra)} cases without a segmentation (imagesPt) have {target} and train in every fold")
    numbers = {case: classes.index(label) for case, label in labels.items()}
    sides = [{case: numbers[case] for case in sorted(side & numbers.keys())} for side in (training, validation)]
    if len(set(sides[0].values())) < 2 or not sides[1]:
        raise UserError(f"fold {fold} of {preprocessed.name}: {len(sides[0])} training cases of "
                        f"{len(set(sides[0].values()))} class(es) and {len(sides[1])} validation cases have {target}; "
                        "two classes and one validation case are needed")  # fmt: skip
    for name, side in zip(("training", "validation"), sides, strict=True):
        counts = ", ".join(f"{list(side.values()).count(i)} {label}" for i, label in enumerate(classes))
        notes.append(f"{len(side)} {name} cases: {counts}")
    return Cohort(classes, *sides, notes)


def split_unsegmented(preprocessed: Path, plans: dict[str, Any]) -> None:
    """Make the splits_final.json of a dataset without segmentations, for which nnU-Net makes none.

    By patients, with the classes spread evenly over the folds. What is there already stays.

    Raises:
        UserError: as `read_labels`.
    """
    configurations, table = plans["configurations"], preprocessed / "clinical.csv"
    if (preprocessed / "splits_final.json").is_file() or STAGING_CONFIGURATION not in configurations:
        return
    if stored_cases(preprocessed / configurations["3d_fullres"]["data_identifier"]):
        return
    stored = stored_cases(preprocessed / configurations[STAGING_CONFIGURATION]["data_identifier"])
    _, labels = read_labels(table, Settings.from_json(plans["fratmae"]).staging.target, stored)
    patients = read_patients(table, stored)
    folds = make_splits({case: patients[case] for case in labels}, labels)
    with renamed(preprocessed / "splits_final.json") as partial:
        partial.write_text(json.dumps(folds, indent=4), encoding="utf-8")


def cohort_of_model(preprocessed: Path, plans: dict[str, Any], fold: int | str, classes: list[str]) -> Cohort:
    """`read_cohort` for a network that has these classes.

    Raises:
        UserError: as `read_cohort`, or clinical.csv has other classes by now.
    """
    cohort = read_cohort(preprocessed, plans, fold)
    if cohort.classes != classes:
        raise UserError(f"{preprocessed / 'clinical.csv'} has the classes {', '.join(cohort.classes)}, this model has "
                        f"{', '.join(classes)}; train anew")  # fmt: skip
    return cohort


def joint_plans(plans: dict[str, Any], configuration: str, classes: list[str]) -> dict[str, Any]:
    """FratMAE plans whose segmentation network also classifies whole bodies; the argument is not changed."""
    plans = deepcopy(plans)
    settings = Settings.from_json(plans["fratmae"])
    architecture = plans["configurations"][configuration]["architecture"]
    architecture["network_class_name"] = JOINT_NETWORK
    architecture["arch_kwargs"]["stages"] = {
        "patch_size": list(settings.wholebody.patch),
        "classes": classes,
        "dropout": settings.staging.dropout,
    }
    return plans


def staging_plans(plans: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    """FratMAE plans whose configuration `wholebody` is the classification network; the argument is not changed.

    Raises:
        UserError: plans whose axes are not H, W, D; the whole-body store is in FratMAEPlans only.
    """
    plans = deepcopy(plans)
    settings = Settings.from_json(plans["fratmae"])
    if hwd_axes(plans["transpose_forward"]) != [0, 1, 2]:
        raise UserError("plans.json: transpose_forward is not that of FratMAEPlans; use -p FratMAEPlans")
    plans["configurations"][STAGING_CONFIGURATION] |= {
        "patch_size": list(settings.wholebody.patch),
        "batch_size": settings.staging.batch_size,
        "architecture": {
            "network_class_name": NETWORK,
            "arch_kwargs": {
                "patch_size": list(settings.wholebody.patch),
                "token_patch": list(settings.token_patch),
                **settings.sizes.encoder,
                "classes": classes,
                "dropout": settings.staging.dropout,
                "modalities": list(settings.used_modalities),
            },
            "_kw_requires_import": [],
        },
    }
    return plans
