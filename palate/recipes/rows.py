"""Rows of a data file to groups of tokens, and the count of all that happened to them on the way."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from palate.errors import DataError
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
    ) -> list[tuple]:
        """(record, group) of every row that can be used; the others stop the run, or are kept aside under skip.

        usable: (group) -> None, or why the group cannot teach anything. pieces: (record, tokenizer, max_length=) -> its
        groups, where a row may be several. Raises DataError (E200) naming the first 20.
        """
        from palate.data.tokens import tokenize

        self.sources += [dict(source, role=role) for source in records.sources]
        if role == "train":  # "rows" are those of --data; what became of the others is counted too
            self.counts["rows"] += len(records)
        self.counts.update({f"dropped ({reason})": n for reason, n in records.dropped.items()})
        self.counts["refused"] += len(records.rejected)
        self.rejects += [(raw, message) for _, raw, _, message in records.rejected]
        kept, refused = [], []
        for record in records:
            try:
                cut = (pieces or tokenize)(record, tokenizer, max_length=limit)
            except DataError as error:
                refused.append((record, error))
                continue
            groups = cut if isinstance(cut, list) else [cut]
            if (reason := usable(groups[0])) is not None:
                self.counts[reason] += 1
                continue
            self._notice(record, groups[0], tokenizer)
            if len(groups) > 1:
                self.counts["longer than --max-length"] += 1
                self.counts["pieces of these"] += len(groups)
            kept += [(record, group) for group in groups]
        if refused and config.bad_rows == "stop":
            lines = "\n".join(str(error) for _, error in refused[:20])
            raise DataError(
                f"{len(refused)} of {len(records)} rows cannot be used; the first:\n{lines}",
                code="E200",
                next="mend these rows, or use --bad-rows skip",
            )
        self.counts["refused"] += len(refused)
        self.rejects += as_they_stood(refused, config.format)
        return kept

    def _notice(self, record, group, tokenizer) -> None:
        from palate.data.tokens import control_text, ends_with_end_text

        completions = [text for text in texts_of(record) if text is not record.prompt]
        ended = any(ends_with_end_text(text, tokenizer) for text in completions)
        self.counts["ending in the end token's text, not doubled"] += ended
        own = group.cut[:1] if group.label is not None else group.cut  # of feedback, not the mismatched completion
        self.counts["with control text, kept as text"] += any(control_text(t, tokenizer) for t in texts_of(record))
        self.counts["prompts cut"] += group.prompt_cut > 0
        self.counts["rows with a cut completion"] += any(own)

    def summary(self) -> str:
        """One line for the screen."""
        shown = [f"{self.counts['rows']} rows"]
        return ", ".join(shown + [f"{n} {name}" for name, n in self.counts.items() if name != "rows" and n])


@dataclass(frozen=True)
class Rows:
    """Tokenised data of a run. train, held: groups. keys: (C, 2) uint64 of the content of both, in order."""

    train: list
    held: list
    reading: Reading
    notes: list[str]
    keys: Any

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
    from palate.data.table import row_keys
    from palate.data.tokens import notes

    chat = any(not isinstance(record.prompt, str) for record in records[:1])
    for note in [*records.notes, *records.warnings, *notes(tokenizer, chat)]:
        say(f"data: {note}")
    reading = Reading()
    pairs = reading.take(records, tokenizer, limit, config, usable=usable, pieces=pieces)
    if config.eval == "none":
        held = []
    elif config.eval == "auto":
        held_prompts = held_out([prompt_key(record) for record, _ in pairs], config.seed)
        held = [group for record, group in pairs if prompt_key(record) in held_prompts]
        pairs = [(record, group) for record, group in pairs if prompt_key(record) not in held_prompts]
    else:
        held_pairs = reading.take(other, tokenizer, limit, config, usable=usable, role="eval", pieces=pieces)
        shared = {prompt_key(record) for record, _ in pairs} & {prompt_key(record) for record, _ in held_pairs}
        reading.counts["prompts shared with eval"] = len(shared)
        held = [group for _, group in held_pairs]
    train = [group for _, group in pairs]
    if not train:
        raise DataError(f"no row of {config.data} is left to train on", code="E104", next="look at the counts above")
    return Rows(train, held, reading, list(records.notes), row_keys([*train, *held]))


def prompt_key(record) -> str:
    """What decides the split: the prompt, and where there is none (texts) the row itself."""
    text = repr(record.prompt or getattr(record, "completion", ""))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def held_out(keys: Sequence[str], seed: int) -> set[str]:
    """5 % of the distinct prompts, at most 300, by a hash of (seed, prompt): the same however the file is ordered."""
    distinct = sorted(set(keys), key=lambda key: hashlib.blake2b(f"{seed} {key}".encode()).digest())
    return set(distinct[: min(300, len(distinct) // 20)])


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
