"""Park et al. 2024, "Disentangling length from quality in DPO", arXiv:2403.19159."""

from decimal import Decimal

from oracles.numbers import Pair, sigma


def loss(pair: Pair, beta: Decimal, alpha: Decimal) -> Decimal:
    """-log sigma of the reward difference: the optimum is ref exp((r - alpha |y|) / beta) up to its normaliser, so
    r = beta log(pi / ref) + alpha |y| up to a constant of the prompt."""
    reward_chosen = beta * (pair.chosen - pair.reference_chosen) + alpha * pair.chosen_length
    reward_rejected = beta * (pair.rejected - pair.reference_rejected) + alpha * pair.rejected_length
    return -sigma(reward_chosen - reward_rejected).ln()
