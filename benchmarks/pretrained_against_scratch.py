"""Validation Dice of FratMAETrainer with pretrained encoders, from scratch, and of a fixed SUV threshold.

python benchmarks/pretrained_against_scratch.py STUDIES WORK_FOLDER [--set KEY=VALUE ...]

STUDIES has one folder a case with CTres.nii.gz, SUV.nii.gz and SEG.nii.gz. All steps are the commands a user types;
pretraining leaves out the validation cases of fold 0; both trainings have the same budget. Prints the seconds of every
step and a table over the validation cases, and writes both to WORK_FOLDER/result.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_fratmae.demo import run_logged
from nnunet_fratmae.evaluation import THRESHOLD, dice, threshold_mask

DATASET_ID = 903
# A budget for two CPU cores, the same for both arms
SETTINGS = [
    "finetune.batch_size=2", "finetune.epochs=8", "finetune.iterations=60", "finetune.val_iterations=4",
    "finetune.learning_rate=5e-4", "pretrain.epochs=25", "pretrain.patches_per_case=4", "pretrain.batch_size=8",
    "pretrain.learning_rate=5e-4",
]  # fmt: skip


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def validation_dice(results: Path) -> dict[str, float]:
    """Dice of every validation case from nnU-Net's own summary.json."""
    (summary,) = results.glob("*/FratMAETrainer__*/fold_0/validation/summary.json")
    cases = json.loads(summary.read_text())["metric_per_case"]
    return {Path(c["prediction_file"]).name.removesuffix(".nii.gz"): c["metrics"]["1"]["Dice"] for c in cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("-preset", default="vit_tiny")
    parser.add_argument("-device", default="cpu")
    parser.add_argument("--set", nargs="+", default=[])
    args = parser.parse_args()
    work, studies = args.work.resolve(), args.studies.resolve()
    folders = {f"nnUNet_{name}": work / name for name in ("raw", "preprocessed", "results")}
    for folder in (*folders.values(), work / "scratch", work / "logs"):
        folder.mkdir(parents=True)
    environment = {**os.environ, **{k: str(v) for k, v in folders.items()}, "nnUNet_def_n_proc": "2"}
    environment.setdefault("nnUNet_n_proc_DA", "2")
    environment.pop("FRATMAE_PRETRAINED", None)
    pretraining = work / "pretraining"
    train = f"nnUNetv2_train {DATASET_ID} 3d_fullres 0 -tr FratMAETrainer -p FratMAEPlans -device {args.device}"
    steps = {
        "convert": (f"fratmae_convert_pairs -i {shlex.quote(str(studies))} -d {DATASET_ID} -n Studies "
                    "--ct CTres.nii.gz --pet SUV.nii.gz --seg SEG.nii.gz", {}),
        "plan_and_preprocess": (f"fratmae_plan_and_preprocess -d {DATASET_ID} -preset {args.preset} "
                                f"--set {' '.join(SETTINGS + args.set)}", {}),
        "pretrain": (f"fratmae_pretrain -d {DATASET_ID} -m fratmae_notext -f 0 -device {args.device} "
                     f"-o {pretraining}", {}),
        "train_pretrained": (train, {"FRATMAE_PRETRAINED": str(pretraining)}),
        "train_scratch": (train, {"nnUNet_results": str(work / "scratch")}),
    }  # fmt: skip
    seconds = {}
    for name, (command, variables) in steps.items():
        start = time.monotonic()
        run_logged(command, environment | variables, work / "logs" / f"{name}.log")
        seconds[name] = round(time.monotonic() - start, 1)
    raw = folders["nnUNet_raw"] / f"Dataset{DATASET_ID}_Studies"
    pretrained, scratch = validation_dice(work / "results"), validation_dice(work / "scratch")
    table = {
        case: {
            "pretrained": pretrained[case],
            "scratch": scratch[case],
            "threshold": dice(threshold_mask(read(raw / "imagesTr" / f"{case}_0001.nii.gz")),
                              read(raw / "labelsTr" / f"{case}.nii.gz") > 0),
        }
        for case in sorted(pretrained)
    }  # fmt: skip
    arms = ("pretrained", "scratch", "threshold")
    mean = {arm: float(np.nanmean([row[arm] for row in table.values()])) for arm in arms}
    print(f"{'case':16}{'pretrained':>12}{'scratch':>12}{f'SUV > {THRESHOLD}':>12}")
    for case, row in (table | {"mean": mean}).items():
        print(f"{case:16}" + "".join(f"{value:12.3f}" for value in row.values()))
    print(f"pretrained / scratch: {mean['pretrained'] / mean['scratch']:.3f}")
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    machine = {"cpu_cores": os.cpu_count(), "machine": platform.machine(), "device": args.device}
    machine["torch"] = version("torch")
    result = {"settings": SETTINGS + args.set, "preset": args.preset, "machine": machine, "seconds": seconds,
              "dice": table, "mean": mean}  # fmt: skip
    (work / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
