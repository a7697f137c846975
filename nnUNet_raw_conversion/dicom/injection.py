"""When the radiopharmaceutical was injected, from what a PET's header says, and whether that can be."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

import numpy as np
import pydicom

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.decay import CLOCK_ERROR, CONTRADICT, durations, is_blank, span, whole_half_hours
from nnUNet_raw_conversion.dicom.fields import field_name, parse_datetime, parse_time, text_of, zone_of
from nnUNet_raw_conversion.dicom.radionuclide import longest_uptake_s

START_TIME, START_DATETIME = "RadiopharmaceuticalStartTime", "RadiopharmaceuticalStartDateTime"
SHORT_LIVED_S, DYNAMIC_FRAME_S, AT_ONCE_S = 1800.0, 600.0, 30.0  # see check_not_at_once
# Between injection and scan, as protocols have it for the nuclides of hours; what of several readings is so is likely
USUAL_UPTAKE = timedelta(minutes=35), timedelta(minutes=150)
HOUR = timedelta(hours=1)


def injection_time(
    headers: list[pydicom.Dataset], drug: pydicom.Dataset, scan: datetime, half_life: float, notes: list[str]
) -> datetime:
    """The start of the injection, in the time of the header.

    RadiopharmaceuticalStartDateTime (0018,1078) where it lies before the scan by no more than `longest_uptake_s`. Else
    its date is not that of the images, as where de-identification moved the two by different numbers of days, and only
    a time of day counts: RadiopharmaceuticalStartTime (0018,1072), or that of the date-time, on the day of the scan, or
    the day before if that is after the scan. Where both could be and differ, the time of day is right if the date-time
    states a time zone and they differ by whole half hours; else nothing decides. 00:00:00 is a time only where both
    fields say it and the scan is shortly after midnight.
    """
    text, clock_text = text_of(drug, START_DATETIME), text_of(drug, START_TIME)
    longest = longest_uptake_s(half_life)
    if is_blank(_time_of(text)) and is_blank(clock_text):
        stated, clock = _at_midnight(text, headers[0], scan, notes), None
    else:
        stated = None if is_blank(_time_of(text)) else parse_datetime(text, headers[0])
        clock = None if is_blank(clock_text) else parse_time(clock_text)
    if clock is None and stated:
        stated = _in_zone(stated, text, headers[0], scan, half_life, notes)
    if stated and 0 <= (scan - stated).total_seconds() <= longest:
        return stated if clock is None else _of_both(stated, clock, text, scan, half_life, notes)
    if clock is None and stated:
        clock = stated - _midnight(stated)
    if clock is None:
        blank = " (it is 00:00:00, as anonymisers write)" if is_blank(clock_text) or is_blank(text[8:]) else ""
        raise UserError(f"PET: {field_name(START_TIME)} is missing or 0{blank}; give injection_datetime with "
                        "--suv-override", "SUV_TIME_MISSING")  # fmt: skip
    if longest > 86400:
        raise UserError(f"PET: with a half-life of {half_life / 3600:.0f} h the time of day of the injection does not "
                        "say when it was, and its day is missing or not shortly before the scan; give "
                        "injection_datetime with --suv-override", "SUV_TIME_MISSING")  # fmt: skip
    if text:
        notes.append(f"{field_name(START_DATETIME)} is not shortly before the scan, only the time "
                     "of day of the injection is used")  # fmt: skip
    return _on_day_of(scan, clock)


def _of_both(
    stated: datetime, clock: timedelta, text: str, scan: datetime, half_life: float, notes: list[str]
) -> datetime:
    """The injection by a date-time that can be and a time of day.

    Raises:
        UserError: they differ, and nothing decides.
    """
    local = min((_midnight(stated) + clock + timedelta(days=days) for days in (-1, 0, 1)),
                key=lambda time: abs(time - stated))  # fmt: skip
    if abs(local - stated) <= timedelta(seconds=60) and abs(local - stated) <= span(CONTRADICT, half_life):
        return stated
    if zone_of(text) and whole_half_hours(local, stated):
        notes.append(f"{field_name(START_DATETIME)} is in another time zone than {field_name(START_TIME)}, which "
                     "is used")  # fmt: skip
        return local
    longest = longest_uptake_s(half_life)
    by_clock = None if longest > 86400 else _on_day_of(scan, clock)  # Zr-89 is imaged days later
    far = by_clock is None or (scan - by_clock).total_seconds() > longest
    if far or abs(local - stated) <= span(CONTRADICT, half_life):
        notes.append(f"{field_name(START_DATETIME)} and {field_name(START_TIME)} contradict each other, the first "
                     "is used")  # fmt: skip
        return stated
    ratio = 2 ** ((by_clock - stated).total_seconds() / half_life)
    raise UserError(f"PET: the time of the injection is not certain: {field_name(START_TIME)} (SUV x 1) and "
                    f"{field_name(START_DATETIME)} (SUV x {ratio:.3f}) contradict each other; give "
                    "injection_datetime with --suv-override", "SUV_TIME_CONTRADICTS")  # fmt: skip


def _at_midnight(text: str, header: pydicom.Dataset, scan: datetime, notes: list[str]) -> datetime | None:
    """An injection of which both fields say 00:00:00, if a scan so long after midnight is usual; else it is blanked."""
    stated = parse_datetime(text, header)
    if stated is None or zone_of(text) or not _is_usual(scan - stated):
        return None
    notes.append(f"{field_name(START_DATETIME)} and {field_name(START_TIME)} are 00:00:00, which is taken for the time "
                 "of the injection, for the scan is shortly after it")  # fmt: skip
    return stated


def _in_zone(
    stated: datetime, text: str, header: pydicom.Dataset, scan: datetime, half_life: float, notes: list[str]
) -> datetime:
    """The injection by a date-time alone that says +0000, as many systems write for local time.

    Args:
        stated: in the time of the header, whose zone is another or is not said.

    Raises:
        UserError: the uptake could be by the zone, and by local time, and nothing decides.
    """
    if zone_of(text)[1:] != "0000" or span(CONTRADICT, half_life) > HOUR:
        return stated  # of nuclides of days an hour does not matter
    short = half_life < SHORT_LIVED_S
    zone, uptake = text_of(header, "TimezoneOffsetFromUTC"), scan - stated
    local = parse_datetime(text[: -len(zone_of(text))], header)
    said = f"{field_name(START_DATETIME)} is in UTC"
    if zone and local != stated and not short and not _is_usual(uptake) and _is_usual(scan - local):
        if not 0 <= uptake.total_seconds() <= longest_uptake_s(half_life):
            notes.append(f"{said}, by which it cannot be; it is taken for local time")
            return local
        raise UserError(f"PET: the time of the injection is not certain: {said}, {uptake.total_seconds() / 60:.0f} min "
                        f"before the scan, but as local time it would be {(scan - local).total_seconds() / 60:.0f} min "
                        "before it; give injection_datetime with --suv-override",
                        "SUV_TIME_CONTRADICTS")  # fmt: skip
    # Without the header's zone that may be one to the east, where the uptake is some hours less
    if not zone and uptake > HOUR + (timedelta(0) if short else USUAL_UPTAKE[0]):
        raise UserError(f"PET: the time of the injection is not certain: {said} and the header does not say in which "
                        "time zone the scan is; give injection_datetime with --suv-override",
                        "SUV_TIME_CONTRADICTS")  # fmt: skip
    if not zone and uptake > HOUR:
        notes.append(f"{said}, and the header does not say in which time zone the scan is; it is taken for local time, "
                     "for an hour less is too little before a scan")  # fmt: skip
    return stated


def _is_usual(uptake: timedelta) -> bool:
    return USUAL_UPTAKE[0] <= uptake <= USUAL_UPTAKE[1]


def _time_of(text: str) -> str:
    """The time of a DICOM DT, without its date and zone."""
    return re.split("[+-]", text[8:])[0]


def _on_day_of(scan: datetime, clock: timedelta) -> datetime:
    """The last time before the scan at which it was `clock`."""
    injection = _midnight(scan) + clock
    return injection if injection <= scan else injection - timedelta(days=1)


def _midnight(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def check_elapsed(elapsed: float, half_life: float) -> None:
    """Raises UserError if the injection of the header, `elapsed` s before the scan, cannot be true."""
    longest = longest_uptake_s(half_life)
    if -CLOCK_ERROR.total_seconds() <= elapsed <= longest:
        return
    after = elapsed < 0 or 0 < 86400 - elapsed < longest  # by its time of day it was put on the day before
    when = f"{abs(elapsed) / 3600:.1f} h {'before' if elapsed > 0 else 'after'} the scan"
    too = f", or {(86400 - elapsed) / 3600:.1f} h after it" if after and elapsed > 0 else ""
    raise UserError(f"PET: the injection by {field_name(START_TIME)} is {when}, which cannot be with a half-life of "
                    f"{half_life:g} s (at most {longest / 3600:.3g} h){too}; give injection_datetime with "
                    "--suv-override", "SUV_INJECTION_AFTER_SCAN" if after else "SUV_UPTAKE_TOO_LONG")  # fmt: skip


def check_override(elapsed: float, half_life: float, column: str) -> None:
    """Raises UserError if the user's `column` puts the injection `elapsed` s before the scan and that cannot be."""
    if -CLOCK_ERROR.total_seconds() <= elapsed <= longest_uptake_s(half_life):
        return
    when = "before" if elapsed > 0 else "after"
    what = f"is {abs(elapsed) / 3600:.1f} h {when} the scan"
    if column == "decay_reference_datetime":
        what = f"puts the injection {abs(elapsed) / 3600:.1f} h {when} it"
    code = "SUV_UPTAKE_TOO_LONG" if elapsed > 0 else "SUV_INJECTION_AFTER_SCAN"
    raise UserError(f"PET: {column} of --suv-override {what}; give it in the scanner's local time, on the date that "
                    "the images have", code)  # fmt: skip


def check_not_at_once(headers: list[pydicom.Dataset], uptake: float, half_life: float) -> None:
    """Raises UserError where a static scan begins with the injection (`uptake` s before): one of the times is a dummy.

    Dynamic scans begin so, and with short-lived tracers (C-11, N-13, O-15, Rb-82) all do.
    """
    frame = np.nan_to_num(durations(headers)).max()
    if half_life < SHORT_LIVED_S or frame >= DYNAMIC_FRAME_S or uptake > AT_ONCE_S:
        return
    raise UserError(f"PET: {field_name(START_TIME)} and {field_name('AcquisitionTime')} are the same, so no time lies "
                    "between injection and scan, and one of them is a dummy; give injection_datetime with "
                    "--suv-override", "SUV_UPTAKE_ZERO")  # fmt: skip
