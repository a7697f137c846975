"""What stock nnU-Net finds through nnUNet_extTrainer: one line for each trainer of this project."""

from nnunet_fratmae.trainer import FratMAETrainer  # noqa: F401
