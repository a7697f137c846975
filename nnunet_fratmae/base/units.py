"""The fixed physical normalisation that every FratMAE network sees (DESIGN contract 3), and the way to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MODALITIES = ("CT", "PET")


@dataclass(frozen=True)
class Units:
    """Clip to [lower, upper] in `unit`, then (value - mean) / std.

    The mean is that of air, not of bodies: nnU-Net pads small images and rotated corners with 0.
    """

    unit: str
    lower: float
    upper: float
    mean: float
    std: float


# The one place of these constants; why these: docs/decisions.md, "Pretraining units".
PRETRAINING_UNITS = {
    "CT": Units("HU", lower=-1024.0, upper=1500.0, mean=-1024.0, std=500.0),
    "PET": Units("SUVbw", lower=0.0, upper=25.0, mean=0.0, std=2.0),
}


def to_units(modality: str, values: Any) -> Any:
    """Pretraining units of an array or tensor in HU ("CT") or SUVbw ("PET")."""
    u = PRETRAINING_UNITS[modality]
    return (values.clip(u.lower, u.upper) - u.mean) / u.std


def shift_above_air(ct: Any, offset: Any) -> Any:
    """A CT (array or tensor, pretraining units) plus `offset`, a number or one for each voxel, not below air.

    Air and padding (0) stay as they are: they have no density to be off by.
    """
    return ct + ((ct + offset).clip(0) - ct) * (ct > 0)


def units_contract() -> dict[str, dict[str, Any]]:
    """The units as plain JSON, as they stand in an artefact's contract."""
    return {modality: asdict(units) for modality, units in PRETRAINING_UNITS.items()}
