"""One pretraining step and one fine-tuning step of ViT-B at the paper's patch: parameters, seconds, peak memory.

python benchmarks/full_size.py [-device cpu|cuda] [-preset vit_b] [-batch 1]

Random data in place of patients; each step runs twice and the second is timed. Every stage runs in a process of its
own, so that the peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time

import torch

from nnunet_fratmae.networks.unetr import FratMAEUNETR
from plans.settings import Settings, WholeBody
from plans.vit_pair import PAPER_PATCH, PAPER_TOKEN
from pretraining.fratmae import FratMAEMethod, build_network
from pretraining.recipe import parameter_groups


def pretraining_step(preset: str, batch: int, device: str) -> dict[str, float]:
    settings = Settings(preset=preset, token_patch=PAPER_TOKEN, wholebody=WholeBody(patch=PAPER_PATCH))
    model = build_network(settings).to(device)
    method = FratMAEMethod(model, settings.pretrain.mask_ratio, is_cross_modal=True)
    image = torch.randn(batch, 2, *PAPER_PATCH, device=device)

    def loss(step: int) -> torch.Tensor:
        return method(image, method.draw(batch, (0, 0, step)).to(device), [None] * batch)[0]

    return measure(model, loss, device)


def finetuning_step(preset: str, batch: int, device: str) -> dict[str, float]:
    sizes = Settings(preset=preset).sizes
    model = FratMAEUNETR(
        2, 2, PAPER_PATCH, PAPER_TOKEN, sizes.embed_dim, sizes.depth, sizes.num_heads, sizes.unetr_features
    ).to(device)
    image = torch.randn(batch, 2, *PAPER_PATCH, device=device)
    target = torch.randint(2, (batch, *PAPER_PATCH), device=device)
    return measure(model, lambda _: torch.nn.functional.cross_entropy(model(image), target), device)


def measure(model: torch.nn.Module, loss, device: str) -> dict[str, float]:
    """Parameters in millions, seconds of the second optimiser step, peak memory in GB."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4)
    for step in range(2):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        value.item()  # waits for the GPU
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return {"parameters_M": round(millions, 1), "seconds": round(seconds, 2), "peak_memory_GB": round(peak / 1e9, 2)}


def peak_memory() -> int:
    """Largest resident set of this process, in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("-preset", default="vit_b")
    parser.add_argument("-batch", type=int, default=1)
    args = parser.parse_args()
    for stage in (pretraining_step, finetuning_step):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(stage, (args.preset, args.batch, args.device))
        print(json.dumps({"stage": stage.__name__, "preset": args.preset, "batch": args.batch} | result))


if __name__ == "__main__":
    main()
