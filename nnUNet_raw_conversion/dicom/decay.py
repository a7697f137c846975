"""The time to which a PET is decay-corrected, from what its header's fields agree on.

With DecayCorrection START every voxel is as at one time, the start of the scan, and an error of it by 20 min is one of
13 % in SUV with F-18. No field says it reliably: SeriesTime may be that of a later processing or a dummy of the
de-identification, the first beds may not have been exported, a window of a long scan may have been reconstructed by
itself. So every field that says or implies the time is evidence with a weight, evidence within `AGREE` of each other
is added up, and what has most wins, unless something else has as much.

| evidence | weight |
|---|---|
| DecayCorrectionDateTime (0018,9701) | 3, it is that time by its definition |
| GE's scan date-time (0009,100d) | 2, it is made for this |
| Philips' factors (7053,1000) / (7053,1009) | 2, SUV per Bq/ml says the scanner's own uptake time |
| SeriesTime (0008,0031) | 1; 2 if NumberOfSlices says that slices are missing |
| the earliest AcquisitionTime (0008,0032) | 1; 2 for Philips, whose SeriesTime is often a dummy |
| FrameReferenceTime (0054,1300) | 2 if beds of different times give one reference, or it hits SeriesTime etc., else 1 |
| DecayFactor (0054,1321) | the same |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import pydicom

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.dicom.fields import (
    date_and_time,
    field_name,
    moment_of,
    number_of,
    parse_datetime,
    plain_text,
    private_value,
    text_of,
    zone_of,
)

PHILIPS, GE = "Philips PET Private Group", "GEMS_PETD_01"
# Times that lie so near that SUV differs by less are the same time; from the second on they contradict each other.
AGREE, CONTRADICT = 0.01, 0.02
ROUNDING = timedelta(seconds=1.5)  # times are often written in whole seconds
CLOCK_ERROR = timedelta(seconds=1)
# One field by itself is not believed if it says that the scan began so long before the first slice.
LONGEST_WAIT = timedelta(hours=1)
LONGEST_SCAN = timedelta(hours=3)  # from the first bed to the last, two passes of a whole body included
DECAY_FACTOR = field_name("DecayFactor")
DECAY_DATETIME, GE_SCAN = "DecayCorrectionDateTime", "GE's scan date-time (0009,100d)"


@dataclass(frozen=True)
class Evidence:
    source: str
    """The field, as messages name it."""
    time: datetime
    weight: int
    stated: bool = True
    """A field is this time; else it is computed from one and good to seconds only."""
    convention: str = ""


def span(fraction: float, half_life: float) -> timedelta:
    """The time in which SUV changes by `fraction`, but no less than the rounding of times."""
    return max(timedelta(seconds=half_life * float(np.log2(1 + fraction))), ROUNDING)


def mean_time(duration: float, half_life: float) -> float:
    """When, in s after the start of a frame of `duration` s, the activity is its average over the frame.

    The average of 2^-(t / T) over the frame is 2^-(mean / T): mean = ln(x / (1 - exp(-x))) / x x duration with x =
    ln 2 x duration / T. For short frames it is their middle.
    """
    x = np.log(2) * duration / half_life
    return float(np.log(x / -np.expm1(-x)) / x * duration) if x > 1e-6 else duration / 2


def series_time(header: pydicom.Dataset) -> datetime | None:
    if is_blank(text_of(header, "SeriesTime")):
        return None
    return date_and_time(header, ("SeriesDate", "AcquisitionDate", "StudyDate"), "SeriesTime")


def is_blank(clock: str) -> bool:
    """Whether a time of day is 00:00:00, which anonymisers write in place of a time."""
    return bool(clock) and not clock.strip("0.:")


def acquisition_times(headers: Sequence[pydicom.Dataset]) -> list[datetime | None]:
    """When the frame of each slice began; None for all where all of them say 00:00:00, and for those that alone do.

    A bed that begins at midnight is told by the others, which are next to it.
    """
    if all(is_blank(text_of(header, "AcquisitionTime")) for header in headers):
        return [moment_of(header, "FrameAcquisitionDateTime", header) for header in headers]
    times = [_acquired(header) for header in headers]
    if _duration(times) <= LONGEST_SCAN:
        return times
    latest = max(time for time in times if time)
    # One date for all, or none, though the scan went on over midnight
    later = [time + timedelta(days=1) if time and latest - time > timedelta(hours=12) else time for time in times]
    if _duration(later) <= LONGEST_SCAN:
        return later
    return [None if is_blanked(header) else time for header, time in zip(headers, times, strict=True)]


def is_blanked(header: pydicom.Dataset) -> bool:
    """Whether the time of the frame is said, but as 00:00:00."""
    return is_blank(text_of(header, "AcquisitionTime")) and not text_of(header, "FrameAcquisitionDateTime")


def _duration(times: Sequence[datetime | None]) -> timedelta:
    known = [time for time in times if time]
    return max(known) - min(known) if known else timedelta(0)


def _acquired(header: pydicom.Dataset) -> datetime | None:
    own = moment_of(header, "FrameAcquisitionDateTime", header)
    if own:
        return own
    time = date_and_time(header, ("AcquisitionDate", "SeriesDate", "StudyDate"), "AcquisitionTime")
    if time is None:
        return moment_of(header, "AcquisitionDateTime", header)
    series = series_time(header)
    if text_of(header, "AcquisitionDate") or series is None:
        return time
    return time + timedelta(days=round((series - time) / timedelta(days=1)))  # over midnight


def durations(headers: Sequence[pydicom.Dataset]) -> np.ndarray:
    """Lengths of the slices' frames in s (N,), NaN where they are not said."""
    return np.array([number_of(header, "ActualFrameDuration") or np.nan for header in headers]) / 1000


