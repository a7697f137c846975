"""ContextAlign: PET and clinical prompt of a case drawn together in one space (paper section 2.2, equation 4).

The loss is CLIP's: InfoNCE in both directions over the joint batch of all processes. Unlike pictures and their
captions, many cases share a prompt ("<tracer> 18F FDG <diagnosis> melanoma ..."), so all cases of one prompt are
positives of each other; a case without metadata takes no part.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from lightning_fabric import Fabric
from open_clip.loss import ClipLoss, gather_features
from torch import Tensor, distributed, nn
from torch.nn.functional import normalize

from nnunet_fratmae.base.command import UserError
from plans.settings import Settings
from pretraining.data import Case

if TYPE_CHECKING:
    from pretraining.evaluation import HeldOut, Share
    from pretraining.text import TextTower

UNKNOWN = -1  # the prompt ID of a case without metadata
MAX_SCALE = 100.0  # of the logits, as in CLIP (Radford et al. 2021, section 2.5)


class SharedPromptLoss(ClipLoss):
    """open_clip's ClipLoss where rows with the same prompt are positives of each other, with equal weight.

    Where one prompt has exactly one embedding, ClipLoss's own labels come to the same, value and gradients; made
    explicit, this does not hang on how the tower computes.

    Args:
        prompt_ids: (N,) one number for each prompt.
    """

    def __init__(self, prompt_ids: Tensor) -> None:
        super().__init__()
        same = prompt_ids[:, None] == prompt_ids
        self.truth = same / same.sum(dim=1, keepdim=True)  # symmetric, so it serves both directions

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        return self.truth


class ContextAlign(nn.Module):
    """Projections of PET and text into one space, the temperature, and the loss.

    The projections are linear without bias, as CLIP's: the PET encoder and the text towers end in a LayerNorm of their
    own, and the L2 norm afterwards takes away every scale.

    Args:
        pet_dim, text_dim: lengths of the PET's CLS token and of the tower's text embedding.
        dim: length of the common embedding.
        temperature: at the start; learned, and kept between 1 and 1 / MAX_SCALE as in CLIP.
    """

    def __init__(self, pet_dim: int, text_dim: int, dim: int = 512, temperature: float = 0.07) -> None:
        super().__init__()
        self.pet_projection = nn.Linear(pet_dim, dim, bias=False)
        self.text_projection = nn.Linear(text_dim, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        for layer in (self.pet_projection, self.text_projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def embed_pet(self, cls: Tensor) -> Tensor:
        """Unit vectors (B, dim), float32, of the PET encoder's CLS tokens (B, pet_dim)."""
        return _embed(self.pet_projection, cls)

    def embed_text(self, text: Tensor) -> Tensor:
        """Unit vectors (B, dim), float32, of the tower's embeddings (B, text_dim)."""
        return _embed(self.text_projection, text)

    @property
    def temperature(self) -> float:
        """As last used."""
        return math.exp(-self.log_scale.item())

    def forward(self, pet_cls: Tensor, text: Tensor, prompt_ids: Tensor) -> Tensor:
        """The loss of the joint batch of all processes, the same number on each of them.

        Features are gathered with their gradient: averaged over the processes, as DDP does, the gradients are those of
        one process with the joint batch. Every process must call this with the same number of cases.

        Args:
            pet_cls: (B, pet_dim).
            text: (B, text_dim); finite, but of no effect, where there is no metadata.
            prompt_ids: (B,) integers, the same number for the same prompt on all processes, -1 for no metadata.

        Returns:
            Symmetric InfoNCE; 0 (with a graph, so that DDP sees gradients) with fewer than 2 different prompts. At best
            it is the mean log of how many cases share a prompt.
        """
        with torch.no_grad():
            self.log_scale.clamp_(0, math.log(MAX_SCALE))
        scale = self.log_scale.exp()
        local_pet, local_text = self.embed_pet(pet_cls), self.embed_text(text)
        pets, texts, ids = _gather(local_pet, local_text, prompt_ids)
        known = ids != UNKNOWN
        pets, texts, ids = pets[known], texts[known], ids[known]
        if len(ids.unique()) < 2:
            return 0.0 * (local_pet.sum() + local_text.sum() + scale)
        with torch.autocast(pets.device.type, enabled=False):
            return SharedPromptLoss(ids)(pets, texts, scale)


