"""fratmae_plan_and_preprocess: FratMAEPlans.json, stock preprocessing of 3d_fullres, the whole-body grid store."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
from pathlib import Path

from nnUNet_raw_conversion.command import UserError, find_dataset, nnunet_folder, run_command
from plans.settings import Settings, add_arguments, override


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="fratmae_plan_and_preprocess", description=__doc__)
    parser.add_argument("-d", nargs="+", type=int, required=True, metavar="ID", help="dataset IDs")
    parser.add_argument("-np", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes")
    add_arguments(parser, Settings.preset)
    run_command(parser, _run)


def _run(args: argparse.Namespace) -> None:
    settings = override(Settings(preset=args.preset), args.set)
    nnunet_folder("nnUNet_preprocessed")
    for dataset_id in args.d:
        plan_and_preprocess(find_dataset("nnUNet_raw", dataset_id), settings, args.np)


def plan_and_preprocess(raw: Path, settings: Settings, processes: int) -> None:
    """All three steps for one raw dataset folder.

    Raises:
        UserError: the dataset cannot be planned; the message says what to do.
    """
    # Here and not above: nnU-Net and torch take seconds to import, and an error above should not
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, preprocess_dataset

    from plans.extension import find_modalities
    from plans.planner import FratMAEPlanner, plan_unlabelled
    from plans.preprocessed import PLANS_NAME
    from plans.wholebody import list_studies, write_store

    dataset_id = int(raw.name[7:10])
    if not (raw / "dataset.json").is_file():
        raise UserError(f"{raw}/dataset.json is not there; convert the studies first (fratmae_convert_pairs)")
    dataset_json = json.loads((raw / "dataset.json").read_text())
    find_modalities(dataset_json)
    studies = list_studies(raw, dataset_json)
    if not studies:
        raise UserError(f"{raw}: no studies in imagesTr or imagesPt; convert the studies first (fratmae_convert_pairs)")
    processes = max(1, min(processes, len(studies)))
    labelled = sum(labels is not None for _, labels in studies.values())
    print(f"{raw.name}: {labelled} labelled and {len(studies) - labelled} unlabelled studies")
    if labelled:
        with _quiet():
            extract_fingerprint_dataset(dataset_id, num_processes=processes, verbose=False)
        plans = FratMAEPlanner(raw.name, settings).plan_experiment()
        with _quiet():
            preprocess_dataset(dataset_id, PLANS_NAME, ("3d_fullres",), num_processes=(processes,))
    else:
        plans = plan_unlabelled(raw.name, studies, dataset_json, settings)
    preprocessed = nnunet_folder("nnUNet_preprocessed") / raw.name
    store = preprocessed / plans["configurations"]["wholebody"]["data_identifier"]
    write_store(store, studies, plans, dataset_json, processes)
    if (raw / "clinical.csv").is_file():  # beside dataset.json, which nnU-Net copies in the same way
        shutil.copyfile(raw / "clinical.csv", preprocessed / "clinical.csv")
    _summary(preprocessed, plans, dataset_id, labelled)


def _quiet() -> contextlib.AbstractContextManager:
    """Hide nnU-Net's printing of whole plans; its progress bars (on stderr) stay."""
    return contextlib.redirect_stdout(io.StringIO())


def _summary(preprocessed: Path, plans: dict, dataset_id: int, labelled: int) -> None:
    block, fullres = plans["fratmae"], plans["configurations"]["3d_fullres"]
    whole = block["wholebody"]
    print(f"{preprocessed / plans['plans_name']}.json  (axes H W D = AP, LR, SI)")
    print(f"  preset {block['preset']}, token patch {block['token_patch']}")
    print(f"  wholebody   grid {whole['grid']}, patch {whole['patch']}, every {whole['k']}. coronal slice")
    if labelled:
        print(f"  3d_fullres  patch {fullres['patch_size']}, batch size {fullres['batch_size']}, spacing "
              f"{[round(s, 3) for s in fullres['spacing']]} mm")  # fmt: skip
    print(f"next: fratmae_pretrain -d {dataset_id}")
    if labelled:
        print(f"  or: nnUNetv2_train {dataset_id} 3d_fullres 0 -tr FratMAETrainer -p {plans['plans_name']}")
