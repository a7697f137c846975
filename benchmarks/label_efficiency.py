"""Few labels, many labels: FratMAETrainer pretrained and from scratch, stock nnU-Net for the same time, a threshold.

python benchmarks/label_efficiency.py WORK --studies STUDIES            (the layout of fratmae_convert_pairs)
python benchmarks/label_efficiency.py WORK --anatomy FOLDER_OF_LABEL_MAPS            (phantoms around organ maps)

Every (share of the training labels, repetition) is a fold of splits_final.json; all folds have the same validation
cases, which pretraining does not see. It sees the training cases without their labels, those of no fold's share too.
nnU-Net trains as many seconds as FratMAETrainer from scratch did on the same fold. All steps are the commands that a
user types. Started again with the same arguments it goes on with what is missing; finished runs: WORK/runs.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from _steps import Comparison, Row, Step, add_options, mean_spread

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.discovery import TRAINERS
from nnunet_fratmae.evaluation import THRESHOLD, dice, threshold_mask

DATASET_ID = 906
SHARES, REPETITIONS = (0.2, 1.0), 3
STOCK_PLANS = "nnUNetPlans"
# A budget of some three minutes of one CPU core a training, its validation included
COMMON = (
    "token_patch=[8,8,8] finetune.iterations=25 finetune.val_iterations=4 finetune.mirror_axes= pretrain.epochs=60 "
    "pretrain.batch_size=8 pretrain.learning_rate=1e-3"
)
LARGE_TUMOURS = (
    "finetune.patch=[32,32,48] finetune.batch_size=2 finetune.foreground=0.5 finetune.epochs=12 "
    "finetune.learning_rate=5e-4 pretrain.patches_per_case=4"
)
# At batch size 1, as in prediction, PyTorch's fast convolutions on a CPU begin at patches of about this width
SMALL_LESIONS = (
    "finetune.patch=[48,56,16] finetune.batch_size=3 finetune.foreground=0.75 finetune.epochs=10 "
    "finetune.learning_rate=1e-3 pretrain.patches_per_case=1"
)


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def lesion_volume(path: Path) -> float:
    """Volume of all lesions in ml."""
    label = sitk.ReadImage(str(path))
    return (sitk.GetArrayFromImage(label) > 0).sum() * np.prod(label.GetSpacing()) / 1000


def write_folds(raw: Path, validation: int, least_volume: float) -> None:
    """splits_final.json, which nnU-Net and fratmae_plan_and_preprocess take over; the same at every start."""
    labels = {path.name.removesuffix(".nii.gz"): path for path in sorted((raw / "labelsTr").iterdir())}
    draw = random.Random(0)
    fit = [case for case, path in labels.items() if lesion_volume(path) > least_volume]
    held_out = sorted(draw.sample(fit, validation))
    training = [case for case in labels if case not in held_out]
    folds = []
    for share in SHARES:
        for _ in range(REPETITIONS):
            subset = draw.sample(training, max(2, round(share * len(training))))
            folds.append({"train": sorted(subset), "val": held_out})
    (raw / "splits_final.json").write_text(json.dumps(folds, indent=1), encoding="utf-8")


def training_row(results: Path) -> Row:
    """Dice of every validation case from nnU-Net's summary.json, and the seconds of all epochs from its log."""
    (summary,) = results.glob("*/*/fold_*/validation/summary.json")
    cases = json.loads(summary.read_text(encoding="utf-8"))["metric_per_case"]
    (log,) = summary.parents[1].glob("training_log_*.txt")
    epochs = [float(s) for s in re.findall(r"Epoch time: ([\d.]+) s", log.read_text(encoding="utf-8"))]
    return {
        "dice": {Path(c["prediction_file"]).name.removesuffix(".nii.gz"): c["metrics"]["1"]["Dice"] for c in cases},
        "epochs": len(epochs),
        "training_seconds": round(sum(epochs), 1),
    }


def prepare(todo: Comparison, args: argparse.Namespace) -> Path:
    """Dataset, plans of both, pretraining; the raw dataset's folder."""
    name = "Studies" if args.studies else "Phantom"
    raw, preprocessed = (todo.work / part / f"Dataset{DATASET_ID}_{name}" for part in ("raw", "preprocessed"))
    if args.studies:
        convert = (f"fratmae_convert_pairs -i {shlex.quote(str(args.studies.resolve()))} -d {DATASET_ID} -n {name} "
                   "--keep-names --ct CTres.nii.gz --pet SUV.nii.gz --seg SEG.nii.gz --grid 6,6,6 -np 2")  # fmt: skip
    else:
        anatomy = shlex.quote(str(args.anatomy.resolve()))
        convert = f"fratmae_phantom -d {DATASET_ID} --anatomy {anatomy} --spacing 8 8 8 -np 2"
        convert += f" -n {args.cases}" if args.cases else ""
    todo.run(Step("convert", convert, raw))
    write_folds(raw, args.validation, args.least_volume)
    settings = " ".join([COMMON, LARGE_TUMOURS if args.studies else SMALL_LESIONS, *map(shlex.quote, args.set)])
    todo.run(Step("plan_and_preprocess", f"fratmae_plan_and_preprocess -d {DATASET_ID} -preset {args.preset} -np 2 "
                                         f"--set {settings}", preprocessed))  # fmt: skip
    stock = f"-d {DATASET_ID}"
    if args.stock_gb:
        stock += f" -gpu_memory_target {args.stock_gb:g} -overwrite_plans_name {STOCK_PLANS}"
    todo.run(Step("stock_plan", f"nnUNetv2_plan_experiment {stock}", preprocessed / f"{STOCK_PLANS}_3d_fullres",
                  {"nnUNet_n_proc_DA": "1"}))  # nnU-Net's planner takes it for torch's threads  # fmt: skip
    todo.run(Step("stock_preprocess", f"nnUNetv2_preprocess -d {DATASET_ID} -plans_name {STOCK_PLANS} -c 3d_fullres "
                                      "-np 2", preprocessed / f"{STOCK_PLANS}_3d_fullres"))  # fmt: skip
    pretraining = todo.work / "pretraining"
    pretrain = f"fratmae_pretrain -d {DATASET_ID} -m fratmae_notext -f 0 -device {args.device}"
    pretrain += f" -o {shlex.quote(str(pretraining))}"
    todo.run(Step("pretrain", pretrain, pretraining, {"OMP_NUM_THREADS": "2"}))  # nothing runs beside it
    return raw


