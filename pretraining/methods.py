"""The methods by the names of `-m`."""

from __future__ import annotations

from plans.settings import METHODS
from pretraining.fratmae import FratMAEMethod
from pretraining.method import Method

CLASSES: dict[str, type[Method]] = dict.fromkeys(METHODS, FratMAEMethod)
"""The arms of the paper's table 3 are one method."""
