"""Azar et al. 2023, arXiv:2310.12036."""

from decimal import Decimal

from oracles.numbers import Pair


def loss(pair: Pair, tau: Decimal, average: bool) -> Decimal:
    """Eq. 17: (h - 1 / (2 tau))^2, with log-probs summed as printed, or averaged as in the authors' runs."""
    chosen, rejected = (pair.chosen_length, pair.rejected_length) if average else (1, 1)
    policy = pair.chosen / chosen - pair.rejected / rejected
    reference = pair.reference_chosen / chosen - pair.reference_rejected / rejected
    return (policy - reference - 1 / (2 * tau)) ** 2
