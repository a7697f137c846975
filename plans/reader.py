"""The one reader of plans that a user may have edited, nnU-Net's part and ours, before anything is built of them.

What our code reads of plans is looked at here once, with the name of the file and the field in the message. So whoever
got plans from `read_plans`, or gave them to `check_plans`, takes them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from nnunet_fratmae.base.command import UserError, dataset_number
from nnunet_fratmae.base.files import plain_name
from nnunet_fratmae.networks.strides import TOKEN_SIDES
from plans.dataset_json import read_dataset_json
from plans.fields import Bounds, require, shown, shown_name
from plans.preprocessed import GROUND_TRUTH, PLANS_NAME, read_json
from plans.settings import MOST_BATCH, MOST_SIDE, PRESETS, Settings, check_batch, check_tokens, check_voxels

OURS = "nnunet_fratmae.networks."
SPATIAL = ("3d_fullres", "wholebody")  # the configurations that our commands read
CLASSIFIERS = {"FratMAEStaging": "classes", "FratMAEJoint": "stages"}  # networks, and the argument for their classes
NAMES = ("plans_name", "dataset_name")  # of files and folders; a model folder does without them
INTENSITIES = ("mean", "std", "percentile_00_5", "percentile_99_5")
CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

INTENSITY = Bounds(least=-1e9, most=1e9)  # Bq/ml of the hottest bladder is below
SIDE, BATCH = Bounds(least=1, most=MOST_SIDE), Bounds(least=1, most=MOST_BATCH)
MEDIAN = Bounds(above=0, most=100_000)  # voxels of a study
SPACING = Bounds(least=1e-3, most=1e3)  # mm
AFFINE = Bounds(least=-1e9, most=1e9)
DROPOUT = Bounds(least=0, below=1)
FEATURES = Bounds(least=1, most=512)


def load_plans(preprocessed: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """FratMAEPlans.json and dataset.json of a preprocessed dataset, with its whole-body grid.

    Raises:
        UserError: they are not there, or as `check_plans` and `check_whole_body`.
    """
    path = preprocessed / f"{PLANS_NAME}.json"
    if not path.is_file():
        dataset_id = dataset_number(preprocessed.name)
        raise UserError(f"{path} is not there; run fratmae_plan_and_preprocess -d {dataset_id} first")
    dataset_json = read_dataset_json(preprocessed / "dataset.json")
    plans = read_plans(path, dataset_json)
    check_names(plans, str(path))
    _need(plans, "fratmae", str(path), "")
    _need(plans["configurations"], "3d_fullres", str(path), "configurations")
    return plans, dataset_json


def read_plans(path: Path, dataset_json: dict[str, Any] | None = None) -> dict[str, Any]:
    """Plans from a file, checked.

    Raises:
        UserError: as `check_plans`, or the file is no JSON.
    """
    plans = read_json(path)
    check_plans(plans, str(path), dataset_json)
    return plans


def check_plans(plans: Any, where: str, dataset_json: dict[str, Any] | None = None, used: Iterable[str] = ()) -> None:
    """See that plans have what our code reads, of the types and within the bounds it takes for granted.

    A block "fratmae" need not be there; if it is, it is whole.

    Args:
        where: the file, for the messages.
        dataset_json: of the same dataset, checked before; its channels must be those of the plans.
        used: further configurations that must be right, besides 3d_fullres and wholebody.

    Raises:
        UserError: a part that is missing, of another type, or out of bounds.
    """
    check_nnunet(plans, where, dataset_json, used)
    if "fratmae" in plans:
        check_settings(plans, where)


def check_names(plans: Mapping[str, Any], where: str) -> None:
    """Raises UserError where plans do not say their name or that of their dataset, by which nnU-Net finds folders."""
    for name in NAMES:
        _need(plans, name, where, "")


def check_settings(plans: Mapping[str, Any], where: str) -> Settings:
    """The settings in the block "fratmae" of plans, and their `fratmae_chosen`.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of bounds.
    """
    try:
        settings = Settings.from_json(plans.get("fratmae", {}))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    known = settings.to_json()
    for key in _dict(plans.get("fratmae_chosen", {}), where, "fratmae_chosen"):
        *path, last = key.split(".")
        block = known.get(path[0]) if len(path) == 1 else None if path else known
        require(isinstance(block, dict) and last in block, f"{where}: fratmae_chosen: unknown key {shown_name(key)}; "
                "remove it")  # fmt: skip
    return settings


def check_whole_body(plans: Mapping[str, Any], where: str) -> None:
    """See that plans have a whole-body configuration whose sizes are all set, as the grid store needs.

    Raises:
        UserError: they have not.
    """
    block = _need(plans, "fratmae", where, "")
    require("wholebody" in plans["configurations"], f"{where}: configurations.wholebody is missing; plan again with "
            "fratmae_plan_and_preprocess")  # fmt: skip
    settings = Settings.from_json(block)
    sizes = {"fratmae.token_patch": settings.token_patch} | {
        f"fratmae.wholebody.{name}": getattr(settings.wholebody, name) for name in ("grid", "patch", "k")
    }
    for name, value in sizes.items():
        require(value is not None, f"{where}: {name} is missing; give it a value, or plan again with "
                "fratmae_plan_and_preprocess")  # fmt: skip


def resolve(configurations: Mapping[str, Any], name: str, where: str = "plans.json") -> dict[str, Any]:
    """A configuration with nnU-Net's inheritance resolved; the argument is not changed.

    Raises:
        UserError: it, or what it inherits from, is not there, or it inherits from itself.
    """
    chain, parent = [], name
    while parent is not None:
        there = ", ".join(map(shown_name, configurations))
        known = isinstance(parent, str) and parent in configurations
        asked = shown_name(parent) if isinstance(parent, str) else shown(parent)
        require(known, f"{where}: configuration {asked} is not in the plans; there are {there}")
        require(parent not in chain, f"{where}: configurations.{parent}.inherits_from leads back to itself")
        chain.append(parent)
        parent = _dict(configurations[parent], where, f"configurations.{parent}").get("inherits_from")
    whole: dict[str, Any] = {}
    for one in reversed(chain):
        whole |= deepcopy(configurations[one])
    whole.pop("inherits_from", None)
    return whole


# ------------------------------------------------------------------------------------------------------ nnU-Net's part


def check_nnunet(plans: Any, where: str, dataset_json: dict[str, Any] | None = None, used: Iterable[str] = ()) -> None:
    """`check_plans` without the block "fratmae"."""
    _dict(plans, where, "the file")
    for name in NAMES:
        if name in plans:
            plain_name(plans[name], f"{where}: {name}")
    forward = _need(plans, "transpose_forward", where, "")
    require(_is_permutation(forward), f"{where}: transpose_forward={shown(forward)}: must be 0, 1 and 2 in some order")
    inverse = [forward.index(axis) for axis in range(3)]
    backward = plans.get("transpose_backward", inverse)
    require(_is_permutation(backward) and backward == inverse, f"{where}: transpose_backward={shown(backward)}: must "
            f"be {inverse}, which undoes transpose_forward")  # fmt: skip
    _class(_need(plans, "image_reader_writer", where, ""), where, "image_reader_writer")
    for name in ("label_manager", "experiment_planner_used"):
        if plans.get(name) is not None:
            _class(plans[name], where, name)
    configurations = _dict(_need(plans, "configurations", where, ""), where, "configurations")
    _check_folders(configurations, where)
    properties = _dict(_need(plans, "foreground_intensity_properties_per_channel", where, ""), where,
                       "foreground_intensity_properties_per_channel")  # fmt: skip
    for name in dict.fromkeys([*SPATIAL, *used]):
        if name in configurations:
            config = resolve(configurations, name, where)
            _check_configuration(config, f"configurations.{name}", where)
            _check_channels(config, properties, dataset_json, f"configurations.{name}", where)


def _check_folders(configurations: dict[str, Any], where: str) -> None:
    """Folders that are written and replaced must lie in the dataset's own, and no two be the same."""
    folders: dict[str, str] = {}
    for name in configurations:
        config, field = resolve(configurations, name, where), f"configurations.{shown_name(name)}.data_identifier"
        if "data_identifier" in config:
            folder = plain_name(config["data_identifier"], f"{where}: {field}")
            require(folder != GROUND_TRUTH, f"{where}: {field} is {GROUND_TRUTH}, where nnU-Net keeps the labels; give "
                    "another name")  # fmt: skip
            folders[name] = folder
    if "wholebody" in folders:
        shared = [name for name, folder in folders.items() if folder == folders["wholebody"] and name != "wholebody"]
        require(not shared, f"{where}: configurations.wholebody.data_identifier is that of {', '.join(shared)}, too, "
                "whose folder the whole-body store would replace; give another name")  # fmt: skip


