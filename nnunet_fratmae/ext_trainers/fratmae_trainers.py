"""What stock nnU-Net finds through nnUNet_extTrainer: one line for each trainer of this project."""

try:
    from nnunet_fratmae.staging_trainer import FratMAEStagingTrainer  # noqa: F401
    from nnunet_fratmae.trainer import FratMAETrainer  # noqa: F401
except ImportError as error:
    # nnU-Net's search for other trainers must go on, also where the variable reaches an environment without this
    # package, or where a file of the user's is called as a package of ours
    if error.name != "nnunet_fratmae":
        import sys

        known = (error.name or "").split(".")[0]
        taken = getattr(sys.modules.get(known), "__file__", None)
        where = f"; {known} is {taken}, rename it if it is yours" if taken else ""
        print(f"FratMAE: WARNING: its trainers cannot be used: {error}{where}", file=sys.stderr)
