"""All of FratMAE's settings: dataclasses validated when built, stored in plans.json as the block "fratmae"."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any

from nnunet_fratmae.base.command import UserError
from plans.units import MODALITIES

TOKEN_SIDES = (1, 2, 4, 8, 16)
STACKS = {"coronal": 0, "axial": 2}
"""The axis of (H, W, D) along which the slices of a patch are stacked."""
METHODS = ("fratmae", "fratmae_notext", "mae", "mae_text")
"""Arms of the paper's table 3: cross-modal or each modality alone, with ContextAlign or without."""
USED = ("both", *MODALITIES)
"""What fine-tuning can see."""


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


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class WholeBody:
    """The whole-body grid that pretraining reads (paper section 2.2)."""

    grid: tuple[int, int, int] | None = None
    """Voxels (H, W, D) to which a whole study is resized; null: chosen for the data, at most 160 160 192."""
    patch: tuple[int, int, int] | None = None
    """Voxels (H, W, D) of a training patch, coronal slices along H; null: chosen, at most 32 160 192."""
    k: int | None = None
    """A patch takes every k-th of k * n neighbouring slices of the stack; null: chosen, 2 as in the paper."""
    stack: str = "coronal"
    """Which slices a patch is a stack of: coronal (along H), or axial (along D) for the comparison of table 2."""

    def __post_init__(self) -> None:
        require(self.stack in STACKS, f"wholebody.stack must be one of {', '.join(STACKS)}")
        if None not in (self.grid, self.patch, self.k):
            steps = [self.k if axis == STACKS[self.stack] else 1 for axis in range(3)]
            fits = self.k >= 1 and all(p * s <= g for p, s, g in zip(self.patch, steps, self.grid, strict=True))
            require(fits, f"wholebody.patch {self.patch} with k={self.k} does not fit in wholebody.grid {self.grid}")


