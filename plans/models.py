"""Plans that come with weights, checked before nnU-Net builds a network from them: it imports whatever they name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.jsons import read_object
from plans.contract import MOST_TOKENS
from plans.extension import JOINT_NETWORK
from plans.extension import NETWORK as SEGMENTATION_NETWORK
from plans.settings import PRESETS, TOKEN_SIDES, Settings
from plans.staging import MOST_CLASSES
from plans.staging import NETWORK as STAGING_NETWORK
from plans.strides import LEVELS
from plans.units import MODALITIES

MOST_FEATURES = 512  # of a decoder at full resolution; the presets have at most 32


def read_model_files(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """plans.json and dataset.json of a model folder, perhaps a downloaded one, with no network in them but ours.

    Args:
        kind: what folder is wanted, for the message.

    Raises:
        UserError: one cannot be read, is of no model, or names a network that is not ours.
    """
    plans, dataset_json = (read_object(folder / name, f"-m: give a folder {kind} of nnUNet_results")
                           for name in ("plans.json", "dataset.json"))  # fmt: skip
    where = f"-m {folder}: plans.json"
    if not isinstance(plans.get("configurations"), dict):
        raise UserError(f"{where} has no configurations; give a folder {kind} of nnUNet_results")
    if not isinstance(dataset_json.get("file_ending"), str) or not isinstance(dataset_json.get("labels", {}), dict):
        raise UserError(f"-m {folder}: dataset.json has no file_ending or labels; copy the model folder again")
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
    _check_arguments(kwargs, KNOWN[name], where)
    tokens = [math.prod(_sides(size)) / math.prod(kwargs["token_patch"])
              for size in (kwargs["patch_size"], kwargs.get("stages", kwargs).get("patch_size"))]  # fmt: skip
    if max(tokens) > MOST_TOKENS:
        raise UserError(f"{where}: a patch has more than {MOST_TOKENS} tokens")
    encoder = {key: kwargs[key] for key in ("embed_dim", "depth", "num_heads")}
    if encoder not in [preset.encoder for preset in PRESETS.values()]:
        raise UserError(f"{where}: encoders of {encoder} are of no preset ({', '.join(PRESETS)})")


def _check_arguments(kwargs: dict[str, Any], known: dict[str, tuple[Callable[[Any], bool], bool]], where: str) -> None:
    if unknown := sorted(set(map(str, kwargs)) - known.keys()):
        raise UserError(f"{where}: the network takes no {', '.join(unknown)[:80]}")
    for name, (is_right, is_needed) in known.items():
        if name not in kwargs and not is_needed:
            continue
        try:
            right = name in kwargs and is_right(kwargs[name])
        except (TypeError, ValueError, KeyError, AttributeError):
            right = False
        if not right:
            raise UserError(f"{where}: {name} of the network is {str(kwargs.get(name, 'missing'))[:60]}, which is none "
                            "of FratMAE's")  # fmt: skip


def _sides(value: Any) -> list[int]:
    if len(value) != 3 or not all(type(side) is int and 0 < side <= 2**16 for side in value):
        raise ValueError(value)
    return list(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return len(value) == len(MODALITIES) and all(map(_is_number, value))


def _are_classes(value: Any) -> bool:
    return 2 <= len(value) <= MOST_CLASSES and all(isinstance(name, str) and len(name) <= 200 for name in value)


def _is_dropout(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_stages(value: Any) -> bool:
    return bool(value.keys() == {"patch_size", "classes", "dropout"} and _sides(value["patch_size"])
                and _are_classes(value["classes"]) and _is_dropout(value["dropout"]))  # fmt: skip


def _are_channels(value: Any) -> bool:
    numbers = [channel for channel in value if channel is not None]
    return len(value) == len(MODALITIES) and bool(numbers) and all(type(n) is int and 0 <= n < 100 for n in numbers)


_ENCODERS = {
    "patch_size": (lambda value: bool(_sides(value)), True),
    "token_patch": (lambda value: all(side in TOKEN_SIDES for side in _sides(value)), True),
    **{name: (lambda value: type(value) is int, True) for name in ("embed_dim", "depth", "num_heads")},
}
_UNETR = _ENCODERS | {
    "features": (lambda value: type(value) is int and 0 < value <= MOST_FEATURES, True),
    "strides": (lambda value: len(value) == LEVELS and all(max(_sides(step)) <= 16 for step in value), False),
    "modalities": (_are_channels, False),
    "axes": (lambda value: sorted(value) == [0, 1, 2], False),
    "scale": (_are_numbers, False),
    "shift": (_are_numbers, False),
    "clip": (lambda value: all(pair is None or _are_numbers(pair) for pair in value), False),
}
KNOWN = {
    SEGMENTATION_NETWORK: _UNETR,
    JOINT_NETWORK: _UNETR | {"stages": (_is_stages, True)},
    STAGING_NETWORK: _ENCODERS | {
        "classes": (_are_classes, True),
        "dropout": (_is_dropout, False),
        "modalities": (lambda value: bool(value) and set(value) <= set(MODALITIES), False),
    },
}  # fmt: skip
"""The networks that plans may name; of each argument, whether a value is right, and whether it must be there."""
