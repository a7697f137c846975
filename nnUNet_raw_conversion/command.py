"""How every command of this project behaves: one clear line and exit code 1 on a user's error, nnU-Net's folders."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")
KILLED = "process was killed, most likely for want of memory"


class UserError(Exception):
    """A mistake that the user can mend: the message names the file or field, what is wrong and what to do."""


def run_command(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None]) -> None:
    """Parse the command line and run `main`; a `UserError` ends in its message on stderr and exit code 1.

    Any other error is one line with its type and place in our code, without its text, which may name a patient's file.
    With `--debug` the traceback is shown instead. Ctrl-C ends with exit code 130, as in a shell.
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
    except Exception as error:
        if args.debug:
            raise
        what = f"unexpected {type(error).__name__} in {_place(error)}"
        sys.exit(f"{parser.prog}: error: {what}; run again with --debug and report it")


def _place(error: Exception) -> str:
    """The last line of our own code that an error went through, as plans/extension.py:120."""
    root, packages = Path(__file__).parents[1], ("nnUNet_raw_conversion", "nnunet_fratmae", "plans", "pretraining")
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [(file.relative_to(root), line) for file, line in frames if root in file.parents]
    ours = [f"{file.as_posix()}:{line}" for file, line in ours if file.parts[0] in packages]
    return ours[-1]  # this file at least


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
        unplanned = variable == "nnUNet_preprocessed" and not found
        raise UserError(f"-d {dataset_id}: {what} with this ID in {variable}={root} (there: {known})"
                        + unplanned * "; plan it first: fratmae_plan_and_preprocess")  # fmt: skip
    return found[0]


def check_device(device: str) -> None:
    """Raises UserError where `-device` is "cuda" and torch finds no GPU."""
    import torch  # it takes seconds, and most commands do without

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("-device cuda: no GPU can be used here; say -device cpu")


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end."""
    partial = path.with_name(f".partial_{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def map_cases(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    processes: int,
    if_killed: Callable[[Item], Result] | None = None,
) -> Iterator[Result]:
    """The results of `function` for all items, in the order in which they are done; in this process if one is enough.

    The first error ends it: what has not begun is not begun any more.

    Args:
        function: picklable (a module's function or a functools.partial of one).
        if_killed: the result for an item whose process is killed, as for want of memory. It is known by trying what was
            not done then one item at a time; without this function a killed process is an error.

    Raises:
        UserError: fewer than one process asked for, or a process was killed.
    """
    if processes < 1:
        raise UserError(f"-np {processes}: give at least 1 process")
    if min(processes, len(items)) <= 1:
        yield from map(function, items)
        return
    left = []
    with _pool(min(processes, len(items))) as pool:
        futures = {pool.submit(function, item): i for i, item in enumerate(items)}
        try:
            for done in as_completed(futures):
                if isinstance(done.exception(), BrokenProcessPool):
                    left.append(futures[done])
                else:
                    yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)
    if left and if_killed is None:
        raise UserError(f"a {KILLED}; try a smaller -np")
    while left:
        with _pool(1) as pool:
            for i in sorted(left):
                left.remove(i)
                try:
                    yield pool.submit(function, items[i]).result()
                except BrokenProcessPool:
                    yield if_killed(items[i])
                    break


def _pool(processes: int) -> ProcessPoolExecutor:
    # Spawned, not forked: the threads of ITK and torch do not survive a fork
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker)


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
