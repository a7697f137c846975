"""How much memory a fine-tuning step of FratMAE's segmentation network takes, from its shapes alone.

Two moments are the fullest: the start of the backward pass (weights, AdamW's two moments, all that the forward pass
keeps for the gradients, and the first gradients of activations) and the optimiser step (weights, moments, gradients).
What the forward pass keeps is counted layer by layer as networks/vit.py and networks/unetr.py compute it; a test
compares the count with what torch keeps. What cannot be counted, TRANSIENT and the fixed part on a CPU, was fitted to
four measured peaks and checked on others (benchmarks/memory_model.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_fratmae.networks.strides import LEVELS, decoder_strides
from plans.settings import Preset

TRANSIENT = 3.8
"""Activations of the decoder's width at full resolution that live only for a moment of the backward pass."""
FIXED_GB = {"cpu": 0.045, "cuda": 1.0}
"""Libraries' own memory, beyond Python's: buffers on a CPU; context and cuDNN's workspace on a GPU (not measured)."""
GB = 1e9


@dataclass
class Tally:
    """Numbers of a network: its parameters, and what a forward pass of one patch keeps for the backward pass."""

    parameters: int = 0
    kept: int = 0
    """In the type of autocast."""
    kept_fp32: int = 0
    """In float32 whatever autocast does: the residual stream of the transformer, the loss."""

    def encoder(self, sizes: Preset, token_patch: Sequence[int], tokens: int, voxels: int) -> None:
        """A ViT of one modality; `tokens` with the CLS token."""
        dim, depth = sizes.embed_dim, sizes.depth
        self.parameters += dim * (math.prod(token_patch) + 4) + depth * (12 * dim**2 + 13 * dim)
        self.kept += voxels  # the image, to the patch embedding
        # A block keeps its normalised input, q, k, v, the attention's output, the normalised input of the MLP and the
        # MLP's hidden layer before and after GELU; its input and that of its MLP are the residual stream.
        self.kept += depth * tokens * dim * (1 + 3 + 1 + 1 + 4 + 4)
        self.kept_fp32 += (2 * depth + 1) * tokens * dim

    def block(self, wide: int, out: int, voxels: int) -> None:
        """unetr.conv_block from `wide` to `out` channels: two convolutions, norms, and a 1x1 shortcut."""
        shortcut = wide != out
        self.parameters += 27 * (wide + out) * out + 4 * out + shortcut * (wide * out + 2 * out)
        self.kept += voxels * out * (4 + shortcut)  # both convolutions and activations; the input is counted before

    def upsample(self, wide: int, out: int, stride: Sequence[int]) -> None:
        self.parameters += wide * out * math.prod(stride) + out

    def decoder(
        self, sizes: Preset, steps: Sequence[Sequence[int]], tokens: int, voxels: int, classes: int, modalities: int
    ) -> None:
        """unetr.UNETRDecoder with the strides `steps`; `tokens` without CLS."""
        maps, features = modalities * sizes.embed_dim, sizes.unetr_features
        widths = [features * 2**level for level in reversed(range(LEVELS))]
        at = [tokens * math.prod(math.prod(step) for step in steps[: level + 1]) for level in range(LEVELS)]
        self.kept += LEVELS * maps * tokens + modalities * voxels  # the maps of the encoders together, the image
        self.block(modalities, features, voxels)
        for level in range(LEVELS - 1):  # the ways of the early maps up to their level
            self.upsample(maps, widths[level], steps[0])
            self.kept += widths[level] * at[0] if level else 0  # what further steps start from
            for step in range(1, level + 1):
                self.upsample(widths[level], widths[level], steps[step])
                self.kept += widths[level] * at[step]
                self.block(widths[level], widths[level], at[step])
        for level in range(LEVELS):
            self.upsample([maps, *widths][level], widths[level], steps[level])
            self.kept += 2 * widths[level] * at[level]  # upsampled and skipped, concatenated
            self.block(2 * widths[level], widths[level], at[level])
        self.parameters += (features + 1) * classes
        self.kept_fp32 += voxels * (4 * classes + 1)  # logits, softmax of the Dice and of the cross-entropy, one-hot


def tally(
    sizes: Preset, token_patch: Sequence[int], patch: Sequence[int], classes: int = 2, modalities: int = 2,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Tally:  # fmt: skip
    """Count the whole network (an encoder for each of the modalities, decoder) for patches of (H, W, D) voxels."""
    voxels = math.prod(patch)
    tokens = voxels // math.prod(token_patch)
    count = Tally()
    for _ in range(modalities):
        count.encoder(sizes, token_patch, 1 + tokens, voxels)
    count.decoder(sizes, decoder_strides(token_patch, spacing), tokens, voxels, classes, modalities)
    return count


def step_memory(
    sizes: Preset,
    token_patch: Sequence[int],
    patch: Sequence[int],
    batch: int,
    classes: int = 2,
    device: str = "cuda",
    modalities: int = 2,
    studies: tuple[Sequence[int], int] | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> float:
    """Peak of a training step in GB: bfloat16 or float16 by autocast on "cuda", float32 on "cpu".

    `studies`: patch and number of the whole bodies that a joint branch classifies in the same step (its small head is
    not counted).
    """
    count = tally(sizes, token_patch, patch, classes, modalities, spacing)
    number = 2 if device == "cuda" else 4  # bytes
    copies = 2 if device == "cuda" else 0  # autocast's half-precision copy of the weights
    transient = TRANSIENT * sizes.unetr_features * math.prod(patch) * number
    backward = count.parameters * (12 + copies) + batch * (count.kept * number + count.kept_fp32 * 4 + transient)
    if studies is not None:
        whole, number_of_studies = studies
        seen, voxels = Tally(), math.prod(whole)
        for _ in range(modalities):
            seen.encoder(sizes, token_patch, 1 + voxels // math.prod(token_patch), voxels)
        backward += number_of_studies * (seen.kept * number + seen.kept_fp32 * 4)
    optimiser = count.parameters * (20 if device == "cuda" else 16)  # on GPUs AdamW works on all weights at once
    return max(backward, optimiser) / GB + FIXED_GB[device]
