"""Where the trainers depend on how a release of nnU-Net works inside: the one place to adapt to another release.

All else that we call is checked, with the version that is met, by tests/test_nnunet_api.py.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_fratmae.base.command import UserError

TESTED = "2.8.1"
OVERRIDDEN = (
    "__init__", "initialize", "build_network_architecture", "save_checkpoint", "load_checkpoint",
    "configure_optimizers", "train_step", "validation_step",
    "configure_rotation_dummyDA_mirroring_and_inital_patch_size", "get_training_transforms",
    "set_deep_supervision_enabled", "plot_network_architecture", "_build_loss", "do_split", "get_dataloaders",
    "run_training", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end",
    "on_validation_epoch_end", "on_epoch_end", "perform_actual_validation",
)  # fmt: skip
"""Methods of nnUNetTrainer that a trainer of ours replaces or extends."""


def check_overrides(trainer: str) -> None:
    """See that nnU-Net has the methods that we override: one that was renamed would be passed over in silence, and the
    training would mirror head to feet or bend the intensities.

    Raises:
        UserError: it has not.
    """
    gone = [name for name in OVERRIDDEN if not hasattr(nnUNetTrainer, name)]
    if gone:
        raise UserError(f"nnUNetTrainer of nnunetv2 {version('nnunetv2')} has no {', '.join(gone)}, "
                        f"which {trainer} overrides; pip install nnunetv2=={TESTED}, or update nnunet-fratmae")


def take_resume(plans: dict[str, Any]) -> dict[str, bool]:
    """Take from the plans what nnU-Net has put there besides them, to be given back to its `__init__` alone.

    Since 2.7 that is "continue_training" (for --c), which `nnUNetTrainer.__init__` wants even where a trainer is made
    from Python, and takes out again.
    """
    return {"continue_training": plans.pop("continue_training", False)}


def curves(trainer: nnUNetTrainer) -> dict[str, list[Any]]:
    """The values by epoch that the trainer's logger keeps, by name; a name has to be there before it is logged."""
    return trainer.logger.local_logger.my_fantastic_logging
