"""FratMAE, the method of stage 1 from top to bottom (paper section 2.1).

One modality S of a PET/CT patch is masked at 50 % of its tokens, the other one is whole (equation 1). Each has its own
encoder; the encoder of S sees only the tokens that are left. The decoder of S puts mask tokens into the gaps and
reconstructs them with cross-attention: S is the query, the whole modality is key and value (equation 2). The loss is
the mean squared error on the voxels of the masked tokens (equation 3), and ContextAlign's InfoNCE between the CLS token
of PET and the metadata as text (equation 4, `pretraining/context_align.py`).

The arms of table 3 are the same network: without ContextAlign, or (MAE) with both modalities masked and reconstructed,
each alone, by decoders without cross-attention.

Axes: volumes (B, 1, H, W, D) with H anterior-posterior; tokens (B, N, .) in row-major order of the (H, W, D) grid.
A block of the mask (pretraining/method.py) is a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nnunet_fratmae.base.command import UserError
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
from plans.contract import Contract
from plans.settings import Settings
from pretraining.data import Case
from pretraining.method import Method, generator_of, number_of

if TYPE_CHECKING:  # open_clip takes seconds to import, and two of the four arms do without it
    from pretraining.context_align import ContextAlign
    from pretraining.evaluation import HeldOut, Share
    from pretraining.text import TextTower


def partner(modality: str) -> str:
    """The other modality of a PET/CT pair."""
    return "PET" if modality == "CT" else "CT"


# ---------------------------------------------------------------------------------------------------------- masking


def random_masking(batch: int, tokens: int, ratio: float, generator: torch.Generator) -> Tensor:
    """(B, N), true for the tokens to mask: exactly `round(ratio * N)` of every sample, uniformly at random."""
    order = torch.rand(batch, tokens, generator=generator).argsort(dim=1)
    masked = round(ratio * tokens)
    return torch.zeros(batch, tokens, dtype=torch.bool).scatter_(1, order[:, :masked], True)


def token_indices(mask: Tensor, masked: int) -> tuple[Tensor, Tensor]:
    """Tokens to keep (B, N - m) and tokens to mask (B, m) of a mask (B, N) that hides `masked` = m of every sample, as
    ascending indices."""
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, : mask.shape[1] - masked], order[:, mask.shape[1] - masked :]


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


# --------------------------------------------------------------------------------------------------------- the method


class FratMAEMethod(Method):
    """What stage 1 minimises: equation 3 of each masked modality, and equation 4 where there is text.

    Args:
        mask_ratio: share of a modality's tokens that is masked.
        is_cross_modal: one modality is masked a step, for the whole batch (paper section 2.1); else both, each alone.
        align, tower, embeddings, text_weight: ContextAlign, the text tower if it is trained along, the embedding
            (dim,) of every prompt if it is not, and the weight of equation 4; without text None, None, {}, 0.
    """

    def __init__(
        self,
        fratmae: FratMAE,
        mask_ratio: float,
        is_cross_modal: bool,
        align: ContextAlign | None = None,
        tower: TextTower | None = None,
        embeddings: Mapping[str, Tensor] | None = None,
        text_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.fratmae, self.context_align, self.text_tower = fratmae, align, tower
        self.embeddings, self.text_weight, self.is_cross_modal = dict(embeddings or {}), text_weight, is_cross_modal
        self.block, self.parts = fratmae.token_patch, MODALITIES if align is None else (*MODALITIES, "text")
        self.mask_ratio, self.masked = mask_ratio, round(mask_ratio * math.prod(fratmae.grid))
        self.tower_name: str | None = None
        self.numbers: dict[str, int] = {}  # of the prompts

    @classmethod
    def build(cls, settings: Settings, cases: list[Case], fabric: Fabric) -> FratMAEMethod:
        options = settings.pretrain
        tower, align, embeddings = None, None, {}
        if options.has_text:
            from pretraining.context_align import prepare_text

            tower, align, embeddings = prepare_text(settings, cases, fabric)
        method = cls(
            build_network(settings), options.mask_ratio, options.is_cross_modal, align,
            None if options.text_frozen else tower, embeddings, options.text_weight,
        )  # fmt: skip
        method.tower_name = None if tower is None else tower.name
        prompts = sorted({case.prompt for case in cases if case.prompt})
        method.numbers = {prompt: number for number, prompt in enumerate(prompts)}
        return method

    @staticmethod
    def rests(settings: Settings) -> bool:
        return settings.pretrain.is_cross_modal  # the decoder of the modality that is whole

    def draw(self, batch: int, key: tuple[int, ...]) -> Tensor:
        generator = generator_of(key)
        drawn = int(torch.randint(2, (1,), generator=generator))
        return self._mask(batch, (drawn,) if self.is_cross_modal else (0, 1), generator)

    def fixed_masks(self, count: int) -> dict[str, Tensor]:
        return {modality: self._mask(count, (number,), torch.Generator().manual_seed(number))
                for number, modality in enumerate(MODALITIES)}  # fmt: skip

    def _mask(self, batch: int, modalities: Sequence[int], generator: torch.Generator) -> Tensor:
        mask = torch.zeros(batch, len(MODALITIES), *self.fratmae.grid, dtype=torch.bool)
        for number in modalities:
            tokens = random_masking(batch, math.prod(self.fratmae.grid), self.mask_ratio, generator)
            mask[:, number] = tokens.unflatten(1, self.fratmae.grid)
        return mask

    def tokens(self, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each modality that the mask hides the tokens to keep and to mask, (B, n) and (B, m) indices."""
        hidden = mask[0].flatten(1).any(1).tolist()
        return {modality: token_indices(mask[:, number].flatten(1), self.masked)
                for number, modality in enumerate(MODALITIES) if hidden[number]}  # fmt: skip

    def forward(self, image: Tensor, mask: Tensor, prompts: Sequence[str | None]) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = self.tokens(mask)
        predictions, pet_cls = self.fratmae(image, {modality: keep for modality, (keep, _) in tokens.items()})
        losses = {
            modality: reconstruction_loss(prediction, image[:, number_of(modality)][:, None],
                                          tokens[modality][1], self.fratmae.token_patch)
            for modality, prediction in predictions.items()
        }  # fmt: skip
        total = torch.stack(list(losses.values())).mean()
        if self.context_align is not None:
            losses["text"] = self.context_align(pet_cls, *self._text(prompts, image.device))
            total = total + self.text_weight * losses["text"]
        return total, losses

    def _text(self, prompts: Sequence[str | None], device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings (B, dim) of prompts, and their numbers (B,), -1 for a case without metadata."""
        ids = torch.tensor([self.numbers[p] if p else -1 for p in prompts], device=device)
        if self.text_tower is not None:
            return self.text_tower.encode([p or "" for p in prompts]), ids
        nothing = torch.zeros_like(next(iter(self.embeddings.values())))
        return torch.stack([self.embeddings[p] if p else nothing for p in prompts]).to(device), ids

    def predict(self, image: Tensor, mask: Tensor) -> Tensor:
        keep = {modality: tokens[0] for modality, tokens in self.tokens(mask).items()}
        volumes = image.clone()
        for modality, prediction in self.fratmae(image, keep)[0].items():
            volume = unpatchify(prediction.to(image), self.fratmae.grid, self.fratmae.token_patch)
            volumes[:, number_of(modality)] = volume[:, 0]
        return volumes

    def attention(self, image: Tensor, mask: Tensor) -> dict[str, Any] | None:
        """Cross-attention of the hottest masked PET token to the tokens of the CT, mean of all blocks and heads."""
        if not self.is_cross_modal:
            return None
        weights: list[Tensor] = []
        hooks = [
            block.cross_attention.register_forward_pre_hook(lambda m, args: weights.append(m.weights(*args).mean(1)))
            for block in self.fratmae.decoders["PET"].blocks
        ]
        _, masked = self.tokens(mask)["PET"]
        self.predict(image, mask)
        for hook in hooks:
            hook.remove()
        mean = torch.stack(weights).mean(0)[0].float().cpu()  # (1 + N, 1 + N), CLS first
        means = nn.functional.avg_pool3d(image[:1, 1], self.block).flatten().cpu()
        masked = masked[0].cpu()
        token = int(masked[means[masked].argmax()])
        index = torch.unravel_index(torch.tensor(token), self.fratmae.grid)
        return {
            "map": mean[1 + token, 1:].reshape(self.fratmae.grid).numpy(),
            "token": tuple(int(i) for i in index),
            "token_patch": self.block,
            "ct": image[0, 0].cpu().numpy(),
        }

    def measures(self) -> dict[str, float | None]:
        return {"temperature": None if self.context_align is None else self.context_align.temperature}

    def judge(self, held_out: HeldOut, share: Share) -> dict[str, float]:
        if self.context_align is None:
            return {}
        from pretraining.context_align import evaluate_retrieval

        embeddings = self.embeddings
        if self.text_tower is not None:
            from pretraining.text import embed_prompts

            embeddings = embed_prompts(self.text_tower, [case.prompt for case in held_out.cases if case.prompt])
        return evaluate_retrieval(self.fratmae.encoders["PET"], self.context_align, held_out, embeddings, share)

    def flops(self) -> float:
        """The matrix products of linear layers, kernels and attention, counted from their shapes, without the text;
        backwards is taken as twice forwards."""
        encoder, decoder = self.fratmae.encoders["CT"], self.fratmae.decoders["CT"]
        tokens, voxels = math.prod(self.fratmae.grid), math.prod(self.block)
        kept, width, narrow = tokens - self.masked, encoder.cls_token.shape[-1], decoder.mask_token.shape[-1]

        def blocks(depth: int, dim: int, n: int, self_attention: int, cross: int) -> float:
            # Per block and token: qkv and projection 4 dim^2, attention 2 n dim, MLP 8 dim^2 multiplications
            return depth * n * ((self_attention + cross) * (4 * dim**2 + 2 * n * dim) + 8 * dim**2)

        embed = sum(blocks(len(encoder.blocks), width, n + 1, 1, 0) + n * voxels * width
                    for n in ((kept, tokens) if self.is_cross_modal else (kept, kept)))  # fmt: skip
        has_self = decoder.blocks[0].self_attention is not None
        decode = blocks(len(decoder.blocks), narrow, tokens + 1, int(has_self), int(self.is_cross_modal))
        decode += tokens * narrow * (voxels + 2 * width)
        return 3 * 2.0 * (embed + decode * (1 if self.is_cross_modal else 2))

    def describe(self) -> str:
        return f"{math.prod(self.fratmae.grid)} tokens of {list(self.block)}, {self.masked} of a modality masked"

    def contract(self, settings: Settings, seen: Mapping[str, Any]) -> Contract:
        return Contract(preset=settings.preset, **settings.sizes.encoder, token_patch=settings.token_patch,
                        text_tower=self.tower_name, **seen)  # fmt: skip

    @staticmethod
    def exported(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        start = "fratmae.encoders."
        encoders = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        text = {n: value for n, value in weights.items() if n.startswith(("context_align.", "text_tower."))}
        return encoders, text


def build_network(settings: Settings) -> FratMAE:
    """The network of the settings, with reproducible initial weights.

    Raises:
        UserError: the share of masked tokens leaves none masked, or none visible.
    """
    tokens = math.prod(token_grid(settings.wholebody.patch, settings.token_patch))
    ratio = settings.pretrain.mask_ratio
    if not 0 < round(ratio * tokens) < tokens:
        raise UserError(f"pretrain.mask_ratio={ratio} masks {round(ratio * tokens)} of the {tokens} tokens of a patch; "
                        "choose one nearer to 0.5")  # fmt: skip
    torch.manual_seed(settings.pretrain.seed)
    sizes = settings.sizes
    decoder = {"dim": sizes.decoder_dim, "depth": sizes.decoder_depth, "num_heads": sizes.decoder_heads}
    decoder["block"] = settings.pretrain.decoder_block if settings.pretrain.is_cross_modal else "self"
    return FratMAE(settings.wholebody.patch, settings.token_patch, sizes.encoder, decoder)
