"""Dataclasses whose fields carry their bounds, built from JSON that a user may have edited (plans/settings.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from nnunet_fratmae.base.command import UserError

LONGEST_TEXT = 1000  # characters; the path of a folder is the longest that a setting can be
MOST_SHOWN = 40  # characters of a wrong value in a message


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class Bounds:
    """What the numbers of a field (each, where it is a tuple) may be, or which texts."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    among: Sequence[str] | None = None

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value of the right type, such as "must be at least 1"; None: nothing."""
        if isinstance(value, bool) or value is None:
            return None
        if isinstance(value, str):
            if self.among is not None and value not in self.among:
                return f"must be one of {', '.join(self.among)}"
            plain = len(value) <= LONGEST_TEXT and value.isprintable()
            return None if plain else f"must be a line of at most {LONGEST_TEXT} characters"
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if self.below is not None and not ((self.least or 0) <= value < self.below and value != self.above):
            low = "lie between" if self.above is not None else "be at least"
            link = "and" if self.above is not None else "and below"
            return f"must {low} {self.above or self.least or 0:.12g} {link} {self.below:.12g}"
        if self.above is not None and value <= self.above:
            return f"must be above {self.above:.12g}"
        if self.least is not None and value < self.least:
            return "must not be negative" if self.least == 0 else f"must be at least {self.least:.12g}"
        if self.most is not None and value > self.most:
            return f"must be at most {self.most:.12g}"
        return None


def bounded(default: Any, **bounds: Any) -> Any:
    """A field of a dataclass with its default and its `Bounds`."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


def check_fields(settings: Any, prefix: str) -> None:
    """See that every field of a dataclass keeps its bounds.

    Raises:
        UserError: one does not; the message names it with `prefix` in front.
    """
    for known in fields(settings):
        value, bounds = getattr(settings, known.name), known.metadata.get("bounds", Bounds())
        if is_dataclass(value):
            continue
        for one in value if isinstance(value, tuple) else (value,):
            fault = bounds.fault(one)
            require(fault is None, f"{prefix}{known.name} {fault}, not {shown(value)}")


def build(cls: type, block: Any, prefix: str) -> Any:
    """A dataclass from JSON, with the types of its annotations enforced and unknown keys refused."""
    require(isinstance(block, dict), f"{prefix.rstrip('.')} must be {{...}}, not {shown(block)}")
    known = {f.name: f for f in fields(cls)}
    top, _, inner = prefix.partition(".")
    for name in block:
        require(name in known, f"{top}: unknown key {inner}{shown_name(name)}; there are {', '.join(known)}")
    values = {}
    for name, value in block.items():
        default = getattr(cls(), name)
        if is_dataclass(default):
            values[name] = build(type(default), value, f"{prefix}{name}.")
        else:
            values[name] = _typed(value, str(known[name].type), prefix + name)
    return replace(cls(), **values)


def shown(value: Any) -> str:
    """A value as JSON, cut to what a line can hold."""
    try:
        text = json.dumps(list(value) if isinstance(value, tuple) else value)
    except (RecursionError, ValueError, TypeError):
        text = f"this {type(value).__name__}"
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 4] + " ..."


def shown_name(name: str) -> str:
    """A key of a file as one line of a message."""
    return name if len(name) <= MOST_SHOWN and name.isprintable() else shown(name)


def _typed(value: Any, annotation: str, name: str) -> Any:
    if value is None and "None" in annotation:
        return None
    if annotation.startswith("tuple[float"):
        require(isinstance(value, list) and all(type(v) in (int, float) for v in value), f"{name}={shown(value)}: must "
                "be numbers such as [1,0.5]")  # fmt: skip
        return tuple(_number(v) for v in value)
    if annotation.startswith("tuple"):
        is_triple = isinstance(value, list) and len(value) == 3 and all(type(v) is int and v > 0 for v in value)
        require(is_triple, f"{name}={shown(value)}: must be three whole numbers above 0, such as [32,160,192]")
        return tuple(value)
    kind = {"int": int, "float": float, "str": str, "bool": bool}[annotation.split(" ")[0]]
    if kind is float and type(value) is int:
        return _number(value)
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    or_null = " or null" if "None" in annotation else ""
    require(type(value) is kind, f"{name}={shown(value)}: must be {words[kind]}{or_null}")
    return value


def _number(value: float) -> float:
    """As a float, infinite where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
