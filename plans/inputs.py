"""The images of studies that are planned or predicted, checked as those that are converted."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.grids import grid_distance, times
from nnunet_fratmae.base.pool import map_cases
from nnunet_fratmae.base.units import MODALITIES, PRETRAINING_UNITS
from nnunet_fratmae.base.volumes import read_image
from nnUNet_raw_conversion.checks import checked_case
from nnUNet_raw_conversion.geometry import canonical
from plans.channels import channel_modalities

Studies = Mapping[str, tuple[list[str], str | None]]
"""Images and label file (None: there is none) by case id, as `plans.store.list_raw_studies` gives them."""
# Codes of refusals of ITK's reader, and of what is no NIfTI: nnU-Net has other readers (NibabelIO, Tiff3DIO) for these
OTHER_READERS = ("NIFTI_2", "NIFTI_SHEARED", "IMAGE_FORMAT")
NAMED = 3  # cases that a message names


def check_study(case: str, images: Mapping[str, str], reader: str = "SimpleITKIOWithReorient") -> list[str]:
    """See that a study of CT and PET can be predicted: whole files, one grid, HU and SUVbw, one body.

    Args:
        images: the file of each modality.
        reader: nnU-Net's, as plans name it; all but the default one lay voxels upon voxels wherever these lie.

    Returns:
        What the user should know, one sentence each.

    Raises:
        UserError: it cannot; the message begins with the case.
    """
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # of ITK, on headers that we look at ourselves
    notes: list[str] = []
    try:
        ct, pet = (read_image(Path(images[modality]), notes=notes) for modality in MODALITIES)
        ct, pet = on_one_grid(ct, pet, reader)
        return notes + checked_case(ct, pet, None)[3]
    except UserError as error:
        if error.code in OTHER_READERS and not reader.startswith("SimpleITK"):
            return notes
        raise UserError(f"case {case}: {error}", error.code) from None


def on_one_grid(ct: sitk.Image, pet: sitk.Image, reader: str) -> tuple[sitk.Image, sitk.Image]:
    """CT and PET as nnU-Net's `reader` lays their voxels upon each other.

    Raises:
        UserError: these lie at different places, by half a voxel or more.
    """
    if reader == "SimpleITKIOWithReorient":
        ct, pet = canonical(ct), canonical(pet)
    apart = grid_distance(ct, pet)
    if apart > min(pet.GetSpacing()) / 2:
        sizes = f"{times(ct.GetSize())} and {times(pet.GetSize())} voxels"
        how = f"voxels lie up to {apart:.3g} mm apart" if np.isfinite(apart) else sizes
        raise UserError(f"CT and PET are not on one grid ({how}); convert the study (fratmae_convert_pairs), or "
                        "resample the CT to the PET", "PAIR_GRID")  # fmt: skip
    ct.CopyInformation(pet)
    return ct, pet


def check_dataset_images(studies: Studies, dataset_json: dict[str, Any], processes: int) -> None:
    """See that all files of a raw dataset can be read to their end and have no NaN, before it is planned.

    A study that cannot be HU and SUVbw is told and taken: nnU-Net may have been told to normalise it.

    Raises:
        UserError: some cannot; the message counts them and names the first.
    """
    work = partial(_check_files, channels=channel_modalities(dataset_json))
    done = tqdm(map_cases(work, list(studies.items()), max(1, processes)), "Files", len(studies))
    results = sorted(done)
    bad = [error for _, error, _ in results if error]
    if bad:
        raise UserError(f"{len(bad)} of {len(studies)} cases cannot be used: " + "; ".join(bad[:NAMED])
                        + "; ..." * (len(bad) > NAMED))  # fmt: skip
    odd = [said for _, _, said in results if said]
    for said in odd[:NAMED]:
        print(f"WARNING: {said}")
    if len(odd) > NAMED:
        print(f"WARNING: {len(odd) - NAMED} more cases may not be HU and SUVbw")


def _check_files(study: tuple[str, tuple[list[str], str | None]], channels: list[str]) -> tuple[str, str, str]:
    """Case, what makes it unusable, what is odd about it; either may be empty."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    case, (files, labels) = study
    images: dict[str, sitk.Image] = {}
    for modality, file in zip([*channels, "labels"], [*files, labels], strict=True):
        try:
            if file is not None:
                images[modality] = read_image(Path(file))
        except UserError as error:
            if error.code not in OTHER_READERS:
                return case, f"case {case}: {error}", ""
    ct, pet = (images.get(modality) for modality in MODALITIES)
    if ct is None or pet is None:
        return case, "", ""
    if np.all(sitk.GetArrayViewFromImage(ct) == PRETRAINING_UNITS["CT"].lower):
        ct = None  # as conversion fills a CT that is missing
    try:
        notes = checked_case(ct, pet, None)[3]
    except UserError as error:
        return case, "", f"case {case}: {error}"
    return case, "", "; ".join(f"case {case}: {note}" for note in notes if note.endswith("?"))
