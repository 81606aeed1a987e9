"""The layout of a stream: which stretches of tokens belong together. Plain integers, shared by data, model and scoring.

A stream is one row without padding. Each group stands in it as `prompt | branch 1 | branch 2 ...`, where a branch is a
completion without its last token (which is only ever a target). A token attends to the earlier tokens of its prompt and
of its own branch; a branch's positions go on from its prompt's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Layout:
    """Prompt length and branch lengths of every group in the stream, in tokens, in stream order."""

    prompts: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    @cached_property
    def total(self) -> int:
        """T: tokens in the stream."""
        return sum(self.prompts) + sum(map(sum, self.branches))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of the stretches the stream is split into: per group its trunk, then its further branches.

        The trunk is the prompt with the first branch: together they are plain causal text.
        """
        return tuple(size for prompt, lengths in self._groups() for size in (prompt + sum(lengths[:1]), *lengths[1:]))

    @cached_property
    def trunks(self) -> dict[int, tuple[int, ...]]:
        """Trunk length -> the stretches (indices into `sizes`) of that length; equal ones share one attention call."""
        calls: dict[int, list[int]] = {}
        for start, prompt, lengths in self._stretches():
            calls.setdefault(prompt + sum(lengths[:1]), []).append(start)
        return {length: tuple(stretches) for length, stretches in calls.items() if length}

    @cached_property
    def forks(self) -> dict[tuple[int, int], tuple[tuple[int, int], ...]]:
        """(prompt length, branch length) -> (trunk stretch, branch stretch) of every further branch of that shape."""
        calls: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for start, prompt, lengths in self._stretches():
            for offset, length in enumerate(lengths[1:], start=1):
                if length:
                    calls.setdefault((prompt, length), []).append((start, start + offset))
        return {shape: tuple(pairs) for shape, pairs in calls.items()}

    def _groups(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        return zip(self.prompts, self.branches, strict=True)

    def _stretches(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        start = 0
        for prompt, lengths in self._groups():
            yield start, prompt, lengths
            start += max(len(lengths), 1)
