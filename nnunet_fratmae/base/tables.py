"""Tables as csv that spreadsheets show and never execute."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence

# The wide forms of the signs as well, which spreadsheets in Japan take for the signs
_FORMULA = re.compile(r"'*\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|'*\t")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object] | Sequence[object]]) -> str:
    """A csv table with `columns` as its first row; rows are sequences, or mappings of which other keys are left out.

    A text that a spreadsheet would take for a formula gets an apostrophe in front, which `cell_text` takes away.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([inert(column) for column in columns])
    for row in rows:
        cells = [row.get(column) for column in columns] if isinstance(row, Mapping) else row
        cells = [cell.replace("\r", " ") if isinstance(cell, str) else cell for cell in cells]  # which csv leaves bare
        writer.writerow([inert(cell) for cell in cells])
    return text.getvalue()


def inert(cell: object) -> object:
    """A cell that no spreadsheet executes: texts that begin as formulas do, and are no numbers, begin with '."""
    if not isinstance(cell, str) or not _FORMULA.match(cell):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def cell_text(cell: str) -> str:
    """A cell as it was before `inert`."""
    rest = cell[1:]
    return rest if cell.startswith("'") and inert(rest) != rest else cell
