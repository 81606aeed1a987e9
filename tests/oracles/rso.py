"""Liu et al. 2023, "Statistical rejection sampling improves preference optimization", arXiv:2309.06657."""

from decimal import Decimal

from oracles.numbers import ZERO, Pair


def hinge(pair: Pair, beta: Decimal) -> Decimal:
    """Hinge on normalised likelihoods: max(0, 1 - (gamma log(pi(w)/ref(w)) - gamma log(pi(l)/ref(l))))."""
    chosen = beta * (pair.chosen - pair.reference_chosen)
    rejected = beta * (pair.rejected - pair.reference_rejected)
    return max(ZERO, 1 - (chosen - rejected))
