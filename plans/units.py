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


def intensity_properties(modality: str) -> dict[str, float]:
    """The pretraining units in the words of nnU-Net's plans, so that stock CTNormalization computes exactly them."""
    u = PRETRAINING_UNITS[modality]
    return {
        "mean": u.mean,
        "std": u.std,
        "percentile_00_5": u.lower,
        "percentile_99_5": u.upper,
        "min": u.lower,
        "max": u.upper,
        "median": u.mean,
    }


def absent_value(modality: str, scheme: str, properties: dict[str, float]) -> float:
    """What nnU-Net's normalisation makes of a missing modality, an image of air (CT) or without uptake (PET).

    Args:
        scheme, properties: as `affine_to_units`.
    """
    lowest = PRETRAINING_UNITS[modality].lower
    if scheme == "CTNormalization":
        return (max(lowest, properties["percentile_00_5"]) - properties["mean"]) / max(properties["std"], 1e-8)
    return lowest if scheme == "NoNormalization" else 0.0  # a constant image less its own mean


def affine_to_units(modality: str, scheme: str, properties: dict[str, float]) -> tuple[float, float] | None:
    """(scale, shift) such that pretraining units = scale * value + shift, for a value that nnU-Net normalised.

    Args:
        scheme: nnU-Net's normalization scheme of the channel.
        properties: the channel's entry of `foreground_intensity_properties_per_channel`.

    Returns:
        None where the scheme cannot be inverted (z-score of each image): the absolute HU or SUV is lost.
    """
    u = PRETRAINING_UNITS[modality]
    if scheme == "CTNormalization":
        return max(properties["std"], 1e-8) / u.std, (properties["mean"] - u.mean) / u.std
    if scheme == "NoNormalization":
        return 1 / u.std, -u.mean / u.std
    return None
