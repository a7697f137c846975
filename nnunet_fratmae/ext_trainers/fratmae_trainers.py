"""What stock nnU-Net finds through nnUNet_extTrainer: one line for each trainer of this project."""

try:
    from nnunet_fratmae.staging_trainer import FratMAEStagingTrainer  # noqa: F401
    from nnunet_fratmae.trainer import FratMAETrainer  # noqa: F401
except ModuleNotFoundError as error:
    # The variable may reach another environment, without this package: its search for other trainers must go on
    if error.name != "nnunet_fratmae":
        raise
