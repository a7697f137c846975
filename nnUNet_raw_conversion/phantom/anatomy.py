"""The anatomy of one patient, built of shapes.

The plan is that of a standard man of 176 cm who lies supine, in mm: x = 0 the midline (left positive), y = 0 the middle
of the trunk (posterior positive), z = 0 mid-thigh and z = 990 the top of the head. Positions and sizes follow the real
organ maps of autoPET III. A patient is this plan with every organ moved, resized and tilted a little, the frame
scaled and the whole space bent by a smooth random displacement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnUNet_raw_conversion.phantom.organs import LABEL
from nnUNet_raw_conversion.phantom.shapes import (
    Curve,
    Grid,
    Point,
    Profile,
    Shape,
    SmoothField,
    ellipsoid,
    mirror,
    tube,
)
from nnUNet_raw_conversion.phantom.skeleton import head, skeleton

TRUNK = Profile([  # z, half width, half depth, y of the surface of the muscles, thighs excluded
    (130, 145, 78, 8), (200, 158, 98, 8), (280, 150, 97, 6), (350, 138, 96, 2), (420, 139, 99, 0), (500, 147, 107, 0),
    (580, 153, 112, 2), (650, 152, 108, 7), (700, 156, 98, 12), (735, 154, 82, 14), (758, 105, 63, 12),
    (780, 62, 56, 8), (850, 57, 58, 0), (880, 50, 50, 0),
])  # fmt: skip
CAVITY = Profile([  # the inside of the chest wall, the abdominal wall and the pelvis
    (160, 45, 40, 5), (200, 78, 60, 5), (260, 104, 75, -4), (330, 118, 79, -13), (420, 125, 85, -9), (500, 134, 95, -3),
    (560, 137, 99, 0), (620, 129, 96, 4), (680, 106, 81, 9), (720, 76, 61, 15), (745, 42, 36, 17), (756, 4, 4, 17),
])  # fmt: skip
FAT_SHARE = Curve((0, 150, 280, 400, 550, 700, 770, 1000), (1.0, 1.2, 1.2, 1.0, 0.7, 0.5, 0.3, 0.25))
ABDOMEN = ("visceral fat",)
CHEST = ("lung", "mediastinum")
BEND = 12.0  # mm, times a SmoothField: organs are displaced by 4 mm (standard deviation), 24 at most


@dataclass(frozen=True)
class Patient:
    """What is known of a patient: sex "M" or "F", age in years, height in cm, fat under the skin in mm, arms."""

    sex: str
    age: int
    height: float
    fat: float
    arms_up: bool


def draw_patient(rng: np.random.Generator, sex: str, age: int) -> Patient:
    """A patient of this sex and age: women are smaller and carry more fat under the skin."""
    height = rng.normal(177 if sex == "M" else 165, 6.5)
    fat = 6 + rng.gamma(3.0, 3.2 if sex == "M" else 4.4)
    return Patient(sex, age, float(np.clip(height, 155, 195)), float(np.clip(fat, 7, 38)), bool(rng.random() < 0.75))


class Anatomy:
    """The shapes of one patient and the way from a point of the scanner to a point of the plan."""

    def __init__(self, shapes: list[Shape], patient: Patient, rng: np.random.Generator) -> None:
        stature = patient.height / 176
        girth = stature**0.6 * (1 + 0.004 * (patient.fat - 16))
        self.shapes = shapes
        self.scale = np.float32([girth, girth * (1 + 0.002 * (patient.fat - 16)), stature])
        self.shift = np.float32([rng.normal(0, 4), -22 + rng.normal(0, 4), 0])
        self.bend = [SmoothField(rng, 110) for _ in range(3)]

    def grid(self, spacing: tuple[float, float, float]) -> Grid:
        """The field of view at `spacing` (x, y, z in mm): 500 x 400 mm, from mid-thigh to above the head."""
        return Grid.covering((-250, -200, 0), (250, 200, 1005 * float(self.scale[2])), spacing)

    def plan_coordinates(self, grid: Grid) -> list[np.ndarray]:
        """For every voxel of `grid` its place in the plan: x, y and z in mm, float32 arrays (z, y, x)."""
        z, y, x = np.meshgrid(*grid.axes(), indexing="ij", sparse=True)
        rows = zip((x, y, z), self.shift, self.scale, self.bend, strict=True)
        return [(axis - shift) / scale + np.float32(BEND) * field.on(grid) for axis, shift, scale, field in rows]

    def organs(self, grid: Grid, coordinates: list[np.ndarray]) -> np.ndarray:
        """The organ label of every voxel, uint8 (z, y, x), given `plan_coordinates(grid)`."""
        labels = np.zeros(grid.shape, np.uint8)
        for shape in self.shapes:
            box = self.box(shape.low, shape.high, grid)
            if labels[box].size:
                shape.paint(labels[box], *(axis[box] for axis in coordinates))
        return labels

    def box(self, low: np.ndarray, high: np.ndarray, grid: Grid) -> tuple[slice, slice, slice]:
        """The part (z, y, x) of `grid` that can hold points of the plan between `low` and `high`."""
        reach = np.float32(BEND * SmoothField.LIMIT)
        first, last = ((edge * self.scale + self.shift - grid.origin) / grid.spacing
                       for edge in (low - reach, high + reach))  # fmt: skip
        bounds = zip(np.floor(first).astype(int), np.ceil(last).astype(int), grid.size, strict=True)
        return tuple(slice(max(a, 0), max(min(b + 1, n), 0)) for a, b, n in bounds)[::-1]

    def organ_at(self, points: np.ndarray) -> np.ndarray:
        """The organ labels at `points` of the plan, shape (n, 3) as x, y, z."""
        labels = np.zeros(len(points), np.uint8)
        for shape in self.shapes:
            shape.paint(labels, *points.astype(np.float32).T)
        return labels

    def points_in(self, rng: np.random.Generator, organs: Sequence[str], low: Point, high: Point) -> np.ndarray:
        """Points of the plan (n, 3) between `low` and `high`, of which some lie in `organs`: see `organ_at`."""
        return rng.uniform(low, high, (1500, 3))


def build_anatomy(rng: np.random.Generator, patient: Patient) -> Anatomy:
    """Draw the anatomy of `patient`. Later shapes paint over earlier ones: body, cavities, organs, vessels, bones."""
    dome = rng.normal(0, 6)
    shapes = [_trunk(patient.fat, dome), *_limbs(patient), *skeleton(rng), *_chest(rng), *_abdomen(rng)]
    shapes += [*_urinary_tract(rng, patient), *_vessels(rng), *head(rng, patient.fat)]
    if patient.sex == "F":
        size = rng.uniform(0.75, 1.25) * (0.8 + patient.fat / 80)
        for side in (-1, 1):
            shapes.insert(0, ellipsoid("fat", (80 * side, -112, 590), np.array((62, 44, 66)) * size, (0, 0, 12 * side)))
            shapes.append(ellipsoid("breast", (82 * side, -125 - 14 * size, 585),
                                    (32 * size, 17 * size, 36 * size), within=["fat"]))  # fmt: skip
    return Anatomy(shapes, patient, rng)


def _trunk(fat: float, dome: float) -> Shape:
    """The trunk with its fat, muscles and ribs, the lungs above the diaphragm and a belly full of fat below it."""
    code = LABEL

    def paint(labels: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
        wall = TRUNK.depth(x, y, z)
        belly = 1 - 0.25 * y / 110  # the back has less fat
        labels[wall > -fat * FAT_SHARE(z) * belly] = code["fat"]
        labels[wall > 0] = code["muscle"]
        depth = CAVITY.depth(x, y, z)
        slope = z - 0.45 * y  # ribs fall from the spine to the front
        costal_arch = 425 + np.maximum(-y, 0) * (1.1 - np.minimum(np.abs(x), 110) * 0.006)
        ribs = (depth > -9) & (depth < -1) & (np.mod(slope, 27) < 11) & (z > costal_arch) & (z < 745) & (wall > 2)
        labels[ribs & ((np.abs(x) > 28) | (y > 0))] = code["ribs"]
        labels[(depth > 0) & (wall > 4)] = code["visceral fat"]
        top = [565 + dome - 70 * (((x + 66) / 80) ** 2 + ((y + 8) / 95) ** 2),
               550 + dome - 70 * (((x - 72) / 80) ** 2 + ((y + 8) / 95) ** 2)]  # fmt: skip
        above = (depth > 0) & (z > np.maximum(*top)) & (z > 415) & (wall > 4)
        labels[above] = code["mediastinum"]
        half = 20 + np.maximum(z - 690, 0) * 0.25 + np.maximum(-y - 30, 0) * -0.15
        labels[above & (depth > 2) & (np.abs(x - 4) > half)] = code["lung"]

    return Shape(np.float32([-230, -170, 125]), np.float32([230, 170, 885]), paint)


def _limbs(patient: Patient) -> list[Shape]:
    fat = patient.fat
    if patient.arms_up:
        arm = [(140, 12, 715), (172, 8, 770), (190, -15, 950), (186, -25, 1080)]
    else:
        arm = [(142, 12, 720), (180, 16, 690), (205, 14, 440), (200, -10, 200)]
    thigh = [(84, 4, 190), (92, 0, 100), (88, 0, -60)]
    shapes = []
    for organ, extra, within in (("fat", fat, ["air"]), ("muscle", 0, ["air", "fat"])):
        for side in (-1, 1):
            shapes += tube(organ, mirror(thigh, side), np.array([82, 76, 68]) + extra * 0.8, within)
            shapes += tube(organ, mirror(arm, side), np.array([40, 42, 36, 30]) + extra * 0.4, within)
    for side in (-1, 1):
        head_of_humerus = (148, 12, 722) if not patient.arms_up else (150, 12, 735)
        shapes.append(ellipsoid("humeri", mirror([head_of_humerus], side)[0], (23, 22, 22)))
        shapes += tube("humeri", mirror([head_of_humerus, *arm[1:]], side), [15, 11, 11, 11])
    return shapes


class _Jitter:
    """Ellipsoids that are moved (3 mm), resized (6 %) and tilted (5 degrees) at random, each as a whole."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def __call__(self, organ: str, centre: Point, semi: Point, tilt: Point = (0, 0, 0), **options) -> Shape:
        move, size, turn = self.rng.normal(0, 3, 3), np.exp(self.rng.normal(0, 0.06)), self.rng.normal(0, 5, 3)
        return ellipsoid(organ, np.add(centre, move), np.multiply(semi, size), np.add(tilt, turn), **options)


