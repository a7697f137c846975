"""fratmae_pretrain as a process: on two processes, and killed at random moments."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
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
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
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


@pytest.fixture(scope="module")
def half_told(phantoms, tmp_path_factory) -> dict[str, str]:
    """The phantoms of which every second one is without metadata, as nnUNet_preprocessed."""
    folder = tmp_path_factory.mktemp("half_told")
    (source,) = phantoms.preprocessed.glob("Dataset007_*")
    shutil.copytree(source, folder / source.name)
    table = folder / source.name / "clinical.csv"
    head, *rows = table.read_text(encoding="utf-8").splitlines(keepends=True)
    table.write_text(head + "".join(rows[::2]), encoding="utf-8")
    return {"nnUNet_preprocessed": str(folder)}


@pytest.fixture(scope="module")
def aligned(phantoms, half_told, text_tower, tmp_path_factory) -> tuple[str, Path]:
    """A command with text whose batch of 4 is 2 passes of 2 patches, and what it leaves in one process."""
    command = ("fratmae_pretrain -d 7 -device cpu -o {folder} -num_gpus {world} --set pretrain.text_weights=null "
               f"pretrain.text_tower={text_tower} pretrain.batch_size=4 pretrain.patches_per_case=2 pretrain.epochs=1 "
               "pretrain.micro_batch_size={micro}")  # fmt: skip
    folder = tmp_path_factory.mktemp("aligned") / "one"
    phantoms.run(command.format(folder=folder, world=1, micro=2), **half_told)
    return command, folder


def run_under_srun(workspace, command: str, tasks: int, variables: dict[str, str]) -> None:
    """The tasks of a SLURM step on one node, with the variables that srun gives them."""
    program, *arguments = command.split()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    step = {"NTASKS": tasks, "STEP_NUM_TASKS": tasks, "NTASKS_PER_NODE": tasks, "NNODES": 1, "NODEID": 0,
            "JOB_ID": 4321, "JOB_NAME": "pretrain"}  # fmt: skip
    started = []
    for task in range(tasks):
        slurm = {f"SLURM_{k}": str(v) for k, v in (step | {"PROCID": task, "LOCALID": task}).items()}
        started.append(subprocess.Popen(
            [str(Path(sys.executable).parent / program), *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            env={**os.environ, **workspace.variables, **variables, **slurm, **address},
        ))  # fmt: skip
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()[-2000:]


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("srun", marks=pytest.mark.slow)])
def test_two_processes_of_a_launcher_and_two_passes_are_one_process(phantoms, aligned, half_told, tmp_path, launcher):
    """Accumulation, gathered negatives and cases without text at once: what one process makes of the joint passes."""
    command, one = aligned
    command = command.format(folder=tmp_path / "two", world=2, micro=1)
    if launcher == "torchrun":
        program, arguments = command.split(" ", 1)
        program = Path(sys.executable).parent / program
        output = phantoms.run(f"torchrun --standalone --nproc_per_node 2 {program} {arguments}", **half_told)
        assert output.count("next: FRATMAE_PRETRAINED") == 1, "one process speaks"
    else:
        run_under_srun(phantoms, command, 2, half_told)
    (a,), (b,) = metrics(one), metrics(tmp_path / "two")
    assert a["train_text"] > 0 and a["train_text"] == pytest.approx(b["train_text"], rel=1e-3)
    assert a["held_out_PET"] == pytest.approx(b["held_out_PET"], rel=1e-3)
    for name in ("encoders.safetensors", "context_align.safetensors"):
        expected, found = (load_file(folder / name) for folder in (one, tmp_path / "two"))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=2e-4, rtol=1e-2, msg=lambda m, key=key: f"{key}: {m}")


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
