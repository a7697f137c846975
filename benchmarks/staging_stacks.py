"""Early or advanced stage from whole bodies: coronal against axial stacks, pretrained and from scratch.

python benchmarks/staging_stacks.py WORK [--cases N] [--folds N] [--set KEY=VALUE ...]

Phantoms with Hodgkin lymphoma have a stage; the others only serve pretraining, which sees all but the validation cases
of the fold. Early stopping is off, so the validation cases choose nothing. All steps are the commands that a user
types. Started again with the same arguments it goes on with what is missing; finished runs: WORK/runs.jsonl.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np
from _steps import Comparison, Row, Step, add_options, mean_spread

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.splits import make_splits
from plans.staging import RISK_OF_STAGE

DATASET_ID = 907
NAME = f"Dataset{DATASET_ID}_Phantom"
# Both stacks are 16 slices of 32 neighbouring ones of the same grid, as thick in proportion as the paper's
STACKS = {
    "coronal": "token_patch=[8,8,16] wholebody.patch=[16,64,96]",
    "axial": "token_patch=[8,8,8] wholebody.patch=[64,64,16]",
}
ARMS = ("scratch", "pretrained")
COMMON = (
    "wholebody.grid=[64,64,96] wholebody.k=2 staging.epochs=40 staging.batch_size=4 staging.learning_rate=5e-4 "
    "staging.patience=null staging.workers=0 pretrain.epochs=20 pretrain.patches_per_case=1 pretrain.batch_size=8 "
    "pretrain.learning_rate=5e-4 pretrain.workers=1"
)


def write_folds(raw: Path, folds: int) -> None:
    """splits_final.json with early and advanced stages spread evenly over the folds."""
    with (raw / "clinical.csv").open(encoding="utf-8") as file:
        risk = {row["case_id"]: RISK_OF_STAGE.get(row["stage"], "none") for row in csv.DictReader(file)}
    splits = make_splits({case: case for case in risk}, risk, folds)
    (raw / "splits_final.json").write_text(json.dumps(splits, indent=1), encoding="utf-8")


def training_row(results: Path) -> Row:
    (summary,) = results.glob("*/*/fold_*/validation/summary.json")
    found = json.loads(summary.read_text(encoding="utf-8"))
    return {"cases": found["cases"], **found["mean"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--folds", type=int, default=3)
    add_options(parser)
    args = parser.parse_args()
    todo = Comparison(args.work)
    raw = todo.work / "raw" / NAME
    convert = f"fratmae_phantom -d {DATASET_ID} -n {args.cases} --seed 3 --spacing 8 8 10 -np 2"
    todo.run(Step("convert", convert, raw))
    write_folds(raw, args.folds)
    settings = " ".join([COMMON, *map(shlex.quote, args.set)])
    stacks = {stack: {"nnUNet_preprocessed": str(todo.work / "preprocessed" / stack)} for stack in STACKS}
    for stack, sizes in STACKS.items():
        output = Path(stacks[stack]["nnUNet_preprocessed"])
        plan = f"fratmae_plan_and_preprocess -d {DATASET_ID} -preset {args.preset} -np 2 --set wholebody.stack={stack}"
        todo.run(Step(f"plan_and_preprocess_{stack}", f"{plan} {sizes} {settings}", output, stacks[stack]))
    pretrainings, trainings = [], []
    for stack, variables in stacks.items():
        for fold in range(args.folds):
            pretraining = todo.work / "pretraining" / f"{stack}_{fold}"
            pretrain = f"fratmae_pretrain -d {DATASET_ID} -m fratmae_notext -f {fold} -device {args.device}"
            pretrainings.append(Step(f"pretrain_{stack}_{fold}", f"{pretrain} -o {shlex.quote(str(pretraining))}",
                                     pretraining, variables))  # fmt: skip
            for arm in ARMS:
                output = todo.results / f"{stack}_{arm}_{fold}"
                own = {**variables, "nnUNet_results": str(output)}
                own |= {"FRATMAE_PRETRAINED": str(pretraining)} if arm == "pretrained" else {}
                train = f"nnUNetv2_train {DATASET_ID} wholebody {fold} -tr FratMAEStagingTrainer -p FratMAEPlans"
                train += f" -device {args.device}"
                trainings.append(Step(output.name, train, output, own, partial(training_row, output)))
    todo.run_all(pretrainings, args.j)
    todo.run_all(trainings, args.j)
    print(f"\nearly against advanced stage, {args.folds} folds\n")
    print("| stack | encoders | cases | accuracy | macro sensitivity | AUC |\n|---|---|---|---|---|---|")
    for stack in STACKS:
        for arm in ARMS:
            rows = [todo.rows[f"{stack}_{arm}_{fold}"] for fold in range(args.folds)]
            spread = {name: mean_spread([row[name] if row[name] is not None else np.nan for row in rows])
                      for name in ("accuracy", "macro_sensitivity", "auc")}  # fmt: skip
            print(f"| {stack} | {arm} | {sum(row['cases'] for row in rows)} | {' | '.join(spread.values())} |")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"staging_stacks: error: {error}")
