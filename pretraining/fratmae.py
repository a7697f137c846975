"""FratMAE, the method of stage 1 from top to bottom (paper section 2.1).

One modality S of a PET/CT patch is masked at 50 % of its tokens, the other one is whole (equation 1). Each has its own
encoder; the encoder of S sees only the tokens that are left. The decoder of S puts mask tokens into the gaps and
reconstructs them with cross-attention: S is the query, the whole modality is key and value (equation 2). The loss is
the mean squared error on the voxels of the masked tokens (equation 3), and ContextAlign's InfoNCE between the CLS token
of PET and the metadata as text (equation 4, `pretraining/context_align.py`).

The arms of table 3 are the same network: without ContextAlign, or (MAE) with both modalities masked and reconstructed,
each alone, by decoders without cross-attention.

Axes: volumes (B, 1, H, W, D) with H anterior-posterior; tokens (B, N, .) in row-major order of the (H, W, D) grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nnunet_fratmae.base.units import MODALITIES
from nnunet_fratmae.networks.vit import (
    LAYER_NORM,
    Attention,
    Mlp,
    dual_encoders,
    init_transformer,
    sincos_positions,
    token_grid,
)

if TYPE_CHECKING:  # open_clip takes seconds to import, and two of the four arms do without it
    from pretraining.context_align import ContextAlign


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

    @torch.no_grad()
    def start_aligned(self) -> None:
        """Begin with equal projections of queries and keys, so that a token first looks about its own place in the
        partner: CT and PET show the same body, and both carry the same position embedding. The projections are doubled,
        or the softmax over hundreds of tokens would be nearly flat (docs/decisions.md)."""
        dim = self.to_query.in_features
        self.to_query.weight *= 2
        self.to_key_value.weight[:dim] = self.to_query.weight

    def weights(self, query: Tensor, context: Tensor) -> Tensor:
        """How much each token of `query` looks at each of `context`, (B, heads, N, M), to look at."""
        q = self.to_query(query).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k = self.to_key_value(context).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)[0]
        return (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        q = self.to_query(query).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, dim / heads)
        k, v = self.to_key_value(context).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.project(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Self-attention over the masked modality, cross-attention to its partner, MLP; pre-norm residuals.

    Args:
        kind: cross_self (all three), cross (no self-attention) or self (no cross-attention: plain MAE).
    """

    def __init__(self, dim: int, num_heads: int, kind: str) -> None:
        super().__init__()
        self.self_attention = self.cross_attention = None
        if kind != "cross":
            self.self_norm = LAYER_NORM(dim)
            self.self_attention = Attention(dim, num_heads, qkv_bias=True)
        if kind != "self":
            self.query_norm = LAYER_NORM(dim)
            self.cross_attention = CrossAttention(dim, num_heads)
        self.mlp_norm = LAYER_NORM(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        if self.self_attention is not None:
            x = x + self.self_attention(self.self_norm(x))
        if self.cross_attention is not None:
            x = x + self.cross_attention(self.query_norm(x), context)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """D_S of equation 2: from the tokens that are left of S and all tokens of its partner to the voxels of S.

    With the block "self" it is the decoder of a plain MAE, which has no partner.
    """

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
        self.is_cross_modal = block != "self"
        if self.is_cross_modal:
            self.embed_partner = nn.Linear(encoder_dim, dim)
            self.partner_norm = LAYER_NORM(dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = nn.functional.pad(sincos_positions(grid, dim), (0, 0, 1, 0))  # the CLS token has none
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(DecoderBlock(dim, num_heads, block) for _ in range(depth))
        self.norm = LAYER_NORM(dim)
        self.to_voxels = nn.Linear(dim, math.prod(token_patch))
        self.apply(init_transformer)
        for block in self.blocks:
            if block.cross_attention is not None:
                block.cross_attention.start_aligned()
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, visible: Tensor, keep: Tensor, whole: Tensor | None) -> Tensor:
        """Voxels (B, N, voxels) of all tokens of S.

        Args:
            visible: encoder output of S, (B, 1 + n, encoder_dim), CLS first, then the tokens `keep` (B, n).
            whole: encoder output of the partner, (B, 1 + N, encoder_dim); None for the block "self".
        """
        x = self.embed_visible(visible)
        filled = self.mask_token.to(x.dtype).repeat(len(x), len(self.positions) - 1, 1)
        filled = filled.scatter(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x[:, 1:])
        x = torch.cat([x[:, :1], filled], dim=1) + self.positions
        context = self.partner_norm(self.embed_partner(whole) + self.positions) if self.is_cross_modal else None
        for block in self.blocks:
            x = block(x, context)
        return self.to_voxels(self.norm(x[:, 1:]))


# ----------------------------------------------------------------------------------------------------------- FratMAE


class FratMAE(nn.Module):
    """Two encoders and two decoders.

    Args:
        patch_size, token_patch: (H, W, D) voxels.
        encoder: keyword arguments of `ViTEncoder` (embed_dim, depth, num_heads).
        decoder: keyword arguments of `Decoder` (dim, depth, num_heads, block).
    """

    def __init__(
        self, patch_size: Sequence[int], token_patch: Sequence[int], encoder: dict[str, int], decoder: dict
    ) -> None:
        super().__init__()
        self.token_patch = tuple(token_patch)
        self.grid = token_grid(patch_size, token_patch)
        self.encoders = dual_encoders(patch_size, token_patch, **encoder)
        self.decoders = nn.ModuleDict(
            {m: Decoder(self.grid, token_patch, encoder["embed_dim"], **decoder) for m in MODALITIES}
        )

    def forward(self, image: Tensor, keep: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Predicted voxels (B, N, voxels) of each masked modality, and the CLS token (B, embed_dim) of PET.

        Args:
            image: (B, 2, H, W, D), CT and PET in pretraining units.
            keep: the modalities that are masked, one (FratMAE) or both (MAE), each with the tokens (B, n) that its
                encoder sees.
        """
        volumes = dict(zip(MODALITIES, image.split(1, dim=1), strict=True))
        encoded = {m: encoder(volumes[m], keep.get(m)) for m, encoder in self.encoders.items()}
        predictions = {m: self.decoders[m](encoded[m], kept, encoded[partner(m)]) for m, kept in keep.items()}
        return predictions, encoded["PET"][:, 0]


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


class Objective(nn.Module):
    """What stage 1 minimises: equation 3 of each masked modality, and equation 4 where there is text."""

    def __init__(
        self, fratmae: FratMAE, context_align: ContextAlign | None, text_tower: nn.Module | None, text_weight: float
    ) -> None:
        super().__init__()
        self.fratmae, self.context_align, self.text_tower = fratmae, context_align, text_tower
        self.text_weight = text_weight

    def forward(
        self,
        image: Tensor,
        keep: Mapping[str, Tensor],
        masked: Mapping[str, Tensor],
        text: Tensor | list[str] | None = None,
        prompt_ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts by name (CT and PET: MSE; text: InfoNCE).

        Args:
            image, keep: as for `FratMAE`; masked: (B, m) indices of the masked tokens of each masked modality.
            text: embeddings (B, dim) of a frozen text tower, or the prompts themselves for one that is trained.
            prompt_ids: (B,) the same number for the same prompt, -1 for a case without metadata.
        """
        predictions, pet_cls = self.fratmae(image, keep)
        losses = {
            m: reconstruction_loss(prediction, image[:, MODALITIES.index(m)][:, None], masked[m],
                                   self.fratmae.token_patch)
            for m, prediction in predictions.items()
        }  # fmt: skip
        total = torch.stack(list(losses.values())).mean()
        if self.context_align is not None:
            embeddings = text if self.text_tower is None else self.text_tower.encode(text)
            losses["text"] = self.context_align(pet_cls, embeddings, prompt_ids)
            total = total + self.text_weight * losses["text"]
        return total, losses
