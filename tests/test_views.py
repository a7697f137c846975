"""Patches of stage 1: which voxels, how they are changed, in which order, from disk and from memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_fratmae.base.command import UserError
from plans.settings import Pretrain, WholeBody
from plans.views import Batches, View, Views, augment
from pretraining.data import Case, DiskPatches, MemoryPatches, case_weights

GRID = (16, 12, 20)
PLAIN = Pretrain(mirror=False, pet_scale=0.0, ct_shift=0.0)


def write_volume(path: Path, shape=(2, *GRID)) -> np.ndarray:
    """A store file in which every voxel tells where it is."""
    volume = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    blosc2.asarray(volume, urlpath=str(path), chunks=(1, 1, *shape[2:]), blocks=(1, 1, *shape[2:]))
    return volume


@pytest.mark.parametrize(
    "stack, patch, k", [("coronal", (4, 12, 10), 1), ("coronal", (4, 9, 20), 2), ("coronal", (4, 12, 10), 3),
                        ("axial", (16, 7, 4), 1), ("axial", (11, 12, 6), 3)],
)  # fmt: skip
def test_a_patch_takes_every_kth_neighbouring_slice_of_the_stack(tmp_path, stack, patch, k):
    volume = write_volume(tmp_path / "a.b2nd")
    case = Case(tmp_path / "a.b2nd", "a", (1, 0))  # PET is channel 0 here
    views = Views(None, 1, WholeBody(GRID, patch, k, stack), PLAIN)
    axis, firsts = {"coronal": 0, "axial": 2}[stack], set()
    for epoch in range(80):
        view = views((epoch, 0))
        found = case.read_window(view.window).numpy()
        assert found.shape == (2, *patch)
        start = np.unravel_index(int(found[1, 0, 0, 0]), GRID)
        steps = [k if i == axis else 1 for i in range(3)]
        place = tuple(slice(s, s + n * step, step) for s, n, step in zip(start, patch, steps, strict=True))
        np.testing.assert_array_equal(found, volume[[1, 0]][(slice(None), *place)])
        firsts.add(start[axis])
    assert min(firsts) == 0 and max(firsts) + k * (patch[axis] - 1) == GRID[axis] - 1, "from end to end"


def test_views_depend_on_seed_epoch_and_index_alone():
    whole = WholeBody(GRID, (4, 8, 10), 2)

    def view(seed, epoch, index):
        return str(Views(None, 2, whole, Pretrain(seed=seed))((epoch, index)))

    assert view(0, 1, 2) == view(0, 1, 2)
    assert len({view(s, e, i) for s in (0, 1) for e in (0, 1) for i in (0, 1, 2)}) == 12


def test_augmentation_is_physical():
    """Mirroring is left-right; the PET is scaled as a whole, the CT shifted, air and padding stay 0."""
    patch = torch.rand(2, 3, 4, 5) + 0.5
    patch[:, 0] = 0
    view = View(0, (slice(0), slice(0), slice(0)), True, 1.25, -0.3)
    expected = patch.numpy()[:, :, ::-1].copy()
    expected[1] *= 1.25
    expected[0] = np.where(expected[0] > 0, np.maximum(expected[0] - 0.3, 0), 0)
    np.testing.assert_allclose(augment(patch.clone(), view), expected, rtol=1e-6)
    views = Views(None, 1, WholeBody(GRID, (4, 8, 10), 2), Pretrain(pet_scale=0.1, ct_shift=10))
    drawn = [views((e, 0)) for e in range(400)]
    assert 150 < sum(v.mirrored for v in drawn) < 250
    assert np.std(np.log([v.pet_factor for v in drawn])) == pytest.approx(0.1, rel=0.15)
    assert np.std([v.ct_offset for v in drawn]) == pytest.approx(10 / 500, rel=0.15)
    plain = Views(None, 1, WholeBody(GRID, (4, 8, 10), 2), PLAIN)((3, 0))
    assert (plain.mirrored, plain.pet_factor, plain.ct_offset) == (False, 1.0, 0.0)


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
def test_processes_and_passes_share_the_same_steps(samples, world, passes, micro, epoch):
    """Whatever the number of GPUs and passes, a step holds the same samples, and an epoch visits all of them."""
    size = world * passes * micro
    together = Batches(samples, size, size, 0, 1, seed=0)
    parts = [Batches(samples, size, micro, rank, world, seed=0) for rank in range(world)]
    for batches in (together, *parts):
        batches.epoch = epoch
    steps, cut = list(together), [list(part) for part in parts]
    assert len(steps) == together.steps == len(together)
    assert all(len(c) == len(p) for c, p in zip(cut, parts, strict=True))
    for number, step in enumerate(steps):
        seen = [key for p in range(passes) for part in cut for key in part[number * passes + p]]
        assert seen == step
    assert {i for step in steps for _, i in step} == set(range(samples)) and {e for s in steps for e, _ in s} == {epoch}
    parts[0].first_step = 1
    assert list(parts[0]) == cut[0][passes:], "a resumed epoch goes on with the next step"


def test_memory_and_disk_give_the_same_patches(tmp_path):
    cases = []
    for number in range(3):
        write_volume(tmp_path / f"{number}.b2nd", (2, *GRID))
        volume = np.random.default_rng(number).random((2, *GRID)).astype(np.float16)
        blosc2.asarray(volume, urlpath=str(tmp_path / f"{number}.b2nd"), mode="w")
        cases.append(Case(tmp_path / f"{number}.b2nd", f"D/{number}", (1, 0)))
    views = Views(None, 3, WholeBody(GRID, (4, 12, 10), 2), Pretrain())
    batches = Batches(6, 2, 2, 0, 1, seed=0)
    memory = MemoryPatches(cases, views, batches, torch.device("cpu"))
    disk = DiskPatches(cases, views)
    for keys, (images, numbers) in zip(batches, memory, strict=True):
        for key, image, number in zip(keys, images, numbers, strict=True):
            patch, case = disk[key]
            assert case == number and torch.equal(patch, image)


def test_datasets_are_drawn_by_their_weights():
    cases = [Case(Path("x"), f"{name}/{i}", (0, 1)) for name, n in (("A", 90), ("B", 10)) for i in range(n)]
    weights = case_weights(cases, ["A", "B"], (1.0, 3.0))
    views = Views(weights, 100, WholeBody(GRID, (4, 8, 10), 2), Pretrain())
    drawn = [cases[views((0, i)).study].dataset for i in range(4000)]
    assert drawn.count("B") / 4000 == pytest.approx(0.75, abs=0.03)
    assert case_weights(cases, ["A", "B"], None) is None
    with pytest.raises(UserError, match="has 1 weights for 2 datasets"):
        case_weights(cases, ["A", "B"], (1.0,))
    with pytest.raises(UserError, match="B has the weight 3 but no case to train with"):
        case_weights(cases[:90], ["A", "B"], (0.0, 3.0))
    assert case_weights(cases[:90], ["A", "B"], (1.0, 0.0)).sum() == pytest.approx(1)


def test_without_weights_every_case_is_drawn_alike():
    views = Views(None, 5, WholeBody(GRID, (4, 8, 10), 2), replace(Pretrain(), patches_per_case=3))
    assert sorted(views((2, i)).study for i in range(15)) == sorted(list(range(5)) * 3)
