"""The lesions of a study: those ROIs of its RTSTRUCT and SEG files that are lesions, united, and a table of all."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.names import select_rois, shown_name
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


def read_lesions(
    files: Sequence[tuple[str, Path]], pet: sitk.Image, frame_uid: str, pattern: str | None = None,
    believed: Collection[Path] = (),
) -> tuple[sitk.Image, list[RoiRow]]:  # fmt: skip
    """The union of the lesion ROIs of all files, 0 and 1 (uint8) on the grid of the PET, and a row for every ROI.

    Args:
        files: ("RTSTRUCT" or "SEG", file), as `choose.choose_lesions` gives them.
        pet: in SUVbw; on its grid the ROIs are drawn, and their SUV is taken from it.
        frame_uid: the PET's frame of reference; an empty one is not compared.
        pattern: which ROIs are lesions, see `names.select_rois`.
        believed: files whose frame of reference is not compared, see `believed.believed`.

    Raises:
        UserError: a damaged file, no lesion among the ROIs, one of another frame of reference or outside of the image,
            or no voxel in any of them.
    """
    found: list[Roi | tuple[str, np.ndarray]] = []
    for modality, file in files:
        frame = "" if file in believed else frame_uid
        if modality == "RTSTRUCT":
            found += [roi if frame else replace(roi, frame_uid="") for roi in read_rois(file)]
        else:
            found += read_segments(file, pet, frame)
    names = [roi.name if isinstance(roi, Roi) else roi[0] for roi in found]
    kinds = [roi.kind if isinstance(roi, Roi) else "" for roi in found]
    union, rows = np.zeros(pet.GetSize()[::-1], bool), []
    for roi, name, kept in zip(found, names, select_rois(names, pattern, kinds), strict=True):
        notes = list(roi.notes) if isinstance(roi, Roi) else []
        mask = None
        if kept and isinstance(roi, Roi) and not roi.contours:
            notes.append("no closed contours")
        elif kept:
            mask = rasterise(roi, pet, frame_uid) if isinstance(roi, Roi) else roi[1]
            if isinstance(roi, Roi) and (share := share_inside(roi, pet)) < 1:
                notes.append(f"{1 - share:.0%} of its contour points are outside of the PET")
            union |= mask
        rows.append(_row(name, kept, mask, pet, notes))
    if not union.any():
        raise UserError("the lesion ROIs have no voxel (no contours, or smaller than voxels); see --lesion-roi")
    image = sitk.GetImageFromArray(union.astype(np.uint8))
    image.CopyInformation(pet)
    return image, rows


def _row(name: str, kept: bool, mask: np.ndarray | None, pet: sitk.Image, notes: list[str]) -> RoiRow:
    if mask is None:
        return RoiRow(shown_name(name), kept, note="; ".join(notes))
    suv = sitk.GetArrayViewFromImage(pet)[mask]
    if not suv.size:
        return RoiRow(shown_name(name), kept, 0, 0.0, note="; ".join([*notes, "empty or smaller than voxels"]))
    volume = suv.size * float(np.prod(pet.GetSpacing())) / 1000
    return RoiRow(shown_name(name), kept, suv.size, volume, float(suv.max()), float(suv.mean()), "; ".join(notes))
