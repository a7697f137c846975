"""Checkpoints of trainers outlive a kill, a full disk and a file that rots; the end of a training that cannot go on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnunet_fratmae.base.command import UserError, check_device
from nnunet_fratmae.base.locks import LOCK_NAME, alone_in
from nnunet_fratmae.checkpoints import BEST, FINAL, LATEST, PREVIOUS
from nnunet_fratmae.ending import one_line
from nnunet_fratmae.trainer import FratMAETrainer
from plans.store import Study
from tests.test_trainer import batch


class Killed(BaseException):
    """What SIGKILL is to the code after it: it never runs."""


@pytest.fixture
def trained(make_trainer):
    """A trainer with three checkpoints behind it: latest of epoch 2, previous of epoch 1, best of epoch 0."""
    trainer = make_trainer()
    for epoch, names in enumerate(([BEST, LATEST], [LATEST], [LATEST])):
        trainer.current_epoch = epoch
        trainer.train_step(batch(trainer))
        for name in names:
            trainer.save_checkpoint(f"{trainer.output_folder}/{name}")
    return trainer


def resumed(make_trainer, name: str) -> FratMAETrainer:
    trainer = make_trainer()
    trainer.was_initialized = False
    trainer.load_checkpoint(f"{trainer.output_folder}/{name}")
    return trainer


def log_of(trainer: FratMAETrainer) -> str:
    return Path(trainer.log_file).read_text(encoding="utf-8")


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) if isinstance(a, list) else a == b


def test_a_training_goes_on_with_the_weights_and_the_optimiser_of_the_checkpoint(trained, make_trainer):
    again = resumed(make_trainer, LATEST)
    assert again.current_epoch == 3 and same(again.network.state_dict(), trained.network.state_dict())
    assert same(again.optimizer.state_dict(), trained.optimizer.state_dict())
    assert "WARNING" not in log_of(again)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(share, trained, make_trainer, monkeypatch):
    folder, original = Path(trained.output_folder), torch.save
    before = {name: (folder / name).read_bytes() for name in (LATEST, PREVIOUS, BEST)}

    def killed_midway(state, file):
        original(state, file)
        content = Path(file).read_bytes()
        Path(file).write_bytes(content[: int(share * len(content))])
        raise Killed

    monkeypatch.setattr(torch, "save", killed_midway)
    for name in (LATEST, BEST):
        with pytest.raises(Killed):
            trained.save_checkpoint(str(folder / name))
    monkeypatch.undo()
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_process_that_is_killed_while_writing_leaves_the_one_before(tmp_path):
    """By the kernel, and the next writer clears away what the killed one left."""
    program = (
        "import os, signal, sys, torch; from pathlib import Path; from nnunet_fratmae.base.weights import *\n"
        "path = Path(sys.argv[1])\n"
        "with whole_checkpoint(path) as partial: torch.save({'epoch': 1}, partial)\n"
        "with whole_checkpoint(path) as partial:\n"
        "    partial.write_bytes(path.read_bytes()[:100]); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / LATEST
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 2
    from nnunet_fratmae.base.weights import read_checkpoint, whole_checkpoint

    assert read_checkpoint(path) == {"epoch": 1}
    with whole_checkpoint(path) as partial:
        torch.save({"epoch": 2}, partial)
    assert read_checkpoint(path) == {"epoch": 2} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "asked, damaged, goes_on_from, epoch",
    [
        (LATEST, [LATEST], PREVIOUS, 2),
        (LATEST, [LATEST, PREVIOUS], BEST, 1),
        (FINAL, [FINAL], LATEST, 3),
        (FINAL, [FINAL, LATEST, PREVIOUS], BEST, 1),
    ],
)
@pytest.mark.parametrize("how", ["cut", "bit", "empty"])
def test_where_a_checkpoint_cannot_be_read_the_one_before_takes_its_place(
    how, asked, damaged, goes_on_from, epoch, trained, make_trainer
):
    for name in damaged:
        path = Path(trained.output_folder) / name
        content = bytearray(path.read_bytes() if path.is_file() else b"PK")
        content[len(content) // 2] ^= 4
        path.write_bytes({"cut": content[:2000], "bit": content, "empty": b""}[how])
    again = resumed(make_trainer, asked)
    assert again.current_epoch == epoch
    assert f"WARNING: {goes_on_from} takes its place, after epoch {epoch - 1}" in log_of(again)
    assert f"{asked}: cannot be read" in log_of(again)


def test_without_one_that_can_be_read_it_is_one_line(trained, make_trainer):
    folder = Path(trained.output_folder)
    for name in (LATEST, PREVIOUS, BEST):
        (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read.*nor can 2 earlier ones") as error:
        resumed(make_trainer, LATEST)
    assert "\n" not in str(error.value)


def test_the_best_has_no_other_in_its_place(trained, make_trainer):
    """--val_best asks for this one; another would be validated under its name."""
    (Path(trained.output_folder) / BEST).write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint_best.pth: cannot be read"):
        resumed(make_trainer, BEST)


def test_the_checkpoint_is_named_as_nnunet_and_its_main_branch_do(trained):
    path = f"{trained.output_folder}/{LATEST}"
    trained.load_checkpoint(path)
    trained.load_checkpoint(filename_or_checkpoint=path)
    trained.load_checkpoint(checkpoint=path)


def test_checkpoints_of_an_earlier_training_are_no_previous_ones(trained, make_trainer):
    folder = Path(trained.output_folder)
    anew = make_trainer()
    anew.save_checkpoint(str(folder / LATEST))
    assert not (folder / PREVIOUS).exists(), "it would be another training's"
    anew.save_checkpoint(str(folder / LATEST))
    assert (folder / PREVIOUS).is_file()
    anew.save_checkpoint(str(folder / FINAL))
    assert not (folder / PREVIOUS).exists(), "at the end the final one is whole"


def test_a_checkpoint_of_another_network_is_one_line(trained, make_trainer):
    path = Path(trained.output_folder) / LATEST
    state = torch.load(path, weights_only=False)
    del state["network_weights"]["encoders.CT.norm.weight"]
    torch.save(state, path)
    with pytest.raises(UserError, match="does not fit the network .*missing encoders.CT.norm.weight"):
        resumed(make_trainer, LATEST)


def test_a_full_disk_ends_a_training_in_one_line_and_leaves_what_was_there(trained, monkeypatch):
    path = Path(trained.output_folder) / LATEST
    before = path.read_bytes()

    def full(state, file):
        Path(file).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:815] . PytorchStreamWriter failed writing file data/3")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="is the disk full.*The last checkpoint is whole") as error:
        trained.save_checkpoint(str(path))
    assert "\n" not in str(error.value) and path.read_bytes() == before
    assert not list(path.parent.glob(".partial*"))


# ------------------------------------------------------------------------------------------------------- the end of it


def test_a_second_process_in_the_folder_is_refused_and_the_first_frees_it(tmp_path):
    program = ("import sys; from pathlib import Path; from nnunet_fratmae.base.locks import alone_in\n"
               "with alone_in(Path(sys.argv[1])): print('in')\n")  # fmt: skip

    def other() -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", program, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")

    with alone_in(tmp_path):
        second = other()
        assert second.returncode and "another process is writing there" in second.stderr
    assert other().stdout == "in\n" and not (tmp_path / LOCK_NAME).exists()


def case_file(path: Path) -> Path:
    blosc2.asarray(np.random.default_rng(0).random((2, 8, 24, 40), np.float32), urlpath=str(path))
    return path


def test_a_damaged_case_ends_a_training_with_its_name(tmp_path, capsys):
    whole, cut = case_file(tmp_path / "a.b2nd"), case_file(tmp_path / "b.b2nd")
    assert whole.is_file()
    cut.write_bytes(cut.read_bytes()[:5000])
    says = "b.b2nd: cannot be read.*it is damaged"
    with pytest.raises(UserError, match=says) as error, one_line(tmp_path, [tmp_path]):
        raise RuntimeError("One or more background workers are no longer alive. Exiting. Please check the print "
                           "statements above for the actual error message")
    assert "\n" not in str(error.value) and "print statements" not in str(error.value)
    window = (slice(0, 8), slice(0, 24), slice(0, 40))
    with pytest.raises(UserError, match="b.b2nd: is damaged or cut off"):
        Study(cut, "b", (0, 1)).read_window(window)


def test_a_killed_worker_is_called_one(tmp_path):
    class Process:
        exitcode = -signal.SIGKILL

    class Loader:
        _processes = [Process]

    says = "was killed, most likely for want of memory"
    with pytest.raises(UserError, match=says), one_line(None, [], [Loader]):
        raise RuntimeError("One or more background workers are no longer alive.")


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError), one_line("T"):
        raise KeyError("a bug")


def test_a_device_that_is_not_there_is_one_line(make_trainer, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("mps", "cuda"):
        with pytest.raises(UserError, match=f"-device {device}: .*say -device cpu"):
            check_device(device)
        with pytest.raises(UserError, match=f"-device {device}"):
            FratMAETrainer({}, "3d_fullres", 0, {}, torch.device(device))
