"""Records: text as people wrote it, before any tokenizer. Frozen; each remembers the line it came from.

A `Text` is a plain string or a conversation. Plain strings get no chat template, conversations do.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar, overload


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


def plain(text: Text) -> str | list[dict[str, str]]:
    """A text as JSON has it: a string, or a list of messages."""
    return text if isinstance(text, str) else [{"role": m.role, "content": m.content} for m in text]


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
    """Two completions of one prompt, the first preferred. margin: by how much, >= 0, where the data say so."""

    prompt: Text
    chosen: Text
    rejected: Text
    source: Source | None = None
    margin: float | None = None


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

T = TypeVar("T", bound=Record)


@dataclass(frozen=True, slots=True)
class Warned:
    """Something odd that was kept: a code such as "W212", what it is, how often, and the first three cases.

    rows: per case the places it concerns, two where a row is odd because of another.
    """

    code: str
    what: str
    count: int
    rows: tuple[tuple[Source, ...], ...]

    def __str__(self) -> str:
        rows = ", ".join(" and ".join(map(str, case)) for case in self.rows)
        rows += ", …" if self.count > len(self.rows) else ""
        return f"{self.what}: {self.count} [{self.code}] ({rows})"


@dataclass(frozen=True, eq=False)
class Reread(Sequence[T], Generic[T]):
    """Records that nobody holds: read again from where they stand each time they are asked for, from the first on."""

    size: int
    again: Callable[[], Iterable[T]]

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[T]:
        return iter(self.again())

    def __getitem__(self, index):
        if isinstance(index, slice):
            wanted = range(self.size)[index]
            found = dict(zip(sorted(wanted), self._at(sorted(wanted)), strict=True))
            return tuple(found[at] for at in wanted)
        return next(self._at([range(self.size)[index]]))

    def _at(self, wanted: Sequence[int]) -> Iterator[T]:
        """The records of these numbers, which ascend."""
        records, before = iter(self), 0
        for at in wanted:
            yield next(islice(records, at - before, None))
            before = at + 1


@dataclass(frozen=True)
class Records(Sequence[T], Generic[T]):
    """What was read, in file order, and the story of the reading.

    records: a tuple, or a Reread where they are too many to be held.
    sources: per file {path, sha256, rows}, and "slice" where one was asked for.
    dropped: reason -> rows left out on purpose, such as {"tie": 3}.
    rejected: rows refused under bad_rows="skip": (source, the row as it stood, code, message); bytes that are no UTF-8
        are lone surrogates in the text, `encode("utf-8", "surrogateescape")` gives the very bytes.
    notes: what a reader of the data should hear, such as which columns were taken for what.
    folder: where what is made of them may be kept, if anywhere.
    """

    records: Sequence[T] = ()
    sources: list[dict] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    rejected: list[tuple[Source, str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[Warned] = field(default_factory=list)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[T]:
        return iter(self.records)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index):
        return list(self.records[index]) if isinstance(index, slice) else self.records[index]

    def rejects(self) -> bytes:
        """The refused rows as they stood, one a line: what `rejects.jsonl` holds."""
        return b"".join(raw.encode("utf-8", "surrogateescape") + b"\n" for _, raw, _, _ in self.rejected)
