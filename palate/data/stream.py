"""Order and packing: which groups stand in which micro-batch of which step, as pure functions of seed and lengths.

Nothing here spends random state. Every rank computes the same plan without talking, takes its share of each step's
groups, and knows the whole step's denominator before any forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np

from palate.data.batch import stream_length
from palate.data.tokens import TokenGroup
from palate.layout import MICRO_BATCH_TOKENS

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class StepBatch(Generic[Batch]):
    """One optimizer step: this rank's micro-batches, the whole step's units, its rows, and the cursor after it.

    seconds: spent on making it, as by sampling; they count as the step's own. metrics: of how it was made.
    """

    micro: tuple[Batch, ...]
    units: float
    rows: tuple[int, ...]
    cursor: dict[str, Any]
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.micro)


def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of one epoch, (count,) int64: a permutation that depends on (seed, epoch, index) alone.

    Rows are sorted by a hash (splitmix64) of the three, so it is the same on every machine and numpy version.
    """
    with np.errstate(over="ignore"):
        index = np.arange(count, dtype=np.uint64)
        salt = _mix(_mix(np.array([seed % 2**64], dtype=np.uint64)) + np.uint64(epoch))
        return np.argsort(_mix(_mix(index) ^ salt), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def cuts(lengths: Sequence[int], tokens: int) -> list[int]:
    """Where each micro-batch of at most `tokens` stream tokens begins, in order; a longer group stands alone."""
    starts: list[int] = []
    filled = 0
    for index, length in enumerate(lengths):
        if not starts or filled + length > tokens:
            starts.append(index)
            filled = 0
        filled += length
    return starts


def pack(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """The indices of each micro-batch of `cuts`."""
    return [list(range(a, b)) for a, b in pairwise([*cuts(lengths, tokens), len(lengths)])]


def count_steps(rows: int, batch: int, epochs: int, steps: int | None = None) -> int:
    """Optimizer steps of a run: `steps` where given, else every row of every epoch once (the last batch is short)."""
    return steps if steps is not None else epochs * -(-rows // batch)


def count_tokens(
    lengths: Sequence[int] | np.ndarray, batch: int, epochs: int, steps: int | None = None, *, seed: int = 0
) -> int:
    """Stream tokens of a whole run whose groups have these lengths: what its steps run through the model."""
    lengths, total = np.asarray(lengths, np.int64), count_steps(len(lengths), batch, epochs, steps)
    whole, rest = divmod(total, -(-len(lengths) // batch)) if len(lengths) else (0, 0)
    last = order(len(lengths), seed, whole)[: rest * batch]
    return int(whole * lengths.sum() + lengths[last].sum())


def stream(
    groups: Sequence[TokenGroup],
    collate: Callable[[Sequence[TokenGroup]], Any],
    *,
    batch: int = 64,
    tokens: int = MICRO_BATCH_TOKENS,
    seed: int = 0,
    epochs: int = 1,
    steps: int | None = None,
    start: int = 0,
    rank: int = 0,
    size: int = 1,
) -> Iterator[StepBatch]:
    """Step batches, one per optimizer step: every row of an epoch once, in the order of (seed, epoch).

    batch: groups per step over all ranks. tokens: stream tokens per micro-batch, which bounds memory and moves no
    number. steps: total steps instead of `epochs`. start: steps already done (of a resumed run). rank, size: this
    process's share of every step.
    """
    if not groups:
        return
    per_epoch = -(-len(groups) // batch)
    for step in range(start, count_steps(len(groups), batch, epochs, steps)):
        epoch, number = divmod(step, per_epoch)
        if step == start or number == 0:
            rows = order(len(groups), seed, epoch)
        taken = [int(row) for row in rows[number * batch : (number + 1) * batch]]
        mine = [groups[row] for row in taken[rank::size]]
        micro = tuple(collate([mine[i] for i in part]) for part in pack([stream_length(g) for g in mine], tokens))
        units = sum(b.units for b in micro)
        if size > 1:
            others = [groups[row] for other in range(size) if other != rank for row in taken[other::size]]
            units += collate(others).units if others else 0
        yield StepBatch(micro, units, tuple(taken), {"step": step + 1, "epoch": epoch, "row": (number + 1) * batch})
