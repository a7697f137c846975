"""How a training ends that cannot go on: in one line that names the cause, whichever process met it."""

from __future__ import annotations

import re
import signal
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import blosc2

from nnunet_fratmae.base.command import UserError, cause

READERS = ("load_case", "read_window", "check_grid")  # the functions of nnU-Net and ours that read a stored case
WORKERS = ("background workers", "DataLoader worker")  # what batchgenerators and torch say when one has died


@contextmanager
def one_line(
    folder: Path | str | None = None, stores: Iterable[Path] = (), loaders: Iterable[Any] = ()
) -> Iterator[None]:
    """Errors of the disk and of the processes that load patches become a UserError of one line.

    Args:
        folder: where the checkpoints are.
        stores: folders of preprocessed cases, in which a damaged file is looked for where reading one failed.
        loaders: the trainer's loaders of patches, whose processes may have been killed.
    """
    try:
        yield
    except UserError as error:
        raise UserError(cause(error), error.code) from None  # of a DataLoader's process without its traceback
    except Exception as error:
        what = explain(error, list(stores), list(loaders), folder)
        if what is None:
            raise
        left = "" if folder is None or not any(Path(folder).glob("checkpoint_*.pth")) else (
            f"; the checkpoints in {folder} are whole, --c goes on from the last")  # fmt: skip
        raise UserError(f"{what}{left}") from None


def explain(
    error: Exception, stores: list[Path], loaders: list[Any], folder: Path | str | None = None
) -> str | None:
    """The cause of an error, or None if it is none of the disk and of the processes that load patches."""
    text, functions = str(error), {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    has_read = any(name in functions or f" in {name}" in text for name in READERS)
    if has_read or any(words in text for words in WORKERS):
        return killed(text, loaders) or damaged(stores) or (cause(error) if has_read else (
            "a process that loads patches has ended; what it printed before it ended stands above"))  # fmt: skip
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        unnamed = "a file" if folder is None else f"a file of this training ({folder})"
        where = unnamed if error.filename is None else error.filename
        return f"{where} cannot be read or written ({error.strerror}); make room there or permit it"
    return None


def killed(text: str, loaders: list[Any]) -> str | None:
    """A line if a process that loads patches was killed from outside."""
    processes = [process for loader in loaders for process in getattr(loader, "_processes", [])]
    if any(process.exitcode == -signal.SIGKILL for process in processes) or re.search("signal: Killed", text):
        return ("a process that loads patches was killed, most likely for want of memory; set the environment variable "
                "nnUNet_n_proc_DA to fewer processes (fratmae.staging.workers, of staging)")  # fmt: skip
    return None


def damaged(stores: list[Path]) -> str | None:
    """The first stored case that cannot be read, in a line. All are read, since only an error comes here."""
    for store in stores:
        print(f"looking for a damaged file in {store}")
        for file in sorted(store.glob("*.b2nd")):
            try:
                blosc2.open(str(file), mode="r")[:]
            except Exception as error:  # noqa: BLE001 - of a library in C, of many kinds
                return (f"{file}: cannot be read ({type(error).__name__}), it is damaged or cut off; plan and "
                        "preprocess again (fratmae_plan_and_preprocess)")  # fmt: skip
    return None
