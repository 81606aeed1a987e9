"""The layout of a stream: which stretches of tokens belong together. Plain integers, shared by data, model and scoring.

A stream is one row without padding. Each group stands in it as `prompt | branch 1 | branch 2 ...`, where a branch is a
completion without its last token (which is only ever a target). A token attends to the earlier tokens of its prompt and
of its own branch; a branch's positions go on from its prompt's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

MICRO_BATCH_TOKENS = 1024  # tokens of a stream where nobody says: on a CPU longer ones are no faster


@dataclass(frozen=True)
class Layout:
    """Prompt length and branch lengths of every group in the stream, in tokens, in stream order.

    tail: inert tokens at the end, which attend to nothing and are scored nowhere (see `scoring.Numerics.tail`).
    """

    prompts: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    tail: int = 0

    @cached_property
    def total(self) -> int:
        """T: tokens in the stream, the tail included."""
        return sum(self.sizes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of the stretches the stream is split into: each prompt, then its branches; last the tail."""
        return (*(n for prompt, lengths in self._groups() for n in (prompt, *lengths)), self.tail)

    @cached_property
    def stems(self) -> dict[int, tuple[int, ...]]:
        """Prompt length -> the stretches (indices into `sizes`) of that length; equal ones share one attention call."""
        calls: dict[int, list[int]] = {}
        for stretch, prompt, _ in self._stretches():
            calls.setdefault(prompt, []).append(stretch)
        return {length: tuple(stretches) for length, stretches in calls.items() if length}

    @cached_property
    def forks(self) -> dict[tuple[int, int], tuple[tuple[int, int], ...]]:
        """(prompt length, branch length) -> (prompt stretch, branch stretch) of every branch of that shape."""
        calls: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for stretch, prompt, lengths in self._stretches():
            for offset, length in enumerate(lengths, start=1):
                if length:
                    calls.setdefault((prompt, length), []).append((stretch, stretch + offset))
        return {shape: tuple(pairs) for shape, pairs in calls.items()}

    def _groups(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        return zip(self.prompts, self.branches, strict=True)

    def _stretches(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        stretch = 0
        for prompt, lengths in self._groups():
            yield stretch, prompt, lengths
            stretch += 1 + len(lengths)
