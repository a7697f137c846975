"""Whether a CT lies where the PET's body is, as far as the images show it: for a CT of another frame of reference."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.hu_suv import AIR_HU
from nnUNet_raw_conversion.checks import LEAST_OUTLINE_AGREEMENT, outline_agreement
from nnUNet_raw_conversion.geometry import resample_to

COARSE_MM = 8.0
SHIFTS = (3, 6)
"""Voxels of `COARSE_MM`, thus 24 and 48 mm."""
# By how much a shift must agree better to tell that the place is wrong; noise of the PET makes less.
CLEARLY = 0.02


def check_place(ct: sitk.Image, pet: sitk.Image) -> str:
    """What confirms that CT and PET share their place, one sentence.

    The outlines of the body (see `checks.outline_agreement`) must agree where the headers put them, and no shift of the
    CT by 24 or 48 mm along an axis may agree clearly better.

    Raises:
        UserError: they do not agree, or the images show too little air to tell.
    """
    size = np.maximum(np.ceil(np.multiply(pet.GetSize(), pet.GetSpacing()) / COARSE_MM), 1).astype(int).tolist()
    grid = sitk.Image(size, sitk.sitkUInt8)
    grid.SetSpacing([COARSE_MM] * 3)
    grid.SetDirection(pet.GetDirection())
    grid.SetOrigin(pet.GetOrigin())
    ct, pet = resample_to(ct, grid, AIR_HU), resample_to(pet, grid, 0)
    here = outline_agreement(ct, pet)
    if here is None:
        raise UserError("CT: is in another frame of reference than the PET, and the images show too little air around "
                        "the body to tell whether it lies in the same place; give a CT in the PET's frame of "
                        "reference, or remove it and say --allow-missing-ct", "CT_OTHER_FRAME")  # fmt: skip
    shifted = [_shifted(ct, pet, axis, n) for axis in range(3) for shift in SHIFTS for n in (shift, -shift)]
    best = max((value for value in shifted if value is not None), default=0.0)
    if here < LEAST_OUTLINE_AGREEMENT or best > here + CLEARLY:
        raise UserError("CT: is in another frame of reference than the PET, and its body lies elsewhere (agreement "
                        f"{here:.2f}, {best:.2f} when it is shifted); register it to the PET, or "
                        "remove it and say --allow-missing-ct", "CT_OTHER_FRAME")  # fmt: skip
    return ("the CT is of another frame of reference; taken by --trust-study, the outlines of the body agree "
            f"({here:.2f})")  # fmt: skip


def _shifted(ct: sitk.Image, pet: sitk.Image, axis: int, n: int) -> float | None:
    """The agreement with the CT moved by `n` voxels along an axis, where both are there."""
    size = list(ct.GetSize())
    size[axis] -= abs(n)
    if size[axis] < 4:
        return None
    starts = [[0, 0, 0], [0, 0, 0]]
    starts[n < 0][axis] = abs(n)
    one, other = (sitk.RegionOfInterest(image, size, start) for image, start in zip((ct, pet), starts, strict=True))
    one.CopyInformation(other)
    return outline_agreement(one, other)
