"""What stage 1 is judged by, against plain references."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import nn

from nnunet_fratmae.base.units import MODALITIES
from plans.settings import Pretrain, Settings, WholeBody
from pretraining.context_align import evaluate_retrieval
from pretraining.data import Case
from pretraining.evaluation import HeldOut, Share, evaluate, guesses
from pretraining.fratmae import random_masking
from pretraining.method import voxel_mask
from pretraining.monitor import Monitor

PATCH, TOKEN = (8, 16, 24), (4, 8, 8)  # a grid of 2 x 2 x 3 tokens
ALONE = Fabric(accelerator="cpu", devices=1)


class Stub(nn.Module):
    """Answers with the partner's voxels, times a factor."""

    block, factor, is_cross_modal = TOKEN, 1.0, True

    def predict(self, image, mask):
        return self.factor * image.flip(1)

    def judge(self, held_out, share):
        return {}


def held_out(images: torch.Tensor, prompts=None) -> HeldOut:
    cases = [Case(None, f"D/{i}", (0, 1), prompts and prompts[i]) for i in range(len(images))]
    masks = {}
    for number, modality in enumerate(MODALITIES):
        masks[modality] = torch.zeros(len(images), 2, 2, 2, 3, dtype=torch.bool)
        masks[modality][:, number] = blocks(len(images), number)
    return HeldOut(cases, images, masks, {})


def blocks(count: int, seed: int) -> torch.Tensor:
    """Half of the blocks of each of some volumes, (count, h, w, d)."""
    return random_masking(count, 12, 0.5, torch.Generator().manual_seed(seed)).unflatten(1, (2, 2, 3))


def test_error_psnr_and_gain_match_a_reference():
    torch.manual_seed(0)
    ct = torch.randn(3, 1, *PATCH)
    cases = held_out(torch.cat([ct, ct + 0.1 * torch.randn_like(ct)], 1))
    row = evaluate(Stub(), cases, Share(2, ALONE))  # a pass of two cases and one of one
    for number, (modality, peak) in enumerate((("CT", 2524 / 500), ("PET", 12.5))):
        masked = voxel_mask(cases.masks[modality][:, number], TOKEN)
        own = np.mean([float((cases.images[i, 0] - cases.images[i, 1])[masked[i]].square().mean()) for i in range(3)])
        other = np.mean([
            float((cases.images[i, number] - cases.images[(i + 1) % 3, 1 - number])[masked[i]].square().mean())
            for i in range(3)
        ])  # fmt: skip
        assert row[f"held_out_{modality}"] == pytest.approx(own, rel=1e-4)
        assert row[f"psnr_{modality}"] == pytest.approx(10 * np.log10(peak**2 / own), rel=1e-4)
        assert row[f"gain_{modality}"] == pytest.approx(1 - own / other, rel=1e-4) and row[f"gain_{modality}"] > 0.9


def test_a_network_that_ignores_the_partner_has_no_gain():
    stub = Stub()
    stub.factor = 0.0
    row = evaluate(stub, held_out(torch.randn(3, 2, *PATCH)), Share(3, ALONE))
    assert row["gain_CT"] == row["gain_PET"] == 0
    stub.is_cross_modal = False
    assert "gain_CT" not in evaluate(stub, held_out(torch.randn(3, 2, *PATCH)), Share(3, ALONE))