def _chest(rng: np.random.Generator) -> list[Shape]:
    jitter = _Jitter(rng)
    size, move = np.exp(rng.normal(0, 0.06)), rng.normal(0, 3, 3)
    wall = rng.uniform(0.62, 0.72)  # the cavity's share of the left ventricle
    ventricle, tilt = np.array((46, -50, 560)) + move, (-35, 25, 0)
    base = ventricle + (-16, 18, 14)
    shapes = [
        ellipsoid("blood", np.array((20, -42, 575)) + move, np.array((58, 46, 54)) * size, (0, 30, 0), within=CHEST),
        ellipsoid("myocardium", ventricle, np.array((34, 33, 48)) * size, tilt, within=[*CHEST, *ABDOMEN, "blood"]),
        ellipsoid("blood", ventricle + (-4, 4, 4), np.array((34, 33, 46)) * size * wall, tilt, within=["myocardium"]),
        ellipsoid("blood", base, np.array((26, 26, 26)) * size, within=["myocardium"]),
    ]
    shapes += tube("trachea", [(0, -2, 835), (0, 8, 760), (2, 20, 668)], 9)
    for side in (-1, 1):
        shapes += tube("trachea", [(2, 20, 668), (32 * side, 26, 640)], [8, 6])
        shapes += tube("blood", [(10 * side, 5, 640), (38 * side, 14, 628), (62 * side, 18, 600)], [11, 10, 6], CHEST)
        shapes.append(jitter("thyroid", (19 * side, -6, 775), (9, 9, 22), within=["muscle", "fat"]))
    return shapes


