"""The Vision Transformer encoder of one modality (paper section 2.4: standard ViT, one for CT and one for PET)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from nnunet_fratmae.base.units import MODALITIES

with warnings.catch_warnings():  # of timm about torch 2.15, at the start of every command; no user can do anything
    warnings.simplefilter("ignore", FutureWarning)
    from timm.layers import Mlp as Mlp
    from timm.models.vision_transformer import Attention as Attention
    from timm.models.vision_transformer import Block

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)
SHORTEST_WAVE, LONGEST_WAVE = 2.5, 50.0
"""Tokens; changing them changes the function that pretrained weights are (plans/contract.py, FORMAT)."""


def token_grid(patch_size: Sequence[int], token_patch: Sequence[int]) -> tuple[int, int, int]:
    """Number of tokens along (H, W, D).

    Raises:
        ValueError: an axis of the patch is no multiple of the token patch.
    """
    if any(p < 1 or p % t for p, t in zip(patch_size, token_patch, strict=True)):
        raise ValueError(f"patch size {tuple(patch_size)} is no multiple of the token patch {tuple(token_patch)}")
    h, w, d = (p // t for p, t in zip(patch_size, token_patch, strict=True))
    return h, w, d


def sincos_positions(grid: Sequence[int], dim: int) -> Tensor:
    """Fixed sine-cosine position embedding of a 3D token grid, (h*w*d, dim), tokens in row-major (H, W, D) order.

    Each axis takes a third of the channels, half of them sines and half cosines, as the 2D embedding of the MAE of He
    et al. (paper reference 8) does with two axes, but with waves as long as whole-body grids are (SHORTEST_WAVE to
    LONGEST_WAVE tokens): in waves of 6 to 60,000 tokens, which language models have, neighbouring tokens look alike,
    and cross-attention does not find the place (docs/decisions.md). Channels left over by the thirds stay zero.
    """
    n = dim // 6
    waves = SHORTEST_WAVE * (LONGEST_WAVE / SHORTEST_WAVE) ** (torch.arange(n, dtype=torch.float64) / n)
    axes = torch.meshgrid(*(torch.arange(length, dtype=torch.float64) for length in grid), indexing="ij")
    angles = [2 * math.pi * axis.reshape(-1, 1) / waves for axis in axes]
    positions = torch.cat([function(angle) for angle in angles for function in (torch.sin, torch.cos)], dim=1)
    return nn.functional.pad(positions, (0, dim - 6 * n)).float()


def init_transformer(module: nn.Module) -> None:
    """Initialise the linear layers of a transformer as the MAE of He et al. does (for use with `Module.apply`)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ViTEncoder(nn.Module):
    """Tokens of one modality: (B, 1, H, W, D) -> (B, 1 + N, embed_dim), the CLS token first.

    The position embedding is a buffer that is not saved, so the weights load into an encoder for any patch size.
    """

    def __init__(
        self, patch_size: Sequence[int], token_patch: Sequence[int], embed_dim: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        self.grid = token_grid(patch_size, token_patch)
        self.patch_embed = nn.Conv3d(1, embed_dim, kernel_size=tuple(token_patch), stride=tuple(token_patch))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("positions", sincos_positions(self.grid, embed_dim), persistent=False)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio=4, qkv_bias=True, norm_layer=LAYER_NORM) for _ in range(depth)
        )
        self.norm = LAYER_NORM(embed_dim)
        self.apply(init_transformer)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(embed_dim, -1))  # a linear layer in disguise
        nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, volume: Tensor, keep: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Linear tokens with position, (B, 1, H, W, D) -> (B, 1 + N, dim), or with only the tokens `keep` (B, n).

        `positions` (N, dim) is the embedding of a volume of another size than the encoder's own.

        Raises:
            ValueError: the volume is of another size.
        """
        positions = self.positions if positions is None else positions
        x = self.patch_embed(volume).flatten(2).transpose(1, 2)
        if x.shape[1:] != positions.shape:
            expected = tuple(n * t for n, t in zip(self.grid, self.patch_embed.stride, strict=True))
            raise ValueError(f"volume of {tuple(volume.shape[2:])} voxels: this encoder takes {expected}; load it with "
                             "the patch_size that you have, a multiple of the token patch")  # fmt: skip
        x = x + positions
        if keep is not None:  # masked tokens are dropped before the encoder, as in MAE
            x = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        # Flattened, so that its gradient has the strides that DDP's buckets expect with one patch a process
        return torch.cat([self.cls_token.flatten().expand(len(x), 1, -1), x], dim=1)

    def forward(self, volume: Tensor, keep: Tensor | None = None) -> Tensor:
        """Normalised output of the last block, (B, 1 + N, dim) or (B, 1 + n, dim) where `keep` (B, n) is given."""
        x = self.embed(volume, keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def layer_tokens(
        self, volume: Tensor, layers: Sequence[int], positions: Tensor | None = None
    ) -> list[Tensor]:
        """Outputs of the blocks `layers` (counted from 1), (B, 1 + N, dim) each; the last block's is normalised.

        Raises:
            ValueError: there is no such block.
        """
        if not set(layers) <= set(range(1, len(self.blocks) + 1)):
            raise ValueError(f"layers {list(layers)}: this encoder has the layers 1 to {len(self.blocks)}")
        x, outputs = self.embed(volume, positions=positions), []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number in layers:
                outputs.append(self.norm(x) if number == len(self.blocks) else x)
        return outputs

    def feature_maps(self, volume: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Outputs of the blocks `layers` (counted from 1) as maps (B, dim, h, w, d); the last block's is normalised."""
        return [t[:, 1:].transpose(1, 2).unflatten(2, self.grid) for t in self.layer_tokens(volume, layers)]


def dual_encoders(
    patch_size: Sequence[int],
    token_patch: Sequence[int],
    embed_dim: int,
    depth: int,
    num_heads: int,
    modalities: Sequence[str] = MODALITIES,
) -> nn.ModuleDict:
    """One encoder for CT and one for PET (paper section 2.1), or one of them alone; alike but for their weights."""
    return nn.ModuleDict(
        {name: ViTEncoder(patch_size, token_patch, embed_dim, depth, num_heads) for name in modalities}
    )


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for this parameter: matrices and kernels, not biases, norms, CLS and mask tokens."""
    return parameter.ndim > 1 and not name.endswith("_token")
