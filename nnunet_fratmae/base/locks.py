"""One command at a time where two would spoil each other's work; a killed one leaves no lock behind."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.files import check_writable, writing_to

LOCK_NAME = ".lock"
UNABLE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems say that have no locks, as some network shares."""


@contextmanager
def locked(path: Path, what: str, patience: float = 0) -> Iterator[None]:
    """While this is entered no other command is within `locked` of the same file `path`, which is there meanwhile.

    The operating system holds the lock (flock), and lets go of it when the process ends, however it ends. It holds
    between processes of one machine, and between machines where the file system passes locks on (NFS since Linux
    2.6.12, SMB unless mounted with nobrl, Lustre with flock). Where there are none a warning says so.

    Args:
        what: the thing that is locked, for the message.
        patience: seconds to wait for another command.

    Raises:
        UserError: another command has it.
        WriteError: the file cannot be written.
    """
    with writing_to(path.parent):
        file = _own(path, time.monotonic() + patience)
    if file is None:
        raise UserError(f"{what} is being written by another command now; wait until that has ended, "
                        "then say the same again", "IN_USE")  # fmt: skip
    try:
        yield
    finally:
        if os.name == "posix" and _is_at(path, file):  # elsewhere an open file cannot be removed
            path.unlink(missing_ok=True)
        os.close(file)


def _own(path: Path, until: float) -> int | None:
    """The locked file, of mode 0600; None if another process has it until then."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            got = _try(file)
            if got and _is_at(path, file):  # else the one before removed it between our opening and our locking it
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        if not got:
            if time.monotonic() >= until:
                return None
            time.sleep(0.1)


def _is_at(path: Path, file: int) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file), os.stat(path))


def _try(file: int) -> bool:
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in UNABLE:
            print("warning: this file system has no locks; see that no second command writes here at the same time",
                  file=sys.stderr)  # fmt: skip
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within, no other process writes to `folder`, which is made where it is absent.

    Unlike that of `locked`, this lock is the process's (POSIX), so it ends with it, however it ends: the loading
    processes of a training that was killed may live on and would hold it. On a file system without locks there is none.

    Raises:
        UserError: another process is within.
        WriteError: the folder cannot be written to.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
        file = (folder / LOCK_NAME).open("a", encoding="utf-8")
    with file:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f"{folder}: another process is writing there; wait until it has ended, or give another "
                                "folder") from None  # fmt: skip
            except OSError:  # a file system without locks
                pass
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK_NAME).unlink()
