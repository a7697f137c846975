"""The whole-body grid store: every study, labelled or not, resized to one grid (paper section 2.2); writer and reader.

Built on nnU-Net's DefaultPreprocessor (reading, transposition, cropping to nonzero, normalisation) and stored in
nnU-Net's own file format as float16; a chunk is one coronal slice of one modality, so a patch reads what it uses.
A stored study is asked for its shape and for a window of its voxels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from nnunetv2.utilities.utils import (
    create_lists_from_splitted_dataset_folder,
    get_filenames_of_train_images_and_targets,
)
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.pool import map_cases
from nnunet_fratmae.base.units import PRETRAINING_UNITS
from plans.channels import channel_modalities, find_channels
from plans.preprocessed import open_case, reading_case, replaced

Window = tuple[slice, slice, slice]
"""Voxels of a study along (H, W, D), perhaps every k-th."""

MOST_SATURATED = 0.05  # share of a study above the PET's upper limit; hot kidneys and bladder are well below 1 %


def resize_to_grid(volume: np.ndarray, grid: Sequence[int], is_labels: bool = False) -> np.ndarray:
    """(C, H, W, D) -> (C, *grid), float32.

    Images are averaged with a triangle filter as wide as the shrinkage (no aliasing; SUV of a lesion is averaged, not
    picked), labels take the nearest voxel. Voxel edges, not centres, are aligned.
    """
    x = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))
    if is_labels:
        return interpolate(x[None], size=tuple(grid), mode="nearest-exact")[0].numpy()
    h, w, d = grid
    x = interpolate(x, size=(w, d), mode="bilinear", antialias=True)  # C as batch, H as channels
    x = interpolate(x.transpose(1, 2), size=(h, d), mode="bilinear", antialias=True).transpose(1, 2)
    return x.numpy()


class WholeBodyConfiguration(ConfigurationManager):
    """A configuration in which nnU-Net's resampling step resizes to the grid, whatever the study's spacing is."""

    def __init__(self, configuration: dict[str, Any], grid: Sequence[int]) -> None:
        super().__init__(configuration)
        self.grid = tuple(grid)

    @property
    def resampling_fn_data(self) -> Callable[..., np.ndarray]:
        return lambda data, *_: resize_to_grid(data, self.grid)

    @property
    def resampling_fn_seg(self) -> Callable[..., np.ndarray]:
        return lambda seg, *_: resize_to_grid(seg, self.grid, is_labels=True).astype(seg.dtype)


def list_raw_studies(raw: Path, dataset_json: dict[str, Any]) -> dict[str, tuple[list[str], str | None]]:
    """Images and label file (None in imagesPt) of every study of a raw dataset, by case id.

    Raises:
        UserError: a case without an image of every channel or its label file, or a case id in imagesTr and imagesPt.
    """
    labelled = get_filenames_of_train_images_and_targets(str(raw), dataset_json) if (raw / "imagesTr").is_dir() else {}
    studies = {case: (files["images"], files["label"]) for case, files in labelled.items()}
    ending, channels = dataset_json["file_ending"], channel_modalities(dataset_json)
    if (raw / "imagesPt").is_dir():
        for images in create_lists_from_splitted_dataset_folder(str(raw / "imagesPt"), ending):
            case = Path(images[0]).name[: -len("_0000" + ending)]
            if case in studies:
                raise UserError(f"{raw}: case {case} is in imagesTr and in imagesPt; remove one")
            studies[case] = (images, None)
    for case, (images, labels) in studies.items():
        names = sorted(Path(image).name for image in images)
        needed = [f"{case}_{channel:04d}{ending}" for channel in range(len(channels))]
        if names != needed:
            raise UserError(f"{raw}: case {case} has the images {', '.join(names)}; {' and '.join(channels)} are needed"
                            f", as {' and '.join(needed)}")  # fmt: skip
        if labels is not None and not Path(labels).is_file():
            raise UserError(f"{labels} is not there; add it, or move the images of {case} to imagesPt")
    return studies


def check_units(case: str, volumes: Mapping[str, np.ndarray]) -> None:
    """See that a study, CT, PET or both in pretraining units, can have been HU and SUV.

    Raises:
        UserError: values that are not finite, or a PET that lies on the upper limit, as Bq/ml does.
    """
    for modality, volume in volumes.items():
        if not np.isfinite(volume).all():
            raise UserError(f"case {case}: the {modality} has NaN or infinite voxels; mend the image")
    pet = PRETRAINING_UNITS["PET"]
    highest = (pet.upper - pet.mean) / pet.std
    share = float(np.mean(volumes["PET"] >= highest - 1e-3)) if "PET" in volumes else 0.0
    if share > MOST_SATURATED:
        raise UserError(f"case {case}: {share:.0%} of the PET is above SUV {pet.upper:g}: Bq/ml? convert it to SUVbw")


def check_preprocessed(folder: Path, dataset_json: dict[str, Any]) -> None:
    """`check_units` of what nnU-Net preprocessed in pretraining units, for datasets that have no whole-body store.

    Raises:
        UserError: as `check_units`.
    """
    dataset, channels = nnUNetDatasetBlosc2(str(folder)), find_channels(dataset_json)
    for case in tqdm(dataset.identifiers, "Units"):
        with reading_case(folder / f"{case}.b2nd"):
            data = dataset.load_case(case)[0]
            volumes = {modality: data[channel] for modality, channel in channels.items()}
        check_units(case, volumes)


def write_store(
    folder: Path,
    studies: dict[str, tuple[list[str], str | None]],
    plans: dict[str, Any],
    dataset_json: dict[str, Any],
    processes: int,
) -> None:
    """Write the grid store of all studies to `folder`, which is replaced only when every study went well.

    Raises:
        UserError: as `read_study` and `plans.preprocessed.replaced`.
    """
    with replaced(folder) as partial:
        work = functools.partial(_write_study, folder=partial, plans=plans, dataset_json=dataset_json)
        list(tqdm(map_cases(work, list(studies.items()), processes), "Whole-body grid", len(studies)))


def read_study(
    case: str, images: list[str], labels: str | None, plans: dict[str, Any], dataset_json: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """A study as the store has it: volume (C, H, W, D) float16, labels, and nnU-Net's properties of the study.

    Raises:
        UserError: images that cannot be read, do not fit together or cannot be HU and SUV.
    """
    manager = PlansManager(plans)
    grid = plans["fratmae"]["wholebody"]["grid"]  # (H, W, D), which are the axes of these plans
    configuration = WholeBodyConfiguration(manager.get_configuration("wholebody").configuration, grid)
    try:
        data, seg, properties = DefaultPreprocessor(verbose=False).run_case(
            images, labels, manager, configuration, dataset_json
        )
    except (RuntimeError, AssertionError) as error:  # how nnU-Net and ITK say that files are unreadable or do not fit
        raise UserError(f"case {case}: {' '.join(str(error).split()) or 'CT and PET differ in shape'}") from None
    if data.shape[1:] != tuple(grid):
        raise UserError(f"case {case}: nnunetv2 {version('nnunetv2')} did not resize it to {grid}, so it is none that "
                        "FratMAE knows; install the version that this package asks for")  # fmt: skip
    check_units(case, {modality: data[channel] for modality, channel in find_channels(dataset_json, "both").items()})
    return data.astype(np.float16), seg, properties


def _write_study(
    study: tuple[str, tuple[list[str], str | None]], folder: Path, plans: dict[str, Any], dataset_json: dict[str, Any]
) -> None:
    case, (images, labels) = study
    data, seg, properties = read_study(case, images, labels, plans, dataset_json)
    slice_chunk = (1, 1, *data.shape[2:])
    nnUNetDatasetBlosc2.save_case(data, seg, properties, str(folder / case), chunks=slice_chunk, blocks=slice_chunk)


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Study:
    """A stored study: its file, its name, and which of its channels are CT and PET."""

    path: Path
    name: str
    channels: tuple[int, int]

    @functools.cached_property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (H, W, D).

        Raises:
            UserError: the file is damaged or cut off.
        """
        _, h, w, d = open_case(self.path).shape
        return h, w, d

    def read_window(self, window: Window) -> Tensor:
        """(2, *window) CT and PET in pretraining units, float32; of a coronal stack only the slices that are used are
        read.

        Raises:
            UserError: the file is damaged or cut off.
        """
        volume = open_case(self.path)
        rows, columns, heights = window
        used = range(rows.start, rows.stop, rows.step or 1)
        patch = np.empty((2, len(used), *(len(range(s.start, s.stop, s.step or 1)) for s in window[1:])), np.float32)
        for modality, channel in enumerate(self.channels):
            for i, row in enumerate(used):  # the chunks are coronal slices
                with reading_case(self.path):
                    plane = volume[channel, row, columns.start : columns.stop, heights.start : heights.stop]
                patch[modality, i] = plane[:: columns.step or 1, :: heights.step or 1]
        return torch.from_numpy(patch)

    def read_whole(self) -> Tensor:
        """(2, H, W, D) CT and PET in pretraining units, float16 as stored.

        Raises:
            UserError: the file is damaged or cut off.
        """
        with reading_case(self.path):
            return torch.from_numpy(open_case(self.path)[:][list(self.channels)])


def check_grid(studies: Iterable[Study], grid: Sequence[int]) -> None:
    """See that studies are on the grid (H, W, D), or patches would be corners of them.

    Raises:
        UserError: one is not: the plans were edited, or nnU-Net's own preprocessing wrote the store.
    """
    for study in studies:
        if study.shape != tuple(grid):
            raise UserError(f"{study.path}: has {' x '.join(map(str, study.shape))} voxels, the plans' wholebody.grid "
                            f"is {' x '.join(map(str, grid))}; write the store anew with fratmae_plan_and_preprocess "
                            "(nnUNetv2_preprocess does not put studies on a grid)")  # fmt: skip
