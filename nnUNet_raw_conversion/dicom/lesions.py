"""The lesions of a study: those ROIs of its RTSTRUCT and SEG files that are lesions, united, and a table of all."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from pydicom import Dataset

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.index import read_header
from nnUNet_raw_conversion.dicom.names import Kind, kind_of, kind_of_codes, select_rois, shown_name
from nnUNet_raw_conversion.dicom.rtstruct import Roi, rasterise, read_rois, share_inside
from nnUNet_raw_conversion.dicom.segmentation import read_segments


@dataclass(frozen=True)
class RoiRow:
    """A row of the per-ROI table: an ROI that was not kept has no figures, one without voxels no SUV."""

    name: str
    kept: bool
    voxels: int | None = None
    volume_ml: float | None = None
    suv_max: float | None = None
    suv_mean: float | None = None
    note: str = ""
    number: int | None = None
    """ROI Number or Segment Number: by it a name that is hidden is found in the file."""


class RoisError(UserError):
    """Which ROIs are lesions cannot be told; `rois` are the rows of the table of them."""

    def __init__(self, error: UserError, rois: list[dict]) -> None:
        super().__init__(str(error), error.code)
        self.rois = rois


@dataclass(frozen=True)
class _Found:
    """An ROI or a segment as its file has it."""

    number: int
    name: str
    kind: str | Kind
    """RT ROI Interpreted Type, or what the codes of a segment say."""
    drawn: Roi | np.ndarray

    @property
    def is_empty(self) -> bool:
        return not (self.drawn.contours if isinstance(self.drawn, Roi) else self.drawn.any())


def read_lesions(
    files: Sequence[tuple[str, Path]],
    pet: sitk.Image,
    frame_uid: str,
    pattern: str | None = None,
    believed: Collection[Path] = (),
    secrets: frozenset[str] = frozenset(),
) -> tuple[sitk.Image, list[RoiRow]]:
    """The union of the lesion ROIs of all files, 0 and 1 (uint8) on the grid of the PET, and a row for every ROI.

    Args:
        files: ("RTSTRUCT" or "SEG", file), as `choose.choose_lesions` gives them.
        pet: in SUVbw; on its grid the ROIs are drawn, and their SUV is taken from it.
        frame_uid: the PET's frame of reference; an empty one is not compared.
        pattern: which ROIs are lesions, see `names.select_rois`.
        believed: files whose frame of reference is not compared, see `believed.believed`.
        secrets: words of the patient's names and numbers, which no name shows, see `shown.secrets_of`.

    Raises:
        UserError: a damaged file, one of another frame of reference or outside of the image, or no voxel in any
            lesion. RoisError: no lesion among the ROIs, or it cannot be told which are some.
    """
    found: list[_Found] = []
    for modality, file in files:
        frame = "" if file in believed else frame_uid
        found += _rois(file, frame) if modality == "RTSTRUCT" else _segments(file, pet, frame)
    union, rows = np.zeros(pet.GetSize()[::-1], bool), []
    for one, kept in zip(found, _chosen(found, pattern, secrets), strict=True):
        shown, roi, mask = shown_name(one.name, secrets), one.drawn, None
        notes = list(roi.notes) if isinstance(roi, Roi) else []
        if kept and isinstance(roi, Roi) and not roi.contours:
            notes.append("no closed contours")
        elif kept:
            # Its messages have the name
            mask = rasterise(replace(roi, name=shown), pet, frame_uid) if isinstance(roi, Roi) else roi
            if isinstance(roi, Roi) and (share := share_inside(roi, pet)) < 1:
                notes.append(f"{1 - share:.0%} of its contour points are outside of the PET")
            union |= mask
        rows.append(_row(shown, kept, mask, pet, notes, one.number))
    if not union.any():
        raise UserError("the lesion ROIs have no voxel (no contours, or smaller than voxels); see --lesion-roi",
                        "ROI_EMPTY")  # fmt: skip
    image = sitk.GetImageFromArray(union.astype(np.uint8))
    image.CopyInformation(pet)
    return image, rows


def _rois(file: Path, frame_uid: str) -> list[_Found]:
    rois = [roi if frame_uid else replace(roi, frame_uid="") for roi in read_rois(file)]
    return [_Found(roi.number, roi.name, roi.kind, roi) for roi in rois]


def _segments(file: Path, pet: sitk.Image, frame_uid: str) -> list[_Found]:
    read = read_segments(file, pet, frame_uid)
    described = list(read_header(file).get("SegmentSequence") or ())  # in the order of `read_segments`
    found = []
    for i, (label, mask) in enumerate(read):
        one = described[i] if i < len(described) else Dataset()
        if str(one.get("SegmentLabel") or "").strip() != label.strip():
            one = Dataset()
        found.append(_Found(int(one.get("SegmentNumber", i + 1)), label, kind_of_codes(one) or "", mask))
    return found


def _chosen(found: Sequence[_Found], pattern: str | None, secrets: frozenset[str]) -> list[bool]:
    """Which are lesions; those that are empty may be called anything.

    Raises:
        RoisError: see `names.select_rois`.
    """
    asked = [one for one in found if not (pattern is None and one.is_empty)] or list(found)
    names, kinds, numbers = [o.name for o in asked], [o.kind for o in asked], [o.number for o in asked]
    try:
        chosen = dict(zip(map(id, asked), select_rois(names, pattern, kinds, numbers, secrets), strict=True))
    except UserError as error:
        rows = [
            RoiRow(shown_name(one.name, secrets), False, note=kind_of(one.name, one.kind).value, number=one.number)
            for one in found
        ]
        raise RoisError(error, [asdict(row) for row in rows]) from None
    return [chosen.get(id(one), kind_of(one.name, one.kind) is Kind.LESION) for one in found]


def _row(name: str, kept: bool, mask: np.ndarray | None, pet: sitk.Image, notes: list[str], number: int) -> RoiRow:
    if mask is None:
        return RoiRow(name, kept, note="; ".join(notes), number=number)
    suv = sitk.GetArrayViewFromImage(pet)[mask]
    if not suv.size:
        return RoiRow(name, kept, 0, 0.0, note="; ".join([*notes, "empty or smaller than voxels"]), number=number)
    volume = suv.size * float(np.prod(pet.GetSpacing())) / 1000
    return RoiRow(name, kept, suv.size, volume, float(suv.max()), float(suv.mean()), "; ".join(notes), number)
