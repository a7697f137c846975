"""What the classification of whole bodies is trained on: central patches with their classes, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from plans.channels import find_modalities
from plans.settings import Pretrain, Staging, WholeBody
from plans.staging import Cohort
from plans.store import Study, check_grid
from plans.views import Key, augment, central_window, varied


class StagingStudies(Dataset):
    """The central patch (2, H, W, D) of whole bodies with the number of its class, by key (epoch, index).

    Validation takes the patch as it is. Training varies the phase of the slices (which of every k), mirrors left-right
    and scales as pretraining does; the crop stays central, as the paper has it.
    """

    def __init__(
        self, studies: list[tuple[Study, int]], whole: WholeBody, options: Pretrain | None = None, seed: int = 0
    ) -> None:
        """`options`: how to vary the patches; None: not at all."""
        self.studies, self.whole, self.options, self.seed = studies, whole, options, seed

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        study, label = self.studies[index]
        if self.options is None:
            return {"data": study.read_window(central_window(self.whole)), "target": label}
        generator = np.random.default_rng((self.seed, epoch, index))
        phase, mirror = generator.random(2)
        scale, shift = generator.standard_normal(2)
        view = varied(index, central_window(self.whole, phase), mirror, scale, shift, self.options)
        return {"data": augment(study.read_window(view.window), view), "target": label}


def list_studies(
    store: Path, labels: Mapping[str, int], dataset_json: dict[str, Any], grid: Sequence[int]
) -> list[tuple[Study, int]]:
    """The cases of a whole-body grid store that are in `labels`, each with the number of its class.

    Raises:
        UserError: a study that is not on the grid.
    """
    channels = tuple(find_modalities(dataset_json))
    studies = [(Study(store / f"{name}.b2nd", name, channels), label) for name, label in labels.items()]
    check_grid([study for study, _ in studies], grid)
    return studies


def in_order(studies: StagingStudies, batch_size: int, **how: Any) -> DataLoader:
    """Batches of all studies in their order, each once; `how`: further arguments of DataLoader."""
    keys = [(0, index) for index in range(len(studies))]
    return DataLoader(studies, batch_sampler=[keys[i : i + batch_size] for i in range(0, len(keys), batch_size)], **how)


@torch.no_grad()
def classify_all(
    network: Callable[[Tensor], Tensor], batches: DataLoader, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) in float32 and labels (n,) of all studies of a loader, on `device`."""
    found = [(network(batch["data"].to(device)).float(), batch["target"].to(device)) for batch in batches]
    logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logits, labels


class WeightedCrossEntropy(nn.Module):
    """Mean over the batch of the weight of a case's class times its cross-entropy.

    torch's weighted mean divides by the weights in the batch, so that of two studies of one class nothing is left of
    them.
    """

    def __init__(self, weights: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (B, classes), labels (B,)."""
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses.mean() if self.weights is None else (self.weights[labels] * losses).mean()


def class_weights(labels: list[int], classes: int) -> Tensor:
    """(classes,) weights inverse to the class's share, with mean 1 over `labels`; 0 for a class that is absent."""
    counts = torch.bincount(torch.tensor(labels), minlength=classes).float()
    return torch.where(counts > 0, len(labels) / ((counts > 0).sum() * counts.clamp_min(1)), 0.0)


def class_loss(cohort: Cohort, staging: Staging) -> WeightedCrossEntropy:
    """The loss of a training on `cohort`, with class weights if `staging` has them."""
    labels = list(cohort.training.values())
    return WeightedCrossEntropy(class_weights(labels, len(cohort.classes)) if staging.class_weights else None)
