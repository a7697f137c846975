"""Fields of DICOM headers as numbers and moments; what is missing, empty or cannot be read is None."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

import numpy as np
import pydicom
from pydicom.tag import Tag

from nnUNet_raw_conversion.shown import shown_text

# Units (PS3.3 C.8.9.1.1.3), DecayCorrection, SUVType, PatientSex
TERMS = frozenset((
    "CNTS", "NONE", "CM2", "CM2ML", "PCNT", "CPS", "BQML", "MGMINML", "UMOLMINML", "MLMING", "MLG", "1CM", "UMOLML",
    "PROPCNTS", "PROPCPS", "MLMINML", "MLML", "GML", "STDDEV", "START", "ADMIN", "BW", "LBM", "LBMJAMES128", "LBMJANMA",
    "IBW", "BSA", "M", "F", "O", "W",
))  # fmt: skip


def text_of(item: pydicom.Dataset, keyword: str) -> str:
    """The value as text, "" where the field is missing, empty or against its type (a weight of "70,5 kg")."""
    try:
        value = item.get(keyword)
    except (ValueError, TypeError, ArithmeticError):
        return ""
    return "" if value is None else str(value).strip()


def number_of(item: pydicom.Dataset, keyword: str) -> float | None:
    """None where the field is missing, empty or no finite number."""
    try:
        value = float(text_of(item, keyword))
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def no_number(item: pydicom.Dataset, keyword: str) -> str:
    """What to say of a field that `number_of` finds no number above 0 in."""
    try:
        element = item.get_item(keyword)
    except (ValueError, TypeError, KeyError):
        element = None
    is_there = element is not None and bool(plain_text(element.value or ""))
    return "is no number" if is_there and number_of(item, keyword) is None else "is missing or 0"


def shown_code(value: str) -> str:
    """A code of a header as a message may quote it: terms of the standard as they are, anything else as free text."""
    return value if value.upper() in TERMS else shown_text(value) or "missing"


def field_name(keyword: str) -> str:
    tag = Tag(keyword)
    return f"{keyword} ({tag.group:04x},{tag.element:04x})"


def date_and_time(header: pydicom.Dataset, dates: tuple[str, ...], time: str) -> datetime | None:
    """Date (the first that is there) and time of a header; without any date, times are on one day of no meaning."""
    clock = parse_time(text_of(header, time))
    days = [day for keyword in dates if (day := parse_date(text_of(header, keyword)))]
    return None if clock is None else (days[0] if days else datetime(2000, 1, 1)) + clock


def moment_of(item: pydicom.Dataset, keyword: str, header: pydicom.Dataset) -> datetime | None:
    return parse_datetime(text_of(item, keyword), header)


def parse_datetime(text: str, header: pydicom.Dataset) -> datetime | None:
    """A DICOM DT with date and time, in the time zone of the header's times (0008,0201) if both zones are stated."""
    match = re.fullmatch(r"(\d{8})(\d{2}[\d.]*)([+-]\d{4})?", text.strip())
    day, clock = (parse_date(match[1]), parse_time(match[2])) if match else (None, None)
    if day is None or clock is None:
        return None
    zone = re.fullmatch(r"[+-]\d{4}", text_of(header, "TimezoneOffsetFromUTC"))
    shift = _offset(zone[0]) - _offset(match[3]) if zone and match[3] else timedelta(0)
    return day + clock + shift


def zone_of(text: str) -> str:
    """The time zone that a DICOM DT states, as "+0130", or ""."""
    match = re.search(r"[+-]\d{4}$", text.strip())
    return match[0] if match else ""


def _offset(zone: str) -> timedelta:
    """ "+0130" as a time span."""
    return (-1 if zone[0] == "-" else 1) * timedelta(hours=int(zone[1:3]), minutes=int(zone[3:]))


def parse_date(text: str) -> datetime | None:
    """A DICOM DA (also in the old form 2021.03.04)."""
    try:
        return datetime.strptime(text.replace(".", ""), "%Y%m%d")
    except ValueError:
        return None


def parse_time(text: str) -> timedelta | None:
    """A DICOM TM as time since midnight: HH[MM[SS[.FFFFFF]]] (also in the old form HH:MM:SS)."""
    match = re.fullmatch(r"(\d{2})(?:(\d{2})(?:(\d{2})(\.\d*)?)?)?", text.replace(":", ""))
    if not match or int(match[1]) > 23 or int(match[2] or 0) > 59 or int(match[3] or 0) > 60:
        return None
    hours, minutes, seconds, fraction = match.groups(default="0")
    return timedelta(hours=int(hours), minutes=int(minutes), seconds=int(seconds) + float("0" + fraction))


def plain_text(value: object) -> str:
    """The text of a private element, which is bytes where the file does not say its type."""
    return (value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)).strip(" \0")


def private_value(header: pydicom.Dataset, group: int, creator: str, element: int) -> object | None:
    """The value of a private element, None where it is absent.

    De-identification may remove the block's creator and keep the block; it is then looked for at 10, where the first
    block of a group is.
    """
    try:
        return header.private_block(group, creator)[element].value
    except KeyError:
        pass
    if (group, 0x0010) in header:  # the block at 10 is somebody else's
        return None
    found = header.get((group, 0x1000 + element))
    return None if found is None else found.value
