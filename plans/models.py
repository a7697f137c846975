"""Plans that come with weights, checked before nnU-Net builds a network from them: it imports whatever they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.jsons import load_object
from plans.dataset_json import check_dataset_json
from plans.fields import require
from plans.reader import check_network, check_plans, check_settings, resolve
from plans.staging import NETWORK as STAGING_NETWORK
from plans.vit_pair import JOINT_NETWORK
from plans.vit_pair import NETWORK as SEGMENTATION_NETWORK

KNOWN = (SEGMENTATION_NETWORK, JOINT_NETWORK, STAGING_NETWORK)
"""The networks that plans may name."""


def read_model_files(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """plans.json and dataset.json of a model folder, perhaps a downloaded one, checked.

    Args:
        kind: what folder is wanted, for the message.

    Raises:
        UserError: one cannot be read, or as `check_dataset_json` and `plans.reader.check_plans`.
    """
    try:
        plans, dataset_json = (load_object(folder / name) for name in ("plans.json", "dataset.json"))
    except ValueError as error:
        raise UserError(f"-m {folder}: plans.json or dataset.json cannot be read ({error}); give a folder {kind} of "
                        "nnUNet_results") from None  # fmt: skip
    check_dataset_json(dataset_json, str(folder / "dataset.json"))
    configurations = plans.get("configurations")
    configurations = configurations if isinstance(configurations, dict) else {}
    ours = [name for name, configuration in configurations.items() if _network_of(configuration) in KNOWN]
    check_plans(plans, str(folder / "plans.json"), dataset_json, used=ours)
    return plans, dataset_json


def _network_of(configuration: Any) -> Any:
    architecture = configuration.get("architecture") if isinstance(configuration, dict) else None
    name = architecture.get("network_class_name") if isinstance(architecture, dict) else None
    return name if isinstance(name, str) else None


def check_configuration(plans: dict[str, Any], name: str, where: str) -> None:
    """See that a configuration of the plans in a checkpoint is one that FratMAE trains.

    Raises:
        UserError: it is not there, is a part of a cascade, has settings out of bounds, or as `check_architecture`.
    """
    configuration = resolve(plans["configurations"], name, where)
    if configuration.get("next_stage") or configuration.get("previous_stage"):
        raise UserError(f"{where}, configuration {name}: is a part of a cascade, which FratMAE has none of")
    check_architecture(configuration.get("architecture"), f"{where}, configuration {name}")
    require("fratmae" in plans, f"{where}: block fratmae is missing; these are no plans of FratMAE")
    check_settings(plans, where)


def check_architecture(architecture: object, where: str) -> None:
    """See that a configuration of plans.json describes a network of ours, of a size that somebody trains.

    Raises:
        UserError: it names another class, asks for an import, or has arguments that are unknown or out of bounds.
    """
    name = _network_of({"architecture": architecture})
    if name not in KNOWN:
        raise UserError(f"{where}: the network {str(name)[:80]!r} is none of FratMAE's, so it is not loaded")
    check_network(architecture, "architecture", where)
