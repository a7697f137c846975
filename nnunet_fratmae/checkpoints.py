"""Checkpoints of the trainers: which one to go on with, and what it must hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.weights import check_finite, read_checkpoint

LATEST, PREVIOUS, BEST, FINAL = (f"checkpoint_{name}.pth" for name in ("latest", "previous", "best", "final"))
INSTEAD = {FINAL: (LATEST, PREVIOUS, BEST), LATEST: (PREVIOUS, BEST)}
"""Where a checkpoint cannot be read, those that may take its place, the newest first; of the best there is one."""
PARTS: dict[str, Callable[[Any], bool]] = {
    "network_weights": lambda value: bool(value) and all(isinstance(v, torch.Tensor) for v in value.values()),
    "optimizer_state": lambda value: isinstance(value, dict),
    "grad_scaler_state": lambda value: value is None or isinstance(value, dict),
    "logging": lambda value: isinstance(value, dict) and all(isinstance(v, list | dict) for v in value.values()),
    "_best_ema": lambda value: value is None or isinstance(float(value), float),
    "current_epoch": lambda value: type(value) is int and value >= 0,
    "init_args": lambda value: isinstance(value["plans"]["configurations"], dict),
}  # fmt: skip
"""What nnU-Net's `save_checkpoint` writes and its `load_checkpoint` reads, and whether a value is such."""


def read_training(path: Path) -> dict[str, Any]:
    """The checkpoint of a training; nothing in it is executed.

    Raises:
        UserError: it cannot be read, is none of nnU-Net's, or has weights that are not finite.
    """
    checkpoint = read_checkpoint(path)
    for name, is_right in PARTS.items():
        try:
            right = is_right(checkpoint[name])
        except (KeyError, TypeError, ValueError, AttributeError):
            right = False
        if not right:
            raise UserError(f"{path}: is no checkpoint of a training ({name} is missing or of another kind)")
    check_finite(checkpoint["network_weights"], path)
    return checkpoint


def choose_checkpoint(asked: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint that was asked for, or the newest before it that can be read; and notes for the log.

    Raises:
        UserError: none can be read.
    """
    notes = []
    for path in (asked, *(asked.with_name(name) for name in INSTEAD.get(asked.name, ()))):
        if path != asked and not path.is_file():
            continue
        try:
            checkpoint = read_training(path)
        except UserError as error:
            notes.append(f"WARNING: {error}")
            continue
        if notes:
            notes.append(f"WARNING: {path.name} takes its place, after epoch {checkpoint['current_epoch'] - 1}")
        return path, checkpoint, notes
    more = f"; nor can {len(notes) - 1} earlier ones" if len(notes) > 1 else ""
    raise UserError(notes[0].removeprefix("WARNING: ") + more)
