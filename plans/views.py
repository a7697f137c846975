"""Views of stored studies: which window, how it is varied, in which order. Drawing is apart from applying."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from nnunet_fratmae.base.units import PRETRAINING_UNITS, shift_above_air
from plans.settings import Pretrain, WholeBody, stack_steps
from plans.store import Window

Key = tuple[int, int]
"""(epoch, index): everything random about a sample is a function of the seed and this key."""

# --------------------------------------------------------------------------------------------------------------- where


def window(shape: Sequence[int], patch: Sequence[int], steps: Sequence[int], draws: Sequence[float]) -> Window:
    """The voxels of a patch: along each axis every k-th of k * n neighbouring ones, at a random place and phase.

    Args:
        shape, patch: (H, W, D) voxels; steps: k of each axis.
        draws: four numbers in [0, 1): places along H, W and D, and the phase.
    """
    *places, phase = draws
    slices = []
    for length, extent, k, place in zip(shape, patch, steps, places, strict=True):
        first = int(place * (length - k * extent + 1)) + int(phase * k)
        slices.append(slice(first, first + k * (extent - 1) + 1, k))
    return slices[0], slices[1], slices[2]


def central_window(whole: WholeBody, phase: float = 0.0) -> Window:
    """The middle patch of the whole-body grid (paper section 2.4: "centrally cropped"), `phase` in [0, 1)."""
    return window(whole.grid, whole.patch, stack_steps(whole.stack, whole.k), (0.5, 0.5, 0.5, phase))


# ----------------------------------------------------------------------------------------------------------- how varied


class View(NamedTuple):
    """One patch of one study: which voxels of it, and how they are changed."""

    study: int
    window: Window
    mirrored: bool = False
    pet_factor: float = 1.0
    ct_offset: float = 0.0
    """In pretraining units."""


def varied(study: int, window: Window, mirror: float, scale: float, shift: float, options: Pretrain) -> View:
    """The view that random numbers stand for: `mirror` in [0, 1), `scale` and `shift` of the normal distribution."""
    return View(
        study,
        window,
        options.mirror and mirror < 0.5,
        float(np.exp(options.pet_scale * scale)),
        float(options.ct_shift * shift / PRETRAINING_UNITS["CT"].std),
    )


class Views:
    """Draws views of whole bodies; `self(key)` is the same for the same seed and key, so any run can be resumed."""

    def __init__(self, weights: np.ndarray | None, studies: int, whole: WholeBody, options: Pretrain) -> None:
        """`weights` (studies,): probability of each; None: each `patches_per_case` times an epoch."""
        self.studies, self.whole, self.options = studies, whole, options
        self.cumulative = None if weights is None else np.cumsum(weights / weights.sum())

    def __call__(self, key: Key) -> View:
        epoch, index = key
        generator = np.random.default_rng((self.options.seed, epoch, index))
        pick, *places, mirror = generator.random(6)
        scale, shift = generator.standard_normal(2)
        study = index % self.studies
        if self.cumulative is not None:
            study = min(int(np.searchsorted(self.cumulative, pick, side="right")), self.studies - 1)
        place = window(self.whole.grid, self.whole.patch, stack_steps(self.whole.stack, self.whole.k), places)
        return varied(study, place, mirror, scale, shift, self.options)


def augment(patch: Tensor, view: View) -> Tensor:
    """Mirror left-right, scale the PET, shift the CT above air; patch (2, H, W, D) in pretraining units, changed in
    place. Zero stays zero: air and padding have no uptake and no density to be off by."""
    if view.mirrored:
        patch = patch.flip(2)
    patch[1] *= view.pet_factor
    patch[0] = shift_above_air(patch[0], view.ct_offset)
    return patch


# ---------------------------------------------------------------------------------------------------- in which order


class Batches:
    """The passes of one process through an epoch, as lists of keys; a sampler for DataLoader.

    An epoch is a shuffled pass over all samples, different in every epoch and the same for the same seed; the last
    step is filled up from the start. A step of `batch_size` samples is cut into passes of `micro` samples for each of
    `world` processes, so the steps are the same on any number of GPUs.
    """

    def __init__(self, samples: int, batch_size: int, micro: int, rank: int, world: int, seed: int) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.passes = batch_size // (micro * world)
        self.places = [slice((p * world + rank) * micro, (p * world + rank + 1) * micro) for p in range(self.passes)]
        self.epoch, self.first_step = 0, 0

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-self.samples // self.batch_size)

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.passes

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.samples)
        order = np.resize(order, self.steps * self.batch_size).reshape(self.steps, self.batch_size)
        for step in order[self.first_step :]:
            for place in self.places:
                yield [(self.epoch, int(index)) for index in step[place]]
