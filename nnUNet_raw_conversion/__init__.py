"""From studies as they lie on a disk to a nnU-Net raw dataset in HU and SUVbw (one dataset folder, two channels)."""
