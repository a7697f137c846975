"""Can these voxels be a CT in HU and a PET in SUVbw? What conversion and prediction ask of every study.

A SUVbw can be told by the tissues that take up little in every patient, which the CT shows. Measured in the right cases
that we have (36 real FDG patients in small boxes around a tumour, 24 FDG and 16 PSMA phantoms, whole bodies):

    lowest quartile of soft tissue (muscle)   real 0.34 to 0.91   FDG phantoms 0.56 to 0.76   PSMA 0.34 to 0.69
    median of fat                             real 0.20 to 0.57                0.25 to 0.44        0.20 to 0.56
    mean of the body                          real 0.45 to 2.01                0.64 to 1.09        0.89 to 1.69

Over a whole body the mean is at most 1 by definition, less what was excreted. kBq/ml is 3.4 times the SUV (5 MBq/kg of
FDG after 1 h; 2 to 5 times for usual doses). Each of the three is too high for a right case of some kind by itself
(muscle of a patient who is not fasted or given insulin, fluciclovine, FAPI; brown fat and fat beside hot organs; boxes
around a tumour), all three together are not: the 36 real patients are refused when multiplied by 1.4 to 3.6 (median
2.1), 35 of them in kBq/ml. What is below 1.4 times is not told from SUVbw: SUL, %ID/kg, kBq/ml of low doses or short-
lived nuclides (68Ga: 1.1 times). The CT in HU needs no more than that every body has air or fat.
"""

from __future__ import annotations

import numpy as np

from nnunet_fratmae.base.command import UserError

AIR_HU = -1024
BODY_HU = -300  # above: body, without the lungs
SOFT_HU, FAT_HU = (0, 90), (-140, -60)
FEWEST_VOXELS = 50  # of a tissue that is looked at
MOST_MUSCLE, MOST_FAT, MOST_BODY_MEAN = 1.25, 0.65, 1.4  # SUV, refused if all are exceeded; see above
# Of the soft tissue, where no fat is seen, or none that takes up less. The median of fat is 0.25 to 0.93 of that of the
# soft tissue in the real patients; a test object with an even uptake has 1, and any weight.
MOST_WITHOUT_FAT, MOST_OF_SOFT = 2.0, 0.95
ODD_MEAN = 2.2  # of the body
# Without a CT the body is what has a quarter of the uptake of its hotter half. Its lowest quartile and median are
# 0.25 to 0.99 and 0.38 to 1.66 in the same real boxes, 0.26 to 0.48 and 0.39 to 0.76 in the phantoms.
MOST_QUARTILE_ALONE, MOST_MEDIAN_ALONE, ODD_MEDIAN_ALONE = 1.25, 1.8, 1.3
# A mean of the body that no unit near SUVbw has: Bq/ml has hundreds to thousands, MBq/ml and %ID/g some thousandths.
BODY_MEAN_SUV = (0.01, 20)
# SUV divided by 10, uCi/ml, images normalised to 0..1: the mean is low and nothing is hot. Late images of long-lived
# tracers (124I in a thyroid remnant, 90Y in a liver) have as low a mean and are hot somewhere.
LEAST_BODY_MEAN, LEAST_MAXIMUM, ODD_BODY_MEAN = 0.15, 5.0, 0.3
# Of the sum of a PET. Splines beside a bladder of SUV 50 undershoot by several units, but that is less over the image.
MOST_UNDERSHOOT = 0.01


def check_hu(hu: np.ndarray) -> None:
    """See that a CT can be in HU: every part of a body has fat (-100 HU), lung or air about it.

    Not so images without the rescale intercept (0 and more, apart from the scanner's padding of -2000), windowed to
    0..255, or normalised to mean 0, or a PET.

    Raises:
        UserError: it cannot.
    """
    if np.mean((hu >= AIR_HU) & (hu < -50)) < 0.01:
        low, high = hu.min(), hu.max()
        why = "rescale intercept missing?" if high > 300 else "normalised? or is this the PET?"
        raise UserError(f"CT has no fat and no air (values {low:g} to {high:g}): not HU, {why} give the CT in HU",
                        "CT_UNITS")  # fmt: skip


def check_suv(suv: np.ndarray) -> str | None:
    """See that a PET can be in SUV by its values alone: not empty, and not normalised to mean 0.

    Noise around 0, as filtered back-projection leaves in air, is as often positive as negative, so the sum of the image
    is that of the uptake. Where an image was normalised, most of its voxels are negative, or its sum is 0 or less.

    Returns:
        What to tell the user of negative voxels, which should be set to 0; None where there are none.

    Raises:
        UserError: it cannot.
    """
    negative, total = -suv[suv < 0].sum(dtype=float), np.abs(suv).sum(dtype=float)
    if total == 0:
        raise UserError("PET is zero everywhere; export it again", "PET_EMPTY")
    if negative == 0:
        return None
    if negative <= MOST_UNDERSHOOT * total:
        return "small negative PET values (interpolation) set to 0"
    if total - 2 * negative < 0.1 * negative or np.mean(suv < 0) > 0.55:
        like = "a CT has: swapped?" if suv.min() < -500 else "normalised images have;"
        raise UserError(f"PET has negative values (down to {suv.min():g}), as {like} give it in SUVbw",
                        "PET_NEGATIVE")  # fmt: skip
    return "negative PET values (noise around 0, as filtered back-projection leaves) set to 0"