def _abdomen(rng: np.random.Generator) -> list[Shape]:
    jitter = _Jitter(rng)
    shapes = [
        jitter("liver", (-72, -4, 500), (79, 86, 80), (0, 18, 0), within=ABDOMEN),
        jitter("liver", (-5, -42, 505), (68, 38, 42), (0, -12, 0), within=ABDOMEN),
        jitter("gallbladder", (-58, -48, 432), (14, 18, 26), (-20, 15, 0), within=["liver", *ABDOMEN]),
        jitter("spleen", (103, 42, 495), (32, 46, 58), (15, -15, -15), within=ABDOMEN),
    ]
    fill = rng.uniform(0.75, 1.15)
    stomach = np.array([(70, 12, 530), (82, -20, 490), (72, -42, 450), (25, -55, 425), (-15, -40, 432)])
    shapes += tube("stomach", stomach + rng.normal(0, 4, 3), np.array([35, 34, 30, 21, 13]) * fill, ABDOMEN)
    shapes.append(ellipsoid("bowel gas", (72, -35, 500), (26, 30, 40), within=["stomach"], below_y=-24))
    pancreas = np.array([(-32, -12, 405), (0, -22, 425), (40, -2, 440), (82, 25, 468)])
    shapes += tube("pancreas", pancreas + rng.normal(0, 3, 3), [13, 10, 10, 9], ABDOMEN)
    duodenum = np.array([(-18, -38, 432), (-48, -20, 425), (-52, -2, 380), (-35, 0, 355), (15, -18, 358),
                         (35, -25, 395)])  # fmt: skip
    shapes += tube("duodenum", duodenum + rng.normal(0, 3, 3), 12, ABDOMEN)
    return shapes + _colon(rng) + _small_intestine(rng)


