"""What a network is shown in prediction: a warning, once, where it cannot be CT in HU and PET in SUVbw.

nnUNetv2_predict reads whatever files there are, clips and normalises them, and a network answers to anything. It is our
only place there.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from plans.units import PRETRAINING_UNITS, to_units

MOST_SATURATED = 0.2  # of the PET seen. A bladder above SUV 25 is a fortieth of a patch, hot kidneys are less
ROUNDING = 0.01  # of pretraining units, in half precision
# A CT of a body has fat in every patch, and nearly always air; a PET in its place has neither
HIGHEST_OF_FAT = to_units("CT", torch.tensor(-50.0)).item()
ENOUGH_VOXELS = 500_000
# Looked at are the sums of the 1st, 2nd, 4th, ... forward pass up to this one, then of every so many: a look makes the
# host wait for the device.
WINDOW = 64
# Sliding windows begin in a corner, where all is air, and see each patch in up to eight mirror images
EMPTY_FORWARDS = 1024

_warned = False


class FrontDoor:
    """Counts, on the device, what a network sees.

    Args:
        names: of the volumes that it is shown, "CT" and "PET" or one of them.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.sums: Tensor | None = None
        self.forwards = self.empty = 0

    def look(self, image: Tensor) -> None:
        """See a batch (B, C, ...) in pretraining units before it is clipped; at most one warning a process."""
        global _warned
        if _warned:
            return
        volumes = image.detach().unbind(1)
        counts = torch.stack([_counts(volume, name) for volume, name in zip(volumes, self.names, strict=True)])
        if self.sums is None or self.sums.device != counts.device:
            self.sums, self.forwards = torch.zeros_like(counts), 0
        self.sums += counts
        self.forwards += 1
        if self.forwards & (self.forwards - 1):
            return
        if why := self._fault(dict(zip(self.names, self.sums.tolist(), strict=True))):
            _warned = True
            # On a line of its own, beside nnU-Net's progress bar
            print(f"\nFratMAE: WARNING: {why}; do not trust what is predicted of it: check the images, or convert them "
                  "with fratmae_convert_pairs", file=sys.stderr, flush=True)  # fmt: skip
        if self.forwards == WINDOW:
            self.sums = None

    def _fault(self, seen: dict[str, list[float]]) -> str:
        for name, (voxels, not_finite, saturated, _, above_fat) in seen.items():
            if not_finite:
                return f"the {name} has voxels that are NaN or infinite"
            if name == "PET" and saturated > MOST_SATURATED * voxels:
                upper = PRETRAINING_UNITS["PET"].upper
                return f"{saturated / voxels:.0%} of the PET is above SUV {upper:g}: Bq/ml, or CT and PET swapped"
            if name == "CT" and above_fat == voxels > ENOUGH_VOXELS:
                return "the CT has no fat and no air: not HU, or CT and PET swapped"
        is_empty = not any(not_lowest for _, _, _, not_lowest, _ in seen.values())
        self.empty = is_empty * (self.empty + (self.forwards == WINDOW) * WINDOW)
        return f"{' and '.join(seen)} are empty" if self.empty >= EMPTY_FORWARDS else ""


def _counts(volume: Tensor, name: str) -> Tensor:
    """Numbers of voxels: all, not finite, on the upper limit of the units, above the lower one, above fat (as CT)."""
    units = PRETRAINING_UNITS[name]
    top, bottom = ((limit - units.mean) / units.std for limit in (units.upper, units.lower))
    tests = ~torch.isfinite(volume), volume >= top - ROUNDING, volume > bottom + ROUNDING, volume > HIGHEST_OF_FAT
    return torch.stack([torch.ones_like(tests[0]).sum(), *(test.sum() for test in tests)])
