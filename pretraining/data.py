"""Whole-body patches from the grid stores of one or several datasets (paper section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from torch.utils.data import Dataset

from nnUNet_raw_conversion.command import UserError
from plans.extension import find_modalities


@dataclass(frozen=True)
class Case:
    """One study of a grid store: its file, its name and which of its channels are CT and PET."""

    path: Path
    name: str
    channels: tuple[int, int]


def list_cases(preprocessed: Path, plans: dict[str, Any], dataset_json: dict[str, Any]) -> list[Case]:
    """All studies in the grid store of a preprocessed dataset, by name.

    Raises:
        UserError: the store is missing or empty.
    """
    store = preprocessed / plans["configurations"]["wholebody"]["data_identifier"]
    ct, pet = find_modalities(dataset_json)
    files = sorted(f for f in store.glob("*.b2nd") if not f.stem.endswith("_seg"))
    if not files:
        dataset_id = int(preprocessed.name[7:10])
        raise UserError(f"{store}: no studies there; run fratmae_plan_and_preprocess -d {dataset_id} again")
    return [Case(f, f"{preprocessed.name}/{f.stem}", (ct, pet)) for f in files]


def crop_start(length: int, extent: int, draw: float) -> int:
    """First index of a window of `extent` in `length`; `draw` in [0, 1) moves it over all places."""
    return int(draw * (length - extent + 1))


class WholeBodyPatches(Dataset):
    """Random coronal patches; sample `i` of epoch `e` is a function of (seed, e, i) alone, so any run can be resumed.

    A patch takes every k-th of k * patch[0] neighbouring coronal slices, at a random place and phase, and is
    mirrored left-right half of the time. Only the slices that are used are read.
    """

    def __init__(
        self, cases: list[Case], patch: tuple[int, int, int], k: int, patches_per_case: int, seed: int, augment: bool
    ) -> None:
        self.cases, self.patch, self.k, self.seed, self.augment = cases, patch, k, seed, augment
        self.patches_per_case = patches_per_case

    def __len__(self) -> int:
        return len(self.cases) * self.patches_per_case

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        """The patch of sample `index` in `epoch`, key = (epoch, index): (2, *patch) CT and PET, float32."""
        epoch, index = key
        place, phase, w, d, mirror = np.random.default_rng((self.seed, epoch, index)).random(5)
        case = self.cases[index % len(self.cases)]
        volume = blosc2.open(str(case.path), mode="r")
        _, height, width, depth = volume.shape
        if not self.augment:  # the middle of the body, seen the same way each time
            place, phase, w, d, mirror = 0.5, 0.0, 0.5, 0.5, 1.0
        first = crop_start(height, self.k * self.patch[0], place) + int(phase * self.k)
        columns = slice(start := crop_start(width, self.patch[1], w), start + self.patch[1])
        rows = slice(start := crop_start(depth, self.patch[2], d), start + self.patch[2])
        patch = np.empty((2, *self.patch), dtype=np.float32)
        for modality, channel in enumerate(case.channels):
            for i in range(self.patch[0]):
                patch[modality, i] = volume[channel, first + i * self.k, columns, rows]
        if mirror < 0.5:
            patch = patch[:, :, ::-1].copy()
        return torch.from_numpy(patch)


class EpochBatches:
    """Batch sampler: a shuffled pass over all samples, different in every epoch and the same for the same seed.

    The last batch is filled up from the start of the pass, so that every step has `batch_size` patches.
    """

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.samples)
        order = np.resize(order, len(self) * self.batch_size)
        for batch in order.reshape(len(self), self.batch_size):
            yield [(self.epoch, int(index)) for index in batch]
