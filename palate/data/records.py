"""Records: text as people wrote it, before any tokenizer. Frozen; each remembers the line it came from.

A `Text` is a plain string or a conversation. Plain strings get no chat template, conversations do.
"""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Source:
    """Where a record stands: the file as the user named it, and the physical line (row number in tables), from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. role: "system", "user", "assistant" or "tool"."""

    role: str
    content: str


Text: TypeAlias = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt alone, to be completed."""

    prompt: Text
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the completion to imitate. In conversations every assistant turn of `completion` is trained."""

    prompt: Text
    completion: Text
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two completions of one prompt, the first preferred."""

    prompt: Text
    chosen: Text
    rejected: Text
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class Feedback:
    """One completion and whether it was wanted.

    mismatched: the completion of the next row under another prompt, which KTO's reference point is estimated on.
    """

    prompt: Text
    completion: Text
    label: bool
    mismatched: Text | None = None
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """K completions of one prompt and the strict preferences among them, as (better, worse) indices.

    A list "best first" has all K (K - 1) / 2 of them; a tie leaves its pair out.
    """

    prompt: Text
    completions: tuple[Text, ...]
    preferences: tuple[tuple[int, int], ...]
    source: Source | None = None


Record: TypeAlias = Prompt | Demonstration | PreferencePair | Feedback | Ranking