def test_a_perfect_reconstruction_has_no_psnr_and_no_gain():
    row = evaluate(Stub(), held_out(torch.ones(3, 2, *PATCH)), Share(2, ALONE))
    assert row == {f"{name}_{m}": value for m in ("CT", "PET")
                   for name, value in (("held_out", 0), ("psnr", None), ("gain", None))}  # fmt: skip


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_cases_are_shared_in_passes_among_all_processes(count, batch, world):
    """Each case once, by one process; all processes pause equally often, even those with nothing left to do."""
    seen, pauses, parts = [], [], []

    def compute(some):
        assert len(some) <= batch
        seen.extend(some.tolist())
        return torch.stack([some, some**2], 1)

    for rank in range(world):
        fabric = SimpleNamespace(device="cpu", global_rank=rank, world_size=world, all_reduce=lambda x, reduce_op: x)
        begun = len(pauses)
        parts.append(Share(batch, fabric, lambda: pauses.append(0)).rows(compute, count, 2))
        assert len(pauses) - begun == math.ceil(math.ceil(count / batch) / world)
    assert sorted(seen) == list(range(count))
    assert sum(parts).tolist() == [[i, i**2] for i in range(count)]


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA T4", None),
])  # fmt: skip
def test_mfu_is_of_exactly_this_device(name, peak, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    fabric = SimpleNamespace(device=torch.device("cuda"), world_size=2)
    settings = Settings(preset="vit_tiny", token_patch=TOKEN, wholebody=WholeBody(grid=PATCH, patch=PATCH, k=1))
    assert Monitor(tmp_path, settings, 1.0, fabric, False).peak == (peak and pytest.approx(2 * peak * 1e12, rel=1e-3))


def test_the_stranger_is_another_patient():
    cases = [Case(None, f"D/{i}", (0, 1), None, patient) for i, patient in enumerate(("D/a", "D/a", None, "D/b"))]
    assert HeldOut(cases, None, {}, {}).strangers == [2, 2, 3, 0]
    assert HeldOut(cases[:2], None, {}, {}).strangers == [None, None]


def test_guesses_match_a_reference():
    torch.manual_seed(0)
    volumes, masks = torch.randn(2, *PATCH), voxel_mask(blocks(2, 3), TOKEN)
    found, mask = guesses(volumes, masks).double(), masks.numpy()
    assert found.shape == (2, 2)
    mean, copy = [], []
    for volume, gaps in zip(volumes.numpy(), mask, strict=True):
        mean.append(np.mean((volume[gaps] - volume[~gaps].mean()) ** 2))
        visible, hidden = np.argwhere(~gaps), np.argwhere(gaps)
        distance = ((hidden[:, None] - visible[None]) ** 2).sum(-1)
        # Where several visible voxels are nearest, any of them is a fair guess: compare with the best and the worst
        nearest = distance == distance.min(1, keepdims=True)
        error = (volume[tuple(hidden.T)][:, None] - volume[tuple(visible.T)][None]) ** 2
        copy.append((np.where(nearest, error, np.inf).min(1).mean(), np.where(nearest, error, -np.inf).max(1).mean()))
    assert found[:, 0].numpy() == pytest.approx(np.array(mean), rel=1e-5)
    low, high = np.transpose(copy)
    assert (low <= found[:, 1].numpy() + 1e-6).all() and (found[:, 1].numpy() <= high + 1e-6).all()


def test_a_voxel_mask_marks_exactly_the_masked_blocks():
    masked = torch.zeros(1, 1, 12, dtype=torch.bool)
    masked[..., [0, 7, 11]] = True
    expected = np.zeros(PATCH, bool)
    for h, w, d in ((0, 0, 0), (1, 0, 1), (1, 1, 2)):
        expected[4 * h : 4 * h + 4, 8 * w : 8 * w + 8, 8 * d : 8 * d + 8] = True
    np.testing.assert_array_equal(voxel_mask(masked.unflatten(2, (2, 2, 3)), TOKEN)[0, 0], expected)


class Align:
    @staticmethod
    def embed_pet(x):
        return nn.functional.normalize(x, dim=-1)

    embed_text = embed_pet


class MeanEncoder(nn.Module):
    """CLS token (mean, 1 - mean)."""

    def forward(self, volume):
        mean = volume.mean(dim=(1, 2, 3, 4))
        return torch.stack([mean, 1 - mean], 1)[:, None]


def test_retrieval_finds_the_prompt_of_each_case():
    images = torch.zeros(4, 2, *PATCH)
    images[:2, 1] = 1.0
    text = {"FDG": torch.tensor([1.0, 0.0]), "PSMA": torch.tensor([0.0, 1.0])}
    row = evaluate_retrieval(
        MeanEncoder(), Align, held_out(images, ["FDG", "FDG", "PSMA", None]), text, Share(2, ALONE)
    )
    assert row["retrieval_top1"] == 1 and row["retrieval_chance1"] == 0.5
    row = evaluate_retrieval(
        MeanEncoder(), Align, held_out(images, ["FDG", "PSMA", "PSMA", None]), text, Share(1, ALONE)
    )
    assert row["retrieval_top1"] == pytest.approx(2 / 3)
    assert evaluate_retrieval(MeanEncoder(), Align, held_out(images, ["FDG"] * 4), text, Share(2, ALONE)) == {}


@pytest.mark.parametrize("method", ["fratmae_notext", "mae"])
def test_flops_are_those_that_torch_counts(method):
    from torch.utils.flop_counter import FlopCounterMode

    from pretraining.methods import CLASSES

    whole = WholeBody(grid=(32, 64, 96), patch=(16, 64, 96), k=2)
    settings = Settings(preset="vit_tiny", token_patch=(4, 8, 8), wholebody=whole, pretrain=Pretrain(method=method))
    ours = CLASSES[method].build(settings, [], ALONE)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        ours.predict(torch.zeros(1, 2, *whole.patch), ours.draw(1, (0,)))
    assert ours.flops() == pytest.approx(3 * counter.get_total_flops(), rel=0.03)
