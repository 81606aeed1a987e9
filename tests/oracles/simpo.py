"""Meng, Xia and Chen 2024, arXiv:2405.14734."""

from decimal import Decimal

from oracles.numbers import Pair, sigma


def loss(pair: Pair, beta: Decimal, gamma: Decimal) -> Decimal:
    """Eq. 6: -log sigma(beta/|w| log pi(w) - beta/|l| log pi(l) - gamma)."""
    chosen = beta / pair.chosen_length * pair.chosen
    rejected = beta / pair.rejected_length * pair.rejected
    return -sigma(chosen - rejected - gamma).ln()
