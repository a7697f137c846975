"""RTSTRUCT: contours in millimetres to a mask on the grid of an image.

A voxel belongs to an ROI if its centre lies in the solid that the contours bound. By this rule IBSI's masks of the
soft-tissue-sarcoma patients come out to the last voxel. The other rule in use, more than half of the voxel covered,
gives Dice 0.980 to 0.997 on them, and takes 4 to 8% of the volume of spheres of 6 mm in PET voxels, where the centre
rule is right on the mean: it is biased wherever a border is curved, and so most of all for small lesions.

The solid: in a contour's plane the contour itself (holes: see `_signs`), between neighbouring planes a gradual change
of one shape into the other, and beyond the outermost plane half the distance of the planes. Thus thin slices between
two contours are filled, and thick slices take the shape at their centre instead of the sum of all contours in them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.measure import points_in_poly

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.limits import check_file
from nnUNet_raw_conversion.dicom.names import shown_name

# CLOSEDPLANAR_XOR is the standard's spelling (PS3.3 C.8.8.6.1).
CLOSED, CLOSED_XOR = "CLOSED_PLANAR", "CLOSEDPLANAR_XOR"
SAME_PLANE_MM = 0.1  # positions of slices are rounded; no scanner's slices are nearer than this
FLAT_MM = 0.5  # how much a contour may leave its plane
# Planes farther apart than slices of a body ever are belong to different lesions of one ROI.
THICKEST_SLICE_MM = 10.0


@dataclass(frozen=True)
class Roi:
    """One region of interest as it stands in the file.

    Args:
        number: ROI Number (3006,0022). name: ROI Name (3006,0026), not to be shown but by `shown_name`.
        kind: RT ROI Interpreted Type (3006,00A4), as GTV, PTV, ORGAN or EXTERNAL; empty where the file has none.
        frame_uid: Referenced Frame of Reference UID (3006,0024); in memory only.
        contours: closed contours, each (N, 3) in mm, LPS; the last point is not the first.
        xor: whether the contours are CLOSEDPLANAR_XOR, else CLOSED_PLANAR.
        gap: usual distance of neighbouring contour planes in mm, or None where the file does not tell.
        notes: what was passed over.
    """

    number: int
    name: str
    kind: str
    frame_uid: str
    contours: tuple[np.ndarray, ...]
    xor: bool = False
    gap: float | None = None
    notes: tuple[str, ...] = ()


def read_rois(file: Path) -> list[Roi]:
    """All ROIs of an RTSTRUCT file, in the file's order; those without contours as well.

    Points, open contours and contours of fewer than three points are passed over with a note.

    Raises:
        UserError: the file cannot be read to its end, is no RTSTRUCT, or its contours are damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they may quote what is in the file
            check_file(file)
            rois = _rois(pydicom.dcmread(file, force=True))
    # What pydicom raises where an element is cut off, missing, or not what its VR says.
    except (AttributeError, EOFError, OSError, TypeError, ValueError, pydicom.errors.InvalidDicomError):
        raise UserError("RTSTRUCT: damaged or cut off; export or copy it again", "CONTOURS_UNREADABLE") from None
    known = [roi.gap for roi in rois if roi.gap]
    usual = float(np.median(known)) if known else None
    return [replace(roi, gap=roi.gap or usual) for roi in rois]


def rasterise(roi: Roi, reference: sitk.Image, frame_uid: str = "") -> np.ndarray:
    """The ROI as a mask, bool (z, y, x), on the grid of `reference`, whatever its direction cosines are.

    The part outside of the image is cut off. An ROI between the centres of all voxels gives an empty mask. `frame_uid`
    is the frame of reference of `reference`; it is compared where both are known.

    Raises:
        UserError: no closed contours, another frame of reference, contours wholly outside of the image, not flat, or
            in planes of several directions.
    """
    what = f"RTSTRUCT: ROI {shown_name(roi.name)!r}"
    if not roi.contours:
        raise UserError(f"{what} has no closed contours; choose others by --lesion-roi")
    if frame_uid and roi.frame_uid and frame_uid != roi.frame_uid:
        raise UserError(f"{what} is in another frame of reference than the image; give one drawn on this PET/CT",
                        "CONTOURS_OTHER_FRAME")  # fmt: skip
    contours = [to_index(reference, points) for points in roi.contours]
    last = np.array(reference.GetSize()) - 0.5
    if not any(np.all((points.max(0) >= -0.5) & (points.min(0) <= last)) for points in contours):
        raise UserError(f"{what} lies wholly outside of the image; is it of another scan?")
    spacing = np.array(reference.GetSpacing())
    thickness = np.max([np.ptp(points, axis=0) for points in contours], axis=0) * spacing
    axis = int(thickness.argmin())  # the one across the contours: z, if they were drawn on axial slices
    if thickness[axis] > FLAT_MM:
        return _rasterise_oblique(roi, reference, what)
    order = [i for i in range(3) if i != axis] + [axis]
    drawn = _draw([points[:, order] for points in contours], roi, np.array(reference.GetSize())[order], spacing[order])
    return np.moveaxis(drawn, 0, 2 - axis)


