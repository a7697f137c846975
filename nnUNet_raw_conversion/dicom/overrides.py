"""What a user knows better than the headers of a PET: a table of weight, dose, times and half-life by case."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pydicom

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.clinical import read_table
from nnUNet_raw_conversion.dicom.fields import parse_datetime

COLUMNS = ("case_id", "weight_kg", "dose_bq", "dose_mbq", "injection_datetime", "half_life_s",
           "decay_reference_datetime")  # fmt: skip
DATETIMES = ("injection_datetime", "decay_reference_datetime")


@dataclass(frozen=True)
class SuvOverride:
    """What to take instead of the header; None is as the header says."""

    weight_kg: float | None = None
    dose_bq: float | None = None
    injection: datetime | None = None
    """In the local time of the scanner."""
    half_life_s: float | None = None
    decay_reference: datetime | None = None
    """The time to which a PET with DecayCorrection START is decay-corrected, in the local time of the scanner."""


def read_overrides(path: Path) -> dict[str, SuvOverride]:
    """The rows of a csv or xlsx file with columns case_id and any of weight_kg, dose_bq or dose_mbq,
    injection_datetime, half_life_s and decay_reference_datetime; times are 2021-03-04 12:15:00, or 20210304121500 as
    in DICOM. Empty cells are as the header says.

    Raises:
        UserError: naming file, line and column, never what is in a cell.
    """
    header, rows = read_table(path)
    names = [name.lower() for name in header]
    strange = [name for name in names if name not in COLUMNS or names.count(name) > 1]
    if strange or "case_id" not in names:
        what = f"column {strange[0]!r} is unknown or twice" if strange else "there is no column case_id"
        raise UserError(f"{path}: {what}; the columns are {', '.join(COLUMNS)}")
    overrides: dict[str, SuvOverride] = {}
    for line, row in rows:
        cells = {name: "" if cell is None else str(cell).strip() for name, cell in zip(names, row, strict=True)}
        case_id = cells.pop("case_id")
        where = f"{path}, line {line}"
        if not case_id or case_id in overrides:
            raise UserError(f"{where}: case_id is {'there twice; keep one of the rows' if case_id else 'empty'}")
        overrides[case_id] = _override(cells, where)
    return overrides


def _override(cells: dict[str, str], where: str) -> SuvOverride:
    """One row, without case_id, as an override."""
    values: dict[str, float] = {}
    for name, cell in cells.items():
        if name in DATETIMES or not cell:
            continue
        try:
            values[name] = float(cell.replace(",", "."))
        except ValueError:
            values[name] = -1
        if not 0 < values[name] < math.inf:
            raise UserError(f"{where}: {name} is not a number above 0; correct it, or leave it empty")
    if "dose_mbq" in values:
        if "dose_bq" in values:
            raise UserError(f"{where}: has dose_bq and dose_mbq; leave one of them empty")
        values["dose_bq"] = 1e6 * values["dose_mbq"]
    moments = {}
    for name in DATETIMES:
        text = cells.get(name, "")
        moments[name] = parse_datetime(re.sub(r"[-: T]", "", text), pydicom.Dataset())
        if text and moments[name] is None:
            raise UserError(f"{where}: {name} is not like 2021-03-04 12:15:00; correct it")
    return SuvOverride(values.get("weight_kg"), values.get("dose_bq"), moments["injection_datetime"],
                       values.get("half_life_s"), moments["decay_reference_datetime"])  # fmt: skip
