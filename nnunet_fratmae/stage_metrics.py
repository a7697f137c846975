"""How well classes are told apart, and how far the probabilities can be trusted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, roc_auc_score

from nnunet_fratmae.base.files import renamed
from plans.staging import Cohort

ECE_BINS = 10
FIGURES = ("accuracy", "macro_sensitivity", "auc", "ece", "brier")


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error (Guo et al. 2017): mean distance of accuracy and confidence over `bins` equal bins of
    the predicted class's probability, weighted by the cases in them. labels (n,), probabilities (n, classes)."""
    confidence, hit = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (0, 0.1], (0.1, 0.2], ...
    gaps = [abs(float((hit[bin_of == b] - confidence[bin_of == b]).sum())) for b in range(bins)]
    return sum(gaps) / len(labels)


def brier_score(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Brier's own score (1950): squared distance of the probabilities to the truth, summed over all classes and
    averaged over cases; 0 is perfect, 2 the worst. labels (n,), probabilities (n, classes)."""
    return float(((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(1).mean())


def area_under_curve(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Area under the ROC curve, of several classes the mean of each against the rest; classes that have no cases, or
    all of them, are left out. None where none is left. labels (n,), probabilities (n, classes)."""
    present = np.unique(labels)
    if len(present) < 2:
        return None
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    return float(np.mean([roc_auc_score(labels == c, probabilities[:, c]) for c in present]))


def stage_metrics(labels: Sequence[int], probabilities: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """All figures of a validation as plain JSON; None where a figure is not defined (a class without cases).

    Args:
        labels: (n,) numbers of classes.
        probabilities: (n, classes) that sum to 1.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    table = confusion_matrix(labels, probabilities.argmax(1), labels=range(len(classes)))
    cases = table.sum(1)
    sensitivity = {
        name: float(table[i, i] / cases[i]) if cases[i] else None for i, name in enumerate(classes)
    }  # fmt: skip
    return {
        "accuracy": float(np.trace(table) / len(labels)),
        "macro_sensitivity": float(np.mean([value for value in sensitivity.values() if value is not None])),
        "auc": area_under_curve(labels, probabilities),
        "ece": calibration_error(labels, probabilities),
        "brier": brier_score(labels, probabilities),
        "sensitivity": sensitivity,
        "confusion": table.tolist(),  # rows are the truth
    }


def save_summary(
    path: Path,
    target: str,
    cohort: Cohort,
    probabilities: np.ndarray,
    chosen_on_these_cases: bool,
) -> tuple[dict[str, Any], str]:
    """Write the figures of a validation and the probabilities of each case as JSON.

    Args:
        probabilities: (n, classes), in the order of the n validation cases of the cohort.
        chosen_on_these_cases: whether they chose the epoch; then the figures are too good.

    Returns:
        The figures, and a line for the log.
    """
    classes, labels = cohort.classes, cohort.validation
    figures = stage_metrics(list(labels.values()), probabilities, classes)
    summary = {
        "target": target,
        "classes": classes,
        "cases": len(labels),
        "trained_on_these_cases": not labels.keys().isdisjoint(cohort.training),  # fold "all"
        "chosen_on_these_cases": chosen_on_these_cases,
        "mean": figures,
        "metric_per_case": [
            {"case": case, "label": classes[label], "predicted": classes[int(np.argmax(p))],
             "probabilities": dict(zip(classes, map(float, p), strict=True))}
            for (case, label), p in zip(labels.items(), probabilities, strict=True)
        ],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed(path) as partial:
        partial.write_text(json.dumps(summary, indent=4), encoding="utf-8")
    said = [f"{name} {'undefined' if figures[name] is None else format(figures[name], '.3f')}" for name in FIGURES]
    return figures, f"Validation of {len(labels)} cases: {', '.join(said)}"
