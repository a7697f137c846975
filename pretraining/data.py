"""What a pretraining reads: the cases of one or several datasets, and their patches from disk or from memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from nnunet_fratmae.base.command import UserError, dataset_number
from nnUNet_raw_conversion.clinical import ClinicalRecord, prompt, read_clinical
from plans.channels import find_modalities
from plans.reader import check_whole_body
from plans.store import Study, check_grid
from plans.views import Batches, Key, Views, augment


@dataclass(frozen=True)
class Case(Study):
    """One stored study of a dataset, named dataset/case, with its metadata as text."""

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
    table = preprocessed / "clinical.csv"
    # With a mapping, columns that are not ours are allowed: a user may add labels for staging
    records = read_clinical(table, {"case_id": "case_id"}) if table.is_file() else {}
    cases = []
    for file in files:
        record = records.get(file.stem, ClinicalRecord(file.stem))
        patient = record.patient and f"{preprocessed.name}/{record.patient}"
        cases.append(Case(file, f"{preprocessed.name}/{file.stem}", (ct, pet), prompt(record) or None, patient))
    check_grid(cases, plans["fratmae"]["wholebody"]["grid"])
    return cases


class DiskPatches(Dataset):
    """Patches of keys, read when they are needed: ((2, *patch), number of the case)."""

    def __init__(self, cases: list[Case], views: Views) -> None:
        self.cases, self.views = cases, views

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        view = self.views(key)
        return augment(self.cases[view.study].read_window(view.window), view), view.study


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
            self.volumes[number] = case.read_whole().to(device)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for keys in self.batches:
            views = [self.views(key) for key in keys]
            patches = [augment(self.volumes[v.study][(slice(None), *v.window)].float(), v) for v in views]
            yield torch.stack(patches), torch.tensor([v.study for v in views])


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
