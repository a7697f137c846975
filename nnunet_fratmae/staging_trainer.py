"""FratMAEStagingTrainer: classification of whole bodies (early or advanced stage), trained by the stock command.

`nnUNetv2_train ID wholebody 0 -tr FratMAEStagingTrainer -p FratMAEPlans [-device cpu]`
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from time import time
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from matplotlib.figure import Figure
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from nnunet_fratmae.base.command import UserError, nnunet_folder
from nnunet_fratmae.checkpoints import read_training
from nnunet_fratmae.nnunet_api import curves
from nnunet_fratmae.optimization import CosineSchedule, parameter_groups
from nnunet_fratmae.stage_data import StagingStudies, class_loss, classify_all, in_order, list_studies
from nnunet_fratmae.stage_metrics import FIGURES, save_summary, stage_metrics
from nnunet_fratmae.trainer import FratMAETrainer, prepare_plans
from nnUNet_raw_conversion.pictures import save_figure
from plans.channels import find_modalities
from plans.contract import read_contract
from plans.settings import Settings
from plans.staging import STAGING_CONFIGURATION, Cohort, cohort_of_model, read_cohort, staging_plans
from plans.store import Study
from plans.views import Batches

CURVES = ("val_accuracy", "val_macro_sensitivity", "val_auc")
DICE_LISTS = ("mean_fg_dice", "ema_fg_dice", "dice_per_class_or_region")


class FratMAEStagingTrainer(FratMAETrainer):
    """Stage 2 of the paper, staging: the central patch of the whole-body grid, dual ViT encoders, an MLP.

    The pretrained encoders come by the rule of FratMAETrainer, the labels from clinical.csv, the folds from nnU-Net
    (plans/staging.py). An epoch is a pass over the training cases; all that is random in it is a function of the seed
    and the epoch, so a resumed training repeats the interrupted one. Options: `fratmae.staging` of the plans.
    """

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net compares signatures
    ) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UserError("-num_gpus: a step has too few studies to share; train the folds side by side, each on its "
                            "own GPU (CUDA_VISIBLE_DEVICES)")  # fmt: skip
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.build_network_architecture = super().build_network_architecture  # where the class itself refuses
        for name in DICE_LISTS:
            curves(self).pop(name, None)
        curves(self).update({name: [] for name in CURVES})

    def prepare(
        self, plans: dict[str, Any], configuration: str, fold: int, dataset_json: dict[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        find_modalities(dataset_json)  # the whole-body grid has both
        if configuration != STAGING_CONFIGURATION or configuration not in plans["configurations"]:
            raise UserError(f"configuration {configuration} of {plans['plans_name']}: staging reads the whole-body grid"
                            f"; say nnUNetv2_train ID {STAGING_CONFIGURATION} FOLD -tr {type(self).__name__} -p "
                            "FratMAEPlans")  # fmt: skip
        plans, notes = prepare_plans(plans, "3d_fullres", dataset_json)
        cohort = read_cohort(nnunet_folder("nnUNet_preprocessed") / plans["dataset_name"], plans, fold)
        return staging_plans(plans, cohort.classes), notes + other_bodies(plans)

    @staticmethod
    def build_network_architecture(plans_manager: PlansManager, *args: Any, **kwargs: Any) -> nn.Module:
        """Of the class, not of a trainer, it is nnU-Net's prediction that asks for the network: of segmentations."""
        raise UserError("nnUNetv2_predict segments, this model classifies whole bodies; say fratmae_predict_stage -i "
                        "IMAGES -o OUT -m MODELFOLDER")  # fmt: skip

    def _use_finetune_settings(self) -> None:
        super()._use_finetune_settings()
        staging = self.settings.staging
        self.initial_lr, self.weight_decay = staging.learning_rate, staging.weight_decay
        self.num_epochs = staging.epochs
        self.patience = None if self.fold == "all" else staging.patience  # fold "all" has no cases of its own to judge
        self.save_every = 10  # epochs are short

    @property
    def classes(self) -> list[str]:
        return self.configuration_manager.network_arch_init_kwargs["classes"]

    @cached_property
    def cohort(self) -> Cohort:
        """The cases of this fold; a user's error ends the command."""
        with self._one_line():
            folder, plans = Path(self.preprocessed_dataset_folder_base), self.plans_manager.plans
            return cohort_of_model(folder, plans, self.fold, self.classes)

    def initialize(self) -> None:
        torch.manual_seed(self.settings.staging.seed)
        super().initialize()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, LRScheduler]:
        groups = parameter_groups(self.bare_network(), self.initial_lr, self.weight_decay, layer_decay=1.0)
        optimizer = torch.optim.AdamW(groups, self.initial_lr)
        return optimizer, CosineSchedule(optimizer, self.num_epochs)

    def _build_loss(self) -> nn.Module:
        return class_loss(self.cohort, self.settings.staging).to(self.device)

    def do_split(self) -> tuple[list[str], list[str]]:
        return list(self.cohort.training), list(self.cohort.validation)

    def get_dataloaders(self) -> tuple[DataLoader, DataLoader]:
        """Training batches in an order of each epoch's own, and all validation cases in theirs."""
        staging, whole = self.settings.staging, self.settings.wholebody
        training = StagingStudies(self._studies(self.cohort.training), whole, self.settings.pretrain, staging.seed)
        size = self.configuration_manager.batch_size
        batches = Batches(len(training), size, size, rank=0, world=1, seed=staging.seed)
        how = {"num_workers": min(staging.workers, get_allowed_n_proc_DA()), "pin_memory": self.device.type == "cuda"}
        how["persistent_workers"] = how["num_workers"] > 0
        return DataLoader(training, batch_sampler=batches, **how), self._validation_loader(**how)

    def _validation_loader(self, **how: Any) -> DataLoader:
        studies = StagingStudies(self._studies(self.cohort.validation), self.settings.wholebody)
        return in_order(studies, self.configuration_manager.batch_size, **how)

    def _studies(self, labels: dict[str, int]) -> list[tuple[Study, int]]:
        store, grid = Path(self.preprocessed_dataset_folder), self.settings.wholebody.grid
        with self._one_line():
            return list_studies(store, labels, self.dataset_json, grid)

    # -------------------------------------------------------------------------------------------------- the training

    def _train(self) -> None:
        """nnU-Net's loop with epochs that are passes over the cases and an early end."""
        self.on_train_start()
        while not self.is_finished():
            self.on_epoch_start()
            self.on_train_epoch_start()
            self.on_train_epoch_end([self.train_step(batch) for batch in self.dataloader_train])
            self.on_validation_epoch_end([self.predict(self.dataloader_val)])
            self.on_epoch_end()
        self.on_train_end()

    def is_finished(self) -> bool:
        """Whether all epochs are done, or the validation loss has not fallen for `patience` epochs."""
        losses = self.logger.get_value("val_losses", step=None)
        stale = len(losses) - 1 - int(np.argmin(losses)) if losses else 0
        return self.current_epoch >= self.num_epochs or (self.patience is not None and stale >= self.patience)

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        self.print_to_log_file("\n".join(self.cohort.notes), add_timestamp=False)
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        self.print_plans()
        # With plans and dataset.json beside the folds the model's folder needs nothing else to predict
        save_json(self.plans_manager.plans, f"{self.output_folder_base}/plans.json", sort_keys=False)
        save_json(self.dataset_json, f"{self.output_folder_base}/dataset.json", sort_keys=False)
        fingerprint = Path(self.preprocessed_dataset_folder_base) / "dataset_fingerprint.json"
        # nnUNetv2_export_model_to_zip wants one; without segmentations there is none
        contents = load_json(str(fingerprint)) if fingerprint.is_file() else {}
        save_json(contents, f"{self.output_folder_base}/dataset_fingerprint.json", sort_keys=False)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.dataloader_train.batch_sampler.epoch = self.current_epoch
        # Dropout as a function of seed and epoch: nothing random needs to be in a checkpoint
        sequence = np.random.SeedSequence((self.settings.staging.seed, self.current_epoch))
        torch.manual_seed(int(sequence.generate_state(1)[0]))

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        loss = float(np.mean([output["loss"] for output in train_outputs]))
        self.logger.log("train_losses", loss, self.current_epoch)

    def predict(self, loader: DataLoader) -> dict[str, Any]:
        """Labels (n,), probabilities (n, classes) and loss of all cases of a loader, computed in float32."""
        self.network.eval()
        logits, labels = classify_all(self.network, loader, self.device)
        loss, probabilities = float(self.loss(logits, labels)), logits.softmax(1).cpu().numpy()
        return {"labels": labels.cpu().numpy(), "probabilities": probabilities, "loss": loss}

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        (found,) = val_outputs
        figures = stage_metrics(found["labels"], found["probabilities"], self.classes)
        self.logger.log("val_losses", found["loss"], self.current_epoch)
        for name in CURVES:
            value = figures[name.removeprefix("val_")]
            self.logger.log(name, float("nan") if value is None else value, self.current_epoch)

    def on_epoch_end(self) -> None:
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        names = ("train_losses", "val_losses", *CURVES)
        self.print_to_log_file(", ".join(f"{name} {self.logger.get_value(name, step=-1):.4f}" for name in names))
        if (self.current_epoch + 1) % self.save_every == 0 and self.current_epoch + 1 < self.num_epochs:
            self.save_checkpoint(f"{self.output_folder}/checkpoint_latest.pth")
        losses = self.logger.get_value("val_losses", step=None)
        if int(np.argmin(losses)) == self.current_epoch:
            self._best_ema = -losses[-1]  # nnU-Net's name for the score of the best checkpoint; higher is better
            self.save_checkpoint(f"{self.output_folder}/checkpoint_best.pth")
        self._plot_progress()
        self.current_epoch += 1

    def on_train_end(self) -> None:
        """With early stopping the final weights are those of the lowest validation loss."""
        best = Path(self.output_folder) / "checkpoint_best.pth"
        if self.patience is not None and best.is_file() and not self.disable_checkpointing:
            with self._one_line():
                checkpoint = read_training(best)
            self.bare_network().load_state_dict(checkpoint["network_weights"])
            self.print_to_log_file(f"weights of epoch {checkpoint['current_epoch'] - 1}, which has the lowest "
                                   "validation loss, are kept")  # fmt: skip
        super().on_train_end()

    def _plot_progress(self) -> None:
        """progress.png: losses and figures of the validation by epoch."""
        figure = Figure(figsize=(8, 7), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, names in ((upper, ("train_losses", "val_losses")), (lower, CURVES)):
            for name in names:
                values = self.logger.get_value(name, step=None)
                axes.plot(range(len(values)), values, marker="." if len(values) < 30 else "", label=name)
            axes.legend(fontsize=8)
        lower.set(ylim=(-0.02, 1.02), xlabel="epoch")
        save_figure(figure, Path(self.output_folder) / "progress.png")

    # ------------------------------------------------------------------------------------------------ the validation

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """fold_X/validation/summary.json: figures of this fold and the probabilities of each case (so --npz adds
        nothing)."""
        with self._one_line():
            found = self.predict(self._validation_loader())
            figures, said = save_summary(
                Path(self.output_folder) / "validation" / "summary.json", self.settings.staging.target, self.cohort,
                found["probabilities"],
                chosen_on_these_cases=self.patience is not None,  # without patience the last epoch is kept
            )  # fmt: skip
        for name in FIGURES:
            if figures[name] is not None:
                self.logger.log_summary(f"final_val/{name}", figures[name])
        self.print_to_log_file(said)


def other_bodies(plans: dict[str, Any]) -> list[str]:
    """A warning where the pretrained encoders saw whole bodies on another grid or in other slices than these plans."""
    settings = Settings.from_json(plans["fratmae"])
    if settings.pretrained is None or settings.finetune.from_scratch:
        return []
    theirs, ours = read_contract(settings.pretrained), settings.wholebody
    seen, here = ((w.stack, tuple(w.grid), w.k) for w in (theirs, ours))
    if seen == here:
        return []
    words = ("{} slices of a grid of {}, every {}.".format(*what) for what in (seen, here))
    return ["WARNING: pretraining saw {} These plans have {} A body has another size in voxels there, so its features "
            "are others (wholebody.grid, .k)".format(*words)]  # fmt: skip