def _check_configuration(config: dict[str, Any], field: str, where: str) -> None:
    patch = _numbers(_need(config, "patch_size", where, field), SIDE, where, f"{field}.patch_size", whole=True)
    batch = _number(_need(config, "batch_size", where, field), BATCH, where, f"{field}.batch_size", whole=True)
    require(len(patch) in (2, 3), f"{where}: {field}.patch_size={shown(patch)}: must be three whole numbers")
    check_voxels(f"{where}: {field}.patch_size", patch)
    check_batch(f"{where}: {field}.batch_size", batch, patch)
    for name, bounds in (("median_image_size_in_voxels", MEDIAN), ("spacing", SPACING)):
        values = _numbers(_need(config, name, where, field), bounds, where, f"{field}.{name}")
        require(len(values) == len(patch), f"{where}: {field}.{name} has {len(values)} numbers, patch_size has "
                f"{len(patch)}")  # fmt: skip
    for name in ("preprocessor_name", "resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"):
        if name in config:
            _class(config[name], where, f"{field}.{name}")
            _dict(config.get(f"{name}_kwargs", {}), where, f"{field}.{name}_kwargs")
    require(isinstance(config.get("batch_dice", True), bool), f"{where}: {field}.batch_dice must be true or false")
    previous, following = config.get("previous_stage"), config.get("next_stage")
    for name, value in (("previous_stage", previous), ("next_stage", following)):
        stages = value if isinstance(value, list) else [value]
        right = value is None or all(isinstance(stage, str) for stage in stages)
        require(right, f"{where}: {field}.{name}={shown(value)}: must be the name of a configuration")
    if "architecture" in config:
        architecture = _dict(config["architecture"], where, f"{field}.architecture")
        network = _need(architecture, "network_class_name", where, f"{field}.architecture")
        require(isinstance(network, str), f"{where}: {field}.architecture.network_class_name must be text")
        _need(architecture, "arch_kwargs", where, f"{field}.architecture")
        if network.startswith(OURS):
            check_network(architecture, f"{field}.architecture", where)


