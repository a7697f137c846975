"""One process at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.files import writing_to

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within, no other process writes to `folder`, which is made where it is absent.

    The lock is the process's (POSIX), so it ends with it however it ends, and processes that it has started do not hold
    it on. On a file system without locks there is none.

    Raises:
        UserError: another process is within.
        WriteError: the folder cannot be written to.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_NAME).open("a")
    with file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f"{folder}: another process is writing there; wait until it has ended, or give another "
                                "folder") from None  # fmt: skip
            except OSError:  # a file system without locks
                pass
        yield
    with suppress(OSError):
        (folder / LOCK_NAME).unlink()
