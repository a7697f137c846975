"""Classification of a whole body (paper section 2.4, stage 2): dual encoders, layer-wise concatenation, an MLP.

`FratMAEStaging` classifies alone, `FratMAEJoint` is the segmentation network with the same classifier beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.units import MODALITIES
from nnunet_fratmae.networks.strides import LEVELS
from nnunet_fratmae.networks.unetr import FratMAEUNETR, tap_layers
from nnunet_fratmae.networks.vit import LAYER_NORM, dual_encoders, init_transformer, sincos_positions, token_grid

SUMMARIES = 3  # of a layer's tokens, see `summarise`


def summarise(tokens: Sequence[Tensor]) -> Tensor:
    """CLS token, mean and largest of the other tokens of each layer: layers x (B, 1 + N, dim) -> (B, layers, 3 * dim).

    The largest of every feature, because a stage may hang on a single lesion, which a mean over the body dilutes.
    """
    return torch.stack([torch.cat([t[:, 0], t[:, 1:].mean(1), t[:, 1:].amax(1)], dim=-1) for t in tokens], dim=1)


def summarise_pair(
    encoders: nn.ModuleDict, x: Tensor, layers: Sequence[int], positions: Tensor | None = None
) -> Tensor:
    """The encoders' summaries of CT and PET (B, 2, H, W, D) side by side, (B, layers, 3 * len(encoders) * dim)."""
    volumes = {name: x[:, number : number + 1] for number, name in enumerate(MODALITIES)}
    summaries = [summarise(e.layer_tokens(volumes[name], layers, positions)) for name, e in encoders.items()]
    return torch.cat(summaries, dim=-1)


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
        modalities: which of CT and PET it looks at, each with an encoder of its own.
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
        modalities: Sequence[str] = MODALITIES,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if deep_supervision:
            raise UserError("the network of these plans classifies whole bodies; train it with -tr "
                            "FratMAEStagingTrainer")  # fmt: skip
        self.classes = list(classes)
        self.layers = tap_layers(depth)
        self.encoders = dual_encoders(patch_size, token_patch, embed_dim, depth, num_heads, modalities)
        head = StagingHead(LEVELS, SUMMARIES * len(modalities) * embed_dim, embed_dim, len(self.classes), dropout)
        # Stock `nnUNetv2_train -pretrained_weights` skips keys with ".seg_layers." and wants all others in the file
        self.head = nn.ModuleDict({"seg_layers": head})

    def forward(self, x: Tensor) -> Tensor:
        return self.head["seg_layers"](summarise_pair(self.encoders, x, self.layers))


class FratMAEJoint(FratMAEUNETR):
    """FratMAEUNETR whose encoders also carry the classifier of FratMAEStaging; its weights have the same names in both.

    For patches alone it is FratMAEUNETR. For (patches, studies), as in training, it returns [segmentation logits,
    logits (B, len(classes))], so that one forward pass reaches every parameter (DDP). Studies are (B, 2, H, W, D) CT
    and PET in pretraining units.

    Args:
        stages: "patch_size" (H, W, D) voxels of the whole-body patch, "classes" in the order of the logits, "dropout".
        others: of FratMAEUNETR.
    """

    def __init__(self, *args: Any, stages: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        encoder = next(iter(self.encoders.values()))
        self.classes = list(stages["classes"])
        token_patch, dim = encoder.patch_embed.kernel_size, encoder.patch_embed.out_channels
        positions = sincos_positions(token_grid(stages["patch_size"], token_patch), dim)
        self.register_buffer("study_positions", positions, persistent=False)
        head = StagingHead(LEVELS, SUMMARIES * len(self.encoders) * dim, dim, len(self.classes), stages["dropout"])
        self.head = nn.ModuleDict({"seg_layers": head})

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor | list[Tensor]:
        if isinstance(x, Tensor):
            return super().forward(x)
        patches, studies = x
        return [super().forward(patches), self.classify(studies)]

    def classify(self, studies: Tensor) -> Tensor:
        """Logits (B, len(classes)) of studies (B, 2, H, W, D)."""
        summaries = summarise_pair(self.encoders, studies, self.tap_layers, self.study_positions)
        return self.head["seg_layers"](summaries)
