"""fratmae_predict_stage: classes of whole-body studies by a trained model folder of FratMAEStagingTrainer, or of
FratMAETrainer with finetune.stage_weight."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_fratmae.base.command import UserError, check_device, run_command
from nnunet_fratmae.base.files import refuse_bytes, renamed, writing_to
from nnunet_fratmae.base.tables import csv_text
from nnunet_fratmae.base.units import PRETRAINING_UNITS
from plans.channels import channel_modalities, find_channels, find_modalities
from plans.models import check_architecture, read_model_files
from plans.reader import check_whole_body
from plans.settings import Settings, stack_steps
from plans.staging import NETWORK, STAGING_CONFIGURATION, staging_plans
from plans.vit_pair import JOINT_NETWORK

if TYPE_CHECKING:
    from torch import Tensor, nn

CHECKPOINT = "checkpoint_final.pth"
TABLE = "stages.csv"
COLUMNS_AT_ONCE = 8  # occluded copies of a study in one pass
SMALLEST_SCALE = 0.05  # of the picture, in probability: what hardly matters shall not look as if it did


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="fratmae_predict_stage", description=__doc__)
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER",
                        help="images named as in nnU-Net: CASE_0000 (CT, HU) and CASE_0001 (PET, SUVbw)")  # fmt: skip
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help=f"for {TABLE} and a picture a case")
    parser.add_argument("-m", type=Path, required=True, metavar="FOLDER",
                        help="model folder, such as FratMAEStagingTrainer__FratMAEPlans__wholebody")  # fmt: skip
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds to average (default: all that are trained)")
    parser.add_argument("-chk", default=CHECKPOINT, metavar="NAME", help=f"checkpoint of each fold ({CHECKPOINT})")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="where to compute (cuda)")
    parser.add_argument("--no_pictures", action="store_true",
                        help="no pictures; they take as many passes as a patch has token columns")  # fmt: skip
    run_command(parser, _run)


def _run(args: argparse.Namespace) -> None:
    plans, dataset_json = read_model(args.m)
    checkpoints = find_checkpoints(args.m, args.f, args.chk)
    studies = find_studies(args.i, dataset_json)

    from tqdm import tqdm

    # Here and not above: they import torch and ITK, which takes seconds, and an error above should not
    from plans.inputs import check_study
    from plans.store import read_study

    check_device(args.device)
    networks = [load_network(plans, dataset_json, path).to(args.device) for path in checkpoints]
    print(f"{len(studies)} studies, folds {', '.join(path.parent.name[5:] for path in checkpoints)}")
    with writing_to(args.o):
        args.o.mkdir(parents=True, exist_ok=True)
    rows, refused = [], []
    channels, reader = find_channels(dataset_json, "both"), plans.get("image_reader_writer", "")
    for case, images in tqdm(studies.items(), "Studies"):
        try:
            notes = check_study(case, {modality: images[channel] for modality, channel in channels.items()}, reader)
            volume, _, properties = read_study(case, images, None, plans, dataset_json)
        except UserError as error:  # the others are not to wait for it
            refused.append(str(error))
            tqdm.write(f"refused: {error}", sys.stderr)
            continue
        for note in notes:
            tqdm.write(f"case {case}: {note}")
        patch = central_patch(volume, plans, dataset_json)
        probabilities = ensemble(networks, patch)
        rows.append((case, probabilities))
        if not args.no_pictures:
            draw_decision(args.o / f"{case}.png", case, patch, networks, probabilities, plans, properties)
    if rows:
        with renamed(args.o / TABLE) as partial:
            write_stages(partial, networks[0].classes, rows)
        print(args.o / TABLE)
    if refused:
        raise UserError(f"{len(refused)} of {len(studies)} studies are not in {TABLE}, the first because of "
                        f"{refused[0]}")  # fmt: skip


# ---------------------------------------------------------------------------------------------- what the user points at


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """plans.json and dataset.json of a model folder; of a joint model, as if its classifier had been trained alone.

    Raises:
        UserError: they are not there, or are no model with a classifier.
    """
    plans, dataset_json = read_model_files(folder, "...__FratMAEPlans__wholebody")
    architectures = [config.get("architecture") for config in plans["configurations"].values()]
    networks = [a.get("network_class_name") for a in architectures if isinstance(a, dict)]
    if NETWORK not in networks and JOINT_NETWORK not in networks:
        raise UserError(f"-m {folder}: has no classifier; give a model of FratMAEStagingTrainer, or of FratMAETrainer "
                        "with finetune.stage_weight above 0 (nnUNetv2_predict segments)")
    check_whole_body(plans, str(folder / "plans.json"))
    if JOINT_NETWORK not in networks:
        return plans, dataset_json
    joint = architectures[networks.index(JOINT_NETWORK)]["arch_kwargs"]
    return staging_plans(plans, joint["stages"]["classes"]), dataset_json


def find_checkpoints(folder: Path, folds: Sequence[str] | None, name: str) -> list[Path]:
    """The checkpoints of `folds`, or of all trained folds 0, 1, ... (fold "all" only if there is no other).

    Raises:
        UserError: one is not there.
    """
    if folds is None:
        there = sorted(p.parent.name[5:] for p in folder.glob(f"fold_*/{name}"))
        folds = [fold for fold in there if fold != "all"] or there
        if not folds:
            raise UserError(f"-m {folder}: no fold_X/{name} there; train a fold to its end, or name another with -chk")
    checkpoints = [folder / f"fold_{fold}" / name for fold in folds]
    for path in checkpoints:
        if not path.is_file():
            raise UserError(f"-f {path.parent.name[5:]}: {path} is not there; train this fold or leave it out")
    return checkpoints


def find_studies(folder: Path, dataset_json: dict[str, Any]) -> dict[str, list[str]]:
    """The images of every case in a folder, channel by channel.

    Raises:
        UserError: no images, or a case without one of its channels.
    """
    ending, channels = dataset_json["file_ending"], len(channel_modalities(dataset_json))
    pattern = re.compile(rf"(.+)_\d{{4}}{re.escape(ending)}")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    cases = sorted({match[1] for file in files if (match := pattern.fullmatch(file.name))})
    if not cases:
        raise UserError(f"-i {folder}: no images CASE_0000{ending} and CASE_0001{ending} there")
    studies = {case: [str(folder / f"{case}_{c:04d}{ending}") for c in range(channels)] for case in cases}
    for images in studies.values():
        refuse_bytes(images)
        for image in images:
            if not os.path.isfile(image):
                raise UserError(f"{image} is not there; every case needs {channels} images")
    return studies


def write_stages(path: Path, classes: Sequence[str], rows: Sequence[tuple[str, np.ndarray]]) -> None:
    """A row a case: case, predicted class, probability of each class (columns p_CLASS)."""
    columns = ["case", "predicted", *(f"p_{name}" for name in classes)]
    cells = [[case, classes[int(np.argmax(p))], *(f"{value:.6f}" for value in p)] for case, p in rows]
    path.write_text(csv_text(columns, cells), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- the prediction


def load_network(plans: dict[str, Any], dataset_json: dict[str, Any], checkpoint: Path) -> nn.Module:
    """The network that plans.json describes with the weights of a checkpoint, in evaluation mode.

    Nothing in the file is executed (weights_only), since models are passed on. A joint model's decoder is left out.

    Raises:
        UserError: the plans are of another network, or the file is damaged, of another one, or has weights that are not
            finite.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    from nnunet_fratmae.artefact import compare
    from nnunet_fratmae.base.weights import check_finite, read_checkpoint

    architecture = plans["configurations"].get(STAGING_CONFIGURATION, {}).get("architecture")
    check_architecture(architecture, f"{checkpoint.parents[1] / 'plans.json'}, configuration {STAGING_CONFIGURATION}")
    kwargs = architecture["arch_kwargs"]
    channels = len(channel_modalities(dataset_json))
    network = get_network_from_plans(NETWORK, kwargs, [], channels, len(kwargs["classes"]))
    weights = read_checkpoint(checkpoint).get("network_weights")
    try:
        weights = {k: v for k, v in weights.items() if not k.startswith("decoder.")}
        if compare(network.state_dict(), weights):
            raise ValueError
        network.load_state_dict(weights)
    except Exception as error:  # noqa: BLE001 - whatever the file holds
        raise UserError(f"{checkpoint}: cannot be read as weights of the network in plans.json ({type(error).__name__}"
                        "); copy the model folder again") from None  # fmt: skip
    check_finite(network.state_dict(), checkpoint)
    return network.eval()