def check_pair(hu: np.ndarray, suv: np.ndarray) -> list[str]:
    """See that the PET can be in SUVbw by the tissues that the CT, in HU and on the same grid, shows.

    Returns:
        What is odd and may still be right, one sentence each.

    Raises:
        UserError: it cannot, or the CT shows no body.
    """
    body = hu > BODY_HU
    if not body.any():
        raise UserError(f"CT shows no body (above {BODY_HU} HU) where the PET is: wrong pairing? pair the files anew",
                        "CT_NO_BODY")  # fmt: skip
    notes = _check_mean(suv[body], float(suv.max()))
    soft, fat = (suv[(hu > low) & (hu < high)] for low, high in (SOFT_HU, FAT_HU))
    soft = soft if soft.size >= FEWEST_VOXELS else suv[body]
    muscle, mean = float(np.percentile(soft, 25)), float(suv[body].mean(dtype=float))
    fat_median = float(np.median(fat)) if fat.size >= FEWEST_VOXELS else np.inf
    has_fat = fat_median < MOST_OF_SOFT * float(np.median(soft))
    too_high = muscle > MOST_MUSCLE and fat_median > MOST_FAT if has_fat else muscle > MOST_WITHOUT_FAT
    if too_high and mean > MOST_BODY_MEAN:
        tissues = f"{muscle:.2g} in muscle (0.3 to 0.9 is usual)" + f", {fat_median:.2g} in fat (0.2 to 0.6)" * has_fat
        raise _too_high(f"has {tissues} and a mean of {mean:.2g} in the body (about 1)", muscle)
    if muscle > MOST_MUSCLE:
        notes.append("PET is high in soft tissue: is it SUVbw, or was the patient not fasted?")
    elif mean > ODD_MEAN:
        notes.append("PET is high in the body: is it SUVbw?")
    return notes


def check_alone(suv: np.ndarray) -> list[str]:
    """As `check_pair`, of a PET without a CT; what can be told is less."""
    hotter = suv[suv > suv.mean(dtype=float)]
    body = suv[suv > 0.25 * np.median(hotter)] if hotter.size else suv.ravel()
    notes = _check_mean(body, float(suv.max()))
    quartile, median = np.percentile(body, (25, 50))
    if quartile > MOST_QUARTILE_ALONE and median > MOST_MEDIAN_ALONE and body.mean(dtype=float) > MOST_BODY_MEAN:
        raise _too_high(f"has a median of {median:.2g} in the body (0.4 to 1 is usual)", quartile)
    if median > ODD_MEDIAN_ALONE:
        notes.append("PET is high in the body: is it SUVbw?")
    return notes


def _check_mean(body: np.ndarray, highest: float) -> list[str]:
    mean = float(body.mean(dtype=float))
    least, most = BODY_MEAN_SUV
    if mean > most:
        raise UserError(f"PET has a mean of {mean:.0f} in the body, as Bq/ml has, not SUVbw; convert it to SUVbw",
                        "PET_UNITS")  # fmt: skip
    if mean < least:
        raise UserError(f"PET has a mean of {mean:.2g} in the body: scaled, not SUVbw; give the PET in SUVbw",
                        "PET_UNITS")  # fmt: skip
    if mean < LEAST_BODY_MEAN and highest < LEAST_MAXIMUM or mean < 0.5 and abs(highest - 1) < 1e-6:
        raise UserError(f"PET has a mean of {mean:.2g} in the body (about 1 is usual) and nowhere more than "
                        f"{highest:.2g}: scaled (SUV / 10, uCi/ml) or normalised to 0..1, not SUVbw; give the PET in "
                        "SUVbw", "PET_UNITS")  # fmt: skip
    return ["PET is low in the body: is it SUVbw?"] if mean < ODD_BODY_MEAN else []


def _too_high(found: str, muscle: float) -> UserError:
    return UserError(f"PET {found}: not SUVbw, about {muscle / 0.6:.0f} times too high (kBq/ml is 2 to 5 times); "
                     "convert it to SUVbw, or, where it was converted from DICOM here, check weight, dose and times in "
                     "its header", "PET_UNITS")  # fmt: skip
