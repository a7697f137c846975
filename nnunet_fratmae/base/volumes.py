"""Image files read whole, or named in one line: the one reader of conversion, planning and prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nibabel.nifti1 import Nifti1PairHeader

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.files import as_text
from nnunet_fratmae.base.nifti import (
    NIFTI_ENDINGS,
    check_bytes,
    check_dimensions,
    check_places,
    checked_nifti,
    ending,
    refuse_not_finite,
)

WHOLE_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd", ".mnc")  # ITK says itself where one of these ends too early
RAW_ENDINGS = (".gipl", ".vtk")  # it does not for these, which have all voxels uncompressed


def read_image(path: Path, called: str | None = None, notes: list[str] | None = None) -> sitk.Image:
    """Read a scalar 3D image, with the voxel type that the file has.

    Args:
        called: what messages say instead of the path, where names of folders and files may be those of patients.
        notes: gets a sentence for what is odd in the header and does no harm.

    Raises:
        UserError: the file is missing, is not whole, is not a scalar 3D image, has NaN voxels, is larger than
            `LARGEST_BYTES`, or (NIfTI) its header says what cannot be, or two things about where the voxels lie.
    """
    path = Path(path)
    name, notes = called or str(path), [] if notes is None else notes
    if not path.is_file():
        raise UserError(f"{name}: there is no such file; add it or correct its name")
    kind = ending(path)
    if kind not in NIFTI_ENDINGS + WHOLE_ENDINGS + RAW_ENDINGS:
        raise UserError(f"{name}: of this format ({kind or 'no ending'}) it cannot be seen whether a file is whole and "
                        "where its voxels lie; save it as .nii.gz, .nrrd or .mha (DICOM: fratmae_convert_ghsg)",
                        "IMAGE_FORMAT")  # fmt: skip
    header = checked_nifti(path, name) if kind in NIFTI_ENDINGS else None
    reader = sitk.ImageFileReader()
    try:
        with as_text(path) as readable:
            reader.SetFileName(str(readable))
            reader.ReadImageInformation()
            size, itk_size = reader.GetSize(), reader.GetNumberOfComponents() * _item_bytes(reader)
            check_dimensions(len(size), reader.GetNumberOfComponents(), name)
            check_bytes(size, itk_size, name)
            if kind in RAW_ENDINGS and path.stat().st_size < np.prod(size, dtype=float) * itk_size:
                raise UserError(f"{name}: ends too early; copy or download it again", "IMAGE_CUT_OFF")
            image = reader.Execute()
    except RuntimeError as error:
        raise _unreadable(path, name, "" if called else _reason(error), header) from None
    if header is not None:
        check_places(header, image, name, notes)
    elif image.GetPixelID() in (sitk.sitkFloat32, sitk.sitkFloat64):
        check_finite(sitk.GetArrayViewFromImage(image), name)
    return image


def check_finite(voxels: np.ndarray, what: str) -> None:
    """Raises UserError, beginning with `what`, if there are voxels that are NaN or infinite."""
    refuse_not_finite(voxels.size - np.count_nonzero(np.isfinite(voxels)), what)


def _unreadable(path: Path, name: str, said: str, header: Nifti1PairHeader | None) -> UserError:
    """What it means that ITK, which said `said`, cannot read a file; `header` is there if it is NIfTI and whole."""
    if header is None:
        return UserError(f"{name}: cannot be read{said}; it is cut off, or no image; copy or export it again",
                         "IMAGE_CUT_OFF")  # fmt: skip
    if not path.name.endswith(ending(path)):
        return UserError(f"{name}: ITK does not know this ending; write it in small letters ({ending(path)})",
                         "IMAGE_NAME")  # fmt: skip
    matrix = header.get_sform()[:3, :3]
    axes = matrix / np.maximum(np.linalg.norm(matrix, axis=0), 1e-9)
    sheared = np.degrees(np.arcsin(min(1, np.abs(axes.T @ axes - np.eye(3)).max())))
    if header["sform_code"] > 0 and sheared > 1e-3:
        return UserError(f"{name}: its axes are not at right angles (sform is sheared by {sheared:.2g} degrees), which "
                         "nnU-Net's reader (ITK) does not take; resample it to a straight grid (nibabel.processing."
                         "resample_to_output), the labels with it", "NIFTI_SHEARED")  # fmt: skip
    return UserError(f"{name}: is whole, but ITK cannot read it{said}; save it anew as .nii.gz", "IMAGE_FORMAT")


def _reason(error: RuntimeError) -> str:
    """What the last line of an exception of ITK says, but where it is MetaImage's, which names a wrong reason."""
    last = str(error).strip().splitlines()[-1].split("): ")[-1]
    return "" if "No such file" in last else f" ({last})"


def _item_bytes(reader: sitk.ImageFileReader) -> int:
    return sitk.Image([1] * 3, reader.GetPixelID()).GetSizeOfPixelComponent()
