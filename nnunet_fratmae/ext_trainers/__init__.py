"""The folder that nnUNet_extTrainer names; nnU-Net looks for trainer classes in its modules."""