def _check_channels(
    config: dict[str, Any], properties: dict[str, Any], dataset_json: dict[str, Any] | None, field: str, where: str
) -> None:
    """The normalisation of every channel."""
    schemes = _need(config, "normalization_schemes", where, field)
    right = isinstance(schemes, list) and schemes and all(isinstance(scheme, str) for scheme in schemes)
    require(right, f"{where}: {field}.normalization_schemes={shown(schemes)}: must name a scheme for each channel")
    for scheme in schemes:
        _class(scheme, where, f"{field}.normalization_schemes")
    if dataset_json is not None:
        channels = len(dataset_json.get("channel_names", dataset_json.get("modality", {})))
        require(len(schemes) >= channels, f"{where}: {field}.normalization_schemes has {len(schemes)} entries, "
                f"dataset.json has {channels} channels")  # fmt: skip
    masks = config.get("use_mask_for_norm", [False] * len(schemes))
    right = isinstance(masks, list) and len(masks) == len(schemes) and all(isinstance(mask, bool) for mask in masks)
    require(right, f"{where}: {field}.use_mask_for_norm={shown(masks)}: must be true or false for each channel")
    for channel, scheme in enumerate(schemes):
        name = f"foreground_intensity_properties_per_channel.{channel}"
        measured = _dict(_need(properties, str(channel), where, "foreground_intensity_properties_per_channel"), where,
                         name)  # fmt: skip
        if scheme != "CTNormalization":
            continue
        values = {key: _number(_need(measured, key, where, name), INTENSITY, where, f"{name}.{key}")
                  for key in INTENSITIES}  # fmt: skip
        require(values["std"] >= 0, f"{where}: {name}.std must not be negative, not {shown(values['std'])}")
        require(values["percentile_00_5"] <= values["percentile_99_5"], f"{where}: {name}.percentile_00_5 is above "
                "percentile_99_5")  # fmt: skip


