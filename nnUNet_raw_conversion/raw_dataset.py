"""The nnU-Net raw dataset folder that all converters write: channels CT (HU) and PET (SUVbw), imagesPt."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError, nnunet_folder
from nnunet_fratmae.base.files import plain_name, writing_to
from nnunet_fratmae.base.locks import locked
from nnUNet_raw_conversion.geometry import canonical, grid_distance

FILE_ENDING = ".nii.gz"
LABELS = {"background": 0, "lesion": 1}
PARTS = ("Tr", "Ts", "Pt")
""" Labelled training cases, test cases (with or without labels), images for pretraining only (without)."""
OPTIONS = "conversion_options.json"
LOCK = ".lock"
LARGEST_ID = 999  # nnU-Net takes Dataset1234_X for dataset 123 as well (utilities/dataset_name_id_conversion.py)
LARGEST_ERROR_MM = 0.01  # of the place of a voxel, by the single precision of NIfTI's headers


class RawDataset:
    """A dataset folder under construction; it takes its place in nnUNet_raw only when all went well.

    Cases are written to a hidden folder beside the final one (`write_case`, also from worker processes, with
    `self.staging`), which is renamed at the end, so that nnU-Net never meets a dataset that is not complete. Either as
    a context manager, which begins anew and removes the hidden folder after an error; or by `resume` and `finish`,
    between which a run may be killed at any time and go on later.
    """

    def __init__(self, dataset_id: int, name: str) -> None:
        """Raises UserError for an ID outside 1-999, a name nnU-Net cannot use, a taken ID or an unset variable."""
        if not 1 <= dataset_id <= LARGEST_ID:
            raise UserError(f"-d {dataset_id}: a dataset ID is a number from 1 to {LARGEST_ID} (three digits, as in "
                            "nnU-Net's names)")  # fmt: skip
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"-n {name}: a dataset name has only letters, digits, '_' and '-'")
        self.id, self.folder = dataset_id, nnunet_folder("nnUNet_raw") / f"Dataset{dataset_id:03d}_{name}"
        self.staging = self.folder.with_name(f".partial_{self.folder.name}")
        self._is_locked = False
        self.refuse_taken()

    def refuse_taken(self) -> None:
        """Raises UserError if another dataset has this ID.

        An ID is not taken by a dataset of this name that `finish` made: it can be resumed.
        """
        ours = (self.folder / OPTIONS).exists() or ((self.staging / OPTIONS).exists() and not self.folder.exists())
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            for there in Path(os.environ.get(variable) or os.devnull).glob(f"Dataset{self.id:03d}_*"):
                if not (ours and there.name == self.folder.name):
                    raise UserError(f"-d {self.id}: this ID is taken by {there}; choose another, or remove that")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While this is entered no other command writes a dataset of this ID; may be entered again within.

        Raises:
            UserError: another command does, or the ID was taken meanwhile.
            WriteError: nnUNet_raw cannot be written to.
        """
        if self._is_locked:
            yield
            return
        with writing_to(self.folder.parent):
            is_new = not self.where.exists()
            self.where.mkdir(parents=True, exist_ok=True)
            before = self.where.stat().st_mtime_ns
        with locked(self.where / LOCK, f"dataset {self.id} in {self.folder.parent}"):
            self._is_locked, since = True, self.where.stat().st_mtime_ns
            try:
                if not (self.where / LOCK).exists():  # renamed while we came to lock it
                    raise UserError(f"dataset {self.id} in {self.folder.parent} was just finished by another command; "
                                    "say the same again", "IN_USE")  # fmt: skip
                self.refuse_taken()
                yield
            finally:
                self._is_locked = False
                self._unlock(is_new, before, since)

    def _unlock(self, is_new: bool, before: int, since: int) -> None:
        """Remove the lock from where the folder is now, and the hidden folder if nothing got into it.

        A folder in which nothing happened since it was locked keeps the time of change that it had before.
        """
        where = self.where
        same = where.exists() and where.stat().st_mtime_ns == since
        (where / LOCK).unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):  # unless there is something in it
                self.staging.rmdir()
        elif same:
            os.utime(where, ns=(where.stat().st_atime_ns, before))

    def __enter__(self) -> RawDataset:
        self._lock = self.locked()
        self._lock.__enter__()
        try:
            self._begin()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def _begin(self) -> None:
        self.refuse_existing()
        self._clear()

    def __exit__(self, error_type: type | None, *_: object) -> None:
        try:
            if error_type is None:
                self.finish()
            else:
                shutil.rmtree(self.staging, ignore_errors=True)
        finally:
            self._lock.__exit__(None, None, None)

    def _clear(self) -> None:
        """Remove what is in the hidden folder, but not our lock."""
        with writing_to(self.staging):
            for there in [there for there in self.staging.iterdir() if there.name != LOCK]:
                if there.is_dir() and not there.is_symlink():
                    shutil.rmtree(there)
                else:
                    there.unlink()

    @property
    def where(self) -> Path:
        """The folder that holds what there is of the dataset: the final one if it is complete, else the hidden one."""
        return self.folder if self.folder.exists() else self.staging

    def refuse_existing(self) -> None:
        """Raises UserError if the dataset is complete already."""
        if self.folder.exists():
            raise UserError(f"{self.folder} is there already; choose another ID or name, or remove that folder")

    def refuse_other_options(self, options: dict) -> None:
        """Raises UserError if cases were converted with other options (as JSON)."""
        there, options = self.where, json.loads(json.dumps(options))  # as it is when read back
        path = there / OPTIONS
        before = read_json(path) if path.exists() else options
        if not isinstance(before, dict):
            raise UserError(f"{path}: is damaged; remove {there}, or choose another -d")
        if before != options and any(there.glob(f"images*/*{FILE_ENDING}")):
            key = next(k for k in sorted({*before, *options}) if before.get(k) != options.get(k))
            raise UserError(f"{there} was begun with {key}={before.get(key)}, now it is {options.get(key)}; "
                            "say the same as before, choose another -d, or remove that folder")  # fmt: skip

    def resume(self, options: dict) -> None:
        """Begin, or go on with what an earlier run left: the hidden folder is there afterwards, the final one not.

        Args:
            options: what has to be the same for all cases, as JSON.

        Raises:
            UserError: cases were converted with other options, or nnUNet_raw cannot be written to.
        """
        self.refuse_other_options(options)
        there = self.where
        if not (there / OPTIONS).exists():  # what another command left when it was killed
            self.refuse_existing()
            self._clear()
        with writing_to(self.folder.parent):
            if there == self.folder:
                self.folder.rename(self.staging)
            shutil.rmtree(self.staging / ".writing", ignore_errors=True)
            self.staging.mkdir(parents=True, exist_ok=True)
            write_text(self.staging, OPTIONS, json.dumps(options, indent=2))

    def finish(self) -> None:
        """Write dataset.json and put the folder in its place, if it is not there.

        dataset.json is as nnU-Net wants it, with both channels named "CT" so that stock plans keep HU and SUV absolute
        (DESIGN contract 2), and a reader that brings every image into one orientation (contract 1)."""
        there = self.where
        labelled = sorted((there / "labelsTr").glob("*" + FILE_ENDING))
        content = {
            "channel_names": {"0": "CT", "1": "CT"},
            "labels": LABELS,
            "numTraining": len(labelled),
            "file_ending": FILE_ENDING,
            "overwrite_image_reader_writer": "SimpleITKIOWithReorient",
            "fratmae": {"modalities": ["CT", "PET"], "units": ["HU", "SUVbw"]},
        }
        write_text(there, "dataset.json", json.dumps(content, indent=2))
        with writing_to(self.folder.parent):
            shutil.rmtree(there / ".writing", ignore_errors=True)
            if there != self.folder:
                self.refuse_taken()
                there.rename(self.folder)


