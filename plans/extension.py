"""One pure function turns any nnU-Net plans into FratMAE plans (DESIGN contract 6).

Coronal patch, token patch and batch size are chosen for the data, the architecture is written as plain JSON that stock
nnU-Net builds, and the settings are kept in the top-level block "fratmae".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from nnunetv2.configuration import ANISO_THRESHOLD

from nnunet_fratmae.base.command import UserError
from plans.contract import Contract
from plans.memory import step_memory
from plans.reader import resolve
from plans.settings import STACKS, TOKEN_SIDES, Settings
from plans.strides import decoder_strides
from plans.units import MODALITIES, PRETRAINING_UNITS, absent_value, affine_to_units, intensity_properties

NETWORK = "nnunet_fratmae.networks.unetr.FratMAEUNETR"
JOINT_NETWORK = "nnunet_fratmae.networks.staging.FratMAEJoint"  # the same with a classifier (plans/staging.py)
HWD_FROM_ZYX = (1, 2, 0)  # H, W, D as axes of nnU-Net's array order (z, y, x) = (SI, AP, LR)

PAPER_GRID, PAPER_PATCH, PAPER_K = (160, 160, 192), (32, 160, 192), 2
PAPER_TOKEN = (8, 16, 16)  # 480 tokens for the paper's patch (DESIGN, "The method")
# Patch and token of a stack. The axial one, as thick and as wide, is for the comparison of the paper's table 2.
STACK_SIZES = {"coronal": (PAPER_PATCH, PAPER_TOKEN), "axial": ((160, 160, 32), (16, 16, 8))}
MIN_TOKENS = 128  # below this a patch says too little; small studies get smaller tokens
LEAST_SIDE = 2  # of a token that is chosen
MIN_BATCH, MAX_BATCH = 2, 16  # nnU-Net's and the paper's


def extend_plans(
    plans: dict[str, Any], dataset_json: dict[str, Any], settings: Settings, configuration: str = "3d_fullres"
) -> tuple[dict[str, Any], list[str]]:
    """FratMAE plans from nnU-Net plans; the argument is not changed.

    A configuration that already is FratMAE's keeps its patch and batch size (rounded up to whole tokens) and gets the
    architecture of `settings` anew.

    Patch and batch size are chosen for the data and for `finetune.gpu_memory_target`.

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
    median = tuple(int(round(config["median_image_size_in_voxels"][axis])) for axis in axes)
    spacing = [config["spacing"][axis] for axis in axes]
    classes = count_classes(dataset_json)
    present = find_channels(dataset_json, settings.modalities)
    settings = replace(settings, modalities="both" if len(present) > 1 else next(iter(present)))
    if is_fratmae(config):
        planned = tuple(config["patch_size"][axis] for axis in axes)
        finetune = replace(settings.finetune, patch=None, batch_size=config["batch_size"])
        settings = choose_sizes(replace(settings, finetune=finetune), median, classes, spacing)
        settings = replace(settings, finetune=replace(settings.finetune, patch=cover(planned, settings.token_patch)))
    else:
        settings = _sizes_that_fit(settings, median, classes, spacing)
    finetune = settings.finetune
    needed = training_memory(settings, finetune.patch, finetune.batch_size, classes, spacing)
    lost = lost_to_pretraining(plans, config, dataset_json, present)
    if lost and settings.pretrained and not settings.finetune.from_scratch:
        raise UserError(f"pretrained encoders {settings.pretrained} cannot be used with these plans: {lost[0]}; or "
                        "train from scratch (fratmae.finetune.from_scratch)")  # fmt: skip
    scale, shift, clip, warnings = _to_units(plans, config, present)
    warnings = lost + warnings
    if needed > finetune.gpu_memory_target:
        warnings.append(f"{finetune.batch_size} patches of {finetune.patch} voxels need about {needed:.1f} GB on one "
                        f"GPU, more than finetune.gpu_memory_target={finetune.gpu_memory_target:g}; choose a smaller "
                        "finetune.batch_size, or plan for the artefact (fratmae_plan_and_preprocess -pretrained)"
                        )  # fmt: skip
    for channel, name in enumerate(channel_modalities(dataset_json)):
        if name not in MODALITIES:
            warnings.append(f"channel {channel} is neither CT nor PET, the network does not use it")
    patch = finetune.patch
    config["patch_size"] = [patch[axes.index(axis)] for axis in range(3)]
    config["batch_size"] = finetune.batch_size
    config["architecture"] = {
        "network_class_name": NETWORK,
        "arch_kwargs": {
            "patch_size": list(patch),
            "token_patch": list(settings.token_patch),
            "embed_dim": settings.sizes.embed_dim,
            "depth": settings.sizes.depth,
            "num_heads": settings.sizes.num_heads,
            "features": settings.sizes.unetr_features,
            "strides": [list(step) for step in decoder_strides(settings.token_patch, spacing)],
            "modalities": [present.get(modality) for modality in MODALITIES],
            "axes": axes,
            "scale": scale,
            "shift": shift,
            **({"clip": clip} if any(clip) else {}),
        },
        "_kw_requires_import": [],
    }
    plans["configurations"][configuration] = config
    plans["fratmae"] = settings.to_json()
    return plans, warnings


