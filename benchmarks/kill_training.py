"""Trainings that are killed (SIGKILL) at random moments, most of them while a checkpoint is written: does --c go on?

python benchmarks/kill_training.py WORK [-n 20] [--seed 0]

Two trainings of a tiny network on phantoms on the CPU, segmentation and staging, take turns. After each kill the
newest checkpoint that can be read is taken down, `--c` goes on until it has trained an epoch, and the weights and the
optimiser that it loaded are compared with those of that checkpoint. The table goes to WORK/kills.md.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from nnunet_fratmae.checkpoints import BEST, FINAL, LATEST, PREVIOUS, choose_checkpoint

SETTINGS = (
    "token_patch=[8,16,16] finetune.patch=[16,32,48] finetune.batch_size=2 finetune.epochs=2000 finetune.iterations=1 "
    "finetune.val_iterations=1 wholebody.grid=[32,48,64] staging.epochs=2000 staging.patience=null staging.workers=0"
)
TRAININGS = {
    "segmentation": ("3d_fullres", "FratMAETrainer"),
    "staging": ("wholebody", "FratMAEStagingTrainer"),
}
AIMED, SAVING = 0.8, 0.06  # share of the kills that wait for a checkpoint to be written; seconds that it takes
# Saves at every epoch, and says what it has loaded: in the child only, nnU-Net and the trainers are as they are
CHILD = """
import sys, torch
from nnunetv2.run import run_training as stock
from nnunet_fratmae.trainer import FratMAETrainer
from nnunet_fratmae.staging_trainer import FratMAEStagingTrainer

def digest(state):
    import hashlib
    total = hashlib.sha256()
    def walk(value):
        if isinstance(value, torch.Tensor): total.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict): [walk(value[key]) for key in value]
        elif isinstance(value, (list, tuple)): [walk(one) for one in value]
        else: total.update(repr(value).encode())
    walk(state)
    return total.hexdigest()[:16]

for trainer in (FratMAETrainer, FratMAEStagingTrainer):
    def use(self, before=trainer._use_finetune_settings):
        before(self); self.save_every = 1
    trainer._use_finetune_settings = use
def load(self, *args, before=FratMAETrainer.load_checkpoint, **kwargs):
    before(self, *args, **kwargs)
    weights = self.bare_network().state_dict()
    print("LOADED", self.current_epoch, digest(weights), digest(self.optimizer.state_dict()["state"]), flush=True)
FratMAETrainer.load_checkpoint = load
if __name__ == "__main__":
    if sys.argv[1:2] == ["digest"]:
        checkpoint = torch.load(sys.argv[2], weights_only=False)
        print("SAVED", checkpoint["current_epoch"], digest(checkpoint["network_weights"]),
              digest(checkpoint["optimizer_state"]["state"]))
    else:
        stock.run_training_entry()
"""


def start(work: Path, kind: str, more: list[str]) -> tuple[subprocess.Popen, Path]:
    """A training in a session of its own, and the file of its output."""
    configuration, trainer = TRAININGS[kind]
    command = [sys.executable, "-u", str(work / "child.py"), "7", configuration, "0", "-tr", trainer, "-p",
               "FratMAEPlans", "-device", "cpu", *more]  # fmt: skip
    log = work / "log.txt"
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True), log


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the training and the processes that load its patches."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition, process: subprocess.Popen, log: Path, seconds: float = 240) -> None:
    """Until `condition()` holds; a training that ends by itself is a failure."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            kill(process) if process.poll() is None else None
            sys.exit(f"the training ended or hung:\n{log.read_text()[-3000:]}")
        time.sleep(0.0005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("-n", type=int, default=20, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work, chance = args.work.resolve(), random.Random(args.seed)
    for name in ("raw", "preprocessed", "results"):
        (work / name).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(work / name)
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
    os.environ.pop("FRATMAE_PRETRAINED", None)
    (work / "child.py").write_text(CHILD)
    if not any((work / "preprocessed").iterdir()):
        for command in ("fratmae_phantom -d 7 -n 8 --seed 1 --spacing 10 11 12",
                        f"fratmae_plan_and_preprocess -d 7 -preset vit_nano -np 1 --set {SETTINGS}"):  # fmt: skip
            program, *rest = command.split()
            subprocess.run([str(Path(sys.executable).parent / program), *rest], check=True)
    rows, counts = [], {"goes on": 0, "while writing": 0, "fell back": 0, "equal": 0}
    for number in range(args.n):
        kind = list(TRAININGS)[number % 2]
        row, found = one_kill(work, kind, chance)
        counts["goes on"] += 1
        for name, value in found.items():
            counts[name] += value
        rows.append(f"| {number + 1} | {kind} | {row}")
        print(rows[-1], flush=True)
        head = ["| kill | training | a checkpoint was being written | there | goes on from | weights and optimiser |",
                "|---|---|---|---|---|---|"]  # fmt: skip
        last = ", ".join(f"{name}: {count}" for name, count in counts.items())
        last = f"{len(rows)} kills; {last}. torch {torch.__version__}, seed {args.seed}."
        (work / "kills.md").write_text("\n".join([*head, *rows, "", last, ""]))
    print(last)


def one_kill(work: Path, kind: str, chance: random.Random) -> tuple[str, dict[str, bool]]:
    """Train, kill, go on; the rest of the row and what is counted."""
    configuration, trainer = TRAININGS[kind]
    fold = work / "results" / "Dataset007_Phantom" / f"{trainer}__FratMAEPlans__{configuration}" / "fold_0"
    latest = fold / LATEST

    def written() -> int:
        return latest.stat().st_mtime_ns if latest.is_file() else 0

    process, log = start(work, kind, ["--c"] if latest.is_file() else [])
    for _ in range(chance.randint(1, 3)):
        before = written()
        wait_for(lambda before=before: written() != before, process, log)
    if chance.random() < AIMED:
        wait_for(lambda: any(fold.glob(".partial_*checkpoint*")), process, log)
        time.sleep(chance.random() * SAVING)
    else:
        time.sleep(chance.random())
    kill(process)
    writing = any(fold.glob(".partial_*checkpoint*"))
    names = [name for name in (FINAL, LATEST, PREVIOUS, BEST) if (fold / name).is_file()]
    asked = next(fold / name for name in (FINAL, LATEST, BEST) if (fold / name).is_file())  # nnU-Net's order
    chosen, checkpoint, notes = choose_checkpoint(asked)
    command = [sys.executable, str(work / "child.py"), "digest", str(chosen)]
    saved = subprocess.run(command, text=True, check=True, stdout=subprocess.PIPE).stdout.split()[-3:]
    process, log = start(work, kind, ["--c"])
    wait_for(lambda: re.search("LOADED(?s:.*)(Epoch time|val_losses)", log.read_text()), process, log)
    kill(process)
    loaded = re.search(r"LOADED (\d+) (\w+) (\w+)", log.read_text()).groups()
    is_equal = list(loaded) == saved
    row = (f"{'yes' if writing else 'no'} | {', '.join(n[11:-4] for n in names)} | {chosen.name[11:-4]}, after epoch "
           f"{checkpoint['current_epoch'] - 1} | {'equal' if is_equal else 'DIFFERENT'} |")  # fmt: skip
    return row, {"while writing": writing, "fell back": bool(notes), "equal": is_equal}


if __name__ == "__main__":
    main()
