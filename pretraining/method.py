"""What a way of pretraining is; engine, evaluation, monitor, export and launch know only this.

A mask is one value: (B, 2, h, w, d), true for the blocks of voxels that are hidden in CT and in PET.
Axes: volumes (B, 2, H, W, D), CT and PET, with H anterior-posterior.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from nnunet_fratmae.base.units import MODALITIES
from plans.contract import Contract
from plans.settings import Settings
from pretraining.data import Case

if TYPE_CHECKING:
    from pretraining.evaluation import HeldOut, Share


class Method(nn.Module, ABC):
    """A network with all that is its own: what is masked, predicted, lost and exported. Its weights are those that
    checkpoints keep."""

    block: tuple[int, int, int]
    """Voxels (H, W, D) that are hidden together."""
    parts: tuple[str, ...]
    """Names of the parts of the loss; CT and PET are the masked MSE of each."""
    is_cross_modal: bool
    """Whether what is hidden in one modality is predicted from the other, too."""

    @classmethod
    @abstractmethod
    def build(cls, settings: Settings, cases: list[Case], fabric: Fabric) -> Method:
        """The method of the settings, with reproducible initial weights.

        Raises:
            UserError: settings or cases that it cannot train with.
        """

    @staticmethod
    @abstractmethod
    def rests(settings: Settings) -> bool:
        """Whether some weights get no gradient in a step, which several GPUs must know."""

    @abstractmethod
    def draw(self, batch: int, key: tuple[int, ...]) -> Tensor:
        """The mask of a step's whole batch, on the CPU; the same for the same key."""

    @abstractmethod
    def fixed_masks(self, count: int) -> dict[str, Tensor]:
        """For CT and for PET the masks (count, 2, h, w, d) under which held-out cases are judged, always the same."""

    @abstractmethod
    def forward(self, image: Tensor, mask: Tensor, prompts: Sequence[str | None]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a pass and its parts by name.

        Args:
            image: (B, 2, H, W, D) in pretraining units; prompts: the metadata of each case as text.
        """

    @abstractmethod
    def predict(self, image: Tensor, mask: Tensor) -> Tensor:
        """(B, 2, H, W, D): the network's voxels of what is masked; the others may be anything."""

    @abstractmethod
    def flops(self) -> float:
        """Floating point operations of one patch, forwards and backwards."""

    @abstractmethod
    def describe(self) -> str:
        """What is trained, in a line for the user."""

    @abstractmethod
    def contract(self, settings: Settings, seen: Mapping[str, Any]) -> Contract:
        """The contract of the weights; `seen`: the parts that say what they were trained on and for how long."""

    @staticmethod
    @abstractmethod
    def exported(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of the weights of a checkpoint those of the artefact, by the names in it, and those of its text side."""

    def measures(self) -> dict[str, float | None]:
        """Figures of the network itself for the row of an epoch."""
        return {}

    def judge(self, held_out: HeldOut, share: Share) -> dict[str, float]:
        """Figures of held-out cases beyond the masked error."""
        return {}

    def attention(self, image: Tensor, mask: Tensor) -> dict[str, Any] | None:
        """Where a hidden place of the PET looks in the CT, for the picture (`report.plot_reconstruction`)."""
        return None


def generator_of(key: tuple[int, ...]) -> torch.Generator:
    """On the CPU, so that a key gives the same numbers on every device."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


def voxel_mask(mask: Tensor, block: Sequence[int]) -> Tensor:
    """(..., h, w, d) blocks -> (..., H, W, D) voxels."""
    for axis, side in zip((-3, -2, -1), block, strict=True):
        mask = mask.repeat_interleave(side, dim=axis)
    return mask


def masked_errors(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error (B,) of each sample on exactly its masked voxels.

    Args:
        prediction, image, mask: (B, H, W, D).
    """
    errors = (prediction.float() - image.float()).square() * mask
    return errors.flatten(1).sum(1) / mask.flatten(1).sum(1)


def number_of(modality: str) -> int:
    """The channel of a modality in volumes and masks."""
    return MODALITIES.index(modality)