def follow_artefact(settings: Settings, contract: Contract) -> Settings:
    """Settings whose preset and token patch are the artefact's; patches of other than whole tokens are chosen anew."""
    if (settings.preset, settings.token_patch) == (contract.preset, contract.token_patch):
        return settings

    def whole_tokens(patch: Sequence[int] | None) -> bool:
        return patch is not None and all(p % t == 0 for p, t in zip(patch, contract.token_patch, strict=True))

    finetune, wholebody = settings.finetune, settings.wholebody
    if not whole_tokens(finetune.patch):
        finetune = replace(finetune, patch=None)
    if not whole_tokens(wholebody.patch):
        wholebody = replace(wholebody, patch=None)
    return replace(
        settings, preset=contract.preset, token_patch=contract.token_patch, finetune=finetune, wholebody=wholebody
    )


def is_fratmae(config: dict[str, Any]) -> bool:
    """Whether a configuration of plans.json has FratMAE's network already."""
    return config.get("architecture", {}).get("network_class_name") in (NETWORK, JOINT_NETWORK)


def hwd_axes(transpose_forward: Sequence[int]) -> list[int]:
    """The plans' axis that is H, the one that is W and the one that is D (plans axis i is array axis tf[i])."""
    return [list(transpose_forward).index(axis) for axis in HWD_FROM_ZYX]


def cover(shape: Sequence[int], token_patch: Sequence[int], limit: Sequence[int] | None = None) -> tuple[int, int, int]:
    """The smallest multiple of the token patch that covers `shape` (H, W, D), at most `limit`."""
    h, w, d = (math.ceil(s / t) * t for s, t in zip(shape, token_patch, strict=True))
    return (h, w, d) if limit is None else (min(h, limit[0]), min(w, limit[1]), min(d, limit[2]))


