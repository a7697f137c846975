"""Files of weights: read with nothing in them executed, and written so that what was there is never lost."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.files import renamed

UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, zipfile.BadZipFile, MemoryError)
ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own variable; it beats what a call of torch.load says
ANYTHING = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

_SCALAR, _ARRAY = (value.__reduce__()[0] for value in (np.float64(0), np.zeros(1)))
# nnU-Net logs the Dice of each epoch as scalars of numpy, under a name that numpy 2 has changed
NUMPY = [
    np.dtype,
    np.ndarray,
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
    *((part, f"numpy.{core}.multiarray.{part.__name__}") for part in (_SCALAR, _ARRAY) for core in ("core", "_core")),
]
"""What a checkpoint may hold besides tensors and Python's plain types."""


# ------------------------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What torch.save has written, on the CPU. Nothing in the file is executed, since weights are passed on.

    Raises:
        UserError: the file is damaged, cut off, holds anything but weights and plain values, or no dictionary.
    """
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        return _load(path)
    except Exception as error:  # noqa: BLE001 - unpickling raises anything
        raise UserError(f"{path}: cannot be read as weights {_reason(error)}") from None


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file by name.

    Raises:
        UserError: the file is damaged or cut off.
    """
    try:
        return load_file(path)
    except (SafetensorError, *UNREADABLE) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: cannot be read ({reason}); the file is damaged or cut off, copy it again") from None


def check_finite(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """
    Raises:
        UserError: a tensor has NaN or infinite values, or would have as float32; the message names it.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise UserError(f"{path}: {name[:100]!r} has NaN or infinite values, with which nothing can be computed; "
                            "the training that made it had failed: take an earlier checkpoint, or train again"
                            )  # fmt: skip


@contextmanager
def nothing_executed() -> Iterator[None]:
    """Within, torch.load reads weights only, whatever its caller (nnU-Net) says."""
    before = {name: os.environ.pop(name, None) for name in (ONLY_WEIGHTS, ANYTHING)}
    os.environ[ONLY_WEIGHTS] = "1"
    try:
        with torch.serialization.safe_globals(NUMPY):
            yield
    finally:
        del os.environ[ONLY_WEIGHTS]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _load(path: Path, mmap: bool = False) -> dict[str, Any]:
    with torch.serialization.safe_globals(NUMPY), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on pickles of other protocols: such a file is read or refused
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, no checkpoint")
    return found


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of TorchScript, that is a program, which torch.jit.load would run."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _check_archive(path: Path) -> None:
    """Read all of an archive and compare the checksums (CRC-32) that torch.save wrote; torch.load does not.

    Raises:
        OSError, zipfile.BadZipFile: it is not what was written.
        pickle.UnpicklingError: it is a program.
    """
    if is_torchscript(path):
        raise pickle.UnpicklingError("a TorchScript archive")
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # so that the disk answers, not the memory that has just written it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("compressed, as torch.save never does")  # it could unpack to any size
            damaged = archive.testzip()
    if damaged is not None:
        raise OSError(f"{damaged} does not read back as it was written")


def _reason(error: Exception) -> str:
    """Why a file cannot be read, for the message."""
    text = str(error)
    if "a TorchScript archive" in text:
        return "(a TorchScript archive is a program, and was not run); take its weights as .safetensors"
    wanted = re.search(r"GLOBAL ([\w.]{1,80})", text) or re.search(r"(?:global|instantiate)\W+([\w.]{1,80})", text)
    if isinstance(error, pickle.UnpicklingError) and wanted:
        return (f"(it asks for {wanted[1]}, which is code and no weights, and was not run); do not use this file, or "
                "ask who made it for its weights alone (.safetensors)")  # fmt: skip
    return f"({type(error).__name__}); the file is damaged or cut off, or holds no weights"


# ------------------------------------------------------------------------------------------------------------- writing


@contextmanager
def whole_checkpoint(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """A path beside `path` for torch.save, which takes its place after every byte of it was read back.

    Whenever the process is killed, `path` is a whole checkpoint: the one before, or the new one.

    Args:
        previous: where to keep the one that was there before.

    Raises:
        UserError: it cannot be written, or not be read back; what was there is left as it was.
    """
    with renamed(path) as partial:
        try:
            yield partial
            _flush(partial)
            _check_archive(partial)
            _load(partial, mmap=True)
            if previous is not None and path.is_file():
                _keep(path, previous)
        except UNREADABLE as error:
            reason = " ".join(str(error).split())[:200]
            if "inline_container" in reason:  # where torch's writer in C++ noticed
                reason = "the disk took only a part of it"
            raise UserError(f"{path}: cannot be written ({reason}); is the disk full ({_free(path.parent)})? "
                            f"{_way_out(path.parent)}") from error  # fmt: skip
    with suppress(OSError):  # of file systems that know no such thing
        _flush(path.parent)


def _flush(path: Path) -> None:
    """Have the disk write what it was given of a file, or the names in a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _keep(path: Path, previous: Path) -> None:
    """`previous` is what `path` is now; at no time is either of them missing."""
    with renamed(previous) as partial:
        try:
            os.link(path, partial)
        except OSError:  # a file system without links
            shutil.copyfile(path, partial)


def _free(folder: Path) -> str:
    with suppress(OSError):
        return f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free"
    return "it does not answer"


def _way_out(folder: Path) -> str:
    if any(folder.glob("checkpoint_*.pth")):
        return "The last checkpoint is whole: make room and go on with --c"
    return "Make room; start again"
