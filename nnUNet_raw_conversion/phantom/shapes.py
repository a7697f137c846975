"""Geometry in millimetres: the image grid, smooth random fields, and shapes that paint organ labels.

All points are in LPS coordinates (x to the left, y to posterior, z to superior); arrays are indexed (z, y, x).
Nothing here depends on the voxel size, so the same patient can be sampled on any grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import BSpline, PchipInterpolator
from scipy.spatial.transform import Rotation

from nnUNet_raw_conversion.phantom.organs import LABEL, labels_of

Point = Sequence[float]
Paint = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class Grid:
    """An image grid with identity direction: number of voxels, spacing (mm) and first voxel centre (mm), as x, y, z."""

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]

    @classmethod
    def covering(cls, low: Point, high: Point, spacing: Sequence[float]) -> Grid:
        """The grid whose first voxel begins at the corner `low` and which reaches at least to `high`."""
        size = tuple(int(np.ceil((b - a) / s)) for a, b, s in zip(low, high, spacing, strict=True))
        origin = tuple(float(a + s / 2) for a, s in zip(low, spacing, strict=True))
        return cls(size, tuple(float(s) for s in spacing), origin)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a numpy array on this grid, (z, y, x)."""
        return self.size[::-1]

    def axes(self) -> list[np.ndarray]:
        """Voxel centres in mm along z, y and x."""
        rows = zip(self.size, self.spacing, self.origin, strict=True)
        return [np.float32(o) + np.float32(s) * np.arange(n, dtype=np.float32) for n, s, o in rows][::-1]


class SmoothField:
    """A random field in space: a cubic B-spline whose control points lie on a lattice of `step` mm.

    Control points are standard normal, cut at `LIMIT`, which the field therefore never exceeds; its standard deviation
    is about 1/3. It repeats after the period of the lattice, which is larger than the field of view.
    """

    LIMIT = 2.0
    EXTENT = (1300.0, 500.0, 600.0)  # mm along z, y and x

    def __init__(self, rng: np.random.Generator, step: float) -> None:
        self.step = step
        count = [int(np.ceil(extent / step)) for extent in self.EXTENT]
        self.lattice = np.clip(rng.standard_normal(count, np.float32), -self.LIMIT, self.LIMIT)

    def _weights(self, axis: np.ndarray, count: int) -> np.ndarray:
        position = axis.astype(np.float64) / self.step
        offset = (position[:, None] - np.arange(count) + count / 2) % count - count / 2
        return BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)(np.clip(offset, -2, 2)).astype(np.float32)

    def on(self, grid: Grid) -> np.ndarray:
        """The field at the voxel centres of `grid`, float32 (z, y, x)."""
        wz, wy, wx = (self._weights(axis, n) for axis, n in zip(grid.axes(), self.lattice.shape, strict=True))
        planes = np.tensordot(wz, self.lattice, 1)
        return (wy @ planes) @ wx.T


@dataclass(frozen=True)
class Shape:
    """A region that paints labels: `paint(labels, x, y, z)` works on arrays of any shape; nothing lies outside the box
    from `low` to `high`. `organ` is what it paints; a trunk paints many and has none."""

    low: np.ndarray
    high: np.ndarray
    paint: Paint
    organ: str = ""