def choose_sizes(
    settings: Settings, median: Sequence[int], classes: int = 2, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> Settings:
    """Settings with every size that was left open chosen for studies of `median` (H, W, D) voxels of `spacing` mm.

    The paper's sizes where the data allow, smaller ones for smaller studies. Where nnU-Net calls a spacing anisotropic,
    token (and with it the strides of the decoder) and patch of the fine-tuning have the paper's proportions in mm. For
    fine-tuning, the largest batch up to the paper's that fits `finetune.gpu_memory_target`; where not even two patches
    fit, a smaller patch (of at least MIN_TOKENS tokens, so it may not fit either).
    """
    whole = settings.wholebody
    axis, (largest, _) = STACKS[whole.stack], STACK_SIZES[whole.stack]
    token = settings.token_patch or _choose_token(median, whole.stack, spacing)
    settings = replace(settings, token_patch=token)
    grid = whole.grid or cover(median, token, cover(PAPER_GRID, token))
    k = whole.k or (PAPER_K if grid[axis] >= PAPER_K * largest[axis] else 1)
    # A slab of whole tokens over the whole of the other two axes
    room = zip((g // k if i == axis else g for i, g in enumerate(grid)), largest, token, strict=True)
    slab = whole.patch or tuple(max(t, min(available, limit) // t * t) for available, limit, t in room)
    settings = replace(settings, wholebody=replace(whole, grid=grid, patch=slab, k=k))
    patch, batch = settings.finetune.patch, settings.finetune.batch_size
    if patch is None:
        largest = cover(_in_proportion(largest, spacing, token), token)
        patch = _shrink(settings, cover(median, token, largest), batch or MIN_BATCH, classes, spacing)
    if batch is None:
        fitting = (n for n in range(MAX_BATCH, MIN_BATCH, -1) if _fits(settings, patch, n, classes, spacing))
        batch = next(fitting, MIN_BATCH)
    return replace(settings, finetune=replace(settings.finetune, patch=patch, batch_size=batch))


def count_classes(dataset_json: dict[str, Any]) -> int:
    """Channels of the segmentation network's output, as nnU-Net's LabelManager counts them: one for each label and the
    background, or, where a label is a list of values, one for each region; none for "ignore"."""
    labels = {name: value for name, value in dataset_json.get("labels", {}).items() if name != "ignore"}
    has_regions = any(isinstance(value, list | tuple) and len(value) > 1 for value in labels.values())
    return len(labels) - has_regions if labels else 2


def training_memory(
    settings: Settings, patch: Sequence[int], batch: int, classes: int, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> float:
    """GB of a fine-tuning step on a GPU; with a joint branch, of its studies too."""
    modalities, studies = len(settings.used_modalities), None
    if settings.finetune.stage_weight:
        studies = (settings.wholebody.patch, settings.staging.batch_size)
    return step_memory(settings.sizes, settings.token_patch, patch, batch, classes, "cuda", modalities, studies,
                       spacing)  # fmt: skip


def _fits(settings: Settings, patch: Sequence[int], batch: int, classes: int, spacing: Sequence[float]) -> bool:
    return training_memory(settings, patch, batch, classes, spacing) <= settings.finetune.gpu_memory_target


def _shrink(
    settings: Settings, patch: Sequence[int], batch: int, classes: int, spacing: Sequence[float]
) -> tuple[int, int, int]:
    """The patch, a token shorter along its longest axis (in tokens) again and again until the batch fits."""
    h, w, d = patch
    while not _fits(settings, (h, w, d), batch, classes, spacing):
        tokens = [n // t for n, t in zip((h, w, d), settings.token_patch, strict=True)]
        longest = tokens.index(max(tokens))
        if math.prod(tokens) * (tokens[longest] - 1) < MIN_TOKENS * tokens[longest]:
            break
        tokens[longest] -= 1
        h, w, d = (n * t for n, t in zip(tokens, settings.token_patch, strict=True))
    return h, w, d


def is_anisotropic(spacing: Sequence[float]) -> bool:
    """Whether nnU-Net calls voxels of this spacing anisotropic."""
    return max(spacing) > ANISO_THRESHOLD * min(spacing)


def _in_proportion(patch: Sequence[int], spacing: Sequence[float], token: Sequence[int]) -> tuple[int, ...]:
    """A patch of isotropic voxels, as one of about as many voxels of `spacing` and the same proportions in mm."""
    if not is_anisotropic(spacing):
        return tuple(patch)
    mean = math.prod(spacing) ** (1 / len(spacing))
    return tuple(max(t, round(p * mean / s / t) * t) for p, s, t in zip(patch, spacing, token, strict=True))


def _sizes_that_fit(settings: Settings, median: Sequence[int], classes: int, spacing: Sequence[float]) -> Settings:
    """`choose_sizes`, refused if what it had to choose does not fit the memory."""
    chosen = choose_sizes(settings, median, classes, spacing)
    finetune = chosen.finetune
    needed = training_memory(chosen, finetune.patch, finetune.batch_size, classes, spacing)
    if None in (settings.finetune.patch, settings.finetune.batch_size) and needed > finetune.gpu_memory_target:
        raise UserError(f"-preset {settings.preset}: {finetune.batch_size} patches of {finetune.patch} voxels need "
                        f"about {needed:.1f} GB, more than finetune.gpu_memory_target={finetune.gpu_memory_target:g}; "
                        "set it (-gpu_memory_target) to what your GPU has, or take a smaller -preset")  # fmt: skip
    return chosen


def _choose_token(median: Sequence[int], stack: str, spacing: Sequence[float]) -> tuple[int, int, int]:
    largest, token = STACK_SIZES[stack]
    if is_anisotropic(spacing):
        mean = math.prod(spacing) ** (1 / len(spacing))
        nearest = (2 ** round(math.log2(t * mean / s)) for t, s in zip(token, spacing, strict=True))
        token = tuple(min(max(n, LEAST_SIDE), max(TOKEN_SIDES)) for n in nearest)
    while min(token) > LEAST_SIDE:
        patch = cover(median, token, cover(_in_proportion(largest, spacing, token), token))
        if math.prod(p // t for p, t in zip(patch, token, strict=True)) >= MIN_TOKENS:
            break
        token = tuple(t // 2 for t in token)
    return token


def channel_modalities(dataset_json: dict[str, Any]) -> list[str]:
    """What each channel is: CT, PET, or another word for one that is not used.

    From the block "fratmae" of dataset.json, else from names such as PET, PT and SUV. Two channels both named "CT" are
    the nnU-Net community's way to keep SUV absolute; there CT comes first. Without the block, other channels may stand
    beside CT and PET, but not beside one of them alone: they might be the other, named as its normalisation.

    Raises:
        UserError: the channels are not one CT and one PET, or one of them.
    """
    channels = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    names = [str(name) for _, name in sorted(channels.items(), key=lambda item: int(item[0]))]
    declared = dataset_json.get("fratmae", {}).get("modalities")
    named = [_modality(str(name)) for name in declared or names]
    if named == ["CT", "CT"]:
        named = ["CT", "PET"]
    used = sorted(name for name in named if name in MODALITIES)
    complete = used == sorted(MODALITIES) or (len(used) == 1 and (declared or len(named) == 1))
    if len(named) != len(names) or not complete:
        raise UserError(f'dataset.json: channels {names} are not one CT and one PET, or one of them; say which is '
                        f'which in "fratmae": {{"modalities": ["CT", "PET"]}}')  # fmt: skip
    return named


def find_channels(dataset_json: dict[str, Any], modalities: str | None = None) -> dict[str, int]:
    """The index of the channel of each modality, CT before PET.

    Args:
        modalities: which are wanted: both, CT or PET; None: those that are there.

    Raises:
        UserError: as `channel_modalities`, or one that is wanted is not there.
    """
    named = channel_modalities(dataset_json)
    there = [modality for modality in MODALITIES if modality in named]
    wanted = {None: there, "both": MODALITIES}.get(modalities, [modalities])
    for modality in wanted:
        if modality not in there:
            raise UserError(f"dataset.json: {there[0]} alone, {modality} is needed here; without it a dataset can only "
                            f"train FratMAETrainer, with fratmae.modalities={there[0]} or null")  # fmt: skip
    return {modality: named.index(modality) for modality in wanted}


def find_modalities(dataset_json: dict[str, Any]) -> list[int]:
    """The index of the CT channel and of the PET channel, where both are needed.

    Raises:
        UserError: the channels are not one CT and one PET.
    """
    return list(find_channels(dataset_json, "both").values())


def _modality(name: str) -> str:
    words = re.findall("[A-Z]+", name.upper())
    return "PET" if any(word == "PT" or "PET" in word or "SUV" in word for word in words) else name.upper()


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


def _to_units(
    plans: dict[str, Any], config: dict[str, Any], channels: dict[str, int]
) -> tuple[list[float], list[float], list[list[float] | None], list[str]]:
    """The affine of CT and PET to pretraining units (1 and 0 for one that is not used or has lost them), where these
    are clipped (None: the plans clip as narrowly), and warnings."""
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
    return scale, shift, clip, warnings


def absent_values(plans: dict[str, Any], config: dict[str, Any]) -> list[float]:
    """The value of a missing CT and of a missing PET in the plans' normalisation, for a configuration that uses both.

    Args:
        config: a FratMAE configuration of the plans.
    """
    schemes, properties = config["normalization_schemes"], plans["foreground_intensity_properties_per_channel"]
    channels = zip(MODALITIES, config["architecture"]["arch_kwargs"]["modalities"], strict=True)
    return [absent_value(modality, schemes[channel], properties[str(channel)]) for modality, channel in channels]
