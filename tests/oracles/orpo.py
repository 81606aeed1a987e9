"""Hong, Lee and Thorne 2024, arXiv:2403.07691."""

from decimal import Decimal

from oracles.numbers import Pair, sigma


def odds(mean_logp: Decimal) -> Decimal:
    """Eq. 4: p / (1 - p), with p the geometric mean of the token probabilities (eq. 3)."""
    p = mean_logp.exp()
    return p / (1 - p)


def loss(pair: Pair, lam: Decimal) -> Decimal:
    """Eq. 6 and 7: NLL of the chosen side, plus lambda times -log sigma(log of the odds ratio)."""
    chosen, rejected = pair.chosen / pair.chosen_length, pair.rejected / pair.rejected_length
    return -chosen + lam * -sigma((odds(chosen) / odds(rejected)).ln()).ln()
