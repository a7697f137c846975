"""What the longer comparisons share: commands whose results are kept, so that a stopped comparison goes on."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fratmae.demo import run_logged

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One command of a comparison.

    `output` is removed before the command starts, so an interrupted step is done anew; `read` makes of it what is kept.
    """

    name: str
    command: str
    output: Path
    variables: dict[str, str] = field(default_factory=dict)
    read: Callable[[], Row] = dict


class Comparison:
    """Steps in the folder `work`; each finished one is a line of runs.jsonl and is not run again."""

    def __init__(self, work: Path) -> None:
        self.work, self.lock = work.resolve(), threading.Lock()
        self.results = self.work / "results"
        folders = {f"nnUNet_{name}": self.work / name for name in ("raw", "preprocessed", "results")}
        for folder in (*folders.values(), self.work / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        # About one core each, since trainings run side by side. nnUNetv2_train -device cpu takes as many threads as
        # there are cores, whatever OMP_NUM_THREADS says; waiting passively, they leave the cores to the others.
        cores = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_n_proc_DA": "0",
                 "nnUNet_def_n_proc": "1"}  # fmt: skip
        self.environment = {**os.environ, **{k: str(v) for k, v in folders.items()}, **cores}
        self.environment.pop("FRATMAE_PRETRAINED", None)
        kept = self.work / "runs.jsonl"
        whole, _, torn = kept.read_text(encoding="utf-8").rpartition("\n") if kept.is_file() else ("", "", "")
        if torn:  # stopped while it was written
            kept.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        self.rows: dict[str, Row] = {row["name"]: row for row in map(json.loads, whole.splitlines())}

    def run(self, step: Step) -> Row:
        """The row of a step, which is run if there is none.

        Raises:
            UserError: the command failed; the message has the last lines of its output.
        """
        if step.name in self.rows:
            return self.rows[step.name]
        shutil.rmtree(step.output, ignore_errors=True)
        start = time.monotonic()
        run_logged(step.command, self.environment | step.variables, self.work / "logs" / f"{step.name}.log")
        row = {"name": step.name, "seconds": round(time.monotonic() - start, 1), **step.read()}
        for checkpoint in self.results.glob(f"{step.name}/**/checkpoint_*.pth"):
            checkpoint.unlink()  # dozens of trainings would fill the disk
        with self.lock, (self.work / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            self.rows[step.name] = row
        print(f"{step.name}: {row['seconds']:.0f} s", flush=True)
        return row

    def run_all(self, steps: Iterable[Step], jobs: int) -> None:
        """Run steps that do not need each other, `jobs` at a time; after a failure no further ones are begun.

        Raises:
            UserError: as `run`.
        """
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(self.run, step) for step in steps]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also when the user stops it
                pool.shutdown(wait=False, cancel_futures=True)
            for future in done:
                future.result()


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every comparison can be told."""
    parser.add_argument("-preset", default="vit_nano")
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-j", type=int, default=2, help="trainings side by side")
    parser.add_argument("--set", nargs="+", default=[])


def mean_spread(values: list[float]) -> str:
    """Mean and standard deviation (n - 1) over repetitions, as "0.512 +- 0.034"."""
    return f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{np.mean(values):.3f}"
