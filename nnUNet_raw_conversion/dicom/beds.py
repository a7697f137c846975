"""A body in several series (head and trunk, trunk and legs): which series continue each other, and their one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk

from nnUNet_raw_conversion.dicom.fields import date_and_time, number_of, parse_time, text_of
from nnUNet_raw_conversion.dicom.index import Series
from nnUNet_raw_conversion.dicom.volume import COSINE_TOLERANCE, EVEN_MM
from nnUNet_raw_conversion.geometry import resample_to

# Beds of one body overlap by less than this share of the shorter range; a second phase or another reconstruction has
# the same range.
MOST_OVERLAP = 0.5
# Ranges that overlap by more than a few slices are of one scan only if they were scanned one after the other: a body
# takes 15 to 40 min, and a late phase comes an hour after the early one.
FEW = 0.1
ONE_SCAN = timedelta(minutes=45)
# What is worth a word: a range that goes beyond the one that is taken by more than this share of it.
WORTH_A_WORD = 0.1


def axial_range(series: Series, normal: np.ndarray) -> tuple[float, float]:
    """Where the slices of a series begin and end in mm along `normal`, half a slice beyond the outer positions."""
    ranges = [_range(part, normal) for part in series.parts]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def normal_of(series: Series) -> np.ndarray:
    """The normal (3,) of the slices' planes."""
    axes = _plane(series)[0]
    return np.cross(axes[:3], axes[3:])


def kind_of(series: Series) -> str:
    """What users call it: PET or CT."""
    return "PET" if series.modality == "PT" else series.modality


def with_beds(best: Series, others: Sequence[Series]) -> tuple[Series, list[Series], list[str]]:
    """`best` with those of `others`, the preferred ones first, that continue it to one body; these; and a sentence for
    every one that shows more of the body and does not fit."""
    normal = normal_of(best)
    joined: list[Series] = []
    while True:
        whole = replace(best, beds=tuple(joined))
        more = next((one for one in others if one not in joined and not _unfit(one, whole, normal)), None)
        if more is None:
            break
        joined.append(more)
    low, high = axial_range(whole, normal)
    said = []
    for one in others:
        other_low, other_high = axial_range(one, normal)
        beyond = max(other_high - high, low - other_low)
        why = "" if one in joined else _unfit(one, whole, normal)
        if why and beyond > WORTH_A_WORD * (high - low):
            said.append(f"{kind_of(best)} series '{one.description or 'no description'}' goes {beyond:.0f} mm beyond "
                        f"the one that is taken and is not joined to it: {why}; is the body whole?")  # fmt: skip
    return whole, joined, said


def join(images: Sequence[sitk.Image], fill: float) -> sitk.Image:
    """The images of ranges of one body as one, float32, on the grid of the one with the largest slices, continued.

    Where two overlap each plane is of the one that ends farther away, for a PET is worst at its ends. Slices that lie
    on the grid already are copied, others linearly interpolated; outside of all is `fill`.
    """
    base = max(images, key=lambda image: np.prod(np.multiply(image.GetSize()[:2], image.GetSpacing()[:2])))
    columns, rows, _ = base.GetSize()
    step, normal = base.GetSpacing()[2], np.reshape(base.GetDirection(), (3, 3))[:, 2]
    start = float(np.dot(base.GetOrigin(), normal))
    ranges = np.array([_image_range(image, normal) for image in images])  # in mm along the normal
    first = int(np.ceil((ranges[:, 0].min() - start) / step - 1e-3))
    last = int(np.floor((ranges[:, 1].max() - start) / step + 1e-3))
    planes = start + step * np.arange(first, last + 1)
    depth = np.minimum(planes - ranges[:, :1], ranges[:, 1:] - planes)  # (images, planes)
    owner = depth.argmax(axis=0)
    values = np.full((planes.size, rows, columns), fill, np.float32)
    for number, image in enumerate(images):
        for run in np.split(*_runs(np.flatnonzero(owner == number))):
            if run.size:
                grid = sitk.Image([columns, rows, int(run.size)], sitk.sitkUInt8)
                grid.SetSpacing(base.GetSpacing())
                grid.SetDirection(base.GetDirection())
                grid.SetOrigin((np.array(base.GetOrigin()) + (first + run[0]) * step * normal).tolist())
                values[run] = _on(image, grid, fill)
    for k in np.flatnonzero(depth.max(axis=0) < -1e-3 * step):  # in a crack between two ranges, thinner than a slice
        values[k] = (values[k - 1] + values[k + 1]) / 2
    result = sitk.GetImageFromArray(values)
    result.SetSpacing(base.GetSpacing())
    result.SetDirection(base.GetDirection())
    result.SetOrigin((np.array(base.GetOrigin()) + first * step * normal).tolist())
    return result


