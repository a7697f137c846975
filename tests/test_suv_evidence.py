"""The time of decay correction from headers whose fields are missing, of other conventions, or wrong: the right SUV, or
a refusal, and never a wrong SUV without a word."""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.overrides import SuvOverride
from nnUNet_raw_conversion.dicom.suv import suv_factors
from tests.dicom_files import DOSE_BQ, WEIGHT_KG
from tests.suv_headers import header, philips

F18, GA68, C11 = 6586.2, 4057.7, 1221.8
START = datetime(2021, 3, 4, 13, 15)
GE = (0x0009, "GEMS_PETD_01", 0x0D)


def mean_of_frame(duration, half_life):
    """By integration: the time whose activity is the average over the frame."""
    t = (np.arange(100000) + 0.5) * duration / 100000
    return -half_life * np.log2(np.mean(2 ** (-t / half_life)))


def beds(
    says, *, start=START, uptake=3600, frame=120, exported=(0, 1, 2, 3), half_life=F18, late=0.0, vendor="SIEMENS",
    frt="middle", factor="start", more=None,
):  # fmt: skip
    """Headers of a scan that began at `start`, `uptake` s after the injection, bed after bed of `frame` s.

    `says` are the fields that are there, of series, ge, frt, factor, philips, datetime; the first bed began `late` s
    after the start, and only some are `exported`. `more` are DICOM keywords that are set after all.
    """
    middle, injected = mean_of_frame(frame, half_life), start - timedelta(seconds=uptake)
    headers = []
    for bed in exported:
        begun = late + bed * (frame + 5)
        acquired = start + timedelta(seconds=begun)
        own = {"AcquisitionDate": f"{acquired:%Y%m%d}", "AcquisitionTime": f"{acquired:%H%M%S.%f}",
               "SeriesDate": f"{start:%Y%m%d}", "SeriesTime": f"{start:%H%M%S}" if "series" in says else None,
               "ActualFrameDuration": int(1000 * frame), "Manufacturer": vendor, "RadionuclideHalfLife": half_life,
               "RadiopharmaceuticalStartTime": f"{injected:%H%M%S}", "private": {}}  # fmt: skip
        if "frt" in says:
            own["FrameReferenceTime"] = round(1000 * (begun + (middle if frt == "middle" else 0)), 3)
        if "factor" in says:
            own["DecayFactor"] = f"{2 ** ((begun + (middle if factor == 'middle' else 0)) / half_life):.6g}"
        if "datetime" in says:
            own["DecayCorrectionDateTime"] = f"{start:%Y%m%d%H%M%S}"
        if "ge" in says:
            own["private"][GE] = ("DT", f"{start:%Y%m%d%H%M%S}.00")
        if "philips" in says:
            own["private"] |= philips(f"{2 * right(uptake, half_life):.7g}", 2)
        headers.append(header(**own | (more or {})))
    return headers


def right(uptake=3600, half_life=F18):
    return 1000 * WEIGHT_KG / (DOSE_BQ * 2 ** (-uptake / half_life))


def outcome(headers, override=None):
    """Factor and notes; or None and the message of the refusal."""
    try:
        factors, notes = suv_factors(headers, override)
    except UserError as error:
        assert error.code.startswith("SUV_") and "--suv-override" in str(error) and "\n" not in str(error)
        return None, str(error)
    assert np.ptp(factors) == 0
    return factors[0], " | ".join(notes)


