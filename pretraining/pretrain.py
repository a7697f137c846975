"""fratmae_pretrain: stage 1 on the whole-body grid stores of one or several datasets."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnUNet_raw_conversion.command import UserError, find_dataset, nnunet_folder, run_command
from plans.preprocessed import PLANS_NAME, load_plans, validation_cases
from plans.settings import Settings, add_arguments, override, require

RUN_NAME = f"FratMAEPretraining__{PLANS_NAME}__wholebody"


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="fratmae_pretrain", description=__doc__)
    parser.add_argument("-d", nargs="+", type=int, required=True, metavar="ID", help="dataset IDs")
    parser.add_argument("-device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("-f", type=int, metavar="FOLD", help="leave out the validation cases of this nnU-Net fold")
    parser.add_argument("-o", type=Path, metavar="FOLDER", help="output (default: below nnUNet_results)")
    parser.add_argument("--c", action="store_true", help="continue from the latest checkpoint")
    add_arguments(parser, None)
    run_command(parser, _run)


def _run(args: argparse.Namespace) -> None:
    folder = args.o or _default_output(args.d, args.f)
    datasets = [find_dataset("nnUNet_preprocessed", dataset_id) for dataset_id in args.d]
    loaded = [load_plans(preprocessed) for preprocessed in datasets]
    settings = Settings.from_json(loaded[0][0]["fratmae"])
    if args.preset:
        settings = override(settings, [f"preset={args.preset}"])
    settings = override(settings, args.set)
    _check_grids(datasets, [plans for plans, _ in loaded], settings)

    # Here and not above: torch takes seconds to import, and an error above should not
    import torch

    from pretraining.data import list_cases
    from pretraining.engine import pretrain

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("-device cuda: no GPU can be used here; say -device cpu")
    cases = []
    for preprocessed, (plans, dataset_json) in zip(datasets, loaded, strict=True):
        left_out = set() if args.f is None else validation_cases(preprocessed, plans, args.f)
        cases += [c for c in list_cases(preprocessed, plans, dataset_json) if c.path.stem not in left_out]
    licences = {p.name: dataset_json.get("licence") for p, (_, dataset_json) in zip(datasets, loaded, strict=True)}
    pretrain(folder, settings, cases, licences, args.f, args.device, args.c)


def _default_output(dataset_ids: list[int], fold: int | None) -> Path:
    """Below the results of the first dataset; the other datasets and the fold are in the name."""
    others = "".join(f"_{dataset_id:03d}" for dataset_id in dataset_ids[1:])
    name = RUN_NAME + (f"__with{others}" if others else "") + ("" if fold is None else f"__fold_{fold}")
    return nnunet_folder("nnUNet_results") / find_dataset("nnUNet_preprocessed", dataset_ids[0]).name / name


def _check_grids(datasets: list[Path], all_plans: list[dict], settings: Settings) -> None:
    """Every store must have the grid of the settings, or patches of different datasets would not match."""
    for preprocessed, plans in zip(datasets, all_plans, strict=True):
        grid = tuple(plans["fratmae"]["wholebody"]["grid"])
        if grid != settings.wholebody.grid:
            wanted = str(list(settings.wholebody.grid)).replace(" ", "")
            raise UserError(f"{preprocessed.name}: its whole-body grid is {list(grid)}, not {wanted}; run "
                            f"fratmae_plan_and_preprocess -d {int(preprocessed.name[7:10])} "
                            f"--set wholebody.grid={wanted}")  # fmt: skip
    for name in ("patch", "k"):
        require(getattr(settings.wholebody, name) is not None, f"wholebody.{name} must have a value here")
    require(settings.token_patch is not None, "token_patch must have a value here")
