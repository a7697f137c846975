"""Where disease sits, what it looks like, and the Ann Arbor stage that follows from it (axes and plan of `anatomy`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nnUNet_raw_conversion.phantom.anatomy import Anatomy
from nnUNet_raw_conversion.phantom.organs import BONES, LABEL, TRACERS, labels_of
from nnUNet_raw_conversion.phantom.shapes import Grid, Point

if TYPE_CHECKING:
    from nnUNet_raw_conversion.phantom.fit import FittedAnatomy

    Body = Anatomy | FittedAnatomy

SOFT = ("fat", "visceral fat", "mediastinum", "muscle", "lung", "small intestine", "pancreas", "thyroid")


class Nodes(NamedTuple):
    """A chain of lymph nodes from `start` to `end`, scattered by `spread` (mm), its Ann Arbor region and its side of
    the diaphragm. Cervical and supraclavicular nodes of one side are one region of Ann Arbor."""

    region: str
    side: str
    start: Point
    end: Point
    spread: float


class Organs(NamedTuple):
    """Extranodal disease: the organs it sits in, the part of the plan to search them, the organs it may replace, CT."""

    organs: tuple[str, ...]
    low: Point
    high: Point
    replaces: tuple[str, ...]
    hu: float


def _paired(name: str, region: str, side: str, start: Point, end: Point, spread: float) -> dict[str, Nodes]:
    flip = {"left": 1, "right": -1}
    return {
        f"{name} {hand}": Nodes(f"{region} {hand}", side, (s * start[0], *start[1:]), (s * end[0], *end[1:]), spread)
        for hand, s in flip.items()
    }


NODAL = {
    **_paired("cervical", "cervical", "above", (40, 4, 838), (43, 2, 785), 6),
    **_paired("supraclavicular", "cervical", "above", (46, -12, 768), (74, -6, 757), 6),
    **_paired("axillary", "axillary", "above", (124, -4, 710), (140, 4, 662), 7),
    "mediastinal": Nodes("mediastinal", "above", (-10, -38, 695), (6, -22, 630), 13),
    **_paired("hilar", "hilar", "above", (40, 14, 645), (48, 14, 608), 6),
    "para-aortic": Nodes("para-aortic", "below", (20, -8, 445), (12, -14, 345), 9),
    "mesenteric": Nodes("mesenteric", "below", (-18, -42, 385), (28, -46, 325), 14),
    **_paired("iliac", "iliac", "below", (32, -2, 318), (64, -6, 232), 6),
    **_paired("inguinal", "inguinal", "below", (74, -66, 178), (80, -68, 132), 6),
}
EXTRANODAL = {
    "liver": Organs(("liver",), (-140, -80, 440), (30, 70, 560), ("liver",), 38),
    "lung": Organs(("lung",), (-125, -80, 480), (125, 85, 735), ("lung", "mediastinum", "visceral fat", "ribs"), 30),
    "bone": Organs(("spine", "pelvis", "femora", "ribs"), (-130, -60, 130), (130, 90, 760), BONES, 70),
    "skin": Organs(("fat",), (-170, -130, 60), (170, 130, 760), ("fat", "muscle"), 35),
    "prostate": Organs(("prostate",), (-18, -8, 156), (18, 24, 188), ("prostate",), 48),
}


class Lesion(NamedTuple):
    """One lesion: balls that melt into one another, rows (x, y, z, radius) in mm of the plan; SUV and CT value."""

    site: str
    balls: np.ndarray
    suv: float
    hu: float
    cold_centre: bool


class LesionMaps(NamedTuple):
    """The lesions on the grid: their true extent, and the activity (SUVbw) and CT value (HU) they bring."""

    mask: np.ndarray
    suv: np.ndarray
    hu: np.ndarray


def ann_arbor(sites: Iterable[str]) -> str:
    """The Ann Arbor stage of disease at `sites` (keys of `NODAL` and `EXTRANODAL`), after Cheson et al. 2014.

    I: one nodal region; II: several on one side of the diaphragm; III: both sides; IV: extranodal. Simplified: a single
    extranodal site (IE) counts as IV. No sites give "".
    """
    sites = set(sites)
    if sites & EXTRANODAL.keys():
        return "IV"
    if {NODAL[site].side for site in sites} == {"above", "below"}:
        return "III"
    regions = {NODAL[site].region for site in sites}
    return "II" if len(regions) > 1 else "I" if regions else ""


def draw_sites(rng: np.random.Generator, diagnosis: str) -> list[str]:
    """The sites of disease in one patient; for lymphoma all four stages come equally often."""
    chance = rng.random
    if diagnosis == "Hodgkin lymphoma":
        return _lymphoma_sites(rng)
    if diagnosis == "melanoma":
        nodes = [str(rng.choice([s for s in NODAL if s.split()[0] in ("cervical", "axillary", "inguinal")]))]
        organs = [site for site in ("skin", "lung", "liver", "bone") if chance() < 0.5]
        return nodes + organs if chance() < 0.7 else organs or nodes
    if diagnosis == "lung cancer":
        spread = {"mediastinal": 0.6, str(rng.choice(["hilar left", "hilar right"])): 0.6, "bone": 0.35, "liver": 0.3}
        return ["lung"] + [site for site, share in spread.items() if chance() < share]
    if diagnosis == "prostate cancer":
        below = ["iliac left", "iliac right", "para-aortic", "bone", "bone", "prostate", "prostate"]
        return list(dict.fromkeys(rng.choice(below, rng.integers(1, 5)).tolist()))
    return []


def _lymphoma_sites(rng: np.random.Generator) -> list[str]:
    stage = rng.integers(1, 5)
    above = [site for site, nodes in NODAL.items() if nodes.side == "above"]
    below = [site for site, nodes in NODAL.items() if nodes.side == "below"]
    first, second = (above, below) if rng.random() < 0.85 else (below, above)
    if stage == 1:
        return [str(rng.choice(first))]
    if stage == 2:
        while True:  # two sites can belong to one region
            sites = rng.choice(first, rng.integers(2, 6), replace=False).tolist()
            if ann_arbor(sites) == "II":
                return sites
    count = (rng.integers(1, 5), rng.integers(1 if stage == 3 else 0, 4))
    sites = [*rng.choice(first, count[0], replace=False), *rng.choice(second, count[1], replace=False)]
    if stage == 4:
        sites += [*rng.choice(["liver", "lung", "bone"], rng.integers(1, 3), replace=False)]
    return [str(site) for site in sites]


def draw_lesions(
    rng: np.random.Generator, diagnosis: str, sites: list[str], anatomy: Body, tracer: str, uptake: np.ndarray
) -> list[Lesion]:
    """Draw several lesions a site, from fainter than the liver to very hot, but much alike in one patient."""
    size = np.exp(rng.normal(0.1, 0.3))
    typical, faint, hottest = (5.5, (2.2, 3.2), 20) if tracer == TRACERS[0] else (12, (3.5, 5.5), 40)
    avidity = rng.lognormal(np.log(typical), 0.55) if rng.random() < 0.8 else rng.uniform(*faint)
    sclerotic = 450 if diagnosis == "prostate cancer" else 0
    lesions = []
    for site in sites:
        primary = diagnosis == "lung cancer" and site == "lung"
        for _ in range(1 if primary or site == "prostate" else 1 + rng.poisson(3)):
            bulk = size * (1.4 if site == "mediastinal" else 1)
            radius = rng.uniform(12, 20) if primary else np.clip(bulk * rng.lognormal(np.log(9), 0.35), 4, 21)
            centre = _draw_centre(rng, site, anatomy)
            suv = np.clip(avidity * rng.lognormal(0, 0.3), 0.9 * faint[0], hottest)
            hu = rng.normal(42, 5)
            if site in EXTRANODAL:  # where the organ itself takes up tracer, a lesion takes up more
                suv = max(suv, 1.7 * float(uptake[LABEL[EXTRANODAL[site].organs[0]]]))
                hu = EXTRANODAL[site].hu + rng.normal(0, 4) + sclerotic * (site == "bone")
            cold = bool(radius > 11 and rng.random() < 0.4)
            lesions.append(Lesion(site, _draw_balls(rng, centre, radius), float(suv), float(hu), cold))
    return lesions


def _draw_centre(rng: np.random.Generator, site: str, anatomy: Body) -> np.ndarray:
    """A point of the plan along the chain of nodes, beside the vessels, or within the organs of `site`."""
    if site in NODAL:
        nodes = NODAL[site]
        start, end = np.asarray(nodes.start), np.asarray(nodes.end)
        scatter = np.clip(rng.normal(0, nodes.spread, (50, 3)), -1.5 * nodes.spread, 1.5 * nodes.spread)
        points, wanted = start + rng.random((50, 1)) * (end - start) + scatter, SOFT
    else:
        target = EXTRANODAL[site]
        points, wanted = anatomy.points_in(rng, target.organs, target.low, target.high), target.organs
    return points[labels_of(*wanted)[anatomy.organ_at(points)].argmax()]


def _draw_balls(rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    """One large ball and a few lesser ones on its surface: a lobulated lesion of about this radius."""
    n = int(rng.integers(2, 6))
    direction = rng.normal(size=(n, 3)) * (1, 1, 1.4)  # nodes are longer along the body
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    places = centre + direction * radius * rng.uniform(0.5, 0.9, (n, 1))
    satellites = np.column_stack([places, radius * rng.uniform(0.35, 0.65, n)])
    return np.vstack([[*centre, 0.8 * radius], satellites]).astype(np.float32)


def paint_lesions(
    lesions: list[Lesion], anatomy: Body, grid: Grid, coordinates: list[np.ndarray], organs: np.ndarray
) -> LesionMaps:
    """Sample the lesions on the grid; each has at least one voxel, however coarse the grid is."""
    maps = LesionMaps(*(np.zeros(grid.shape, dtype) for dtype in (np.uint8, np.float32, np.float32)))
    for lesion in lesions:
        reach = 1.4 * lesion.balls[:, 3:].max() + max(grid.spacing)
        box = anatomy.box((lesion.balls[:, :3] - reach).min(0), (lesion.balls[:, :3] + reach).max(0), grid)
        melt = np.zeros(organs[box].shape, np.float32)
        for *centre, radius in lesion.balls:
            distance2 = sum((axis[box] - c) ** 2 for axis, c in zip(coordinates, centre, strict=True))
            melt += np.exp(2 * (1 - distance2 / radius**2))
        replaces = EXTRANODAL[lesion.site].replaces if lesion.site in EXTRANODAL else SOFT
        extent = (melt > 1) & labels_of(*replaces)[organs[box]]
        if not extent.any():
            extent.flat[melt.argmax()] = True
        maps.mask[box][extent] = 1
        maps.suv[box][extent] = lesion.suv
        maps.hu[box][extent] = lesion.hu
        if lesion.cold_centre:  # necrosis
            core = extent & (melt > 4.2)
            maps.suv[box][core] = 0.25 * lesion.suv
            maps.hu[box][core] = 18
    return maps
