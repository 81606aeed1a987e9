"""Intervals: what a share measured on n cases says about the true one."""

from typing import NamedTuple


class Share(NamedTuple):
    """A share and its confidence interval."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def wilson(successes: float, count: int, confidence: float = 0.95) -> Share:
    """Wilson's score interval of a share; `successes` may hold halves (ties). (nan, 0, 1) where nothing was counted.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22, p. 209.
    """
    from scipy.stats import norm

    if count == 0:
        return Share(float("nan"), 0.0, 1.0, 0)
    z = norm.ppf(0.5 + confidence / 2)
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * ((share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5)
    return Share(share, max(0.0, centre - half), min(1.0, centre + half), count)
