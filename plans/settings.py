"""All of FratMAE's settings: dataclasses validated when built, stored in plans.json as the block "fratmae"."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.units import MODALITIES
from nnunet_fratmae.networks.strides import TOKEN_SIDES
from plans.fields import bounded, build, check_fields, require, shown, shown_name

STACKS = {"coronal": 0, "axial": 2}
"""The axis of (H, W, D) along which the slices of a patch are stacked."""


def stack_steps(stack: str, k: int) -> tuple[int, int, int]:
    """Of a whole-body patch the step along (H, W, D): k along the axis of its stack, 1 along the others."""
    h, w, d = (k if axis == STACKS[stack] else 1 for axis in range(3))
    return h, w, d


METHODS = ("fratmae", "fratmae_notext", "mae", "mae_text")
"""Arms of the paper's table 3: cross-modal or each modality alone, with ContextAlign or without."""
USED = ("both", *MODALITIES)
"""What fine-tuning can see."""

# Far beyond what anybody trains, near enough that a slip of the keyboard does not fill the memory or run for years
MOST_SIDE = 4096  # voxels
MOST_VOXELS = 2**28  # of a grid or a patch; a total body of 400 x 400 x 1000 has 1.6e8
MOST_TOKENS = 2**17  # of a patch; the paper's has 480
MOST_BATCH_VOXELS = 2**31  # of all patches of a pass
MOST_BATCH = 65536  # patches of a step, of which passes can be accumulated
MOST_EPOCHS = 100_000
MOST_STEPS = 1_000_000
MOST_WORKERS = 256
MOST_SEED = 2**32 - 1  # numpy's


@dataclass(frozen=True)
class Preset:
    """Sizes of a network; `unetr_features` are the segmentation decoder's channels at full resolution."""

    embed_dim: int
    depth: int
    num_heads: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    unetr_features: int

    @property
    def encoder(self) -> dict[str, int]:
        """Keyword arguments of an encoder besides patch size and token patch."""
        return {"embed_dim": self.embed_dim, "depth": self.depth, "num_heads": self.num_heads}


PRESETS = {
    "vit_l": Preset(1024, 24, 16, decoder_dim=512, decoder_depth=8, decoder_heads=16, unetr_features=32),
    "vit_b": Preset(768, 12, 12, decoder_dim=512, decoder_depth=8, decoder_heads=16, unetr_features=32),
    "vit_s": Preset(384, 12, 6, decoder_dim=256, decoder_depth=4, decoder_heads=8, unetr_features=16),
    "vit_tiny": Preset(192, 12, 3, decoder_dim=128, decoder_depth=2, decoder_heads=4, unetr_features=16),
    "vit_nano": Preset(96, 4, 3, decoder_dim=96, decoder_depth=2, decoder_heads=4, unetr_features=8),  # for CPUs
}


def check_voxels(name: str, size: Sequence[int] | None) -> None:
    """Raises UserError where a grid or patch has more voxels than anybody's."""
    most = f"more than {MOST_VOXELS:.2g} voxels"
    require(size is None or math.prod(size) <= MOST_VOXELS, f"{name} {shown(size)} has {most}; take a smaller one")


def check_tokens(name: str, patch: Sequence[int], token: Sequence[int]) -> None:
    """Raises UserError where a patch is not of whole tokens, of one alone, or of more than any network takes."""
    fits = all(p >= t and p % t == 0 for p, t in zip(patch, token, strict=True))
    require(fits, f"{name} {shown(patch)} is no multiple of token_patch {shown(token)}")
    require(tuple(patch) != tuple(token), f"{name} {shown(patch)} is a single token; it must hold two or more")
    tokens = math.prod(patch) // math.prod(token)
    require(tokens <= MOST_TOKENS, f"{name} {shown(patch)} has {tokens} tokens of {shown(token)}, more than "
            f"{MOST_TOKENS}; take a smaller patch or larger tokens")  # fmt: skip


def check_batch(name: str, batch: int, patch: Sequence[int]) -> None:
    """Raises UserError where the patches of a step have more voxels together than any GPU holds."""
    require(batch * math.prod(patch) <= MOST_BATCH_VOXELS, f"{name} {batch} of patches {shown(patch)} has more than "
            f"{MOST_BATCH_VOXELS:.2g} voxels; take a smaller one")  # fmt: skip


