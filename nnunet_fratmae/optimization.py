"""How the segmentation network is optimised: parameter groups of AdamW and the course of their learning rates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from nnunet_fratmae.networks.vit import is_decayed


def parameter_groups(
    network: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW of all parameters that learn; the decoder comes first, since nnU-Net logs its learning rate.

    Layer-wise decay is that of MAE's fine-tuning (He et al., paper reference 8): of an encoder with n blocks the
    embedding has layer_decay^(n + 1), block i (from 1) layer_decay^(n + 1 - i), the last norm and all else 1 times
    the learning rate. Biases, norms and CLS tokens have no weight decay. `is_encoder` says whose parameters they are.
    """
    depth = {name: len(encoder.blocks) for name, encoder in network.encoders.items()}
    groups: dict[tuple[bool, int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        below, is_encoder = 0, name.startswith("encoders.")
        if is_encoder:
            _, modality, part, *rest = name.split(".")
            layer = {"norm": depth[modality] + 1, "blocks": int(rest[0]) + 1 if part == "blocks" else 0}.get(part, 0)
            below = depth[modality] + 1 - layer if layer_decay < 1 else 0
        decayed = is_decayed(name, parameter)
        group = groups.setdefault((is_encoder, below, not decayed), {
            "params": [], "lr": learning_rate * layer_decay**below, "is_encoder": is_encoder,
            "weight_decay": weight_decay if decayed else 0.0,
        })  # fmt: skip
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


class CosineSchedule(LRScheduler):
    """Learning rate from its initial value to zero along a half cosine over `epochs` (paper section 2.4).

    That of the encoders' groups is 0 at first and rises linearly over `encoder_warmup` epochs to the cosine. (They
    are not frozen meanwhile: DDP must know from the start which parameters have gradients.)

    nnU-Net calls `step(epoch)` at the start of every epoch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, epochs: int, encoder_warmup: int = 0) -> None:
        self.epochs, self.encoder_warmup = epochs, encoder_warmup
        super().__init__(optimizer)

    def step(self, epoch: int = 0) -> None:
        cosine = (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        rise = min(1.0, epoch / self.encoder_warmup) if self.encoder_warmup else 1.0
        for group, initial in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = initial * cosine * (rise if group.get("is_encoder") else 1.0)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
