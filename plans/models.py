"""Plans that come with weights, checked before nnU-Net builds a network from them: it imports whatever they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.jsons import load_object
from plans.reader import check_network
from plans.settings import Settings
from plans.staging import NETWORK as STAGING_NETWORK
from plans.vit_pair import JOINT_NETWORK
from plans.vit_pair import NETWORK as SEGMENTATION_NETWORK

KNOWN = (SEGMENTATION_NETWORK, JOINT_NETWORK, STAGING_NETWORK)
"""The networks that plans may name."""


def read_model_files(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """plans.json and dataset.json of a model folder, perhaps a downloaded one, with no network in them but ours.

    Args:
        kind: what folder is wanted, for the message.

    Raises:
        UserError: one cannot be read, is of no model, or names a network that is not ours.
    """
    try:
        plans, dataset_json = (load_object(folder / name) for name in ("plans.json", "dataset.json"))
    except ValueError as error:
        raise UserError(f"-m {folder}: plans.json or dataset.json cannot be read ({error}); give a folder {kind} of "
                        "nnUNet_results") from None  # fmt: skip
    where = f"-m {folder}: plans.json"
    if not isinstance(plans.setdefault("configurations", {}), dict):
        raise UserError(f"{where} has no configurations; give a folder {kind} of nnUNet_results")
    for name, configuration in plans["configurations"].items():
        if not isinstance(configuration, dict):
            raise UserError(f"{where}, configuration {name[:40]}: must be {{...}}")
        architecture = configuration.get("architecture") or {}
        if isinstance(architecture, dict) and str(architecture.get("network_class_name")) in KNOWN:
            check_architecture(architecture, f"{where}, configuration {name[:40]}")
    if "fratmae" in plans:
        try:
            Settings.from_json(plans["fratmae"])
        except UserError as error:
            raise UserError(f"-m {folder}: {error}") from None
    return plans, dataset_json


def check_configuration(plans: dict[str, Any], name: str, where: str) -> None:
    """See that a configuration of the plans in a checkpoint is one that FratMAE trains.

    Raises:
        UserError: it is not there, is a part of a cascade, has settings out of bounds, or as `check_architecture`.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # takes seconds, and commands read plans

    try:
        configuration = PlansManager(plans).get_configuration(name).configuration
    except Exception as error:  # noqa: BLE001 - nnU-Net checks nothing
        raise UserError(f"{where}: has no configuration {name} that can be read ({type(error).__name__})") from None
    if configuration.get("next_stage") or configuration.get("previous_stage"):
        raise UserError(f"{where}, configuration {name}: is a part of a cascade, which FratMAE has none of")
    check_architecture(configuration.get("architecture"), f"{where}, configuration {name}")
    try:
        Settings.from_json(plans["fratmae"])
    except (KeyError, UserError) as error:
        raise UserError(f"{where}: block fratmae: {error}") from None


def check_architecture(architecture: object, where: str) -> None:
    """See that a configuration of plans.json describes a network of ours, of a size that somebody trains.

    Raises:
        UserError: it names another class, asks for an import, or has arguments that are unknown or out of bounds.
    """
    block = architecture if isinstance(architecture, dict) else {}
    name, kwargs = block.get("network_class_name"), block.get("arch_kwargs")
    if not isinstance(name, str) or name not in KNOWN:
        raise UserError(f"{where}: the network {str(name)[:80]!r} is none of FratMAE's, so it is not loaded")
    if block.get("_kw_requires_import"):
        raise UserError(f"{where}: _kw_requires_import must be empty, FratMAE's networks import nothing")
    if not isinstance(kwargs, dict):
        raise UserError(f"{where}: has no arch_kwargs")
    check_network(kwargs, "arch_kwargs", where)
