"""Rows of a data file to groups of tokens, and the count of all that happened to them on the way."""

import hashlib
import heapq
import json
import os
from binascii import hexlify
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from palate.errors import DataError
from palate.recipes.kept import Recipe, tokens_kept
from palate.recipes.verbs import Say, check_new_file


@dataclass
class Reading:
    """Groups of one or several reads, with their records; counts of rows by what became of them.

    counts: also what was cut, dropped and without signal. rejects: refused rows as they stood, each with its message.
    """

    counts: Counter = field(default_factory=Counter)
    rejects: list[tuple[str, str]] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)

    def take(
        self,
        records,
        tokenizer,
        limit: int,
        config,
        *,
        usable: Callable,
        role: str = "train",
        pieces: Callable | None = None,
        say: Say = lambda text: None,
    ) -> tuple[Sequence, Any]:
        """The groups of every row that can be used, and their prompts' keys, (G, 2) uint64; other rows stop the run, or
        are kept aside under skip.

        usable: (group) -> None, or why the group cannot teach anything. pieces: (record, tokenizer, max_length=) -> its
        groups, where a row may be several. Raises DataError (E200) naming the first 20.
        """
        from palate.data.table import as_keys

        self.sources += [dict(source, role=role) for source in records.sources]
        if role == "train":  # "rows" are those of --data; what became of the others is counted too
            self.counts["rows"] += len(records)
        self.counts.update({f"dropped ({reason})": n for reason, n in records.dropped.items()})
        self.counts["refused"] += len(records.rejected)
        self.rejects += [(raw, message) for _, raw, _, message in records.rejected]
        recipe = Recipe(tokenizer, limit, usable, pieces)

        def make() -> tuple[Iterator, dict[str, Any]]:
            facts: dict[str, Any] = {"counts": {}, "rejects": []}
            return _tokenised(records, recipe, config, facts), facts

        kept = tokens_kept(records, recipe, make, say)
        if kept is not None:
            groups, facts = kept
            marks = groups.marks
        else:
            rows, facts = make()
            groups, marks = [], []
            for group, mark in rows:
                groups.append(group)
                marks.append(mark)
            marks = as_keys(marks)
        self.counts.update(facts["counts"])
        self.rejects += [(raw, message) for raw, message in facts["rejects"]]
        return groups, marks

    def summary(self) -> str:
        """One line for the screen."""
        shown = [f"{self.counts['rows']} rows"]
        return ", ".join(shown + [f"{n} {name}" for name, n in self.counts.items() if name != "rows" and n])


def _tokenised(records, recipe: Recipe, config, facts: dict[str, Any]) -> Iterator[tuple[Any, bytes]]:
    """(group, 16 bytes that stand for its prompt) of every row that can be used.

    facts: filled with counts of rows by what became of them, and the rejects.
    """
    from palate.data.tokens import tokenize

    counts, refused, tokenizer = Counter(), [], recipe.tokenizer
    for record in records:
        try:
            cut = (recipe.pieces or tokenize)(record, tokenizer, max_length=recipe.limit)
        except DataError as error:
            refused.append((record, error))
            continue
        groups = cut if isinstance(cut, list) else [cut]
        if (reason := recipe.usable(groups[0])) is not None:
            counts[reason] += 1
            continue
        _notice(counts, record, groups[0], tokenizer)
        if len(groups) > 1:
            counts["longer than --max-length"] += 1
            counts["pieces of these"] += len(groups)
        mark = bytes.fromhex(prompt_key(record))
        yield from ((group, mark) for group in groups)
    if refused and config.bad_rows == "stop":
        lines = "\n".join(str(error) for _, error in refused[:20])
        raise DataError(
            f"{len(refused)} of {len(records)} rows cannot be used; the first:\n{lines}",
            code="E200",
            next="mend these rows, or use --bad-rows skip",
        )
    counts["refused"] += len(refused)
    facts["counts"], facts["rejects"] = dict(counts), as_they_stood(refused, config.format)


def _notice(counts: Counter, record, group, tokenizer) -> None:
    from palate.data.tokens import control_text, ends_with_end_text

    completions = [text for text in texts_of(record) if text is not record.prompt]
    ended = any(ends_with_end_text(text, tokenizer) for text in completions)
    counts["ending in the end token's text, not doubled"] += ended
    own = group.cut[:1] if group.label is not None else group.cut  # of feedback, not the mismatched completion
    counts["with control text, kept as text"] += any(control_text(t, tokenizer) for t in texts_of(record))
    counts["prompts cut"] += group.prompt_cut > 0
    counts["rows with a cut completion"] += any(own)


def anything(group) -> None:
    """Every group teaches something."""


def with_signal(group) -> str | None:
    """None; or that no completion of the group differs from the one it is preferred to."""
    from palate.data.tokens import without_signal

    return "pairs without signal" if without_signal(group) else None


def with_order(group) -> str | None:
    """None; or that the group's completions have no single order."""
    from palate.data.batch import best_first

    return None if best_first(group) else "rankings with ties"