def _unfit(one: Series, whole: Series, normal: np.ndarray) -> str:
    """Why a series is no further range of the body that `whole` is, or "" if it is."""
    axes, spacing, shape, place = _plane(whole)
    other_axes, other_spacing, other_shape, other_place = _plane(one)
    if one.study_uid != whole.study_uid:
        return "another study"
    if np.abs(axes - other_axes).max() > COSINE_TOLERANCE:
        return "its slices have another direction"
    shift = np.abs((other_place - place) @ axes.reshape(2, 3).T)[::-1]  # between rows, between columns
    same_plane = shape == other_shape and np.abs(spacing - other_spacing).max() < 1e-3 and np.all(shift < spacing / 2)
    if whole.modality == "PT" and not same_plane:
        return "its slices are of another size or place"
    if one.frame_uid != whole.frame_uid and one.frame_uid and whole.frame_uid and not same_plane:
        return "another frame of reference"
    (low, high), (other_low, other_high) = axial_range(whole, normal), axial_range(one, normal)
    step = max(_step(whole, normal), _step(one, normal))
    gap = max(low, other_low) - min(high, other_high)
    shorter = min(high - low, other_high - other_low)
    if gap > step / 2:
        return f"there is a gap of {gap:.0f} mm between them"
    if -gap > MOST_OVERLAP * shorter or max(other_high - high, low - other_low) < step / 2:
        return "it shows the same part of the body"
    if whole.modality == "PT" and -gap > FEW * shorter and (apart := _apart(one, whole)) and apart > ONE_SCAN:
        return f"it was scanned {apart.total_seconds() / 60:.0f} min earlier or later"
    return _other_injection(one, whole) if whole.modality == "PT" else ""


def _other_injection(one: Series, other: Series) -> str:
    """Which of weight, dose and time of injection differs between two PET series that both say it, or ""."""
    drugs = [(series.header.get("RadiopharmaceuticalInformationSequence") or [pydicom.Dataset()])[0]
             for series in (one, other)]  # fmt: skip
    said = {
        "weight": [number_of(series.header, "PatientWeight") for series in (one, other)],
        "injected dose": [number_of(drug, "RadionuclideTotalDose") for drug in drugs],
        "time of injection": [parse_time(text_of(drug, "RadiopharmaceuticalStartTime")) for drug in drugs],
        "day of injection": [text_of(drug, "RadiopharmaceuticalStartDateTime")[:8] for drug in drugs],
    }
    differing = [what for what, (a, b) in said.items() if a and b and a != b]
    return f"another {' and '.join(differing)}" if differing else ""


def _apart(one: Series, other: Series) -> timedelta | None:
    dates = ("AcquisitionDate", "SeriesDate", "StudyDate")
    times = [date_and_time(series.header, dates, "AcquisitionTime") for series in (one, other)]
    return None if None in times else abs(times[0] - times[1])


