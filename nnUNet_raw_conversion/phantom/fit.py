"""Laying the plan of `anatomy` over a real patient of whom only some organs are known.

Every slice of the patient gets a height in the plan, from organs whose place in the plan is known (apex of the lungs,
kidneys, bladder, brain). Within a slice the plan is stretched from its axis, in every direction as much as it takes to
bring the inside of the plan's chest wall onto the convex hull of the real lungs, heart, liver, spleen and stomach, and
the plan's head onto the real brain; between and beyond these slices the stretch is interpolated. Bones, muscles, fat,
vessels, bowel and the chains of lymph nodes of the plan thereby come to lie where they belong in this patient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from nnUNet_raw_conversion.phantom.anatomy import CAVITY
from nnUNet_raw_conversion.phantom.organs import LABEL, labels_of
from nnUNet_raw_conversion.phantom.shapes import Curve, Grid, Point, Shape

SPLEEN, KIDNEYS, LIVER, BLADDER, LUNG, BRAIN, HEART, STOMACH, PROSTATE, GLANDS = range(1, 11)
TRUNK_ORGANS = (SPLEEN, KIDNEYS, LIVER, LUNG, HEART, STOMACH)
CHEST = (470, 705)  # heights in the plan between which lungs, liver, spleen and stomach fill the cavity
AXIS_Y = Curve((160, 200, 260, 330, 420, 500, 560, 620, 680, 720, 770, 840, 918),
               (5, 5, -4, -13, -9, -3, 0, 4, 9, 15, 12, -5, -20))  # fmt: skip
DIRECTIONS = 720
ANGLES = np.arange(DIRECTIONS) * (2 * np.pi / DIRECTIONS)  # 0 to the left, pi/2 to the back


class Fit(NamedTuple):
    """The stretch of the plan, by slice: `height` in the plan (n,), the place of the plan's axis in the patient `x`
    and `y` (n,) in mm, and millimetres of the patient to one of the plan in each direction, `stretch` (n, DIRECTIONS).
    """

    height: np.ndarray
    x: np.ndarray
    y: np.ndarray
    stretch: np.ndarray


class FittedAnatomy:
    """A patient made of real organs and, around them, the plan; used as `anatomy.Anatomy` is."""

    def __init__(self, shapes: list[Shape], fit: Fit, grid: Grid) -> None:
        self.shapes, self.fit, self.grid = shapes, fit, grid
        self.axis_y = AXIS_Y(fit.height)

    def plan_coordinates(self) -> list[np.ndarray]:
        """For every voxel its place in the plan: x, y and z in mm, float32 arrays (z, y, x)."""
        z, y, x = self.grid.axes()
        plan_x, plan_y = (np.empty(self.grid.shape, np.float32) for _ in range(2))
        for k in range(len(z)):
            dx, dy = x[None] - self.fit.x[k], y[:, None] - self.fit.y[k]
            shrink = (1 / self.fit.stretch[k])[_direction(dx, dy)]
            np.multiply(dx, shrink, out=plan_x[k])
            np.add(dy * shrink, self.axis_y[k], out=plan_y[k])
        return [plan_x, plan_y, np.broadcast_to(self.fit.height[:, None, None], self.grid.shape)]

    def organs(self, coordinates: list[np.ndarray]) -> np.ndarray:
        """The plan's organ label of every voxel, uint8 (z, y, x), given `plan_coordinates()`."""
        x, y, z = coordinates
        labels = np.zeros(self.grid.shape, np.uint8)
        for shape in self.shapes:
            box = self.box(shape.low, shape.high, self.grid)
            if labels[box].size:
                shape.paint(labels[box], x[box], y[box], z[box][:, :1, :1])
        return labels

    def box(self, low: np.ndarray, high: np.ndarray, grid: Grid) -> tuple[slice, slice, slice]:
        """The part (z, y, x) of `grid`, which is that of the patient or a part of it, that can hold points of the plan
        between `low` and `high`."""
        inside = np.flatnonzero((self.fit.height > low[2] - 6) & (self.fit.height < high[2] + 6))
        if not len(inside):
            return (slice(0, 0),) * 3
        stretch = self.fit.stretch[inside]
        least, most = stretch.min(1), stretch.max(1)
        bounds = [(inside[0], inside[-1])]
        for axis, middle, offset in ((1, self.fit.y, self.axis_y[inside]), (0, self.fit.x, 0)):
            a, b = low[axis] - offset, high[axis] - offset
            first = (middle[inside] + np.minimum(a * least, a * most)).min()
            last = (middle[inside] + np.maximum(b * least, b * most)).max()
            bounds.append(((first - grid.origin[axis]) / grid.spacing[axis],
                           (last - grid.origin[axis]) / grid.spacing[axis]))  # fmt: skip
        sizes = zip(bounds, grid.shape, strict=True)
        return tuple(slice(max(int(np.floor(a)), 0), max(min(int(np.ceil(b)) + 1, n), 0)) for (a, b), n in sizes)

    def settle(self, grid: Grid, organs: np.ndarray, coordinates: list[np.ndarray]) -> None:
        """What has become of the patient, on a part of the grid that has all slices: what later questions are about."""
        self.grid, self.labels, self.coordinates = grid, organs, coordinates

    def organ_at(self, points: np.ndarray) -> np.ndarray:
        """The organ labels at `points` of the plan, shape (n, 3) as x, y, z; air outside of the field of view."""
        k = np.interp(points[:, 2], self.fit.height, np.arange(len(self.fit.height)), left=-1, right=-1)
        slices = np.rint(k).astype(int)
        dx, dy = points[:, 0], points[:, 1] - self.axis_y[slices]
        stretch = self.fit.stretch[slices, _direction(dx, dy)]
        place = np.stack([self.fit.x[slices] + dx * stretch, self.fit.y[slices] + dy * stretch], 1)
        index = np.rint((place - self.grid.origin[:2]) / self.grid.spacing[:2]).astype(int)
        inside = (slices >= 0) & (index >= 0).all(1) & (index < self.grid.size[:2]).all(1)
        i, j = np.where(inside[:, None], index, 0).T
        return np.where(inside, self.labels[slices, j, i], LABEL["air"])

    def points_in(self, rng: np.random.Generator, organs: Sequence[str], low: Point, high: Point) -> np.ndarray:
        """Points of the plan (n, 3), n >= 1, that lie in `organs` and, where any do, between `low` and `high`."""
        voxels = np.flatnonzero(labels_of(*organs)[self.labels])
        voxels = rng.choice(voxels, min(len(voxels), 3000), replace=False)
        index = np.unravel_index(voxels, self.labels.shape)
        points = np.stack([axis[index] for axis in self.coordinates], 1)
        near = ((points > low) & (points < high)).all(1)
        return points[near] if near.any() else points