def write_case(
    folder: Path, case_id: str, ct: sitk.Image, pet: sitk.Image, lesions: sitk.Image | None, part: str | None = None
) -> list[str]:
    """Write one case below `folder`, in canonical orientation; the paths of its files, relative to `folder`.

    Args:
        ct: HU, on the grid of `pet`; stored as int16.
        pet: SUVbw in g/ml; stored as float32.
        lesions: label image on the grid of `pet`; stored as uint8.
        part: one of `PARTS`; without it, "Pt" where `lesions` is None, else "Tr".

    Raises:
        WriteError: the disk is full, or the like.
        UserError: the grid cannot be stored in a NIfTI file within 0.01 mm, or "Tr" without lesions.
    """
    part = part or ("Pt" if lesions is None else "Tr")
    if part == "Tr" and lesions is None:
        raise UserError("has no lesion segmentation; add it, or leave the case for pretraining only (--unlabelled)")
    ct = sitk.Cast(sitk.Round(sitk.Clamp(ct, sitk.sitkFloat32, -32768, 32767)), sitk.sitkInt16)
    images = {f"images{part}/{case_id}_0000{FILE_ENDING}": ct}
    images[f"images{part}/{case_id}_0001{FILE_ENDING}"] = sitk.Cast(pet, sitk.sitkFloat32)
    if lesions is not None and part != "Pt":
        images[f"labels{part}/{case_id}{FILE_ENDING}"] = sitk.Cast(lesions, sitk.sitkUInt8)
    for name, image in images.items():
        _write_nifti(folder, name, canonical(image))
    return list(images)


