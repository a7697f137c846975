"""fratmae_pretrain: stage 1 on the whole-body grid stores of one or several datasets."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import replace
from pathlib import Path

from nnunet_fratmae.base.command import (
    UserError,
    check_device,
    dataset_number,
    find_dataset,
    nnunet_folder,
    run_command,
)
from plans.channels import find_channels, find_modalities
from plans.fields import require
from plans.front_door import lost_to_pretraining
from plans.preprocessed import PLANS_NAME, validation_cases
from plans.reader import check_whole_body, load_plans
from plans.settings import METHODS, STACKS, Pretrain, Settings, add_arguments, override
from plans.staging import split_unsegmented
from plans.vit_pair import choose_sizes

RUN_NAME = f"FratMAEPretraining__{PLANS_NAME}__wholebody"


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="fratmae_pretrain", description=__doc__)
    parser.add_argument("-d", nargs="+", type=int, required=True, metavar="ID", help="dataset IDs")
    parser.add_argument("-m", choices=METHODS, help="arm: FratMAE, without text, MAE of each modality alone, with text "
                        "(default: as planned, fratmae)")  # fmt: skip
    parser.add_argument("--stack", choices=list(STACKS), help="patches of coronal slices (default) or axial ones")
    parser.add_argument("-device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("-num_gpus", type=int, default=1, metavar="N", help="GPUs of this node (with cpu: processes)")
    parser.add_argument("-num_nodes", type=int, default=1, metavar="N", help="nodes, under SLURM or torchrun")
    parser.add_argument("-f", type=int, metavar="FOLD", help="leave out the validation patients of this nnU-Net fold")
    parser.add_argument("-o", type=Path, metavar="FOLDER", help="output (default: below nnUNet_results)")
    parser.add_argument("--c", action="store_true", help="continue from the latest checkpoint")
    add_arguments(parser, None)
    run_command(parser, _run)


def _run(args: argparse.Namespace) -> None:
    for name in ("num_gpus", "num_nodes"):
        if getattr(args, name) < 1:
            raise UserError(f"-{name} {getattr(args, name)}: give at least 1")
    if args.o is None:
        nnunet_folder("nnUNet_results")
    datasets = [find_dataset("nnUNet_preprocessed", dataset_id) for dataset_id in args.d]
    loaded = [load_plans(preprocessed) for preprocessed in datasets]
    settings = _settings(loaded[0][0]["fratmae"], args)
    folder = args.o or _default_output(args.d, args.f, settings)
    check_plans(datasets, loaded, settings)

    # Here and not above: torch takes seconds to import, and an error above should not
    import torch

    from pretraining.data import list_cases
    from pretraining.engine import Pretraining
    from pretraining.launch import make_fabric
    from pretraining.methods import CLASSES

    check_device(args.device)
    if args.device == "cuda" and args.num_gpus > torch.cuda.device_count():
        raise UserError(f"-num_gpus {args.num_gpus}: {torch.cuda.device_count()} can be used here")
    cases = []
    for preprocessed, (plans, dataset_json) in zip(datasets, loaded, strict=True):
        left_out = set() if args.f is None else _left_out(preprocessed, plans, args.f)
        found = list_cases(preprocessed, plans, dataset_json)
        patients = {c.patient for c in found if c.patient and c.path.stem in left_out}  # their other studies, too
        cases += [c for c in found if c.path.stem not in left_out and c.patient not in patients]
    licences = {p.name: dataset_json.get("licence") for p, (_, dataset_json) in zip(datasets, loaded, strict=True)}
    fabric = make_fabric(args.device, args.num_gpus, args.num_nodes, CLASSES[settings.pretrain.method].rests(settings))
    try:
        Pretraining(folder, settings, cases, licences, args.f, fabric, args.c).run()
    except BaseException as error:
        for process in getattr(fabric.strategy.launcher, "procs", []):
            process.kill()  # or it would wait for this one until NCCL gives up after half an hour
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError("the GPU's memory is too small; lower pretrain.micro_batch_size (the batch stays as it is) "
                            "or take a smaller -preset") from error  # fmt: skip
        if "DataLoader worker" in str(error) and "killed" in str(error):
            raise UserError("a process that loads patches was killed, most likely for want of memory; lower "
                            "pretrain.workers") from error  # fmt: skip
        raise


def _left_out(preprocessed: Path, plans: dict, fold: int) -> set[str]:
    """The cases that will validate in a fold, by their segmentations or, without any, by stages."""
    with contextlib.suppress(UserError):  # nothing to classify by either: nobody will validate
        split_unsegmented(preprocessed, plans)
    return validation_cases(preprocessed, plans, fold)


def _settings(block: dict, args: argparse.Namespace) -> Settings:
    """The planned settings with what the command line says."""
    settings = Settings.from_json(block)
    preset, method = ([f"{key}={value}"] if value else [] for key, value in (("preset", args.preset),
                                                                           ("pretrain.method", args.m)))  # fmt: skip
    settings = override(settings, preset + method)
    if args.stack and args.stack != settings.wholebody.stack:
        open_sizes = replace(settings.wholebody, stack=args.stack, patch=None, k=None)
        finetune = replace(settings.finetune, patch=None)
        settings = replace(settings, token_patch=None, wholebody=open_sizes, finetune=finetune)
    settings = override(settings, args.set)
    require(settings.wholebody.grid is not None, "wholebody.grid must have a value here")
    settings = replace(settings, pretrain=_with_whole_paths(settings.pretrain))
    return choose_sizes(settings, settings.wholebody.grid)


def _with_whole_paths(options: Pretrain) -> Pretrain:
    """The text tower's folder or file as an absolute path, for fratmae_retrieve may run elsewhere."""
    found = {}
    for name in ("text_tower", "text_weights"):
        path = Path(getattr(options, name) or "").expanduser()
        if getattr(options, name) and path.exists():
            found[name] = str(path.resolve())
    return replace(options, **found)