def _colon(rng: np.random.Generator) -> list[Shape]:
    sag = rng.uniform(-35, 10)  # the transverse colon hangs
    points = np.array([
        (-95, -12, 262), (-105, -8, 310), (-108, -2, 360), (-100, -20, 405), (-60, -68, 385 + sag),
        (-10, -80, 370 + sag), (45, -76, 385 + sag), (88, -40, 430), (112, 0, 462), (113, 20, 410),
        (110, 18, 350), (100, 8, 290), (72, 0, 250), (35, -10, 262), (10, 25, 250), (8, 55, 225), (0, 52, 190),
        (0, 45, 162),
    ], float)  # fmt: skip
    points[:-2] += rng.normal(0, 5, (len(points) - 2, 3))
    calibre = np.concatenate([rng.uniform(22, 28, 4), rng.uniform(15, 23, 5), rng.uniform(10, 17, 9)])
    within = (*ABDOMEN, "muscle", "fat")
    shapes = tube("colon", points, calibre, within)
    for i in np.flatnonzero(rng.random(len(points) - 2) < 0.4):  # gas collects in front
        middle, half = points[i : i + 2].mean(0), np.abs(np.diff(points[i : i + 2], axis=0)[0]) / 2 + calibre[i] * 0.5
        shapes.append(ellipsoid("bowel gas", middle - (0, 3, 0), half, within=["colon"], below_y=middle[1]))
    return shapes


def _small_intestine(rng: np.random.Generator) -> list[Shape]:
    """A tube that winds to and fro in rows between the colon's limbs, from the left upper to the right lower side."""
    points, rows = [], 7
    for row in range(rows):
        z, wide = 378 - 22 * row, 62 + 10 * np.sin(row * 1.3)
        for column in np.linspace(1, -1, 5)[:: 1 if row % 2 == 0 else -1]:
            points.append((wide * column, -40 + rng.uniform(-26, 22), z))
    points = np.array(points) + rng.normal(0, 8, (len(points), 3))
    return tube("small intestine", points, rng.uniform(10, 15, len(points)), ABDOMEN)


def _urinary_tract(rng: np.random.Generator, patient: Patient) -> list[Shape]:
    jitter, shapes = _Jitter(rng), []
    for side, lift in ((-1, -6), (1, 8)):
        centre = np.array((64 * side, 36, 425 + lift)) + rng.normal(0, 3, 3)
        shapes.append(jitter("kidneys", centre, (27, 28, 54), (12, 12 * side, 20 * side),
                             within=(*ABDOMEN, "muscle", "liver")))  # fmt: skip
        shapes.append(ellipsoid("renal pelvis", centre + (-13 * side, -4, -2), (11, 9, 20), (0, 12 * side, 0),
                                within=("kidneys", *ABDOMEN)))  # fmt: skip
        course = np.array([(46, 28, 412), (36, 10, 360), (34, 6, 310), (50, 22, 255), (22, 22, 205)]) * (side, 1, 1)
        full = int(rng.integers(0, len(course) - 1))  # urine stands in one part of the ureter
        shapes += tube("ureters", course[full : full + 2] + rng.normal(0, 2, 3), 4, (*ABDOMEN, "muscle"))
    size = rng.uniform(0.75, 1.25)
    shapes.append(ellipsoid("bladder", (rng.normal(0, 3), -12, 192 + 14 * size), np.array((38, 34, 28)) * size,
                            within=(*ABDOMEN, "muscle", "small intestine", "colon")))  # fmt: skip
    if patient.sex == "M":
        growth = np.exp(rng.normal(0, 0.1)) * (0.85 + 0.005 * patient.age)  # it grows with age
        shapes.append(ellipsoid("prostate", (0, 8, 172), np.array((22, 17, 18)) * growth))
    return shapes


def _vessels(rng: np.random.Generator) -> list[Shape]:
    within = (*ABDOMEN, *CHEST, "muscle", "fat", "liver")
    aorta = np.array([(6, -24, 600), (-10, -28, 645), (-4, -18, 672), (14, 4, 682), (24, 24, 665), (23, 30, 620),
                      (20, 24, 560), (13, 8, 490), (9, -8, 430), (4, -10, 352)])  # fmt: skip
    width = np.array([15, 15, 14, 13, 13, 12, 12, 11, 10, 9]) * rng.uniform(0.9, 1.15)
    shapes = tube("blood", aorta + rng.normal(0, 2, 3), width, within)
    shapes += tube("blood", [(-22, -14, 735), (-24, -14, 670), (-22, -22, 610)], [8, 10, 11], within)
    shapes += tube("blood", [(-18, -6, 352), (-20, -6, 450), (-22, 0, 545)], [9, 10, 12], within)
    for side in (-1, 1):
        course = [(2, -10, 352), (28, 5, 300), (52, 10, 255), (74, -45, 195), (82, -45, 90)]
        shapes += tube("blood", mirror(course, side), [8, 7, 6.5, 6, 6], within)
        shapes += tube("blood", [(10 * side, 0, 690), (26 * side, 2, 770), (30 * side, 0, 840)], [6, 5, 5], within)
    return shapes
