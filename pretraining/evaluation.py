"""What a pretraining is judged by on its held-out cases: always the same patches and masks.

The cases are shared among the processes of the run, so that none waits for another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from lightning_fabric import Fabric
from scipy import ndimage
from torch import Tensor

from nnunet_fratmae.base.units import MODALITIES, PRETRAINING_UNITS
from plans.settings import Settings
from plans.views import central_window
from pretraining.data import Case
from pretraining.method import Method, masked_errors, number_of, voxel_mask

GUESSES = ("mean_guess", "copy_guess")


@dataclass(frozen=True)
class HeldOut:
    """Patches (n, 2, H, W, D) of the held-out cases, and for CT and PET the masks (n, 2, h, w, d) to judge it by."""

    cases: list[Case]
    images: Tensor
    masks: dict[str, Tensor]
    baselines: dict[str, float]
    """MSE of two guesses that need no network, by metric name."""

    @property
    def strangers(self) -> list[int | None]:
        """For each case the next one that is of another patient."""
        who = [case.patient or case.name for case in self.cases]
        count = len(who)
        nexts = ([j % count for j in range(i + 1, i + count)] for i in range(count))
        return [next((j for j in others if who[j] != who[i]), None) for i, others in enumerate(nexts)]


@dataclass(frozen=True)
class Share:
    """How cases are computed: in passes of at most `batch`, shared among the processes of `fabric`.

    `before_pass` is called by all processes together; a signal must not wait for the end.
    """

    batch: int
    fabric: Fabric
    before_pass: Callable[[], None] = lambda: None

    @torch.no_grad()
    def rows(self, compute: Callable[[Tensor], Tensor], count: int, width: int) -> Tensor:
        """Rows (count, width), float64 on the CPU and the same in every process, for `count` cases.

        Args:
            compute: of the numbers of some cases (b,) their rows (b, width).
        """
        rows = torch.zeros(count, width, device=self.fabric.device)
        passes = torch.arange(count).split(self.batch)
        for first in range(0, len(passes), self.fabric.world_size):
            self.before_pass()
            number = first + self.fabric.global_rank
            if number < len(passes):
                rows[passes[number]] = compute(passes[number]).to(rows)
        return self.fabric.all_reduce(rows, reduce_op="sum").double().cpu()


def hold_out_patches(cases: list[Case], settings: Settings, method: Method, fabric: Fabric) -> HeldOut | None:
    """The middle patch of each case and fixed masks, in every process; None without cases."""
    if not cases:
        return None
    images = torch.stack([middle_patch(case, settings) for case in cases])
    masks, baselines = method.fixed_masks(len(cases)), {}
    for modality, mask in masks.items():
        number = number_of(modality)

        def errors(some: Tensor, number: int = number, mask: Tensor = mask) -> Tensor:
            return guesses(images[some, number], voxel_mask(mask[some, number], method.block))

        means = Share(1, fabric).rows(errors, len(cases), len(GUESSES)).mean(0).tolist()
        baselines |= {f"{name}_{modality}": mean for name, mean in zip(GUESSES, means, strict=True)}
    return HeldOut(cases, images, masks, baselines)


def middle_patch(case: Case, settings: Settings) -> Tensor:
    """The middle patch (2, *patch) of a case as it is."""
    return case.read_window(central_window(settings.wholebody))


def guesses(volumes: Tensor, masks: Tensor) -> Tensor:
    """Masked MSE (n, 2) of two guesses: the mean of the visible voxels, and copying the nearest visible voxel.

    Args:
        volumes, masks: (n, H, W, D), true where masked.
    """
    errors = []
    for truth, is_masked in zip(volumes.numpy(), masks.numpy(), strict=True):
        nearest = ndimage.distance_transform_edt(is_masked, return_distances=False, return_indices=True)
        mean = np.square(truth[is_masked] - truth[~is_masked].mean()).mean()
        errors.append([mean, np.square(truth - truth[tuple(nearest)])[is_masked].mean()])
    return torch.tensor(errors)


def evaluate(method: Method, held_out: HeldOut, share: Share) -> dict[str, float | None]:
    """Masked MSE and PSNR of each modality, and the cross-modal gain.

    PSNR is over the clipped range of the modality; none for an error of 0. The gain is 1 - MSE with the own partner /
    MSE with the next patient's partner: 0 where the network does not look at the partner.
    """
    row: dict[str, float | None] = {}
    everyone = torch.arange(len(held_out.cases))
    others = torch.tensor([-1 if stranger is None else stranger for stranger in held_out.strangers])
    compared = everyone[others >= 0]
    for modality in MODALITIES:

        def errors(cases: Tensor, partners: Tensor, modality: str = modality) -> Tensor:
            def compute(some: Tensor) -> Tensor:
                return masked_mse(method, held_out, modality, cases[some], partners[some], share.fabric.device)[:, None]

            return share.rows(compute, len(cases), 1)[:, 0]

        own, units = errors(everyone, everyone), PRETRAINING_UNITS[modality]
        error, peak = own.mean().item(), (units.upper - units.lower) / units.std
        row[f"held_out_{modality}"] = error
        row[f"psnr_{modality}"] = 20 * math.log10(peak) - 10 * math.log10(error) if error else None
        if method.is_cross_modal and len(compared):
            other = errors(compared, others[compared]).mean().item()
            row[f"gain_{modality}"] = 1 - own[compared].mean().item() / other if other else None
    return row | method.judge(held_out, share)


def masked_mse(
    method: Method, held_out: HeldOut, modality: str, cases: Tensor, partners: Tensor, device: torch.device
) -> Tensor:
    """Masked MSE (b,) of each of `cases` (b,) where the other modality is that of the cases `partners` (b,)."""
    number = number_of(modality)
    image = held_out.images[partners]
    image[:, number] = held_out.images[cases, number]
    image, mask = image.to(device), held_out.masks[modality][cases].to(device)
    prediction = method.predict(image, mask)[:, number]
    return masked_errors(prediction, image[:, number], voxel_mask(mask[:, number], method.block))