@dataclass(frozen=True)
class Pretrain:
    """Stage 1 (paper sections 2.1, 2.2 and 2.4)."""

    method: str = "fratmae"
    """fratmae; fratmae_notext: without ContextAlign; mae: each modality masked and reconstructed alone; mae_text."""
    epochs: int = 30
    """Passes over the training cases."""
    patches_per_case: int | None = None
    """Patches that an epoch draws from each case; null: 1 as in the paper, more where cases are so few that an epoch
    would have less than 50 steps (the paper's has 54)."""
    batch_size: int = 24
    """Patches of an optimiser step, over all GPUs and accumulated passes."""
    micro_batch_size: int | None = None
    """Patches of one pass on one GPU; null: batch_size divided by the GPUs. Smaller saves memory; the contrastive loss
    then has fewer negatives, those of one pass on all GPUs."""
    learning_rate: float = 1e-4
    """Highest learning rate of AdamW, followed by a cosine to zero."""
    weight_decay: float = 0.05
    """Of AdamW; biases, norms and the CLS token have none."""
    warmup_epochs: float = 1.0
    """Linear rise of the learning rate over so many epochs."""
    clip: float = 1.0
    """Longest gradient (norm over all weights) of a step."""
    mask_ratio: float = 0.5
    """Share of the masked modality's tokens that is masked."""
    decoder_block: str = "cross_self"
    """cross_self: self-attention, cross-attention, MLP; cross: without the self-attention."""
    text_tower: str = "ViT-B-32-quickgelu"
    """Of ContextAlign: a model name of open_clip, a local folder of open_clip or of a Hugging Face text model."""
    text_weights: str | None = "openai"
    """Weights of a named text tower: a tag of open_clip or a local file; null: a folder has its own."""
    text_frozen: bool = True
    """Whether the text tower is left as it is (its embeddings are computed once) or trained along."""
    text_weight: float = 1.0
    """Weight of the contrastive loss beside the reconstruction."""
    temperature: float = 0.07
    """At the start of the contrastive loss; learned, at least 0.01."""
    mirror: bool = True
    """Mirror half of the patches left-right."""
    pet_scale: float = 0.1
    """Spread (log-normal) of a factor on the whole PET: calibration and uptake time differ by so much."""
    ct_shift: float = 10.0
    """Spread (normal, HU) of an offset on the whole CT above air: scanners and tube voltages differ by so much."""
    dataset_weights: tuple[float, ...] | None = None
    """How often cases of each dataset of -d are drawn, relative to each other; null: every case alike."""
    store: str = "disk"
    """disk: patches are read as they are needed; memory: all studies are held in the memory of the device."""
    shuffle_partner: bool = False
    """A control experiment: CT and PET of a pair come from different patients of a pass."""
    held_out: float = 0.1
    """Share of the cases kept aside, with fixed masks, for the curve and the picture."""
    picture_every: int = 5
    """Epochs between pictures; the last epoch always has one."""
    keep_every: int | None = None
    """Epochs between checkpoints that are kept beside the latest and the best; null: none."""
    workers: int = 2
    """Processes that load patches."""
    seed: int = 0
    """Of the weights, the patches, the masks and the held-out cases."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "picture_every"):
            require(getattr(self, name) >= 1, f"pretrain.{name} must be at least 1")
        for name in ("patches_per_case", "micro_batch_size", "keep_every"):
            require((getattr(self, name) or 1) >= 1, f"pretrain.{name} must be at least 1")
        for name in ("learning_rate", "clip"):
            require(getattr(self, name) > 0, f"pretrain.{name} must be above 0")
        for name in ("weight_decay", "seed", "warmup_epochs", "workers", "text_weight", "pet_scale", "ct_shift"):
            require(getattr(self, name) >= 0, f"pretrain.{name} must not be negative")
        for name, words in (("method", METHODS), ("decoder_block", ("cross_self", "cross")),
                            ("store", ("disk", "memory"))):  # fmt: skip
            require(getattr(self, name) in words, f"pretrain.{name} must be one of {', '.join(words)}")
        require(0 < self.mask_ratio < 1, "pretrain.mask_ratio must lie between 0 and 1")
        require(0.01 <= self.temperature <= 1, "pretrain.temperature must lie between 0.01 and 1")
        require(0 <= self.held_out < 1, "pretrain.held_out must be at least 0 and below 1")
        weights = self.dataset_weights
        usable = weights is None or (weights and min(weights) >= 0 and sum(weights) > 0)
        require(usable, "pretrain.dataset_weights must not be negative, and one of them above 0")

    @property
    def is_cross_modal(self) -> bool:
        return self.method.startswith("fratmae")

    @property
    def has_text(self) -> bool:
        return self.method in ("fratmae", "mae_text")


@dataclass(frozen=True)
class Finetune:
    """Stage 2, lesion segmentation (paper section 2.4)."""

    patch: tuple[int, int, int] | None = None
    """Voxels (H, W, D) of a training patch at native spacing; null: chosen, at most 32 160 192.
    Once planned, patch_size and batch_size of the configuration count, as everywhere in nnU-Net."""
    batch_size: int | None = None
    """Patches of a step; null: chosen, at most 16 as in the paper."""
    gpu_memory_target: float = 8.0
    """Memory (GB) of a GPU that patch and batch size are chosen for; several share the batch, so each needs less."""
    epochs: int = 200
    """As nnU-Net counts them, `iterations` steps each."""
    iterations: int = 250
    """Training steps an epoch."""
    val_iterations: int = 50
    """Validation steps an epoch."""
    foreground: float = 0.33
    """Share of the training patches that are drawn around a lesion; nnU-Net's default."""
    learning_rate: float = 1e-4
    """Of AdamW, cosine to zero."""
    weight_decay: float = 0.01
    """Of AdamW; biases, norms and the CLS tokens have none."""
    from_scratch: bool = False
    """Train without pretrained encoders, whatever fratmae.pretrained and FRATMAE_PRETRAINED say."""
    freeze: bool = False
    """Leave the encoders as they are and train the decoder alone."""
    encoder_warmup_epochs: int = 0
    """Epochs over which the encoders' learning rate rises linearly; it is 0 in the first of them."""
    layer_decay: float = 1.0
    """Learning rate of an encoder layer relative to the layer above it (MAE fine-tunes with 0.65 to 0.75); 1: alike."""
    pet_scale: float = 0.1
    """Spread (log-normal) of a factor on the whole PET of a patch, as in pretraining."""
    ct_shift: float = 10.0
    """Spread (normal, HU) of an offset on the whole CT of a patch above air, as in pretraining."""
    misalignment: float = 0.0
    """Largest shift in mm, along each axis, of the CT against PET and labels in a fifth of the patches; 0: none."""
    modality_dropout: float = 0.0
    """Share of the training patches in which the CT or the PET (never both) is air without uptake everywhere, so that
    the model can also predict where one of them is missing (fratmae_fill_missing)."""
    stage_weight: float = 0.0
    """Weight of the classification of whole bodies (of clinical.csv, by the same encoders) beside the segmentation; 0:
    none. Its target, batch_size, dropout, class_weights, workers and seed are those of `staging`."""
    mirror_axes: str = "W"
    """Axes mirrored in training and in prediction: letters of H (front-back), W (left-right), D (head-feet)."""

    def __post_init__(self) -> None:
        require(self.batch_size is None or self.batch_size >= 1, "finetune.batch_size must be at least 1")
        require(self.gpu_memory_target > 0, "finetune.gpu_memory_target must be above 0")
        for name in ("pet_scale", "ct_shift", "misalignment", "stage_weight"):
            require(getattr(self, name) >= 0, f"finetune.{name} must not be negative")
        require(0 <= self.encoder_warmup_epochs <= self.epochs, "finetune.encoder_warmup_epochs must lie between 0 and "
                "finetune.epochs")  # fmt: skip
        require(0 <= self.modality_dropout < 1, "finetune.modality_dropout must be at least 0 and below 1")
        require(0 < self.layer_decay <= 1, "finetune.layer_decay must lie above 0 and be at most 1")
        require(sorted(self.mirror_axes) == sorted(set(self.mirror_axes) & set("HWD")), "finetune.mirror_axes must be "
                "letters of H, W and D, such as W or HW, or empty")  # fmt: skip
        for name in ("from_scratch", "encoder_warmup_epochs"):
            both = self.freeze and getattr(self, name)
            require(not both, f"finetune.freeze and finetune.{name} exclude each other")
        for name in ("epochs", "iterations", "val_iterations"):
            require(getattr(self, name) >= 1, f"finetune.{name} must be at least 1")
        require(self.learning_rate > 0, "finetune.learning_rate must be above 0")
        require(self.weight_decay >= 0, "finetune.weight_decay must not be negative")
        require(0 <= self.foreground <= 1, "finetune.foreground must lie between 0 and 1")


