"""Bradley and Terry 1952; margin: Touvron et al. 2023, arXiv:2307.09288; centring: arXiv:2312.09244."""

from dataclasses import dataclass
from decimal import Decimal

from oracles.numbers import sigma


@dataclass(frozen=True)
class Rewarded:
    """One pair: rewards of both completions, and how much better the chosen one is said to be."""

    chosen: Decimal
    rejected: Decimal
    margin: Decimal


def loss(pair: Rewarded, margin: Decimal, centring: Decimal) -> Decimal:
    """-log sigma(r(w) - r(l) - m), and the squared sum of the two."""
    fits = sigma(pair.chosen - pair.rejected - margin * pair.margin)
    return -fits.ln() + centring * (pair.chosen + pair.rejected) ** 2