def reference_time(
    headers: Sequence[pydicom.Dataset],
    acquired: Sequence[datetime | None],
    injection: datetime,
    half_life: float,
    more: Sequence[Evidence],
    notes: list[str],
) -> tuple[datetime, str]:
    """The time to which DecayCorrection START refers, and the field that it is from; see the top of the file.

    Args:
        acquired: of each slice, see `acquisition_times`. half_life: in s.
        more: evidence from elsewhere. notes: what is odd is added to it.

    Raises:
        UserError: what the fields say differs by more than 2 % of SUV, and nothing decides between them.
    """
    agree, conflict = span(AGREE, half_life), span(CONTRADICT, half_life)
    first = headers[int(np.argmin([time or datetime.max for time in acquired]))]
    stated = _stated(first, headers, acquired, notes)
    earliest = min((time for time in acquired if time), default=None) or series_time(first)
    by_name = (DECAY_DATETIME, GE_SCAN)  # made to say this time: where they cannot be true, something else is wrong
    early = [one for one in [*stated, *more] if one.time < injection - CLOCK_ERROR and one.source != DECAY_DATETIME]
    late = [one for one in [*stated, *more] if one.time > earliest + CLOCK_ERROR and one.source not in by_name]
    # Two fields that lie after the first slice and agree are no later processing: the slices' own times are wrong
    late = [one for one in late if not any(abs(one.time - other.time) <= agree and other not in late
                                           for other in stated if other is not one)]  # fmt: skip
    evidence = [one for one in [*stated, *more] if one not in early and one not in late]
    evidence += _implied(headers, acquired, half_life, evidence, earliest, injection, agree)
    evidence = [one for one in evidence if one.time >= injection - agree or one.source == DECAY_DATETIME]
    best = max(evidence, key=lambda one: (_support(one, evidence, agree), one.stated))
    members = [one for one in evidence if abs(one.time - best.time) <= agree]
    chosen = _nearest_to_median(members)
    against = [one for one in evidence if abs(one.time - chosen.time) > conflict and one not in members]
    if _undecided(chosen, members, against, agree, earliest, conflict):
        raise _contradiction([chosen, *_one_each(against, agree)], half_life)
    if against:
        others = " and ".join(f"{one.source} (SUV x {_ratio(one, chosen, half_life):.3f})"
                              for one in _one_each(against, agree))  # fmt: skip
        agreeing = " and ".join(dict.fromkeys(one.source for one in members))
        notes.append(f"decay reference: {agreeing} {'agree' if len(members) > 1 else 'is believed'}, not {others}")
    for one in members:
        if one.convention:
            notes.append(one.convention)
    only = " only" if not chosen.stated else ""
    odd = "; SeriesTime is missing, later or a dummy" if chosen.source == "earliest acquisition" else ""
    return chosen.time, chosen.source + odd + only