@dataclass(frozen=True)
class Staging:
    """Stage 2, classification of whole bodies (paper section 2.4); training patches vary as pretrain.mirror, pet_scale
    and ct_shift say."""

    target: str = "risk"
    """What is learned from clinical.csv. risk: early (I, II, early) against advanced (III, IV, advanced); stage: I to
    IV; or the name of a column such as tracer, whose texts are the classes."""
    epochs: int = 500
    """Passes over the training cases."""
    batch_size: int = 2
    """Studies of a step."""
    learning_rate: float = 5e-5
    """Of AdamW, cosine to zero."""
    weight_decay: float = 0.01
    """Of AdamW; biases, norms and the CLS tokens have none."""
    dropout: float = 0.1
    """Share of the features that the classifier does not see in a step."""
    class_weights: bool = True
    """Weight cases by how rare their class is among the training cases, so that every class weighs the same."""
    patience: int | None = 100
    """Epochs without a lower validation loss after which training ends; the final weights are then those of the lowest.
    null: train all epochs and keep the last weights, so that the validation cases choose nothing."""
    workers: int = 2
    """Processes that load studies; nnUNet_n_proc_DA may lower it."""
    seed: int = 0
    """Of the weights, the order of the studies, their augmentation and the dropout."""

    def __post_init__(self) -> None:
        require(self.target not in ("", "case_id", "age"), "staging.target must be risk, stage or a column of "
                "clinical.csv that has classes")  # fmt: skip
        for name in ("epochs", "batch_size"):
            require(getattr(self, name) >= 1, f"staging.{name} must be at least 1")
        require(self.patience is None or self.patience >= 1, "staging.patience must be at least 1, or null")
        require(self.learning_rate > 0, "staging.learning_rate must be above 0")
        for name in ("weight_decay", "workers", "seed"):
            require(getattr(self, name) >= 0, f"staging.{name} must not be negative")
        require(0 <= self.dropout < 1, "staging.dropout must be at least 0 and below 1")


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
        require(self.preset in PRESETS, f"-preset {self.preset}: unknown; there are {', '.join(PRESETS)}")
        require(self.modalities is None or self.modalities in USED, f"modalities must be one of {', '.join(USED)}, or "
                "null for those of the dataset")  # fmt: skip
        for name in ("modality_dropout", "misalignment", "stage_weight"):
            alone = self.modalities in MODALITIES and getattr(self.finetune, name)
            require(not alone, f"finetune.{name} needs CT and PET, and fratmae.modalities is {self.modalities}; set "
                    f"finetune.{name}=0")  # fmt: skip
        if self.token_patch is not None:
            sides = ", ".join(map(str, TOKEN_SIDES))
            require(all(t in TOKEN_SIDES for t in self.token_patch), f"token_patch: each side must be one of {sides}")
            for name, patch in (("wholebody.patch", self.wholebody.patch), ("finetune.patch", self.finetune.patch)):
                fits = patch is None or all(p >= t and p % t == 0 for p, t in zip(patch, self.token_patch, strict=True))
                require(fits, f"{name} {patch} is no multiple of token_patch {self.token_patch}")
                require(patch != self.token_patch, f"{name} {patch} is a single token; it must hold two or more")

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
        return _build(cls, block, "")


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


