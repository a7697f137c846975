"""What one sees of a pretraining: metrics.jsonl, curves, pictures, TensorBoard and W&B."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from nnunet_fratmae.base.files import renamed
from plans.settings import STACKS, Settings
from plans.units import MODALITIES
from pretraining.data import Case
from pretraining.evaluation import HeldOut, token_mask
from pretraining.fratmae import FratMAE, partner, unpatchify
from pretraining.report import plot_progress, plot_reconstruction

PEAK_FLOPS = {
    "NVIDIA A10": 125e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,  # SXM
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA RTX A6000": 155e12,
}
"""Dense bf16 matrix products per second that the makers state, for the model FLOPs utilisation, by the device's whole
name: cards, half cards (MIG) and laptops of one family differ by a factor of two and more. No figure for others."""


def flops_per_patch(settings: Settings) -> float:
    """Floating point operations of one patch, forwards and backwards (taken as twice forwards), without the text.

    The matrix products of linear layers, kernels and attention are counted from their shapes; one modality is masked,
    or both where each is reconstructed alone.
    """
    options, sizes = settings.pretrain, settings.sizes
    tokens = math.prod(p // t for p, t in zip(settings.wholebody.patch, settings.token_patch, strict=True))
    voxels, kept = math.prod(settings.token_patch), tokens - round(options.mask_ratio * tokens)

    def blocks(depth: int, dim: int, n: int, self_attention: int, cross: int) -> float:
        # Per block and token: qkv and projection 4 dim^2, attention 2 n dim, MLP 8 dim^2 multiplications
        return depth * n * ((self_attention + cross) * (4 * dim**2 + 2 * n * dim) + 8 * dim**2)

    is_cross = options.is_cross_modal
    embed = sum(blocks(sizes.depth, sizes.embed_dim, n + 1, 1, 0) + n * voxels * sizes.embed_dim
                for n in ((kept, tokens) if is_cross else (kept, kept)))  # fmt: skip
    has_self = not is_cross or options.decoder_block == "cross_self"
    decode = blocks(sizes.decoder_depth, sizes.decoder_dim, tokens + 1, int(has_self), int(is_cross))
    decode += tokens * sizes.decoder_dim * (voxels + 2 * sizes.embed_dim)
    return 3 * 2.0 * (embed + decode * (1 if is_cross else 2))


class Monitor:
    """Writes into the folder of the run, from one process only."""

    def __init__(self, folder: Path, settings: Settings, fabric: Fabric, is_resumed: bool) -> None:
        self.folder, self.settings, self.flops = folder, settings, flops_per_patch(settings)
        name = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else ""
        self.peak = PEAK_FLOPS[name] * fabric.world_size if name in PEAK_FLOPS else None
        self.board = _tensorboard(folder)
        self.wandb = _wandb(folder, is_resumed)

    def introduce(self, model: nn.Module, train: list[Case], held_out: HeldOut | None, steps: int) -> None:
        """Say what is trained on what."""
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        whole, options = self.settings.wholebody, self.settings.pretrain
        print(f"{options.method} {self.settings.preset}: {millions:.1f} M parameters, {self.flops / 1e9:.0f} GFLOP a "
              "patch")  # fmt: skip
        print(f"patch {list(whole.patch)} of every {whole.k}. {whole.stack} slice, {math.prod(model.grid)} tokens of "
              f"{list(self.settings.token_patch)}")  # fmt: skip
        with_text = sum(case.prompt is not None for case in train)
        print(f"{len(train)} cases to train ({with_text} with metadata), {len(held_out.cases) if held_out else 0} held "
              f"out; {options.epochs} epochs of {steps} steps")  # fmt: skip
        print(f"output: {self.folder}")

    def log(self, history: list[dict[str, Any]], held_out: HeldOut | None) -> None:
        """The last row of the history to all places, and the curves."""
        row = history[-1]
        speed = row["patches_per_second"]
        row["mfu"] = self.flops * speed / self.peak if self.peak and speed else None
        if held_out:
            row |= held_out.baselines
        lines = "".join(json.dumps(r) + "\n" for r in history)
        with renamed(self.folder / "metrics.jsonl") as partial:
            partial.write_text(lines)
        plot_progress(history, self.folder / "progress.png")
        for name, value in row.items():
            if isinstance(value, float):
                if self.board:
                    self.board.add_scalar(name, value, row["epoch"])
                if self.wandb:
                    self.wandb.log(name, value, row["epoch"])

    def close(self, is_done: bool) -> None:
        """Also where the run stops before its end, to be resumed."""
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.run.finish(exit_code=0 if is_done else 1)

    def picture(self, model: FratMAE, held_out: HeldOut, epoch: int) -> None:
        """Masked input, reconstruction and truth of the first held-out case, and where its PET looks in the CT."""
        model.eval()
        rows = [self._row(model, held_out, modality) for modality in MODALITIES]
        title = f"{held_out.cases[0].name}, held out, epoch {epoch}; one modality masked at a time"
        attention = self._attention(model, held_out) if self.settings.pretrain.is_cross_modal else None
        stack = STACKS[self.settings.wholebody.stack]
        plot_reconstruction(rows, attention, stack, self.folder / "reconstruction.png", title)
        folder = self.folder / "pictures"
        folder.mkdir(exist_ok=True)
        with renamed(folder / f"epoch_{epoch:04d}.png") as partial:
            shutil.copyfile(self.folder / "reconstruction.png", partial)

    def _row(self, model: FratMAE, held_out: HeldOut, modality: str) -> dict[str, Any]:
        device, number = next(model.parameters()).device, MODALITIES.index(modality)
        keep, masked = held_out.keep[modality][:1], held_out.masked[modality][:1]
        prediction = model(held_out.images[:1].to(device), {modality: keep.to(device)})[0][modality]
        volume = held_out.images[:1, number : number + 1]
        return {
            "modality": modality,
            "truth": volume[0, 0].numpy(),
            "masked": token_mask(volume, masked, model.token_patch)[0, 0].numpy(),
            "prediction": unpatchify(prediction.float().cpu(), model.grid, model.token_patch)[0, 0].numpy(),
        }

    def _attention(self, model: FratMAE, held_out: HeldOut) -> dict[str, Any]:
        """Cross-attention of the hottest masked PET token to the tokens of the CT, mean of all blocks and heads."""
        device = next(model.parameters()).device
        weights: list[Tensor] = []
        hooks = [
            block.cross_attention.register_forward_pre_hook(lambda m, args: weights.append(m.weights(*args).mean(1)))
            for block in model.decoders["PET"].blocks
        ]
        model(held_out.images[:1].to(device), {"PET": held_out.keep["PET"][:1].to(device)})
        for hook in hooks:
            hook.remove()
        mean = torch.stack(weights).mean(0)[0].float().cpu()  # (1 + N, 1 + N), CLS first
        means = nn.functional.avg_pool3d(held_out.images[:1, 1], model.token_patch).flatten()
        masked = held_out.masked["PET"][0]
        token = int(masked[means[masked].argmax()])
        index = torch.unravel_index(torch.tensor(token), model.grid)
        return {
            "map": mean[1 + token, 1:].reshape(model.grid).numpy(),
            "token": tuple(int(i) for i in index),
            "token_patch": model.token_patch,
            "ct": held_out.images[0, MODALITIES.index(partner("PET"))].numpy(),
        }


def _tensorboard(folder: Path) -> Any:
    """A writer of torch's, where TensorBoard is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def _wandb(folder: Path, is_resumed: bool) -> Any:
    """nnU-Net's own W&B logger, by its own variables (nnUNet_wandb_enabled, _project, _mode).

    A resumed run goes on in the W&B run of its folder. What is wrong with W&B is one line, and no reason to stop.
    """
    if os.environ.get("nnUNet_wandb_enabled", "0").lower() not in ("1", "true", "t"):
        return None
    from nnunetv2.training.logging import nnunet_logger

    if nnunet_logger.wandb is None:
        print("warning: nnUNet_wandb_enabled is set, but W&B is not installed (pip install wandb); going on without it")
        return None
    try:
        return nnunet_logger.WandbLogger(folder, resume=is_resumed)
    except Exception as error:  # noqa: BLE001 - W&B's, of many kinds: no key, no network, a folder without its run
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"warning: W&B cannot be used ({reason}); going on without it")
        return None
