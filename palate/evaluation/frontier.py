"""Reward against KL: what completions say of a policy, the hull over a method's points, the best of n out of more.

A point is (kl, reward): nats a completion from the reference, and the mean of the reward that counts.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

Point = tuple[float, float]


def numbers(scores, kl, finished, lengths) -> dict[str, float]:
    """`eval/...` numbers of own samples: mean reward and KL with their normal 95 % intervals, length, share that ended.

    scores: the reward of each sample. kl: its log-prob under the policy less that under the reference, nats; the mean
    is unbiased. finished, lengths: whether it ended, and its tokens. All of shape (S,), samples of different prompts.
    """
    found: dict[str, float] = {}
    for name, values in (("reward", scores), ("kl", kl)):
        values = np.asarray(values, dtype=np.float64)
        mean = float(values.mean())
        error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.inf
        found |= {f"eval/{name}": mean, f"eval/{name}_se": error}
        found |= {f"eval/{name}_low": mean - 1.96 * error, f"eval/{name}_high": mean + 1.96 * error}
    found |= {"eval/ended": float(np.mean(finished)), "eval/length": float(np.mean(lengths))}
    return found | {"eval/count": len(scores)}


def upper_hull(points: Sequence[Point]) -> list[Point]:
    """The corners of the lowest concave rising line above all points, from the smallest KL to the largest reward.

    Whoever draws each completion from one of two policies, by a coin, gets at least the line between their points: the
    reward is the mean of theirs, and the KL at most that. So all of the hull can be had. A KL that an estimate has
    below 0 counts as 0. Of no points none.
    Source: Andrew 1979, Inf. Process. Lett. 9, p. 216 (the scan); convexity of the KL.
    """
    hull: list[Point] = []
    places = {(max(0.0, float(kl)), float(reward)) for kl, reward in points}
    for kl, reward in sorted(places, key=lambda place: (place[0], -place[1])):
        if hull and reward <= hull[-1][1]:
            continue  # no more reward for more KL
        while len(hull) > 1 and _slope(hull[-2], (kl, reward)) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((kl, reward))
    return hull


def _slope(one: Point, two: Point) -> float:
    return (two[1] - one[1]) / (two[0] - one[0])


def reward_at(hull: Sequence[Point], kl: float) -> float:
    """The most reward within this KL, on the hull; nan below its first corner. Beyond its last it rises no more."""
    if not hull or kl < hull[0][0]:
        return math.nan
    return float(np.interp(kl, *zip(*hull, strict=True)))


def mean_reward(hull: Sequence[Point], kl: float) -> float:
    """The mean of the hull between its first corner and this KL: the area below it, as a reward; nan of nothing."""
    if not hull or kl < hull[0][0]:
        return math.nan
    inner = [point for point in hull if point[0] < kl]
    corners = [*inner, (kl, reward_at(hull, kl))]
    width = kl - hull[0][0]
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(corners))
    return area / width if width else hull[0][1]


def expected_best(judged, values, n: int) -> np.ndarray:
    """(P,) mean true value of the sample that a judge scores highest among n, over all choices of n out of M drawn.

    judged, values: (P, M), M at least n: what the judge says, and what counts. Equally good ones are as likely.
    Unbiased, with less spread than one choice has. Source: METHODS 8.16, with draws that are not put back.
    """
    judged, values = np.asarray(judged, dtype=np.float64), np.asarray(values, dtype=np.float64)
    drawn = judged.shape[1]
    if not 1 <= n <= drawn:
        raise ValueError(f"the best of {n} needs as many samples, there are {drawn}")
    found = []
    for said, true in zip(judged, values, strict=True):
        _, level, counts = np.unique(said, return_inverse=True, return_counts=True)
        choices = [math.comb(int(below), n) for below in [0, *np.cumsum(counts)]]
        won = np.diff(np.array([float(count) for count in choices])) / math.comb(drawn, n) / counts
        found.append(float(won[level] @ true))
    return np.array(found)


def check_below(points: Sequence[dict[str, Any]], slack: float = 1e-6) -> list[dict[str, Any]]:
    """The points that lie above the exact frontier, by more than rounding: those of a wrong KL or reward; [] if right.

    points: with reward and exact_reward, the most that any policy has at their KL; None where nobody knows it.
    """
    return [p for p in points if p["exact_reward"] is not None and p["reward"] > p["exact_reward"] + slack]
