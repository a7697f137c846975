"""One pure function turns any nnU-Net plans into FratMAE plans (DESIGN contract 6).

Patch and batch size are chosen for the data, the architecture is written as plain JSON that stock nnU-Net builds, and
the settings are kept in the top-level block "fratmae". What is a network's own is in its family (plans/vit_pair.py).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.units import MODALITIES
from plans.channels import channel_modalities, find_channels
from plans.front_door import hwd_axes, lost_to_pretraining, units_of_plans
from plans.reader import resolve
from plans.settings import Settings
from plans.vit_pair import NETWORK, architecture, fit


def extend_plans(
    plans: dict[str, Any], dataset_json: dict[str, Any], settings: Settings, configuration: str = "3d_fullres"
) -> tuple[dict[str, Any], list[str]]:
    """FratMAE plans from nnU-Net plans; the argument is not changed.

    A configuration that already is FratMAE's keeps its patch and batch size (rounded up to whole tokens) and gets the
    architecture of `settings` anew. Else both are chosen for the data and for `finetune.gpu_memory_target`.

    Returns:
        The plans and warnings for the user, one line each.

    Raises:
        UserError: a configuration that is no full-resolution 3D one, channels that are not CT and PET or the one of
            them that `settings.modalities` says, settings that do not go with one alone, a network that needs more
            memory than the target even for the smallest patch and batch, or with a pretrained artefact, plans of
            which it would not be the same function as in pretraining.
    """
    plans = deepcopy(plans)
    config = resolve(plans["configurations"], configuration)
    of_cascade = config.get("previous_stage") or config.get("next_stage")
    if len(config["patch_size"]) != 3 or of_cascade or configuration == "wholebody":
        raise UserError(f"configuration {configuration}: FratMAE trains 3D configurations at native spacing without a "
                        "cascade; use 3d_fullres")  # fmt: skip
    axes = hwd_axes(plans["transpose_forward"])
    present = find_channels(dataset_json, settings.modalities)
    settings = replace(settings, modalities="both" if len(present) > 1 else next(iter(present)))
    settings, too_large = fit(settings, config, axes, count_classes(dataset_json))
    lost = lost_to_pretraining(plans, config, dataset_json, present)
    if lost and settings.pretrained and not settings.finetune.from_scratch:
        raise UserError(f"pretrained encoders {settings.pretrained} cannot be used with these plans: {lost[0]}; or "
                        "train from scratch (fratmae.finetune.from_scratch)")  # fmt: skip
    door, narrow = units_of_plans(plans, config, present)
    unused = [f"channel {channel} is neither CT nor PET, the network does not use it"
              for channel, name in enumerate(channel_modalities(dataset_json)) if name not in MODALITIES]  # fmt: skip
    patch = settings.finetune.patch
    config["patch_size"] = [patch[axes.index(axis)] for axis in range(3)]
    config["batch_size"] = settings.finetune.batch_size
    spacing = [config["spacing"][axis] for axis in axes]
    config["architecture"] = {
        "network_class_name": NETWORK,
        "arch_kwargs": architecture(settings, spacing) | {"axes": axes} | door,
        "_kw_requires_import": [],
    }
    plans["configurations"][configuration] = config
    plans["fratmae"] = settings.to_json()
    return plans, lost + narrow + too_large + unused


def count_classes(dataset_json: dict[str, Any]) -> int:
    """Channels of the segmentation network's output, as nnU-Net's LabelManager counts them: one for each label and the
    background, or, where a label is a list of values, one for each region; none for "ignore"."""
    labels = {name: value for name, value in dataset_json.get("labels", {}).items() if name != "ignore"}
    has_regions = any(isinstance(value, list | tuple) and len(value) > 1 for value in labels.values())
    return len(labels) - has_regions if labels else 2
