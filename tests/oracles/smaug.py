"""Pal et al. 2024, "Smaug: fixing failure modes of preference optimisation with DPO-positive", arXiv:2402.13228."""

from decimal import Decimal

from oracles.numbers import ZERO, Pair, sigma


def loss(pair: Pair, beta: Decimal, lam: Decimal) -> Decimal:
    """Eq. 3: -log sigma(beta (log(pi(w)/ref(w)) - log(pi(l)/ref(l)) - lambda max(0, log(ref(w)/pi(w)))))."""
    penalty = max(ZERO, pair.reference_chosen - pair.chosen)
    log_ratio = (pair.chosen - pair.reference_chosen) - (pair.rejected - pair.reference_rejected)
    return -sigma(beta * (log_ratio - lam * penalty)).ln()
