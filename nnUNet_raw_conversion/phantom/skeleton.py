"""The bones and the head of the standard patient (axes of `anatomy`; the ribs belong to the trunk)."""

from __future__ import annotations

import numpy as np

from nnUNet_raw_conversion.phantom.organs import LABEL
from nnUNet_raw_conversion.phantom.shapes import Curve, Point, Shape, ellipsoid, mirror, tube

_SPINE_Y = Curve((200, 260, 300, 335, 380, 430, 500, 580, 650, 720, 770, 830, 890),
                 (66, 64, 52, 32, 25, 29, 42, 56, 60, 48, 30, 18, 12))  # fmt: skip
_BODY_RADIUS = Curve((200, 300, 340, 500, 700, 780, 890), (13, 24, 23, 18, 15, 10, 9))


def skeleton(rng: np.random.Generator) -> list[Shape]:
    """Spine, pelvis, femora, shoulder girdle and sternum."""
    scoliosis = rng.normal(0, 4)
    return [_spine(scoliosis), _iliac_bones(), *_pelvic_ring(), *_shoulder_girdle()]


def _spine(scoliosis: float) -> Shape:
    """Vertebral bodies with discs between them, the cord behind them, laminae and spinous processes, the sacrum."""

    def paint(labels: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
        x = x - scoliosis * np.sin((z - 200) / 110)
        radius, behind = _BODY_RADIUS(z), y - _SPINE_Y(z)
        height = np.where(z < 490, 34, np.where(z < 760, 24, 18))
        level = np.mod(z, height)
        vertebra = (level > 0.16 * height) | (z < 315)  # the sacrum has no discs
        body = (x / (1.15 * radius)) ** 2 + (behind / radius) ** 2 < 1
        arch = np.hypot(x, behind - radius - 7) < 14
        process = (np.abs(x) < 4) & (behind > radius + 8) & (behind < radius + 34) & (level > 0.4 * height)
        process |= (np.abs(behind - radius - 6) < 5) & (np.abs(x) < radius + 18) & (level > 0.55 * height)
        column = (z > 205) & (z < 890)
        labels[column & (arch | (process & (z > 300))) & vertebra] = LABEL["spine"]
        labels[column & body & vertebra] = LABEL["spine"]
        labels[column & body & ~vertebra] = LABEL["spinal cord"]  # discs look like the cord
        wings = ((x / (52 - (310 - z) * 0.35)) ** 2 + ((behind - 4) / 20) ** 2 < 1) & (z > 215) & (z < 312)
        labels[wings] = LABEL["spine"]
        labels[(np.hypot(x, behind - radius - 7) < 7.5) & (z > 250) & (z < 890)] = LABEL["spinal cord"]

    return Shape(np.float32([-70, -10, 200]), np.float32([70, 115, 892]), paint)


def _iliac_bones() -> Shape:
    """The wings of the ilium: two parts of a bowl that opens to the front."""

    def paint(labels: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
        flare = 0.30 * (z - 290)
        r = np.sqrt((x / (112 + flare)) ** 2 + ((y + 15) / (92 + 0.5 * flare)) ** 2)
        crest = 352 - 0.004 * (y - 10) ** 2
        wing = (np.abs(r - 1) < 0.055) & (np.abs(x) > 38) & (y > -52 + 0.15 * (z - 205))
        labels[wing & (z > 205 + 0.35 * np.maximum(y, 0)) & (z < crest)] = LABEL["pelvis"]

    return Shape(np.float32([-140, -75, 200]), np.float32([140, 100, 356]), paint)


def _pelvic_ring() -> list[Shape]:
    pubis, shapes = [(86, -15, 192), (50, -52, 176), (8, -58, 168)], []
    ischium = [(86, 22, 185), (66, 38, 140), (48, 10, 132), (14, -45, 158)]
    femur = [(90, 2, 189), (122, 12, 162), (112, 4, 110), (98, 0, -60)]
    for side in (-1, 1):
        shapes.append(ellipsoid("pelvis", (88 * side, 4, 190), (35, 34, 36)))
        shapes += tube("pelvis", mirror(pubis, side), [14, 8, 10])
        shapes += tube("pelvis", mirror(ischium, side), [16, 15, 9, 8])
        shapes.append(ellipsoid("femora", (90 * side, 2, 189), (24, 24, 24)))
        shapes += tube("femora", mirror(femur, side), [15, 19, 15, 13])
    return shapes


def _shoulder_girdle() -> list[Shape]:
    shapes = [ellipsoid("shoulder girdle", (0, -86, 625), (17, 6, 70), (-8, 0, 0))]
    for side in (-1, 1):
        shapes += tube("shoulder girdle", [(16 * side, -52, 722), (70 * side, -38, 742), (138 * side, 8, 752)], 7)
        shapes.append(ellipsoid("shoulder girdle", (102 * side, 84, 665), (44, 5, 68), (0, -10 * side, -28 * side)))
        shapes += tube("shoulder girdle", [(70 * side, 84, 708), (142 * side, 40, 745)], 7)
    return shapes


def head(rng: np.random.Generator, fat: float) -> list[Shape]:
    """The head with skull, brain, airway and glands; it is turned and moved as the patient happens to lie."""
    move = np.array([rng.normal(0, 3), rng.normal(-6, 5), rng.normal(0, 3)])
    size = np.exp(rng.normal(0, 0.03))

    def at(organ: str, centre: Point, semi: Point, tilt: Point = (0, 0, 0)) -> Shape:
        return ellipsoid(organ, np.add(centre, move), np.multiply(semi, size), tilt)

    skin = 3 + fat * 0.08
    shapes = []
    for organ, extra in (("fat", skin), ("muscle", 0)):
        shapes += [at(organ, (0, -20, 915), np.add((77, 94, 74), extra)),
                   at(organ, (0, -50, 848), np.add((59, 60, 62), extra))]  # fmt: skip
    shapes += [at("skull", (0, -20, 916), (73, 91, 70)), at("skull", (0, 22, 876), (58, 40, 34)),
               at("skull", (0, -72, 880), (46, 36, 30))]  # fmt: skip
    shapes += [at("brain", (0, -20, 918), (66, 83, 62)), at("brain", (0, 24, 878), (50, 32, 26)),
               at("white matter", (0, -20, 922), (48, 64, 42)), at("brain", (0, -20, 912), (26, 24, 15)),
               at("white matter", (0, -20, 915), (9, 30, 18))]  # fmt: skip
    shapes += [at("trachea", (0, -82, 862), (13, 26, 16)), at("trachea", (0, -45, 850), (9, 9, 28))]
    for side in (-1, 1):
        shapes += [at("trachea", (24 * side, -84, 872), (11, 14, 12)), at("fat", (31 * side, -92, 893), (15, 17, 13)),
                   at("muscle", (31 * side, -98, 893), (11, 11, 11)),
                   at("lacrimal glands", (41 * side, -92, 901), (7, 9, 7)),
                   at("parotid glands", (57 * side, -14, 848), (13, 19, 27), (10, 0, 0)),
                   at("submandibular glands", (30 * side, -45, 806), (11, 15, 13))]  # fmt: skip
        jaw = np.array([(52 * side, -28, 870), (47 * side, -40, 828), (28 * side, -86, 812), (0, -100, 810)]) + move
        shapes += tube("skull", jaw, [6, 7, 8, 9], within=["muscle", "fat"])
    return shapes
