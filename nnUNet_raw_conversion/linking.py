"""Hard links instead of copies where a file of a dataset is just what was there before."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import nibabel
import numpy as np

from nnUNet_raw_conversion.conversion import read_row
from nnUNet_raw_conversion.raw_dataset import write_text

FREE_TEXT = ("descrip", "aux_file", "db_name", "intent_name")  # where converters put what they like


def link_unchanged(folder: Path, case_id: str, sources: Mapping[str, Path]) -> tuple[int, int]:
    """Put hard links in the place of a converted case's files that are equal to their sources.

    Not symbolic ones, for a path may have the names of patients, and not where the header has any text of its own.

    Args:
        folder: of the dataset. sources: the file that each of "CT", "PET" and "lesions" was made of.

    Returns:
        How many files are links now, and how many could not be since the file system has no links (to there).
    """
    row_file = folder / "conversion" / f"{case_id}.json"
    row = read_row(row_file)
    ends = {"CT": f"/{case_id}_0000.nii.gz", "PET": f"/{case_id}_0001.nii.gz", "lesions": f"/{case_id}.nii.gz"}
    linked = refused = 0
    for what, source in sources.items():
        for name in [name for name in row["files"] if name.endswith(ends[what])]:
            target = folder / name
            if os.path.samefile(target, source):
                linked += 1
            elif _same_content(target, source):
                partial = folder / f".link_{target.name}"
                try:
                    os.link(source.resolve(), partial)
                except OSError:
                    refused += 1
                    continue
                os.replace(partial, target)
                row["files"][name] = target.stat().st_size
                linked += 1
    if linked:
        write_text(folder, str(row_file.relative_to(folder)), json.dumps(row, indent=1))
    return linked, refused


def _same_content(target: Path, source: Path) -> bool:
    """Whether two NIfTI files have the same voxels of the same type at the same places, and `source` no text."""
    with source.open("rb") as stream:
        start = stream.read(4)
    # gzip, pigz and Python put the name of what they packed into the header (RFC 1952: FEXTRA, FNAME, FCOMMENT)
    if source.name[-7:].lower() != ".nii.gz" or start[:2] != b"\x1f\x8b" or start[3] & 0b11100:
        return False
    a, b = nibabel.load(target), nibabel.load(source)
    if a.shape != b.shape or a.get_data_dtype() != b.get_data_dtype() or not np.allclose(a.affine, b.affine, atol=1e-4):
        return False
    if b.header.extensions or any(b.header[field].item().strip(b"\0 ") for field in FREE_TEXT):
        return False
    if (b.dataobj.slope, b.dataobj.inter) != (1, 0) or b.header["qform_code"] == 0:  # ITK reads qform first
        return False
    return np.array_equal(np.asanyarray(a.dataobj), np.asanyarray(b.dataobj))
