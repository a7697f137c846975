"""Dual-encoder UNETR for segmentation (paper section 2.4, stage 2).

Both encoders see the patch, their four intermediate outputs (layers 3, 6, 9, 12 of ViT-B) are concatenated layer by
layer, and a convolutional decoder with skip connections at four levels (UNETR, paper reference 7) makes the logits.
Where CT or PET is used alone, the network has that encoder only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from torch import Tensor, nn

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.networks.front_door import FrontDoor
from nnunet_fratmae.networks.strides import LEVELS, decoder_strides
from nnunet_fratmae.networks.vit import dual_encoders

LESION_PRIOR = 0.01  # probability with which a new network takes a voxel for lesion


def conv_block(channels_in: int, channels_out: int) -> nn.Module:
    """UNETR's residual block: two 3x3x3 convolutions with instance norm and leaky ReLU, same size."""
    return BasicBlockD(
        nn.Conv3d, channels_in, channels_out, 3, 1, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def upsample(channels_in: int, channels_out: int, stride: tuple[int, ...]) -> nn.Module:
    """Transposed convolution by `stride` without overlap, so that it makes no checkerboard."""
    return nn.ConvTranspose3d(channels_in, channels_out, kernel_size=stride, stride=stride)


class UNETRDecoder(nn.Module):
    """From the image (B, C, H, W, D) and four token maps (B, channels, h, w, d) to logits (B, classes, H, W, D)."""

    def __init__(
        self, image_channels: int, map_channels: int, steps: Sequence[Sequence[int]], features: int, num_classes: int
    ) -> None:
        """`steps`: strides of the upsampling, deepest first."""
        super().__init__()
        widths = [features * 2**level for level in reversed(range(LEVELS))]  # 8f, 4f, 2f, f from deep to shallow
        self.image_skip = conv_block(image_channels, features)
        # The map of an early layer meets the decoder at a shallow level, so it takes more steps up (UNETR figure 1).
        self.skips = nn.ModuleList(
            self._climb(map_channels, widths[level], steps[: level + 1]) for level in range(LEVELS - 1)
        )
        self.ups = nn.ModuleList(
            upsample(channels, width, step)
            for channels, width, step in zip([map_channels, *widths], widths, steps, strict=False)
        )
        self.merges = nn.ModuleList(conv_block(2 * width, width) for width in widths)
        self.head = nn.Conv3d(features, num_classes, kernel_size=1)

    @torch.no_grad()
    def start_as_background(self, regions: bool) -> None:
        """Biases with which nearly every voxel starts as background, `regions` with a logit each or classes in a row.

        From even odds, the first hundreds of steps would go into learning that lesions are rare (Lin et al. 2017, Focal
        Loss, section 4.1, whose prior this is).
        """
        odds = math.log((1 - LESION_PRIOR) / LESION_PRIOR)
        self.head.bias.fill_(-odds if regions else 0.0)
        if not regions:
            self.head.bias[0] = odds

    @staticmethod
    def _climb(channels: int, width: int, steps: Sequence[tuple[int, ...]]) -> nn.Module:
        """Steps of upsampling to `width` channels, each but the first followed by a convolution block."""
        layers: list[nn.Module] = [upsample(channels, width, steps[0])]
        for step in steps[1:]:
            layers += [upsample(width, width, step), conv_block(width, width)]
        return nn.Sequential(*layers)

    def forward(self, image: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """`maps` from the earliest layer to the last."""
        *early, x = maps
        skips = [climb(m) for climb, m in zip(self.skips, reversed(early), strict=True)]
        for up, merge, skip in zip(self.ups, self.merges, [*skips, self.image_skip(image)], strict=True):
            x = merge(torch.cat([up(x), skip], dim=1))
        return self.head(x)


def tap_layers(depth: int) -> list[int]:
    """The encoder layers (counted from 1) that stage 2 looks at: 3, 6, 9 and 12 of ViT-B (paper section 2.4).

    Raises:
        ValueError: they would not be evenly spread.
    """
    if depth % LEVELS:
        raise ValueError(f"depth {depth} is no multiple of {LEVELS}")
    return [depth * (level + 1) // LEVELS for level in range(LEVELS)]


class FratMAEUNETR(nn.Module):
    """The segmentation network that plans.json names; stock `get_network_from_plans` builds it from plain JSON.

    Input (B, C, *patch in the plans' axes) in the plans' normalisation, output logits (B, num_classes, same patch).

    Args:
        input_channels: channels of the plans.
        num_classes: segmentation heads.
        patch_size: (H, W, D) voxels.
        token_patch: (H, W, D) voxels of a token.
        embed_dim, depth, num_heads: of each encoder.
        features: channels of the decoder at full resolution.
        strides: of the decoder's steps from the tokens to the voxels, deepest first (networks/strides.py); None: those
            of isotropic voxels.
        deep_supervision: nnU-Net passes it; UNETR has one output, so it must be off (UserError).
        front_door: arguments of `FrontDoor`.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        patch_size: Sequence[int],
        token_patch: Sequence[int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        features: int,
        strides: Sequence[Sequence[int]] | None = None,
        deep_supervision: bool = False,
        **front_door: Any,
    ) -> None:
        super().__init__()
        if deep_supervision:
            # Only nnU-Net's own trainers ask for it, and this is our first place to meet them
            raise UserError(f"the network of these plans ({type(self).__name__}) is trained by -tr FratMAETrainer, "
                            "classes of whole bodies by -tr FratMAEStagingTrainer; nnU-Net's own trainers take their "
                            "own plans (-p nnUNetPlans)")  # fmt: skip
        self.tap_layers = tap_layers(depth)
        self.front_door = FrontDoor(input_channels, **front_door)
        names = self.front_door.names
        self.encoders = dual_encoders(patch_size, token_patch, embed_dim, depth, num_heads, names)
        # Stock `nnUNetv2_train -pretrained_weights` skips keys with ".seg_layers." and wants all others in the file.
        # All that is not pretrained lives under that name, so an export with the encoders alone is enough for it.
        steps = [tuple(step) for step in strides or decoder_strides(token_patch)]
        if len(steps) != LEVELS or [math.prod(sides) for sides in zip(*steps, strict=True)] != list(token_patch):
            raise ValueError(f"strides {steps} are not {LEVELS} steps that make up the token patch {list(token_patch)}")
        decoder = UNETRDecoder(len(names), len(names) * embed_dim, steps, features, num_classes)
        self.decoder = nn.ModuleDict({"seg_layers": decoder})

    def forward(self, x: Tensor) -> Tensor:
        image = self.front_door(x)
        volumes = zip(self.encoders.values(), image.split(1, dim=1), strict=True)
        of_encoders = [encoder.feature_maps(volume, self.tap_layers) for encoder, volume in volumes]
        maps = [torch.cat(layer, dim=1) for layer in zip(*of_encoders, strict=True)]
        return self.front_door.back(self.decoder["seg_layers"](image, maps))
