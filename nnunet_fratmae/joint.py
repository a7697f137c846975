"""The joint branch of FratMAETrainer: whole bodies are classified along with the segmentation of patches.

`fratmae.finetune.stage_weight` above 0 turns it on. Every training step then also draws `staging.batch_size` studies
from the whole-body grid store and adds stage_weight times the cross-entropy of a classifier on the same encoders
(networks/staging.py). A prediction of the segmentation does not meet it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nnunet_fratmae.base.command import UserError, nnunet_folder
from nnunet_fratmae.networks.staging import FratMAEJoint
from nnunet_fratmae.stage_data import StagingStudies, class_loss, classify_all, in_order, list_studies
from nnunet_fratmae.stage_metrics import save_summary, stage_metrics
from plans.settings import Settings
from plans.staging import STAGING_CONFIGURATION, cohort_of_model, joint_plans, read_cohort
from plans.views import Batches, Key

TRAIN_CURVE = "train_stage_losses"
VALIDATION_CURVES = {"accuracy": "val_stage_accuracy", "macro_sensitivity": "val_stage_macro_sensitivity"}


def add_branch(plans: dict[str, Any], configuration: str, fold: int | str) -> dict[str, Any]:
    """Plans of the joint network where `finetune.stage_weight` asks for it, else the plans as they are.

    Raises:
        UserError: no whole-body grid, no labels, or a fold that cannot train or validate a classifier.
    """
    if not Settings.from_json(plans["fratmae"]).finetune.stage_weight:
        return plans
    if STAGING_CONFIGURATION not in plans["configurations"]:
        raise UserError(f"finetune.stage_weight: {plans['plans_name']} have no whole-body grid; use -p FratMAEPlans, "
                        "or set finetune.stage_weight=0")  # fmt: skip
    try:
        cohort = read_cohort(nnunet_folder("nnUNet_preprocessed") / plans["dataset_name"], plans, fold)
    except UserError as error:
        raise UserError(f"finetune.stage_weight: {error} (or set finetune.stage_weight=0)") from None
    return joint_plans(plans, configuration, cohort.classes)


class PatchesAndStudies:
    """Both inputs of the joint network; nnU-Net's train_step moves them to the device as if they were one tensor."""

    def __init__(self, patches: Tensor, studies: Tensor) -> None:
        self.inputs = patches, studies

    def to(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        patches, studies = self.inputs
        return patches.to(*args, **kwargs), studies.to(*args, **kwargs)


class JointLoss(nn.Module):
    """Loss of the segmentation plus `weight` times that of the classes; of patches alone (validation) the first.

    `stage_loss` is the second of the last step, without the weight.
    """

    def __init__(self, segmentation: nn.Module, stage: nn.Module, weight: float) -> None:
        super().__init__()
        self.segmentation, self.stage, self.weight = segmentation, stage, weight
        self.stage_loss = torch.zeros(())

    def forward(self, output: Tensor | list[Tensor], target: Tensor | list[Tensor]) -> Tensor:
        if isinstance(output, Tensor):
            return self.segmentation(output, target)
        (logits, stage_logits), (labels, stages) = output, target
        stage_loss = self.stage(stage_logits, stages)
        self.stage_loss = stage_loss.detach()
        return self.segmentation(logits, labels) + self.weight * stage_loss


class StageBranch:
    """The studies of a fold: an endless stream of them for training, and the validation of the classifier."""

    def __init__(
        self, preprocessed: Path, plans: dict[str, Any], dataset_json: dict[str, Any], fold: int | str,
        network: FratMAEJoint,
    ) -> None:  # fmt: skip
        """
        Raises:
            UserError: as `cohort_of_model`.
        """
        self.settings, self.network = Settings.from_json(plans["fratmae"]), network
        self.cohort = cohort_of_model(preprocessed, plans, fold, network.classes)
        store = preprocessed / plans["configurations"][STAGING_CONFIGURATION]["data_identifier"]
        training, validation = (
            list_studies(store, side, dataset_json, self.settings.wholebody.grid)
            for side in (self.cohort.training, self.cohort.validation)
        )
        staging, whole = self.settings.staging, self.settings.wholebody
        self.training = StagingStudies(training, whole, self.settings.pretrain, staging.seed)
        self.validation = in_order(StagingStudies(validation, whole), staging.batch_size)
        self.stream: Iterator[dict[str, Tensor]] | None = None

    def joint_loss(self, segmentation: nn.Module) -> JointLoss:
        """The loss of a training step, given that of the segmentation."""
        stage = class_loss(self.cohort, self.settings.staging)
        return JointLoss(segmentation, stage, self.settings.finetune.stage_weight)

    def open(self, step: int, rank: int = 0, world: int = 1, pin_memory: bool = False) -> None:
        """Start the stream where `step` steps were trained, so that a resumed training goes on with the next studies.

        Of `world` processes each takes its share of a batch, at least one study.
        """
        staging = self.settings.staging
        share = -(-staging.batch_size // world)
        batches = Batches(len(self.training), share * world, share, rank, world, staging.seed)
        workers = min(staging.workers, get_allowed_n_proc_DA())
        keys = endless(batches, step)
        self.stream = iter(DataLoader(self.training, batch_sampler=keys, num_workers=workers, pin_memory=pin_memory))

    def close(self) -> None:
        """End the processes that load studies."""
        self.stream = None

    def join(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's batch with the next studies beside the patches and their classes beside the labels."""
        studies = next(self.stream)
        data = PatchesAndStudies(batch["data"], studies["data"])
        return {**batch, "data": data, "target": [batch["target"], studies["target"]]}

    def predict(self, device: torch.device) -> np.ndarray:
        """Probabilities (n, classes) of the validation cases, computed in float32."""
        self.network.eval()
        logits, _ = classify_all(self.network.classify, self.validation, device)
        return logits.softmax(1).cpu().numpy()

    def figures(self, device: torch.device) -> dict[str, Any]:
        """How well the validation cases are classified (stage_metrics.py)."""
        return stage_metrics(list(self.cohort.validation.values()), self.predict(device), self.cohort.classes)

    def save_summary(self, path: Path, device: torch.device) -> str:
        """Write what FratMAEStagingTrainer writes at the end; returns a line for the log."""
        # The classes choose no epoch: checkpoint_final is the last one, and checkpoint_best that of the best Dice
        _, said = save_summary(path, self.settings.staging.target, self.cohort, self.predict(device),
                               chosen_on_these_cases=False)  # fmt: skip
        return f"Classes: {said}"


def endless(batches: Batches, step: int) -> Iterator[list[Key]]:
    """Pass after pass over the studies, each in an order of its own, from `step` (counted from 0) on."""
    batches.epoch, batches.first_step = divmod(step, batches.steps)
    while True:
        yield from batches
        batches.epoch, batches.first_step = batches.epoch + 1, 0
