"""Checkpoints of a pretraining that are never lost: written aside, read back, then renamed; the last one is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.weights import check_finite, read_checkpoint, whole_checkpoint
from plans.contract import contract_of

LATEST, PREVIOUS, BEST = "checkpoint_latest.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
PARTS = {"model": dict, "identity": dict, "contract": dict, "history": list, "epoch": int}
"""What every command that takes a run reads of its checkpoint, with the type."""


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path`; what was there stays until every byte of the new file was read back.

    The last one but one of the latest checkpoint is kept as well.

    Raises:
        UserError: it cannot be written, or not be read back.
    """
    previous = path.with_name(PREVIOUS) if path.name == LATEST else None
    with whole_checkpoint(path, previous) as partial, partial.open("wb") as file:
        torch.save(state, file)


def load(path: Path) -> dict[str, Any]:
    """The checkpoint of a file; nothing in it is executed.

    Raises:
        UserError: it cannot be read.
    """
    return read_checkpoint(path)


def load_run(path: Path) -> dict[str, Any]:
    """The checkpoint of a pretraining, perhaps one that was downloaded.

    Raises:
        UserError: it cannot be read, or as `check_run`.
    """
    state = load(path)
    check_run(state, path)
    return state


def check_run(state: dict[str, Any], path: Path) -> None:
    """See that what a checkpoint holds is a pretraining, with weights that can be computed with.

    Raises:
        UserError: it is not.
    """
    wrong = [name for name, kind in PARTS.items() if not isinstance(state.get(name), kind)]
    if "step" in state and not (type(state["step"]) is int and isinstance(state.get("sums"), dict)):
        wrong.append("step")
    if not wrong and not all(isinstance(value, torch.Tensor) for value in state["model"].values()):
        wrong = ["model"]
    if wrong:
        raise UserError(f"{path}: is no checkpoint of fratmae_pretrain ({', '.join(wrong)} missing or of another kind);"
                        " give the output folder of fratmae_pretrain")  # fmt: skip
    try:
        contract_of(state["contract"] | {"epochs": state["epoch"]})
    except UserError as error:
        raise UserError(f"{path}, its contract: {error}") from None
    check_finite(state["model"], path)


def load_latest(folder: Path) -> dict[str, Any]:
    """The latest checkpoint of a run that can be read; a damaged one is passed over with a line.

    Raises:
        UserError: there is none.
    """
    there = [path for path in (folder / LATEST, folder / PREVIOUS) if path.is_file()]
    if not there:
        raise UserError(f"--c: no {LATEST} in {folder}; start without --c")
    for path in there:
        try:
            return load(path)
        except UserError as error:
            print(f"warning: {error}")
    raise UserError(f"--c: no checkpoint in {folder} can be read; start again with another folder (-o)")
