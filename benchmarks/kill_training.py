"""Trainings that are killed (SIGKILL) at random moments, most of them while a checkpoint is written: does --c go on?

python benchmarks/kill_training.py WORK [-n 20] [--seed 0]

Two trainings of a tiny network on phantoms on the CPU, segmentation and staging, take turns. After each kill the
newest checkpoint that can be read is taken down, `--c` goes on until it has trained an epoch, and the weights and the
optimiser that it loaded are compared with those of that checkpoint. The table goes to WORK/kills.md.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nnunetv2.run.run_training import run_training_entry

from nnunet_fratmae.checkpoints import BEST, FINAL, LATEST, PREVIOUS, choose_checkpoint
from nnunet_fratmae.staging_trainer import FratMAEStagingTrainer
from nnunet_fratmae.trainer import FratMAETrainer

SETTINGS = (
    "token_patch=[8,16,16] finetune.patch=[16,32,48] finetune.batch_size=2 finetune.epochs=2000 finetune.iterations=1 "
    "finetune.val_iterations=1 wholebody.grid=[32,48,64] staging.epochs=2000 staging.patience=null staging.workers=0 "
    "staging.target=tracer"
)
TRAININGS = {"segmentation": ("3d_fullres", FratMAETrainer), "staging": ("wholebody", FratMAEStagingTrainer)}
AIMED, SAVING = 0.8, 0.06  # share of the kills that wait for a checkpoint to be written; seconds that it takes
LONGEST = 400  # seconds until something is written, on a machine that is shared


def digest(state: Any) -> str:
    """A number of all tensors and values in nested dictionaries and lists."""
    total = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            total.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict | list | tuple):
            for one in value.values() if isinstance(value, dict) else value:
                walk(one)
        else:
            total.update(repr(value).encode())

    walk(state)
    return total.hexdigest()[:16]


def train(kind: str, more: list[str]) -> None:
    """nnUNetv2_train in this process, with a checkpoint after every epoch and a line about what it has loaded."""
    configuration, trainer = TRAININGS[kind]
    use, load = trainer._use_finetune_settings, FratMAETrainer.load_checkpoint

    def save_often(self: FratMAETrainer) -> None:
        use(self)
        self.save_every = 1

    def say(self: FratMAETrainer, *args: str) -> None:
        load(self, *args)
        weights, optimizer = self.bare_network().state_dict(), self.optimizer.state_dict()["state"]
        print("LOADED", self.current_epoch, digest(weights), digest(optimizer), flush=True)

    trainer._use_finetune_settings, FratMAETrainer.load_checkpoint = save_often, say
    sys.argv = ["nnUNetv2_train", "7", configuration, "0", "-tr", trainer.__name__, "-p", "FratMAEPlans", "-device",
                "cpu", *more]  # fmt: skip
    run_training_entry()


def start(kind: str, more: list[str], log: Path) -> int:
    """The number of a forked process that trains, so that nothing has to be imported again; its output is in `log`."""
    sys.stdout.flush()
    log.write_text("", encoding="utf-8")  # here, or what the last process said would be taken for what this one says
    if process := os.fork():
        return process
    output = os.open(log, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        train(kind, more)
    except BaseException as error:  # noqa: BLE001 - this process must not go on with the parent's work
        print(f"ENDED {error!r}", flush=True)
    finally:
        os._exit(1)


def wait_for(condition: Callable[[], Any], process: int, log: Path) -> None:
    """Until `condition()` holds; a training that ends by itself is a failure."""
    end = time.monotonic() + LONGEST
    while not condition():
        if os.waitpid(process, os.WNOHANG)[0] or time.monotonic() > end:
            sys.exit(f"the training ended or hung:\n{log.read_text(encoding='utf-8')[-3000:]}")
        time.sleep(0.001)


def prepare(work: Path) -> None:
    """nnU-Net's folders below `work`, and in them eight planned phantoms."""
    for name in ("raw", "preprocessed", "results"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if not any((work / "preprocessed").iterdir()):
        for command in ("fratmae_phantom -d 7 -n 8 --seed 1 --spacing 10 11 12",
                        f"fratmae_plan_and_preprocess -d 7 -preset vit_nano -np 1 --set {SETTINGS}"):  # fmt: skip
            program, *rest = command.split()
            subprocess.run([str(Path(sys.executable).parent / program), *rest], check=True)


def one_kill(work: Path, kind: str, chance: random.Random) -> tuple[str, dict[str, bool]]:
    """Go on where there is something, compare, train, kill; the row of the table and what is counted."""
    configuration, trainer = TRAININGS[kind]
    fold = work / "results" / "Dataset007_Phantom" / f"{trainer.__name__}__FratMAEPlans__{configuration}" / "fold_0"
    log = work / f"{kind}.log"

    def written() -> int:
        return (fold / LATEST).stat().st_mtime_ns if (fold / LATEST).is_file() else 0

    process = start(kind, ["--c"] if written() else [], log)
    for _ in range(chance.randint(1, 3)):
        before = written()
        wait_for(lambda before=before: written() != before, process, log)
    if chance.random() < AIMED:
        wait_for(lambda: any(fold.glob(".partial_*checkpoint*")), process, log)
        time.sleep(chance.random() * SAVING)
    else:
        time.sleep(chance.random())
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    writing = any(fold.glob(".partial_*checkpoint*"))
    names = [name for name in (FINAL, LATEST, PREVIOUS, BEST) if (fold / name).is_file()]
    asked = next(fold / name for name in (FINAL, LATEST, BEST) if (fold / name).is_file())  # nnU-Net's order
    chosen, checkpoint, notes = choose_checkpoint(asked)
    saved = [digest(checkpoint["network_weights"]), digest(checkpoint["optimizer_state"]["state"])]
    process = start(kind, ["--c"], log)
    wait_for(lambda: re.search("LOADED(?s:.*)(Epoch time|val_losses)", log.read_text(encoding="utf-8")), process, log)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    epoch, *loaded = re.search(r"LOADED (\d+) (\w+) (\w+)", log.read_text(encoding="utf-8")).groups()
    is_equal = loaded == saved and int(epoch) == checkpoint["current_epoch"]
    there = ", ".join(name[11:-4] for name in names)
    row = (f"| {kind} | {'yes' if writing else 'no'} | {there} | {chosen.name[11:-4]}, after epoch {int(epoch) - 1} | "
           f"{'equal' if is_equal else 'DIFFERENT'} |")  # fmt: skip
    return row, {"while writing": writing, "fell back": bool(notes), "equal": is_equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("-n", type=int, default=20, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work, chance = args.work.resolve(), random.Random(args.seed)
    prepare(work)
    counts = {"while writing": 0, "fell back": 0, "equal": 0}
    rows = ["| kill | training | a checkpoint was being written | there | goes on from | weights and optimiser |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for number in range(1, args.n + 1):
        row, found = one_kill(work, list(TRAININGS)[number % 2], chance)
        counts = {name: count + found[name] for name, count in counts.items()}
        rows.append(f"| {number} {row}")
        print(rows[-1], flush=True)
        last = f"{number} kills; " + ", ".join(f"{name}: {count}" for name, count in counts.items())
        last += f". torch {torch.__version__}, seed {args.seed}, {os.cpu_count()} cores."
        (work / "kills.md").write_text("\n".join([*rows, "", last, ""]), encoding="utf-8")
    print(last)


if __name__ == "__main__":
    for name in ("raw", "preprocessed", "results"):
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve() / name
        if os.environ.get(f"nnUNet_{name}") != str(folder):  # nnU-Net reads them when it is imported
            os.environ[f"nnUNet_{name}"] = str(folder)
            again = True
    if "again" in globals():
        os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
        os.environ.pop("FRATMAE_PRETRAINED", None)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
