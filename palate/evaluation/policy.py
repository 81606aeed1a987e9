"""What the numbers of a policy-gradient run say about its health, in words a person can act on."""

from collections.abc import Iterable, Mapping
from typing import Any

LAST = 5  # rollouts that a word is about


def health(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Sentences about what looks wrong in the last rollouts; none where all is well.

    lines: of metrics.jsonl, one a rollout at least; those without a loss are left out.
    Source: METHODS of PPO for language models: Huang et al. 2024, arXiv:2403.17031, section 5.
    """
    lines = [line for line in lines if "loss" in line and line.get("reward") is not None]
    if not lines:
        return []
    last, words = lines[-LAST:], []
    kl = [line["kl"] for line in last]
    if len(last) == LAST and max(kl) < 0 and _mean(kl) < -0.1:
        words.append(f"KL is below zero ({_mean(kl):.2f} nats): what is sampled from is not what is scored")
    clipped = _mean([line["policy/clipped"] for line in last])
    if clipped > 0.3:
        words.append(f"{clipped:.0%} of the tokens are clipped: the learning rate is too high")
    explained = [line["value/explained"] for line in last if line.get("value/explained") is not None]
    if len(lines) > 4 * LAST and explained and _mean(explained) <= 0:
        words.append(f"the critic explains nothing of what comes (explained variance {_mean(explained):.2f})")
    ended = _mean([line["ended"] for line in last])
    if ended < 0.5:
        words.append(f"only {ended:.0%} of the samples end by themselves")
    if len(lines) > 2 * LAST:
        first = lines[:LAST]
        gained = _mean([line["reward"] for line in last]) - _mean([line["reward"] for line in first])
        total = _mean([_total(line) for line in last]) - _mean([_total(line) for line in first])
        if gained > 0 > total:
            words.append("the reward rises and the reward less its KL falls: lower the rate, or raise the coefficient")
    return words


def _total(line: Mapping[str, Any]) -> float:
    return line["reward"] - line["kl_coef"] * line["kl"]


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
