"""DICOM SEG: every segment as a mask on the grid of an image."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.pixels import iter_pixels

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.fields import field_name
from nnUNet_raw_conversion.dicom.limits import check_file, check_pixels
from nnUNet_raw_conversion.dicom.names import shown_name
from nnUNet_raw_conversion.dicom.rtstruct import locate, usual_gap

SAME_PLACE_MM = 0.01


class _Frames:
    """Where the frames of a SEG lie, as one stack of parallel planes; frames may be few, and in any order.

    What the image that it was drawn on says as well (direction and size of the pixels) may be missing, where the frames
    have as many pixels as `reference` has.
    """

    def __init__(self, seg: pydicom.Dataset, reference: sitk.Image):
        own = _needed(seg, "PerFrameFunctionalGroupsSequence")
        count = len(own)
        alike = (seg.get("Columns"), seg.get("Rows")) == reference.GetSize()[:2]
        direction = np.reshape(reference.GetDirection(), (3, 3))

        def numbers(sequence: str, keyword: str, instead: np.ndarray | None) -> np.ndarray:
            found = [_macro(seg, i, sequence, keyword) for i in range(count)]
            if None not in found:
                return np.array(found, float)
            if instead is None or not alike:
                raise _missing(keyword)
            return np.tile(instead, (count, 1))

        axes = numbers("PlaneOrientationSequence", "ImageOrientationPatient", direction.T[:2].ravel())
        sizes = numbers("PixelMeasuresSequence", "PixelSpacing", np.array(reference.GetSpacing()[1::-1]))
        places = numbers("PlanePositionSequence", "ImagePositionPatient", None)
        across, down = axes[0, :3], axes[0, 3:]
        self.axes = np.stack([across, down, np.cross(across, down)])  # rows: the directions of x, y and z
        local = places @ self.axes.T
        if np.ptp(axes, 0).max() > 1e-4 or np.ptp(sizes, 0).max() > 1e-4 or np.ptp(local[:, :2], 0).max() > 0.1:
            raise UserError("DICOM SEG: its frames are no stack of parallel slices (tiles of microscopy, or a tilted "
                            "gantry); export it anew on the PET's slices", "SEG_NO_STACK")  # fmt: skip
        self.corner, (self.row_mm, self.column_mm) = local[0, :2], sizes[0]
        heights = local[:, 2]
        first = np.r_[True, np.diff(np.sort(heights)) > SAME_PLACE_MM]
        self.heights = np.sort(heights)[first]
        self.plane_of_frame = np.searchsorted(self.heights, heights + SAME_PLACE_MM, side="right") - 1
        self.gap = float(
            _macro(seg, 0, "PixelMeasuresSequence", "SpacingBetweenSlices") or usual_gap(self.heights)
            or _macro(seg, 0, "PixelMeasuresSequence", "SliceThickness") or reference.GetSpacing()[2]
        )  # fmt: skip


def read_segments(file: Path, reference: sitk.Image, frame_uid: str = "") -> list[tuple[str, np.ndarray]]:
    """Segment Label (0062,0005) and mask, bool (z, y, x) on the grid of `reference`, of every segment of a SEG.

    BINARY, LABELMAP and FRACTIONAL, of which half of the Maximum Fractional Value (0062,000E) and more belongs to the
    segment. A voxel takes the value that the SEG has at its centre; so a SEG on the image's own grid is copied, in
    whatever order its frames are, and one on another grid (drawn on the CT) is sampled. Slices without a frame are
    empty. A segment without any pixel gives an empty mask. `frame_uid` is the frame of reference of `reference`; it is
    compared where both are known. Only what is needed for that is asked of the file: highdicom, whose objects are
    stricter, refuses public data for lack of a SliceThickness.

    Raises:
        UserError: the file is damaged or no SEG, lacks an attribute, is of another frame of reference, its frames are
            no stack of slices, or a segment lies wholly outside of the image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they may quote what is in the file
            check_file(file)
            seg = pydicom.dcmread(file)
            if seg.get("Modality") != "SEG":
                raise ValueError
            own_frame = str(seg.get("FrameOfReferenceUID") or "")
            if frame_uid and own_frame and frame_uid != own_frame:
                raise UserError("DICOM SEG: is in another frame of reference than the image; give one drawn on "
                                "this PET/CT", "CONTOURS_OTHER_FRAME")  # fmt: skip
            check_pixels(seg, "DICOM SEG")
            frames = _Frames(seg, reference)
            labels = {int(one.SegmentNumber): str(one.get("SegmentLabel") or "")
                      for one in _needed(seg, "SegmentSequence")}  # fmt: skip
            labels.pop(int(seg.get("PixelPaddingValue") or 0), None)  # the background of a LABELMAP
            stacks = _stacks(seg, frames, list(labels))
    except (UserError, MemoryError):
        raise
    except Exception:  # a damaged file makes pydicom raise nearly anything
        raise UserError("DICOM SEG: damaged, cut off or no SEG; export or copy it again",
                        "CONTOURS_UNREADABLE") from None  # fmt: skip
    return [(label, _sample(stacks[number], frames, reference, label)) for number, label in labels.items()]


