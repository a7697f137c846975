"""fratmae_phantom: numerical patients with paired whole-body PET/CT and true lesions to a raw dataset."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_fratmae.base.command import UserError, run_command
from nnunet_fratmae.base.pool import map_cases
from nnUNet_raw_conversion.clinical import ClinicalRecord, write_clinical
from nnUNet_raw_conversion.phantom.anatomy import build_anatomy, draw_patient
from nnUNet_raw_conversion.phantom.cohort import draw_group
from nnUNet_raw_conversion.phantom.from_labels import find_maps, make_labelled_case
from nnUNet_raw_conversion.phantom.lesions import ann_arbor, draw_lesions, draw_sites, paint_lesions
from nnUNet_raw_conversion.phantom.organs import draw_hu, draw_uptake
from nnUNet_raw_conversion.phantom.render import render
from nnUNet_raw_conversion.phantom.shapes import Grid
from nnUNet_raw_conversion.raw_dataset import RawDataset, write_case

SPACING = (4.0, 4.0, 5.0)


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
    tracer, diagnosis, _, youngest, oldest = draw_group(clinical)
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


def _write_labelled(
    index: int, folder: Path, seed: int, spacing: tuple[float, float, float] | None, maps: list[Path],
    tracer: str | None,
) -> ClinicalRecord:  # fmt: skip
    case = make_labelled_case(maps[index % len(maps)], index, seed, spacing, tracer)
    write_case(folder, case.record.case_id, case.ct, case.pet, case.lesions)
    return case.record


def write_phantom(
    dataset_id: int,
    cases: int | None,
    seed: int = 0,
    spacing: tuple[float, float, float] | None = None,
    processes: int = 1,
    anatomy: Path | None = None,
    tracer: str | None = None,
) -> tuple[Path, list[ClinicalRecord]]:
    """Write the dataset `DatasetXXX_Phantom` with `cases` cases to nnUNet_raw; return its folder and the records.

    Args:
        spacing: of the voxels in mm (x, y, z); None is `SPACING`, or with `anatomy` that of each organ map.
        anatomy: a folder of organ maps to build the cases around, in the order of their names, from the first again
            where there are more cases; `cases` may then be None, for one case a map.
        tracer: of the cases around organ maps; None takes it from the names of the files.

    Raises:
        UserError: fewer than one case or process, a spacing outside 2-12 mm, or what `find_maps`, `RawDataset` raise.
    """
    if cases is None and anatomy is None:
        raise UserError("-n is missing: say how many cases you want, or give organ maps with --anatomy")
    if cases is not None and cases < 1:
        raise UserError(f"-n {cases}: the number of cases must be 1 or more")
    if seed < 0:
        raise UserError(f"--seed {seed}: a seed is a number from 0")
    if spacing is not None and not all(2 <= s <= 12 for s in spacing):
        raise UserError(f"--spacing {' '.join(f'{s:g}' for s in spacing)}: three numbers from 2 to 12 (mm, x y z)")
    if tracer is not None and anatomy is None:
        raise UserError(f"--tracer {tracer}: goes with --anatomy only; without it the tracers are drawn")
    dataset = RawDataset(dataset_id, "Phantom")
    if anatomy is None:
        work = partial(_write, seed=seed, spacing=tuple(spacing or SPACING))
    else:
        maps = find_maps(anatomy, tracer, cases)
        cases = cases or len(maps)
        work = partial(_write_labelled, seed=seed, spacing=spacing, maps=maps, tracer=tracer)
    with dataset:
        work = partial(work, folder=dataset.staging)
        records = list(tqdm(map_cases(work, range(cases), processes), "cases", cases))
        records.sort(key=lambda record: record.case_id)
        write_clinical(dataset.staging / "clinical.csv", records)
    return dataset.folder, records


def _run(args: argparse.Namespace) -> None:
    spacing = args.spacing and tuple(args.spacing)
    folder, records = write_phantom(args.d, args.n, args.seed, spacing, args.np, args.anatomy, args.tracer)
    print(f"{len(records)} phantoms written to {folder}")
    print(f"Next: fratmae_plan_and_preprocess -d {args.d}")


def main() -> None:
    """The console script fratmae_phantom."""
    parser = argparse.ArgumentParser(prog="fratmae_phantom", description=__doc__)
    parser.add_argument("-d", type=int, required=True, metavar="ID", help="dataset ID, 1-999")
    parser.add_argument("-n", type=int, metavar="CASES", help="number of cases (with --anatomy: default one a map)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same dataset (default 0)")
    parser.add_argument("--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"),
                        help="voxel spacing in mm, 2 to 12 (default 4 4 5, or that of the organ map)")  # fmt: skip
    parser.add_argument("--anatomy", type=Path, metavar="DIR", help="folder of organ maps (labels 1 to 10 as autoPET "
                        "III's) to build the cases around")  # fmt: skip
    parser.add_argument("--tracer", help="18F-FDG, 18F-PSMA or 68Ga-PSMA, for all organ maps (default: fdg or psma "
                        "as the name of the file says)")  # fmt: skip
    parser.add_argument("-np", type=int, default=1, help="number of processes (default 1)")
    run_command(parser, _run)


if __name__ == "__main__":
    main()
