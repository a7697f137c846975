"""fratmae_plan_and_preprocess: FratMAEPlans.json, stock preprocessing of 3d_fullres, the whole-body grid store."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_fratmae.base.command import UserError, dataset_number, find_dataset, nnunet_folder, run_command
from nnunet_fratmae.base.files import plain_name, renamed, writing_to
from nnunet_fratmae.base.pool import KILLED
from plans.channels import find_channels, find_modalities
from plans.contract import read_contract
from plans.dataset_json import read_dataset_json
from plans.extension import count_classes, extend_plans
from plans.fields import require
from plans.preprocessed import (
    FOLDS,
    PLANS_NAME,
    check_split_cases,
    check_splits,
    copy_labels,
    planning,
    read_json,
    replaced,
)
from plans.reader import check_names, check_plans, check_settings, check_whole_body, resolve
from plans.settings import Settings, add_arguments, override
from plans.vit_pair import follow_artefact, training_memory

if TYPE_CHECKING:
    from plans.dataset_checks import Studies


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="fratmae_plan_and_preprocess", description=__doc__)
    parser.add_argument("-d", nargs="+", type=int, required=True, metavar="ID", help="dataset IDs")
    parser.add_argument("-np", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes")
    parser.add_argument("-pretrained", metavar="ARTEFACT", help="output folder of fratmae_pretrain (or its weights "
                        "file) that the trainings start from; preset and token patch follow it")  # fmt: skip
    target = Settings().finetune.gpu_memory_target
    parser.add_argument("-gpu_memory_target", type=float, metavar="GB", help="memory of the GPU that patch and batch "
                        f"size of the fine-tuning are chosen for (default: {target:g}); several GPUs share the batch")
    parser.add_argument("-plans_name", metavar="PLANS", help="preprocess by these FratMAE plans of the dataset, which "
                        "nnUNetv2_move_plans_between_datasets has brought or you have edited, instead of planning")
    add_arguments(parser, Settings.preset)
    parser.set_defaults(preset=None)  # None: as planned before, if it was
    run_command(parser, _run)


def _run(args: argparse.Namespace) -> None:
    said = [*args.set]
    for name, value in (("preset", args.preset), ("finetune.gpu_memory_target", args.gpu_memory_target)):
        said += [f"{name}={value}"] if value is not None else []
    override(Settings(), said)  # a mistake is found before the first of many datasets is planned
    if args.plans_name and (said or args.pretrained):
        raise UserError(f"-plans_name {args.plans_name}: these plans are there, and settings are for planning; edit "
                        "them in its file")  # fmt: skip
    if args.np < 1:
        raise UserError(f"-np {args.np}: give at least 1 process")
    if args.plans_name:
        plain_name(args.plans_name, "-plans_name")
    for raw in [find_dataset("nnUNet_raw", dataset_id) for dataset_id in args.d]:
        folder = nnunet_folder("nnUNet_preprocessed") / raw.name
        if args.plans_name:
            plans, opened = _plans_that_are_there(folder, args.plans_name), _open(raw, args.np)
            with planning(folder):
                preprocess(raw, plans, *opened, args.np)
            continue
        settings = planned_settings(folder / f"{PLANS_NAME}.json", said, args.pretrained)
        plan_and_preprocess(raw, settings, args.np)


def planned_settings(earlier: Path, said: list[str], pretrained: str | None = None) -> Settings:
    """Settings to plan with: what the command says, else the block of `earlier` plans if they are there.

    Of the sizes, those that the earlier planning chose for the data are open again, those that the user gave then or
    edited since are kept. With a pretrained artefact, from either, preset and token patch follow it.

    Args:
        said: `key=value` assignments of the command.

    Raises:
        UserError: settings that are wrong, an artefact that cannot be used, or that has another size than was said.
    """
    settings = Settings()
    if earlier.is_file():
        settings = _reopened(_earlier(earlier))
        kept = ", ".join(_differences(settings.to_json(), Settings().to_json()))
        print(f"{earlier} is there: what it sets stays unless this command says otherwise ({kept or 'nothing'}); "
              "remove it to start afresh")  # fmt: skip
    settings = override(settings, said)
    if pretrained is not None:
        settings = replace(settings, pretrained=str(Path(pretrained).expanduser().resolve()))
    if settings.pretrained is None:
        return settings
    followed = follow_artefact(settings, read_contract(settings.pretrained))
    for name in ("preset", "token_patch"):
        wanted, there = getattr(settings, name), getattr(followed, name)
        if wanted != there and any(assignment.startswith(f"{name}=") for assignment in said):
            raise UserError(f"{name} {wanted}: the pretrained artefact {settings.pretrained} has {there}; leave it "
                            "out, or plan without the artefact (--set pretrained=null)")  # fmt: skip
    return followed


def _earlier(path: Path) -> dict[str, Any]:
    """Earlier plans as far as planning again looks at them."""
    plans = read_json(path)
    for part in ("configurations", "fratmae"):
        right = isinstance(plans, dict) and isinstance(plans.get(part, {}), dict)
        require(right, f"{path}: {part} must be {{...}}; mend it there, or remove the file and plan again")
    check_settings(plans, str(path))
    return plans


def _plans_that_are_there(preprocessed: Path, name: str) -> dict[str, Any]:
    path = preprocessed / f"{name}.json"
    plans = read_json(path) if path.is_file() else {}
    if not isinstance(plans, dict) or not plans.get("fratmae"):
        raise UserError(f"-plans_name {name}: {path} {'is not there' if not plans else 'has no FratMAE plans'}; bring "
                        "some with nnUNetv2_move_plans_between_datasets, or plan without -plans_name")  # fmt: skip
    check_plans(plans, str(path))
    check_names(plans, str(path))
    for field, wanted in (("plans_name", name), ("dataset_name", preprocessed.name)):
        require(plans[field] == wanted, f"{path}: {field} is {plans[field]}; write {wanted}, or nnU-Net would look for "
                "the other")  # fmt: skip
    return plans


def _reopened(plans: dict[str, Any]) -> Settings:
    """The settings of plans, where sizes that are still as the planner chose them are open."""
    block = deepcopy(plans.get("fratmae", {}))
    for key, value in plans.get("fratmae_chosen", {}).items():
        *path, last = key.split(".")
        part = block.get(path[0], {}) if path else block
        if part.get(last) == value:
            part[last] = None
    return Settings.from_json(block)


def _differences(block: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """key=value of everything in `block` that is not so in `other`."""
    lines: list[str] = []
    for name, value in block.items():
        if isinstance(value, dict):
            lines += _differences(value, other[name], f"{prefix}{name}.")
        elif value != other[name]:
            lines.append(f"{prefix}{name}={value}")
    return lines


def plan_and_preprocess(raw: Path, settings: Settings, processes: int) -> None:
    """All three steps for one raw dataset folder.

    Raises:
        UserError: the dataset cannot be planned; the message says what to do.
    """
    # Here and not above: nnU-Net and torch take seconds to import, and an error above should not
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset

    from plans.planner import FratMAEPlanner, plan_unlabelled

    dataset_json, studies = _open(raw, processes)
    preprocessed = nnunet_folder("nnUNet_preprocessed") / raw.name
    find_channels(dataset_json, settings.modalities)
    labelled = count_labelled(studies)
    print(f"{raw.name}: {labelled} labelled and {len(studies) - labelled} unlabelled studies")
    with planning(preprocessed):
        if labelled:
            with _by_nnunet(preprocessed):
                extract_fingerprint_dataset(dataset_number(raw.name), num_processes=max(1, min(processes, labelled)),
                                            verbose=False)  # fmt: skip
            with writing_to(preprocessed):
                plans = FratMAEPlanner(raw.name, settings).plan_experiment()
        else:
            find_modalities(dataset_json)  # without labels there is only pretraining, which needs both
            plans = plan_unlabelled(raw.name, studies, dataset_json, settings)
        preprocess(raw, plans, dataset_json, studies, processes)


def _open(raw: Path, processes: int) -> tuple[dict[str, Any], Studies]:
    """dataset.json and the studies of a raw dataset folder, after all checks that need no plans."""
    if not (raw / "dataset.json").is_file():
        raise UserError(f"{raw}/dataset.json is not there; convert the studies first (fratmae_convert_pairs)")
    dataset_json = read_dataset_json(raw / "dataset.json")
    find_channels(dataset_json)
    check_splits(raw)

    from plans.dataset_checks import check_studies
    from plans.inputs import check_dataset_images
    from plans.store import list_raw_studies

    studies = list_raw_studies(raw, dataset_json)
    if not studies:
        raise UserError(f"{raw}: no studies in imagesTr or imagesPt; convert the studies first (fratmae_convert_pairs)")
    for folder in (raw, nnunet_folder("nnUNet_preprocessed") / raw.name):
        check_split_cases(folder / "splits_final.json", studies, f"studies of {raw}")
    check_studies(raw, studies, dataset_json, processes)
    check_dataset_images(studies, dataset_json, processes)
    return dataset_json, studies


def count_labelled(studies: Studies) -> int:
    """How many studies have a segmentation."""
    return sum(labels is not None for _, labels in studies.values())


def preprocess(
    raw: Path, plans: dict[str, Any], dataset_json: dict[str, Any], studies: Studies, processes: int
) -> None:
    """3d_fullres by nnU-Net and the whole-body store of one raw dataset folder, by its plans.

    Raises:
        UserError: a study that cannot be used; the message says what to do.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, preprocess_dataset

    from plans.store import check_preprocessed, write_store

    labelled = count_labelled(studies)
    preprocessed, dataset_id = nnunet_folder("nnUNet_preprocessed") / raw.name, dataset_number(raw.name)
    processes, configurations = max(1, min(processes, len(studies))), plans["configurations"]
    where = str(preprocessed / f"{plans['plans_name']}.json")
    check_plans(plans, where, dataset_json)
    if "wholebody" in configurations:
        check_whole_body(plans, where)
    fullres = preprocessed / resolve(configurations, "3d_fullres", where)["data_identifier"]
    for name in ("dataset.json", "clinical.csv", "splits_final.json"):  # as nnU-Net's planner, of labelled datasets
        if (raw / name).is_file() and not (name == "splits_final.json" and (preprocessed / name).is_file()):
            with renamed(preprocessed / name) as partial:
                shutil.copyfile(raw / name, partial)
    if labelled:
        if not (preprocessed / "dataset_fingerprint.json").is_file():  # where plans were moved; nnU-Net wants one
            with _by_nnunet(preprocessed):
                extract_fingerprint_dataset(dataset_id, num_processes=processes, verbose=False)
        copy_labels(preprocessed, studies, dataset_json["file_ending"])
        with replaced(fullres) as partial, _named_aside(plans, partial) as aside, _by_nnunet(preprocessed):
            preprocess_dataset(dataset_id, aside, ("3d_fullres",), num_processes=(processes,))
    if "wholebody" in configurations:
        store = preprocessed / configurations["wholebody"]["data_identifier"]
        write_store(store, studies, plans, dataset_json, processes)
    else:
        check_preprocessed(fullres, dataset_json)
    _summary(preprocessed, plans, dataset_json, labelled)


