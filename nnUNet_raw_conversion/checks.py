"""Is this CT in HU and PET in SUVbw of one patient? What every converter asks before it writes a case."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from scipy import ndimage, stats

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.grids import check_size, grid_distance, same_grid
from nnunet_fratmae.base.hu_suv import AIR_HU, check_alone, check_hu, check_pair, check_suv
from nnunet_fratmae.base.volumes import check_finite
from nnUNet_raw_conversion.geometry import as_float, canonical, overlap_fraction, resample_to, target_grid

# See `outline_agreement`. The right pairs are far above: 35 real patients 0.92 or more (the 36th shows too little air),
# with noise of SUV 1 on each voxel 0.919, at a tenth of the counts still 0.977 in a real whole-body PET (body outline
# from the PET itself, with a table), phantoms 0.997. Of 1260 pairs of different patients put centre on centre 61% are
# below. Whole bodies of two patients who lie alike are not told apart (phantoms: 0.90 to 0.99); a gross error is.
LEAST_OUTLINE_AGREEMENT = 0.75


def checked_case(
    ct: sitk.Image | None, pet: sitk.Image, lesions: sitk.Image | None, grid: str = "pet"
) -> tuple[sitk.Image, sitk.Image, sitk.Image | None, list[str]]:
    """Check one case and bring it into the form that `raw_dataset.write_case` takes.

    Args:
        ct: in HU, on any grid, or None: then the PET alone is checked and the CT is air. pet: in SUVbw.
        lesions: 0 and 1, on the grid of `pet`, of `ct` or of the result, or None.
        grid: that of the result, see `geometry.target_grid`.

    Returns:
        CT (float32, HU, at least -1024), PET (float32, SUVbw, not negative) and lesions (uint8), all on one grid in
        canonical orientation, and what had to be changed, one sentence each.

    Raises:
        UserError: what is wrong and what to do.
    """
    notes: list[str] = []
    ct, pet = None if ct is None else _checked_ct(ct, notes), _checked_pet(pet, notes)
    # The share of the smaller of the two: a narrow CT of the whole body fills half of a wide PET of the trunk.
    if ct is not None and max(overlap_fraction(ct, pet), overlap_fraction(pet, ct)) < 0.25:
        raise UserError("CT and PET hardly overlap: different subjects or wrong pairing; pair the files anew",
                        "PAIR_DISAGREES")  # fmt: skip
    target = target_grid(ct, pet, grid)
    if lesions is not None:
        lesions = _lesions_on(_checked_lesions(lesions, ct, pet, target), target, notes)
    pet = _on_grid(pet, target, 0, "PET", grid, notes)
    if ct is not None:
        ct = _on_grid(ct, target, AIR_HU, "CT", grid, notes)
        notes += check_pair(sitk.GetArrayViewFromImage(ct), sitk.GetArrayViewFromImage(pet))
        _check_outlines(ct, pet)
        if np.mean(np.all(sitk.GetArrayViewFromImage(ct) == AIR_HU, axis=(1, 2))) > 0.05:
            notes.append("the CT ends before the PET, where it is filled with air")
    else:
        ct = sitk.Cast(target, sitk.sitkFloat32) * 0 + AIR_HU
        notes.append(f"no CT: filled with air ({AIR_HU} HU)")
        notes += check_alone(sitk.GetArrayViewFromImage(pet))
    return ct, pet, lesions, notes


def outline_agreement(ct: sitk.Image, pet: sitk.Image) -> float | None:
    """How well the body of the CT and the body of the PET, on the same grid, agree: 1 fully, 0.5 by chance.

    The probability that a place in the body (CT > -300 HU) has more uptake than a place in the air around it (CT
    < -950 HU, up to 6 cm off), that is the area under the ROC curve. Being made of ranks it needs no threshold for
    the PET and takes any tracer and any unit. On 8 mm voxels, with the PET smoothed, noise hardly changes it. Lungs
    and clothes lie between the two HU limits and do not count; nor does the rim of the image, where resampled CTs
    have padding. None where there is no air (or no body) to look at, as in a small box inside the body.
    """
    ct, pet = _coarse(ct), _coarse(pet)
    spacing = np.array(pet.GetSpacing()[::-1])
    hu = sitk.GetArrayViewFromImage(ct)
    uptake = ndimage.gaussian_filter(sitk.GetArrayViewFromImage(pet), 8 / spacing)
    body = hu > -300
    if not body.any():
        return None
    air = (hu < -950) & (ndimage.distance_transform_edt(~body, spacing) < 60)
    inner = (slice(1, -1),) * 3
    inside, outside = uptake[inner][body[inner]], uptake[inner][air[inner]]
    if min(inside.size, outside.size) < 50:
        return None
    return float(stats.mannwhitneyu(inside, outside, method="asymptotic").statistic / inside.size / outside.size)


def _checked_ct(ct: sitk.Image, notes: list[str]) -> sitk.Image:
    check_size(ct, "CT")
    ct = as_float(ct)
    hu = sitk.GetArrayViewFromImage(ct)
    check_finite(hu, "CT")
    check_hu(hu)
    if hu.min() < AIR_HU:
        notes.append(f"CT padding below {AIR_HU} HU raised to {AIR_HU}")
        ct = sitk.Clamp(ct, lowerBound=AIR_HU)
    return ct


def _checked_pet(pet: sitk.Image, notes: list[str]) -> sitk.Image:
    check_size(pet, "PET")
    pet = as_float(pet)
    suv = sitk.GetArrayViewFromImage(pet)
    check_finite(suv, "PET")
    if negative := check_suv(suv):
        notes.append(negative)
        pet = sitk.Clamp(pet, lowerBound=0)
    return pet


def _checked_lesions(lesions: sitk.Image, ct: sitk.Image | None, pet: sitk.Image, target: sitk.Image) -> sitk.Image:
    if not any(same_grid(canonical(lesions), canonical(image)) for image in (pet, target, ct) if image is not None):
        size = "x".join(map(str, lesions.GetSize())), "x".join(map(str, pet.GetSize()))
        raise UserError(f"segmentation ({size[0]} voxels) is not on the grid of the PET ({size[1]}); "
                        "resample it to the PET (nearest neighbour)", "LESIONS_GRID")  # fmt: skip
    labels = sitk.GetArrayViewFromImage(lesions)
    strange = labels[(labels != 0) & (labels != 1)]
    if strange.size:
        values = np.unique(strange)
        shown = ", ".join(f"{v:g}" for v in values[:5]) + (", ..." if values.size > 5 else "")
        hint = "interpolated? resample it with nearest neighbour" if np.any(values % 1) else "map them to 0 or 1"
        raise UserError(f"segmentation has the value {shown} beside 0 (background) and 1 (lesion); {hint}",
                        "LESIONS_VALUES")  # fmt: skip
    return sitk.Cast(lesions, sitk.sitkUInt8)


def _on_grid(
    image: sitk.Image, target: sitk.Image, fill: float, name: str, grid: str, notes: list[str]
) -> sitk.Image:
    """`image` on the grid of `target`, and exactly there: rounding errors of headers shall not reach nnU-Net."""
    turned = canonical(image)
    if same_grid(turned, target):
        return _exactly(turned, target)
    whose = {"pet": "the PET's grid", "ct": "the CT's grid"}.get(grid, f"a grid of {grid} mm")
    notes.append(f"{name} resampled to {whose}")
    return resample_to(image, target, fill)


def _exactly(image: sitk.Image, target: sitk.Image) -> sitk.Image:
    """`image`, which is on the grid of `target` but for rounding; a copy only where that is needed."""
    if grid_distance(image, target) == 0:
        return image
    image = sitk.Image(image)
    image.CopyInformation(target)
    return image


def _lesions_on(lesions: sitk.Image, target: sitk.Image, notes: list[str]) -> sitk.Image:
    """Where lesions fill at least half of a voxel of the target: linear interpolation of the (averaged) mask, which
    keeps volumes and smooth surfaces where nearest neighbours make steps and lose thin parts by chance."""
    turned = canonical(lesions)
    if same_grid(turned, target):
        return _exactly(turned, target)
    result = resample_to(lesions, target, 0) >= 0.5
    before, after = (np.count_nonzero(sitk.GetArrayViewFromImage(i)) * np.prod(i.GetSpacing()) / 1000
                     for i in (lesions, result))  # fmt: skip
    if abs(after - before) > 0.1 * before:
        notes.append("lesion volume changed by more than 10% on the new grid")
    return result


def _check_outlines(ct: sitk.Image, pet: sitk.Image) -> None:
    agreement = outline_agreement(ct, pet)
    if agreement is not None and agreement < LEAST_OUTLINE_AGREEMENT:
        raise UserError(f"the bodies in CT and PET disagree (agreement {agreement:.2f}, at least "
                        f"{LEAST_OUTLINE_AGREEMENT} is needed): different subjects or wrong pairing; "
                        "look at both and pair the files anew", "PAIR_DISAGREES")  # fmt: skip


def _coarse(image: sitk.Image) -> sitk.Image:
    """Averaged to voxels of about 8 mm."""
    factors = [min(max(1, round(8 / s)), n) for s, n in zip(image.GetSpacing(), image.GetSize(), strict=True)]
    return sitk.BinShrink(image, factors)