def central_patch(volume: np.ndarray, plans: dict[str, Any], dataset_json: dict[str, Any]) -> Tensor:
    """The patch (2, H, W, D) that validation takes, CT and PET in pretraining units, of a study (C, H, W, D)."""
    import torch

    from nnunet_fratmae.stage_data import central_window

    where = central_window(Settings.from_json(plans["fratmae"]).wholebody)
    return torch.from_numpy(volume[find_modalities(dataset_json)][(slice(None), *where)].astype(np.float32))


def ensemble(networks: Sequence[nn.Module], patches: Tensor) -> np.ndarray:
    """Mean over the networks of the probabilities, (classes,) of a patch (2, H, W, D) or (B, classes) of a batch."""
    import torch

    batch = patches if patches.ndim == 5 else patches[None]
    with torch.inference_mode():
        device = next(networks[0].parameters()).device
        each = [network(batch.to(device)).float().softmax(1) for network in networks]
        mean = torch.stack(each).mean(0).cpu().numpy()
    return mean if patches.ndim == 5 else mean[0]


# ------------------------------------------------------------------------------------------------ what carried it


def occlude(patch: Tensor, token_patch: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
    """(w, d, copy) of a patch (2, H, W, D) for each column of tokens along H that is not empty, with air in it.

    Zero is air without uptake in pretraining units.
    """
    _, width, height = token_patch
    for w in range(patch.shape[2] // width):
        for d in range(patch.shape[3] // height):
            column = (..., slice(w * width, (w + 1) * width), slice(d * height, (d + 1) * height))
            if patch[column].any():
                copy = patch.clone()
                copy[column] = 0
                yield w, d, copy


def fall_by_occlusion(networks: Sequence[nn.Module], patch: Tensor, token_patch: Sequence[int]) -> np.ndarray:
    """How much the probability of the predicted class falls when a column of tokens is replaced by air, (w, d)."""
    import torch

    whole = ensemble(networks, patch)
    fall = np.zeros([patch.shape[axis + 1] // token_patch[axis] for axis in (1, 2)])
    columns = occlude(patch, token_patch)
    while chunk := list(itertools.islice(columns, COLUMNS_AT_ONCE)):
        found = ensemble(networks, torch.stack([copy for *_, copy in chunk]))
        for (w, d, _), probabilities in zip(chunk, found, strict=True):
            fall[w, d] = whole[whole.argmax()] - probabilities[whole.argmax()]
    return fall


def draw_decision(
    path: Path,
    case: str,
    patch: Tensor,
    networks: Sequence[nn.Module],
    probabilities: np.ndarray,
    plans: dict[str, Any],
    properties: dict[str, Any],
) -> None:
    """PET MIP of what the network sees and, over it, what `fall_by_occlusion` finds: red columns speak for the
    prediction, blue ones against it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from nnUNet_raw_conversion.pictures import CORONAL, name_sides, save_figure, show_mip, show_plane

    kwargs = plans["configurations"][STAGING_CONFIGURATION]["architecture"]["arch_kwargs"]
    fall = fall_by_occlusion(networks, patch, kwargs["token_patch"])
    pet = PRETRAINING_UNITS["PET"]
    spacing = voxel_size(plans, properties)
    predicted = networks[0].classes[int(np.argmax(probabilities))]
    largest = max(float(np.abs(fall).max()), SMALLEST_SCALE)
    figure = Figure(figsize=(9, 6), layout="constrained")
    plain, marked = figure.subplots(1, 2)
    for axes in (plain, marked):
        show_mip(axes, zyx_array(patch[1].numpy()) * pet.std + pet.mean, spacing)
        name_sides(axes, "RL")
    plain.set_title("what the network sees:\nPET MIP of the central slices of the grid", fontsize=8)
    colours = ScalarMappable(Normalize(-largest, largest), "RdBu_r")
    _, width, height = kwargs["token_patch"]
    columns = fall.repeat(width, 0).repeat(height, 1)[::-1].T  # W to the patient's right, x to the left
    picture = colours.to_rgba(columns)
    picture[..., 3] = 0.7 * np.abs(columns) / largest
    show_plane(marked, picture, spacing, CORONAL, interpolation="nearest")
    method = (
        "occlusion: fall of that probability when a column of the body\n(front to back) is replaced by air; what the "
        "answer hangs on,\nnot a map of lesions"
    )
    marked.set_title(method, fontsize=8)
    figure.colorbar(colours, ax=marked, shrink=0.6)
    figure.suptitle(f"{case}: {predicted}, probability {probabilities.max():.2f}", fontsize=10)
    save_figure(figure, path, tight=False)


def zyx_array(volume: np.ndarray) -> np.ndarray:
    """A volume (H, W, D) to anterior, right and head as (z, y, x) to head, posterior and left, as pictures need it."""
    return volume[::-1, ::-1].transpose(2, 0, 1)


def voxel_size(plans: dict[str, Any], properties: dict[str, Any]) -> list[float]:
    """Size in mm (z, y, x) of the voxels of a study's patch."""
    whole = Settings.from_json(plans["fratmae"]).wholebody
    spacing = [properties["spacing"][axis] for axis in plans["transpose_forward"]]
    extent = np.multiply(spacing, properties["shape_after_cropping_and_before_resampling"])
    steps = stack_steps(whole.stack, whole.k)
    h, w, d = (float(e / g * step) for e, g, step in zip(extent, whole.grid, steps, strict=True))
    return [d, h, w]
