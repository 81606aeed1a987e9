"""Intervals: what a share or a mean measured on n cases says about the true one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Share(NamedTuple):
    """A share and its confidence interval."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def wilson(successes: float, count: float, confidence: float = 0.95) -> Share:
    """Wilson's score interval of a share; `successes` may hold halves (ties). (nan, 0, 1) where nothing was counted.

    count: may be a fraction, an effective number of cases.
    Source: Wilson 1927, J. Am. Stat. Assoc. 22, p. 209.
    """
    from scipy.stats import norm

    if count == 0:
        return Share(float("nan"), 0.0, 1.0, 0)
    z = norm.ppf(0.5 + confidence / 2)
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * ((share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5)
    return Share(share, float(max(0.0, centre - half)), float(min(1.0, centre + half)), int(count))


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of sum(values) / sum(weights), drawn over the cases; (nan, nan) without any.

    values: one number a case, such as a prompt's differences of two models: drawn whole, so that what the two share
        stays paired. weights: what each case counts, 1 unless given.
    Values of opposite signs give the mirrored interval, to the bit.
    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    Departs: cases that are equal are drawn together, by their multinomial counts: the same law, a few numbers a draw.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return float("nan"), float("nan")
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    cases, counts = np.unique(np.stack([values, weights], axis=1), axis=0, return_counts=True)
    mirrored = np.unique(np.stack([-values, weights], axis=1), axis=0)
    sign = -1.0 if cases.tolist() < mirrored.tolist() else 1.0  # one of the two directions is drawn, whoever asks
    if sign < 0:
        cases, counts = np.unique(np.stack([-values, weights], axis=1), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    means = (drawn @ cases[:, 0]) / (drawn @ cases[:, 1])
    low, high = (float(q) for q in np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2]))
    return (low, high) if sign > 0 else (-high, -low)


def design_effect(scores: Sequence[float] | np.ndarray, clusters: Sequence[int] | np.ndarray) -> float:
    """How many times more cases are needed because they come in clusters, at least 1; 1 where each stands alone.

    scores: in [0, 1]. clusters: which cluster each belongs to, such as its prompt.
    The variance of the mean over whole clusters, against that of a share of independent cases; by Student's quantile,
    since few clusters tell little of it. At most what clusters that are alike within come to, and that where no two
    scores differ.
    Source: Kish 1965, Survey Sampling, section 8.2; as in Korn and Graubard 1998, Survey Methodology 24, p. 193.
    """
    from scipy.stats import norm, t

    scores = np.asarray(scores, dtype=np.float64)
    _, place, sizes = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    if not len(sizes) or sizes.max() == 1:
        return 1.0
    mean, most = scores.mean(), float((sizes**2).sum()) / len(scores)
    expected = mean * (1 - mean) / len(scores)
    if len(sizes) == 1 or expected == 0:
        return most
    sums = np.bincount(place, weights=scores - mean, minlength=len(sizes))
    found = float((sums**2).sum()) * len(sizes) / (len(sizes) - 1) / len(scores) ** 2
    few = (t.ppf(0.975, len(sizes) - 1) / norm.ppf(0.975)) ** 2
    return min(most, max(1.0, few * found / expected))
