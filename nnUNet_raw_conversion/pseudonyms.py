"""Who a case is stays in one file: the key table of pseudonyms.

The key table is a csv file `case_id,trial,patient,timepoint,source`, readable by its owner only. It lies beside the
originals (who may read these may know the patients) and never in a folder of nnU-Net, which is copied and shared.
"""

from __future__ import annotations

import os
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.base.files import WriteError, renamed
from nnunet_fratmae.base.locks import locked
from nnunet_fratmae.base.tables import csv_text
from nnUNet_raw_conversion.clinical import read_table


@dataclass(frozen=True)
class Key:
    """One row of the key table: the pseudonym `case_id` ("" = none yet) of one time point of one patient of a trial.

    In a table that a user fills in, an empty `trial` or `timepoint` stands for any. `source` is a help for people. All
    are as `plain_text` gives them, so that what is assigned, written, read again and compared is the same.
    """

    case_id: str
    trial: str
    patient: str
    timepoint: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain_text(getattr(self, field.name)))


COLUMNS = tuple(field.name for field in fields(Key))
PATIENCE_S = 60  # the key table is locked for as long as it takes to read and write it


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


@contextmanager
def only_user(path: Path) -> Iterator[None]:
    """While this is entered no other command reads, assigns and writes pseudonyms of the same key table.

    Raises:
        UserError: another command has it for more than a minute, or its folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locked(path.with_name(f".lock_{path.name}"), f"the key file {path}", PATIENCE_S)
        lock.__enter__()
    except (OSError, WriteError) as error:
        raise _cannot_be_written(path, error) from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


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
        cells = ["" if cell is None else str(cell) for cell in cells]
        key = Key(**{"trial": "", **dict(zip(names, cells, strict=True))})
        ends = ("_0000", "_seg")  # which nnU-Net takes for parts of other files' names
        if not re.fullmatch(r"[A-Za-z0-9_-]+", key.case_id) or key.case_id.endswith(ends) or not key.patient:
            raise UserError(f"{where}: case_id must be letters, digits, '_' and '-' (not _0000 or _seg at its end), "
                            "and patient must not be empty")  # fmt: skip
        if key.case_id.casefold() in ids or who(key) in keys:
            raise UserError(f"{where}: this case_id or this patient, trial and timepoint is there twice; remove one")
        ids.add(key.case_id.casefold())
        keys[who(key)] = key
    return list(keys.values())


def assign(keys: list[Key], wanted: Iterable[Key], name: str) -> list[Key]:
    """`wanted` with their pseudonyms, in their order: those of the table `keys`, or else new ones NAME_0001, ...

    `keys` is brought up to date; no two of `wanted` may be the same (`who`). New numbers are given in random order,
    since the order of patient numbers (of names, of dates) would tell something about who is who; a number is never
    given twice.
    """
    wanted = list(wanted)
    rows_of: dict[str, list[int]] = {}
    for j, old in enumerate(keys):
        rows_of.setdefault(same_name(old.patient), []).append(j)
    places: dict[int, int] = {}  # index in `wanted` -> index in `keys`
    taken: set[int] = set()
    for exact in (True, False):
        for i, key in enumerate(wanted):
            rows = (j for j in rows_of.get(same_name(key.patient), ()) if j not in taken)
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
    text = csv_text(COLUMNS, (astuple(key) for key in sorted(keys, key=lambda key: key.case_id)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with renamed(path) as partial:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
                file.write(text)
    except (OSError, WriteError) as error:
        raise _cannot_be_written(path, error) from None


def check_keys(path: Path, named: Iterable[Key]) -> None:
    """Whether the key table still says who the cases are that were named by it.

    A lock keeps other commands off; where a file system has none, or somebody edits the table meanwhile, it is told
    here.

    Raises:
        UserError: it says otherwise.
    """
    there = {key.case_id: who(key) for key in read_keys(path)}
    others = [key.case_id for key in named if there.get(key.case_id) != who(key)]
    if others:
        raise UserError(f"{path}: was changed while this command ran, so that {len(others)} of its cases are of others "
                        f"there ({', '.join(others[:3])}{', ...' if others[3:] else ''}); say the same again: these "
                        "are converted anew", "KEYS_CHANGED")  # fmt: skip


def _cannot_be_written(path: Path, error: Exception) -> UserError:
    cause = error.__context__ if isinstance(error, WriteError) else error
    why = getattr(cause, "strerror", None) or type(cause).__name__
    return UserError(f"the key file {path} cannot be written ({why}); say --key-file FILE with a place that only you "
                     "can read", "KEYS_NOT_WRITTEN")  # fmt: skip


def plain_text(text: str) -> str:
    """A text as it is kept: composed (NFC; macOS writes an umlaut as two characters), with single blanks between words.

    Control characters are blanks, and bytes of a name that is no UTF-8 are written as M\\xfcller.
    """
    text = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text)
    text = re.sub("[\ud800-\udfff]", lambda byte: f"\\x{ord(byte[0]) & 0xFF:02x}", text)
    return " ".join(unicodedata.normalize("NFC", text).split())


def same_name(text: str) -> str:
    """A name as it is compared: as `plain_text` keeps it, without case (Unicode 3.13, canonical caseless matching)."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", plain_text(text)).casefold())


def same_number(text: str) -> str:
    """A patient's number as it is compared: without case, outer blanks, and what spreadsheets do to "0012"."""
    text = re.sub(r"\.0$", "", same_name(text))
    return text.lstrip("0") or text if text.isdigit() else text


def who(key: Key) -> tuple[str, str, str]:
    """Trial, patient and time point as they are compared."""
    return same_name(key.trial), same_name(key.patient), same_name(key.timepoint)


def _matches(old: Key, key: Key, exact: bool) -> bool:
    """Whether the row `old` of the table is that of `key`; if not `exact`, an empty trial or timepoint is any."""
    if exact:
        return who(old) == who(key)
    (trial, patient, timepoint), (new_trial, new_patient, new_timepoint) = who(old), who(key)
    same_trial = "" in (trial, new_trial) or trial == new_trial
    return patient == new_patient and same_trial and timepoint in ("", new_timepoint)
