"""What is wrong with the cases of a raw dataset that others made, found before anything is planned.

nnU-Net's own `verify_dataset_integrity` looks for the same and more, but asserts, prints over many lines and reads
every image; here headers are read, and of the label files the values.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.files import plain_name, refuse_bytes
from nnunet_fratmae.base.pool import map_cases
from plans.dataset_json import declared_labels, listed
from plans.fields import require, shown, shown_name

Studies = dict[str, tuple[list[str], str | None]]
"""Images and label file (None: there is none) by case id, as `plans.store.list_raw_studies` gives them."""

NAMED = 3  # cases that a message names, besides the number of all
MOST_OFF = 0.25  # of a voxel; a grid that was written in another precision is off by much less
HELD_ENDING = re.compile(r"\.(nii|nrrd|mha|gipl|b2nd|npz|npy|pkl)(?![A-Za-z0-9])", re.IGNORECASE)
NIBABEL_ENDINGS = (".nii.gz", ".nii")
SIMPLEITK_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")  # of nnU-Net's readers by SimpleITK


# ---------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Finding:
    """What was found in the files of one case."""

    case: str
    faults: list[str]
    has_lesion: bool = False


@dataclass(frozen=True)
class Grid:
    """Where the voxels of an image lie: size and spacing in mm by axis, and the centres of the eight corner voxels."""

    size: tuple[int, ...]
    spacing: np.ndarray
    corners: np.ndarray

    def differs(self, other: Grid) -> list[str]:
        """What keeps the voxels of two images from being at the same places, or nothing."""
        if self.size != other.size:
            return [f"has {'x'.join(map(str, self.size))} voxels, not {'x'.join(map(str, other.size))} as"]
        off = float(np.linalg.norm(self.corners - other.corners, axis=-1).max())
        if off > MOST_OFF * min(self.spacing.min(), other.spacing.min()):
            return [f"lies up to {off:.3g} mm off"]
        return []


def check_studies(raw: Path, studies: Studies, dataset_json: dict[str, Any], processes: int) -> None:
    """See that every case can be planned: its name, the grid of all its files, the values of its labels.

    Raises:
        UserError: some cannot; the message counts them and names the first.
    """
    _check_names(raw, studies)
    where = f"{raw}/dataset.json"
    labels = [label for _, label in studies.values() if label is not None]
    values = declared_labels(dataset_json, where) if labels else {0}
    require(not labels or "numTraining" in dataset_json, f'{where}: "numTraining" is missing; write "numTraining": '
            f"{len(labels)}")  # fmt: skip
    reader = _reader(where, dataset_json, next(iter(studies.values()))[0][0])
    ignored = dataset_json.get("labels", {}).get("ignore")
    work = partial(_check_case, raw=raw, reader=reader, values=values, ignored=ignored)
    findings = list(map_cases(work, list(studies.items()), max(1, processes)))
    faulty = sorted((finding for finding in findings if finding.faults), key=lambda finding: finding.case)
    if faulty:
        named = "; ".join(f"{finding.case}: {finding.faults[0]}" for finding in faulty[:NAMED])
        more = "; ..." if len(faulty) > NAMED else ""
        raise UserError(f"{raw}: {len(faulty)} of {len(studies)} cases cannot be used. {named}{more}")
    if labels and not any(finding.has_lesion for finding in findings):
        raise UserError(f"{raw}: in none of the {len(labels)} label files is a voxel of another label than the "
                        "background, so there is nothing to learn to segment; mend them, or for pretraining only move "
                        "the images to imagesPt and remove labelsTr")  # fmt: skip


def _check_names(raw: Path, studies: Studies) -> None:
    for case, (images, _) in studies.items():
        refuse_bytes(images)
        name = shown_name(case)
        plain_name(case, f"{raw}: case {name}")
        require(not case.endswith("_seg"), f"{raw}: case {name}: nnU-Net takes preprocessed files that end in _seg for "
                "labels; rename its images and its label file")  # fmt: skip
        require(not HELD_ENDING.search(case), f"{raw}: case {name} has the ending of a file within its name; rename "
                "its files, so that this stands at their end only")  # fmt: skip


def _reader(where: str, dataset_json: dict[str, Any], example: str) -> str:
    """Name of nnU-Net's reader for these images.

    Raises:
        UserError: there is none.
    """
    from plans.planner import find_reader  # nnU-Net takes seconds to import

    try:
        with redirect_stdout(io.StringIO()):
            return find_reader(dataset_json, example).__name__
    except (RuntimeError, AssertionError, AttributeError):
        named = dataset_json.get("overwrite_image_reader_writer", "None")
        field = f'"overwrite_image_reader_writer": {shown(named)}' if named != "None" else '"file_ending": ' + shown(
            dataset_json["file_ending"])  # fmt: skip
        raise UserError(f"{where}: {field}: nnU-Net has no reader for that") from None


def _check_case(
    study: tuple[str, tuple[list[str], str | None]], raw: Path, reader: str, values: set[int], ignored: int | None
) -> Finding:
    case, (images, label) = study
    faults: list[str] = []
    grids: list[tuple[str, Grid]] = []
    found = np.zeros(0)
    for path in [*images, *([] if label is None else [label])]:
        name = Path(path).relative_to(raw).as_posix() if raw in Path(path).parents else Path(path).name
        try:
            reorient = reader.endswith("WithReorient")
            if path.endswith(SIMPLEITK_ENDINGS) and reader.startswith("SimpleITK"):
                grids.append((name, read_grid(path, reorient)))
            elif path.endswith(NIBABEL_ENDINGS) and reader.startswith("Nibabel"):
                grids.append((name, read_nibabel_grid(path, reorient)))
            if path == label:
                found = read_values(path, reader)
                faults += _undeclared(found, values, name)
        except RuntimeError:  # of ITK and of nnU-Net's readers
            faults.append(f"{name} cannot be read as an image; copy it again")
        except ValueError as error:
            faults.append(f"{name} {error}")
    for name, grid in grids[1:]:
        faults += [f"{name} {fault} {grids[0][0]}; bring it onto that grid" for fault in grid.differs(grids[0][1])]
    return Finding(case, faults, any(value not in (0, ignored) for value in found))


def read_grid(path: str, reorient: bool) -> Grid:
    """The grid of an image from its header, along the axes that nnU-Net's reader gives it.

    Args:
        reorient: whether the reader turns images into one orientation (contract 1).

    Raises:
        RuntimeError: it is no image.
        ValueError: it is not 3D, or its header has no grid.
    """
    header = sitk.ImageFileReader()
    header.SetFileName(path)
    header.ReadImageInformation()
    size = header.GetSize()
    _check_volume(size)
    dimension = header.GetDimension()
    directions = np.reshape(header.GetDirection(), (dimension, dimension))[:3, :3]
    origin, spacing, size = (np.array(values[:3]) for values in (header.GetOrigin(), header.GetSpacing(), size))
    if not (np.isfinite([*origin, *spacing, *directions.ravel()]).all() and abs(np.linalg.det(directions)) > 0.1):
        raise ValueError("has a header without a place in space; write it again with the right one")
    ends = np.array(list(itertools.product((0, 1), repeat=3))) * (size - 1)
    corners = (origin + (ends * spacing) @ directions.T).reshape(2, 2, 2, 3)
    if not reorient:
        return Grid(tuple(size.tolist()), spacing, corners)
    lies = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(directions.ravel().tolist())
    axes = [next(i for i in range(3) if lies[i] in pair) for pair in ("LR", "AP", "SI")]
    flips = [axis for axis, end in enumerate("LPS") if lies[axes[axis]] != end]
    corners = np.flip(corners.transpose(*axes, 3), flips)
    return Grid(tuple(int(size[axis]) for axis in axes), spacing[axes], corners)


def read_nibabel_grid(path: str, reorient: bool) -> Grid:
    """As `read_grid`, for nnU-Net's readers by nibabel, which take sheared axes, too.

    Raises:
        RuntimeError: it is no image.
        ValueError: it is not 3D, or its header has no grid.
    """
    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError, OSError) as error:
        raise RuntimeError(str(error)) from None
    _check_volume(image.shape)
    affine, size = image.affine, np.array(image.shape[:3])
    if not (np.isfinite(affine).all() and abs(np.linalg.det(affine)) > 0):
        raise ValueError("has a header without a place in space; write it again with the right one")
    if reorient:
        lies = nibabel.io_orientation(affine)
        affine, size = affine @ nibabel.orientations.inv_ornt_aff(lies, size), size[np.argsort(lies[:, 0])]
    ends = np.array(list(itertools.product((0, 1), repeat=3))) * (size - 1)
    corners = nibabel.affines.apply_affine(affine, ends).reshape(2, 2, 2, 3)
    return Grid(tuple(size.tolist()), nibabel.affines.voxel_sizes(affine), corners)


def _check_volume(size: Sequence[int]) -> None:
    """Raises ValueError where an image is none of one value a place."""
    if len(size) < 3 or any(n != 1 for n in size[3:]):
        raise ValueError(f"has the shape {'x'.join(map(str, size))}; each image must be one volume")


def read_values(path: str, reader: str) -> np.ndarray:
    """The different values of a label image, by nnU-Net's reader where that is another than SimpleITK's.

    Raises:
        RuntimeError: it cannot be read.
    """
    if path.endswith(SIMPLEITK_ENDINGS) and reader.startswith("SimpleITK"):
        labels = sitk.GetArrayViewFromImage(image := sitk.ReadImage(path))  # noqa: F841 - the view lives as long
    else:
        from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

        labels, _ = recursive_find_reader_writer_by_name(reader)().read_seg(path)
    return pd.unique(labels.ravel())


def _undeclared(found: np.ndarray, values: set[int], name: str) -> list[str]:
    """What is wrong with the values of a label image, or nothing."""
    if not np.isfinite(found).all():
        return [f"{name} has NaN or infinite voxels; write it anew with whole numbers"]
    if (found != np.round(found)).any():
        return [f"{name} has values that are no whole numbers, such as {found[found != np.round(found)][0]:g}; was it "
                "resampled by interpolation? write it anew with the labels' numbers"]  # fmt: skip
    unknown = sorted(int(value) for value in found if int(value) not in values)
    return [f'{name} has voxels of {listed(unknown)}, and "labels" of dataset.json knows {listed(sorted(values))}; '
            "declare them there, or mend the file"] if unknown else []  # fmt: skip
