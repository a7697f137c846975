"""Stock nnU-Net looks for trainers in the folders that nnUNet_extTrainer lists; this adds ours to them.

`nnunet_fratmae.pth`, which the installation puts beside the packages, calls `register` when Python starts
(docs/decisions.md says why it is done so). The explicit way is
`export nnUNet_extTrainer=$(python -m nnunet_fratmae.discovery)`.
"""

import os

TRAINERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ext_trainers")


def register() -> None:
    """Append our folder to nnUNet_extTrainer of this process, after whatever the user has there."""
    present = [path for path in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if path]
    if TRAINERS not in present:
        os.environ["nnUNet_extTrainer"] = os.pathsep.join([*present, TRAINERS])


if __name__ == "__main__":
    print(TRAINERS)