def training(todo: Comparison, arm: str, fold: int, device: str, **variables: str) -> Step:
    """A training of one arm on one fold, with a results folder of its own."""
    trainer, plans = ("nnUNetTrainerTimed", STOCK_PLANS) if arm == "stock" else ("FratMAETrainer", "FratMAEPlans")
    output = todo.results / f"{arm}_{fold}"
    command = f"nnUNetv2_train {DATASET_ID} 3d_fullres {fold} -tr {trainer} -p {plans} -device {device}"
    return Step(output.name, command, output, {"nnUNet_results": str(output), **variables},
                partial(training_row, output))  # fmt: skip


def print_table(todo: Comparison, raw: Path) -> None:
    """Mean over the validation cases; +- is the spread of that mean over the repetitions."""
    folds = json.loads((raw / "splits_final.json").read_text(encoding="utf-8"))
    cases = folds[0]["val"]
    threshold = [dice(threshold_mask(read(raw / "imagesTr" / f"{case}_0001.nii.gz")),
                      read(raw / "labelsTr" / f"{case}.nii.gz") > 0) for case in cases]  # fmt: skip
    arms = {"scratch": "FratMAE from scratch", "pretrained": "FratMAE pretrained", "stock": "nnU-Net, same time"}
    print(f"\nmean Dice of {len(cases)} validation cases, {REPETITIONS} repetitions\n")
    print(f"| training labels | {' | '.join(arms.values())} | SUV > {THRESHOLD} | pretrained - scratch |")
    print("|---" * (len(arms) + 3) + "|")
    for i, share in enumerate(SHARES):
        mine = range(i * REPETITIONS, (i + 1) * REPETITIONS)
        means = {arm: [float(np.nanmean(list(todo.rows[f"{arm}_{f}"]["dice"].values()))) for f in mine] for arm in arms}
        gains = [a - b for a, b in zip(means["pretrained"], means["scratch"], strict=True)]
        sure = "" if abs(np.mean(gains)) > np.std(gains, ddof=1) else " (within the spread)"
        verdict = "helps" if np.mean(gains) > 0 else "does not help"
        print(f"| {share:.0%} ({len(folds[mine[0]]['train'])}) | {' | '.join(map(mean_spread, means.values()))} | "
              f"{np.nanmean(threshold):.3f} | {mean_spread(gains)}: {verdict}{sure} |")  # fmt: skip
    for arm, label in arms.items():
        rows = [todo.rows[f"{arm}_{fold}"] for fold in range(len(folds))]
        print(f"{label}: {np.mean([r['training_seconds'] for r in rows]):.0f} s of training, "
              f"{np.mean([r['epochs'] for r in rows]):.0f} epochs")  # fmt: skip
    print(f"pretraining, not in these seconds: {todo.rows['pretrain']['seconds']:.0f} s, once for all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--studies", type=Path)
    source.add_argument("--anatomy", type=Path)
    parser.add_argument("--cases", type=int, help="phantoms (default: one an organ map)")
    parser.add_argument("--validation", type=int, default=6, help="validation cases")
    parser.add_argument("--least_volume", type=float, default=0.0, help="ml of lesion that a validation case has more "
                        "than; the Dice of a few voxels is all or nothing")  # fmt: skip
    parser.add_argument("--stock_gb", type=float, help="memory (GB) that nnU-Net plans for (default: its own default "
                        "plans, of whose large patches a CPU core makes a handful in the time)")  # fmt: skip
    add_options(parser)
    args = parser.parse_args()
    todo = Comparison(args.work)
    raw = prepare(todo, args)
    folds, pretraining = range(len(SHARES) * REPETITIONS), str(todo.work / "pretraining")
    arms = [training(todo, "scratch", fold, args.device) for fold in folds]
    arms += [training(todo, "pretrained", fold, args.device, FRATMAE_PRETRAINED=pretraining) for fold in folds]
    todo.run_all(arms, args.j)
    trainers = f"{Path(__file__).resolve().parent / 'timed'}:{TRAINERS}"
    seconds = {fold: str(todo.rows[f"scratch_{fold}"]["training_seconds"]) for fold in folds}
    todo.run_all([training(todo, "stock", fold, args.device, nnUNet_extTrainer=trainers, NNUNET_SECONDS=seconds[fold])
                  for fold in folds], args.j)  # fmt: skip
    print_table(todo, raw)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"label_efficiency: error: {error}")
