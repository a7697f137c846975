"""How every command of this project behaves: one clear line and exit code 1 on a user's error, nnU-Net's folders."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


class UserError(Exception):
    """A mistake that the user can mend: the message names the file or field, what is wrong and what to do."""


def run_command(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None]) -> None:
    """Parse the command line and run `main`; a `UserError` ends in its message on stderr and exit code 1.

    With `--debug` the traceback is shown as well. Ctrl-C ends with exit code 130, as in a shell.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    try:
        main(args)
    except UserError as error:
        if args.debug:
            raise
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"{parser.prog}: stopped", file=sys.stderr)
        sys.exit(130)


def nnunet_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's environment variables (nnUNet_raw, nnUNet_preprocessed, nnUNet_results) names.

    Raises:
        UserError: the variable is not set.
    """
    value = os.environ.get(variable)
    if not value:
        raise UserError(f"the environment variable {variable} is not set; say `export {variable}=/path/to/a/folder`")
    return Path(value)


def find_dataset(variable: str, dataset_id: int) -> Path:
    """The folder DatasetXXX_Name of `dataset_id` below the folder that `variable` names.

    Raises:
        UserError: the variable is not set, or there is no dataset or more than one with this ID.
    """
    root = nnunet_folder(variable)
    found = sorted(root.glob(f"Dataset{dataset_id:03d}_*"))
    if len(found) != 1:
        known = ", ".join(sorted(p.name for p in root.glob("Dataset*_*"))) or "none"
        what = "no dataset" if not found else f"{len(found)} datasets"
        raise UserError(f"-d {dataset_id}: {what} with this ID in {variable}={root} (there: {known})")
    return found[0]


def map_cases(function: Callable[[Item], Result], items: Sequence[Item], processes: int) -> Iterator[Result]:
    """The results of `function` for all items, in the order in which they are done; in this process if one is enough.

    The first error ends it: what has not begun is not begun any more.

    Args:
        function: picklable (a module's function or a functools.partial of one).

    Raises:
        UserError: fewer than one process asked for, or a process was killed.
    """
    if processes < 1:
        raise UserError(f"-np {processes}: give at least 1 process")
    if min(processes, len(items)) <= 1:
        yield from map(function, items)
        return
    # Spawned, not forked: the threads of ITK and torch do not survive a fork
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(items)), spawn, _start_worker) as pool:
        try:
            for done in as_completed([pool.submit(function, item) for item in items]):
                yield done.result()
        except BrokenProcessPool:
            raise UserError("a process was killed, most likely for want of memory; try a smaller -np") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Parallel over cases, not within them; Ctrl-C is for the main process alone, whose death ends this one."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    for variable in ("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "OMP_NUM_THREADS"):
        os.environ[variable] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