def case_files(case_id: str) -> list[str]:
    """The paths, relative to the dataset, of all files that `write_case` may write for a case, to whichever part."""
    names = []
    for part in PARTS:
        names += [f"images{part}/{case_id}_{channel:04d}{FILE_ENDING}" for channel in (0, 1)]
        names.append(f"labels{part}/{case_id}{FILE_ENDING}")
    return names


def remove_case(folder: Path, case_id: str) -> None:
    """Remove the files that `write_case` may have written for a case."""
    for name in case_files(plain_name(case_id, f"{folder}: the case {case_id!r}")):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def new_file(folder: Path, name: str) -> Iterator[Path]:
    """A path to write to, which is renamed to `folder / name` at the end: that file is there whole or not at all.

    It lies in a folder of its own: nnU-Net counts every file in imagesTr that ends in .nii.gz, hidden ones as well.

    Raises:
        WriteError: the disk is full, or the like.
    """
    target = folder / name
    partial = folder / ".writing" / f"{os.getpid()}_{target.parent.name}_{target.name}"
    with writing_to(folder):
        try:
            for parent in (partial.parent, target.parent):
                parent.mkdir(exist_ok=True)
            yield partial
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_text(folder: Path, name: str, text: str) -> None:
    """Write the file `name` below `folder` whole or not at all (UTF-8), unless it is there with this text.

    What is no UTF-8 in a name of a file is written as \\udcfc.
    """
    target, content = folder / name, text.encode(errors="backslashreplace")
    if target.is_file() and target.read_bytes() == content:
        return
    with new_file(folder, name) as partial:
        partial.write_bytes(content)


def read_json(path: Path) -> object:
    """What is in a json file, or None if that is none: cut off, of other bytes, or nested without end."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None


def _write_nifti(folder: Path, name: str, image: sitk.Image) -> None:
    """By nibabel, because ITK (5.4) writes to a full disk without a word. Read back by ITK, as nnU-Net does."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine = np.diag((-1, -1, 1, 1)) @ affine  # ITK and DICOM: left, back, head; NIfTI: right, front, head
    nifti = nibabel.Nifti1Image(sitk.GetArrayViewFromImage(image).T, affine)
    nifti.set_qform(affine, "scanner")
    nifti.set_sform(affine, "scanner")
    nifti.header.set_xyzt_units("mm")
    with new_file(folder, name) as partial:
        nibabel.save(nifti, partial)
        error = grid_distance(_header_of(partial), image)
        if not error <= LARGEST_ERROR_MM:
            raise UserError(f"the grid cannot be stored as NIfTI: voxels would lie {error:.2g} mm off; "
                            "are origin and spacing right?")  # fmt: skip


def _header_of(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader
