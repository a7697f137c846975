"""Peak memory of a fine-tuning step: plans/memory.py against what is measured, for plans of different sizes.

python benchmarks/memory_model.py [-device cpu|cuda] [-o benchmarks/results/memory_model_cpu.json]

Random data, nnU-Net's Dice + CE and our AdamW; two steps, each plan in a process of its own. On a CPU the peak is that
of the resident set less what Python and its libraries had before the network was built, and the C library gives freed
tensors back at once (MALLOC_MMAP_THRESHOLD_), or a heap in pieces would be measured. On a GPU it is torch's, and the
model's allowance for context and workspace is taken off its figure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
from pathlib import Path

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_fratmae.networks.unetr import FratMAEUNETR
from nnunet_fratmae.optimization import parameter_groups
from plans.memory import FIXED_GB, GB, step_memory
from plans.settings import PRESETS

PLANS = [  # preset, token patch, patch, batch
    ("vit_tiny", (8, 16, 16), (16, 64, 96), 8),
    ("vit_tiny", (4, 8, 8), (40, 40, 64), 6),
    ("vit_s", (4, 8, 8), (32, 80, 96), 2),
    ("vit_tiny", (8, 16, 16), (32, 160, 192), 1),
    ("vit_tiny", (8, 16, 16), (32, 96, 128), 4),
    ("vit_b", (8, 16, 16), (16, 64, 96), 4),
    ("vit_s", (8, 16, 16), (32, 160, 192), 2),
    ("vit_b", (8, 16, 16), (32, 96, 128), 2),
    ("vit_b", (8, 16, 16), (32, 160, 192), 1),
    ("vit_b", (8, 16, 16), (32, 160, 192), 2),
]


def measure(preset: str, token: tuple, patch: tuple, batch: int, device: str) -> float:
    """GB at the fullest moment of two steps, in this process."""
    sizes = PRESETS[preset]
    before = resident_memory() if device == "cpu" else 0
    network = FratMAEUNETR(2, 2, patch, token, **sizes.encoder, features=sizes.unetr_features).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(network, 1e-4, 0.01, 1.0))
    loss = DC_and_CE_loss(
        {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, dice_class=MemoryEfficientSoftDiceLoss
    )
    for _ in range(2):
        image = torch.randn(batch, 2, *patch, device=device)
        target = torch.randint(2, (batch, 1, *patch), device=device).float()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            value = loss(network(image), target)
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
    return (torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory() - before) / GB


def peak_memory() -> int:
    """Largest resident set of this process, in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory() -> int:
    """Resident set of this process now, in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("-o", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # of the processes that are started below
    result = {"device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
              "torch": torch.__version__, "threads": torch.get_num_threads(), "plans": []}  # fmt: skip
    print("preset    token    patch        batch  predicted  measured  error")
    for preset, token, patch, batch in PLANS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured = pool.apply(measure, (preset, token, patch, batch, args.device))
        predicted = step_memory(PRESETS[preset], token, patch, batch, device=args.device)
        predicted -= FIXED_GB["cuda"] if args.device == "cuda" else 0
        error = predicted / measured - 1
        sizes = f"{preset:9} {'x'.join(map(str, token)):8} {'x'.join(map(str, patch)):13}{batch:5}"
        print(f"{sizes}  {predicted:6.2f} GB {measured:6.2f} GB  {error:+.1%}", flush=True)
        row = {"preset": preset, "token_patch": token, "patch": patch, "batch": batch}
        row |= {"predicted_GB": round(predicted, 3), "measured_GB": round(measured, 3), "error": round(error, 4)}
        result["plans"].append(row)
        if args.o:
            args.o.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"largest error {max(abs(row['error']) for row in result['plans']):.1%}")


if __name__ == "__main__":
    main()
