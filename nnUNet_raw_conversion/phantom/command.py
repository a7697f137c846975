"""fratmae_phantom: numerical patients with paired whole-body PET/CT and true lesions to a raw dataset."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnUNet_raw_conversion.clinical import ClinicalRecord, write_clinical
from nnUNet_raw_conversion.command import UserError, map_cases, run_command
from nnUNet_raw_conversion.phantom.anatomy import build_anatomy, draw_patient
from nnUNet_raw_conversion.phantom.lesions import ann_arbor, draw_lesions, draw_sites, paint_lesions
from nnUNet_raw_conversion.phantom.organs import draw_hu, draw_uptake
from nnUNet_raw_conversion.phantom.render import render
from nnUNet_raw_conversion.phantom.shapes import Grid
from nnUNet_raw_conversion.raw_dataset import RawDataset, write_case

SPACING = (4.0, 4.0, 5.0)
COHORT = (  # tracer, diagnosis, share of the cases, youngest and oldest age
    ("68Ga-PSMA", "prostate cancer", 0.08, 50, 85),
    ("18F-PSMA", "prostate cancer", 0.08, 50, 85),
    ("68Ga-PSMA", "negative control", 0.02, 50, 85),
    ("18F-PSMA", "negative control", 0.02, 50, 85),
    ("18F-FDG", "negative control", 0.12, 20, 85),
    ("18F-FDG", "melanoma", 0.12, 25, 85),
    ("18F-FDG", "lung cancer", 0.08, 45, 85),
    ("18F-FDG", "Hodgkin lymphoma", 0.48, 18, 80),
)


class PhantomCase(NamedTuple):
    """One numerical patient; arrays are (z, y, x) on `grid`: CT (HU), PET (SUVbw), true lesions, organ labels."""

    record: ClinicalRecord
    grid: Grid
    ct: np.ndarray
    pet: np.ndarray
    lesions: np.ndarray
    organs: np.ndarray


def make_case(index: int, seed: int = 0, spacing: tuple[float, float, float] = SPACING) -> PhantomCase:
    """Make case `index`. Everything is drawn from (seed, index); `spacing` (x, y, z in mm) does not change the patient.

    What the record says is true of the volume: the stage follows from the lesions that are there, bone density and
    the brain's FDG uptake follow age, the body follows sex.
    """
    streams = np.random.SeedSequence((seed, index)).spawn(5)  # so that a change in one part leaves the others alone
    clinical, body, disease, looks, imaging = map(np.random.default_rng, streams)
    tracer, diagnosis, _, youngest, oldest = COHORT[clinical.choice(len(COHORT), p=[row[2] for row in COHORT])]
    sex = "M" if "PSMA" in tracer or clinical.random() < 0.5 else "F"
    age = int(clinical.integers(youngest, oldest, endpoint=True))

    anatomy = build_anatomy(body, draw_patient(body, sex, age))
    uptake, hu = draw_uptake(looks, tracer, age), draw_hu(looks, age)
    lesions = draw_lesions(disease, diagnosis, draw_sites(disease, diagnosis), anatomy, tracer, uptake)
    stage = ann_arbor(lesion.site for lesion in lesions) if diagnosis == "Hodgkin lymphoma" else None

    grid = anatomy.grid(spacing)
    coordinates = anatomy.plan_coordinates(grid)
    organs = anatomy.organs(grid, coordinates)
    maps = paint_lesions(lesions, anatomy, grid, coordinates, organs)
    ct, pet = render(organs, maps, uptake, hu, grid, imaging)
    record = ClinicalRecord(f"phantom_{index:03d}", tracer, diagnosis, age, sex, stage)
    return PhantomCase(record, grid, ct, pet, maps.mask, organs)


def _write(index: int, folder: Path, seed: int, spacing: tuple[float, float, float]) -> ClinicalRecord:
    case = make_case(index, seed, spacing)
    images = [sitk.GetImageFromArray(array) for array in (case.ct, case.pet, case.lesions)]
    for image in images:
        image.SetSpacing(case.grid.spacing)
        image.SetOrigin(case.grid.origin)
    write_case(folder, case.record.case_id, *images)
    return case.record


def write_phantom(
    dataset_id: int, cases: int, seed: int = 0, spacing: tuple[float, float, float] = SPACING, processes: int = 1
) -> Path:
    """Write the dataset `DatasetXXX_Phantom` with `cases` cases to nnUNet_raw and return its folder.

    Raises:
        UserError: fewer than one case or process, a spacing outside 2-12 mm, or what `RawDataset` raises.
    """
    if cases < 1:
        raise UserError(f"-n {cases}: the number of cases must be 1 or more")
    if seed < 0:
        raise UserError(f"--seed {seed}: a seed is a number from 0")
    if not all(2 <= s <= 12 for s in spacing):
        raise UserError(f"--spacing {' '.join(f'{s:g}' for s in spacing)}: three numbers from 2 to 12 (mm, x y z)")
    with RawDataset(dataset_id, "Phantom") as dataset:
        work = partial(_write, folder=dataset.staging, seed=seed, spacing=tuple(spacing))
        records = list(tqdm(map_cases(work, range(cases), processes), "cases", cases))
        write_clinical(dataset.staging / "clinical.csv", sorted(records, key=lambda record: record.case_id))
    return dataset.folder


def _run(args: argparse.Namespace) -> None:
    folder = write_phantom(args.d, args.n, args.seed, tuple(args.spacing), args.np)
    print(f"{args.n} phantoms written to {folder}")
    print(f"Next: fratmae_plan_and_preprocess -d {args.d}")


def main() -> None:
    """The console script fratmae_phantom."""
    parser = argparse.ArgumentParser(prog="fratmae_phantom", description=__doc__)
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="dataset ID, 1-999")
    parser.add_argument("-n", type=int, required=True, metavar="CASES", help="number of cases")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same dataset (default 0)")
    parser.add_argument("--spacing", type=float, nargs=3, default=SPACING, metavar=("X", "Y", "Z"),
                        help="voxel spacing in mm, 2 to 12 (default 4 4 5)")  # fmt: skip
    parser.add_argument("-np", type=int, default=1, help="number of processes (default 1)")
    run_command(parser, _run)


if __name__ == "__main__":
    main()