def _fill(organ: str, inside: Callable[..., np.ndarray], within: Sequence[str]) -> Paint:
    """Paint `organ` where `inside(x, y, z)`; only over the organs `within`, where any are named."""
    label, allowed = LABEL[organ], labels_of(*within) if within else None

    def paint(labels: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
        region = inside(x, y, z)
        labels[region if allowed is None else region & allowed[labels]] = label

    return paint


def ellipsoid(
    organ: str,
    centre: Point,
    semi: Point,
    tilt: Point = (0, 0, 0),
    within: Sequence[str] = (),
    below_y: float | None = None,
) -> Shape:
    """An ellipsoid with semi-axes `semi` (mm), turned by `tilt` (degrees about x, y, z).

    Where `below_y` is given only the part anterior of this plane is painted (gas over fluid in a supine patient).
    """
    centre, semi = np.asarray(centre, np.float32), np.asarray(semi, np.float32)
    turn = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix().astype(np.float32)
    half = np.sqrt(((turn * semi) ** 2).sum(1))

    def inside(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        dx, dy, dz = x - centre[0], y - centre[1], z - centre[2]
        radius = sum((u[0] * dx + u[1] * dy + u[2] * dz) ** 2 for u in (turn / semi).T)
        return radius < 1 if below_y is None else (radius < 1) & (y < below_y)

    return Shape(centre - half, centre + half, _fill(organ, inside, within), organ)


def tube(
    organ: str, points: Sequence[Point], radius: float | Sequence[float], within: Sequence[str] = ()
) -> list[Shape]:
    """A chain of cones with round ends through `points`; `radius` in mm, one for all or one a point."""
    points = np.asarray(points, np.float32)
    radii = np.broadcast_to(np.asarray(radius, np.float32), len(points))
    return [_cone(organ, points[i], points[i + 1], radii[i], radii[i + 1], within) for i in range(len(points) - 1)]


def mirror(points: Sequence[Point], side: int) -> list[Point]:
    """Points given for the left side of the body, on the left (side 1) or the right (side -1)."""
    return [(x * side, y, z) for x, y, z in points]


def _cone(organ: str, a: np.ndarray, b: np.ndarray, ra: float, rb: float, within: Sequence[str]) -> Shape:
    axis = b - a
    length2 = max(float(axis @ axis), 1e-6)

    def inside(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        dx, dy, dz = x - a[0], y - a[1], z - a[2]
        t = np.clip((dx * axis[0] + dy * axis[1] + dz * axis[2]) / np.float32(length2), 0, 1)
        distance2 = (dx - t * axis[0]) ** 2 + (dy - t * axis[1]) ** 2 + (dz - t * axis[2]) ** 2
        return distance2 < (ra + t * (rb - ra)) ** 2

    reach = max(ra, rb)
    return Shape(np.minimum(a, b) - reach, np.maximum(a, b) + reach, _fill(organ, inside, within), organ)


class Curve:
    """A smooth function of z through the given knots (monotone between them), tabulated in steps of 1 mm."""

    def __init__(self, knots: Sequence[float], values: Sequence[float]) -> None:
        self.first = int(knots[0])
        table = PchipInterpolator(knots, values)(np.arange(self.first, int(knots[-1]) + 1))
        self.table = table.astype(np.float32)

    def __call__(self, z: np.ndarray) -> np.ndarray:
        return self.table.take((z - self.first).astype(np.int32), mode="clip")


class Profile:
    """A trunk: at every z an oval (superellipse of exponent 2.5), given by rows (z, half width, half depth, y)."""

    def __init__(self, rows: Sequence[tuple[float, float, float, float]]) -> None:
        knots, *columns = zip(*rows, strict=True)
        self.half_width, self.half_depth, self.y = (Curve(knots, column) for column in columns)
        self.low, self.high = knots[0], knots[-1]

    def radius(self, angle: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Distance in mm from the axis to the surface in the direction `angle` (0 to the left, pi/2 to the back)."""
        u, v = np.abs(np.cos(angle)) / self.half_width(z), np.abs(np.sin(angle)) / self.half_depth(z)
        return (u**2.5 + v**2.5) ** -0.4

    def depth(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """How far a point lies below the surface, in mm along the ray from the axis; negative outside."""
        dy = y - self.y(z)
        u, v = (x / self.half_width(z)) ** 2, (dy / self.half_depth(z)) ** 2
        r = (u * np.sqrt(np.sqrt(u)) + v * np.sqrt(np.sqrt(v)) + np.float32(1e-6)) ** np.float32(0.4)
        depth = np.sqrt(x * x + dy * dy + 1) * (1 / r - 1)
        return np.where((z > self.low) & (z < self.high), depth, np.float32(-1e3))