def plan_box(shapes: Sequence[Shape], organ: str) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high corner of all shapes that paint `organ`."""
    found = [shape for shape in shapes if shape.organ == organ]
    return np.min([shape.low for shape in found], 0), np.max([shape.high for shape in found], 0)


def fit_plan(real: np.ndarray, grid: Grid, shapes: Sequence[Shape]) -> Fit:
    """Lay the plan made of `shapes` over the organ map `real` (z, y, x; 1 to 10 as autoPET III's, 0 elsewhere)."""
    height = _heights(real, grid, shapes)
    chest = _chest_levels(real, grid, height)
    head = _head_level(real, grid, height, shapes)
    stretch = _stretch_levels(height, chest, head)
    x, y = _axis(real, grid, height, shapes, chest, head, stretch)
    stretch = _contain(stretch, real, grid, height, x, y)
    return Fit(height, x, y, stretch)


class _Level(NamedTuple):
    """What is known of the plan in one slice: the place of its axis (mm) and the stretch in each direction."""

    slice: int
    x: float
    y: float
    stretch: np.ndarray


def _heights(real: np.ndarray, grid: Grid, shapes: Sequence[Shape]) -> np.ndarray:
    """The height in the plan of every slice, increasing. An organ that the field of view cuts off says nothing."""
    extent = {label: (box[0].start, box[0].stop - 1) for label, box in
              enumerate(ndimage.find_objects(real, 10), 1) if box}  # fmt: skip
    edge = {organ: plan_box(shapes, organ) for organ in ("kidneys", "bladder", "brain", "submandibular glands",
                                                         "liver", "spleen", "stomach")}  # fmt: skip
    low, high = ({organ: box[side][2] for organ, box in edge.items()} for side in (0, 1))
    mid = {organ: (low[organ] + high[organ]) / 2 for organ in edge}
    landmarks = [(LUNG, 1, 746), (BLADDER, 0, low["bladder"]), (BRAIN, 0, low["brain"]), (BRAIN, 1, high["brain"]),
                 (KIDNEYS, 0.5, mid["kidneys"]), (HEART, 1, 658), (GLANDS, 0, low["submandibular glands"])]  # fmt: skip
    spare = [(LIVER, 0.5, mid["liver"]), (SPLEEN, 0.5, mid["spleen"]), (STOMACH, 0.5, mid["stomach"])]
    pairs: list[tuple[float, float]] = []
    for label, where, target in landmarks + spare:
        if label not in extent or ((label, where, target) in spare and len(pairs) > 1):
            continue
        first, last = extent[label]
        if (where > 0 and last == len(real) - 1) or (where < 1 and first == 0) or (label == GLANDS and BRAIN in extent):
            continue
        trial = sorted([*pairs, ((first + where * (last - first)) * grid.spacing[2], float(target))])
        if all(0.6 < (b[1] - a[1]) / max(b[0] - a[0], 1e-3) < 1.7 for a, b in zip(trial, trial[1:], strict=False)):
            pairs = trial
    if not pairs:  # all organs are cut off: the middle of what is there
        label, (first, last) = max(extent.items(), key=lambda item: item[1][1] - item[1][0])
        middle = {LUNG: 620, HEART: 590, BRAIN: 915, GLANDS: 840, PROSTATE: 172, BLADDER: 200, LIVER: 500}
        pairs = [((first + last) / 2 * grid.spacing[2], middle.get(label, 460))]
    slope = np.clip((pairs[-1][1] - pairs[0][1]) / max(pairs[-1][0] - pairs[0][0], 1e-3), 0.85, 1.2)
    slope = float(slope) if len(pairs) > 1 else 1.0
    (z0, h0), (z1, h1) = pairs[0], pairs[-1]
    z, h = np.transpose([(z0 - 3000, h0 - 3000 * slope), *pairs, (z1 + 3000, h1 + 3000 * slope)])
    margin = int(np.ceil(60 / grid.spacing[2]))
    table = np.interp(np.arange(-margin, len(real) + margin) * grid.spacing[2], z, h)
    smooth = ndimage.gaussian_filter1d(table, 15 / grid.spacing[2])
    return smooth[margin:-margin].astype(np.float32)


def _chest_levels(real: np.ndarray, grid: Grid, height: np.ndarray) -> list[_Level]:
    """The slices in which lungs, heart, liver, spleen and stomach together fill the chest."""
    levels, (_, y, x) = [], grid.axes()
    voxel = grid.spacing[0] * grid.spacing[1]
    for k in np.flatnonzero((height > CHEST[0]) & (height < CHEST[1])):
        if np.count_nonzero(real[k] == LUNG) * voxel < 4000:  # mm^2
            continue
        mask = np.isin(real[k], TRUNK_ORGANS)
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        middle = (float(x[columns[[0, -1]]].mean()), float(y[rows[[0, -1]]].mean()))
        radius = _hull_radius(mask, x, y, middle)
        if radius is not None:
            levels.append(_Level(int(k), *middle, (radius + 3) / CAVITY.radius(ANGLES, height[k])))
    return levels


def _hull_radius(mask: np.ndarray, x: np.ndarray, y: np.ndarray, middle: tuple[float, float]) -> np.ndarray | None:
    """Distance from `middle` to the convex hull of `mask` in each direction; None for a mask that has no area."""
    rows = np.flatnonzero(mask.any(1))
    first, last = mask[rows].argmax(1), mask.shape[1] - 1 - mask[rows, ::-1].argmax(1)
    points = np.concatenate([np.stack([x[first], y[rows]], 1), np.stack([x[last], y[rows]], 1)])
    if len(rows) < 3:
        return None
    try:
        faces = ConvexHull(points - np.float32(middle)).equations
    except QhullError:
        return None
    outward = faces[:, :2] @ np.stack([np.cos(ANGLES), np.sin(ANGLES)])
    with np.errstate(divide="ignore"):
        reach = np.where(outward > 1e-6, -faces[:, 2:] / outward, np.inf)
    return np.maximum(reach.min(0), 0)


def _head_level(real: np.ndarray, grid: Grid, height: np.ndarray, shapes: Sequence[Shape]) -> _Level | None:
    """The head where the brain is, or else where the glands of the head are."""
    box = ndimage.find_objects(real, 10)[BRAIN - 1]
    _, y, x = grid.axes()
    if box and (box[0].stop - box[0].start) * grid.spacing[2] > 90:
        half = [(s.stop - s.start) * grid.spacing[i] / 2 for i, s in ((0, box[2]), (1, box[1]))]
        low, high = plan_box(shapes, "brain")
        sx, sy = np.clip(2 * np.array(half) / (high - low)[:2], 0.8, 1.25)
        at, plan_y, middle = box[0], (low[1] + high[1]) / 2, [axis[s].mean() for axis, s in ((x, box[2]), (y, box[1]))]
    elif (box := ndimage.find_objects(real, 10)[GLANDS - 1]) is not None:
        at, sx, sy, plan_y = box[0], 1.0, 1.0, -24.0
        middle = [axis[s].mean() for axis, s in ((x, box[2]), (y, box[1]))]
    else:
        return None
    k = (at.start + at.stop) // 2
    stretch = np.hypot(sx * np.cos(ANGLES), sy * np.sin(ANGLES))
    return _Level(k, float(middle[0]), float(middle[1] + sy * (AXIS_Y(height[k : k + 1])[0] - plan_y)), stretch)


def _stretch_levels(height: np.ndarray, chest: list[_Level], head: _Level | None) -> np.ndarray:
    """The stretch of every slice (n, DIRECTIONS): of the chest, of the head, and between and beyond."""
    rows = {height[level.slice]: level.stretch for level in chest}
    if rows:
        lowest = np.mean([s for h, s in rows.items() if h < min(rows) + 40], axis=0)
        rows[min(min(rows), CHEST[0]) - 50] = lowest = 0.5 * lowest + 0.5 * lowest.mean()
        rows[260.0] = np.full(DIRECTIONS, 0.5 + 0.5 * lowest.mean())
    rows[790.0] = rows[920.0] = np.ones(DIRECTIONS) if head is None else head.stretch
    rows[790.0] = 0.6 + 0.4 * rows[790.0]
    heights = np.array(sorted(rows))
    table = np.stack([rows[h] for h in heights])
    place = np.interp(height, heights, np.arange(len(heights)))
    below = np.minimum(place.astype(int), len(heights) - 2)
    share = (place - below)[:, None]
    return (1 - share) * table[below] + share * table[below + 1]


def _axis(
    real: np.ndarray, grid: Grid, height: np.ndarray, shapes: Sequence[Shape], chest: list[_Level],
    head: _Level | None, stretch: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The place of the plan's axis in every slice, x and y in mm."""
    known = [(level.slice, level.x, level.y) for level in chest]
    boxes, (_, y, x) = ndimage.find_objects(real, 10), grid.axes()
    lowest = min((height[k] for k, *_ in known), default=np.inf)
    for label, organ in ((KIDNEYS, "kidneys"), (BLADDER, "bladder")):
        if (box := boxes[label - 1]) is None:
            continue
        k = (box[0].start + box[0].stop) // 2
        if height[k] < lowest - 10:
            low, high = plan_box(shapes, organ)
            scale, axis_y = stretch[k].mean(), AXIS_Y(height[k : k + 1])[0]
            known.append((k, float(x[box[2]].mean()), float(y[box[1]].mean()) - scale * ((low + high)[1] / 2 - axis_y)))
    if head is not None:
        known.append((head.slice, head.x, head.y))
    if not known:
        z, *rest = np.nonzero(real)
        known = [(int(z.mean()), float(x[rest[1]].mean()), float(y[rest[0]].mean()))]
    k, *places = np.transpose(sorted(known))
    smooth = [ndimage.gaussian_filter1d(np.interp(np.arange(len(real)), k, place), 12 / grid.spacing[2],
                                        mode="nearest") for place in places]  # fmt: skip
    return smooth[0].astype(np.float32), smooth[1].astype(np.float32)


def _contain(
    stretch: np.ndarray, real: np.ndarray, grid: Grid, height: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """The stretch, made such that the organs below the chest lie within the cavity, and smooth."""
    _, rows, columns = grid.axes()
    for k in np.flatnonzero((height > 160) & (height <= CHEST[0] + 20)):
        mask = np.isin(real[k], (*TRUNK_ORGANS, BLADDER))
        radius = _hull_radius(mask, columns, rows, (x[k], y[k])) if mask.any() else None
        if radius is not None:
            stretch[k] = np.maximum(stretch[k], (radius + 2) / CAVITY.radius(ANGLES, height[k]))
    sigma = (16 / grid.spacing[2], np.radians(8) * DIRECTIONS / (2 * np.pi))
    smooth = ndimage.gaussian_filter(stretch, sigma, mode=("nearest", "wrap"))
    return np.clip(smooth, 0.6, 1.8).astype(np.float32)


def _direction(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    return np.rint(np.arctan2(dy, dx) * np.float32(DIRECTIONS / (2 * np.pi))).astype(np.int32) % DIRECTIONS
