"""The front door that every segmentation network stands behind: axes, channels, physical units, clipping.

Whatever plans feed, the network behind it sees CT and PET (or one of them) in pretraining units, and its logits go back
to the axes of the plans. What the plans' values mean is worked out in plans/front_door.py and stands in plans.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.units import MODALITIES, PRETRAINING_UNITS, to_units

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


class FrontDoor(nn.Module):
    """From batches (B, C, *patch) in the plans' axes and normalisation to volumes (B, modalities, H, W, D) in
    pretraining units, CT before PET, and back; without weights.

    Args:
        input_channels: channels of the plans.
        modalities: index of the channel that is CT and of the one that is PET; None: it is not used.
        axes: the plans' axis that is H, the one that is W, the one that is D.
        scale, shift: pretraining units = scale * plans' value + shift, for CT and for PET, used or not (DESIGN
            contract 3).
        clip: lowest and highest value of CT and of PET in pretraining units, None for one that the plans clip already.
    """

    def __init__(
        self,
        input_channels: int,
        modalities: Sequence[int | None] = (0, 1),
        axes: Sequence[int] = (0, 1, 2),
        scale: Sequence[float] = (1.0, 1.0),
        shift: Sequence[float] = (0.0, 0.0),
        clip: Sequence[Sequence[float] | None] = (None, None),
    ) -> None:
        super().__init__()
        if sorted(axes) != [0, 1, 2]:
            raise ValueError(f"axes {list(axes)} is no permutation of 0, 1, 2")
        used = [i for i, channel in enumerate(modalities) if channel is not None]
        channels = [modalities[i] for i in used]
        if not channels or len(set(channels)) < len(channels) or not set(channels) <= set(range(input_channels)):
            raise ValueError(f"modalities {list(modalities)} do not name one or two of {input_channels} input channels")
        self.input_channels, self.channels, self.axes = input_channels, channels, list(axes)
        self.names = [MODALITIES[i] for i in used]
        self.register_buffer("scale", torch.tensor(scale)[used].view(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift)[used].view(1, -1, 1, 1, 1), persistent=False)
        bounds = torch.tensor([clip[i] or (-torch.inf, torch.inf) for i in used]).view(1, -1, 1, 1, 1, 2)
        self.register_buffer("lowest", bounds[..., 0], persistent=False)
        self.register_buffer("highest", bounds[..., 1], persistent=False)
        self.watch = Watch(self.names)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.input_channels:
            # nnUNetv2_predict reads whatever files there are, and this is our first place to see them
            raise UserError(f"images with {x.shape[1]} channels, the model was trained with {self.input_channels}; "
                            "give every case all its files (_0000, _0001), or fill in the missing ones with "
                            "fratmae_fill_missing")  # fmt: skip
        image = x[:, self.channels].permute(0, 1, *(axis + 2 for axis in self.axes)) * self.scale + self.shift
        if not (self.training or torch.compiler.is_compiling() or torch.jit.is_tracing()):
            self.watch.look(image)
        return image.clamp(self.lowest, self.highest)

    def back(self, logits: Tensor) -> Tensor:
        """Logits (B, classes, H, W, D) in the axes of the plans."""
        return logits.permute(0, 1, *(self.axes.index(axis) + 2 for axis in range(3)))


class Watch:
    """Warns, once, where what a network is shown in prediction cannot be CT in HU and PET in SUVbw.

    nnUNetv2_predict reads whatever files there are, clips and normalises them, and a network answers to anything. It is
    our only place there. Counting is done on the device.

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