# --------------------------------------------------------------------------------------------------------- our networks


def check_network(architecture: dict[str, Any], field: str, where: str) -> None:
    """See that a network of ours is built of sizes that somebody trains, and of nothing that nnU-Net would import.

    Args:
        architecture: the block of a configuration, whose `network_class_name` is one of ours.
        field: the block's name, for the messages.

    Raises:
        UserError: it is not.
    """
    imported = architecture.get("_kw_requires_import")
    require(not imported, f"{where}: {field}._kw_requires_import={shown(imported)}: must be [], FratMAE's networks "
            "import nothing")  # fmt: skip
    kwargs, field = architecture.get("arch_kwargs"), f"{field}.arch_kwargs"
    _check_arguments(_dict(kwargs, where, field), field, where)
    for class_name, needed in CLASSIFIERS.items():
        if architecture["network_class_name"].endswith(class_name):
            _need(kwargs, needed, where, field)


def _check_arguments(kwargs: dict[str, Any], field: str, where: str) -> None:
    """The keyword arguments of FratMAEUNETR, FratMAEJoint or FratMAEStaging (nnunet_fratmae/networks)."""
    patch, token = (_numbers(_need(kwargs, name, where, field), SIDE, where, f"{field}.{name}", whole=True, number=3)
                    for name in ("patch_size", "token_patch"))  # fmt: skip
    check_voxels(f"{where}: {field}.patch_size", patch)
    _check_whole_tokens(patch, token, f"{where}: {field}.patch_size")
    sizes = tuple(_need(kwargs, name, where, field) for name in ("embed_dim", "depth", "num_heads"))
    known = [(preset.embed_dim, preset.depth, preset.num_heads) for preset in PRESETS.values()]
    right = all(type(size) is int for size in sizes) and sizes in known
    require(right, f"{where}: {field}: embed_dim, depth and num_heads {shown(sizes)} are those of no preset "
            f"({', '.join(PRESETS)})")  # fmt: skip
    channels, numbers = kwargs.get("modalities", [0, 1]), {"scale": AFFINE, "shift": AFFINE}
    named = isinstance(channels, list) and 1 <= len(channels) <= 2 and all(
        channel is None or isinstance(channel, str) or (type(channel) is int and 0 <= channel < 100)
        for channel in channels
    )  # fmt: skip
    require(named, f"{where}: {field}.modalities={shown(channels)}: must be the channels of CT and PET")
    require(_is_permutation(kwargs.get("axes", [0, 1, 2])), f"{where}: {field}.axes={shown(kwargs.get('axes'))}: must "
            "be 0, 1 and 2 in some order")  # fmt: skip
    for name, bounds in numbers.items():
        if name in kwargs:
            _numbers(kwargs[name], bounds, where, f"{field}.{name}", number=2)
    clip = kwargs.get("clip", [None, None])
    require(isinstance(clip, list) and len(clip) == 2, f"{where}: {field}.clip={shown(clip)}: must be two ranges")
    for bound in clip:
        if bound is not None:
            low, high = _numbers(bound, AFFINE, where, f"{field}.clip", number=2)
            require(low <= high, f"{where}: {field}.clip={shown(clip)}: a range ends before it begins")
    if "features" in kwargs:
        _number(kwargs["features"], FEATURES, where, f"{field}.features", whole=True)
    if kwargs.get("strides") is not None:
        _check_strides(kwargs["strides"], token, f"{field}.strides", where)
    stages = _dict(kwargs.get("stages", {}), where, f"{field}.stages")
    if "stages" in kwargs:
        seen = _numbers(_need(stages, "patch_size", where, f"{field}.stages"), SIDE, where,
                        f"{field}.stages.patch_size", whole=True, number=3)  # fmt: skip
        check_voxels(f"{where}: {field}.stages.patch_size", seen)
        _check_whole_tokens(seen, token, f"{where}: {field}.stages.patch_size")
        _need(stages, "classes", where, f"{field}.stages")
        _need(stages, "dropout", where, f"{field}.stages")
    for part, name in ((kwargs, field), (stages, f"{field}.stages")):
        if "classes" in part:
            classes = part["classes"]
            right = isinstance(classes, list) and 2 <= len(classes) <= 100 and all(isinstance(c, str) for c in classes)
            require(right, f"{where}: {name}.classes={shown(classes)}: must name two classes or more")
        if "dropout" in part:
            _number(part["dropout"], DROPOUT, where, f"{name}.dropout")
    known_names = {"patch_size", "token_patch", "embed_dim", "depth", "num_heads", "features", "modalities", "axes",
                   "scale", "shift", "clip", "strides", "stages", "classes", "dropout"}  # fmt: skip
    for name in kwargs:
        require(name in known_names, f"{where}: {field}: unknown key {shown_name(name)}")


