"""Injections that say +0000 and mean local time, and times of 00:00:00 that are times: the right SUV where a second
field confirms it, a refusal where nothing does."""

from __future__ import annotations

from datetime import datetime

import pytest

from tests.suv_headers import header
from tests.test_suv_evidence import beds, outcome, right

C11, ZR89 = 1221.8, 282276.0


def injected(uptake_min, *, start=None, half_life=6586.2, header_zone=None, **drug):
    """A scan so long after the injection, with fields of the radiopharmaceutical as given; {} is its time of day."""
    start = start or datetime(2021, 3, 4, 13, 15)
    headers = beds(["series", "frt"], start=start, uptake=60 * uptake_min, half_life=half_life)
    for one in headers:
        [item] = one.RadiopharmaceuticalInformationSequence
        clock = item.RadiopharmaceuticalStartTime
        for keyword in ("RadiopharmaceuticalStartTime", "RadiopharmaceuticalStartDateTime"):
            item.pop(keyword, None)
            if keyword in drug:
                setattr(item, keyword, drug[keyword].format(clock))
        if header_zone:
            one.TimezoneOffsetFromUTC = header_zone
    return headers


LOCAL = {"RadiopharmaceuticalStartDateTime": "20210304{}+0000"}
BOTH = LOCAL | {"RadiopharmaceuticalStartTime": "{}"}


@pytest.mark.parametrize("header_zone", [None, "+0000", "+0100", "+0200", "-0400", "-0500"])
@pytest.mark.parametrize("uptake_min", [60, 90, 150])
def test_local_time_called_utc_is_confirmed_by_the_time_of_day(uptake_min, header_zone):
    value, notes = outcome(injected(uptake_min, header_zone=header_zone, **BOTH))
    assert value == pytest.approx(right(60 * uptake_min), rel=1e-9), notes


@pytest.mark.parametrize(
    ("uptake_min", "header_zone", "said"),
    [
        (60, None, "60 min from injection"), (90, None, "it is taken for local time"), (90, "+0000", "90 min from"),
        (60, "+0200", "by which it cannot be; it is taken for local time"),  # an hour after the scan by its zone
        (90, "+0200", "it is taken for local time"), (90, "-0500", "it is taken for local time"),  # 6.5 h before it
    ],
)  # fmt: skip
def test_local_time_called_utc_where_it_can_be_nothing_else(uptake_min, header_zone, said):
    value, notes = outcome(injected(uptake_min, header_zone=header_zone, **LOCAL))
    assert value == pytest.approx(right(60 * uptake_min), rel=1e-9) and said in notes


@pytest.mark.parametrize(
    ("uptake_min", "header_zone"), [(120, None), (90, "+0100"), (60, "-0500"), (60, "-0400"), (150, "+0200")]
)
def test_local_time_or_utc_that_nothing_tells_apart_is_refused(uptake_min, header_zone):
    value, message = outcome(injected(uptake_min, header_zone=header_zone, **LOCAL))
    assert value is None and "is in UTC" in message and "give injection_datetime" in message


@pytest.mark.parametrize(("uptake_min", "utc"), [(60, "121500+0000"), (90, "114500+0000")])
def test_utc_is_believed_where_it_is_as_it_should_be(uptake_min, utc):
    stated = {"RadiopharmaceuticalStartDateTime": f"20210304{utc}"}
    headers = injected(uptake_min, start=datetime(2021, 3, 4, 14, 15), header_zone="+0100", **stated)
    assert outcome(headers)[0] == pytest.approx(right(60 * uptake_min), rel=1e-9)


def test_an_hour_does_not_matter_for_nuclides_of_days_and_more_for_those_of_minutes():
    days = injected(300, half_life=ZR89, **LOCAL)
    assert outcome(days)[0] == pytest.approx(right(300 * 60, ZR89), rel=1e-9)
    assert "is in UTC" in outcome(injected(80, half_life=C11, **LOCAL))[1]  # 20 min, one zone to the east


MIDNIGHT = {"RadiopharmaceuticalStartTime": "000000", "RadiopharmaceuticalStartDateTime": "20210304000000.00"}


def test_an_injection_at_midnight_that_both_fields_say():
    value, notes = outcome(injected(58, start=datetime(2021, 3, 4, 0, 58), **MIDNIGHT))
    assert value == pytest.approx(right(58 * 60), rel=1e-9) and "are 00:00:00, which is taken for the time" in notes


@pytest.mark.parametrize(
    ("hour", "fields"),
    [
        (1, ["RadiopharmaceuticalStartTime"]), (1, ["RadiopharmaceuticalStartDateTime"]),  # nothing confirms it
        (5, list(MIDNIGHT)), (13, list(MIDNIGHT)),  # far from midnight
    ],
)  # fmt: skip
def test_an_injection_at_midnight_that_nothing_confirms_is_refused(hour, fields):
    headers = injected(60, start=datetime(2021, 3, 4, hour, 0, 30), **{name: MIDNIGHT[name] for name in fields})
    value, message = outcome(headers)
    assert value is None and "00:00:00, as anonymisers write" in message


def dated(headers, acquisition, series):
    for one in headers:
        one.AcquisitionDate = one.AcquisitionDate if acquisition == "own" else acquisition
        if acquisition is None:
            del one.AcquisitionDate
        if not series:
            one.pop("SeriesDate", None)
    return headers


@pytest.mark.parametrize("says", ["series frt factor", "series", "frt", ""])
@pytest.mark.parametrize("dates", [("own", True), ("20210304", True), (None, True), (None, False)])
def test_a_bed_at_midnight_of_a_scan_over_midnight(says, dates):
    """The third of the beds begins at 00:00:00, on the day that it has, the day of the first, or without any."""
    headers = dated(beds(says.split(), start=datetime(2021, 3, 4, 23, 55, 50)), *dates)
    assert [one.AcquisitionTime[:6] for one in headers] == ["235550", "235755", "000000", "000205"]
    value, notes = outcome(headers)
    assert value == pytest.approx(right(), rel=1e-9), notes


@pytest.mark.parametrize("bed", [0, 2])
def test_a_blanked_bed_is_passed_over_if_the_start_of_the_scan_is_confirmed(bed):
    headers = beds(["series"])
    headers[bed].AcquisitionTime = "000000"
    assert outcome(headers)[0] == pytest.approx(right(), rel=1e-9)
    for one in headers:
        one.SeriesTime = "000000"
    value, message = outcome(headers)
    assert value is None and "AcquisitionTime (0008,0032) of 1 of 4 slices is 00:00:00" in message


def test_times_of_day_without_beds_at_midnight_are_as_they_were():
    assert outcome([header()])[0] == pytest.approx(right(), rel=1e-9)
