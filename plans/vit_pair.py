"""The family of ViT pairs with a UNETR decoder: its sizes for data and memory, and its architecture in plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nnunetv2.configuration import ANISO_THRESHOLD

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.networks.strides import TOKEN_SIDES, decoder_strides
from plans.contract import Contract
from plans.memory import step_memory
from plans.settings import STACKS, Settings

NETWORK = "nnunet_fratmae.networks.unetr.FratMAEUNETR"
JOINT_NETWORK = "nnunet_fratmae.networks.staging.FratMAEJoint"  # the same with a classifier (plans/staging.py)

PAPER_GRID, PAPER_PATCH, PAPER_K = (160, 160, 192), (32, 160, 192), 2
PAPER_TOKEN = (8, 16, 16)  # 480 tokens for the paper's patch (DESIGN, "The method")
# Patch and token of a stack. The axial one, as thick and as wide, is for the comparison of the paper's table 2.
STACK_SIZES = {"coronal": (PAPER_PATCH, PAPER_TOKEN), "axial": ((160, 160, 32), (16, 16, 8))}
MIN_TOKENS = 128  # below this a patch says too little; small studies get smaller tokens
LEAST_SIDE = 2  # of a token that is chosen
MIN_BATCH, MAX_BATCH = 2, 16  # nnU-Net's and the paper's


def architecture(settings: Settings, spacing: Sequence[float]) -> dict[str, Any]:
    """Arguments of FratMAEUNETR, plain JSON, but for those of its front door.

    Args:
        spacing: mm of a voxel along (H, W, D).
    """
    return {
        "patch_size": list(settings.finetune.patch),
        "token_patch": list(settings.token_patch),
        **settings.sizes.encoder,
        "features": settings.sizes.unetr_features,
        "strides": [list(step) for step in decoder_strides(settings.token_patch, spacing)],
    }


def fit(
    settings: Settings, config: dict[str, Any], axes: Sequence[int], classes: int
) -> tuple[Settings, list[str]]:
    """Settings with patch and batch size for a configuration of plans, and warnings for the user, one line each.

    A configuration that has the network already keeps its patch (rounded up to whole tokens) and batch size.

    Args:
        axes: the plans' axis that is H, the one that is W and the one that is D.

    Raises:
        UserError: the smallest patch and batch that may be chosen need more memory than there is.
    """
    median = tuple(int(round(config["median_image_size_in_voxels"][axis])) for axis in axes)
    spacing = [config["spacing"][axis] for axis in axes]
    if is_vit_pair(config):
        planned = tuple(config["patch_size"][axis] for axis in axes)
        finetune = replace(settings.finetune, patch=None, batch_size=config["batch_size"])
        settings = choose_sizes(replace(settings, finetune=finetune), median, classes, spacing)
        settings = replace(settings, finetune=replace(settings.finetune, patch=cover(planned, settings.token_patch)))
    else:
        settings = _sizes_that_fit(settings, median, classes, spacing)
    finetune = settings.finetune
    needed = training_memory(settings, finetune.patch, finetune.batch_size, classes, spacing)
    if needed <= finetune.gpu_memory_target:
        return settings, []
    return settings, [f"{finetune.batch_size} patches of {finetune.patch} voxels need about {needed:.1f} GB on one "
                      f"GPU, more than finetune.gpu_memory_target={finetune.gpu_memory_target:g}; choose a smaller "
                      "finetune.batch_size, or plan for the artefact (fratmae_plan_and_preprocess -pretrained)"
                      ]  # fmt: skip


def is_vit_pair(config: dict[str, Any]) -> bool:
    """Whether a configuration of plans.json has this family's network already."""
    return config.get("architecture", {}).get("network_class_name") in (NETWORK, JOINT_NETWORK)


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
