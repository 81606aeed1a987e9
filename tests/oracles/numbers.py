"""Decimals wide enough that formulas can be written as printed, without any care for rounding."""

from dataclasses import dataclass, replace
from decimal import Decimal, getcontext

getcontext().prec = 120
ZERO, ONE, HALF = Decimal(0), Decimal(1), Decimal("0.5")


def sigma(x: Decimal) -> Decimal:
    """The logistic function as printed, 1 / (1 + exp(-x))."""
    return ONE / (ONE + (-x).exp())


def slope(function, row, column: str) -> Decimal:
    """Central difference of function(row) in one column of a dataclass of decimals."""
    step = Decimal("1e-30")
    value = getattr(row, column)
    return (function(replace(row, **{column: value + step})) - function(replace(row, **{column: value - step}))) / (
        2 * step
    )


@dataclass(frozen=True)
class Pair:
    """One preference pair: log-probs of both completions under policy and reference, and their lengths."""

    chosen: Decimal
    rejected: Decimal
    reference_chosen: Decimal
    reference_rejected: Decimal
    chosen_length: Decimal
    rejected_length: Decimal

    @classmethod
    def of(cls, *values) -> "Pair":
        return cls(*(Decimal(value) for value in values))
