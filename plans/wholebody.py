"""The whole-body grid store: every study, labelled or not, resized to one grid (paper section 2.2), read by slices.

Built on nnU-Net's DefaultPreprocessor (reading, transposition, cropping to nonzero, normalisation) and stored in
nnU-Net's own file format as float16; a chunk is one coronal slice of one modality, so a patch reads what it uses.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
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
from torch.nn.functional import interpolate
from tqdm import tqdm

from nnUNet_raw_conversion.command import UserError


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


def list_studies(raw: Path, dataset_json: dict[str, Any]) -> dict[str, tuple[list[str], str | None]]:
    """Images and label file (None in imagesPt) of every study of a raw dataset, by case id.

    Raises:
        UserError: a case id stands in imagesTr and in imagesPt.
    """
    labelled = get_filenames_of_train_images_and_targets(str(raw), dataset_json) if (raw / "imagesTr").is_dir() else {}
    studies = {case: (files["images"], files["label"]) for case, files in labelled.items()}
    ending = dataset_json["file_ending"]
    if (raw / "imagesPt").is_dir():
        for images in create_lists_from_splitted_dataset_folder(str(raw / "imagesPt"), ending):
            case = Path(images[0]).name[: -len("_0000" + ending)]
            if case in studies:
                raise UserError(f"{raw}: case {case} is in imagesTr and in imagesPt; remove one")
            studies[case] = (images, None)
    return studies


def write_store(
    folder: Path,
    studies: dict[str, tuple[list[str], str | None]],
    plans: dict[str, Any],
    dataset_json: dict[str, Any],
    processes: int,
) -> None:
    """Write the grid store of all studies to `folder`, which is replaced only when every study went well."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            jobs = [
                pool.submit(_write_study, partial / case, images, labels, plans, dataset_json)
                for case, (images, labels) in studies.items()
            ]
            for job in tqdm(as_completed(jobs), total=len(jobs), desc="Whole-body grid"):
                job.result()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _write_study(
    target: Path, images: list[str], labels: str | None, plans: dict[str, Any], dataset_json: dict[str, Any]
) -> None:
    torch.set_num_threads(1)  # studies run side by side
    manager = PlansManager(plans)
    grid = plans["fratmae"]["wholebody"]["grid"]  # (H, W, D), which are the axes of these plans
    configuration = WholeBodyConfiguration(manager.get_configuration("wholebody").configuration, grid)
    data, seg, properties = DefaultPreprocessor(verbose=False).run_case(
        images, labels, manager, configuration, dataset_json
    )
    slice_chunk = (1, 1, *grid[1:])
    nnUNetDatasetBlosc2.save_case(
        data.astype(np.float16), seg, properties, str(target), chunks=slice_chunk, blocks=slice_chunk
    )
