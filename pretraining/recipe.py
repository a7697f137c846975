"""The recipe of stage 1 (paper section 2.4): optimiser groups, learning rate, held-out cases, batches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.networks.vit import is_decayed
from plans.settings import Pretrain, Settings
from pretraining.data import Case

BETAS = (0.9, 0.95)  # MAE of He et al., appendix A
ONE_GPU, ALL_GPUS = "on one GPU", "on all GPUs together"
STEPS_OF_AN_EPOCH = 50  # at least, where patches_per_case is left open; 1,292 cases in batches of 24 are 54


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels; none for biases, norms, the CLS token and the mask tokens."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (decayed if is_decayed(name, parameter) else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def learning_rate(step: int, steps: int, warmup: int, highest: float) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine to zero at `steps` (paper section 2.4)."""
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def hold_out(cases: list[Case], share: float, seed: int) -> tuple[list[Case], list[Case]]:
    """Training and held-out cases, with no patient on both sides; at least one patient is held out where a share is
    asked for and there are two."""
    patients = list(dict.fromkeys(case.patient or case.name for case in cases))
    count = min(len(patients) - 1, max(1, round(share * len(patients)))) if share > 0 else 0
    order = np.random.default_rng(seed).permutation(len(patients))
    held = {patients[i] for i in order[:count]}
    sides: tuple[list[Case], list[Case]] = ([], [])
    for case in cases:
        sides[(case.patient or case.name) in held].append(case)
    return sides


def choose_patches(settings: Settings, cases: int) -> Settings:
    """Settings with the patches an epoch draws of each of so many training cases, where they were left open."""
    options = settings.pretrain
    if options.patches_per_case is not None:
        return settings
    patches = max(1, math.ceil(STEPS_OF_AN_EPOCH * options.batch_size / cases))
    return replace(settings, pretrain=replace(options, patches_per_case=patches))


def choose_micro_batch(options: Pretrain, batch_size: int, world: int) -> int:
    """Patches of one pass on one GPU.

    Raises:
        UserError: the batch cannot be cut into equal passes.
    """
    micro = options.micro_batch_size or batch_size // world
    if micro < 1 or batch_size % (micro * world):
        raise UserError(f"pretrain.batch_size {batch_size} cannot be cut into passes of {max(micro, 1)} patches on "
                        f"{world} GPUs; choose pretrain.batch_size or pretrain.micro_batch_size anew")  # fmt: skip
    if options.has_text and micro * world < 2:
        raise UserError("pretrain.micro_batch_size=1: a pass of 1 patch has nothing to tell its text from; choose a "
                        "larger one, or -m fratmae_notext")  # fmt: skip
    if options.shuffle_partner and micro < 2:
        raise UserError("pretrain.shuffle_partner: a pass of 1 patch has no other patient; choose a larger "
                        "pretrain.micro_batch_size or fewer GPUs")  # fmt: skip
    return micro


def pass_sizes(options: Pretrain, micro: int, world: int) -> dict[str, int]:
    """Patches that meet in a pass, as far as the result hangs on it: the contrastive loss takes its negatives from one
    pass on all GPUs, and `shuffle_partner` its strangers from one pass on one GPU."""
    sizes = {ONE_GPU: micro} if options.shuffle_partner else {}
    return sizes | ({ALL_GPUS: micro * world} if options.has_text else {})
