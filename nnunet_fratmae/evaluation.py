"""Overlap of a predicted with the true lesion mask, and the clinic's simplest rival: a threshold on SUV."""

from __future__ import annotations

import numpy as np

THRESHOLD = 2.5  # g/ml; the classical fixed threshold on SUVbw


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2 |P and T| / (|P| + |T|) of two masks of the same shape; NaN where the truth is empty (as autoPET counts)."""
    prediction, truth = prediction.astype(bool), truth.astype(bool)
    if prediction.shape != truth.shape:
        raise ValueError(f"shapes differ: {prediction.shape} and {truth.shape}")
    if not truth.any():
        return float("nan")
    return 2 * float((prediction & truth).sum()) / float(prediction.sum() + truth.sum())


def threshold_mask(suv: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """All voxels above a fixed SUVbw."""
    return suv > threshold
