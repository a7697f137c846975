"""Whole-body patches from the grid stores of one or several datasets (paper section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from nnunet_fratmae.base.command import UserError, dataset_number
from nnUNet_raw_conversion.clinical import ClinicalRecord, prompt, read_clinical
from plans.extension import find_modalities
from plans.preprocessed import open_case, reading_case
from plans.reader import check_whole_body
from plans.settings import STACKS, Pretrain, WholeBody
from plans.units import PRETRAINING_UNITS, shift_above_air

Key = tuple[int, int]
"""(epoch, index): everything random about a sample is a function of the seed and this key."""


@dataclass(frozen=True)
class Case:
    """One study of a grid store: its file, its name, which of its channels are CT and PET, its metadata as text."""

    path: Path
    name: str
    channels: tuple[int, int]
    prompt: str | None = None
    patient: str | None = None
    """Shared by all studies of a patient; None: this is the only one."""

    @property
    def dataset(self) -> str:
        return self.name.split("/")[0]


def list_cases(preprocessed: Path, plans: dict[str, Any], dataset_json: dict[str, Any]) -> list[Case]:
    """All studies in the grid store of a preprocessed dataset, by name, with their prompts from clinical.csv.

    Raises:
        UserError: CT or PET or the store is missing or empty or not on the plans' grid, or clinical.csv is wrong.
    """
    ct, pet = find_modalities(dataset_json)
    check_whole_body(plans, f"{plans['plans_name']}.json")
    store = preprocessed / plans["configurations"]["wholebody"]["data_identifier"]
    files = sorted(f for f in store.glob("*.b2nd") if not f.stem.endswith("_seg"))
    if not files:
        dataset_id = dataset_number(preprocessed.name)
        raise UserError(f"{store}: no studies there; run fratmae_plan_and_preprocess -d {dataset_id} again")
    check_grid(files, plans["fratmae"]["wholebody"]["grid"])
    table = preprocessed / "clinical.csv"
    # With a mapping, columns that are not ours are allowed: a user may add labels for staging
    records = read_clinical(table, {"case_id": "case_id"}) if table.is_file() else {}
    cases = []
    for file in files:
        record = records.get(file.stem, ClinicalRecord(file.stem))
        patient = record.patient and f"{preprocessed.name}/{record.patient}"
        cases.append(Case(file, f"{preprocessed.name}/{file.stem}", (ct, pet), prompt(record) or None, patient))
    return cases


# ------------------------------------------------------------------------------------- what is drawn for one patch


class View(NamedTuple):
    """One patch of one case: which slices, which window of them, and how it is changed."""

    case: int
    window: tuple[slice, slice, slice]
    """Of the grid's axes (H, W, D); the stack's axis has a step of k."""
    mirrored: bool
    pet_factor: float
    ct_offset: float
    """In pretraining units."""


class Views:
    """Draws views; `self(key)` is the same for the same seed and key, so any run can be resumed."""

    def __init__(self, weights: np.ndarray | None, cases: int, whole: WholeBody, options: Pretrain) -> None:
        """`weights` (cases,): probability of each case; None: each case `patches_per_case` times an epoch."""
        self.cases, self.whole, self.options = cases, whole, options
        self.cumulative = None if weights is None else np.cumsum(weights / weights.sum())

    def __call__(self, key: Key) -> View:
        epoch, index = key
        generator = np.random.default_rng((self.options.seed, epoch, index))
        pick, *places, mirror = generator.random(6)
        scale, shift = generator.standard_normal(2)
        case = index % self.cases
        if self.cumulative is not None:
            case = min(int(np.searchsorted(self.cumulative, pick, side="right")), self.cases - 1)
        return View(
            case,
            window(self.whole, places),
            self.options.mirror and mirror < 0.5,
            float(np.exp(self.options.pet_scale * scale)),
            float(self.options.ct_shift * shift / PRETRAINING_UNITS["CT"].std),
        )


def check_grid(files: Iterable[Path], grid: Sequence[int]) -> None:
    """See that studies are on the grid (H, W, D), or patches would be corners of them.

    Raises:
        UserError: one is not: the plans were edited, or nnU-Net's own preprocessing wrote the store.
    """
    for file in files:
        shape = open_case(file).shape[1:]
        if shape != tuple(grid):
            raise UserError(f"{file}: has {' x '.join(map(str, shape))} voxels, the plans' wholebody.grid is "
                            f"{' x '.join(map(str, grid))}; write the store anew with fratmae_plan_and_preprocess "
                            "(nnUNetv2_preprocess does not put studies on a grid)")  # fmt: skip


def window(whole: WholeBody, draws: Sequence[float]) -> tuple[slice, slice, slice]:
    """The voxels of a patch: every k-th of k * n neighbouring slices of the stack, at a random place and phase.

    Args:
        draws: four numbers in [0, 1): places along H, W and D, and the phase.
    """
    *places, phase = draws
    slices = []
    for axis, (length, extent, place) in enumerate(zip(whole.grid, whole.patch, places, strict=True)):
        k = whole.k if axis == STACKS[whole.stack] else 1
        first = int(place * (length - k * extent + 1)) + int(phase * k)
        slices.append(slice(first, first + k * (extent - 1) + 1, k))
    return slices[0], slices[1], slices[2]


def augment(patch: Tensor, view: View) -> Tensor:
    """Mirror left-right, scale the PET, shift the CT above air; patch (2, H, W, D) in pretraining units, changed in
    place. Zero stays zero: air and padding have no uptake and no density to be off by."""
    if view.mirrored:
        patch = patch.flip(2)
    patch[1] *= view.pet_factor
    patch[0] = shift_above_air(patch[0], view.ct_offset)
    return patch


# ------------------------------------------------------------------------------------------------ where patches are


def read_patch(case: Case, window: tuple[slice, slice, slice]) -> Tensor:
    """(2, *patch) CT and PET, float32; of a coronal stack only the slices that are used are read."""
    volume = open_case(case.path)
    rows, columns, heights = window
    first = range(rows.start, rows.stop, rows.step or 1)
    patch = np.empty((2, len(first), *(len(range(s.start, s.stop, s.step or 1)) for s in window[1:])), np.float32)
    for modality, channel in enumerate(case.channels):
        for i, row in enumerate(first):  # the store's chunks are coronal slices
            with reading_case(case.path):
                plane = volume[channel, row, columns.start : columns.stop, heights.start : heights.stop]
            patch[modality, i] = plane[:: columns.step or 1, :: heights.step or 1]
    return torch.from_numpy(patch)


class DiskPatches(Dataset):
    """Patches of keys, read when they are needed: ((2, *patch), number of the case)."""

    def __init__(self, cases: list[Case], views: Views) -> None:
        self.cases, self.views = cases, views

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        view = self.views(key)
        return augment(read_patch(self.cases[view.case], view.window), view), view.case


class MemoryPatches:
    """All studies in the memory of a device as float16; iterating gives batches ((B, 2, *patch), cases (B,)).

    1,292 studies of 160x160x192 voxels are 25 GB.
    """

    def __init__(self, cases: list[Case], views: Views, batches: Batches, device: torch.device) -> None:
        self.views, self.batches, self.device = views, batches, device
        shape = (len(cases), 2, *views.whole.grid)
        try:
            self.volumes = torch.empty(shape, dtype=torch.float16, device=device)
        except RuntimeError:
            needed = np.prod(shape, dtype=float) * 2 / 1e9
            raise UserError(f"pretrain.store=memory: {len(cases)} studies need {needed:.1f} GB on {device}; use "
                            "pretrain.store=disk") from None  # fmt: skip
        for number, case in enumerate(tqdm(cases, "Studies to memory")):
            with reading_case(case.path):
                volume = open_case(case.path)[:][list(case.channels)]
            self.volumes[number] = torch.from_numpy(volume).to(device)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for keys in self.batches:
            views = [self.views(key) for key in keys]
            patches = [augment(self.volumes[v.case][(slice(None), *v.window)].float(), v) for v in views]
            yield torch.stack(patches), torch.tensor([v.case for v in views])


class Batches:
    """The passes of one process through an epoch, as lists of keys; a sampler for DataLoader.

    An epoch is a shuffled pass over all samples, different in every epoch and the same for the same seed; the last
    step is filled up from the start. A step of `batch_size` samples is cut into passes of `micro` samples for each of
    `world` processes, so the steps are the same on any number of GPUs.
    """

    def __init__(self, samples: int, batch_size: int, micro: int, rank: int, world: int, seed: int) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.passes = batch_size // (micro * world)
        self.places = [slice((p * world + rank) * micro, (p * world + rank + 1) * micro) for p in range(self.passes)]
        self.epoch, self.first_step = 0, 0

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-self.samples // self.batch_size)

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.passes

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.samples)
        order = np.resize(order, self.steps * self.batch_size).reshape(self.steps, self.batch_size)
        for step in order[self.first_step :]:
            for place in self.places:
                yield [(self.epoch, int(index)) for index in step[place]]


def case_weights(
    cases: list[Case], datasets: list[str], dataset_weights: tuple[float, ...] | None
) -> np.ndarray | None:
    """How often each case is drawn, (cases,), from the weights of the datasets; None: each alike.

    Raises:
        UserError: not one weight a dataset, or a weight for a dataset without a case.
    """
    if dataset_weights is None:
        return None
    if len(dataset_weights) != len(datasets):
        raise UserError(f"pretrain.dataset_weights: has {len(dataset_weights)} weights for {len(datasets)} datasets; "
                        "give one for each in the order of -d")  # fmt: skip
    counts = [sum(case.dataset == name for case in cases) for name in datasets]
    for name, weight, count in zip(datasets, dataset_weights, counts, strict=True):
        if weight and not count:
            raise UserError(f"pretrain.dataset_weights: {name} has the weight {weight:g} but no case to train with "
                            "(all are held out or left out by -f); give it 0 or leave it out of -d")  # fmt: skip
    numbers = [datasets.index(case.dataset) for case in cases]
    return np.array([dataset_weights[number] / counts[number] for number in numbers])
