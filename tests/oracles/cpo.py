"""Xu et al. 2024, "Contrastive preference optimization", arXiv:2401.08417."""

from decimal import Decimal

from oracles.numbers import Pair, sigma


def loss(pair: Pair, beta: Decimal, alpha: Decimal) -> Decimal:
    """L_prefer + alpha L_NLL: -log sigma(beta log pi(w) - beta log pi(l)) - alpha log pi(w)."""
    return -sigma(beta * pair.chosen - beta * pair.rejected).ln() - alpha * pair.chosen
