"""Plans as the trainers train them: of a new training, of one that goes on, and beside the other folds of a model."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nnunet_fratmae.artefact import check_artefact
from nnunet_fratmae.augmentation import misalign
from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.jsons import read_object
from nnunet_fratmae.base.units import MODALITIES
from plans.extension import extend_plans
from plans.settings import Settings
from plans.vit_pair import follow_artefact

PRETRAINED_VARIABLE = "FRATMAE_PRETRAINED"
CHANGEABLE = {
    "finetune": ("epochs", "iterations", "val_iterations", "foreground", "learning_rate", "pet_scale", "ct_shift",
                 "misalignment", "mirror_axes"),
    "staging": ("epochs", "learning_rate", "patience", "workers"),
}  # fmt: skip
"""Settings that a training which goes on takes from the plans of today; all others stay those that it began with."""


def prepare_plans(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Plans as FratMAETrainer trains them, and notes for the log. Plans that need no change come back as they are.

    Raises:
        UserError: a configuration or channels that FratMAE cannot train, or an artefact that cannot be used.
    """
    settings = Settings.from_json(plans.get("fratmae", {}))
    if settings.finetune.misalignment:
        misalign(0, settings.finetune.misalignment, (1, 1, 1))  # is it to be had?
    pretrained, source = settings.pretrained, 'plans.json, "fratmae.pretrained"'
    if pretrained is None:
        pretrained, source = os.environ.get(PRETRAINED_VARIABLE) or None, f"environment variable {PRETRAINED_VARIABLE}"
    notes, wanted = [], settings
    if settings.finetune.from_scratch:
        pretrained = None
        notes.append("########## FratMAE: training FROM SCRATCH, as fratmae.finetune.from_scratch says ##########")
    elif pretrained is None:
        notes.append("########## FratMAE: NO pretrained encoders, training FROM SCRATCH (set "
                     f"{PRETRAINED_VARIABLE} or fratmae.pretrained in the plans, unless you gave -pretrained_weights) "
                     "##########")  # fmt: skip
    else:
        wanted = follow_artefact(settings, check_artefact(pretrained))
        notes.append(f"pretrained encoders are named by {source}")
        if wanted is not settings and plans.get("fratmae"):
            notes.append(f"preset {wanted.preset} and token patch {list(wanted.token_patch)} follow the artefact; the "
                         f"plans said {settings.preset} and {list(settings.token_patch or [])}")  # fmt: skip
        wanted = replace(wanted, pretrained=str(pretrained))
    plans, warnings = extend_plans(plans, dataset_json, wanted, configuration)
    if settings.finetune.freeze and pretrained is None:
        notes.append("WARNING: fratmae.finetune.freeze keeps encoders as they are that nobody trained, unless "
                     "-pretrained_weights brings some")  # fmt: skip
    notes += [f"WARNING: {warning}" for warning in warnings]
    if plans["fratmae"]["modalities"] in MODALITIES:
        notes.append(f"this network sees {plans['fratmae']['modalities']} alone (fratmae.modalities)")
    return plans, notes


def go_on_with(plans: dict[str, Any], today: Settings) -> tuple[dict[str, Any], list[str]]:
    """Plans of a checkpoint with what may change of the settings of today, and notes on what changed."""
    begun, block, notes = Settings.from_json(plans.get("fratmae", {})), deepcopy(plans.get("fratmae", {})), []
    for part, names in CHANGEABLE.items():
        then, now = getattr(begun, part), getattr(today, part)
        for field in fields(now):
            was, wanted = getattr(then, field.name), getattr(now, field.name)
            if was == wanted or field.name in ("patch", "batch_size", "gpu_memory_target"):  # of the planning
                continue
            if field.name in names:
                block.setdefault(part, {})[field.name] = wanted
                notes.append(f"fratmae.{part}.{field.name} is {wanted} from now on, it was {was}")
            else:
                notes.append(f"WARNING: fratmae.{part}.{field.name} stays {was}, with which this training began; the "
                             f"plans say {wanted}")  # fmt: skip
    return {**plans, "fratmae": block}, notes


def check_other_folds(model_folder: Path, plans: dict[str, Any], configuration: str, fold: int) -> None:
    """The folds of a model share one plans.json, so they must share the network, or the others could not predict.
    Either all or none can do with a missing modality, as fratmae_fill_missing reads it there.

    Raises:
        UserError: a trained fold other than `fold` has another architecture or patch, or one of the two alone has
            modality dropout.
    """
    trained = [f for f in model_folder.glob("fold_*/checkpoint_*.pth") if f.parent.name != f"fold_{fold}"]
    if not trained or not (model_folder / "plans.json").is_file():
        return
    theirs = read_object(model_folder / "plans.json", "remove it: a training in this folder writes it anew")
    there, mine = theirs.get("configurations", {}).get(configuration, {}), plans["configurations"][configuration]
    dropout = [Settings.from_json(p.get("fratmae", {})).finetune.modality_dropout for p in (theirs, plans)]
    if bool(dropout[0]) != bool(dropout[1]):
        raise UserError(f"{model_folder}: {trained[0].parent.name} was trained with finetune.modality_dropout="
                        f"{dropout[0]}; set it so for all folds, or move that folder")  # fmt: skip
    for key in ("architecture", "patch_size"):
        if there.get(key) != json.loads(json.dumps(mine[key])):
            raise UserError(f"{model_folder}: {trained[0].parent.name} was trained with another {key} (other encoders "
                            f"or none?); use the same {PRETRAINED_VARIABLE} for all folds, or move that folder")