def _plane(series: Series) -> tuple[np.ndarray, np.ndarray, tuple[int, int], np.ndarray]:
    """Axes (6,), spacing (between rows, between columns) in mm, (rows, columns) and place (3,) of its first slice."""
    header = pydicom.Dataset()
    header.update({e.tag: e for e in series.header if e.VR != "SQ"})
    frames = list(series.header.get("PerFrameFunctionalGroupsSequence") or ())[:1]
    for group in (*(series.header.get("SharedFunctionalGroupsSequence") or ()), *frames):
        for keyword in ("PlaneOrientationSequence", "PixelMeasuresSequence", "PlanePositionSequence"):
            if group.get(keyword):
                header.update(group[keyword].value[0])

    def numbers(keyword: str, default: tuple[float, ...]) -> np.ndarray:
        try:
            found = np.array([float(v) for v in header.get(keyword)])
        except (TypeError, ValueError):
            found = np.empty(0)
        return found if len(found) == len(default) else np.array(default)

    axes = numbers("ImageOrientationPatient", (1.0, 0, 0, 0, 1, 0))
    size = (int(header.get("Rows") or 0), int(header.get("Columns") or 0))
    return axes, numbers("PixelSpacing", (0.0, 0)), size, numbers("ImagePositionPatient", (0.0, 0, 0))


@lru_cache(maxsize=256)
def _positions(files: tuple[Path, ...]) -> np.ndarray:
    """ImagePositionPatient (N, 3) of all slices, of one file each or of the frames of one file; (0, 3) if unknown."""
    found = []
    for file in files:
        tags = ["ImagePositionPatient", "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"]
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=tags)
            frames = header.get("PerFrameFunctionalGroupsSequence") or ()
            found += [f.PlanePositionSequence[0].ImagePositionPatient for f in frames if "PlanePositionSequence" in f]
            if not frames and header.get("ImagePositionPatient"):
                found.append(header.ImagePositionPatient)
        except Exception:  # damaged, which is told when its voxels are read
            continue
    return np.array([place for place in found if len(place) == 3], dtype=float).reshape(-1, 3)


def _range(series: Series, normal: np.ndarray) -> tuple[float, float]:
    places = np.sort(_positions(series.files) @ normal)
    if not places.size:
        return 0.0, 0.0
    half = _step(series, normal) / 2
    return float(places[0] - half), float(places[-1] + half)


def _step(series: Series, normal: np.ndarray) -> float:
    """The usual distance of the slices in mm, 1 where there is only one."""
    places = np.unique((_positions(series.files) @ normal).round(2))
    return float(np.median(np.diff(places))) if places.size > 1 else 1.0


def _image_range(image: sitk.Image, normal: np.ndarray) -> tuple[float, float]:
    """Where an image begins and ends in mm along `normal`, half a slice beyond the outer ones."""
    start, step = float(np.dot(image.GetOrigin(), normal)), image.GetSpacing()[2]
    return start - step / 2, start + step * (image.GetSize()[2] - 0.5)


def _runs(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers, and where among them a new run of consecutive ones begins."""
    return places, np.flatnonzero(np.diff(places) > 1) + 1


def _on(image: sitk.Image, grid: sitk.Image, fill: float) -> np.ndarray:
    """The voxels (z, y, x) of `image` on `grid`, copied where they lie there."""
    index = np.array(image.TransformPhysicalPointToContinuousIndex(grid.GetOrigin()))
    first = np.rint(index).astype(int)
    off = np.abs(index - first) * image.GetSpacing()
    same = image.GetSize()[:2] == grid.GetSize()[:2] and np.allclose(image.GetSpacing(), grid.GetSpacing(), atol=1e-3)
    inside = first[2] >= 0 and first[2] + grid.GetSize()[2] <= image.GetSize()[2]
    if same and inside and not first[:2].any() and off.max() < EVEN_MM:
        return sitk.GetArrayViewFromImage(image)[first[2] : first[2] + grid.GetSize()[2]]
    return sitk.GetArrayFromImage(resample_to(image, grid, fill))  # no view: the image ends here
