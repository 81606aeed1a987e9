"""A total and a count, divided only when shown, so that micro-batches and ranks add up exactly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Tally:
    """A sum over `count` units. `total` is a number or a scalar tensor (then it may carry a gradient)."""

    total: Any = 0.0
    count: float = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float:
        """total / count; nan where nothing was counted."""
        return float(self.total) / self.count if self.count else float("nan")


def means(tallies: Mapping[str, Tally]) -> dict[str, float]:
    """Every tally divided; rewards that stand in no pairs get the difference of their means as margin."""
    found = {name: tally.mean for name, tally in tallies.items()}
    if {"rewards/chosen", "rewards/rejected"} <= found.keys() and "rewards/margins" not in found:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found
