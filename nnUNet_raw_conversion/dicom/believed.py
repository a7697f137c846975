"""Contours that name this very series but another frame of reference: believed if they lie on its slices."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk

from nnUNet_raw_conversion.dicom.choose import references
from nnUNet_raw_conversion.dicom.index import Series
from nnUNet_raw_conversion.dicom.rtstruct import FLAT_MM, read_rois, to_index

# Contours of the body and the table may leave the field of view, and a few may be drawn between slices.
MOST = 0.95
# How far from a slice, in slices, a contour drawn on it may lie; positions are rounded to 0.1 mm of 2 to 5.
NEAR = 0.06


def believed(
    contours: Iterable[tuple[str, Path]], frame_uid: str, drawn_on: Collection[tuple[Series, sitk.Image]]
) -> set[Path]:
    """Those files of `contours` that are in another frame of reference than `frame_uid`, but name one of the series
    `drawn_on` and fit it: 95% of their points lie in its image, and as many of their planes on its slices.

    De-identification often makes a new frame of reference for every file, and leaves the series right.
    """
    found = set()
    for modality, file in contours:
        refers = references(file)
        if frame_uid and refers.frames and frame_uid not in refers.frames:
            images = [image for series, image in drawn_on if series.uids & refers.series]
            if any(_lies_on(modality, file, image) for image in images):
                found.add(file)
    return found


def _lies_on(modality: str, file: Path, image: sitk.Image) -> bool:
    planes = _contours(file) if modality == "RTSTRUCT" else _corners(file)
    if not planes:
        return False
    points = to_index(image, np.concatenate(planes))
    inside = np.all((points >= -0.5) & (points <= np.array(image.GetSize()) - 0.5), axis=1)
    heights = [to_index(image, plane)[:, 2] for plane in planes]
    flat = FLAT_MM / image.GetSpacing()[2]
    near = [np.ptp(height) < flat and abs(height.mean() - np.rint(height.mean())) < NEAR for height in heights]
    return bool(inside.mean() >= MOST and np.mean(near) >= MOST)


def _contours(file: Path) -> list[np.ndarray]:
    return [points for roi in read_rois(file) for points in roi.contours]


def _corners(file: Path) -> list[np.ndarray]:
    """Where the first pixel of each frame of a SEG lies, (1, 3) each."""
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True)
        frames = header.PerFrameFunctionalGroupsSequence
        places = [frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames]
        return [np.array(place, float).reshape(1, 3) for place in places]
    except Exception:  # damaged or without places, which its reader will say
        return []
