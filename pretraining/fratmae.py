"""FratMAE, the method of stage 1 from top to bottom (paper section 2.1).

One modality S of a PET/CT patch is masked at 50 % of its tokens, the other one is whole (equation 1). Each has its own
encoder; the encoder of S sees only the tokens that are left. The decoder of S puts mask tokens into the gaps and
reconstructs them with cross-attention: S is the query, the whole modality is key and value (equation 2). The loss is
the mean squared error on the voxels of the masked tokens (equation 3).

Axes: volumes (B, 1, H, W, D) with H anterior-posterior; tokens (B, N, .) in row-major order of the (H, W, D) grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nnunet_fratmae.networks.vit import LAYER_NORM, ViTEncoder, init_transformer, sincos_positions, token_grid
from plans.units import MODALITIES


def partner(modality: str) -> str:
    """The other modality of a PET/CT pair."""
    return "PET" if modality == "CT" else "CT"


# ---------------------------------------------------------------------------------------------------------- masking


def random_masking(batch: int, tokens: int, ratio: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens to keep (B, n) and tokens to mask (B, N - n) of each sample, as ascending indices.

    Exactly `round(ratio * N)` tokens of every sample are masked, uniformly at random; drawn on the CPU, so that a seed
    gives the same masks on every device.
    """
    order = torch.rand(batch, tokens, generator=generator).argsort(dim=1)
    masked = round(ratio * tokens)
    return order[:, masked:].sort(dim=1).values, order[:, :masked].sort(dim=1).values


def patchify(volume: Tensor, token_patch: Sequence[int]) -> Tensor:
    """Voxels of each token, (B, 1, H, W, D) -> (B, N, h*w*d of the token patch), in the encoder's token order."""
    b, _, *shape = volume.shape
    h, w, d = token_grid(shape, token_patch)
    p, q, r = token_patch
    return volume.reshape(b, h, p, w, q, d, r).permute(0, 1, 3, 5, 2, 4, 6).reshape(b, h * w * d, p * q * r)


def unpatchify(tokens: Tensor, grid: Sequence[int], token_patch: Sequence[int]) -> Tensor:
    """The inverse of `patchify`, (B, N, voxels) -> (B, 1, H, W, D)."""
    (h, w, d), (p, q, r) = grid, token_patch
    return tokens.reshape(-1, h, w, d, p, q, r).permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, 1, h * p, w * q, d * r)


# ---------------------------------------------------------------------------------------------------------- decoder


class CrossAttention(nn.Module):
    """Multi-head attention of `query` (B, N, dim) to `context` (B, M, dim)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_query = nn.Linear(dim, dim)
        self.to_key_value = nn.Linear(dim, 2 * dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        q = self.to_query(query).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, dim / heads)
        k, v = self.to_key_value(context).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.project(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossDecoderBlock(nn.Module):
    """Self-attention over the masked modality (optional), cross-attention to its partner, MLP; pre-norm residuals."""

    def __init__(self, dim: int, num_heads: int, self_attention: bool) -> None:
        super().__init__()
        self.self_attention = None
        if self_attention:
            self.self_norm = LAYER_NORM(dim)
            self.self_attention = Attention(dim, num_heads, qkv_bias=True)
        self.query_norm = LAYER_NORM(dim)
        self.cross_attention = CrossAttention(dim, num_heads)
        self.mlp_norm = LAYER_NORM(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        if self.self_attention is not None:
            x = x + self.self_attention(self.self_norm(x))
        x = x + self.cross_attention(self.query_norm(x), context)
        return x + self.mlp(self.mlp_norm(x))


class CrossDecoder(nn.Module):
    """D_S of equation 2: from the tokens that are left of S and all tokens of its partner to the voxels of S."""

    def __init__(
        self,
        grid: Sequence[int],
        token_patch: Sequence[int],
        encoder_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        block: str = "cross_self",
    ) -> None:
        super().__init__()
        self.embed_visible = nn.Linear(encoder_dim, dim)
        self.embed_partner = nn.Linear(encoder_dim, dim)
        self.partner_norm = LAYER_NORM(dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = nn.functional.pad(sincos_positions(grid, dim), (0, 0, 1, 0))  # the CLS token has none
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(CrossDecoderBlock(dim, num_heads, block == "cross_self") for _ in range(depth))
        self.norm = LAYER_NORM(dim)
        self.to_voxels = nn.Linear(dim, math.prod(token_patch))
        self.apply(init_transformer)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, visible: Tensor, keep: Tensor, whole: Tensor) -> Tensor:
        """Voxels (B, N, voxels) of all tokens of S.

        Args:
            visible: encoder output of S, (B, 1 + n, encoder_dim), CLS first, then the tokens `keep` (B, n).
            whole: encoder output of the partner, (B, 1 + N, encoder_dim).
        """
        x = self.embed_visible(visible)
        filled = self.mask_token.to(x.dtype).repeat(len(x), len(self.positions) - 1, 1)
        filled = filled.scatter(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x[:, 1:])
        x = torch.cat([x[:, :1], filled], dim=1) + self.positions
        context = self.partner_norm(self.embed_partner(whole) + self.positions)
        for block in self.blocks:
            x = block(x, context)
        return self.to_voxels(self.norm(x[:, 1:]))


# ----------------------------------------------------------------------------------------------------------- FratMAE


class FratMAE(nn.Module):
    """Two encoders and two cross-attention decoders.

    Args:
        patch_size, token_patch: (H, W, D) voxels.
        encoder: keyword arguments of `ViTEncoder` (embed_dim, depth, num_heads).
        decoder: keyword arguments of `CrossDecoder` (dim, depth, num_heads, block).
    """

    def __init__(
        self, patch_size: Sequence[int], token_patch: Sequence[int], encoder: dict[str, int], decoder: dict
    ) -> None:
        super().__init__()
        self.token_patch = tuple(token_patch)
        self.grid = token_grid(patch_size, token_patch)
        self.encoders = nn.ModuleDict({m: ViTEncoder(patch_size, token_patch, **encoder) for m in MODALITIES})
        self.decoders = nn.ModuleDict(
            {m: CrossDecoder(self.grid, token_patch, encoder["embed_dim"], **decoder) for m in MODALITIES}
        )

    def forward(self, image: Tensor, masked_modality: str, keep: Tensor) -> Tensor:
        """Predicted voxels (B, N, voxels) of the masked modality.

        Args:
            image: (B, 2, H, W, D), CT and PET in pretraining units.
            keep: (B, n) tokens of the masked modality that its encoder sees.
        """
        volumes = dict(zip(MODALITIES, image.split(1, dim=1), strict=True))
        visible = self.encoders[masked_modality](volumes[masked_modality], keep)
        whole = self.encoders[partner(masked_modality)](volumes[partner(masked_modality)])
        return self.decoders[masked_modality](visible, keep, whole)


def reconstruction_loss(prediction: Tensor, volume: Tensor, masked: Tensor, token_patch: Sequence[int]) -> Tensor:
    """Mean squared error on exactly the voxels of the masked tokens (equation 3).

    Args:
        prediction: (B, N, voxels) of all tokens.
        volume: (B, 1, H, W, D) truth.
        masked: (B, m) indices of the masked tokens.
    """
    index = masked.unsqueeze(-1).expand(-1, -1, prediction.shape[-1])
    truth = patchify(volume, token_patch).gather(1, index)
    return (prediction.gather(1, index).float() - truth.float()).square().mean()
