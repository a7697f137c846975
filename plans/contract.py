"""The contract of a pretrained artefact: `encoders.json` beside `encoders.safetensors` (DESIGN contract 7)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nnunet_fratmae.base.command import UserError
from plans.settings import PRESETS, TOKEN_SIDES
from plans.units import units_contract

WEIGHTS_NAME, CONTRACT_NAME = "encoders.safetensors", "encoders.json"
FORMAT = "fratmae-encoders-2"  # 1 had other position embeddings
AXES = "H W D = to anterior, to the right, to the head"  # as nnU-Net's SimpleITKIOWithReorient reads


@dataclass(frozen=True)
class Contract:
    """What the encoders are, what they expect and where they come from."""

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

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self) | {"units": units_contract()}, indent=2) + "\n")

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
        UserError: absent, unreadable, of another architecture, with other axes or units.
    """
    _, path = locate_artefact(pretrained)
    try:
        content = json.loads(path.read_text())
        if content.get("format") != FORMAT or content.get("architecture") != "ViTEncoder":
            what = f"{content.get('format')} / {content.get('architecture')}"
            raise UserError(f"{path}: is no FratMAE encoder pair ({what}); this trainer needs {FORMAT} / ViTEncoder")
        known = {f.name for f in fields(Contract)}
        lists = {name: tuple(value) for name, value in content.items() if name in ("token_patch", "grid", "patch")}
        contract = Contract(**{k: v for k, v in (content | lists).items() if k in known})
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no readable contract ({error}); export the encoders again") from error
    if contract.units != units_contract():
        raise UserError(f"{path}: units {contract.units} are not this version's {units_contract()}; "
                        "pretrain again with this version or use the version that made it")  # fmt: skip
    if contract.axes != AXES:
        raise UserError(f"{path}: axes '{contract.axes}' are not '{AXES}'; export the encoders again")
    sizes = PRESETS.get(contract.preset)
    if sizes is None or contract.encoder != sizes.encoder:
        raise UserError(f"{path}: preset {contract.preset} with {contract.encoder} is not known to this version "
                        f"({', '.join(PRESETS)}); use the version that made it")  # fmt: skip
    if len(contract.token_patch) != 3 or not all(t in TOKEN_SIDES for t in contract.token_patch):
        raise UserError(f"{path}: token_patch {contract.token_patch} has sides other than {TOKEN_SIDES}")
    return contract


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
