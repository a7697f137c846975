"""Pictures of a pretraining: the loss curve, and masked input, reconstruction and truth of a held-out patch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from plans.units import PRETRAINING_UNITS  # noqa: E402

WINDOWS = {"CT": ("gray", -200.0, 300.0), "PET": ("gray_r", 0.0, 7.0)}  # soft tissue; SUV as nuclear physicians read it


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG under a temporary name and rename it."""
    partial = path.with_name(f".partial_{path.name}")
    figure.savefig(partial, dpi=110, bbox_inches="tight", facecolor="white", format="png")
    plt.close(figure)
    os.replace(partial, path)


def plot_progress(history: list[dict[str, Any]], path: Path) -> None:
    """Masked MSE of CT and PET over the epochs, training and held-out, and the learning rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    epochs = [row["epoch"] for row in history]
    for modality, colour in (("CT", "tab:blue"), ("PET", "tab:red")):
        for part, style in (("train", "--"), ("held_out", "-")):
            values = [row.get(f"{part}_{modality}") for row in history]
            if any(v is not None for v in values):
                series = [np.nan if v is None else v for v in values]
                left.plot(epochs, series, style, color=colour, label=f"{modality} {part.replace('_', '-')}", marker=".")
    left.set(xlabel="epoch", ylabel="MSE on masked tokens", yscale="log", title="reconstruction, in pretraining units")
    left.legend()
    left.grid(alpha=0.3)
    right.plot(epochs, [row["learning_rate"] for row in history], color="black")
    right.set(xlabel="epoch", ylabel="learning rate")
    right.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path)


def plot_reconstruction(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """A middle coronal slice of each modality: truth, masked input, reconstruction of the masked tokens, difference.

    Args:
        rows: one per modality with `modality` and the arrays `truth`, `masked` (boolean, true where masked) and
            `prediction`, all (H, W, D) in pretraining units. Shown in HU and SUV.
    """
    figure, axes = plt.subplots(len(rows), 4, figsize=(11, 4.2 * len(rows)), squeeze=False, layout="constrained")
    for panels, row in zip(axes, rows, strict=True):
        units = PRETRAINING_UNITS[row["modality"]]
        cmap, low, high = WINDOWS[row["modality"]]
        middle = row["truth"].shape[0] // 2
        truth, masked, prediction = (coronal(row[name][middle]) for name in ("truth", "masked", "prediction"))
        truth, prediction = (x * units.std + units.mean for x in (truth, prediction))
        filled = np.where(masked, prediction, truth)
        pictures = {
            f"{row['modality']}: truth ({units.unit})": truth,
            "what the encoder sees": np.ma.masked_where(masked, truth),
            "reconstruction": filled,
        }
        for panel, (name, picture) in zip(panels, pictures.items(), strict=False):
            panel.set_facecolor("tab:olive")
            panel.imshow(picture, cmap=cmap, vmin=low, vmax=high)
            panel.set_title(name, fontsize=9)
        limit = (high - low) / 2
        panels[3].imshow(filled - truth, cmap="coolwarm", vmin=-limit, vmax=limit)
        panels[3].set_title(f"difference (±{limit:g} {units.unit})", fontsize=9)
        for panel in panels:
            panel.set_xticks([])
            panel.set_yticks([])
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def coronal(plane: np.ndarray) -> np.ndarray:
    """A (W, D) plane as a picture: head up, the patient's right on the viewer's left.

    nnU-Net's SimpleITKIOWithReorient lets W run to the right of the patient and D to the head.
    """
    return plane[::-1, ::-1].T
