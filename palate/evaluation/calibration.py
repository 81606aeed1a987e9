"""Whether a reward model knows how sure it may be: accuracy against margin, and the slope of the two."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from palate.evaluation.statistics import wilson


def calibration(margins: Sequence[float] | np.ndarray, bins: int = 10) -> list[dict[str, Any]]:
    """Pairs in at most `bins` equal parts by |margin|: count, mean margin, accuracy predicted and accuracy found.

    margins: chosen minus rejected reward, in nats of log-odds. predicted: mean of sigma(|margin|), what Bradley-Terry
    says of being right. accuracy: share of positive margins, ties half; low, high: Wilson's 95 % interval of it. Parts
    that would share a margin are not parted.
    """
    values = np.asarray(margins, dtype=np.float64)
    sizes = np.abs(values)
    return [
        {
            "count": len(part),
            "margin": float(sizes[part].mean()),
            "predicted": float(sigma(sizes[part]).mean()),
        }
        | _accuracy(values[part])
        for part in _parts(sizes, bins)
    ]


def accuracy_by(
    margins: Sequence[float] | np.ndarray, said: Sequence[float] | np.ndarray, bins: int = 4
) -> list[dict[str, Any]]:
    """Accuracy in at most `bins` equal parts by `said`, how much better the data say each chosen completion is.

    Each part: count, mean of `said`, accuracy with its interval. margins: as for `calibration`.
    """
    values, said = np.asarray(margins, dtype=np.float64), np.asarray(said, dtype=np.float64)
    return [
        {"count": len(part), "said": float(said[part].mean())} | _accuracy(values[part]) for part in _parts(said, bins)
    ]


def _parts(keys: np.ndarray, bins: int) -> list[np.ndarray]:
    """Indices in at most `bins` parts of about one size, by rising key; equal keys stay together."""
    order = np.argsort(keys, kind="stable")
    parts, start = [], 0
    for end in np.linspace(0, len(keys), min(bins, len(keys)) + 1).round().astype(int)[1:]:
        end = int(np.searchsorted(keys[order], keys[order[end - 1]], side="right"))
        if end > start:
            parts.append(order[start:end])
            start = end
    return parts


def _accuracy(margins: np.ndarray) -> dict[str, float]:
    """Share of positive margins, ties half, and its interval."""
    share = wilson(float((margins > 0).sum() + (margins == 0).sum() / 2), len(margins))
    return {"accuracy": share.value, "low": share.low, "high": share.high}


def calibration_error(curve: Sequence[dict[str, Any]]) -> float:
    """Mean |predicted - found| accuracy over a curve's pairs, in [0, 1]; nan of an empty one.

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    count = sum(part["count"] for part in curve)
    return (
        sum(part["count"] * abs(part["predicted"] - part["accuracy"]) for part in curve) / count if count else math.nan
    )


def calibration_slope(margins: Sequence[float] | np.ndarray) -> float | None:
    """The factor on all margins at which Bradley-Terry likes them best: 1 calibrated, below 1 too sure of itself.

    None where no finite factor is best: no pair, or none (or every one) the wrong way round.
    Source: Cox 1958, Biometrika 45, p. 562.
    """
    values = np.asarray(margins, dtype=np.float64)
    if not (values < 0).any() or not (values > 0).any():
        return None
    low, high = -1.0, 1.0  # the derivative falls; widen, then halve
    while _pull(values, high) > 0:
        high *= 2
    while _pull(values, low) < 0:
        low *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _pull(values, middle) > 0 else (low, middle)
    return (low + high) / 2


def _pull(margins: np.ndarray, slope: float) -> float:
    """Derivative of the mean log-likelihood in the slope."""
    return float((margins * sigma(-slope * margins)).mean())


def sigma(x: np.ndarray) -> np.ndarray:
    """The logistic function, at any x."""
    return np.exp(-np.logaddexp(0, -x))
