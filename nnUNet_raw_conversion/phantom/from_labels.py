"""Phantoms around real organs: PET/CT made from whole-body organ label maps in the coding of autoPET III.

The organs are the real ones; the rest of the patient is the plan of `anatomy`, laid over them by `fit`. The images
have the geometry and the orientation of the label map.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.clinical import ClinicalRecord, clinical_record
from nnUNet_raw_conversion.geometry import read_image
from nnUNet_raw_conversion.phantom.anatomy import Patient, draw_patient
from nnUNet_raw_conversion.phantom.cohort import Group, draw_group
from nnUNet_raw_conversion.phantom.fit import BLADDER, PROSTATE, FittedAnatomy
from nnUNet_raw_conversion.phantom.lesions import (
    EXTRANODAL,
    NODAL,
    SOFT,
    ann_arbor,
    draw_lesions,
    draw_sites,
    paint_lesions,
)
from nnUNet_raw_conversion.phantom.organs import TRACERS, draw_hu, draw_uptake, labels_of
from nnUNet_raw_conversion.phantom.real_organs import build_around
from nnUNet_raw_conversion.phantom.render import render
from nnUNet_raw_conversion.phantom.shapes import Grid

IMAGES = (".nii", ".nii.gz", ".mha", ".nrrd")


class LabelledCase(NamedTuple):
    """A phantom in the geometry of its label map: CT (HU), PET (SUVbw), true lesions."""

    record: ClinicalRecord
    ct: sitk.Image
    pet: sitk.Image
    lesions: sitk.Image


def tracer_of(path: Path, tracer: str | None) -> tuple[str, ...]:
    """The tracers a case made from `path` may have: the one asked for, or those the file name speaks of.

    Raises:
        UserError: `tracer` is none of `TRACERS` (nor another way to write it), or the name says neither fdg nor psma.
    """
    if tracer is not None:
        known = clinical_record("tracer", tracer=tracer).tracer
        if known not in TRACERS:
            raise UserError(f"--tracer {tracer}: unknown; give one of {', '.join(TRACERS)}")
        return (known,)
    found = re.search(r"(?<![a-z])(fdg|psma)(?![a-z])", path.name.lower())
    if not found:
        raise UserError(f"{path}: the name says neither fdg nor psma; rename it or give --tracer")
    return tuple(name for name in TRACERS if found[1] in name.lower())


def read_organs(path: Path) -> sitk.Image | None:
    """The organ map of a file, uint8; None if it holds less than two organs, as a lesion mask does.

    Raises:
        UserError: the file cannot be read or is no map of the labels 0 to 10.
    """
    image = read_image(path)
    values = np.unique(sitk.GetArrayViewFromImage(image))
    strange = [v for v in values if not 0 <= v <= 10 or v % 1]
    if strange:
        raise UserError(f"{path}: is no organ map: it has the value {strange[0]:g} (organs are 1 to 10, else 0); "
                        "remove it from the folder")  # fmt: skip
    return sitk.Cast(image, sitk.sitkUInt8) if len(values) > 2 else None


def find_maps(folder: Path, tracer: str | None, wanted: int | None = None) -> list[Path]:
    """The organ maps in `folder` in the order of their names, `wanted` at most. Lesion masks beside them are none.

    Raises:
        UserError: no folder, no organ map in it, or what `tracer_of` and `read_organs` raise.
    """
    maps: list[Path] = []
    for path in sorted(path for path in Path(folder).glob("*") if path.name.endswith(IMAGES)):
        if len(maps) == wanted:
            break
        tracer_of(path, tracer)
        if read_organs(path) is not None:
            maps.append(path)
    if not maps:
        raise UserError(f"--anatomy {folder}: there are no organ maps (.nii.gz, labels 0 to 10) in this folder")
    return maps


def make_labelled_case(
    path: Path, index: int, seed: int = 0, spacing: tuple[float, float, float] | None = None, tracer: str | None = None
) -> LabelledCase:
    """Make case `index` around the organs of `path`; all that is not in the map is drawn from (seed, index).

    `spacing` is in mm along the patient's right-left, front-back and foot-head axes; None keeps that of the map.
    """
    streams = np.random.SeedSequence((seed, index)).spawn(6)
    clinical, body, disease, looks, imaging, inner = map(np.random.default_rng, streams)
    image = read_organs(path)
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    upright = _resampled(sitk.DICOMOrient(image, "LPS"), spacing)
    real = _mended(sitk.GetArrayFromImage(upright), upright.GetSpacing()[2])
    group, patient = _draw_person(clinical, body, real, upright.GetSpacing(), tracer_of(path, tracer))
    if patient.sex == "F":
        real[real == PROSTATE] = 0

    part, grid = _window(real, upright.GetSpacing())
    anatomy = build_around(real[part], grid, patient, body, inner)
    uptake, hu = draw_uptake(looks, group.tracer, patient.age), draw_hu(looks, patient.age)
    sites = _draw_sites(disease, group.diagnosis, anatomy)
    lesions = draw_lesions(disease, group.diagnosis, sites, anatomy, group.tracer, uptake)
    maps = paint_lesions(lesions, anatomy, anatomy.grid, anatomy.coordinates, anatomy.labels)
    ct, pet = render(anatomy.labels, maps, uptake, hu, anatomy.grid, imaging)

    diagnosis = group.diagnosis if sites else "negative control"
    stage = ann_arbor(sites) if diagnosis == "Hodgkin lymphoma" else None
    record = ClinicalRecord(f"phantom_{index:03d}", group.tracer, diagnosis, patient.age, patient.sex, stage)
    first = [round((a - b) / s) for a, b, s in zip(anatomy.grid.origin, grid.origin, grid.spacing, strict=True)]
    start = [f + p.start for f, p in zip(first, part[::-1], strict=True)]
    reference = image if spacing is None else sitk.DICOMOrient(upright, code)
    volumes = ((np.rint(ct).astype(np.int16), -1024), (pet, 0), (maps.mask, 0))
    del anatomy, maps, real, ct, pet
    return LabelledCase(record, *(_placed(array, fill, start, upright, reference, code) for array, fill in volumes))


def _placed(
    array: np.ndarray, fill: float, start: list[int], upright: sitk.Image, reference: sitk.Image, code: str
) -> sitk.Image:
    """`array`, which begins at the index `start` (x, y, z) of `upright`, on the grid of `reference` (the same grid in
    the orientation `code`), with `fill` around it."""
    small = sitk.GetImageFromArray(array)
    small.SetSpacing(upright.GetSpacing())
    small.SetDirection(upright.GetDirection())
    small.SetOrigin(upright.TransformIndexToPhysicalPoint(start))
    small = sitk.DICOMOrient(small, code)
    i, j, k = reference.TransformPhysicalPointToIndex(small.GetOrigin())
    nx, ny, nz = small.GetSize()
    volume = np.full(reference.GetSize()[::-1], fill, array.dtype)
    volume[k : k + nz, j : j + ny, i : i + nx] = sitk.GetArrayViewFromImage(small)
    result = sitk.GetImageFromArray(volume)
    result.CopyInformation(reference)
    return result


def _resampled(labels: sitk.Image, spacing: tuple[float, float, float] | None) -> sitk.Image:
    """The labels with another voxel size and the same outer corner."""
    if spacing is None:
        return labels
    old, new = np.array(labels.GetSpacing()), np.array(spacing)
    size = np.maximum(np.rint(labels.GetSize() * old / new), 1).astype(int)
    direction = np.reshape(labels.GetDirection(), (3, 3))
    origin = np.array(labels.GetOrigin()) + direction @ ((new - old) / 2)
    return sitk.Resample(labels, size.tolist(), sitk.Transform(), sitk.sitkNearestNeighbor, origin.tolist(),
                         new.tolist(), labels.GetDirection(), 0)  # fmt: skip


def _mended(real: np.ndarray, slice_mm: float) -> np.ndarray:
    """Mend two faults of automatic organ maps: specks, smaller than a twentieth of the organ's largest part, and
    organs that fray and stop up to 15 mm before the end of the field of view, which in truth they reach."""
    for label, box in enumerate(ndimage.find_objects(real, 10), 1):
        if box is None:
            continue
        parts, count = ndimage.label(real[box] == label)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        sizes[0] = 0
        real[box][(sizes < 0.05 * sizes.max())[parts] & (parts > 0)] = 0
        areas = (real == label).sum((1, 2))
        held, reach, frayed = np.flatnonzero(areas), int(15 / slice_mm), int(12 / slice_mm)
        for whole, gap in ((held[0] + frayed, slice(0, held[0])), (held[-1] - frayed, slice(held[-1] + 1, len(real)))):
            inside = min(max(whole, held[0]), held[-1])
            if gap.stop - gap.start <= reach and areas[inside] > 0.5 * areas.max():
                end = real[: inside + 1] if gap.start == 0 else real[inside:]
                end[(end == 0) & (real[inside] == label)] = label
    return real


def _draw_person(
    clinical: np.random.Generator, body: np.random.Generator, real: np.ndarray, spacing: tuple[float, float, float],
    tracers: tuple[str, ...],
) -> tuple[Group, Patient]:  # fmt: skip
    """Who it is. A prostate makes a man, its absence beside a bladder a woman, unless the tracer is PSMA."""
    group = draw_group(clinical, lambda group: group.tracer in tracers)
    prostate = np.count_nonzero(real == PROSTATE) * np.prod(spacing) > 4000  # mm^3; less is a fault of the map
    coin = clinical.random() < 0.5
    man = "PSMA" in group.tracer or prostate or (coin and not (real == BLADDER).any())
    age = int(clinical.integers(group.youngest, group.oldest, endpoint=True))
    return group, draw_patient(body, "M" if man else "F", age)


def _window(real: np.ndarray, spacing: tuple[float, float, float]) -> tuple[tuple[slice, ...], Grid]:
    """The part of the field of view in which a body with these organs can lie, and its grid (x = 0 in its middle)."""
    part = [slice(0, len(real))]
    for axis, before, behind in ((1, 150, 150), (2, None, None)):
        held = np.flatnonzero(real.any(tuple({0, 1, 2} - {axis})))
        if before is None:
            middle, step = (held[0] + held[-1]) / 2, spacing[2 - axis]
            first, last = middle - 310 / step, middle + 310 / step
        else:
            first, last = held[0] - before / spacing[2 - axis], held[-1] + behind / spacing[2 - axis]
        part.append(slice(max(int(first), 0), min(int(last) + 1, real.shape[axis])))
    size = tuple(p.stop - p.start for p in part)[::-1]
    origin = (-spacing[0] * (size[0] - 1) / 2, -spacing[1] * (size[1] - 1) / 2, 0.0)
    return tuple(part), Grid(size, tuple(spacing), origin)


def _draw_sites(rng: np.random.Generator, diagnosis: str, anatomy: FittedAnatomy) -> list[str]:
    """The sites of disease, all of which are in the field of view and have room for a lesion."""
    there = {site for site in (*NODAL, *EXTRANODAL) if _has_room(site, anatomy)}
    sites: list[str] = []
    for _ in range(500):
        sites = draw_sites(rng, diagnosis)
        if set(sites) <= there:
            break
    sites = [site for site in sites if site in there]
    if diagnosis == "prostate cancer" and "bone" in sites and rng.random() < 0.4:
        sites += ["bone"] * int(rng.integers(3, 12))  # disease all over the skeleton, several lesions each
    return sites


def _has_room(site: str, anatomy: FittedAnatomy) -> bool:
    if site in EXTRANODAL:
        volume = np.count_nonzero(labels_of(*EXTRANODAL[site].organs)[anatomy.labels]) * np.prod(anatomy.grid.spacing)
        return bool(volume > 2000)  # mm^3
    start, end = np.array(NODAL[site].start), np.array(NODAL[site].end)
    along = anatomy.organ_at(start + np.linspace(0, 1, 15)[:, None] * (end - start))
    return bool((along > 0).all() and labels_of(*SOFT)[along].mean() > 0.3)