@dataclass(frozen=True)
class WholeBody:
    """The whole-body grid that pretraining reads (paper section 2.2)."""

    grid: tuple[int, int, int] | None = bounded(None, least=1, most=MOST_SIDE)
    """Voxels (H, W, D) to which a whole study is resized; null: chosen for the data, at most 160 160 192."""
    patch: tuple[int, int, int] | None = bounded(None, least=1, most=MOST_SIDE)
    """Voxels (H, W, D) of a training patch, coronal slices along H; null: chosen, at most 32 160 192."""
    k: int | None = bounded(None, least=1, most=64)
    """A patch takes every k-th of k * n neighbouring slices of the stack; null: chosen, 2 as in the paper."""
    stack: str = bounded("coronal", among=tuple(STACKS))
    """Which slices a patch is a stack of: coronal (along H), or axial (along D) for the comparison of table 2."""

    def __post_init__(self) -> None:
        check_fields(self, "fratmae.wholebody.")
        if None not in (self.grid, self.patch, self.k):
            steps = stack_steps(self.stack, self.k)
            fits = all(p * s <= g for p, s, g in zip(self.patch, steps, self.grid, strict=True))
            require(fits, f"fratmae.wholebody.patch {self.patch} with k={self.k} does not fit in "
                    f"wholebody.grid {self.grid}")  # fmt: skip
        for name in ("grid", "patch"):
            check_voxels(f"fratmae.wholebody.{name}", getattr(self, name))


@dataclass(frozen=True)
class Pretrain:
    """Stage 1 (paper sections 2.1, 2.2 and 2.4)."""

    method: str = bounded("fratmae", among=METHODS)
    """fratmae; fratmae_notext: without ContextAlign; mae: each modality masked and reconstructed alone; mae_text."""
    epochs: int = bounded(30, least=1, most=MOST_EPOCHS)
    """Passes over the training cases."""
    patches_per_case: int | None = bounded(None, least=1, most=MOST_STEPS)
    """Patches that an epoch draws from each case; null: 1 as in the paper, more where cases are so few that an epoch
    would have less than 50 steps (the paper's has 54)."""
    batch_size: int = bounded(24, least=1, most=MOST_BATCH)
    """Patches of an optimiser step, over all GPUs and accumulated passes."""
    micro_batch_size: int | None = bounded(None, least=1, most=MOST_BATCH)
    """Patches of one pass on one GPU; null: batch_size divided by the GPUs. Smaller saves memory; the contrastive loss
    then has fewer negatives, those of one pass on all GPUs."""
    learning_rate: float = bounded(1e-4, above=0, most=1)
    """Highest learning rate of AdamW, followed by a cosine to zero."""
    weight_decay: float = bounded(0.05, least=0, most=10)
    """Of AdamW; biases, norms and the CLS token have none."""
    warmup_epochs: float = bounded(1.0, least=0, most=MOST_EPOCHS)
    """Linear rise of the learning rate over so many epochs."""
    clip: float = bounded(1.0, above=0, most=1e6)
    """Longest gradient (norm over all weights) of a step."""
    mask_ratio: float = bounded(0.5, above=0, below=1)
    """Share of the masked modality's tokens that is masked."""
    decoder_block: str = bounded("cross_self", among=("cross_self", "cross"))
    """cross_self: self-attention, cross-attention, MLP; cross: without the self-attention."""
    text_tower: str = "ViT-B-32-quickgelu"
    """Of ContextAlign: a model name of open_clip, a local folder of open_clip or of a Hugging Face text model."""
    text_weights: str | None = "openai"
    """Weights of a named text tower: a tag of open_clip or a local file; null: a folder has its own."""
    text_frozen: bool = True
    """Whether the text tower is left as it is (its embeddings are computed once) or trained along."""
    text_weight: float = bounded(1.0, least=0, most=1000)
    """Weight of the contrastive loss beside the reconstruction."""
    temperature: float = bounded(0.07, least=0.01, most=1)
    """At the start of the contrastive loss; learned, at least 0.01."""
    mirror: bool = True
    """Mirror half of the patches left-right."""
    pet_scale: float = bounded(0.1, least=0, most=2)
    """Spread (log-normal) of a factor on the whole PET: calibration and uptake time differ by so much."""
    ct_shift: float = bounded(10.0, least=0, most=1000)
    """Spread (normal, HU) of an offset on the whole CT above air: scanners and tube voltages differ by so much."""
    dataset_weights: tuple[float, ...] | None = bounded(None, least=0, most=1e6)
    """How often cases of each dataset of -d are drawn, relative to each other; null: every case alike."""
    store: str = bounded("disk", among=("disk", "memory"))
    """disk: patches are read as they are needed; memory: all studies are held in the memory of the device."""
    shuffle_partner: bool = False
    """A control experiment: CT and PET of a pair come from different patients of a pass."""
    held_out: float = bounded(0.1, least=0, below=1)
    """Share of the cases kept aside, with fixed masks, for the curve and the picture."""
    picture_every: int = bounded(5, least=1, most=MOST_EPOCHS)
    """Epochs between pictures; the last epoch always has one."""
    keep_every: int | None = bounded(None, least=1, most=MOST_EPOCHS)
    """Epochs between checkpoints that are kept beside the latest and the best; null: none."""
    workers: int = bounded(2, least=0, most=MOST_WORKERS)
    """Processes that load patches."""
    seed: int = bounded(0, least=0, most=MOST_SEED)
    """Of the weights, the patches, the masks and the held-out cases."""

    def __post_init__(self) -> None:
        check_fields(self, "fratmae.pretrain.")
        weights = self.dataset_weights
        require(weights is None or sum(weights) > 0, "fratmae.pretrain.dataset_weights: one of them must be above 0")

    @property
    def is_cross_modal(self) -> bool:
        return self.method.startswith("fratmae")

    @property
    def has_text(self) -> bool:
        return self.method in ("fratmae", "mae_text")


