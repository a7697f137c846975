"""DICOM SEG: every segment as a mask on the grid of an image."""

from __future__ import annotations

import warnings
from pathlib import Path

import highdicom
import numpy as np
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.names import shown_name
from nnUNet_raw_conversion.dicom.rtstruct import locate, usual_gap

SAME_PLACE_MM = 0.01


class _Frames:
    """Where the frames of a SEG lie, as one stack of parallel planes; frames may be few, and in any order."""

    def __init__(self, seg: highdicom.seg.Segmentation, reference: sitk.Image):
        shared, own = seg.SharedFunctionalGroupsSequence[0], seg.PerFrameFunctionalGroupsSequence

        def group(frame: int, keyword: str):  # each stands once for all frames or in every frame (PS3.3 C.7.6.16)
            return (own[frame] if keyword in own[frame] else shared)[keyword].value[0]

        count = len(own)
        axes = np.array([group(i, "PlaneOrientationSequence").ImageOrientationPatient for i in range(count)], float)
        sizes = np.array([group(i, "PixelMeasuresSequence").PixelSpacing for i in range(count)], float)
        places = np.array([group(i, "PlanePositionSequence").ImagePositionPatient for i in range(count)], float)
        across, down = axes[0, :3], axes[0, 3:]
        self.axes = np.stack([across, down, np.cross(across, down)])  # rows: the directions of x, y and z
        local = places @ self.axes.T
        if np.ptp(axes, 0).max() > 1e-4 or np.ptp(sizes, 0).max() > 1e-4 or np.ptp(local[:, :2], 0).max() > 0.1:
            raise UserError("DICOM SEG: its frames are no stack of parallel slices (tiles of microscopy, or a tilted "
                            "gantry); export it anew on the PET's slices")  # fmt: skip
        self.corner, (self.row_mm, self.column_mm) = local[0, :2], sizes[0]
        heights = local[:, 2]
        first = np.r_[True, np.diff(np.sort(heights)) > SAME_PLACE_MM]
        self.heights = np.sort(heights)[first]
        self.plane_of_frame = np.searchsorted(self.heights, heights + SAME_PLACE_MM, side="right") - 1
        measures = group(0, "PixelMeasuresSequence")
        self.gap = float(
            measures.get("SpacingBetweenSlices") or usual_gap(self.heights) or measures.get("SliceThickness")
            or reference.GetSpacing()[2]
        )  # fmt: skip


def read_segments(file: Path, reference: sitk.Image, frame_uid: str = "") -> list[tuple[str, np.ndarray]]:
    """Segment Label (0062,0005) and mask, bool (z, y, x) on the grid of `reference`, of every segment of a SEG.

    BINARY, LABELMAP and FRACTIONAL, of which half of the Maximum Fractional Value (0062,000E) and more belongs to the
    segment. A voxel takes the value that the SEG has at its centre; so a SEG on the image's own grid is copied, in
    whatever order its frames are, and one on another grid (drawn on the CT) is sampled. Slices without a frame are
    empty. A segment without any pixel gives an empty mask. `frame_uid` is the frame of reference of `reference`; it is
    compared where both are known.

    Raises:
        UserError: the file is damaged or no SEG, of another frame of reference, its frames are no stack of slices, or
            a segment lies wholly outside of the image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they may quote what is in the file
            seg = highdicom.seg.segread(file)
            own_frame = str(seg.get("FrameOfReferenceUID") or "")
            if frame_uid and own_frame and frame_uid != own_frame:
                raise UserError("DICOM SEG: is in another frame of reference than the image; give one drawn on "
                                "this PET/CT")  # fmt: skip
            frames = _Frames(seg, reference)
            numbers = list(seg.segment_numbers)
            labels = [str(seg.get_segment_description(number).SegmentLabel) for number in numbers]
            stacks = _stacks(seg, frames, numbers)
    except UserError:
        raise
    except Exception:  # a damaged file makes highdicom and pydicom raise nearly anything
        raise UserError("DICOM SEG: damaged, cut off or no SEG; export or copy it again") from None
    return [(label, _sample(stack, frames, reference, label)) for label, stack in zip(labels, stacks, strict=True)]


def _stacks(seg: highdicom.seg.Segmentation, frames: _Frames, numbers: list[int]) -> list[dict[int, np.ndarray]]:
    """For every segment the pixels (rows, columns), bool, of the planes that have any."""
    stacks: dict[int, dict[int, np.ndarray]] = {number: {} for number in numbers}
    least = 0.5 * seg.MaximumFractionalValue if seg.SegmentationType == "FRACTIONAL" else 1
    for i, group in enumerate(seg.PerFrameFunctionalGroupsSequence):
        stored, plane = seg.get_stored_frame(i + 1), frames.plane_of_frame[i]
        if seg.SegmentationType == "LABELMAP":
            found = {number: stored == number for number in numbers}
        else:
            item = group if "SegmentIdentificationSequence" in group else seg.SharedFunctionalGroupsSequence[0]
            found = {item.SegmentIdentificationSequence[0].ReferencedSegmentNumber: stored >= least}
        for number, pixels in found.items():
            if pixels.any():
                stacks[number][plane] = stacks[number].get(plane, False) | pixels
    return [stacks[number] for number in numbers]


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
