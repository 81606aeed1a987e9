"""Ranks: who takes which share, and how sums cross processes. One process is a mesh of one, and pays nothing for it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """A mesh of processes that each hold the whole model and take a share of every optimizer step."""

    data_rank: int = 0
    data_size: int = 1

    @classmethod
    def single(cls) -> "Ranks":
        """One process."""
        return cls()

    @classmethod
    def current(cls) -> "Ranks":
        """The processes of the initialised process group; `single()` where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def once(self, do: Callable[[], None]) -> None:
        """Calls `do` in the one process that logs and saves for all; no collective may stand in it."""
        if self.data_rank == 0:
            do()

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Adds up every parameter's gradient over ranks; a rank without a share counts as zero."""
        if self.data_size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order. A collective: all ranks call it equally often."""
        if self.data_size == 1:
            return [value]
        values: list[Any] = [None] * self.data_size
        dist.all_gather_object(values, value)
        return values
