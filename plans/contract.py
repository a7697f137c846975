"""The contract of a pretrained artefact: `encoders.json` beside `encoders.safetensors` (DESIGN contract 7)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.jsons import read_object
from nnunet_fratmae.base.units import MODALITIES, units_contract
from nnunet_fratmae.networks.strides import TOKEN_SIDES
from plans.settings import METHODS, MOST_TOKENS, MOST_VOXELS, PRESETS, STACKS, stack_steps

WEIGHTS_NAME, CONTRACT_NAME = "encoders.safetensors", "encoders.json"
FORMAT = "fratmae-encoders-2"  # 1 had other position embeddings
AXES = "H W D = to anterior, to the right, to the head"  # as nnU-Net's SimpleITKIOWithReorient reads

# Far beyond any real artefact; a file that says more would take the memory
MOST_BYTES = 2**20
MOST_TEXT = 1000  # letters of a name or a licence


@dataclass(frozen=True)
class Contract:
    """What the encoders are, what they expect and where they come from; checked when built.

    Raises:
        UserError: a part of another type or beyond what this software can use; the message begins with the part.
    """

    preset: str
    embed_dim: int
    depth: int
    num_heads: int
    token_patch: tuple[int, int, int]
    grid: tuple[int, int, int]
    patch: tuple[int, int, int]
    k: int
    method: str
    """Arm of the pretraining: fratmae, fratmae_notext, mae or mae_text."""
    text_tower: str | None
    """Name of ContextAlign's text tower, without the path of a file."""
    epochs: int
    datasets: list[dict[str, Any]]
    """Name, number of cases and licence of every dataset seen."""
    left_out_fold: int | None
    """nnU-Net fold whose validation cases were not seen; null: all cases were."""
    software: dict[str, str]
    stack: str = "coronal"
    architecture: str = "ViTEncoder"
    modalities: tuple[str, ...] = ("CT", "PET")
    axes: str = AXES
    units: dict[str, Any] | None = None
    licence: str = "weights: as the datasets allow; code: Apache-2.0"
    format: str = FORMAT

    def __post_init__(self) -> None:
        self._check_types()
        if self.format != FORMAT or self.architecture != "ViTEncoder":
            raise UserError(f"is no FratMAE encoder pair ({_shown(self.format)} / {_shown(self.architecture)}); this "
                            f"trainer needs {FORMAT} / ViTEncoder")  # fmt: skip
        if self.axes != AXES:
            raise UserError(f"axes {_shown(self.axes)} are not '{AXES}'; export the encoders again")
        sizes = PRESETS.get(self.preset)
        if sizes is None or self.encoder != sizes.encoder:
            raise UserError(f"preset {_shown(self.preset)} with {self.encoder} is not known to this version "
                            f"({', '.join(PRESETS)}); use the version that made it")  # fmt: skip
        if not all(side in TOKEN_SIDES for side in self.token_patch):
            raise UserError(f"token_patch {self.token_patch} has sides other than {TOKEN_SIDES}")
        if math.prod(self.grid) > MOST_VOXELS:
            raise UserError(f"grid {self.grid} has more than {MOST_VOXELS:.2g} voxels")
        if any(side % token for side, token in zip(self.patch, self.token_patch, strict=True)):
            raise UserError(f"patch {self.patch} is no multiple of token_patch {self.token_patch}")
        if math.prod(self.patch) > MOST_TOKENS * math.prod(self.token_patch):
            raise UserError(f"patch {self.patch} has more than {MOST_TOKENS} tokens of {self.token_patch}")
        if self.stack not in STACKS or self.method not in METHODS or tuple(self.modalities) != MODALITIES:
            raise UserError(f"stack {_shown(self.stack)}, method {_shown(self.method)} and modalities "
                            f"{_shown(self.modalities)} are not all known to this version")  # fmt: skip
        steps = stack_steps(self.stack, self.k)
        if any(p * step > g for p, step, g in zip(self.patch, steps, self.grid, strict=True)):
            raise UserError(f"patch {self.patch} of every {self.k}. slice does not fit in grid {self.grid}")

    def _check_types(self) -> None:
        for names, is_right, what in (
            (("preset", "method", "stack", "architecture", "axes", "licence", "format"), _is_text, "text"),
            (("text_tower",), lambda value: value is None or _is_line(value), "a line of text or null"),
            (("embed_dim", "depth", "num_heads", "k"), _is_count, "a whole number above 0"),
            (("epochs",), lambda value: value == 0 or _is_count(value), "a whole number"),
            (("left_out_fold",), lambda value: value is None or type(value) is int, "a whole number or null"),
            (("token_patch", "grid", "patch"), _is_triple, "three whole numbers above 0"),
            (("modalities",), lambda value: all(map(_is_text, value)), "names"),
            (("datasets",), lambda value: all(map(_is_dataset, value)), "objects with name, cases and licence"),
            (("software",), lambda value: all(map(_is_text, value.values())), "versions by name"),
        ):
            for name in names:
                value = getattr(self, name)
                try:
                    right = is_right(value)
                except (KeyError, TypeError, AttributeError):
                    right = False
                if not right:
                    raise UserError(f"{name} is {_shown(value)}, it must be {what}; export the encoders again")

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self) | {"units": units_contract()}, indent=2) + "\n", encoding="utf-8")

    @property
    def encoder(self) -> dict[str, int]:
        """Keyword arguments of the encoder besides patch size and token patch."""
        return {"embed_dim": self.embed_dim, "depth": self.depth, "num_heads": self.num_heads}