@pytest.mark.parametrize("half_life", [F18, GA68, C11])
@pytest.mark.parametrize(
    ("says", "options"),
    [
        ("series frt factor", {}),
        ("series frt", {"exported": (9, 10, 11)}),  # first beds not exported
        ("series factor", {"exported": (9, 10, 11)}),
        ("frt", {"exported": (9, 10, 11)}),
        ("ge frt", {"exported": (9, 10, 11), "vendor": "GE MEDICAL SYSTEMS"}),
        ("ge frt", {"exported": (9, 10, 11), "vendor": "GE MEDICAL SYSTEMS", "frt": "start"}),
        ("ge series", {"exported": (9, 10, 11), "vendor": "GE MEDICAL SYSTEMS"}),
        ("ge series", {"exported": (9,), "vendor": "GE MEDICAL SYSTEMS"}),
        ("series factor", {"factor": "middle", "vendor": "GE MEDICAL SYSTEMS"}),  # Discovery 690 and 710
        ("series factor", {"factor": "middle", "vendor": "GE MEDICAL SYSTEMS", "exported": (5, 6)}),
        ("series factor frt", {"factor": "middle", "vendor": "Philips Medical Systems"}),  # Gemini
        ("series factor frt", {"factor": "middle", "vendor": "Philips Medical Systems", "exported": (5, 6)}),
        ("series frt", {"vendor": "Philips Medical Systems", "exported": (9,)}),
        ("series philips", {"vendor": "Philips Medical Systems", "exported": (9, 10)}),
        ("philips", {"vendor": "Philips Medical Systems"}),
        ("ge frt", {"late": 1100, "exported": (0,), "more": {"SeriesTime": "235900"}}),  # a late window
        ("series frt", {"late": 1100, "exported": (0,)}),
        ("series factor", {"late": 1100, "exported": (0,)}),
        ("frt factor", {"late": 1100, "exported": (0,), "more": {"SeriesTime": "235900"}}),
        ("frt factor", {"more": {"SeriesTime": "124900"}}),  # SeriesTime before the scan
        ("frt", {"more": {"SeriesTime": "124900"}}),
        ("factor", {"more": {"SeriesTime": "124900"}}),
        ("frt", {"more": {"SeriesTime": "160000"}}),  # of a later reconstruction
        ("", {"more": {"SeriesTime": "160000"}}),
        ("", {"more": {"SeriesTime": "000000"}}),
        ("frt factor", {"more": {"SeriesTime": "000000"}, "exported": (4, 5)}),
        ("datetime frt", {"exported": (4, 5)}),
        ("series frt factor", {"start": datetime(2021, 3, 4, 0, 10)}),  # injected before midnight
        ("series frt", {"start": datetime(2021, 3, 4, 23, 55), "exported": (7, 8)}),  # beds after midnight
    ],
)
def test_right_reference(says, options, half_life):
    uptake = 1500 if half_life == C11 else 3600
    value, notes = outcome(beds(says.split(), half_life=half_life, uptake=uptake, **options))
    assert value == pytest.approx(right(uptake, half_life), rel=0.011), notes


@pytest.mark.parametrize("convention", ["start", "middle"])
def test_the_convention_of_the_decay_factor_is_said(convention):
    headers = beds(["series", "factor"], factor=convention, exported=(0, 3, 6))
    value, notes = outcome(headers)
    assert value == pytest.approx(right(), rel=1e-9)
    assert f"DecayFactor (0054,1321) is that of the {convention} of the frames" in notes


@pytest.mark.parametrize(
    ("says", "options", "named"),
    [
        # nothing says which of the two is right
        ("", {"more": {"SeriesTime": "125500"}}, ("SeriesTime (SUV x 1)", "earliest acquisition (SUV x 1.135)")),
        ("series", {"more": {"private": {GE: ("DT", "20210304124500.00")}}},
         ("GE's scan date-time (0009,100d)", "earliest acquisition")),
        ("frt", {"late": 3900, "exported": (0,), "more": {"SeriesTime": "235900"}},
         ("FrameReferenceTime (0054,1300)", "earliest acquisition")),
    ],
)  # fmt: skip
def test_contradictions_are_refused(says, options, named):
    options = {"exported": (0,)} | options
    value, message = outcome(beds(says.split(), **options))
    assert value is None
    assert all(name in message for name in named) and "give decay_reference_datetime with --suv-override" in message
    given_by_user = SuvOverride(decay_reference=START)
    assert outcome(beds(says.split(), **options), given_by_user)[0] == pytest.approx(right(), rel=1e-9)


