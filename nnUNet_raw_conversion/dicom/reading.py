"""PET and CT of a visit as images: of one series or several, whole or not at all, the next best CT if one is faulty."""

from __future__ import annotations

from collections.abc import Sequence

import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.beds import join, kind_of
from nnUNet_raw_conversion.dicom.choose import ENOUGH, choose_ct, coverage, label, same_frame
from nnUNet_raw_conversion.dicom.index import Series
from nnUNet_raw_conversion.dicom.overrides import SuvOverride
from nnUNet_raw_conversion.dicom.place import check_place
from nnUNet_raw_conversion.dicom.suv import read_suv
from nnUNet_raw_conversion.dicom.volume import read_volume
from nnUNet_raw_conversion.dicom.voxels import EMPTY


def read_pet(pet: Series, override: SuvOverride | None = None) -> tuple[sitk.Image, list[str]]:
    """The PET of a visit in SUVbw, and what the user should know; each of its series by the SUV factors of its own.

    Raises:
        UserError: see `suv.read_suv`; or files beside its slices cannot be read, see `refuse_lost`.
    """
    images, notes = [], list(pet.remarks)
    for part in pet.parts:
        refuse_lost(part)
        image, said = read_suv(part, override)
        images.append(image)
        notes += said
    return images[0] if len(images) == 1 else join(images, EMPTY["PT"]), list(dict.fromkeys(notes))


def read_ct(
    series: Sequence[Series], pet: Series, suv: sitk.Image, trust_study: bool = False
) -> tuple[sitk.Image | None, Series | None, str, list[str]]:
    """The CT of a visit in HU, its series, why this one, and what the user should know; None and why there is none.

    If the best one has a fault (two passes in one series, slices that are missing) the next best is taken, provided
    that it shows as much of the PET.

    Raises:
        UserError: the fault of the best CT, where no other is as good.
    """
    left, notes = list(series), []
    fault: UserError | None = None
    needed = 0.0
    while True:
        chosen, why = choose_ct(left, pet, trust_study)
        if chosen is None or (fault and coverage(chosen, pet) < ENOUGH * needed):
            if fault:
                raise fault
            return None, None, why, []
        needed = needed or coverage(chosen, pet)
        images = []
        for part in chosen.parts:
            try:
                refuse_lost(part)
                image, _, said = read_volume(part)
                if not same_frame(part, pet):
                    said = [*said, check_place(image, suv)]
            except UserError as error:
                fault = fault or error
                notes.append(f"CT series '{label(part)}' is passed over: {error}")
                left = [one for one in left if one.series_uid != part.series_uid]
                break
            images.append(image)
            notes += said
        else:
            ct = images[0] if len(images) == 1 else join(images, EMPTY["CT"])
            return ct, chosen, why, [note if note.startswith(("CT", "the CT")) else f"CT: {note}" for note in
                             dict.fromkeys((*chosen.remarks, *notes))]  # fmt: skip


def refuse_lost(series: Series) -> None:
    """Raises UserError if files that cannot be read may be slices of the series.

    Within it a missing slice leaves a gap; at its ends nothing would tell that the body is shorter than it was.
    """
    stated = [series.header.get(keyword) for keyword in ("NumberOfSlices", "ImagesInAcquisition")]
    if series.lost and len(series.files) not in stated:
        files = "1 file" if series.lost == 1 else f"{series.lost} files"
        raise UserError(f"{kind_of(series)} series '{label(series)}': {files} beside its slices cannot be read and may "
                        "be some of them; copy the study again, or remove what is none of its slices",
                        "SLICE_UNREADABLE")  # fmt: skip