def locate_artefact(pretrained: str | Path) -> tuple[Path, Path]:
    """The weights file and the contract file of an artefact given as its folder or its weights file.

    Raises:
        UserError: one of the two is absent.
    """
    path = Path(pretrained).expanduser()
    folder = path.parent if path.suffix == ".safetensors" else path
    weights = path if path.suffix == ".safetensors" else folder / WEIGHTS_NAME
    for file, what in ((weights, "the encoders' weights"), (weights.with_suffix(".json"), "their contract")):
        if not file.is_file():
            raise UserError(f"pretrained {pretrained}: {file} ({what}) is not there; give the output folder of "
                            f"fratmae_pretrain or its {WEIGHTS_NAME}")  # fmt: skip
    return weights, weights.with_suffix(".json")


def read_contract(pretrained: str | Path) -> Contract:
    """The contract of an artefact, checked against what this software can use.

    Raises:
        UserError: absent, unreadable, of another architecture, with other axes or units, or sizes beyond all bounds.
    """
    _, path = locate_artefact(pretrained)
    content = read_object(path, "it is no readable contract: copy it again, or export the encoders again",
                          MOST_BYTES)
    try:
        contract = contract_of(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if contract.units != units_contract():
        raise UserError(f"{path}: units {_shown(contract.units)} are not this version's {units_contract()}; "
                        "pretrain again with this version or use the version that made it")  # fmt: skip
    return contract


def contract_of(content: Mapping[str, Any]) -> Contract:
    """The contract that a JSON object or a checkpoint of a pretraining holds; what it has besides is passed over.

    Raises:
        UserError: a part is missing or cannot be used; the message begins with the part.
    """
    known = {f.name: f for f in fields(Contract)}
    parts = {name: value for name, value in content.items() if name in known}
    if parts.get("format") != FORMAT:
        found = _shown(parts.get("format"))
        raise UserError(f"is no FratMAE encoder pair (format {found}); this trainer needs {FORMAT}")
    missing = [name for name, field in known.items() if field.default is MISSING and name not in parts]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; export the encoders again")
    lists = ("token_patch", "grid", "patch", "modalities")
    parts |= {name: tuple(parts[name]) for name in lists if isinstance(parts.get(name), list)}
    return Contract(**parts)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MOST_TEXT


def _is_line(value: object) -> bool:
    """Whether it can be printed: names go to the terminal and to logs."""
    return _is_text(value) and value.isprintable()


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_triple(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(map(_is_count, value))


def _is_dataset(value: dict[str, Any]) -> bool:
    return _is_line(value["name"]) and type(value["cases"]) is int and value["cases"] >= 0


def _shown(value: object) -> str:
    """A value from a file on one short line."""
    text = json.dumps(value, default=str) if not isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def expected_shapes(contract: Contract) -> dict[str, tuple[int, ...]]:
    """A few weights whose shapes tell the architecture, to see at once whether a file keeps its contract."""
    dim = contract.embed_dim
    return {
        f"{modality}.{name}": shape
        for modality in contract.modalities
        for name, shape in (
            ("patch_embed.weight", (dim, 1, *contract.token_patch)),
            ("cls_token", (1, 1, dim)),
            (f"blocks.{contract.depth - 1}.mlp.fc1.weight", (4 * dim, dim)),
            ("norm.weight", (dim,)),
        )
    }
