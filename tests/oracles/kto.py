"""Ethayarajh et al. 2024, arXiv:2402.01306."""

from dataclasses import dataclass
from decimal import Decimal

from oracles.numbers import ZERO, sigma


@dataclass(frozen=True)
class Marked:
    """One completion with its mark."""

    completion: Decimal
    reference: Decimal
    label: bool


def reference_point(mismatched: list[Decimal], reference_mismatched: list[Decimal]) -> Decimal:
    """z0 = max(0, mean of log(pi/ref) over completions put under prompts they do not belong to)."""
    ratios = [a - b for a, b in zip(mismatched, reference_mismatched, strict=True)]
    return max(ZERO, sum(ratios) / len(ratios))


def loss(row: Marked, z0: Decimal, beta: Decimal, desirable_weight: Decimal, undesirable_weight: Decimal) -> Decimal:
    """Eq. 7: lambda_y - v(x, y), v = lambda_D sigma(beta(r - z0)) if wanted, else lambda_U sigma(beta(z0 - r))."""
    r = row.completion - row.reference
    if row.label:
        return desirable_weight - desirable_weight * sigma(beta * (r - z0))
    return undesirable_weight - undesirable_weight * sigma(beta * (z0 - r))