def _stated(
    first: pydicom.Dataset, headers: Sequence[pydicom.Dataset], acquired: Sequence[datetime | None], notes: list[str]
) -> list[Evidence]:
    """What fields say outright, in the order of preference among those that agree."""
    series, times = series_time(first), [time for time in acquired if time]
    earliest = min(times, default=series)
    philips = "philips" in text_of(first, "Manufacturer").lower() or private_value(first, 0x7053, PHILIPS, 0x09)
    found = []
    said = moment_of(first, "DecayCorrectionDateTime", first)
    if said:
        if zone_of(text_of(first, "DecayCorrectionDateTime")) and not text_of(first, "TimezoneOffsetFromUTC"):
            said = next((time for time in (series, earliest) if time and whole_half_hours(said, time)), said)
        found.append(Evidence(DECAY_DATETIME, said, 3))
    text = plain_text(private_value(first, 0x0009, GE, 0x0D) or "")
    scan = None if is_blank(text[8:].split("+")[0]) else parse_datetime(text, first)
    if scan and abs(scan - earliest) < timedelta(days=1):
        found.append(Evidence(GE_SCAN, scan, 2))
    elif scan:
        notes.append(f"{GE_SCAN} is of another day, it is not looked at")
    if series:
        slices = number_of(first, "NumberOfSlices") or 0
        found.append(Evidence("SeriesTime", series, 2 if times and slices > len(headers) else 1))
    if times:
        name = "earliest acquisition, as of Philips" if philips else "earliest acquisition"
        found.append(Evidence(name, earliest, 2 if philips else 1))
        if philips:  # by rank before SeriesTime
            found.sort(key=lambda one: one.source == "SeriesTime")
    return found


def _implied(
    headers: Sequence[pydicom.Dataset], acquired: Sequence[datetime | None], half_life: float,
    stated: Sequence[Evidence], earliest: datetime, injection: datetime, agree: timedelta,
) -> list[Evidence]:  # fmt: skip
    """What FrameReferenceTime and DecayFactor say together with the time of each slice's frame.

    FrameReferenceTime is from the reference to the mean time of the frame (PS3.3 C.8.9.4.1.5), with GE to its start.
    DecayFactor is 2^(time since the reference / half-life), of the start of the frame or (GE Discovery, Philips Gemini)
    of its mean time. Neither says anything where it is the same for all (0; 1) or contradicts itself from bed to bed,
    as where AcquisitionTime is that of the whole scan and FrameReferenceTime that of the bed.
    """
    if None in acquired:
        return []
    zero = acquired[0]
    begun = np.array([(time - zero).total_seconds() for time in acquired])
    length = np.nan_to_num(durations(headers))
    middle = np.array([mean_time(one, half_life) if one else 0.0 for one in length])
    reference = np.array([number_of(header, "FrameReferenceTime") or 0.0 for header in headers]) / 1000
    factor = np.array([number_of(header, "DecayFactor") or 0.0 for header in headers])
    ge = text_of(headers[0], "Manufacturer").upper().startswith("GE")
    beds = begun.max() - begun.min() > agree.total_seconds()
    found = []
    for source, useful, since, conventions in (
        ("FrameReferenceTime", reference.any(), reference, ("start", "middle") if ge else ("middle", "start")),
        ("DecayFactor", (factor > 0).all() and not (factor == 1).all(),
         half_life * np.log2(np.where(factor > 0, factor, 1)), ("start", "middle")),
    ):  # fmt: skip
        options = []
        for rank, convention in enumerate(conventions if useful else ()):
            times = begun - since + (middle if convention == "middle" else 0.0)
            if times.max() - times.min() > agree.total_seconds():
                continue
            time = zero + timedelta(seconds=float(np.median(times)))
            if time > earliest + agree:
                continue
            gaps = [abs(one.time - time) for one in (*stated, *found)]
            options.append((min(gaps, default=agree), rank, time, convention))
        if not options:
            continue
        gap, rank, time, convention = min(options)
        own = abs(time - earliest) <= agree
        hits = any(abs(one.time - time) <= agree for one in (*stated, *found))
        note = ""
        if source == "DecayFactor" and gap <= agree and length.any():
            note = f"{DECAY_FACTOR} is that of the {convention} of the frames"
        # Some count the times of the frames from the injection, to which nothing is decay-corrected for that
        sure = beds and not (source == "FrameReferenceTime" and abs(time - injection) <= agree)
        found.append(Evidence(f"{source} {field_name(source)[-11:]}", time, 2 if sure or (hits and not own) else 1,
                              stated=False, convention=note))  # fmt: skip
    return found


