"""Who the phantoms are: tracers, diagnoses and ages in the shares of a lymphoma-heavy PET/CT centre."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Group(NamedTuple):
    """Patients with one tracer and diagnosis: their share of all cases, the youngest and the oldest age in years."""

    tracer: str
    diagnosis: str
    share: float
    youngest: int
    oldest: int


COHORT = (
    Group("68Ga-PSMA", "prostate cancer", 0.08, 50, 85),
    Group("18F-PSMA", "prostate cancer", 0.08, 50, 85),
    Group("68Ga-PSMA", "negative control", 0.02, 50, 85),
    Group("18F-PSMA", "negative control", 0.02, 50, 85),
    Group("18F-FDG", "negative control", 0.12, 20, 85),
    Group("18F-FDG", "melanoma", 0.12, 25, 85),
    Group("18F-FDG", "lung cancer", 0.08, 45, 85),
    Group("18F-FDG", "Hodgkin lymphoma", 0.48, 18, 80),
)


def draw_group(rng: np.random.Generator, wanted: Callable[[Group], bool] = lambda group: True) -> Group:
    """A group of the cohort, after its share among those that are `wanted`."""
    groups = [group for group in COHORT if wanted(group)]
    share = np.array([group.share for group in groups])
    return groups[rng.choice(len(groups), p=share / share.sum())]
