"""What a pretraining is judged by on its held-out cases: always the same patches and masks.

The cases are shared among the processes of the run, so that none waits for another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning_fabric import Fabric
from scipy import ndimage
from torch import Tensor

from nnunet_fratmae.base.units import MODALITIES, PRETRAINING_UNITS
from plans.settings import Settings
from plans.views import central_window
from pretraining.data import Case
from pretraining.fratmae import FratMAE, patchify, random_masking, reconstruction_loss, unpatchify

if TYPE_CHECKING:
    from pretraining.context_align import ContextAlign


GUESSES = ("mean_guess", "copy_guess")


@dataclass(frozen=True)
class HeldOut:
    """Patches (n, 2, H, W, D) of the held-out cases, with the mask of each modality of each case."""

    cases: list[Case]
    images: Tensor
    keep: dict[str, Tensor]
    masked: dict[str, Tensor]
    baselines: dict[str, float]
    """MSE of two guesses that need no network, by metric name."""

    @property
    def strangers(self) -> list[int | None]:
        """For each case the next one that is of another patient."""
        who = [case.patient or case.name for case in self.cases]
        count = len(who)
        nexts = ([j % count for j in range(i + 1, i + count)] for i in range(count))
        return [next((j for j in others if who[j] != who[i]), None) for i, others in enumerate(nexts)]


def hold_out_patches(
    cases: list[Case], settings: Settings, token_patch: tuple[int, int, int], fabric: Fabric
) -> HeldOut | None:
    """The middle patch of each case and fixed masks, in every process; None without cases."""
    if not cases:
        return None
    images = torch.stack([middle_patch(case, settings) for case in cases])
    tokens = math.prod(settings.wholebody.patch) // math.prod(token_patch)
    keep, masked, baselines = {}, {}, {}
    for number, modality in enumerate(MODALITIES):
        generator = torch.Generator().manual_seed(number)
        keep[modality], masked[modality] = random_masking(len(cases), tokens, settings.pretrain.mask_ratio, generator)
        volumes, gaps = images[:, number : number + 1], masked[modality]
        errors = share_cases(
            lambda some, volumes=volumes, gaps=gaps: guesses(volumes[some], gaps[some], token_patch),
            len(cases), len(GUESSES), 1, fabric,
        )  # fmt: skip
        baselines |= zip([f"{name}_{modality}" for name in GUESSES], errors.mean(0).tolist(), strict=True)
    return HeldOut(cases, images, keep, masked, baselines)


@torch.no_grad()
def share_cases(
    compute: Callable[[Tensor], Tensor], count: int, width: int, batch: int, fabric: Fabric,
    before_pass: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """Rows (count, width), float64 on the CPU and the same in every process, for `count` cases.

    Args:
        compute: of the numbers of some cases (b,) their rows (b, width); called with at most `batch` of them. Each
            process of `fabric` does its share.
        before_pass: called by all processes together; a signal must not wait for the end.
    """
    rows = torch.zeros(count, width, device=fabric.device)
    passes = torch.arange(count).split(batch)
    for first in range(0, len(passes), fabric.world_size):
        before_pass()
        number = first + fabric.global_rank
        if number < len(passes):
            rows[passes[number]] = compute(passes[number]).to(rows)
    return fabric.all_reduce(rows, reduce_op="sum").double().cpu()


def middle_patch(case: Case, settings: Settings) -> Tensor:
    """The middle patch (2, *patch) of a case as it is."""
    return case.read_window(central_window(settings.wholebody))


def guesses(volumes: Tensor, masked: Tensor, token_patch: tuple[int, int, int]) -> Tensor:
    """Masked MSE (n, 2) of two guesses: the mean of the visible voxels, and copying the nearest visible voxel.

    Args:
        volumes: (n, 1, H, W, D); masked: (n, m) tokens.
    """
    errors = []
    for volume, gaps in zip(volumes, token_mask(volumes, masked, token_patch), strict=True):
        truth, is_masked = volume[0].numpy(), gaps[0].numpy()
        nearest = ndimage.distance_transform_edt(is_masked, return_distances=False, return_indices=True)
        mean = np.square(truth[is_masked] - truth[~is_masked].mean()).mean()
        errors.append([mean, np.square(truth - truth[tuple(nearest)])[is_masked].mean()])
    return torch.tensor(errors)


def token_mask(volumes: Tensor, masked: Tensor, token_patch: tuple[int, int, int]) -> Tensor:
    """(n, 1, H, W, D), true on the voxels of the masked tokens (n, m)."""
    mask = torch.zeros_like(patchify(volumes, token_patch))
    mask.scatter_(1, masked.unsqueeze(-1).expand(-1, -1, mask.shape[-1]), 1.0)
    grid = tuple(s // t for s, t in zip(volumes.shape[2:], token_patch, strict=True))
    return unpatchify(mask, grid, token_patch) > 0


def evaluate(
    model: FratMAE, held_out: HeldOut, is_cross_modal: bool, batch: int, fabric: Fabric,
    before_pass: Callable[[], None] = lambda: None,
) -> dict[str, float | None]:  # fmt: skip
    """Masked MSE and PSNR of each modality, and the cross-modal gain; the last arguments are those of `share_cases`.

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
                return masked_mse(model, held_out, modality, cases[some], partners[some], fabric.device)[:, None]

            return share_cases(compute, len(cases), 1, batch, fabric, before_pass)[:, 0]

        own, units = errors(everyone, everyone), PRETRAINING_UNITS[modality]
        error, peak = own.mean().item(), (units.upper - units.lower) / units.std
        row[f"held_out_{modality}"] = error
        row[f"psnr_{modality}"] = 20 * math.log10(peak) - 10 * math.log10(error) if error else None
        if is_cross_modal and len(compared):
            other = errors(compared, others[compared]).mean().item()
            row[f"gain_{modality}"] = 1 - own[compared].mean().item() / other if other else None
    return row