def _support(one: Evidence, evidence: Sequence[Evidence], agree: timedelta) -> int:
    return sum(other.weight for other in evidence if abs(other.time - one.time) <= agree)


def _nearest_to_median(members: Sequence[Evidence]) -> Evidence:
    """Of evidence that agrees, the stated time (the first of them, if several are as near) nearest to the median."""
    middle = np.median([(one.time - members[0].time).total_seconds() for one in members])
    stated = [one for one in members if one.stated] or members
    return min(stated, key=lambda one: abs(round((one.time - members[0].time).total_seconds() - middle, 3)))


def _undecided(
    chosen: Evidence, members: Sequence[Evidence], against: Sequence[Evidence], agree: timedelta, earliest: datetime,
    conflict: timedelta,
) -> bool:  # fmt: skip
    """Whether what contradicts the chosen time has as much weight, or one field alone says something far-fetched."""
    weight = sum(one.weight for one in members)
    if against and max(_support(one, against, agree) for one in against) >= weight:
        return True
    if chosen.time > earliest + conflict:  # no scan is corrected to a time after its first slice
        return True
    alone = len(members) == 1 and chosen.source != DECAY_DATETIME
    far = earliest - chosen.time > LONGEST_WAIT
    return alone and (far or (bool(against) and sum(one.weight for one in against) >= weight))


def _one_each(evidence: Sequence[Evidence], agree: timedelta) -> list[Evidence]:
    """The first of each group that agrees, with all their names."""
    groups: list[list[Evidence]] = []
    for one in evidence:
        group = next((g for g in groups if abs(g[0].time - one.time) <= agree), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return [Evidence(" and ".join(dict.fromkeys(one.source for one in group)), group[0].time, 0) for group in groups]


def _ratio(one: Evidence, to: Evidence, half_life: float) -> float:
    """SUV by `one` in units of SUV by `to`."""
    return float(2 ** ((one.time - to.time).total_seconds() / half_life))


def _contradiction(groups: Sequence[Evidence], half_life: float) -> UserError:
    first, *others = groups
    shown = "".join(f", {one.source} (SUV x {_ratio(one, first, half_life):.3f})" for one in others)
    far = "" if others else ", which nothing confirms and which is not near the first slice"
    return UserError(f"PET: the time to which it is decay-corrected is not certain, its fields contradict each other: "
                     f"{first.source} (SUV x 1){shown}{far}; give decay_reference_datetime with --suv-override",
                     "SUV_TIME_CONTRADICTS")  # fmt: skip


def whole_half_hours(one: datetime, other: datetime) -> bool:
    """Whether two times differ by a difference of time zones: a multiple of 30 min that is not 0."""
    halves = (one - other) / timedelta(minutes=30)
    return round(halves) != 0 and abs(halves - round(halves)) <= 1 / 30 and abs(halves) <= 28