@dataclass(frozen=True)
class Finetune:
    """Stage 2, lesion segmentation (paper section 2.4)."""

    patch: tuple[int, int, int] | None = bounded(None, least=1, most=MOST_SIDE)
    """Voxels (H, W, D) of a training patch at native spacing; null: chosen, at most 32 160 192.
    Once planned, patch_size and batch_size of the configuration count, as everywhere in nnU-Net."""
    batch_size: int | None = bounded(None, least=1, most=MOST_BATCH)
    """Patches of a step; null: chosen, at most 16 as in the paper."""
    gpu_memory_target: float = bounded(8.0, above=0, most=1e6)
    """Memory (GB) of a GPU that patch and batch size are chosen for; several share the batch, so each needs less."""
    epochs: int = bounded(200, least=1, most=MOST_EPOCHS)
    """As nnU-Net counts them, `iterations` steps each."""
    iterations: int = bounded(250, least=1, most=MOST_STEPS)
    """Training steps an epoch."""
    val_iterations: int = bounded(50, least=1, most=MOST_STEPS)
    """Validation steps an epoch."""
    foreground: float = bounded(0.33, least=0, most=1)
    """Share of the training patches that are drawn around a lesion; nnU-Net's default."""
    learning_rate: float = bounded(1e-4, above=0, most=1)
    """Of AdamW, cosine to zero."""
    weight_decay: float = bounded(0.01, least=0, most=10)
    """Of AdamW; biases, norms and the CLS tokens have none."""
    from_scratch: bool = False
    """Train without pretrained encoders, whatever fratmae.pretrained and FRATMAE_PRETRAINED say."""
    freeze: bool = False
    """Leave the encoders as they are and train the decoder alone."""
    encoder_warmup_epochs: int = bounded(0, least=0, most=MOST_EPOCHS)
    """Epochs over which the encoders' learning rate rises linearly; it is 0 in the first of them."""
    layer_decay: float = bounded(1.0, above=0, most=1)
    """Learning rate of an encoder layer relative to the layer above it (MAE fine-tunes with 0.65 to 0.75); 1: alike."""
    pet_scale: float = bounded(0.1, least=0, most=2)
    """Spread (log-normal) of a factor on the whole PET of a patch, as in pretraining."""
    ct_shift: float = bounded(10.0, least=0, most=1000)
    """Spread (normal, HU) of an offset on the whole CT of a patch above air, as in pretraining."""
    misalignment: float = bounded(0.0, least=0, most=500)
    """Largest shift in mm, along each axis, of the CT against PET and labels in a fifth of the patches; 0: none."""
    modality_dropout: float = bounded(0.0, least=0, below=1)
    """Share of the training patches in which the CT or the PET (never both) is air without uptake everywhere, so that
    the model can also predict where one of them is missing (fratmae_fill_missing)."""
    stage_weight: float = bounded(0.0, least=0, most=1000)
    """Weight of the classification of whole bodies (of clinical.csv, by the same encoders) beside the segmentation; 0:
    none. Its target, batch_size, dropout, class_weights, workers and seed are those of `staging`."""
    mirror_axes: str = "W"
    """Axes mirrored in training and in prediction: letters of H (front-back), W (left-right), D (head-feet)."""

    def __post_init__(self) -> None:
        check_fields(self, "fratmae.finetune.")
        require(self.encoder_warmup_epochs <= self.epochs, "fratmae.finetune.encoder_warmup_epochs must be at most "
                f"fratmae.finetune.epochs, which is {self.epochs}")  # fmt: skip
        require(sorted(self.mirror_axes) == sorted(set(self.mirror_axes) & set("HWD")), "fratmae.finetune.mirror_axes "
                f"must be letters of H, W and D, such as W or HW, or empty, not {shown(self.mirror_axes)}")  # fmt: skip
        check_voxels("fratmae.finetune.patch", self.patch)
        for name in ("from_scratch", "encoder_warmup_epochs"):
            both = self.freeze and getattr(self, name)
            require(not both, f"fratmae.finetune.freeze and finetune.{name} exclude each other")