def locate(heights: np.ndarray, gap: float, height: float) -> tuple[int, int, float] | None:
    """Between which two of the sorted plane `heights` (N,) a height is, and how far from the first, from 0 to 1.

    Planes up to 1.5 times `gap` apart are neighbours; what is farther apart is left empty, as it was drawn. At the end
    of a run of neighbours the last plane holds for half a `gap`. None outside of all that. Within a tenth of the
    distance from a plane it is the plane's own shape that counts: positions of slices are not more exact than that.
    """
    below = int(np.searchsorted(heights, height, side="right")) - 1
    above = below + 1
    if below >= 0 and above < len(heights) and heights[above] - heights[below] <= 1.5 * gap:
        t = float((height - heights[below]) / (heights[above] - heights[below]))
        return below, above, 0.0 if t < 0.1 else 1.0 if t > 0.9 else t
    # Half open, so that a slab as thick as the image's slices takes exactly one of them.
    half, tiny = gap / 2, gap / 1000
    if above < len(heights) and heights[above] - height <= half + tiny:
        return above, above, 0.0
    if below >= 0 and height - heights[below] < half - tiny:
        return below, below, 0.0
    return None


def usual_gap(heights: np.ndarray) -> float | None:
    """The usual distance of the planes (N,) in mm, sorted and distinct; None if no two of them are neighbours."""
    gaps = np.diff(heights)
    gaps = gaps[gaps <= THICKEST_SLICE_MM]
    return float(np.median(gaps)) if gaps.size else None


def to_index(image: sitk.Image, points: np.ndarray) -> np.ndarray:
    """Continuous indices (N, 3) x, y, z of positions (N, 3) in mm."""
    matrix = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    return np.linalg.solve(matrix, (points - image.GetOrigin()).T).T


def share_inside(roi: Roi, reference: sitk.Image) -> float:
    """The share (0 to 1) of the contours' points that lie in the image."""
    points = to_index(reference, np.concatenate(roi.contours))
    return float(np.mean(np.all((points >= -0.5) & (points <= np.array(reference.GetSize()) - 0.5), axis=1)))


