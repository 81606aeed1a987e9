"""Schulman et al. 2016 and 2017, Ziegler et al. 2019: one completion at a time, by the sums as they are printed."""


def advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Eq. 16 of arXiv:1506.02438: the sum over all later deltas, each (gamma lam)^k away; V after the end is 0."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * after - value for r, after, value in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[place:])) for place in range(len(deltas))]


def rewards(score: float, log_ratio: list[float], coefficient: float) -> list[float]:
    """Minus the coefficient times each log-ratio; the score at the last token."""
    return [-coefficient * x + (score if place == len(log_ratio) - 1 else 0.0) for place, x in enumerate(log_ratio)]


def policy_loss(ratio: float, advantage: float, clip: float) -> float:
    """Eq. 7 of arXiv:1707.06347, its sign turned."""
    held = min(max(ratio, 1 - clip), 1 + clip)
    return -min(ratio * advantage, held * advantage)


def value_loss(value: float, old: float, target: float, clip: float) -> float:
    """Half the larger of two squared errors."""
    held = old + min(max(value - old, -clip), clip)
    return max((value - target) ** 2, (held - target) ** 2) / 2