@contextlib.contextmanager
def _named_aside(plans: dict[str, Any], folder: Path) -> Iterator[str]:
    """The name of plans by which nnU-Net preprocesses 3d_fullres to another folder than these say."""
    aside = deepcopy(plans)
    aside["configurations"]["3d_fullres"]["data_identifier"] = folder.name
    path = folder.with_name(f"{plans['plans_name']}.partial.json")
    try:
        with writing_to(path):
            path.write_text(json.dumps(aside), encoding="utf-8")
        yield path.stem
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _by_nnunet(folder: Path) -> Iterator[None]:
    """What nnU-Net does in processes of its own: its printing of whole plans is hidden, its progress bars (on stderr)
    stay, and the death of a process is one line.

    Raises:
        UserError: a process was killed.
    """
    try:
        with writing_to(folder), contextlib.redirect_stdout(io.StringIO()):
            yield
    except RuntimeError as error:
        if "background worker" not in str(error):
            raise
        raise UserError(f"{folder}: a {KILLED}; try a smaller -np") from None


def _summary(preprocessed: Path, plans: dict[str, Any], dataset_json: dict[str, Any], labelled: int) -> None:
    settings, fullres = Settings.from_json(plans["fratmae"]), plans["configurations"]["3d_fullres"]
    whole, dataset_id = settings.wholebody, dataset_number(preprocessed.name)
    print(f"{preprocessed / plans['plans_name']}.json  (axes H W D = AP, LR, SI)")
    print(f"  preset {settings.preset}, token patch {list(settings.token_patch)}, pretrained {settings.pretrained}")
    has_both = "wholebody" in plans["configurations"]
    if has_both:
        print(f"  wholebody   grid {list(whole.grid)}, patch {list(whole.patch)}, every {whole.k}. coronal slice")
    else:
        print("  wholebody   left out: pretraining and staging need CT and PET, this dataset has "
              f"{settings.modalities} alone")  # fmt: skip
    for warning in extend_plans(plans, dataset_json, settings)[1]:
        print(f"  WARNING: {warning}")
    if labelled:
        memory = training_memory(settings, fullres["patch_size"], fullres["batch_size"], count_classes(dataset_json),
                                 fullres["spacing"])  # fmt: skip
        spacing = [round(s, 3) for s in fullres["spacing"]]
        print(f"  3d_fullres  patch {fullres['patch_size']}, spacing {spacing} mm, batch size {fullres['batch_size']} "
              f"(about {memory:.1f} GB)")  # fmt: skip
        if settings.modalities != "both":
            print(f"              the network sees {settings.modalities} alone (modalities)")
    steps = [f"fratmae_pretrain -d {dataset_id}"] if has_both else []
    if labelled:
        few = labelled < FOLDS and not (preprocessed / "splits_final.json").is_file()
        if few:
            print(f"  NOTE: {labelled} labelled cases are too few for nnU-Net's {FOLDS} folds; train on all of them, "
                  "or write folds of your own to splits_final.json")  # fmt: skip
        fold = "all" if few else 0
        steps.append(f"nnUNetv2_train {dataset_id} 3d_fullres {fold} -tr FratMAETrainer -p {plans['plans_name']}")
    print("next: " + "\n  or: ".join(steps))
