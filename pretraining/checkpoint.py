"""Checkpoints of a pretraining that are never lost: written aside, read back, then renamed; the last one is kept."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from nnunet_fratmae.base.command import UserError

LATEST, PREVIOUS, BEST = "checkpoint_latest.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, zipfile.BadZipFile)


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path`; what was there stays until every byte of the new file was read back.

    The last one but one of the latest checkpoint is kept as well.

    Raises:
        UserError: it cannot be written, or not be read back.
    """
    partial = path.with_name(f".partial_{path.name}")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _verify(partial)
        torch.load(partial, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        partial.unlink(missing_ok=True)
        reason = " ".join(str(error).split())[:200]
        is_there = (path.parent / LATEST).is_file()
        way_out = "The last checkpoint is whole: make room and go on with --c" if is_there else "Make room; start again"
        raise UserError(f"{path}: cannot be written ({reason}); is the disk full? {way_out}") from error
    if path.name == LATEST and path.is_file():
        os.replace(path, path.with_name(PREVIOUS))
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any]:
    """The checkpoint of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        _verify(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}); the file is damaged or cut off") from error


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


def _verify(path: Path) -> None:
    """Read all of a checkpoint and compare the checksums (CRC-32) that torch.save wrote; torch.load does not.

    Raises:
        OSError, zipfile.BadZipFile: it is not what was written.
    """
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # so that the disk answers, not the memory that has just written it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    if damaged is not None:
        raise OSError(f"{damaged} does not read back as it was written")
