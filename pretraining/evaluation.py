"""What a pretraining is judged by on its held-out cases: always the same patches and masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from plans.settings import Settings
from plans.units import MODALITIES, PRETRAINING_UNITS
from pretraining.data import Case, read_patch, window
from pretraining.fratmae import FratMAE, patchify, random_masking, reconstruction_loss, unpatchify

if TYPE_CHECKING:
    from pretraining.context_align import ContextAlign


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


def hold_out_patches(cases: list[Case], settings: Settings, token_patch: tuple[int, int, int]) -> HeldOut | None:
    """The middle patch of each case and fixed masks; None without cases."""
    if not cases:
        return None
    images = torch.stack([middle_patch(case, settings) for case in cases])
    tokens = math.prod(settings.wholebody.patch) // math.prod(token_patch)
    keep, masked, baselines = {}, {}, {}
    for number, modality in enumerate(MODALITIES):
        generator = torch.Generator().manual_seed(number)
        keep[modality], masked[modality] = random_masking(len(cases), tokens, settings.pretrain.mask_ratio, generator)
        volumes = images[:, number : number + 1]
        baselines |= guesses(modality, volumes, masked[modality], token_patch)
    return HeldOut(cases, images, keep, masked, baselines)


def middle_patch(case: Case, settings: Settings) -> Tensor:
    """The middle patch (2, *patch) of a case as it is."""
    return read_patch(case, window(settings.wholebody, (0.5, 0.5, 0.5, 0.0)))


def guesses(modality: str, volumes: Tensor, masked: Tensor, token_patch: tuple[int, int, int]) -> dict[str, float]:
    """Masked MSE of the mean of the visible voxels, and of copying the nearest visible voxel into the gaps.

    Args:
        volumes: (n, 1, H, W, D); masked: (n, m) tokens.
    """
    errors: dict[str, list[float]] = {"mean_guess": [], "copy_guess": []}
    for volume, gaps in zip(volumes, token_mask(volumes, masked, token_patch), strict=True):
        truth, is_masked = volume[0].numpy(), gaps[0].numpy()
        nearest = ndimage.distance_transform_edt(is_masked, return_distances=False, return_indices=True)
        errors["mean_guess"].append(np.square(truth[is_masked] - truth[~is_masked].mean()).mean())
        errors["copy_guess"].append(np.square(truth - truth[tuple(nearest)])[is_masked].mean())
    return {f"{name}_{modality}": float(np.mean(values)) for name, values in errors.items()}


def token_mask(volumes: Tensor, masked: Tensor, token_patch: tuple[int, int, int]) -> Tensor:
    """(n, 1, H, W, D), true on the voxels of the masked tokens (n, m)."""
    mask = torch.zeros_like(patchify(volumes, token_patch))
    mask.scatter_(1, masked.unsqueeze(-1).expand(-1, -1, mask.shape[-1]), 1.0)
    grid = tuple(s // t for s, t in zip(volumes.shape[2:], token_patch, strict=True))
    return unpatchify(mask, grid, token_patch) > 0


@torch.no_grad()
def evaluate(model: FratMAE, held_out: HeldOut, is_cross_modal: bool, device: torch.device) -> dict[str, float]:
    """Masked MSE and PSNR of each modality, and the cross-modal gain.

    PSNR is over the clipped range of the modality. The gain is 1 - MSE with the own partner / MSE with the next
    patient's partner: 0 where the network does not look at the partner.
    """
    row: dict[str, float] = {}
    for modality in MODALITIES:
        own, other = [], []
        for i in range(len(held_out.cases)):
            own.append(masked_mse(model, held_out, modality, i, i, device))
            stranger = held_out.strangers[i]
            if is_cross_modal and stranger is not None:
                other.append(masked_mse(model, held_out, modality, i, stranger, device))
        error, units = float(np.mean(own)), PRETRAINING_UNITS[modality]
        row[f"held_out_{modality}"] = error
        row[f"psnr_{modality}"] = 20 * math.log10((units.upper - units.lower) / units.std) - 10 * math.log10(error)
        if other:
            compared = [e for e, stranger in zip(own, held_out.strangers, strict=True) if stranger is not None]
            row[f"gain_{modality}"] = 1 - float(np.mean(compared)) / float(np.mean(other))
    return row


def masked_mse(model: FratMAE, held_out: HeldOut, modality: str, i: int, partner: int, device: torch.device) -> float:
    """Masked MSE of case `i` where the other modality is that of case `partner`."""
    number = MODALITIES.index(modality)
    image = held_out.images[partner : partner + 1].clone()
    image[:, number] = held_out.images[i, number]
    image = image.to(device)
    prediction = model(image, {modality: held_out.keep[modality][i : i + 1].to(device)})[0][modality]
    masked = held_out.masked[modality][i : i + 1].to(device)
    return reconstruction_loss(prediction, image[:, number : number + 1], masked, model.token_patch).item()


@torch.no_grad()
def evaluate_retrieval(
    model: FratMAE, align: ContextAlign, held_out: HeldOut, text: dict[str, Tensor], device: torch.device
) -> dict[str, float]:
    """PET-text retrieval among the different prompts of the held-out cases (see `retrieval`); nothing below two.

    Args:
        text: embedding (dim,) of every prompt.
    """
    from pretraining.context_align import retrieval

    cases = held_out.cases
    prompts = sorted({case.prompt for case in cases if case.prompt})
    if len(prompts) < 2:
        return {}
    known = [i for i, case in enumerate(cases) if case.prompt]
    encoder = model.encoders["PET"]
    pet = torch.cat([encoder(held_out.images[i : i + 1, 1:].to(device))[:, 0] for i in known])
    texts = torch.stack([text[cases[i].prompt] for i in known]).to(device)
    ids = torch.tensor([prompts.index(cases[i].prompt) for i in known], device=device)
    found = retrieval(align.embed_pet(pet), align.embed_text(texts), ids)
    return {f"retrieval_{name}": value for name, value in found.items()}
