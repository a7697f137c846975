"""What each organ looks like: one row a organ with its CT value and its uptake of each tracer.

CT values are those of an unenhanced CT at 120 kV. Uptake ranges (mean SUVbw, g/ml, one hour after injection) are what
a reader of such scans expects of each tracer, chosen by us to be plausible and not fitted to patients: 18F-FDG;
68Ga-PSMA-11, which the kidneys clear; 18F-PSMA-1007, which the liver clears, so that the liver and the gallbladder are
hot and the bladder is not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

TRACERS = ("18F-FDG", "18F-PSMA", "68Ga-PSMA")


class Organ(NamedTuple):
    """CT mean and texture in HU, the share by which uptake varies within the organ, and a SUV range for each tracer."""

    name: str
    hu: float
    hu_texture: float
    mottle: float
    fdg: tuple[float, float]
    psma_1007: tuple[float, float]
    psma_11: tuple[float, float]


ORGANS = (
    Organ("air", -1000, 0, 0.0, (0, 0), (0, 0), (0, 0)),
    Organ("fat", -105, 8, 0.1, (0.2, 0.35), (0.2, 0.35), (0.15, 0.3)),
    Organ("visceral fat", -95, 12, 0.2, (0.3, 0.5), (0.4, 0.6), (0.3, 0.5)),
    Organ("mediastinum", -60, 25, 0.1, (0.7, 1.0), (0.8, 1.2), (0.6, 0.9)),
    Organ("muscle", 55, 8, 0.1, (0.6, 0.85), (0.5, 0.8), (0.4, 0.6)),
    Organ("skull", 300, 60, 0.1, (0.5, 0.8), (0.5, 0.8), (0.2, 0.4)),
    Organ("spine", 200, 25, 0.15, (1.0, 1.7), (0.9, 1.3), (0.4, 0.8)),
    Organ("ribs", 220, 40, 0.1, (0.7, 1.1), (0.7, 1.1), (0.3, 0.6)),
    Organ("shoulder girdle", 220, 40, 0.1, (0.7, 1.1), (0.6, 0.9), (0.3, 0.6)),
    Organ("pelvis", 210, 30, 0.15, (0.8, 1.3), (0.7, 1.1), (0.3, 0.6)),
    Organ("femora", 230, 30, 0.15, (0.5, 0.9), (0.4, 0.7), (0.2, 0.4)),
    Organ("humeri", 230, 30, 0.15, (0.5, 0.9), (0.4, 0.7), (0.2, 0.4)),
    Organ("spinal cord", 35, 4, 0.05, (1.0, 1.4), (0.3, 0.5), (0.2, 0.4)),
    Organ("brain", 38, 4, 0.15, (6.5, 9.0), (0.1, 0.2), (0.05, 0.15)),
    Organ("white matter", 30, 3, 0.15, (3.0, 4.2), (0.1, 0.2), (0.05, 0.15)),
    Organ("parotid glands", 15, 12, 0.1, (1.2, 2.2), (14, 22), (10, 17)),
    Organ("submandibular glands", 35, 8, 0.1, (1.3, 2.2), (13, 20), (11, 18)),
    Organ("lacrimal glands", 40, 5, 0.1, (0.8, 1.5), (6, 12), (4, 8)),
    Organ("thyroid", 100, 10, 0.1, (1.0, 1.8), (1.2, 2.0), (1.0, 1.6)),
    Organ("trachea", -990, 5, 0.0, (0, 0.1), (0, 0.1), (0, 0.1)),
    Organ("lung", -820, 45, 0.15, (0.35, 0.55), (0.4, 0.6), (0.3, 0.5)),
    Organ("blood", 42, 4, 0.03, (1.4, 1.9), (1.8, 2.8), (1.1, 1.7)),
    Organ("myocardium", 48, 4, 0.12, (1.3, 13), (1.8, 2.6), (1.2, 1.8)),
    Organ("breast", -20, 50, 0.2, (0.5, 0.9), (0.5, 0.9), (0.4, 0.8)),
    Organ("liver", 58, 7, 0.08, (1.9, 2.7), (9, 13), (3.5, 6)),
    Organ("gallbladder", 8, 3, 0.05, (0.7, 1.2), (15, 60), (1.5, 4)),
    Organ("spleen", 50, 6, 0.08, (1.6, 2.2), (7, 12), (4, 10)),
    Organ("pancreas", 38, 12, 0.1, (1.2, 1.7), (2.5, 4), (1.8, 3)),
    Organ("stomach", 38, 12, 0.3, (1.2, 3.0), (2, 5), (2, 5)),
    Organ("duodenum", 35, 12, 0.3, (1.2, 2.4), (9, 15), (7, 13)),
    Organ("small intestine", 30, 15, 0.5, (0.9, 2.2), (3, 7), (2.5, 6)),
    Organ("colon", 25, 35, 0.6, (0.8, 5.0), (1.0, 2.2), (1.0, 2.2)),
    Organ("bowel gas", -900, 30, 0.0, (0.1, 0.3), (0.1, 0.3), (0.1, 0.3)),
    Organ("kidneys", 34, 5, 0.1, (2.2, 3.2), (16, 28), (30, 50)),
    Organ("renal pelvis", 6, 2, 0.1, (4, 16), (4, 9), (25, 60)),
    Organ("ureters", 8, 2, 0.3, (3, 12), (2, 6), (10, 40)),
    Organ("bladder", 4, 2, 0.03, (6, 35), (1.5, 5), (15, 80)),
    Organ("prostate", 42, 8, 0.15, (1.2, 2.0), (2.5, 4.5), (2, 3.5)),
)
LABEL = {organ.name: label for label, organ in enumerate(ORGANS)}
BONES = ("skull", "spine", "ribs", "shoulder girdle", "pelvis", "femora", "humeri")
CORTICAL_HU = 850.0


def labels_of(*names: str) -> np.ndarray:
    """A table of truth values by label that says which labels belong to the organs `names`."""
    table = np.zeros(len(ORGANS), bool)
    table[[LABEL[name] for name in names]] = True
    return table


def draw_uptake(rng: np.random.Generator, tracer: str, age: float) -> np.ndarray:
    """The mean uptake of each organ (SUVbw, by label) in one patient.

    The logarithm is uniform over the organ's range, for physiological uptake is skewed. FDG uptake of the brain falls
    with age (Shen et al. 2012), here by 0.5 % a year.
    """
    column = ("fdg", "psma_1007", "psma_11")[TRACERS.index(tracer)]
    low, high = np.maximum([getattr(organ, column) for organ in ORGANS], 1e-3).T
    uptake = np.exp(rng.uniform(np.log(low), np.log(high)))
    uptake[LABEL["air"]] = 0
    if tracer == "18F-FDG":
        uptake[labels_of("brain", "white matter")] *= 1 - 0.005 * (age - 50)
    return uptake.astype(np.float32)


def draw_hu(rng: np.random.Generator, age: float) -> np.ndarray:
    """The mean CT value of each organ (HU, by label) in one patient: trabecular bone loses 2 HU a year of age."""
    hu = np.array([organ.hu for organ in ORGANS], np.float32)
    hu += (rng.normal(0, 0.1, len(ORGANS)) * [organ.hu_texture for organ in ORGANS]).astype(np.float32)
    hu[labels_of(*BONES)] += 2.0 * (50 - age) + rng.normal(0, 8)
    hu[LABEL["liver"]] -= rng.exponential(6)  # a fatty liver is dark
    return hu
