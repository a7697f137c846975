"""SUV factors by hand against computed, and what converting a DICOM study costs against reading its files once.

python -m benchmarks.convert_dicom        (in the project's folder; needs ../shared/data)

Prints both tables and writes them to benchmarks/results/convert_dicom.json. Every figure is of a process of its own:
seconds from when everything is imported (the files were read before, so that the disk does not count), and the peak
memory of the process, of which the imports alone are given as well.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pydicom

from nnUNet_raw_conversion import ghsg
from nnUNet_raw_conversion.dicom.suv import suv_factors
from tests.suv_headers import BY_HAND, REAL, real_headers

STUDIES = [REAL / "wholebody_fdg_dicom" / "STS_001"]
STUDIES += [REAL / "sts_dicom" / f"STS_{number}" for number in ("002", "003", "008", "019")]
RESULT = Path(__file__).parent / "results" / "convert_dicom.json"


def suv_table() -> list[dict]:
    """The factor of each header by hand and computed, and their relative difference."""
    rows = []
    for name, by_hand in BY_HAND.items():
        headers = real_headers(name)
        computed = float(suv_factors(headers)[0][0])
        rows.append({"header": name, "units": headers[0].Units, "by_hand": by_hand, "computed": computed,
                     "difference": abs(computed / by_hand - 1)})  # fmt: skip
    return rows


def imports_only(study: Path) -> None:
    """Nothing: what this process needs before it begins."""


def read_once(study: Path) -> None:
    """All files of a study once, with their voxels."""
    for file in sorted(study.rglob("*.dcm")):
        dataset = pydicom.dcmread(file)
        if "PixelData" in dataset:
            _ = dataset.pixel_array


def convert(study: Path) -> None:
    """fratmae_convert_ghsg of the one study in this process: scan, SUV, contours, NIfTI files, picture, tables."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["nnUNet_raw"] = folder
        sys.argv = ["fratmae_convert_ghsg", "-i", str(study), "-d", "522", "-np", "1", "--allow-missing-ct",
                    "--lesion-roi", "GTV_Mass", "--key-file", f"{folder}/keys.csv"]  # fmt: skip
        ghsg.main()


def measure(function: Callable[[Path], None], study: Path) -> tuple[float, float]:
    """Seconds, and peak memory of this process in MB."""
    start = time.perf_counter()
    function(study)
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cost_table() -> list[dict]:
    rows, spawn = [], multiprocessing.get_context("spawn")
    for study in STUDIES:
        files = [file for file in study.rglob("*") if file.is_file()]
        row = {"study": study.name, "files": len(files), "mb": sum(file.stat().st_size for file in files) / 2**20}
        read_once(study)
        for function in (imports_only, read_once, convert):
            with ProcessPoolExecutor(1, spawn) as pool:
                seconds, memory = pool.submit(measure, function, study).result()
            row |= {f"{function.__name__}_s": round(seconds, 2), f"{function.__name__}_mb": round(memory)}
        rows.append(row)
    return rows


def main() -> None:
    result = {"date": date.today().isoformat(), "machine": f"{platform.processor() or platform.machine()}, "
              f"{os.cpu_count()} cores, Python {platform.python_version()}, pydicom {version('pydicom')}",
              "suv_factors": suv_table(), "studies": cost_table()}  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{'header':36s} {'units':5s} {'by hand':>13s} {'computed':>13s} {'difference':>10s}")
    for row in result["suv_factors"]:
        print(f"{row['header']:36s} {row['units']:5s} {row['by_hand']:13.7g} {row['computed']:13.7g} "
              f"{row['difference']:10.1e}")  # fmt: skip
    print(f"\n{'study':8s} {'files':>5s} {'MB':>5s} {'read once':>16s} {'converted':>16s} {'imports':>8s}")
    for row in result["studies"]:
        costs = "".join(f"{row[f'{name}_s']:6.2f} s {row[f'{name}_mb']:4d} MB " for name in ("read_once", "convert"))
        print(f"{row['study']:8s} {row['files']:5d} {row['mb']:5.1f} {costs}{row['imports_only_mb']:5d} MB")


if __name__ == "__main__":
    main()
