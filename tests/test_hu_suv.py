"""Right studies of any tracer pass; kBq/ml, Bq/ml, tenths, z-scores and the like do not pass for SUVbw."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.hu_suv import check_alone, check_hu, check_pair, check_suv
from nnUNet_raw_conversion.phantom.command import make_case

REAL = sorted((Path(__file__).parents[2] / "shared" / "data" / "sts_petct").glob("STS_*"))
KBQ_PER_ML = 3.4  # for a SUV of 1, with 5 MBq/kg of FDG after an hour


@pytest.fixture(scope="module")
def phantoms():
    """CT and PET of whole bodies: ten with FDG or PSMA."""
    return [(case.ct, case.pet) for case in (make_case(i, 5, (12, 11, 13)) for i in range(10, 20))]


def tissues(muscle, fat, shape=(20, 24, 28), hot=0.05, lesion=8.0):
    """HU and SUV of a body with a rim of fat, a share `hot` of it in organs with `lesion`."""
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius = np.hypot(x / 0.8, y / 0.7)
    hu = np.where(radius < 0.75, 45, np.where(radius < 1, -100, -1000)) + rng.normal(0, 8, shape)
    suv = np.where(radius < 0.75, muscle, np.where(radius < 1, fat, 0)) * rng.lognormal(0, 0.1, shape)
    suv[(radius < 0.75) & (rng.random(shape) < hot)] = lesion
    return hu, suv


def refusal(check, *arrays):
    """The code of the refusal, or the notes."""
    try:
        return check(*arrays)
    except UserError as error:
        assert "\n" not in str(error)
        return error.code


@pytest.mark.parametrize("factor", [0.7, 1, 1.3])  # SUL is 0.7 to 0.8 of SUVbw
def test_whole_bodies_of_any_tracer_pass(factor, phantoms):
    for hu, suv in phantoms:
        check_hu(hu)
        assert check_suv(suv * factor) is None
        assert check_pair(hu, suv * factor) == check_alone(suv * factor) == []


@pytest.mark.skipif(not REAL, reason="the real patients are not here")
def test_real_patients_pass_and_do_not_in_other_units():
    codes = []
    for folder in REAL:
        hu, suv = (sitk.GetArrayFromImage(sitk.ReadImage(folder / f"{name}.nii.gz")) for name in ("CTres", "SUV"))
        check_hu(hu)
        assert check_pair(hu, suv * 0.75) == check_pair(hu, suv) == [], folder.name
        assert refusal(check_pair, hu, suv * 1.3) != "PET_UNITS"
        assert refusal(check_alone, suv) != "PET_UNITS"
        for factor in (5, 10, 1000, 3400, 1e-3):
            assert refusal(check_pair, hu, suv * factor) == refusal(check_alone, suv * factor) == "PET_UNITS"
        codes.append(refusal(check_pair, hu, suv * KBQ_PER_ML))
        assert refusal(check_pair, hu, suv / 10) != []  # refused or told
        for mean, sd in ((suv.mean(), suv.std()), (suv[hu > -300].mean(), suv[hu > -300].std())):
            assert refusal(check_suv, (suv - mean) / sd) == "PET_NEGATIVE"
    assert codes.count("PET_UNITS") >= len(REAL) - 1


@pytest.mark.parametrize("factor", [KBQ_PER_ML, 4.8, 10, 100, 1000, 3400, 1e6, 0.1, 0.0925, 1.43e-3, 1e-3])
def test_other_units_do_not_pass(factor, phantoms):
    """kBq/ml, SUV x 10, percent, mg/ml, Bq/ml, MBq/ml as kBq, SUV / 10, uCi/ml, %ID/g, 1/1000: refused, or (a bladder
    of SUV 80 in tenths) told."""
    found = [refusal(check_pair, hu, suv * factor) for hu, suv in phantoms]
    alone = [refusal(check_alone, suv * factor) for _, suv in phantoms]
    surely = factor > 5 or factor < 0.05
    for codes in (found, alone):
        assert codes.count("PET_UNITS") >= (len(phantoms) if surely else 7)
    assert all(found) and (all(alone) or factor == KBQ_PER_ML)


def test_the_message_says_what_was_found(phantoms):
    with pytest.raises(UserError, match=r"in muscle .0.3 to 0.9 is usual., .* in fat .*kBq/ml.*convert it to SUVbw"):
        check_pair(phantoms[0][0], phantoms[0][1] * KBQ_PER_ML)
    with pytest.raises(UserError, match="as Bq/ml has"):
        check_pair(phantoms[0][0], phantoms[0][1] * 3400)
    with pytest.raises(UserError, match="normalised to 0..1"):
        check_pair(phantoms[0][0], phantoms[0][1] / phantoms[0][1].max())


@pytest.mark.parametrize(
    ("muscle", "fat", "more", "notes"),
    [
        (0.6, 0.3, {}, 0),
        (2.5, 0.35, {"hot": 0.02}, 1),  # not fasted, or insulin: the muscles take it all
        (1.6, 0.3, {}, 1),  # fluciclovine
        (1.1, 0.5, {}, 0),  # FAPI, FET
        (1.0, 1.0, {}, 0),  # spread evenly, as water is: 1 by definition
        (1.7, 1.7, {"hot": 0.02}, 1),  # a test object with an even uptake and any weight
        (0.8, 0.9, {"hot": 0.1}, 0),  # brown fat
        (0.15, 0.08, {"hot": 0.1, "lesion": 12}, 0),  # PSMA superscan: the tumour takes it all
        (0.05, 0.02, {"hot": 0.02, "lesion": 30}, 0),  # DOTATATE, late
        (0.01, 0.01, {"hot": 0.002, "lesion": 40}, 1),  # 124I after days, excreted but for a remnant
        (0.0, 0.0, {"hot": 0.06, "lesion": 25}, 0),  # 90Y: all in the liver
    ],
)
def test_odd_but_right_bodies_are_told_at_most(muscle, fat, more, notes):
    hu, suv = tissues(muscle, fat, **more)
    assert len(check_pair(hu, suv)) == notes


def test_a_body_without_fat_needs_more_to_be_refused():
    hu, suv = tissues(0.8, 0.7)
    hu = np.where(hu > -300, 40, hu)
    assert check_pair(hu, suv * 1.5) == []
    assert refusal(check_pair, hu, suv * KBQ_PER_ML) == "PET_UNITS"


@pytest.mark.parametrize("wide", [0, 60])
@pytest.mark.parametrize("sd", [0.02, 0.04, 0.1, 0.2])
def test_noise_around_zero_is_set_to_zero(sd, wide):
    """As filtered back-projection leaves it, in fields of view in which the body fills a third or a fiftieth."""
    _, suv = tissues(0.8, 0.4)
    suv = np.pad(suv, ((0, 0), (wide, wide), (wide, wide)))
    noisy = suv + np.random.default_rng(1).normal(0, sd, suv.shape)
    assert "negative PET values" in (check_suv(noisy) or "") or (noisy >= 0).all()


def test_images_that_were_normalised_have_no_noise_around_zero(phantoms):
    for hu, suv in phantoms:
        body = suv[hu > -300]
        for mean, sd in ((suv.mean(), suv.std()), (body.mean(), body.std()), (np.median(body), 1.0)):
            assert refusal(check_suv, (suv - mean) / sd) == "PET_NEGATIVE"
        assert refusal(check_suv, 2 * suv / suv.max() - 1) == "PET_NEGATIVE"
        assert refusal(check_suv, hu) == "PET_NEGATIVE"
        assert refusal(check_suv, suv * 0) == "PET_EMPTY"


def test_a_ct_has_fat_or_air(phantoms):
    for hu, suv in phantoms:
        for wrong in (hu + 1024, suv, np.clip((hu + 160) / 400 * 255, 0, 255), (hu - hu.mean()) / hu.std(), hu * 0):
            assert refusal(check_hu, wrong) == "CT_UNITS"
        assert refusal(check_pair, hu * 0 - 1000, suv) == "CT_NO_BODY"
