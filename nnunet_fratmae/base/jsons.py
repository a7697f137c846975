"""JSON that others wrote: read within bounds, with one line where it is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnunet_fratmae.base.command import UserError

MOST_BYTES = 64 * 2**20  # a dataset.json that lists 100,000 cases has 20 MB


def read_object(path: Path, way_out: str, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The object {...} that a JSON file holds.

    Args:
        way_out: what the user can do where it cannot be read, for the message.

    Raises:
        UserError: as `load_object`.
    """
    try:
        return load_object(path, most_bytes)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); {way_out}") from None


def load_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The object {...} that a JSON file holds.

    Raises:
        ValueError: not there, larger than `most_bytes`, no UTF-8, no JSON, nested too deeply, a key that is there twice
            (readers would disagree which counts), or something else than an object; the text is the reason.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise ValueError(f"more than {most_bytes / 1e6:.0f} MB")
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from None
    except UnicodeDecodeError:
        raise ValueError("its bytes are no UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not an object {...}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {json.dumps(twice)[:60]} is there twice")
    return found
