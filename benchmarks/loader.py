"""Patches per second that the loader delivers at the paper's size, from disk and from memory, and what it reads.

python benchmarks/loader.py [-needed PATCHES_PER_SECOND] [-device cpu|cuda] [-o benchmarks/results/loader_cpu.json]

Synthetic studies of 160x160x192 voxels (a body with organs and noise, air around it) are written as the store writes
them, and patches of 32x160x192 are drawn as a pretraining draws them, augmentation included. The files are dropped from
the page cache before each measurement. CPU seconds a patch, all processes together, are given beside the speed, since
they do not hang on what else the machine does. `-needed` is what the GPU takes: patches_per_second of metrics.jsonl
where data_wait is about 0, or batch / seconds of benchmarks/full_size.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from scipy import ndimage
from torch.utils.data import DataLoader

from nnunet_fratmae.base.units import PRETRAINING_UNITS
from plans.settings import Pretrain, Settings, WholeBody
from plans.views import Batches, Views
from plans.vit_pair import PAPER_K, PAPER_PATCH, PAPER_TOKEN
from pretraining.data import Case, DiskPatches, MemoryPatches
from pretraining.engine import _start_loading

GRID, BATCH = (160, 160, 192), 4
WHOLE = WholeBody(grid=GRID, patch=PAPER_PATCH, k=PAPER_K)


def write_study(path: Path, generator: np.random.Generator) -> None:
    """CT and PET of an ellipse of soft tissue with lumps of fat to bone and of uptake, noise in the body only."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in GRID), indexing="ij", sparse=True)
    body = (axes[0] / 0.55) ** 2 + (axes[1] / 0.75) ** 2 + (axes[2] / 0.98) ** 4 < 1
    coarse = generator.standard_normal((2, *(n // 8 for n in GRID)))
    lumps = np.stack([ndimage.zoom(volume, 8, order=1) for volume in coarse])
    noise = generator.standard_normal((2, *GRID))
    hu = np.where(body, 40 + 120 * lumps[0] + 15 * noise[0], PRETRAINING_UNITS["CT"].lower)
    suv = np.where(body, np.exp(0.7 * lumps[1]) * (1 + 0.1 * noise[1]), 0)
    data = [(np.clip(v, u.lower, u.upper) - u.mean) / u.std
            for v, u in zip((hu, suv), (PRETRAINING_UNITS[m] for m in ("CT", "PET")), strict=True)]  # fmt: skip
    slice_chunk = (1, 1, *GRID[1:])  # as plans/store.py writes them
    nnUNetDatasetBlosc2.save_case(np.stack(data).astype(np.float16), np.zeros((1, *GRID), np.int8), {},
                                  str(path.with_suffix("")), chunks=slice_chunk, blocks=slice_chunk)  # fmt: skip


def drop_from_cache(cases: list[Case]) -> None:
    for case in cases:
        with case.path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def share_of_bytes(cases: list[Case], views: Views) -> float:
    """Bytes that one patch of each case reads (Linux counts them), of the bytes of its file."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text(encoding="utf-8").split("rchar:")[1].split()[0])

    before = count()
    for index, case in enumerate(cases):
        case.read_window(views((0, index)).window)
    return (count() - before) / sum(case.path.stat().st_size for case in cases)


def measure(loader: Iterable, skip: int) -> dict[str, float]:
    """Patches per second after the first `skip` batches, in which the processes start; CPU seconds of one patch."""
    start, count, all_patches, cpu = time.perf_counter(), 0, 0, cpu_seconds()
    for number, (images, _) in enumerate(loader):
        all_patches += len(images)
        if number == skip:
            start, count = time.perf_counter(), 0
        else:
            count += len(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    speed = count / (time.perf_counter() - start)
    return {"patches_per_second": round(speed, 1), "cpu_seconds": round((cpu_seconds() - cpu) / all_patches, 4)}


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-needed", type=float, metavar="N", help="patches per second that the GPU takes")
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu", help="which memory holds MemoryPatches")
    parser.add_argument("-cases", type=int, default=12)
    parser.add_argument("-patches", type=int, default=96, help="of each measurement")
    parser.add_argument("-workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("-o", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    options = Settings(preset="vit_b", token_patch=PAPER_TOKEN, wholebody=WHOLE, pretrain=Pretrain()).pretrain
    with tempfile.TemporaryDirectory() as folder:
        cases = [Case(Path(folder) / f"{i}.b2nd", f"Dataset000_Synthetic/{i}", (0, 1)) for i in range(args.cases)]
        for number, case in enumerate(cases):
            write_study(case.path, np.random.default_rng(number))
        views = Views(None, len(cases), WHOLE, options)
        batches = Batches(args.patches, BATCH, BATCH, 0, 1, seed=0)
        result = {"machine": platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
                  "file_MB": round(cases[0].path.stat().st_size / 1e6, 1),
                  "raw_MB": round(4 * float(np.prod(GRID)) / 1e6, 1),
                  "share_of_bytes_read": round(share_of_bytes(cases, views), 3), "needed": args.needed,
                  "sources": {}}  # fmt: skip
        for workers in args.workers:
            drop_from_cache(cases)
            loader = DataLoader(DiskPatches(cases, views), batch_sampler=batches, num_workers=workers,
                                worker_init_fn=_start_loading)  # fmt: skip
            result["sources"][f"disk, {workers} workers"] = measure(loader, skip=workers)
        memory = MemoryPatches(cases, views, batches, torch.device(args.device))
        result["sources"][f"memory, {args.device}"] = measure(memory, skip=1)
    print(f"a file has {result['file_MB']} MB ({result['raw_MB']} as float16), a patch reads "
          f"{result['share_of_bytes_read']:.1%} of it")  # fmt: skip
    for name, row in result["sources"].items():
        speed = row["patches_per_second"]
        enough = "" if args.needed is None else f", {speed / args.needed:.2f} times what is needed"
        print(f"{name}: {speed:.1f} patches/s, {1000 * row['cpu_seconds']:.0f} ms of CPU a patch{enough}")
    if args.o:
        args.o.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
