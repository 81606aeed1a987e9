"""What the numbers of a policy-gradient run say about its health, in words a person can act on."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

LAST = 5  # rollouts that a word is about
Line = Mapping[str, Any]


def health(lines: Iterable[Line], *, every: int = 1, ends: bool = True) -> list[str]:
    """Sentences about what looks wrong in the last rollouts; none where all is well.

    lines: of metrics.jsonl; those without a loss are left out. every: optimizer steps on a rollout. ends: whether
    completions should end by themselves.
    Source: Huang et al. 2024, arXiv:2403.17031, section 5; Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    rollouts = _rollouts([line for line in lines if "loss" in line and line.get("reward") is not None], every)
    if not rollouts:
        return []
    last, words = rollouts[-LAST:], []
    kl = [rollout["kl"] for rollout in last]
    if len(last) == LAST and max(kl) < 0 and _mean(kl) < -0.1:
        words.append(f"KL is below zero ({_mean(kl):.2f} nats): what is sampled from is not what is scored")
    clipped = _mean([rollout["policy/clipped"] for rollout in last])
    if clipped > 0.3:
        words.append(f"{clipped:.0%} of the tokens are clipped: the learning rate is too high")
    explained = [rollout["value/explained"] for rollout in last if "value/explained" in rollout]
    if len(rollouts) > 2 * LAST and explained and _mean(explained) <= 0:
        words.append(f"the critic explains nothing of what comes (explained variance {_mean(explained):.2f})")
    ended = _mean([rollout["ended"] for rollout in last])
    if ends and ended < 0.5:
        words.append(f"only {ended:.0%} of the samples end by themselves")
    if len(rollouts) > 2 * LAST:
        first = rollouts[:LAST]
        gained = _mean([rollout["reward"] for rollout in last]) - _mean([rollout["reward"] for rollout in first])
        total = _mean([_total(rollout) for rollout in last]) - _mean([_total(rollout) for rollout in first])
        if gained > 0 > total:
            words.append("the reward rises and the reward less its KL falls: lower the rate, or raise the coefficient")
    return words


def _rollouts(lines: Sequence[Line], every: int) -> list[dict[str, float]]:
    """The mean of every number over the steps on each rollout."""
    found = []
    for _, steps in groupby(enumerate(lines), key=lambda place: place[0] // every):
        values: dict[str, list[float]] = {}
        for _, line in steps:
            for key in ("reward", "kl", "kl_coef", "policy/clipped", "value/explained", "ended"):
                if line.get(key) is not None:
                    values.setdefault(key, []).append(line[key])
        found.append({key: _mean(row) for key, row in values.items()})
    return found


def _total(rollout: Line) -> float:
    return rollout["reward"] - rollout["kl_coef"] * rollout["kl"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