def _check_whole_tokens(patch: list[int], token: list[int], name: str) -> None:
    require(all(t in TOKEN_SIDES for t in token), f"{name}: each side of token_patch {shown(token)} must be one of "
            f"{', '.join(map(str, TOKEN_SIDES))}")  # fmt: skip
    check_tokens(name, patch, token)


def _check_strides(strides: Any, token: list[int], field: str, where: str) -> None:
    right = isinstance(strides, list) and len(strides) == 4 and all(
        isinstance(step, list) and len(step) == 3 and all(type(n) is int and n >= 1 for n in step) for step in strides
    )  # fmt: skip
    product = [a * b * c * d for a, b, c, d in zip(*strides, strict=True)] if right else None
    require(product == token, f"{where}: {field}={shown(strides)}: must be four steps that make up the token patch "
            f"{token}")  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- values


def _need(mapping: Mapping[str, Any], key: str, where: str, field: str) -> Any:
    name = f"{field}.{key}" if field else key
    require(key in mapping, f"{where}: {name} is missing; put it back, or plan again with fratmae_plan_and_preprocess")
    return mapping[key]


def _dict(value: Any, where: str, field: str) -> dict[str, Any]:
    require(isinstance(value, dict), f"{where}: {field} must be {{...}}, not {shown(value)}")
    return value


def _class(value: Any, where: str, field: str) -> None:
    right = isinstance(value, str) and CLASS_NAME.fullmatch(value) is not None and len(value) < 100
    require(right, f"{where}: {field}={shown(value)}: must be the name of one of nnU-Net's classes or functions")


def _number(value: Any, bounds: Bounds, where: str, field: str, whole: bool = False) -> Any:
    right = type(value) is int or (type(value) is float and not whole)
    require(right, f"{where}: {field}={shown(value)}: must be {'a whole number' if whole else 'a number'}")
    fault = bounds.fault(value)
    require(fault is None, f"{where}: {field} {fault}, not {shown(value)}")
    return value


def _numbers(
    value: Any, bounds: Bounds, where: str, field: str, whole: bool = False, number: int | None = None
) -> list[Any]:
    kind = "whole numbers" if whole else "numbers"
    right = isinstance(value, list) and (number is None or len(value) == number)
    require(right, f"{where}: {field}={shown(value)}: must be {number or 'a list of'} {kind}")
    return [_number(one, bounds, where, field, whole) for one in value]


def _is_permutation(value: Any) -> bool:
    return isinstance(value, list) and all(type(axis) is int for axis in value) and sorted(value) == [0, 1, 2]
