"""Every command that an nnU-Net user types, run on real studies, with the lines that matter of what it prints.

python benchmarks/stock_commands.py WORK STUDIES            (the layout of fratmae_convert_pairs)

A short training of a small network on the CPU: what is shown is that the commands work, not what the method reaches;
tests/test_stock_workflow.py checks what they compute. All of them run in WORK, in this order, and
end up in WORK/commands.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

MODEL = "-tr FratMAETrainer -p FratMAEPlans"
PREDICT = f"nnUNetv2_predict -d 908 -c 3d_fullres -f 0 1 {MODEL} -device cpu -npp 1 -nps 1 -i input"
PLANS = "preprocessed/Dataset908_Studies/FratMAEPlans.json"
TRAINED = "results/Dataset908_Studies/FratMAETrainer__FratMAEPlans__3d_fullres"
COMMANDS = f"""
fratmae_convert_pairs -i STUDIES -d 908 -n Studies --keep-names --ct CTres.nii.gz --pet SUV.nii.gz --seg SEG.nii.gz --grid 6,6,6
fratmae_plan_and_preprocess -d 908 -preset vit_nano -np 2 --set token_patch=[8,8,8] finetune.epochs=2 finetune.iterations=25 finetune.val_iterations=2 finetune.batch_size=2 pretrain.epochs=1 pretrain.patches_per_case=1 pretrain.batch_size=4
fratmae_pretrain -d 908 -m fratmae_notext -o pretraining -device cpu
FRATMAE_PRETRAINED=pretraining nnUNetv2_train 908 3d_fullres 0 {MODEL} -device cpu --npz
FRATMAE_PRETRAINED=pretraining nnUNetv2_train 908 3d_fullres 1 {MODEL} -device cpu --npz
sed -i 's/"epochs": 2/"epochs": 3/' {PLANS}
nnUNetv2_train 908 3d_fullres 0 {MODEL} -device cpu --npz --c
nnUNetv2_train 908 3d_fullres 0 {MODEL} -device cpu --val --val_best
nnUNetv2_train 908 3d_fullres 0 {MODEL} -device cpu --val --npz
nnUNetv2_train 908 3d_fullres all {MODEL} -device cpu -pretrained_weights pretraining/encoders_nnunet.pth
nnUNetv2_train 908 3d_fullres 2 {MODEL} -num_gpus 2
{PREDICT} -o predicted --save_probabilities
{PREDICT} -o without_tta --save_probabilities --disable_tta
nnUNetv2_predict_from_modelfolder -m {TRAINED} -f 0 1 -device cpu -npp 1 -nps 1 -i input -o by_folder --disable_tta
python predict.py
nnUNetv2_ensemble -i predicted without_tta -o ensemble -np 1
nnUNetv2_find_best_configuration 908 -c 3d_fullres -tr FratMAETrainer -p FratMAEPlans -f 0 1 -np 2
nnUNetv2_export_model_to_zip -d 908 -c 3d_fullres -f 0 1 {MODEL} -o model.zip
nnUNet_results=there nnUNetv2_install_pretrained_model_from_zip model.zip
nnUNet_results=there {PREDICT} -o by_zip --disable_tta
"""  # noqa: E501
# What predict.py is: the predictor of nnU-Net in Python
PREDICT_PY = f"""
import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

if __name__ == "__main__":
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder("{TRAINED}", use_folds=(0, 1))
    images = [["input/CASE_0000.nii.gz", "input/CASE_0001.nii.gz"]]
    labels, probabilities = predictor.predict_from_files(images, None, True, True, 1, 1)[0]
    by_command = np.load("without_tta/CASE.npz")["probabilities"]
    print("labels", labels.shape, "differ from nnUNetv2_predict's by", np.abs(probabilities - by_command).max())
"""
SHOWN = re.compile(
    r"written|cases? |[Nn]ext:|preset|grid|3d_fullres  patch|encoders|tensors loaded|FROM SCRATCH"
    r"|pretrained weights from|Mean Validation|goes on|epochs|Using .*checkpoint|DDP|done with|labels "
    r"|\*Best|Model|[Ee]rror"
)
NOISE = re.compile(r"^\{|%\||shape torch.Size")


def lines_that_matter(output: str) -> list[str]:
    """What SHOWN says, without progress bars, timestamps and nnU-Net's printing of whole plans and all weights."""
    lines = [line.rsplit("\r", 1)[-1].strip() for line in output.splitlines()]
    lines = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: ", "", line) for line in lines]
    return [line for line in dict.fromkeys(lines) if SHOWN.search(line) and not NOISE.search(line)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("studies", type=Path)
    args = parser.parse_args()
    work, studies = args.work.resolve(), shlex.quote(str(args.studies.resolve()))
    shutil.rmtree(work, ignore_errors=True)
    folders = {name: work / name for name in ("raw", "preprocessed", "results", "there", "input")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    environment = os.environ | {f"nnUNet_{name}": str(folders[name]) for name in ("raw", "preprocessed", "results")}
    environment |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    written = []
    for command in tqdm(COMMANDS.strip().splitlines()):
        if "-num_gpus" in command and torch.cuda.device_count() < 2:
            written.append(f"`{command}`: not run, this machine has no two GPUs.\n")
            continue
        start = time.monotonic()
        done = subprocess.run(
            command.replace("STUDIES", studies),
            shell=True,
            cwd=work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        seconds = time.monotonic() - start
        if done.returncode:
            sys.exit(f"`{command}` failed:\n{done.stdout[-3000:]}")
        shown = "".join(f"    {line}\n" for line in lines_that_matter(done.stdout.replace(f"{work}/", "")))
        written.append(f"```\n{command}\n{shown}```\n{seconds:.1f} s\n")
        (work / "commands.md").write_text("\n".join(written), encoding="utf-8")
        if command.startswith("fratmae_convert_pairs"):
            first = sorted((folders["raw"] / "Dataset908_Studies" / "imagesTr").iterdir())[:2]
            for path in first:
                shutil.copy(path, folders["input"])
            case = first[0].name.removesuffix("_0000.nii.gz")
            (work / "predict.py").write_text(PREDICT_PY.replace("CASE", case), encoding="utf-8")


if __name__ == "__main__":
    main()
