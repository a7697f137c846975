"""The whole way once on the embedded phantom, by the commands a user types: `python -m nnunet_fratmae.demo FOLDER`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.tables import csv_text

TRAIN_ID, TEST_ID = 901, 902
# So small that two CPU cores need a few minutes; a real training leaves all this to the planner.
TRAIN_CASES, TEST_CASES = 16, 2
SPACING = "8 8 10"
SETTINGS = (
    "token_patch=[8,16,16] finetune.patch=[16,32,48] finetune.batch_size=4 finetune.epochs=5 finetune.iterations=30 "
    "finetune.val_iterations=4 finetune.learning_rate=1e-3 finetune.foreground=0.5 "
    "pretrain.epochs=4 pretrain.batch_size=4 pretrain.patches_per_case=1 pretrain.learning_rate=1e-3"
)


def commands(folder: Path) -> list[str]:
    """The commands of the demo, in order."""
    test_images = shlex.quote(str(folder / "raw" / f"Dataset{TEST_ID}_Phantom" / "imagesTr"))
    pretraining, prediction = (shlex.quote(str(folder / name)) for name in ("pretraining", "prediction"))
    return [
        f"fratmae_phantom -d {TRAIN_ID} -n {TRAIN_CASES} --seed 1 --spacing {SPACING}",
        f"fratmae_phantom -d {TEST_ID} -n {TEST_CASES} --seed 2 --spacing {SPACING}",
        f"fratmae_plan_and_preprocess -d {TRAIN_ID} -preset vit_tiny --set {SETTINGS}",
        f"fratmae_pretrain -d {TRAIN_ID} -m fratmae_notext -device cpu -o {pretraining}",
        f"nnUNetv2_train {TRAIN_ID} 3d_fullres 0 -tr FratMAETrainer -p FratMAEPlans -device cpu",
        f"nnUNetv2_predict -d {TRAIN_ID} -i {test_images} -o {prediction} -c 3d_fullres -f 0 "
        "-tr FratMAETrainer -p FratMAEPlans -device cpu --disable_tta -npp 1 -nps 1",
    ]


def write_split(raw: Path) -> None:
    """One validation case instead of a fifth of all, to be quick; nnU-Net's planner takes this file over."""
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (raw / "labelsTr").iterdir())
    (raw / "splits_final.json").write_text(json.dumps([{"train": cases[:-1], "val": cases[-1:]}]), encoding="utf-8")


def run_logged(command: str, environment: dict[str, str], log: Path) -> None:
    """Run one command with its output in a file; the terminal shows the command and the seconds.

    Raises:
        UserError: it failed; the message has the last lines of its output.
    """
    print(f"$ {command}", flush=True)
    program, *rest = shlex.split(command)
    program = shutil.which(program, path=str(Path(sys.executable).parent)) or program  # of this environment
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen([program, *rest], stdout=output, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            time.sleep(0.5)
            if sys.stdout.isatty():
                print(f"\r  {time.monotonic() - start:4.0f} s", end="", flush=True)
    print(f"\r  {time.monotonic() - start:4.0f} s", flush=True)
    if process.returncode:
        last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise UserError(f"`{command}` failed (all of its output: {log}):\n{last}")


def summarise(folder: Path) -> None:
    """results.csv and a picture of every test case."""
    # Here and not above: only the last step needs them
    import numpy as np

    from nnunet_fratmae.evaluation import THRESHOLD, dice, threshold_mask
    from nnunet_fratmae.figures import load, plot_prediction

    raw = folder / "raw" / f"Dataset{TEST_ID}_Phantom"
    rows = []
    for prediction in sorted((folder / "prediction").glob("*.nii.gz")):
        case = prediction.name.removesuffix(".nii.gz")
        pet, truth = raw / "imagesTr" / f"{case}_0001.nii.gz", raw / "labelsTr" / prediction.name
        true = load(truth)[0] > 0
        row = {
            "case": case,
            "lesion voxels": int(true.sum()),
            "Dice FratMAE": round(dice(load(prediction)[0] > 0, true), 3),
            f"Dice SUV > {THRESHOLD}": round(dice(threshold_mask(load(pet)[0]), true), 3),
        }
        rows.append(row)
        title = f"{case}: Dice {row['Dice FratMAE']:.2f}; SUV > {THRESHOLD} alone {row[f'Dice SUV > {THRESHOLD}']:.2f}"
        ct = raw / "imagesTr" / f"{case}_0000.nii.gz"
        plot_prediction(ct, pet, truth, prediction, folder / f"{case}.png", title)
    mean = {name: round(float(np.nanmean([row[name] for row in rows])), 3) for name in rows[0] if "Dice" in name}
    rows.append({"case": "mean", "lesion voxels": "", **mean})
    (folder / "results.csv").write_text(csv_text(list(rows[0]), rows), encoding="utf-8")
    for row in (rows[0].keys(), *(row.values() for row in rows)):
        print("  " + "".join(f"{value!s:>16}" for value in row))


def main(folder: Path) -> None:
    """Run everything below `folder`, which is made anew."""
    start = time.monotonic()
    if folder.exists() and any(folder.iterdir()) and not (folder / "logs").is_dir():
        raise UserError(f"{folder} holds something else than an earlier demo; name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    paths = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    for path in (*paths.values(), folder / "logs"):
        Path(path).mkdir(parents=True)
    environment = {
        **os.environ,
        **paths,
        "FRATMAE_PRETRAINED": str(folder / "pretraining"),
        "nnUNet_n_proc_DA": "1",  # two cores: more processes would only wait for each other
        "nnUNet_def_n_proc": "1",
    }
    for number, command in enumerate(commands(folder), start=1):
        run_logged(command, environment, folder / "logs" / f"{number}_{command.split()[0]}.log")
        if number == 1:
            write_split(folder / "raw" / f"Dataset{TRAIN_ID}_Phantom")
    summarise(folder)
    print(f"\nall of it took {time.monotonic() - start:.0f} s")
    print(f"pictures  {folder}/phantom_*.png  (lesions found, missed and invented on unseen phantoms)")
    print(f"          {folder}/pretraining/reconstruction.png and progress.png")
    print(f"table     {folder}/results.csv")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output").resolve())
    except UserError as error:
        sys.exit(f"demo: error: {error}")