@dataclass(frozen=True)
class Staging:
    """Stage 2, classification of whole bodies (paper section 2.4); training patches vary as pretrain.mirror, pet_scale
    and ct_shift say."""

    target: str = "risk"
    """What is learned from clinical.csv. risk: early (I, II, early) against advanced (III, IV, advanced); stage: I to
    IV; or the name of a column such as tracer, whose texts are the classes."""
    epochs: int = bounded(500, least=1, most=MOST_EPOCHS)
    """Passes over the training cases."""
    batch_size: int = bounded(2, least=1, most=MOST_BATCH)
    """Studies of a step."""
    learning_rate: float = bounded(5e-5, above=0, most=1)
    """Of AdamW, cosine to zero."""
    weight_decay: float = bounded(0.01, least=0, most=10)
    """Of AdamW; biases, norms and the CLS tokens have none."""
    dropout: float = bounded(0.1, least=0, below=1)
    """Share of the features that the classifier does not see in a step."""
    class_weights: bool = True
    """Weight cases by how rare their class is among the training cases, so that every class weighs the same."""
    patience: int | None = bounded(100, least=1, most=MOST_EPOCHS)
    """Epochs without a lower validation loss after which training ends; the final weights are then those of the lowest.
    null: train all epochs and keep the last weights, so that the validation cases choose nothing."""
    workers: int = bounded(2, least=0, most=MOST_WORKERS)
    """Processes that load studies; nnUNet_n_proc_DA may lower it."""
    seed: int = bounded(0, least=0, most=MOST_SEED)
    """Of the weights, the order of the studies, their augmentation and the dropout."""

    def __post_init__(self) -> None:
        check_fields(self, "fratmae.staging.")
        require(self.target not in ("", "case_id", "age"), "fratmae.staging.target must be risk, stage or a column of "
                "clinical.csv that has classes")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The block "fratmae" of plans.json."""

    preset: str = "vit_b"
    """Size of the networks; vit_b is the paper's."""
    token_patch: tuple[int, int, int] | None = None
    """Voxels (H, W, D) of a token; null: chosen for the data, 8 16 16 for whole bodies."""
    pretrained: str | None = None
    """Folder or encoders.safetensors of a pretraining; null: FRATMAE_PRETRAINED, else from scratch."""
    modalities: str | None = None
    """What fine-tuning sees: both, CT or PET, with the encoder of that modality alone; null: what the dataset has."""
    wholebody: WholeBody = field(default_factory=WholeBody)
    pretrain: Pretrain = field(default_factory=Pretrain)
    finetune: Finetune = field(default_factory=Finetune)
    staging: Staging = field(default_factory=Staging)

    def __post_init__(self) -> None:
        check_fields(self, "fratmae.")
        require(self.preset in PRESETS, f"fratmae.preset (-preset) {shown_name(self.preset)}: unknown; there are "
                f"{', '.join(PRESETS)}")  # fmt: skip
        require(self.modalities is None or self.modalities in USED, "fratmae.modalities must be one of "
                f"{', '.join(USED)}, or null for those of the dataset, not {shown(self.modalities)}")  # fmt: skip
        for name in ("modality_dropout", "misalignment", "stage_weight"):
            alone = self.modalities in MODALITIES and getattr(self.finetune, name)
            require(not alone, f"fratmae.finetune.{name} needs CT and PET, and fratmae.modalities is "
                    f"{self.modalities}; set finetune.{name}=0")  # fmt: skip
        if self.token_patch is not None:
            sides = ", ".join(map(str, TOKEN_SIDES))
            require(all(t in TOKEN_SIDES for t in self.token_patch), "fratmae.token_patch: each side must be one of "
                    f"{sides}, not {shown(self.token_patch)}")  # fmt: skip
        whole, finetune, staging = self.wholebody.patch, self.finetune, self.staging
        for name, patch in (("wholebody.patch", whole), ("finetune.patch", finetune.patch)):
            if patch is not None and self.token_patch is not None:
                check_tokens(f"fratmae.{name}", patch, self.token_patch)
        for name, patch, batch in (("finetune.batch_size", finetune.patch, finetune.batch_size),
                                   ("pretrain.micro_batch_size", whole, self.pretrain.micro_batch_size),
                                   ("staging.batch_size", whole, staging.batch_size)):  # fmt: skip
            if patch is not None and batch is not None:
                check_batch(f"fratmae.{name}", batch, patch)

    @property
    def sizes(self) -> Preset:
        return PRESETS[self.preset]

    @property
    def used_modalities(self) -> tuple[str, ...]:
        """CT, PET or both, as fine-tuning sees them; both where that is still open."""
        return (self.modalities,) if self.modalities in MODALITIES else MODALITIES

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as it stands in plans.json."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, block: dict[str, Any]) -> Settings:
        """Settings from the block of plans.json; a key that is missing has its default.

        Raises:
            UserError: an unknown key, a value of the wrong type or out of range.
        """
        return build(cls, block, "fratmae.")


