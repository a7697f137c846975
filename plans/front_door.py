"""How plans of nnU-Net, any, are brought to the front door of a network: axes, channels and physical units.

The network's side is nnunet_fratmae/networks/front_door.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from nnunet_fratmae.base.units import MODALITIES, PRETRAINING_UNITS
from plans.channels import channel_modalities

HWD_FROM_ZYX = (1, 2, 0)  # H, W, D as axes of nnU-Net's array order (z, y, x) = (SI, AP, LR)


def hwd_axes(transpose_forward: Sequence[int]) -> list[int]:
    """The plans' axis that is H, the one that is W and the one that is D (plans axis i is array axis tf[i])."""
    return [list(transpose_forward).index(axis) for axis in HWD_FROM_ZYX]


def _range_seen(modality: str, properties: dict[str, float]) -> float:
    """Share of the pretraining range that is left by the clipping of nnU-Net's CTNormalization."""
    units = PRETRAINING_UNITS[modality]
    low, high = max(properties["percentile_00_5"], units.lower), min(properties["percentile_99_5"], units.upper)
    return (high - low) / (units.upper - units.lower)


def lost_to_pretraining(
    plans: dict[str, Any], config: dict[str, Any], dataset_json: dict[str, Any], channels: dict[str, int]
) -> list[str]:
    """What keeps a pretrained encoder from being the same function of the same patient, one line each."""
    lost = []
    for modality, channel in channels.items():
        scheme = config["normalization_schemes"][channel]
        properties = plans["foreground_intensity_properties_per_channel"][str(channel)]
        if affine_to_units(modality, scheme, properties) is None:
            declared = json.dumps(channel_modalities(dataset_json))  # or the new name would be taken for a CT
            lost.append(f"channel {channel} ({modality}) has {scheme}: absolute values are lost; name the channel CT "
                        f'in dataset.json, write "fratmae": {{"modalities": {declared}}} there and plan again')
        if any(properties == intensity_properties(other) for other in MODALITIES if other != modality):
            lost.append(f"channel {channel} ({modality}) is normalised as the other modality: plans of a dataset with "
                        "its channels in another order? plan this one by itself")  # fmt: skip
    if not str(plans.get("image_reader_writer", "")).endswith("WithReorient"):
        lost.append(f"{plans.get('image_reader_writer')} does not look at the orientation of images, FratMAE takes "
                    'them for axial slices from the feet up; write "overwrite_image_reader_writer": '
                    '"SimpleITKIOWithReorient" in dataset.json and plan again')  # fmt: skip
    return lost


def units_of_plans(
    plans: dict[str, Any], config: dict[str, Any], channels: dict[str, int]
) -> tuple[dict[str, Any], list[str]]:
    """Arguments of a network's front door but the axes, and warnings.

    `modalities`: the channels of CT and of PET, None for one that is not used; `scale` and `shift`: the affine of each
    to pretraining units (1 and 0 for one that is not used or has lost them); `clip`: where these are clipped, None
    where the plans clip as narrowly (left out where they do for both).
    """
    scale, shift, warnings = [1.0] * len(MODALITIES), [0.0] * len(MODALITIES), []
    clip: list[list[float] | None] = [None] * len(MODALITIES)
    for modality, channel in channels.items():
        number, units = MODALITIES.index(modality), PRETRAINING_UNITS[modality]
        scheme = config["normalization_schemes"][channel]
        properties = plans["foreground_intensity_properties_per_channel"][str(channel)]
        affine = affine_to_units(modality, scheme, properties)
        if affine is None:
            continue
        scale[number], shift[number] = affine
        low, high = -math.inf, math.inf
        if scheme == "CTNormalization":
            low, high = properties["percentile_00_5"], properties["percentile_99_5"]
        if low < units.lower or high > units.upper:
            clip[number] = [(bound - units.mean) / units.std for bound in (units.lower, units.upper)]
        if scheme == "CTNormalization" and _range_seen(modality, properties) < 0.5:
            warnings.append(f"these plans clip channel {channel} to {low:g} .. {high:g} {units.unit}, less than half "
                            "of what pretraining saw; fratmae_plan_and_preprocess keeps it")  # fmt: skip
    door = {"modalities": [channels.get(modality) for modality in MODALITIES], "scale": scale, "shift": shift}
    return door | ({"clip": clip} if any(clip) else {}), warnings


def absent_values(plans: dict[str, Any], config: dict[str, Any]) -> list[float]:
    """The value of a missing CT and of a missing PET in the plans' normalisation, for a configuration that uses both.

    Args:
        config: a FratMAE configuration of the plans.
    """
    schemes, properties = config["normalization_schemes"], plans["foreground_intensity_properties_per_channel"]
    channels = zip(MODALITIES, config["architecture"]["arch_kwargs"]["modalities"], strict=True)
    return [absent_value(modality, schemes[channel], properties[str(channel)]) for modality, channel in channels]


# --------------------------------------------------------------------------------- the words of nnU-Net's plans


def intensity_properties(modality: str) -> dict[str, float]:
    """The pretraining units in the words of nnU-Net's plans, so that stock CTNormalization computes exactly them."""
    u = PRETRAINING_UNITS[modality]
    return {
        "mean": u.mean,
        "std": u.std,
        "percentile_00_5": u.lower,
        "percentile_99_5": u.upper,
        "min": u.lower,
        "max": u.upper,
        "median": u.mean,
    }


def absent_value(modality: str, scheme: str, properties: dict[str, float]) -> float:
    """What nnU-Net's normalisation makes of a missing modality, an image of air (CT) or without uptake (PET).

    Args:
        scheme, properties: as `affine_to_units`.
    """
    lowest = PRETRAINING_UNITS[modality].lower
    if scheme == "CTNormalization":
        return (max(lowest, properties["percentile_00_5"]) - properties["mean"]) / max(properties["std"], 1e-8)
    return lowest if scheme == "NoNormalization" else 0.0  # a constant image less its own mean


def affine_to_units(modality: str, scheme: str, properties: dict[str, float]) -> tuple[float, float] | None:
    """(scale, shift) such that pretraining units = scale * value + shift, for a value that nnU-Net normalised.

    Args:
        scheme: nnU-Net's normalization scheme of the channel.
        properties: the channel's entry of `foreground_intensity_properties_per_channel`.

    Returns:
        None where the scheme cannot be inverted (z-score of each image): the absolute HU or SUV is lost.
    """
    u = PRETRAINING_UNITS[modality]
    if scheme == "CTNormalization":
        return max(properties["std"], 1e-8) / u.std, (properties["mean"] - u.mean) / u.std
    if scheme == "NoNormalization":
        return 1 / u.std, -u.mean / u.std
    return None
