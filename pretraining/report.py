"""Pictures of a pretraining: the curves, and masked input, reconstruction and truth of a held-out patch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunet_fratmae.base.units import PRETRAINING_UNITS
from nnUNet_raw_conversion.pictures import HU_WINDOW, SUV_WINDOW, name_sides, save_figure

SHOWN = {"CT": ("gray", *HU_WINDOW), "PET": ("gray_r", *SUV_WINDOW)}
COLOURS = {"CT": "tab:blue", "PET": "tab:red"}


def plot_progress(history: list[dict[str, Any]], path: Path) -> None:
    """Curves over the epochs: masked MSE with the guesses it must beat, cross-modal gain, retrieval, gradient norm."""
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    (error, gain), (text, step) = figure.subplots(2, 2)
    for modality, colour in COLOURS.items():
        _curve(error, history, f"train_{modality}", f"{modality} train", color=colour, linestyle="--")
        _curve(error, history, f"held_out_{modality}", f"{modality} held out", color=colour, marker=".")
        _curve(error, history, f"mean_guess_{modality}", f"{modality} mean of the visible", color=colour, alpha=0.35)
        _curve(error, history, f"copy_guess_{modality}", f"{modality} nearest visible voxel", color=colour, alpha=0.35,
               linestyle=":")  # fmt: skip
        _curve(gain, history, f"gain_{modality}", modality, color=colour, marker=".")
    error.set(ylabel="MSE on masked tokens", yscale="log", title="reconstruction, in pretraining units")
    gain.axhline(0, color="black", linewidth=0.8)
    gain.set(ylabel="1 - MSE / MSE with another patient", title="cross-modal gain, held out")
    _curve(text, history, "train_text", "InfoNCE, train", color="tab:green", linestyle="--")
    for name, style in (("top1", "-"), ("top5", "--"), ("chance1", ":"), ("majority", "-.")):
        _curve(text, history, f"retrieval_{name}", f"{name}, held out", color="tab:purple", linestyle=style)
    text.set(title="PET and text")
    _curve(step, history, "gradient_norm", "gradient norm", color="tab:orange")
    _curve(step, history, "data_wait", "share of time waiting for data", color="tab:brown")
    step.set(title="steps")
    no_gain = "needs cross-attention and held-out cases\nof two patients (pretrain.held_out)"
    for axes, why_empty in ((error, ""), (gain, no_gain), (text, "this method has no text"), (step, "")):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        else:
            axes.text(0.5, 0.5, why_empty, ha="center", va="center", color="gray", transform=axes.transAxes)
    save_figure(figure, path)


def _curve(axes: Axes, history: list[dict[str, Any]], key: str, label: str, **style: Any) -> None:
    values = [np.nan if row.get(key) is None else row[key] for row in history]
    if not np.isnan(values).all():
        axes.plot([row["epoch"] for row in history], values, label=label, **style)


def plot_reconstruction(
    rows: list[dict[str, Any]], attention: dict[str, Any] | None, stack: int, path: Path, title: str
) -> None:
    """Each modality in the middle slice and as a projection: masked input, reconstruction, truth, difference.

    Args:
        rows: one per modality with `modality` and the arrays `truth`, `masked` (boolean, true where masked) and
            `prediction`, all (H, W, D) in pretraining units. Shown in HU and SUV.
        attention: `map` (h, w, d) of one PET token's look at the CT's tokens, its place `token`, `token_patch` and the
            `ct` patch (H, W, D); None without cross-attention.
        stack: axis of the slices.
    """
    lines = 2 * len(rows) + (attention is not None)
    figure = Figure(figsize=(11, 3.4 * lines), layout="constrained")
    panels = figure.subplots(lines, 4, squeeze=False)
    for number, row in enumerate(rows):
        units = PRETRAINING_UNITS[row["modality"]]
        truth, prediction = (row[name] * units.std + units.mean for name in ("truth", "prediction"))
        filled = np.where(row["masked"], prediction, truth)
        middle = truth.shape[stack] // 2
        views = {
            "slice": lambda volume, at=middle: volume.take(at, axis=stack),
            "projection": lambda volume: volume.max(axis=stack),
        }
        for line, (view, project) in zip(panels[2 * number : 2 * number + 2], views.items(), strict=True):
            what = f"{row['modality']} {view}"
            _reconstruction(line, what, project, truth, row["masked"], filled, row["modality"], stack)
    if attention is not None:
        _attention(panels[-1], attention, stack)
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
        name_sides(panel, "RL")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def _reconstruction(
    line: Sequence[Axes], what: str, project: Any, truth: np.ndarray, masked: np.ndarray, filled: np.ndarray,
    modality: str, stack: int,
) -> None:  # fmt: skip
    cmap, low, high = SHOWN[modality]
    unit = PRETRAINING_UNITS[modality].unit
    seen = np.ma.masked_invalid(project(np.where(masked, -np.inf, truth)))
    pictures = {f"{what}, truth ({unit})": project(truth), "what the encoder sees of it": seen,
                "reconstruction": project(filled)}  # fmt: skip
    for panel, (name, picture) in zip(line, pictures.items(), strict=False):
        panel.set_facecolor("tab:olive")
        panel.imshow(upright(picture, stack), cmap=cmap, vmin=low, vmax=high)
        panel.set_title(name, fontsize=9)
    limit = (high - low) / 2
    difference = upright(project(filled) - project(truth), stack)
    line[3].imshow(difference, cmap="coolwarm", vmin=-limit, vmax=limit)
    line[3].set_title(f"reconstruction - truth (red: {limit:g} {unit} too high)", fontsize=9)


def _attention(line: Sequence[Axes], attention: dict[str, Any], stack: int) -> None:
    """The CT at the token's slice, the token, and how much it looks at each token of the CT: there, and summed up."""
    units, patch, token = PRETRAINING_UNITS["CT"], attention["token_patch"], attention["token"]
    cmap, low, high = SHOWN["CT"]
    at = token[stack] * patch[stack] + patch[stack] // 2
    slice_of_ct = upright((attention["ct"] * units.std + units.mean).take(at, axis=stack), stack)
    there = np.zeros(attention["map"].shape)
    there[token] = 1
    beside, summed = (m / attention["map"].sum() for m in (attention["map"].take(token[stack], axis=stack),
                                                           attention["map"].sum(axis=stack)))  # fmt: skip
    maps = {
        "the hottest masked PET token": there.take(token[stack], axis=stack),
        f"where it looks in the CT, its slices\n(brightest: {beside.max():.0%} of its attention)": beside,
        f"over all slices\n(brightest: {summed.max():.0%})": summed,
    }
    line[0].imshow(slice_of_ct, cmap=cmap, vmin=low, vmax=high)
    line[0].set_title("CT there", fontsize=9)
    sides = [p for axis, p in enumerate(patch) if axis != stack]
    for panel, (name, picture) in zip(line[1:], maps.items(), strict=True):
        panel.imshow(slice_of_ct, cmap=cmap, vmin=low, vmax=high)
        panel.imshow(upright(np.kron(picture, np.ones(sides)), stack), cmap="inferno", alpha=0.55)
        panel.set_title(name, fontsize=9)


def upright(plane: np.ndarray, stack: int) -> np.ndarray:
    """A slice as a picture, the patient's right on the viewer's left: coronal (W, D) with the head up, axial (H, W)
    with the front up.

    nnU-Net's SimpleITKIOWithReorient lets H run to the front, W to the patient's right and D to the head.
    """
    return plane[::-1, ::-1].T if stack == 0 else plane[::-1, ::-1]