def add_arguments(parser: argparse.ArgumentParser, preset: str | None) -> None:
    """-preset and --set, the same for every command that takes settings; `preset` None: as planned."""
    sizes = f"size of the networks: {', '.join(PRESETS)} (default: {preset or 'as planned'})"
    parser.add_argument("-preset", default=preset, help=sizes)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="any setting of plans.json's block fratmae, e.g. pretrain.epochs=100 finetune.patch=[32,96,128]",
    )  # fmt: skip


def override(settings: Settings, assignments: list[str]) -> Settings:
    """Settings with `dotted.key=value` assignments (the commands' --set) applied; values are read as JSON.

    Raises:
        UserError: an unknown key or a value that does not fit.
    """
    block = settings.to_json()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        require(bool(equals), f"--set {assignment}: write it as key=value")
        *path, last = key.split(".")
        target: Any = block
        for name in path:
            target = target.get(name) if isinstance(target, dict) else None
        known = isinstance(target, dict) and last in target and not isinstance(target[last], dict)
        if not known:
            leaves = _leaves(settings.to_json())
            similar = get_close_matches(key, leaves, n=3, cutoff=0.8)
            raise UserError(f"--set {key}: unknown key; " + (f"did you mean {' or '.join(similar)}?" if similar else
                            f"there are {', '.join(leaves)}"))  # fmt: skip
        try:
            target[last] = json.loads(text)
        except json.JSONDecodeError:
            target[last] = text
    return Settings.from_json(block)


def _leaves(block: dict[str, Any], prefix: str = "") -> list[str]:
    leaves: list[str] = []
    for name, value in block.items():
        leaves += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return leaves
