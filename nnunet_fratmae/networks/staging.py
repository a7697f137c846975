"""Classification of a whole body (paper section 2.4, stage 2): dual encoders, layer-wise concatenation, an MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_fratmae.networks.unetr import LEVELS, tap_layers
from nnunet_fratmae.networks.vit import LAYER_NORM, dual_encoders, init_transformer


def summarise(tokens: Sequence[Tensor]) -> Tensor:
    """CLS token beside the mean of the other tokens of each layer: layers x (B, 1 + N, dim) -> (B, layers, 2 * dim)."""
    return torch.stack([torch.cat([t[:, 0], t[:, 1:].mean(1)], dim=-1) for t in tokens], dim=1)


class StagingHead(nn.Module):
    """Logits (B, num_classes) from the summaries (B, layers, features) of several layers.

    Each layer is normalised on its own, since the outputs of a transformer's blocks grow from layer to layer.
    """

    def __init__(self, layers: int, features: int, hidden: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LAYER_NORM(features) for _ in range(layers))
        self.mlp = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(layers * features, hidden), nn.GELU(),
            nn.Dropout(dropout), nn.Linear(hidden, num_classes),
        )  # fmt: skip
        self.apply(init_transformer)
        nn.init.normal_(self.mlp[-1].weight, std=0.01)  # the first guess is that all classes are alike

    def forward(self, summaries: Tensor) -> Tensor:
        layers = [norm(layer) for norm, layer in zip(self.norms, summaries.unbind(1), strict=True)]
        return self.mlp(torch.cat(layers, dim=-1))


class FratMAEStaging(nn.Module):
    """The classification network that plans.json names; stock `get_network_from_plans` builds it from plain JSON.

    Input (B, 2, *patch) CT and PET in pretraining units with the axes (H, W, D), output logits (B, len(classes)).

    Args:
        input_channels, num_classes: nnU-Net's, of the images and of their segmentation; they mean nothing here.
        patch_size, token_patch: (H, W, D) voxels.
        embed_dim, depth, num_heads: of each encoder.
        classes: names, in the order of the logits.
        dropout: of the classifier.
        deep_supervision: nnU-Net passes it; must be off.
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
        classes: Sequence[str],
        dropout: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if deep_supervision:
            raise ValueError("staging has no deep supervision; train it with FratMAEStagingTrainer")
        self.classes = list(classes)
        self.layers = tap_layers(depth)
        self.encoders = dual_encoders(patch_size, token_patch, embed_dim, depth, num_heads)
        head = StagingHead(LEVELS, 4 * embed_dim, embed_dim, len(self.classes), dropout)
        # Stock `nnUNetv2_train -pretrained_weights` skips keys with ".seg_layers." and wants all others in the file
        self.head = nn.ModuleDict({"seg_layers": head})

    def forward(self, x: Tensor) -> Tensor:
        ct = summarise(self.encoders["CT"].layer_tokens(x[:, :1], self.layers))
        pet = summarise(self.encoders["PET"].layer_tokens(x[:, 1:], self.layers))
        return self.head["seg_layers"](torch.cat([ct, pet], dim=-1))