def _default_output(dataset_ids: list[int], fold: int | None, settings: Settings) -> Path:
    """Below the results of the first dataset; other datasets, another arm than FratMAE and the fold are in the name."""
    others = "".join(f"_{dataset_id:03d}" for dataset_id in dataset_ids[1:])
    arm = "" if settings.pretrain.method == METHODS[0] else f"__{settings.pretrain.method}"
    arm += "" if settings.wholebody.stack == "coronal" else f"__{settings.wholebody.stack}"
    name = RUN_NAME + arm + (f"__with{others}" if others else "") + ("" if fold is None else f"__fold_{fold}")
    return nnunet_folder("nnUNet_results") / find_dataset("nnUNet_preprocessed", dataset_ids[0]).name / name


def check_plans(datasets: list[Path], loaded: list[tuple[dict, dict]], settings: Settings) -> None:
    """Every store must have the orientation of the contract and the grid of the settings, or patches would not match.

    Raises:
        UserError: one has not.
    """
    for preprocessed, (plans, dataset_json) in zip(datasets, loaded, strict=True):
        fullres, channels = plans["configurations"]["3d_fullres"], find_channels(dataset_json)
        lost = lost_to_pretraining(plans, fullres, dataset_json, channels)
        if lost:
            raise UserError(f"{preprocessed.name}: {lost[0]}")
        find_modalities(dataset_json)
        check_whole_body(plans, str(preprocessed / f"{PLANS_NAME}.json"))
        grid = tuple(plans["fratmae"]["wholebody"]["grid"])
        if grid != settings.wholebody.grid:
            wanted = str(list(settings.wholebody.grid)).replace(" ", "")
            raise UserError(f"{preprocessed.name}: its whole-body grid is {list(grid)}, not {wanted}; run "
                            f"fratmae_plan_and_preprocess -d {dataset_number(preprocessed.name)} "
                            f"--set wholebody.grid={wanted}")  # fmt: skip
