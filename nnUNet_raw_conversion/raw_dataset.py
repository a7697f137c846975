"""The nnU-Net raw dataset folder that all converters write: channels CT (HU) and PET (SUVbw), imagesPt."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import SimpleITK as sitk

from nnUNet_raw_conversion.command import UserError, nnunet_folder

FILE_ENDING = ".nii.gz"
LABELS = {"background": 0, "lesion": 1}


class RawDataset:
    """A dataset folder under construction; it takes its place in nnUNet_raw only when all went well.

    Used as a context manager: cases are written to a hidden folder beside the final one (`write_case`, also from
    worker processes, with `self.staging`), and the hidden folder is renamed at the end or removed after an error.
    """

    def __init__(self, dataset_id: int, name: str) -> None:
        """Raises UserError for an ID outside 1-999, a name nnU-Net cannot use, a taken ID or an unset variable."""
        if not 1 <= dataset_id <= 999:
            raise UserError(f"-d {dataset_id}: a dataset ID is a number from 1 to 999")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"-n {name}: a dataset name has only letters, digits, '_' and '-'")
        self.folder = nnunet_folder("nnUNet_raw") / f"Dataset{dataset_id:03d}_{name}"
        self.staging = self.folder.with_name(f".partial_{self.folder.name}")
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            for taken in Path(os.environ.get(variable) or os.devnull).glob(f"Dataset{dataset_id:03d}_*"):
                raise UserError(f"-d {dataset_id}: this ID is taken by {taken}; choose another or remove that folder")

    def __enter__(self) -> RawDataset:
        shutil.rmtree(self.staging, ignore_errors=True)
        try:
            self.staging.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"nnUNet_raw={self.folder.parent} cannot be written to ({error.strerror})") from None
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is None:
            self._write_dataset_json()
            self.staging.rename(self.folder)
        else:
            shutil.rmtree(self.staging, ignore_errors=True)

    def _write_dataset_json(self) -> None:
        """dataset.json as nnU-Net wants it, with both channels named "CT" so that stock plans keep HU and SUV
        absolute (DESIGN contract 2), and a reader that brings every image into one orientation (contract 1)."""
        labelled = sorted((self.staging / "labelsTr").glob("*" + FILE_ENDING))
        content = {
            "channel_names": {"0": "CT", "1": "CT"},
            "labels": LABELS,
            "numTraining": len(labelled),
            "file_ending": FILE_ENDING,
            "overwrite_image_reader_writer": "SimpleITKIOWithReorient",
            "fratmae": {"modalities": ["CT", "PET"], "units": ["HU", "SUVbw"]},
        }
        (self.staging / "dataset.json").write_text(json.dumps(content, indent=2))


def write_case(folder: Path, case_id: str, ct: sitk.Image, pet: sitk.Image, lesions: sitk.Image | None) -> None:
    """Write one case below `folder`: to imagesTr and labelsTr, or to imagesPt where `lesions` is None.

    Args:
        ct: HU, on the grid of `pet`; stored as int16.
        pet: SUVbw in g/ml; stored as float32.
        lesions: label image on the grid of `pet`; stored as uint8.
    """
    images = folder / ("imagesPt" if lesions is None else "imagesTr")
    images.mkdir(exist_ok=True)
    ct = sitk.Cast(sitk.Round(sitk.Clamp(ct, sitk.sitkFloat32, -32768, 32767)), sitk.sitkInt16)
    sitk.WriteImage(ct, images / f"{case_id}_0000{FILE_ENDING}", True)
    sitk.WriteImage(sitk.Cast(pet, sitk.sitkFloat32), images / f"{case_id}_0001{FILE_ENDING}", True)
    if lesions is not None:
        (folder / "labelsTr").mkdir(exist_ok=True)
        sitk.WriteImage(sitk.Cast(lesions, sitk.sitkUInt8), folder / "labelsTr" / f"{case_id}{FILE_ENDING}", True)
