"""ContextAlign against plain double loops, and two processes against one."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from pretraining.context_align import ContextAlign, retrieval

PET_DIM, TEXT_DIM, DIM = 7, 5, 6


def reference_loss(pets: Tensor, texts: Tensor, ids: list[int], scale: float) -> float:
    """InfoNCE with shared positives, written out term by term; both directions weigh alike."""
    rows = [i for i, number in enumerate(ids) if number >= 0]
    total = 0.0
    for anchors, others in ((pets, texts), (texts, pets)):
        for i in rows:
            terms = {j: math.exp(scale * float(anchors[i] @ others[j])) for j in rows}
            positives = [j for j in rows if ids[j] == ids[i]]
            total -= sum(math.log(terms[j] / sum(terms.values())) for j in positives) / len(positives) / len(rows) / 2
    return total


def example(seed: int, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """PET CLS, text embeddings (the same for the same prompt) and IDs."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randn(max(ids) + 2, TEXT_DIM, generator=generator)
    return torch.randn(len(ids), PET_DIM, generator=generator), prompts[ids], torch.tensor(ids)


def align(seed: int = 0, temperature: float = 0.07) -> ContextAlign:
    torch.manual_seed(seed)
    return ContextAlign(PET_DIM, TEXT_DIM, DIM, temperature)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [0, 1, 0, 2, 1, 1], [0, -1, 3, 3, -1], [-1, 5, 2]])
def test_loss_is_the_reference(ids):
    module = align(temperature=0.3)
    pet, text, numbers = example(1, ids)
    result = module(pet, text, numbers)
    pets, texts = module.embed_pet(pet).detach(), module.embed_text(text).detach()
    torch.testing.assert_close(pets.norm(dim=1), torch.ones(len(ids)))
    assert result.item() == pytest.approx(reference_loss(pets, texts, ids, 1 / 0.3), rel=1e-5)
    assert module.temperature == pytest.approx(0.3)


def test_positives_are_told_by_the_id_not_by_the_embedding():
    module = align()
    ids = [0, 1, 0, 2, 1, 1]
    pet, _, numbers = example(6, ids)
    text = torch.randn(6, TEXT_DIM)
    expected = reference_loss(module.embed_pet(pet).detach(), module.embed_text(text).detach(), ids, 1 / 0.07)
    assert module(pet, text, numbers).item() == pytest.approx(expected, rel=1e-5)


def test_without_duplicates_it_is_clips_cross_entropy():
    module = align()
    pet, text, numbers = example(2, [4, 0, 3, 1, 2])
    logits = module.embed_pet(pet) @ module.embed_text(text).T / 0.07
    targets = torch.arange(5)
    expected = (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(module(pet, text, numbers), expected)


def test_a_case_without_metadata_changes_nothing():
    module = align()
    pet, text, numbers = example(3, [0, -1, 1, 2, -1])
    known = numbers >= 0
    torch.testing.assert_close(
        module(pet, text, numbers), module(pet[known], text[known], numbers[known])
    )
    pet.requires_grad_()
    module(pet, text, numbers).backward()
    assert (pet.grad[~known] == 0).all() and (pet.grad[known] != 0).any(dim=1).all()


@pytest.mark.parametrize("ids", [[-1, -1, -1], [2, 2, 2], [-1, 4, -1], []])
def test_fewer_than_two_prompts_give_zero_with_a_graph(ids):
    module = align()
    pet, text = torch.randn(len(ids), PET_DIM), torch.randn(len(ids), TEXT_DIM)
    result = module(pet, text, torch.tensor(ids, dtype=torch.long))
    result.backward()
    assert result == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in module.parameters())


def test_temperature_learns_and_stays_in_bounds():
    module = align()
    pet, text, numbers = example(4, [0, 1, 2])
    module(pet, text, numbers).backward()
    assert module.log_scale.grad != 0
    for value, expected in ((9.0, 0.01), (-3.0, 1.0)):
        with torch.no_grad():
            module.log_scale.fill_(value)
        result = module(pet, text, numbers)
        assert module.temperature == pytest.approx(expected)
        module.log_scale.grad = None
        result.backward()
        assert module.log_scale.grad != 0  # on the bound it can still turn back


