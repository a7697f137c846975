"""Who a case is stays in one file: the key table of pseudonyms.

The key table is a csv file `case_id,trial,patient,timepoint,source`, readable by its owner only. It lies beside the
originals (who may read these may know the patients) and never in a folder of nnU-Net, which is copied and shared.
"""

from __future__ import annotations

import csv
import os
import random
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from nnunet_fratmae.base.command import UserError
from nnUNet_raw_conversion.clinical import read_table


@dataclass(frozen=True)
class Key:
    """One row of the key table: the pseudonym `case_id` ("" = none yet) of one time point of one patient of a trial.

    In a table that a user fills in, an empty `trial` or `timepoint` stands for any. `source` is a help for people.
    """

    case_id: str
    trial: str
    patient: str
    timepoint: str = ""
    source: str = ""


COLUMNS = tuple(field.name for field in fields(Key))


def key_file(chosen: Path | None, source: Path) -> Path:
    """Where the key table of the input folder `source` is: `chosen`, or else key_<folder>.csv beside it.

    Raises:
        UserError: it would lie in a dataset or in nnU-Net's results, which are copied to others.
    """
    source = source.resolve()
    path = chosen.resolve() if chosen else source.parent / f"key_{source.name}.csv"
    folders = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    shared = [Path(os.environ[v]).resolve() for v in folders if os.environ.get(v)]
    in_dataset = any(re.match(r"(\.partial_)?Dataset.*_", part) for part in path.parts)
    if in_dataset or any(folder in path.parents for folder in shared):
        what = f"--key-file {chosen}" if chosen else "the key file beside the input"
        raise UserError(f"{what}: would lie in a dataset or in nnU-Net's folders, which are passed on; say --key-file "
                        "with a file outside, whose name does not begin with Dataset")  # fmt: skip
    if path.is_dir():
        raise UserError(f"--key-file {path}: is a folder; name a csv file")
    return path


def read_keys(path: Path) -> list[Key]:
    """The rows of a key table; none if there is no such file.

    Raises:
        UserError: naming file and line, and never what is in it.
    """
    if not path.exists():
        return []
    names, rows = read_table(path)
    names = [name.lower() for name in names]
    if not {"case_id", "patient"} <= set(names) <= set(COLUMNS) or len(set(names)) < len(names):
        raise UserError(f"{path}, line 1: the columns must be {','.join(COLUMNS)} (case_id and patient at least)")
    keys: dict[tuple, Key] = {}
    ids: set[str] = set()
    for line, cells in rows:
        where = f"{path}, line {line}"
        cells = ["" if cell is None else " ".join(str(cell).split()) for cell in cells]
        key = Key(**{"trial": "", **dict(zip(names, cells, strict=True))})
        ends = ("_0000", "_seg")  # which nnU-Net takes for parts of other files' names
        if not re.fullmatch(r"[A-Za-z0-9_-]+", key.case_id) or key.case_id.endswith(ends) or not key.patient:
            raise UserError(f"{where}: case_id must be letters, digits, '_' and '-' (not _0000 or _seg at its end), "
                            "and patient must not be empty")  # fmt: skip
        if key.case_id.casefold() in ids or _who(key) in keys:
            raise UserError(f"{where}: this case_id or this patient, trial and timepoint is there twice; remove one")
        ids.add(key.case_id.casefold())
        keys[_who(key)] = key
    return list(keys.values())


def assign(keys: list[Key], wanted: Iterable[Key], name: str) -> list[Key]:
    """`wanted` with their pseudonyms, in their order: those of the table `keys`, or else new ones NAME_0001, ...

    `keys` is brought up to date. New numbers are given in random order, since the order of patient numbers (of
    names, of dates) would tell something about who is who; a number is never given twice.
    """
    wanted = list(wanted)
    rows_of: dict[str, list[int]] = {}
    for j, old in enumerate(keys):
        rows_of.setdefault(old.patient.casefold(), []).append(j)
    places: dict[int, int] = {}  # index in `wanted` -> index in `keys`
    taken: set[int] = set()
    for exact in (True, False):
        for i, key in enumerate(wanted):
            rows = (j for j in rows_of.get(key.patient.casefold(), ()) if j not in taken)
            j = next((j for j in rows if _matches(keys[j], key, exact)), None)
            if i not in places and j is not None:
                places[i] = j
                taken.add(j)
                keys[j] = replace(key, case_id=keys[j].case_id, trial=key.trial or keys[j].trial)
    numbers = [int(m[1]) for k in keys if (m := re.fullmatch(re.escape(name) + r"_(\d+)", k.case_id))]
    new = [i for i in range(len(wanted)) if i not in places]
    random.SystemRandom().shuffle(new)
    for number, i in enumerate(new, max(numbers, default=0) + 1):
        places[i] = len(keys)
        keys.append(replace(wanted[i], case_id=f"{name}_{number:04d}"))
    return [keys[places[i]] for i in range(len(wanted))]


def write_keys(path: Path, keys: Iterable[Key]) -> None:
    """Write the key table, readable by its owner only (0600); it is there whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(astuple(key) for key in sorted(keys, key=lambda key: key.case_id))
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"the key file {path} cannot be written ({error.strerror}); say --key-file FILE with a place "
                        "that only you can read") from None  # fmt: skip


def same_number(text: str) -> str:
    """A patient's number as it is compared: without case, outer blanks, and what spreadsheets do to "0012"."""
    text = re.sub(r"\.0$", "", " ".join(text.split()).casefold())
    return text.lstrip("0") or text if text.isdigit() else text


def _who(key: Key) -> tuple[str, str, str]:
    return key.trial.casefold(), key.patient.casefold(), key.timepoint.casefold()


def _matches(old: Key, key: Key, exact: bool) -> bool:
    """Whether the row `old` of the table is that of `key`; if not `exact`, an empty trial or timepoint is any."""
    if exact:
        return _who(old) == _who(key)
    (trial, patient, timepoint), (new_trial, new_patient, new_timepoint) = _who(old), _who(key)
    same_trial = "" in (trial, new_trial) or trial == new_trial
    return patient == new_patient and same_trial and timepoint in ("", new_timepoint)