def _draw(contours: list[np.ndarray], roi: Roi, size: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The solid of contours (N, 3), in voxels, whose planes are of constant last coordinate; bool (size reversed)."""
    planes = _planes(contours, SAME_PLANE_MM / spacing[2])
    heights = np.array([height for height, _ in planes])
    points = np.concatenate(contours)[:, :2]
    low = np.clip(np.floor(points.min(0)).astype(int), 0, size[:2] - 1)
    high = np.clip(np.ceil(points.max(0)).astype(int) + 1, 1, size[:2])

    @lru_cache(maxsize=2)
    def plane(i: int) -> _Plane:
        return _Plane([polygon - low for polygon in planes[i][1]], roi.xor, (high - low)[::-1], spacing[:2])

    mask = np.zeros(size[::-1], bool)
    for z in range(size[2]):
        place = locate(heights, (roi.gap or spacing[2]) / spacing[2], z)
        if place is not None:
            below, above, t = place
            shape = _between(plane(below), plane(above), t) if 0 < t < 1 else plane(above if t else below).shape
            mask[z, low[1] : high[1], low[0] : high[0]] = shape
    return mask


class _Plane:
    """The shape that the polygons (N, 2) of one plane make, bool (rows, columns), and how far its border is."""

    def __init__(self, polygons: list[np.ndarray], xor: bool, shape: tuple[int, int], spacing: np.ndarray):
        self.shape, self._spacing = np.zeros(shape, bool), spacing
        signs = _signs(polygons, xor)
        self._polygons = [polygon for polygon, _ in signs]
        for polygon, adds in signs:
            inside = _fill(polygon, shape)
            self.shape = self.shape ^ inside if xor else self.shape | inside if adds else self.shape & ~inside

    def depth(self, where: np.ndarray) -> np.ndarray:
        """Distance to the border in mm at the pixels where `where` is true, positive inside and negative outside."""
        row, column = where.nonzero()
        distance = self._border.query(np.stack([column, row], -1) * self._spacing)[0]
        return np.where(self.shape[where], distance, -distance)

    @cached_property
    def _border(self) -> cKDTree:
        """Points on the border, an eighth of a pixel apart; edges that are there twice (of keyholes) are no border."""
        edges = np.concatenate([np.stack([p, np.roll(p, -1, 0)], 1) for p in self._polygons]) * self._spacing
        undirected = np.sort(edges.round(3).view(complex)[..., 0], axis=1)
        _, kind, times = np.unique(undirected, axis=0, return_inverse=True, return_counts=True)
        edges = edges[times[kind.ravel()] % 2 == 1]
        step = edges[:, 1] - edges[:, 0]
        count = np.ceil(np.linalg.norm(step, axis=1) / (min(self._spacing) / 8)).astype(int) + 1
        edge = np.repeat(np.arange(len(edges)), count)
        part = (np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)) / count[edge]
        return cKDTree(edges[edge, 0] + part[:, None] * step[edge])


def _rois(dataset: pydicom.Dataset) -> list[Roi]:
    if dataset.get("Modality") != "RTSTRUCT":
        raise UserError("RTSTRUCT: the file is none, or damaged (Modality (0008,0060)); export it again")
    contours_of = {int(item.ReferencedROINumber): item.get("ContourSequence") for item in dataset.ROIContourSequence}
    kinds = {
        int(item.ReferencedROINumber): str(item.get("RTROIInterpretedType") or "").upper()
        for item in dataset.get("RTROIObservationsSequence") or ()
    }
    numbers = [int(item.ROINumber) for item in dataset.StructureSetROISequence]
    return [
        _roi(item, contours_of.get(number), kinds.get(number, ""))
        for item, number in zip(dataset.StructureSetROISequence, numbers, strict=True)
    ]


def _roi(item: pydicom.Dataset, sequence: Sequence[pydicom.Dataset] | None, kind: str) -> Roi:
    """One ROI from its items of the Structure Set ROI Sequence and its Contour Sequence."""
    contours, passed, kinds = [], 0, set()
    for contour in sequence or ():
        # The bytes as stored: pydicom makes an object of every number, which takes ten times as long as drawing them.
        points = np.array(contour.get_item("ContourData").value.split(b"\\"), float).reshape(-1, 3)
        if not np.isfinite(points).all() or int(contour.get("NumberOfContourPoints") or len(points)) != len(points):
            raise ValueError
        if np.array_equal(points[0], points[-1]):
            points = points[:-1]
        if contour.ContourGeometricType not in (CLOSED, CLOSED_XOR) or len(points) < 3:
            passed += 1
            continue
        kinds.add(contour.ContourGeometricType)
        contours.append(points)
    notes = [f"{passed} points or open contours passed over"] if passed else []
    gap = None
    if contours:
        heights = np.sort(np.array([points.mean(0) for points in contours]) @ _normal(contours))
        heights = heights[np.r_[True, np.diff(heights) > SAME_PLANE_MM]]
        gap = usual_gap(heights)
        skipped = np.count_nonzero((np.diff(heights) / gap > 1.5) & (np.diff(heights) / gap < 3.5)) if gap else 0
        if skipped:
            notes.append(f"{skipped} times a contour or two are missing between others; left empty")
    frame_uid = str(item.get("ReferencedFrameOfReferenceUID") or "")
    xor = CLOSED_XOR in kinds
    name = str(item.get("ROIName") or "")
    return Roi(int(item.ROINumber), name, kind, frame_uid, tuple(contours), xor, gap, tuple(notes))


def _normal(contours: Sequence[np.ndarray]) -> np.ndarray:
    """Unit normal (3,) of the contour with the largest area (Newell's method)."""
    areas = [np.cross(points, np.roll(points, -1, 0)).sum(0) for points in (c - c.mean(0) for c in contours)]
    largest = max(areas, key=np.linalg.norm)
    return largest / max(np.linalg.norm(largest), 1e-12)


def _planes(contours: list[np.ndarray], tolerance: float) -> list[tuple[float, list[np.ndarray]]]:
    """Height and polygons (N, 2) of every plane, from below; contours nearer than `tolerance` are in one plane."""
    planes: list[tuple[float, list[np.ndarray]]] = []
    for height, points in sorted(((c[:, 2].mean(), c[:, :2]) for c in contours), key=lambda pair: pair[0]):
        if planes and height - planes[-1][0] <= tolerance:
            planes[-1][1].append(points)
        else:
            planes.append((float(height), [points]))
    return planes


def _signs(polygons: list[np.ndarray], xor: bool) -> list[tuple[np.ndarray, bool]]:
    """The polygons of one plane from the largest on, and whether each adds to the shape or is a hole in it.

    The standard knows holes as keyholes, which are one polygon, and as CLOSEDPLANAR_XOR (PS3.3 C.8.8.6.3). Most systems
    write holes as plain CLOSED_PLANAR contours within another, and so it is read here: a contour in an odd number of
    larger ones is a hole, in an even number it adds. Contours that overlap in part are united, and the same contour
    stored twice counts once; with XOR either would make a hole that nobody drew.
    """
    if xor or len(polygons) == 1:
        return [(polygon, True) for polygon in polygons]
    distinct = {frozenset(map(tuple, polygon.round(3).tolist())): polygon for polygon in polygons}
    ordered = sorted(distinct.values(), key=_area, reverse=True)
    within = [sum(points_in_poly(p, larger).mean() > 0.9 for larger in ordered[:i]) for i, p in enumerate(ordered)]
    return [(polygon, depth % 2 == 0) for polygon, depth in zip(ordered, within, strict=True)]


def _area(polygon: np.ndarray) -> float:
    x, y = (polygon - polygon[0]).T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _fill(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies in the polygon (N, 2) x, y by the even-odd rule, which opens keyholes; bool `shape`.

    Every edge toggles, in each row that it crosses, all pixels to the right of the crossing.
    """
    rows, columns = shape
    (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, 0).T
    first, last = (np.ceil(f(y0, y1)).clip(0, rows).astype(int) for f in (np.minimum, np.maximum))
    count = last - first
    edge = np.repeat(np.arange(len(polygon)), count)
    row = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)
    x = x0[edge] + (row - y0[edge]) / (y1 - y0)[edge] * (x1 - x0)[edge]
    column = np.ceil(x).clip(0, columns).astype(int)
    toggles = np.bincount(row * (columns + 1) + column, minlength=rows * (columns + 1)) & 1
    return np.logical_xor.accumulate(toggles.reshape(rows, columns + 1).astype(bool), axis=1)[:, :-1]


def _between(a: _Plane, b: _Plane, t: float) -> np.ndarray:
    """The shape at `t` (0 to 1) of the way from `a` to `b`, bool: where the mean of the two depths is positive.

    (Shape-based interpolation: Raya and Udupa, IEEE Trans Med Imaging 9, 1990.) What is in both is in, what is in
    neither is out. Parts of one that do not touch the other end half-way, as an ROI ends half a gap beyond its last
    plane; their distance to a far border of the other shape would make small lesions vanish at once.
    """
    common = a.shape & b.shape
    near, far = (a.shape, b.shape) if t < 0.5 else (b.shape, a.shape)
    if not common.any():
        return near
    result = common.copy()
    alone = near & ~ndimage.binary_propagation(common, mask=near)
    doubtful = (near & ~alone & ~far) | (ndimage.binary_propagation(common, mask=far) & ~near)
    if doubtful.any():
        result[doubtful] = (1 - t) * a.depth(doubtful) + t * b.depth(doubtful) > 0
    return result | alone


def _rasterise_oblique(roi: Roi, reference: sitk.Image, what: str) -> np.ndarray:
    """As `rasterise`, for contours in planes that are not the image's slices (tilted gantry, sagittal drawing).

    They are drawn on an auxiliary grid along their own planes, with a third of the image's smallest voxel side, in
    which the voxels' centres are looked up.
    """
    normal = _normal(roi.contours)
    if max(np.ptp(points @ normal) for points in roi.contours) > FLAT_MM:
        raise UserError(f"{what} has contours that are not flat or in planes of several directions; export it anew "
                        "with contours in the image's slices")  # fmt: skip
    across = np.cross(normal, np.eye(3)[np.abs(normal).argmin()])
    across /= np.linalg.norm(across)
    axes = np.stack([across, np.cross(normal, across), normal])  # rows: the auxiliary grid's x, y, z
    voxel = min(reference.GetSpacing())
    gap = roi.gap or voxel
    local = [points @ axes.T for points in roi.contours]
    points = np.concatenate(local)
    low, high = points.min(0) - gap, points.max(0) + gap
    step = max(voxel / 3, (np.prod(high - low) / 1e8) ** (1 / 3))  # 100 MB at most
    size = np.ceil((high - low) / step).astype(int)
    drawn = _draw([(p - low) / step for p in local], replace(roi, gap=gap), size, np.full(3, step))
    image = sitk.GetImageFromArray(drawn.astype(np.uint8))
    image.SetSpacing([step] * 3)
    image.SetDirection(axes.T.ravel().tolist())
    image.SetOrigin((low @ axes).tolist())
    found = sitk.Resample(image, reference, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    return sitk.GetArrayFromImage(found) > 0
