"""nnUNetTrainer that ends after NNUNET_SECONDS of training; put its folder on nnUNet_extTrainer."""

import os
import time

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerTimed(nnUNetTrainer):
    """As nnU-Net in all but the time: short epochs, and a polynomial schedule over the epochs that fit.

    Its validation does not mirror, as that of the rivals here, since eight passes would take longer than the training.
    """

    def run_training(self) -> None:
        seconds = float(os.environ["NNUNET_SECONDS"])
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 5, 1  # nnU-Net's ratio
        self.save_every = self.num_epochs
        self.on_train_start()
        start = time.monotonic()
        while self.current_epoch < self.num_epochs:
            self.on_epoch_start()
            self.on_train_epoch_start()
            steps = range(self.num_iterations_per_epoch)
            self.on_train_epoch_end([self.train_step(next(self.dataloader_train)) for _ in steps])
            self.on_validation_epoch_start()
            steps = range(self.num_val_iterations_per_epoch)
            self.on_validation_epoch_end([self.validation_step(next(self.dataloader_val)) for _ in steps])
            self.on_epoch_end()
            # How many epochs fit, judged by those that are over; none more once the time is up
            self.num_epochs = int(self.current_epoch * max(1, seconds / (time.monotonic() - start)))
            self.lr_scheduler.max_steps = self.num_epochs
        self.on_train_end()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        self.inference_allowed_mirroring_axes = None
        super().perform_actual_validation(save_probabilities)