def _build(cls: type, block: dict[str, Any], prefix: str) -> Any:
    """A dataclass from JSON, with the types of its annotations enforced and unknown keys refused."""
    require(isinstance(block, dict), f'plans.json, "fratmae": {prefix.rstrip(".") or "the block"} must be {{...}}')
    known = {f.name: f for f in fields(cls)}
    for name in block:
        require(name in known, f'plans.json, "fratmae": unknown key {prefix}{name}; there are {", ".join(known)}')
    values = {}
    for name, value in block.items():
        default = getattr(cls(), name)
        if is_dataclass(default):
            values[name] = _build(type(default), value, f"{name}.")
        else:
            values[name] = _typed(value, str(known[name].type), prefix + name)
    return replace(cls(), **values)


def _typed(value: Any, annotation: str, name: str) -> Any:
    if value is None and "None" in annotation:
        return None
    if annotation.startswith("tuple[float"):
        require(isinstance(value, list) and all(type(v) in (int, float) for v in value), f"{name}={value}: must be "
                "numbers such as [1,0.5]")  # fmt: skip
        return tuple(float(v) for v in value)
    if annotation.startswith("tuple"):
        is_triple = isinstance(value, list) and len(value) == 3 and all(type(v) is int and v > 0 for v in value)
        require(is_triple, f"{name}={value}: must be three whole numbers above 0, such as [32,160,192]")
        return tuple(value)
    kind = {"int": int, "float": float, "str": str, "bool": bool}[annotation.split(" ")[0]]
    if kind is float and type(value) is int:
        return float(value)
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    require(type(value) is kind, f"{name}={json.dumps(value)}: must be {words[kind]}")
    return value