def retrieval(pets: Tensor, texts: Tensor, prompt_ids: Tensor) -> dict[str, float]:
    """How often a PET finds its own prompt among all different prompts of these cases.

    Args:
        pets, texts: (N, dim) unit vectors of `ContextAlign`; the texts of one prompt are the same.
        prompt_ids: (N,) as in `ContextAlign`; cases with -1 are left out.

    Returns:
        top1, top5: share of the PETs for which their prompt is the nearest, or among the five nearest; prompts at the
            same distance count as drawn in random order, so that a collapsed embedding is worth as much as chance.
        chance1, chance5: what guessing reaches, 1 and 5 of the K different prompts (each prompt is one candidate, no
            matter how many cases have it).
        majority: what answering with the most frequent prompt for every PET reaches.
        Empty if there is no case with metadata.
    """
    known = prompt_ids != UNKNOWN
    pets, texts, prompt_ids = pets[known].float(), texts[known].float(), prompt_ids[known]
    if not len(prompt_ids):
        return {}
    counts = prompt_ids.unique(return_counts=True)[1]
    result = {f"top{k}": _hits(pets, texts, prompt_ids, k).mean().item() for k in (1, 5)}
    result |= {f"chance{k}": min(k, len(counts)) / len(counts) for k in (1, 5)}
    return result | {"majority": counts.max().item() / len(prompt_ids)}


def _hits(pets: Tensor, texts: Tensor, ids: Tensor, k: int) -> Tensor:
    """For each PET (N,) the probability that its prompt is among the k nearest, ties in random order."""
    prompts, candidate = ids.unique(return_inverse=True)
    first = torch.stack([(ids == prompt).nonzero()[0, 0] for prompt in prompts])
    with torch.autocast(pets.device.type, enabled=False):
        similarity = pets @ texts[first].T
    own = similarity.gather(1, candidate[:, None])
    nearer, equal = (similarity > own).sum(dim=1), (similarity == own).sum(dim=1)
    return ((k - nearer) / equal).clamp(0, 1)


def _embed(projection: nn.Linear, features: Tensor) -> Tensor:
    # float32 also under autocast: with a scale of 100, the 8 bits of a bfloat16 are half a unit of the logits
    with torch.autocast(features.device.type, enabled=False):
        return normalize(projection(features.float()), dim=-1)


def _gather(pets: Tensor, texts: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The features, with gradient, and prompt IDs of all processes, in the order of their ranks."""
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if processes == 1:
        return pets, texts, ids
    pets, texts = gather_features(pets, texts, gather_with_grad=True, world_size=processes)
    gathered = [torch.empty_like(ids) for _ in range(processes)]
    distributed.all_gather(gathered, ids.contiguous())
    return pets, texts, torch.cat(gathered)


def prepare_text(
    settings: Settings, cases: list[Case], fabric: Fabric
) -> tuple[TextTower, ContextAlign, dict[str, Tensor]]:
    """The text tower, ContextAlign, and the embedding of every prompt where the tower is frozen.

    Raises:
        UserError: no two cases have different metadata, or the tower cannot be loaded.
    """
    from pretraining.text import embed_prompts, load_tower

    options = settings.pretrain
    prompts = sorted({case.prompt for case in cases if case.prompt})
    if not prompts:
        raise UserError(f"-m {options.method}: no case has metadata to align with; give the converter a clinical.csv "
                        "and plan again, or say -m fratmae_notext")  # fmt: skip
    if len(prompts) < 2:
        raise UserError(f"-m {options.method}: all cases have the same metadata ({prompts[0]!r}), so the text has "
                        "nothing to tell apart; say -m fratmae_notext")  # fmt: skip
    with fabric.rank_zero_first(local=True):  # which fetches the weights for its node
        tower = load_tower(options.text_tower, options.text_weights)
    torch.manual_seed(options.seed)
    align = ContextAlign(settings.sizes.embed_dim, tower.dim, temperature=options.temperature)
    return tower, align, embed_prompts(tower.to(fabric.device), prompts) if options.text_frozen else {}


def evaluate_retrieval(
    encoder: nn.Module, align: ContextAlign, held_out: HeldOut, text: dict[str, Tensor], share: Share
) -> dict[str, float]:
    """PET-text retrieval among the different prompts of the held-out cases (see `retrieval`); nothing below two.

    Args:
        encoder: of the PET; text: embedding (dim,) of every prompt.
    """
    cases, device = held_out.cases, share.fabric.device
    prompts = sorted({case.prompt for case in cases if case.prompt})
    if len(prompts) < 2:
        return {}
    known = torch.tensor([i for i, case in enumerate(cases) if case.prompt])
    ids = torch.tensor([prompts.index(cases[i].prompt) for i in known])

    def embed(some: Tensor) -> Tensor:
        return align.embed_pet(encoder(held_out.images[known[some], 1:].to(device))[:, 0])

    with torch.no_grad():
        texts = align.embed_text(torch.stack([text[cases[i].prompt] for i in known]).to(device)).cpu()
    pets = share.rows(embed, len(known), texts.shape[1]).to(texts)
    return {f"retrieval_{name}": value for name, value in retrieval(pets, texts, ids).items()}
