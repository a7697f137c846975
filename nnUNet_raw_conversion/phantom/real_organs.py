"""A body around real organs: the plan painted first, then the organs of the map, then what lies inside of them."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from nnUNet_raw_conversion.phantom.anatomy import Patient, build_anatomy
from nnUNet_raw_conversion.phantom.fit import (
    BLADDER,
    BRAIN,
    GLANDS,
    HEART,
    KIDNEYS,
    LIVER,
    LUNG,
    PROSTATE,
    SPLEEN,
    STOMACH,
    FittedAnatomy,
    fit_plan,
    plan_box,
)
from nnUNet_raw_conversion.phantom.organs import LABEL
from nnUNet_raw_conversion.phantom.shapes import Grid, Shape, SmoothField, ellipsoid, mirror, tube

ORGAN_OF = {SPLEEN: "spleen", KIDNEYS: "kidneys", LIVER: "liver", BLADDER: "bladder", LUNG: "lung", BRAIN: "brain",
            HEART: "blood", STOMACH: "stomach", PROSTATE: "prostate", GLANDS: "parotid glands"}  # fmt: skip
REPLACED = {"lung": "mediastinum", "parotid glands": "fat", "submandibular glands": "fat", "lacrimal glands": "fat"}
LEFT_TO_REAL = {"liver", "spleen", "kidneys", "renal pelvis", "gallbladder", "stomach", "bladder", "prostate",
                "myocardium"}  # fmt: skip
PLAN_HEART = np.float32([(-38, -88, 521), (78, 4, 629)])


def build_around(
    real: np.ndarray, grid: Grid, patient: Patient, body: np.random.Generator, inner: np.random.Generator
) -> FittedAnatomy:
    """The patient around the organs `real` (z, y, x; on `grid`), settled on the part of the grid that holds the body
    and the table."""
    shapes = build_anatomy(body, patient).shapes
    fit = fit_plan(real, grid, shapes)
    drop = set(LEFT_TO_REAL)
    if (real == BRAIN).any():
        vault = [number for number, shape in enumerate(shapes) if shape.organ == "skull"][:2]  # face and jaw stay
        shapes = [shape for number, shape in enumerate(shapes) if number not in vault]
        drop |= {"brain", "white matter"}
    anatomy = FittedAnatomy([s for s in shapes if s.organ not in drop] + _legs(patient.fat), fit, grid)
    coordinates = anatomy.plan_coordinates()
    organs = anatomy.organs(coordinates)
    _put_organs(organs, real)
    _put_skull(organs, real, grid, patient.fat)
    _put_inner_parts(organs, real, grid, shapes, inner)
    _name_glands(organs, real, coordinates)

    part = _body_part(organs, grid)
    smaller = _cut(grid, part)
    smaller = Grid(smaller.size, smaller.spacing, (smaller.origin[0], smaller.origin[1], 0.0))
    anatomy.settle(smaller, organs[part], [axis[part] for axis in coordinates])
    return anatomy


def _body_part(organs: np.ndarray, grid: Grid) -> tuple[slice, slice, slice]:
    """The slices (z, y, x) that hold the body, some air and the table, which is 410 mm wide."""
    part = [slice(0, len(organs))]
    for axis, behind, middle, half in ((1, 50, 0, 0), (2, 20, -grid.origin[0], 210)):
        held, step = np.flatnonzero(organs.any(tuple({0, 1, 2} - {axis}))), grid.spacing[2 - axis]
        first = min(held[0] - 20 / step, (middle - half) / step if half else np.inf)
        last = max(held[-1] + behind / step, (middle + half) / step)
        part.append(slice(max(int(first), 0), min(int(last) + 1, organs.shape[axis])))
    return tuple(part)


def _cut(grid: Grid, part: tuple[slice, slice, slice]) -> Grid:
    first = [p.start for p in part][::-1]
    origin = tuple(o + f * s for o, f, s in zip(grid.origin, first, grid.spacing, strict=True))
    return Grid(tuple(p.stop - p.start for p in part)[::-1], grid.spacing, origin)


def _legs(fat: float) -> list[Shape]:
    """What the plan lacks below: buttocks, and the legs from mid-thigh to the feet."""
    leg = [(88, 0, -60), (86, 14, -265), (84, 32, -400), (80, 44, -690)]
    foot = [(80, 46, -722), (88, -40, -728), (96, -110, -742)]
    shapes = []
    for organ, extra in (("fat", fat * 0.5), ("muscle", 0)):
        for side in (-1, 1):
            shapes += tube(organ, mirror(leg, side), np.array([68, 52, 50, 30]) + extra, ["air", "fat"])
            shapes += tube(organ, mirror(foot, side), np.array([30, 30, 22]) + extra * 0.2, ["air", "fat"])
            size = np.array((62, 52, 52)) + extra
            shapes.append(ellipsoid(organ, (54 * side, 40, 150), size, within=["air", "fat"]))
        shapes.append(ellipsoid(organ, (0, -4, 132), np.array((80, 56, 30)) + extra, within=["air", "fat"]))
    for side in (-1, 1):
        shapes += tube("femora", mirror([(98, 0, -60), (88, 14, -230), (86, 14, -268)], side), [13, 15, 30])
        shapes += tube("femora", mirror([(86, 12, -292), (82, 14, -330), (80, 36, -700)], side), [28, 15, 11])
        shapes += tube("femora", mirror([(108, 30, -300), (102, 48, -700)], side), 6)
        shapes += tube("femora", mirror([(80, 52, -722), (86, -40, -722), (96, -105, -742)], side), [18, 13, 9])
    return shapes


def _put_organs(organs: np.ndarray, real: np.ndarray) -> None:
    """Paint the real organs over the plan, of whose own lungs and glands nothing stays."""
    code = np.arange(256, dtype=np.uint8)
    for organ, instead in REPLACED.items():
        code[LABEL[organ]] = LABEL[instead]
    airways = (organs == LABEL["trachea"]) & (real == LUNG)
    names = np.array([0, *(LABEL[ORGAN_OF[label]] for label in range(1, 11))], np.uint8)
    np.copyto(organs, np.where((real > 0) & ~airways, names[real], code[organs]))


def _put_skull(organs: np.ndarray, real: np.ndarray, grid: Grid, fat: float) -> None:
    """A vault of the skull around the brain, and the scalp around it."""
    box = ndimage.find_objects(real, 10)[BRAIN - 1]
    if box is None:
        return
    step = np.array(grid.spacing[::-1])
    margin = np.ceil(22 / step).astype(int)
    box = tuple(slice(max(s.start - m, 0), s.stop + m) for s, m in zip(box, margin, strict=True))
    distance = ndimage.distance_transform_edt(real[box] != BRAIN, step)
    view = organs[box]
    view[(distance < 10.5 + 0.1 * fat) & (view == LABEL["air"])] = LABEL["fat"]
    view[(distance > 0) & (distance < 7) & (view != LABEL["spinal cord"])] = LABEL["skull"]
    view[(distance > 0) & (distance < 1.2)] = LABEL["spinal cord"]  # the fluid around the brain looks like the cord


def _put_inner_parts(
    organs: np.ndarray, real: np.ndarray, grid: Grid, shapes: list[Shape], rng: np.random.Generator
) -> None:
    """What the map does not tell apart: the heart's muscle, grey and white matter, the kidneys' pelves, gas, gall."""
    boxes = dict(enumerate(ndimage.find_objects(real, 10), 1))
    wall, gas = rng.uniform(0.62, 0.72), rng.uniform(0, 0.4)
    if box := boxes[HEART]:
        _paint_within(organs, real, box, HEART, PLAN_HEART, _left_ventricle(wall))
    if box := boxes[LUNG]:
        lung = organs[box] == LABEL["lung"]
        bare = [np.abs(SmoothField(rng, 18).on(_cut(grid, box))) < 0.06 for _ in range(2)]
        organs[box][lung & bare[0] & bare[1]] = LABEL["mediastinum"]  # vessels: two surfaces meet in threads
    if box := boxes[LIVER]:
        gallbladder = [shape for shape in shapes if shape.organ == "gallbladder"]
        _paint_within(organs, real, box, 0, plan_box(shapes, "liver"), gallbladder)
    if box := boxes[STOMACH]:
        inside = real[box] == STOMACH
        rows = np.cumsum(inside.sum((0, 2))) / inside.sum()
        gassy = inside & (rows < gas)[None, :, None]  # gas collects in front
        organs[box][gassy] = LABEL["bowel gas"]
    if box := boxes[BRAIN]:
        _put_white_matter(organs[box], real[box] == BRAIN, _cut(grid, box), rng)
    if box := boxes[KIDNEYS]:
        parts, _ = ndimage.label(real[box] == KIDNEYS)
        middle = (box[2].start + box[2].stop) / 2
        for kidney in ndimage.find_objects(parts):
            place = tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(box, kidney, strict=True))
            side = 1 if (place[2].start + place[2].stop) / 2 > middle else -1
            plan = [s for s in shapes if (s.low + s.high)[0] * side > 0]
            pelvis = [s for s in plan if s.organ == "renal pelvis"]
            _paint_within(organs, real, place, 0, plan_box(plan, "kidneys"), pelvis)


def _paint_within(
    organs: np.ndarray, real: np.ndarray, box: tuple[slice, ...], label: int, plan: tuple[np.ndarray, np.ndarray],
    shapes: list[Shape],
) -> None:  # fmt: skip
    """Paint `shapes` with the box `plan` of the plan laid on `box`; only over the real organ `label` if not 0."""
    axes = []
    wide = tuple(slice(max(s.start - (s.stop - s.start) // 4, 0), s.stop + (s.stop - s.start) // 4) for s in box)
    view = organs[wide]
    for axis in range(3):
        low, high = plan[0][2 - axis], plan[1][2 - axis]
        position = (np.arange(view.shape[axis]) + wide[axis].start - box[axis].start + 0.5) / (
            box[axis].stop - box[axis].start)  # fmt: skip
        axes.append((low + position * (high - low)).astype(np.float32))
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    painted = view.copy()
    for shape in shapes:
        shape.paint(painted, x, y, z)
    where = (real[wide] == label) if label else np.ones(view.shape, bool)
    np.copyto(view, painted, where=where)


def _left_ventricle(wall: float) -> list[Shape]:
    """The muscle of the left ventricle around its cavity, open at the base, as in `anatomy`."""
    tilt, within = (-35, 25, 0), ["myocardium"]
    return [ellipsoid("myocardium", (46, -50, 560), (36, 35, 50), tilt, within=["blood"]),
            ellipsoid("blood", (42, -46, 564), np.array((36, 35, 48)) * wall, tilt, within=within),
            ellipsoid("blood", (30, -32, 574), (26, 26, 26), within=within)]  # fmt: skip


def _put_white_matter(view: np.ndarray, brain: np.ndarray, grid: Grid, rng: np.random.Generator) -> None:
    """White matter lies deep under the cortex, whose folds a smooth random field imitates; at the centre lie the
    basal ganglia."""
    depth = ndimage.distance_transform_edt(np.pad(brain, 1, mode="edge"), grid.spacing[::-1])[1:-1, 1:-1, 1:-1]
    folds = 6 * SmoothField(rng, 9).on(grid)
    white = brain & (depth + folds > 11)
    z, y, x = (index.mean() for index in np.nonzero(brain))
    k, j, i = np.ogrid[tuple(slice(0, n) for n in brain.shape)]
    dx, dy, dz = (np.abs((a - c) * s) for a, c, s in zip((i, j, k), (x, y, z), grid.spacing, strict=True))
    grey = ((dx - 16) / 12) ** 2 + (dy / 24) ** 2 + (dz / 14) ** 2 < 1
    view[white & ~grey] = LABEL["white matter"]


def _name_glands(organs: np.ndarray, real: np.ndarray, coordinates: list[np.ndarray]) -> None:
    """Which of the head's glands is which, after the height of its middle in the plan."""
    if (box := ndimage.find_objects(real, 10)[GLANDS - 1]) is None:
        return
    parts, count = ndimage.label(real[box] == GLANDS)
    for part in range(1, count + 1):
        inside = parts == part
        height = coordinates[2][box][inside].mean()
        name = "submandibular" if height < 825 else "parotid" if height < 882 else "lacrimal"
        organs[box][inside] = LABEL[f"{name} glands"]
