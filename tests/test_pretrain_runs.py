"""fratmae_pretrain as a process: on two processes, and killed at random moments."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

COMMAND = "fratmae_pretrain -d 7 -m fratmae_notext -device cpu"


def metrics(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl without those that depend on the speed of the machine."""
    timing = ("seconds", "patches_per_second", "data_wait", "mfu")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timing} for row in rows]


def test_two_processes_train_as_one(phantoms, pretraining, tmp_path):
    """The encoders after two epochs are those of one process, up to rounding; the decoders' too."""
    phantoms.run(f"{COMMAND} -num_gpus 2 -o {tmp_path}/two")
    one, two = (load_file(folder / "encoders.safetensors") for folder in (pretraining, tmp_path / "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-4, rtol=1e-2)
    a, b = metrics(pretraining), metrics(tmp_path / "two")
    assert [row["held_out_PET"] for row in a] == pytest.approx([row["held_out_PET"] for row in b], rel=1e-3)


def killed_run(workspace, command: str, folder: Path, kills: int, generator: random.Random) -> int:
    """Run `command`, killing it (SIGKILL) at random moments and going on with --c; how many kills hit it."""
    program = str(Path(sys.executable).parent / command.split()[0])
    environment = {**os.environ, **workspace.variables}
    hits = 0
    while True:
        going_on = ["--c"] if (folder / "checkpoint_latest.pth").is_file() else []
        process = subprocess.Popen([program, *command.split()[1:], "-o", str(folder), *going_on], env=environment,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        if hits < kills:
            _wait_for_training(process, folder, generator)
            hits += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
            continue
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()[-2000:]
        return hits


def _wait_for_training(process: subprocess.Popen, folder: Path, generator: random.Random) -> None:
    """Until a random moment after the next checkpoint (or, one time in four, while the program is starting)."""
    latest = folder / "checkpoint_latest.pth"
    before = latest.stat().st_mtime_ns if latest.is_file() else 0
    if generator.random() > 0.25:
        while process.poll() is None and (latest.stat().st_mtime_ns if latest.is_file() else 0) == before:
            time.sleep(0.005)
    time.sleep(generator.random() * 1.5)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(phantoms, tmp_path, kills):
    command = f"{COMMAND} --set pretrain.epochs={kills + 3} pretrain.patches_per_case=2"
    phantoms.run(f"{command} -o {tmp_path}/whole")
    assert killed_run(phantoms, command, tmp_path / "killed", kills, random.Random(0)) == kills
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    for name in ("encoders.safetensors", "encoders.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
