"""Strides of the UNETR decoder between the tokens and the voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence

TOKEN_SIDES = (1, 2, 4, 8, 16)
LEVELS = 4
"""Steps of the decoder, and encoder layers that it looks at."""
POOLED_TOGETHER = 2  # nnU-Net pools the axes whose voxels are shorter than so many of the shortest


def decoder_strides(
    token_patch: Sequence[int], spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> list[tuple[int, int, int]]:
    """Strides along (H, W, D) of the decoder's four steps from the token grid to the voxels, deepest first.

    Their product is the token patch. As in nnU-Net's U-Net, the steps next to the voxels leave an axis of long voxels
    alone until the others have become as long. Of isotropic voxels a flat token such as 8x16x16 is isotropic after the
    deepest step.

    Args:
        spacing: of the voxels, in mm.

    Raises:
        ValueError: a side of the token patch is not 1, 2, 4, 8 or 16.
    """
    if any(t not in TOKEN_SIDES for t in token_patch):
        raise ValueError(f"token patch {tuple(token_patch)}: each side must be 1, 2, 4, 8 or 16")
    left, size, steps = [t.bit_length() - 1 for t in token_patch], list(spacing), []
    for to_come in range(LEVELS, 0, -1):
        shortest = min((s for s, n in zip(size, left, strict=True) if n), default=math.inf)
        pairs = zip(size, left, strict=True)
        is_pooled = [n == to_come or (n > 0 and s < POOLED_TOGETHER * shortest) for s, n in pairs]
        h, w, d = (2 if pooled else 1 for pooled in is_pooled)
        steps.append((h, w, d))
        left = [n - pooled for n, pooled in zip(left, is_pooled, strict=True)]
        size = [s * stride for s, stride in zip(size, (h, w, d), strict=True)]
    return steps[::-1]
