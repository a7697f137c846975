"""Files that are there whole or not at all, and names from files that stay inside the folder they are meant for."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nnunet_fratmae.base.command import UserError

LEAST_FREE = 2**20  # bytes; a disk with less is full
_NODE = re.sub(r"[^A-Za-z0-9.-]", "-", platform.node()) or "node"


class WriteError(UserError):
    """The target cannot be written to (disk full, read-only): no fault of the case, and no other case would fare
    better."""


@contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Any OSError within is a WriteError that names `place`, a folder or a file; and so is a RuntimeError, as which
    torch, ITK and blosc2 report such, where it came of an OSError or the disk proves full or read-only."""
    try:
        yield
    except OSError as error:
        is_file = isinstance(error, FileExistsError)  # where a folder is to be made
        raise _unwritten(place, "it is a file" if is_file else error.strerror or str(error)) from None
    except RuntimeError as error:
        within = error.__context__  # where torch writes to a file of Python's
        reason = within.strerror if isinstance(within, OSError) else why_unwritable(place)
        if reason is None:
            raise
        raise _unwritten(place, reason) from None


def _unwritten(place: Path, reason: str) -> WriteError:
    return WriteError(f"{place} cannot be written to ({reason}); what was there before is whole: make room there, "
                      "permit it or give another place, then say the same again")  # fmt: skip


def why_unwritable(place: Path) -> str | None:
    """Why nothing can be written to a folder or beside a file, or None: it can."""
    there = next(path for path in (place, *place.absolute().parents) if path.is_dir())
    if not os.access(there, os.W_OK):
        return "it is read-only"
    return "no space left" if shutil.disk_usage(there).free < LEAST_FREE else None


def check_writable(folder: Path) -> None:
    """For commands that let nnU-Net write: it begins its files anew in place, and on a full disk leaves them empty.

    Raises:
        WriteError: nothing can be written to `folder`.
    """
    reason = why_unwritable(folder)
    if reason is not None:
        raise _unwritten(folder, reason)


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end; what was there stays until then.

    Every process writes to a path of its own; what a killed one left is removed by the next that writes `path` here.

    Raises:
        WriteError: the disk is full, or the like.
    """
    partial = path.with_name(f".partial_{_NODE}_{os.getpid()}_{path.name}")
    try:
        with writing_to(path):
            _remove_left_over(path)
            yield partial
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _remove_left_over(path: Path) -> None:
    """Remove what processes of this machine that are no more left of `path`."""
    begin = f".partial_{_NODE}_"
    for partial in path.parent.glob(f"{begin}*_{path.name}"):
        process = partial.name[len(begin) :].split("_")[0]
        if process.isdigit() and not _runs(int(process)):
            partial.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user, so it runs
        pass
    return True


def plain_name(name: object, where: str) -> str:
    """`name` if it can only be one file or folder in the folder it is put into.

    For names that a file gives (data_identifier, case_id), before anything so called is written, renamed or removed.

    Args:
        where: the file and field it is from, for the message.

    Raises:
        UserError: it is no text, empty, hidden, or leads elsewhere.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*", name):
        raise UserError(f"{where}: is no name of a folder or file; give letters, digits, '_', '-' and '.' only")
    return name


def is_text(path: Path | str) -> bool:
    """Whether a path is text: names of files are bytes, and those of old archives and Windows CDs may be no UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_bytes(paths: Iterable[Path | str]) -> None:
    """Raises UserError for a path that `is_text` not: nnU-Net's readers end the whole process at such a name."""
    for path in paths:
        if not is_text(path):
            raise UserError(f"{path}: this name is no UTF-8, and nnU-Net's readers cannot open it; rename it (convmv)",
                            "PATH_BYTES")  # fmt: skip


@contextmanager
def as_text(path: Path) -> Iterator[Path]:
    """`path`, or if it `is_text` not, a link to it that is: ITK ends the whole process at any other name."""
    if is_text(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="fratmae_") as folder:
        name = os.fsencode(path.name).decode("ascii", "replace").replace("\ufffd", "_")  # the ending says the format
        link = Path(folder, name)
        link.symlink_to(path.absolute())
        yield link
