"""Rafailov et al. 2023, arXiv:2305.18290."""

from decimal import Decimal

from oracles.numbers import Pair, sigma


def loss(pair: Pair, beta: Decimal) -> Decimal:
    """Eq. 7: -log sigma(beta log(pi(w)/ref(w)) - beta log(pi(l)/ref(l)))."""
    reward_chosen = beta * (pair.chosen - pair.reference_chosen)
    reward_rejected = beta * (pair.rejected - pair.reference_rejected)
    return -sigma(reward_chosen - reward_rejected).ln()


def gradient(pair: Pair, beta: Decimal) -> tuple[Decimal, Decimal]:
    """Section 4: -beta sigma(reward(l) - reward(w)) times (grad log pi(w) - grad log pi(l)), as factors of the two."""
    reward_chosen = beta * (pair.chosen - pair.reference_chosen)
    reward_rejected = beta * (pair.rejected - pair.reference_rejected)
    weight = beta * sigma(reward_rejected - reward_chosen)
    return -weight, weight


def plackett_luce(total: list[Decimal], reference: list[Decimal], beta: Decimal) -> Decimal:
    """Eq. 20: -log of the product over places of exp(reward) / sum of exp(reward) over the places from there on."""
    rewards = [beta * (a - b) for a, b in zip(total, reference, strict=True)]
    probability = Decimal(1)
    for place, reward in enumerate(rewards):
        probability *= reward.exp() / sum(other.exp() for other in rewards[place:])
    return -probability.ln()


def unlikelihood(pair: Pair, alpha: Decimal) -> Decimal:
    """Section 6, the baseline: maximise log pi(w), minimise log pi(l) with a coefficient alpha in [0, 1]."""
    return -pair.chosen + alpha * pair.rejected