def test_loss_in_float32_under_autocast():
    module = align(temperature=0.01)
    pet, text, numbers = example(5, [0, 1, 2, 1])
    expected = module(pet.bfloat16().float(), text, numbers)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(pet.bfloat16(), text, numbers)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


# ------------------------------------------------------------------------------------------- two processes against one


class Model(nn.Module):
    """Something that is trained before ContextAlign, as the PET encoder and the text tower are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.pet, self.text = nn.Linear(PET_DIM, PET_DIM), nn.Linear(TEXT_DIM, TEXT_DIM)
        self.align = ContextAlign(PET_DIM, TEXT_DIM, DIM)

    def forward(self, pet: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        return self.align(self.pet(pet).tanh(), self.text(text).tanh(), ids)


BATCHES = {  # the first half is the first process's
    "plain": [0, 1, 2, 3, 4, 5],
    "shared within and across": [0, 0, 1, 1, 2, 0],
    "metadata in unlike numbers": [-1, 3, -1, 1, 3, 0],
    "none on one process": [-1, -1, -1, 1, 0, 1],
    "one prompt in all": [-1, 2, -1, 2, 2, -1],
    "none at all": [-1, -1, -1, -1, -1, -1],
}


def gradients(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    result = model(*batch)
    result.backward()
    found = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
    return {"loss": result.detach(), **found}


def one_of_two(index: int, rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    try:
        model = DistributedDataParallel(Model())
        results = {}
        for name, ids in BATCHES.items():
            half = slice(3 * rank, 3 * rank + 3)
            results[name] = gradients(model, tuple(part[half] for part in example(8, ids)))
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_processes_are_one_with_the_joint_batch(tmp_path):
    # This process is the first of the two: starting one costs the import of torch and open_clip
    other = multiprocessing.spawn(one_of_two, (1, str(tmp_path)), nprocs=1, join=False)
    one_of_two(0, 0, str(tmp_path))
    other.join()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, ids in BATCHES.items():
        expected = gradients(Model(), example(8, ids))
        assert (expected["loss"] == 0) == (name in ("one prompt in all", "none at all"))
        for result in found:
            assert result[name].keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(result[name][key], value, equal_nan=True, msg=lambda m: f"{name} {key}: {m}")  # noqa: B023


# ------------------------------------------------------------------------------------------------------------ retrieval


def test_retrieval_counts_each_prompt_once():
    texts = torch.eye(7)
    ids = torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 6, -1])
    pets = texts[ids.clamp(min=0)].clone()
    pets[2] = texts[4]  # wrong first; its own prompt is one of six that are equally far
    pets[3] = 0.9 * texts[6] + 0.5 * texts[1]  # second
    result = retrieval(pets, texts[ids], ids)
    assert result["top1"] == pytest.approx(7 / 9)
    assert result["top5"] == pytest.approx((8 + 4 / 6) / 9)
    assert result["chance1"] == pytest.approx(1 / 7) and result["chance5"] == pytest.approx(5 / 7)
    assert result["majority"] == pytest.approx(3 / 9)


def test_retrieval_of_random_and_of_collapsed_embeddings_is_chance():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(12, (4000,), generator=generator)
    ids[:1000] = 3  # one prompt is frequent
    texts = nn.functional.normalize(torch.randn(12, 16, generator=generator), dim=1)[ids]
    flat = retrieval(torch.ones(4000, 16), torch.ones(4000, 16), ids)
    assert flat["top1"] == pytest.approx(flat["chance1"]) == pytest.approx(1 / 12)
    assert flat["top5"] == pytest.approx(flat["chance5"]) == pytest.approx(5 / 12)
    isotropic = torch.stack([nn.functional.one_hot(torch.randint(12, (1,), generator=generator)[0], 12).float()
                             for _ in ids])  # fmt: skip
    guess = retrieval(isotropic, torch.eye(12)[ids], ids)
    assert guess["top1"] == pytest.approx(1 / 12, abs=0.02) and guess["top5"] == pytest.approx(5 / 12, abs=0.03)
    own = retrieval(texts, texts, ids)
    assert own["top1"] == own["top5"] == 1


def test_retrieval_without_metadata_is_empty():
    assert retrieval(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([-1, -1])) == {}
    alone = retrieval(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([4, 4]))
    assert alone["top1"] == alone["chance1"] == alone["chance5"] == 1