def _stacks(seg: pydicom.Dataset, frames: _Frames, numbers: list[int]) -> dict[int, dict[int, np.ndarray]]:
    """For every segment the pixels (rows, columns), bool, of the planes that have any."""
    stacks: dict[int, dict[int, np.ndarray]] = {number: {} for number in numbers}
    kind = str(seg.get("SegmentationType") or ("BINARY" if _needed(seg, "BitsAllocated") == 1 else ""))
    if not kind:
        raise _missing("SegmentationType")
    least = 0.5 * _needed(seg, "MaximumFractionalValue") if kind == "FRACTIONAL" else 1
    count = len(seg.PerFrameFunctionalGroupsSequence)
    for i, stored in zip(range(count), iter_pixels(seg), strict=True):
        plane = frames.plane_of_frame[i]
        if kind == "LABELMAP":
            found = {number: stored == number for number in numbers}
        else:
            number = _macro(seg, i, "SegmentIdentificationSequence", "ReferencedSegmentNumber")
            if number is None and len(numbers) > 1:
                raise _missing("ReferencedSegmentNumber")
            found = {numbers[0] if number is None else int(number): stored >= least}
        for number, pixels in found.items():
            if pixels.any():
                stacks[number][plane] = stacks[number].get(plane, False) | pixels
    return stacks


def _macro(seg: pydicom.Dataset, frame: int, sequence: str, keyword: str) -> object:
    """An attribute of a frame, which stands in the frame's own group, in that of all frames (PS3.3 C.7.6.16), or, where
    a program left the groups out, in the header itself; None if it is missing."""
    groups = (seg.PerFrameFunctionalGroupsSequence[frame], *(seg.get("SharedFunctionalGroupsSequence") or ())[:1])
    items = [group[sequence].value[0] for group in groups if group.get(sequence)]
    found = (item.get(keyword) for item in (*items, seg))
    return next((value for value in found if value not in (None, "")), None)


def _needed(seg: pydicom.Dataset, keyword: str) -> object:
    if seg.get(keyword) is None:
        raise _missing(keyword)
    return seg[keyword].value


def _missing(keyword: str) -> UserError:
    return UserError(f"DICOM SEG: {field_name(keyword)} is missing, without which its voxels have no place or no "
                     "meaning; export it anew by another program", "SEG_ATTRIBUTE_MISSING")  # fmt: skip


def _sample(stack: dict[int, np.ndarray], frames: _Frames, reference: sitk.Image, label: str) -> np.ndarray:
    """The value that the segment has at the centre of every voxel, bool (z, y, x)."""
    size = np.array(reference.GetSize())
    mask = np.zeros(size[::-1], bool)
    if not stack:
        return mask
    matrix = frames.axes @ (np.reshape(reference.GetDirection(), (3, 3)) * reference.GetSpacing())
    origin = frames.axes @ reference.GetOrigin() - (*frames.corner, 0)  # place in the stack = matrix @ index + origin
    low, high = _extent(stack, frames)
    corners = np.stack(np.meshgrid(*zip(low, high, strict=True), indexing="ij"), -1).reshape(-1, 3)
    index = np.linalg.solve(matrix, (corners - origin).T).T
    first = np.maximum(np.floor(index.min(0)).astype(int), 0)
    last = np.minimum(np.ceil(index.max(0)).astype(int) + 1, size)
    if np.any(first >= last):
        raise UserError(f"DICOM SEG: segment {shown_name(label)!r} lies wholly outside of the image; "
                        "is it of another scan?")  # fmt: skip
    y, x = np.meshgrid(np.arange(first[1], last[1]), np.arange(first[0], last[0]), indexing="ij")
    for z in range(first[2], last[2]):
        px, py, height = np.tensordot(matrix, np.stack([x, y, np.full_like(x, z)]), 1) + origin[:, None, None]
        column, row = (np.rint(p / s).astype(int) for p, s in ((px, frames.column_mm), (py, frames.row_mm)))
        plane = _nearest_plane(frames, height)
        for p in np.intersect1d(plane, list(stack)):
            pixels = stack[p]
            rows, columns = pixels.shape
            here = (plane == p) & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
            mask[z, y[here], x[here]] = pixels[row[here], column[here]]
    return mask


def _nearest_plane(frames: _Frames, height: np.ndarray) -> np.ndarray:
    """Index of the plane to which each height belongs, -1 if to none."""
    distinct, inverse = np.unique(height.round(4), return_inverse=True)  # a slice parallel to the planes is one height
    places = (locate(frames.heights, frames.gap, h) for h in distinct)
    found = [-1 if place is None else place[place[2] > 0.5] for place in places]
    return np.array(found)[inverse].reshape(height.shape)


def _extent(stack: dict[int, np.ndarray], frames: _Frames) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest position (x, y, z) in mm of the segment's pixels in the stack, with a pixel's margin."""
    any_row = np.any([pixels.any(1) for pixels in stack.values()], 0).nonzero()[0]
    any_column = np.any([pixels.any(0) for pixels in stack.values()], 0).nonzero()[0]
    heights = frames.heights[list(stack)]
    pixel = np.array([frames.column_mm, frames.row_mm, frames.gap])
    low = np.array([any_column[0], any_row[0], 0]) * pixel + (0, 0, heights.min())
    high = np.array([any_column[-1], any_row[-1], 0]) * pixel + (0, 0, heights.max())
    return low - pixel, high + pixel
