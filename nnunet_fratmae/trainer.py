"""FratMAETrainer: lesion segmentation with pretrained dual encoders, trained and used by stock nnU-Net commands.

`nnUNetv2_train ID 3d_fullres 0 -tr FratMAETrainer [-p FratMAEPlans] [-device cpu]`
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from nnunet_fratmae.artefact import compare, load_encoders
from nnunet_fratmae.augmentation import physical_augmentation
from nnunet_fratmae.base.command import UserError, check_device
from nnunet_fratmae.base.locks import alone_in
from nnunet_fratmae.base.weights import nothing_executed, whole_checkpoint
from nnunet_fratmae.checkpoints import FINAL, LATEST, PREVIOUS, choose_checkpoint
from nnunet_fratmae.ending import one_line
from nnunet_fratmae.joint import TRAIN_CURVE, VALIDATION_CURVES, StageBranch, add_branch
from nnunet_fratmae.networks.unetr import FratMAEUNETR
from nnunet_fratmae.nnunet_api import check_overrides, curves, take_resume
from nnunet_fratmae.optimization import CosineSchedule, parameter_groups
from nnunet_fratmae.preparation import PRETRAINED_VARIABLE, check_other_folds, go_on_with, prepare_plans  # noqa: F401
from plans.dataset_json import check_dataset_json
from plans.models import check_configuration
from plans.preprocessed import check_fold
from plans.reader import check_names, check_nnunet, check_settings
from plans.settings import Settings
from plans.staging import STAGING_CONFIGURATION

ROTATION = math.radians(15)  # a patient on the table is never further off
SCALING = (0.85, 1.25)  # nnU-Net's range for the patch that is read before augmentation
class FratMAETrainer(nnUNetTrainer):
    """Stage 2 of the paper, segmentation: dual ViT encoders + UNETR decoder, AdamW with cosine, Dice + CE.

    On plain nnU-Net plans it extends them in memory (plans/extension.py). The pretrained encoders come from
    `fratmae.pretrained` in the plans, else the environment variable FRATMAE_PRETRAINED, else there are none, and none
    with `fratmae.finetune.from_scratch`; preset and token patch follow the artefact. Augmentation keeps the meaning of
    HU and SUV (nnunet_fratmae/augmentation.py). GPUs that can, compute in bfloat16 instead of float16. With
    `fratmae.finetune.stage_weight` whole bodies are classified along (nnunet_fratmae/joint.py).

    A user's error is a UserError before a folder is made, which ends nnU-Net's command in one line.
    """

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net compares signatures
    ) -> None:
        check_overrides(type(self).__name__)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed:  # else nnU-Net has a process a GPU by now
            check_device(device.type)
        resume = take_resume(plans)
        where = f"{plans.get('plans_name', 'plans')}.json"
        self.notes, self.preparation_error, self.today = [], None, None
        check_dataset_json(dataset_json, "dataset.json", labelled=True)
        check_nnunet(plans, where, dataset_json, used=[configuration])
        check_names(plans, where)
        try:
            self.today = check_settings(plans, where)
            prepared, self.notes = self.prepare(plans, configuration, fold, dataset_json)
            check_other_folds(self._model_folder(plans, configuration), prepared, configuration, fold)
            plans = prepared
        except UserError as error:
            # To go on or to validate takes a checkpoint, no artefact; a new training stops in `initialize`
            if not any(self._model_folder(plans, configuration).glob(f"fold_{fold}/checkpoint_*.pth")):
                raise
            self.preparation_error = error
            plans = {**plans, "fratmae": {}}  # those of the checkpoint take their place
        with one_line():
            super().__init__({**plans, **resume}, configuration, fold, dataset_json, device)
        self.keeps_previous = False  # of this training; an earlier one may have left its checkpoints here
        self._use_finetune_settings()
        self.branch: StageBranch | None = None  # of a joint training, from its start
        if self.uses_bf16:
            self.grad_scaler = None  # bfloat16 has the range of float32

    def prepare(
        self, plans: dict[str, Any], configuration: str, fold: int, dataset_json: dict[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Plans as this trainer trains them, and notes for the log; a trainer for another task has its own."""
        plans, notes = prepare_plans(plans, configuration, dataset_json)
        return add_branch(plans, configuration, fold), notes

    @classmethod
    def _model_folder(cls, plans: dict[str, Any], configuration: str) -> Path:
        """Where nnU-Net keeps the folds of this model."""
        model = f"{cls.__name__}__{plans['plans_name']}__{configuration}"
        return Path(os.environ.get("nnUNet_results") or os.devnull) / plans["dataset_name"] / model

    def _use_finetune_settings(self) -> None:
        self.settings = Settings.from_json(self.plans_manager.plans.get("fratmae", {}))
        finetune = self.settings.finetune
        self.initial_lr, self.weight_decay = finetune.learning_rate, finetune.weight_decay
        self.oversample_foreground_percent = finetune.foreground
        self.num_epochs = finetune.epochs
        self.num_iterations_per_epoch = finetune.iterations
        self.num_val_iterations_per_epoch = finetune.val_iterations
        self.enable_deep_supervision = False  # UNETR has one output

    def initialize(self) -> None:
        """As nnU-Net, then the pretrained encoders; the log says what was loaded and that nothing is missing."""
        if self.preparation_error is not None:
            raise self.preparation_error
        super().initialize()
        if isinstance(network := self.bare_network(), FratMAEUNETR):
            network.decoder["seg_layers"].start_as_background(self.label_manager.has_regions)
        for note in self.notes:
            self.print_to_log_file(note, add_timestamp=False)
        if self.settings.pretrained is not None and not self.settings.finetune.from_scratch:
            with self._one_line():
                report = load_encoders(self.settings.pretrained, self.bare_network().encoders)
            self.print_to_log_file("\n".join(report), add_timestamp=False)

    def bare_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = getattr(self.network, "module", self.network)
        return getattr(network, "_orig_mod", network)

    def _one_line(self) -> AbstractContextManager[None]:
        """Within, what a user can mend, and what disk and memory refuse, ends the command in one line."""
        stores = [Path(self.preprocessed_dataset_folder)]
        if self.settings.finetune.stage_weight:
            whole = self.plans_manager.plans["configurations"][STAGING_CONFIGURATION]
            stores.append(Path(self.preprocessed_dataset_folder_base) / whole["data_identifier"])
        loaders = (self.dataloader_train, self.dataloader_val)
        return one_line(self.output_folder, stores, loaders)

    def run_training(self) -> None:
        """As nnU-Net; a second training in the same folder is refused."""
        with self._one_line(), alone_in(Path(self.output_folder)) if self.local_rank == 0 else nullcontext():
            self._train()

    def _train(self) -> None:
        super().run_training()

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net, but what was there stays until the new one is whole, and of the latest the one before is kept."""
        path = Path(filename)
        if self.local_rank > 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        previous = path.with_name(PREVIOUS)
        with self._one_line(), whole_checkpoint(path, previous if self._keeps(path) else None) as partial:
            super().save_checkpoint(str(partial))
        if path.name == LATEST and not self.keeps_previous or path.name == FINAL:
            previous.unlink(missing_ok=True)
        self.keeps_previous |= path.name == LATEST

    def _keeps(self, path: Path) -> bool:
        return self.keeps_previous and path.name == LATEST

    def load_checkpoint(self, *args: str, **kwargs: str) -> None:
        """As nnU-Net, but nothing in the file is executed, the network is that of the checkpoint, whatever
        FRATMAE_PRETRAINED says today, and where the file cannot be read, as after a crash of the machine, the newest
        before it takes its place.

        Args:
            the path, whose name is another in nnU-Net 2.8 (filename_or_checkpoint) and on its main branch (checkpoint).
        """
        (asked,) = (*args, *kwargs.values())
        with self._one_line():
            path, found, notes = choose_checkpoint(Path(asked))
            plans = found["init_args"]["plans"]
            check_configuration(plans, self.configuration_name, f"{path}, plans")
            if not self.was_initialized:
                self._be_that_of(plans, notes)
            for note in notes:
                self.print_to_log_file(note, add_timestamp=False)
            if problems := compare(self.bare_network().state_dict(), _plain_names(found["network_weights"])):
                few = "; ".join(problems[:3])[:300]
                raise UserError(f"{path}: does not fit the network ({len(problems)} keys: {few})")
            with nothing_executed():
                super().load_checkpoint(str(path))
        # nnU-Net would save those that the training began with, and the next --c fall back to them
        self.my_init_kwargs = {**self.my_init_kwargs, "plans": self.plans_manager.plans}
        self.keeps_previous = True

    def _be_that_of(self, plans: dict[str, Any], notes: list[str]) -> None:
        """Take the plans of a checkpoint and make their network; adds to the notes for the log."""
        if self.today is not None:
            plans, changed = go_on_with(plans, self.today)
            notes += changed
        if self.preparation_error is not None:
            notes.append(f"WARNING: a new training would not start here: {self.preparation_error}")
        self.plans_manager = PlansManager(plans)
        self.configuration_manager = self.plans_manager.get_configuration(self.configuration_name)
        self._use_finetune_settings()
        super().initialize()  # all weights come from the checkpoint, so none are pretrained

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, LRScheduler]:
        """AdamW with cosine; frozen encoders are frozen here, which is before DDP looks at the network."""
        finetune, network = self.settings.finetune, self.bare_network()
        network.encoders.requires_grad_(not finetune.freeze)
        groups = parameter_groups(network, self.initial_lr, self.weight_decay, finetune.layer_decay)
        optimizer = torch.optim.AdamW(groups, self.initial_lr)
        return optimizer, CosineSchedule(optimizer, self.num_epochs, finetune.encoder_warmup_epochs)

    @property
    def uses_bf16(self) -> bool:
        """Whether training runs in bfloat16: on a GPU that computes in it, not one that only emulates it."""
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """nnU-Net's autocast to float16 becomes one to bfloat16 within.

        The validation at the end of the training is left as it is, so that it computes what nnUNetv2_predict does.
        """
        before = torch.get_autocast_dtype("cuda")
        torch.set_autocast_dtype("cuda", torch.bfloat16 if self.uses_bf16 else before)
        try:
            yield
        finally:
            torch.set_autocast_dtype("cuda", before)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with self.precision():
            if self.branch is None:
                return super().train_step(batch)
            loss = super().train_step(self.branch.join(batch))["loss"]
        stage_loss = float(self.loss.stage_loss)
        # The part of the segmentation alone, beside which nnU-Net draws that of the validation
        return {"loss": loss - self.settings.finetune.stage_weight * stage_loss, "stage_loss": stage_loss}

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with self.precision():
            return super().validation_step(batch)

    def _stage_branch(self) -> StageBranch:
        folder, network = Path(self.preprocessed_dataset_folder_base), self.bare_network()
        return StageBranch(folder, self.plans_manager.plans, self.dataset_json, self.fold, network)

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's, of cases that are there and whole."""
        check_fold(Path(self.preprocessed_dataset_folder_base), Path(self.preprocessed_dataset_folder), self.fold)
        return super().do_split()

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        if self.settings.finetune.stage_weight:
            self._start_branch()
        super().on_train_start()

    def _start_branch(self) -> None:
        with self._one_line():
            self.branch = self._stage_branch()
        self.loss = self.branch.joint_loss(self.loss).to(self.device)
        for name in (TRAIN_CURVE, *VALIDATION_CURVES.values()):
            curves(self).setdefault(name, [])
        self.print_to_log_file("\n".join(self.branch.cohort.notes), add_timestamp=False)
        world = torch.distributed.get_world_size() if self.is_ddp else 1
        steps = self.current_epoch * self.num_iterations_per_epoch
        self.branch.open(steps, self.local_rank, world, self.device.type == "cuda")

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        super().on_train_epoch_end(train_outputs)
        if self.branch is not None:
            mean = float(np.mean([output["stage_loss"] for output in train_outputs]))
            self.logger.log(TRAIN_CURVE, mean, self.current_epoch)

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        super().on_validation_epoch_end(val_outputs)
        if self.branch is not None and self.local_rank == 0:
            figures = self.branch.figures(self.device)
            for figure, name in VALIDATION_CURVES.items():
                self.logger.log(name, figures[figure], self.current_epoch)
            names = (TRAIN_CURVE, *VALIDATION_CURVES.values())
            self.print_to_log_file(", ".join(f"{name} {self.logger.get_value(name, step=-1):.4f}" for name in names))

    def on_train_end(self) -> None:
        super().on_train_end()
        if self.branch is not None:
            self.branch.close()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As nnU-Net; of a joint training also fold_X/validation/stages.json."""
        with self._one_line():
            super().perform_actual_validation(save_probabilities)
        if not self.settings.finetune.stage_weight or self.local_rank > 0:
            return
        try:
            branch = self._stage_branch()
        except UserError as error:  # --val where the labels are gone; the segmentation needs none
            self.print_to_log_file(f"WARNING: no validation/stages.json: {error}")
            return
        path = Path(self.output_folder) / "validation" / "stages.json"
        self.print_to_log_file(branch.save_summary(path, self.device))

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        """nnU-Net's choice, but small rotations and left-right mirroring only: a body has a front and a head."""
        patch_size = self.configuration_manager.patch_size
        axes = dict(zip("HWD", self.configuration_manager.network_arch_init_kwargs["axes"], strict=True))
        # A thin coronal slab (H first, as FratMAEPlans have it) is rotated in its plane only
        in_plane = axes["H"] == 0 and max(patch_size) / patch_size[0] > ANISO_THRESHOLD
        # Rotations are of voxels: where these are longer than wide, they shear, the more the larger the angle
        spacing = self.configuration_manager.spacing[1 if in_plane else 0 :]
        angle = ROTATION * min(spacing) / max(spacing)
        rotation = (-angle, angle)
        initial_patch_size = get_patch_size(patch_size, rotation, rotation, rotation, SCALING)
        if in_plane:
            initial_patch_size[0] = patch_size[0]
        # None and not (): nnU-Net's predictor asks for the largest of the axes
        mirrored = tuple(sorted(axes[axis] for axis in self.settings.finetune.mirror_axes)) or None
        self.inference_allowed_mirroring_axes = mirrored
        return rotation, in_plane, initial_patch_size, mirrored

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        """nnU-Net's, but intensities change as between scanners (nnunet_fratmae/augmentation.py)."""
        stock = super().get_training_transforms(*args, **kwargs)
        plans, config = self.plans_manager.plans, self.configuration_manager.configuration
        return physical_augmentation(stock, self.settings.finetune, plans, config)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing to set: UNETR has one output."""

    def plot_network_architecture(self) -> None:
        """Left out: nnU-Net's plot needs a package that no longer works."""


def _plain_names(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights as nnU-Net will load them: without what DataParallel puts before the names."""
    return {name.removeprefix("module."): value for name, value in weights.items()}
