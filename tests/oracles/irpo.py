"""Pang et al. 2024, "Iterative reasoning preference optimization", arXiv:2404.19733."""

from decimal import Decimal

from oracles import dpo
from oracles.numbers import Pair


def loss(pair: Pair, beta: Decimal, alpha: Decimal) -> Decimal:
    """Eq. 1 with the weight on the other term: DPO + alpha (-log pi(w) / |w|)."""
    return dpo.loss(pair, beta) + alpha * -pair.chosen / pair.chosen_length
