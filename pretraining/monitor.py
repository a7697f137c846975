"""What one sees of a pretraining: metrics.jsonl, curves, pictures, TensorBoard and W&B."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from nnunet_fratmae.base.files import renamed
from plans.settings import STACKS, Settings
from pretraining.data import Case
from pretraining.evaluation import HeldOut
from pretraining.method import Method, number_of, voxel_mask
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


class Monitor:
    """Writes into the folder of the run, from one process only."""

    def __init__(self, folder: Path, settings: Settings, flops: float, fabric: Fabric, is_resumed: bool) -> None:
        """`flops`: of one patch, forwards and backwards."""
        self.folder, self.settings, self.flops = folder, settings, flops
        name = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else ""
        self.peak = PEAK_FLOPS[name] * fabric.world_size if name in PEAK_FLOPS else None
        self.board = _tensorboard(folder)
        self.wandb = _wandb(folder, is_resumed)

    def introduce(self, method: Method, train: list[Case], held_out: HeldOut | None, steps: int) -> None:
        """Say what is trained on what."""
        millions = sum(p.numel() for p in method.parameters()) / 1e6
        whole, options = self.settings.wholebody, self.settings.pretrain
        print(f"{options.method} {self.settings.preset}: {millions:.1f} M parameters, {self.flops / 1e9:.0f} GFLOP a "
              "patch")  # fmt: skip
        print(f"patch {list(whole.patch)} of every {whole.k}. {whole.stack} slice, {method.describe()}")
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
            partial.write_text(lines, encoding="utf-8")
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

    def picture(self, method: Method, held_out: HeldOut, epoch: int) -> None:
        """Masked input, reconstruction and truth of the first held-out case, and where its PET looks in the CT."""
        method.eval()
        device = next(method.parameters()).device
        image, masks = held_out.images[:1].to(device), {m: x[:1].to(device) for m, x in held_out.masks.items()}
        rows = []
        for modality, mask in masks.items():
            number = number_of(modality)
            rows.append({
                "modality": modality,
                "truth": held_out.images[0, number].numpy(),
                "masked": voxel_mask(mask[0, number], method.block).cpu().numpy(),
                "prediction": method.predict(image, mask)[0, number].float().cpu().numpy(),
            })  # fmt: skip
        title = f"{held_out.cases[0].name}, held out, epoch {epoch}"
        stack = STACKS[self.settings.wholebody.stack]
        attention = method.attention(image, masks["PET"])
        plot_reconstruction(rows, attention, stack, self.folder / "reconstruction.png", title)
        folder = self.folder / "pictures"
        folder.mkdir(exist_ok=True)
        with renamed(folder / f"epoch_{epoch:04d}.png") as partial:
            shutil.copyfile(self.folder / "reconstruction.png", partial)


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
