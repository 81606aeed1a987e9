"""Lambert et al. 2024, "Tulu 3", arXiv:2411.15124."""

from decimal import Decimal

from oracles.numbers import Pair, sigma


def loss(pair: Pair, beta: Decimal) -> Decimal:
    """Length-normalised DPO: -log sigma(beta/|w| log(pi(w)/ref(w)) - beta/|l| log(pi(l)/ref(l)))."""
    chosen = beta / pair.chosen_length * (pair.chosen - pair.reference_chosen)
    rejected = beta / pair.rejected_length * (pair.rejected - pair.reference_rejected)
    return -sigma(chosen - rejected).ln()
