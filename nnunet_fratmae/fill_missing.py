"""fratmae_fill_missing: makes a folder of studies without CT or without PET predictable by nnUNetv2_predict.

A missing image becomes one of air (CT) or without uptake (PET) on the grid of the one that is there, which is what the
model saw in training with finetune.modality_dropout. What is there is linked (copied where the file system cannot).
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError, run_command
from nnunet_fratmae.base.files import refuse_bytes, writing_to
from nnunet_fratmae.base.units import MODALITIES, PRETRAINING_UNITS
from nnunet_fratmae.base.volumes import read_image
from plans.channels import channel_modalities, find_channels
from plans.inputs import on_one_grid
from plans.models import read_model_files
from plans.settings import Settings
from plans.staging import NETWORK as STAGING_NETWORK
from plans.staging import STAGING_CONFIGURATION

Case = dict[int, Path]
"""The images of a study that are there, by channel."""


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="fratmae_fill_missing", description=__doc__)
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER",
                        help="images named as in nnU-Net, CASE_0000 and CASE_0001; cases may have only one of them")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="new folder, for nnUNetv2_predict -i")
    parser.add_argument("-m", type=Path, required=True, metavar="FOLDER",
                        help="model folder that will predict: FratMAETrainer__FratMAEPlans__3d_fullres")
    run_command(parser, _run)


def _run(args: argparse.Namespace) -> None:
    plans, dataset_json = read_model(args.m)
    cases = find_cases(args.i, dataset_json)
    modalities = channel_modalities(dataset_json)
    missing = {case: [m for c, m in enumerate(modalities) if c not in images] for case, images in cases.items()}
    for case, lacking in missing.items():
        if len(lacking) > 1 or not set(lacking) <= set(dispensable(plans)):
            raise UserError(f"{args.i}: {case} has no {' and no '.join(lacking)}, and -m {args.m} was not trained for "
                            "that; train with fratmae.finetune.modality_dropout above 0, 0.3 for example")  # fmt: skip
    refuse_filled(args.o)
    reader, out = plans.get("image_reader_writer", ""), args.o.absolute()
    headers = {case: check_images(case, images, reader) for case, images in cases.items()}  # before anything is written
    partial = out.with_name(f".partial_{out.name}_{os.getpid()}")
    try:
        with writing_to(args.o):
            partial.mkdir(parents=True)
            for case, images in cases.items():
                for image in images.values():
                    link_or_copy(image, partial / image.name)
                for modality in missing[case]:
                    name = f"{case}_{modalities.index(modality):04d}{dataset_json['file_ending']}"
                    write_absent(partial / name, modality, headers[case])
                    units = PRETRAINING_UNITS[modality]
                    print(f"{name}: no {modality}, {units.lower:g} {units.unit} everywhere")
            refuse_filled(args.o)  # by the same command at the same time
            partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    filled = sum(map(bool, missing.values()))
    print(f"{len(cases)} cases, {filled} of them filled; next: nnUNetv2_predict -i {args.o} ...")


def refuse_filled(folder: Path) -> None:
    """Raises UserError where there are files in a folder already."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"-o {folder}: is not empty; name a new folder, so that nothing else is predicted")


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """plans.json and dataset.json of a model folder.

    Raises:
        UserError: they are not there, or the model is not FratMAE's, or takes one image a case.
    """
    plans, dataset_json = read_model_files(folder, "FratMAETrainer__...")
    if "fratmae" not in plans:
        raise UserError(f"-m {folder}: is no model of FratMAETrainer, so it needs CT and PET of every case")
    if len(find_channels(dataset_json)) < len(MODALITIES):
        raise UserError(f"-m {folder}: takes one image a case, so nothing can be missing")
    return plans, dataset_json


def dispensable(plans: dict[str, Any]) -> tuple[str, ...]:
    """The modalities that a trained model can do without: one that it does not see, or any if it learned to."""
    settings, whole = Settings.from_json(plans["fratmae"]), plans["configurations"].get(STAGING_CONFIGURATION, {})
    is_staging = whole.get("architecture", {}).get("network_class_name") == STAGING_NETWORK
    if settings.finetune.modality_dropout and not is_staging:
        return MODALITIES
    return tuple(modality for modality in MODALITIES if modality not in settings.used_modalities)


def find_cases(folder: Path, dataset_json: dict[str, Any]) -> dict[str, Case]:
    """The images that are there of every case in a folder of nnU-Net-named files.

    Raises:
        UserError: no images there, or one of a channel that the model does not know.
    """
    ending, modalities = dataset_json["file_ending"], channel_modalities(dataset_json)
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}")
    cases: dict[str, Case] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := pattern.fullmatch(path.name):
            if int(match[2]) >= len(modalities):
                raise UserError(f"{path}: the model has {len(modalities)} channels ({', '.join(modalities)}), 0000 is "
                                "the first; remove this file")  # fmt: skip
            cases.setdefault(match[1], {})[int(match[2])] = path
    refuse_bytes(path for images in cases.values() for path in images.values())
    if not cases:
        raise UserError(f"-i {folder}: no images CASE_0000{ending} or CASE_0001{ending} there")
    return cases


def check_images(case: str, images: Case, reader: str) -> sitk.ImageFileReader:
    """Read the images of a study to their end; the header of the first: size, spacing, origin and directions.

    Args:
        reader: nnU-Net's, as plans name it.

    Raises:
        UserError: one is not whole, is no scalar volume or has NaN, or they are not on one grid.
    """
    read = [read_image(path) for path in images.values()]
    if len(read) > 1:
        try:
            on_one_grid(*read, reader)
        except UserError as error:
            raise UserError(f"case {case}: {error}", error.code) from None
    header = sitk.ImageFileReader()
    header.SetFileName(str(next(iter(images.values()))))
    header.ReadImageInformation()
    return header


def write_absent(path: Path, modality: str, header: sitk.ImageFileReader) -> None:
    """An image of air or without uptake with the geometry of `header`.

    Raises:
        OSError: the disk did not take all of it, which ITK does not say of NIfTI.
        RuntimeError: as ITK says it of other formats.
    """
    image = sitk.Image(header.GetSize(), sitk.sitkInt16) + int(PRETRAINING_UNITS[modality].lower)
    image.SetSpacing(header.GetSpacing())
    image.SetOrigin(header.GetOrigin())
    image.SetDirection(header.GetDirection())
    sitk.WriteImage(image, str(path), useCompression=True)
    try:
        read_image(path)
    except UserError:
        raise OSError(errno.ENOSPC, "the disk took a part of it only") from None


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where that cannot be."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