def masked_mse(
    model: FratMAE, held_out: HeldOut, modality: str, cases: Tensor, partners: Tensor, device: torch.device
) -> Tensor:
    """Masked MSE (b,) of each of `cases` (b,) where the other modality is that of the cases `partners` (b,)."""
    number = MODALITIES.index(modality)
    image = held_out.images[partners]
    image[:, number] = held_out.images[cases, number]
    image, masked = image.to(device), held_out.masked[modality][cases].to(device)
    prediction = model(image, {modality: held_out.keep[modality][cases].to(device)})[0][modality]
    each = zip(prediction.split(1), image[:, number : number + 1].split(1), masked.split(1), strict=True)
    return torch.stack([reconstruction_loss(*one, model.token_patch) for one in each])


def evaluate_retrieval(
    model: FratMAE, align: ContextAlign, held_out: HeldOut, text: dict[str, Tensor], batch: int, fabric: Fabric,
    before_pass: Callable[[], None] = lambda: None,
) -> dict[str, float]:  # fmt: skip
    """PET-text retrieval among the different prompts of the held-out cases (see `retrieval`); nothing below two.

    Args:
        text: embedding (dim,) of every prompt; the last arguments are those of `share_cases`.
    """
    from pretraining.context_align import retrieval

    cases, device = held_out.cases, fabric.device
    prompts = sorted({case.prompt for case in cases if case.prompt})
    if len(prompts) < 2:
        return {}
    known = torch.tensor([i for i, case in enumerate(cases) if case.prompt])
    ids = torch.tensor([prompts.index(cases[i].prompt) for i in known])

    def embed(some: Tensor) -> Tensor:
        return align.embed_pet(model.encoders["PET"](held_out.images[known[some], 1:].to(device))[:, 0])

    with torch.no_grad():
        texts = align.embed_text(torch.stack([text[cases[i].prompt] for i in known]).to(device)).cpu()
    pets = share_cases(embed, len(known), texts.shape[1], batch, fabric, before_pass).to(texts)
    return {f"retrieval_{name}": value for name, value in retrieval(pets, texts, ids).items()}