@pytest.mark.parametrize("minutes", [70, 80, 90])
@pytest.mark.parametrize("exported", [(0,), (0, 1, 2, 3)])
def test_frames_that_count_from_the_injection(minutes, exported):
    """SeriesTime and acquisition agree; FrameReferenceTime of 70 to 90 min counts from the injection: said."""
    headers = beds(["series"], uptake=60 * minutes, exported=exported)
    for bed, one in zip(exported, headers, strict=True):
        one.FrameReferenceTime = 1000 * (60 * minutes + bed * 125 + 60)
    value, notes = outcome(headers)
    assert value == pytest.approx(right(60 * minutes), rel=1e-9) and "not FrameReferenceTime (0054,1300)" in notes


@pytest.mark.parametrize("minutes", [70, 80, 90])
def test_late_frames_of_a_scan_from_the_injection_on(minutes):
    value, notes = outcome(beds(["series", "frt"], uptake=0, late=60 * minutes, frame=1200, exported=(0,)))
    assert value == pytest.approx(right(0), rel=1e-9), notes


SCANS = {
    "start": st.integers(60, 3 * 86400 - 60).map(lambda s: datetime(2021, 3, 4) + timedelta(seconds=s)),
    "uptake": st.integers(900, 5400), "frame": st.integers(60, 300), "half_life": st.sampled_from([F18, GA68, C11]),
    "frt": st.sampled_from(["middle", "start"]), "factor": st.sampled_from(["start", "middle"]),
}  # fmt: skip
FIELDS = st.sets(st.sampled_from(["series", "ge", "frt", "factor", "philips", "datetime"]))


def usable(scan):
    """Times of 00:00:00 are blanked ones, and a scan begins before the fluorine is gone."""
    times = (scan["start"], scan["start"] - timedelta(seconds=scan["uptake"]))
    return all(f"{time:%H%M%S}" != "000000" for time in times)


@given(says=FIELDS, scan=st.fixed_dictionaries(SCANS).filter(usable))
def test_whatever_fields_are_there(says, scan):
    if scan["frt"] == "start":  # as with GE, where one frame would do for two meanings
        scan |= {"vendor": "GE MEDICAL SYSTEMS"}
    value, notes = outcome(beds(says, **scan))
    assert value == pytest.approx(right(scan["uptake"], scan["half_life"]), rel=0.02), notes


@given(says=FIELDS.filter(lambda says: says), scan=st.fixed_dictionaries(SCANS).filter(usable), first=st.integers(1, 8))
def test_whatever_beds_are_missing(says, scan, first):
    if scan["frt"] == "start":
        scan |= {"vendor": "GE MEDICAL SYSTEMS"}
    value, notes = outcome(beds(says, exported=range(first, first + 3), **scan))
    wrong = value is not None and abs(value / right(scan["uptake"], scan["half_life"]) - 1) > 0.02
    assert not wrong or "not " in notes, notes


@given(
    says=FIELDS, scan=st.fixed_dictionaries(SCANS).filter(usable),
    broken=st.sampled_from(["series", "ge", "frt", "factor"]),
    minutes=st.integers(-180, 180).filter(lambda m: abs(m) > 5), first=st.sampled_from([0, 0, 3]),
)  # fmt: skip
def test_one_wrong_field_is_outvoted_or_refused_or_said(says, scan, broken, minutes, first):
    if scan["frt"] == "start":
        scan |= {"vendor": "GE MEDICAL SYSTEMS"}
    headers = beds(says, exported=range(first, first + 3), **scan)
    wrong = scan["start"] + timedelta(minutes=minutes)
    for one in headers:
        if broken == "series":
            one.SeriesDate, one.SeriesTime = f"{wrong:%Y%m%d}", f"{wrong:%H%M%S}"
        elif broken == "ge":
            one.private_block(*GE[:2], create=True).add_new(GE[2], "DT", f"{wrong:%Y%m%d%H%M%S}")
        elif broken == "frt":
            one.FrameReferenceTime = max(0, one.get("FrameReferenceTime", 0) + 60000 * minutes)
        else:
            one.DecayFactor = f"{float(one.get('DecayFactor', 1)) * 2 ** (60 * minutes / scan['half_life']):.6g}"
    value, notes = outcome(headers)
    off = value is not None and abs(value / right(scan["uptake"], scan["half_life"]) - 1) > 0.02
    assert not off or "decay reference: " in notes or "earliest acquisition" in notes, notes
