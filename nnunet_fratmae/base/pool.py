"""Work on many cases in several processes, of which one may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nnunet_fratmae.base.command import UserError

Item, Result = TypeVar("Item"), TypeVar("Result")
KILLED = "process was killed, most likely for want of memory"


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