@dataclass(frozen=True)
class Rows:
    """Tokenised data of a run. train, held: groups. hashed: their keys, where they are lists."""

    train: Sequence
    held: Sequence
    reading: Reading
    notes: list[str]
    hashed: Any = None

    @property
    def keys(self) -> Any:
        """(C, 2) uint64 of the content of train and held, in order; a table's are read, not held."""
        from palate.data.table import joined, row_keys

        return row_keys(joined(self.train, self.held)) if self.hashed is None else self.hashed

    @property
    def counts(self) -> dict[str, int]:
        """Rows by what became of them."""
        return dict(self.reading.counts)

    def summary(self) -> str:
        """One line for the screen."""
        return f"{self.reading.summary()}, {len(self.held)} held out"


def read_rows(
    config, records, other, tokenizer, limit: int, *, usable: Callable, say: Say, pieces: Callable | None = None
) -> Rows:
    """Records as groups, split by prompt into those to train on and those held out.

    records: of --data. other: of --eval, where that is data of its own. usable, pieces: as in `Reading.take`.
    """
    import numpy as np

    from palate.data.table import TokenTable, distinct, pick
    from palate.data.tokens import notes

    chat = any(not isinstance(record.prompt, str) for record in records[:1])
    for note in [*records.notes, *records.warnings, *notes(tokenizer, chat)]:
        say(f"data: {note}")
    reading = Reading()
    train, marks = reading.take(records, tokenizer, limit, config, usable=usable, pieces=pieces, say=say)
    held: Sequence = []
    if config.eval == "auto":
        places, number = distinct(marks)
        chosen = np.zeros(len(places), dtype=bool)
        chosen[earliest(marks[places].tobytes(), config.seed)] = True
        aside = chosen[number]
        train, held = pick(train, np.flatnonzero(~aside)), pick(train, np.flatnonzero(aside))
    elif config.eval != "none":
        held, others = reading.take(other, tokenizer, limit, config, usable=usable, role="eval", pieces=pieces, say=say)
        _, number = distinct(np.concatenate([marks, others]))
        shared = np.intersect1d(number[: len(marks)], number[len(marks) :])
        reading.counts["prompts shared with eval"] = len(shared)
    if not len(train):
        raise DataError(f"no row of {config.data} is left to train on", code="E104", next="look at the counts above")
    rows = Rows(train, held, reading, list(records.notes))
    return rows if isinstance(train, TokenTable) else replace(rows, hashed=rows.keys)  # hashed once


def prompt_key(record) -> str:
    """What decides the split: the prompt, and where there is none (texts) the row itself."""
    text = repr(record.prompt or getattr(record, "completion", ""))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def held_out(keys: Sequence[str], seed: int) -> set[str]:
    """5 % of the distinct prompts, at most 300, by a hash of (seed, prompt): the same however the file is ordered."""
    distinct = sorted(set(keys))
    return {distinct[at] for at in earliest(b"".join(map(bytes.fromhex, distinct)), seed)}


def earliest(keys: bytes, seed: int) -> list[int]:
    """As `held_out`: the numbers of those chosen among distinct keys of 16 bytes, which lie one behind the other."""
    head = f"{seed} ".encode()
    hashed = (
        (hashlib.blake2b(head + hexlify(keys[at : at + 16])).digest(), at // 16) for at in range(0, len(keys), 16)
    )
    return [number for _, number in heapq.nsmallest(min(300, len(keys) // 16 // 20), hashed)]


def as_they_stood(refused: Sequence[tuple[Any, DataError]], format: str | None = None) -> list[tuple[str, str]]:
    """Refused records as their rows stand in the file, each with its message; as read where there is no file."""
    from palate.data.rows import raw_rows

    lines_of: dict[str, set[int]] = {}
    for record, _ in refused:
        lines_of.setdefault(record.source.file, set()).add(record.source.line)
    stood = {path: raw_rows(path, lines, format) for path, lines in lines_of.items() if os.path.isfile(path)}
    found = []
    for record, error in refused:
        as_read = json.dumps(asdict(record), ensure_ascii=False)
        found.append((stood.get(record.source.file, {}).get(record.source.line, as_read), str(error)))
    return found


def rejects_file(config) -> Path:
    """Where refused rows go under --bad-rows skip: beside --out. Raises UsageError (E313) where that is there."""
    path = Path(config.out).with_suffix(".rejects.jsonl")
    if config.bad_rows == "skip":
        check_new_file(str(path))
    return path


def write_rejects(path: Path, rows: Sequence[tuple[str, str]], say: Say) -> dict[str, str]:
    """Writes refused rows, byte for byte as they stood, where there are any; what the result object says of it."""
    from palate.files import make_folder, write_bytes

    if not rows:
        return {}
    make_folder(path.parent)
    write_bytes(path, b"".join(raw.encode("utf-8", "surrogateescape") + b"\n" for raw, _ in rows))
    say(f"data: {len(rows)} refused rows are in {path}")
    return {"rejects": str(path)}


def texts_of(record) -> list:
    """The texts of a record as they are: strings, or conversations with their roles."""
    single = [getattr(record, name, None) for name in ("prompt", "completion", "chosen", "rejected")]
    return [text for text in (*single, *getattr(record, "completions", ())) if text]


def strings_of(records) -> list[str]:
    """Every string of the records, for a tokenizer to be trained on."""
    texts = [text for record in records for text in texts_of(record)]
    return [part for text in texts for part in ([text] if isinstance(text, str) else [m.content for m in text])]
