"""Files, tables, the Hub and lists in memory -> records. The whole source is read before anything is refused.

`bad_rows="stop"` names the first 20 bad rows and their number in one DataError; `"skip"` leaves them out, keeps them as
they stood, and stops when they are more than 5 %.
"""

import hashlib
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from palate import builtin
from palate.data import columns as dialects
from palate.data.columns import Dialect, Dropped, View
from palate.data.records import (
    Demonstration,
    Feedback,
    PreferencePair,
    Prompt,
    Ranking,
    Record,
    Records,
    Reread,
    Source,
    Warned,
)
from palate.data.rows import FORMATS, Row, RowError, Rows, as_json, shown, unpacked_name
from palate.errors import DataError, NotThereError, UsageError

SHOWN_ROWS = 20
MOST_BAD = 0.05
_PROBE = 100
_SLICE = re.compile(r"(.+)\[([^\[\]]*)\]", re.DOTALL)
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?::[\w.-]+)?")
_WARNINGS = {
    "W210": "chosen and rejected differ only in white space",
    "W211": "the same pair stands elsewhere with chosen and rejected exchanged",
    "W212": "the same row stands there twice",
    "W227": "chosen is scored below rejected",
}
_SCORES = [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating")]


def read_pairs(
    data, *, columns=None, format=None, bad_rows="stop", rejects=None, hold=True, known=None
) -> Records[PreferencePair | Ranking]:
    """The preference pairs and rankings of `data`, in file order; ties are dropped and counted.

    data: a path (.jsonl .json .csv .parquet .txt, packed as .jsonl.gz or .zst, or a slice as in "pairs.jsonl[:500]"),
        several paths, a Hub id "owner/name" (split train, another as "owner/name:test"), or objects in memory.
    columns: our name -> the data's, as {"chosen": "good"}; "" hides a column.
    format: jsonl, json, csv, parquet or text (a document between blank lines) where the file's name does not say.
    bad_rows: "stop" or "skip". rejects: a file that skipped rows are written to, byte for byte.
    hold: False reads and checks all rows and keeps none: whoever iterates over the records reads the data again.
    known: the records of an earlier reading of the same content, with which nothing is read until they are asked for.
    Raises DataError with file, line, field, code and what to do; NotThereError for what does not exist.
    """
    tables = dialects.PAIRS[:-1] + dialects.RANKINGS + dialects.PAIRS[-1:]
    return _read((hold, known), data, tables, "preference pairs", columns, format, bad_rows, rejects)


def read_demonstrations(
    data, *, columns=None, format=None, bad_rows="stop", rejects=None, turns="all", hold=True, known=None
) -> Records[Demonstration]:
    """The demonstrations of `data`, as `read_pairs`; preference pairs give their chosen side, running text no prompt.

    turns: "all" trains every assistant turn of a conversation, "last" the last alone.
    """
    if turns not in ("all", "last"):
        raise UsageError(f'turns "{shown(turns)}" is unknown', where="--turns", code="E303", next="use all or last")
    tables = [*dialects.DEMONSTRATIONS, *dialects.PAIRS, *dialects.TEXTS]
    tables.sort(key=lambda d: d.kind == "pair" and d.needs == ("chosen", "rejected"))
    finish = partial(_demonstrated, last=turns == "last")
    return _read((hold, known), data, tables, "demonstrations", columns, format, bad_rows, rejects, finish)


def read_texts(
    data, *, columns=None, format=None, bad_rows="stop", rejects=None, hold=True, known=None
) -> Records[Demonstration]:
    """Running text, each row a document under no prompt, as `read_pairs`: rows with a column text, or a .txt file.

    In a .txt file a document is what stands between blank lines.
    """
    return _read((hold, known), data, dialects.TEXTS, "running text", columns, format, bad_rows, rejects)


def read_feedback(
    data, *, columns=None, format=None, bad_rows="stop", rejects=None, hold=True, known=None
) -> Records[Feedback]:
    """The single feedback of `data`, as `read_pairs`; preference pairs give a wanted and an unwanted row each.

    `mismatched` is the completion of the next row in file order, the first after the last, under another prompt.
    Raises DataError where one class is absent (E226) or all rows share one prompt (E233).
    """
    tables, classes = [*dialects.FEEDBACK, *dialects.PAIRS], _Classes()
    records = _read((hold, known), data, tables, "feedback", columns, format, bad_rows, rejects, classes.of)
    if known is None:
        classes.check(", ".join(source["path"] for source in records.sources))
    rows = records.records
    if isinstance(rows, Reread):
        return replace(records, records=Reread(len(rows), lambda: _with_mismatched(rows)))
    return replace(records, records=tuple(_with_mismatched(rows)))


def read_prompts(data, *, columns=None, format=None, bad_rows="stop", rejects=None) -> Records[Prompt]:
    """The prompts of `data`, one a row, as `read_pairs`: of any kind of row that has a prompt."""
    tables = [*dialects.PROMPTS, *dialects.PAIRS, *dialects.TEXT_PROMPTS]
    return _read((True, None), data, tables, "prompts", columns, format, bad_rows, rejects, _as_prompt)


def read_any(data, *, columns=None, format=None, bad_rows="stop") -> Records:
    """The records of `data` whatever they are: pairs, rankings, feedback, demonstrations or prompts.

    bad_rows: also "keep", which refuses nothing and lists every bad row in `rejected`, without its text.
    """
    tables = dialects.PAIRS[:-1] + dialects.RANKINGS + dialects.FEEDBACK + dialects.DEMONSTRATIONS
    tables = tables + dialects.PAIRS[-1:] + dialects.TEXTS + dialects.PROMPTS
    return _read((True, None), data, tables, "preference data", columns, format, bad_rows, None)


def refuse_shared_rows(train: Records, held_out: Records) -> None:
    """Raises DataError (E231) where a row of one stands in the other too; prompts alone may be shared."""
    wanted = {replace(record, source=None) for record in held_out}  # the fewer ones are held
    seen = {bare: r.source for r in train if (bare := replace(r, source=None)) in wanted}
    twice = [(seen[bare], r.source) for r in held_out if (bare := replace(r, source=None)) in seen]
    if twice:
        cases = ", ".join(f"{first} and {second}" for first, second in twice[:5])
        what = (
            f"{len(twice)} of {len(held_out)} held-out rows are trained on ({cases}{', …' if len(twice) > 5 else ''})"
        )
        raise DataError(what, where="--eval", code="E231", next="drop them from one of the two")


def _demonstrated(record: Demonstration | PreferencePair, last: bool) -> list[Demonstration]:
    prompt, completion = record.prompt, record.chosen if isinstance(record, PreferencePair) else record.completion
    if last and isinstance(prompt, tuple) and isinstance(completion, tuple):
        prompt, completion = prompt + completion[:-1], completion[-1:]
    return [Demonstration(prompt, completion, record.source)]


def _as_prompt(record: Record) -> list[Prompt]:
    return [Prompt(record.prompt, record.source)]


class _Classes:
    """What feedback has to have as a whole, counted as its rows are made."""

    def __init__(self):
        self.labels = {True: 0, False: 0}
        self.prompt: Any = None
        self.one_prompt = True

    def of(self, record: Feedback | PreferencePair) -> list[Feedback]:
        """The record's rows."""
        if isinstance(record, Feedback):
            rows = [record]
        else:
            sides = ((record.chosen, True), (record.rejected, False))
            rows = [Feedback(record.prompt, completion, label, source=record.source) for completion, label in sides]
        for row in rows:
            self.prompt = row.prompt if self.prompt is None else self.prompt
            self.one_prompt = self.one_prompt and row.prompt == self.prompt
            self.labels[row.label] += 1
        return rows

    def check(self, where: str) -> None:
        """Nothing, or DataError (E226, E233)."""
        count = sum(self.labels.values())
        if 0 in self.labels.values():
            only, other = ("true", "false") if self.labels[True] else ("false", "true")
            what = f"all {count} labels are {only}, none is {other}"
            raise DataError(what, where=where, code="E226", next="add rows of the other class")
        if self.one_prompt:
            what = f"all {count} rows have one prompt; KTO compares completions with those of other prompts"
            raise DataError(what, where=where, code="E233", next="add rows under another prompt, or use pairs and dpo")


def _with_mismatched(rows: Iterable[Feedback]) -> Iterator[Feedback]:
    """The rows, no more of them held than stand together under one prompt."""
    start: Feedback | None = None
    other: Feedback | None = None  # the first under another prompt than the start
    waiting: list[Feedback] = []
    for row in rows:
        start = start or row
        if other is None and row.prompt != start.prompt:
            other = row
        if waiting and row.prompt != waiting[0].prompt:
            yield from (replace(one, mismatched=row.completion) for one in waiting)
            waiting = []
        waiting.append(row)
    if start and other:  # after the last row comes the first
        then = other if waiting[0].prompt == start.prompt else start
        yield from (replace(one, mismatched=then.completion) for one in waiting)


# where rows come from


@dataclass(slots=True)
class _Table:
    """Rows without a file: a list in memory or a Hub split; hashed as the JSON of its rows."""

    path: str
    rows: Iterable[Any]
    first: int = 0
    stop: int | None = None
    notes: list[str] = field(default_factory=list)
    count: int = 0
    format: str = "memory"
    _hash: Any = field(default_factory=hashlib.sha256)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Row]:
        from palate.data.rows import Row

        for seen, value in enumerate(self.rows, start=1):
            self._hash.update(as_json(value) + b"\n")
            if seen > self.first and (self.stop is None or seen <= self.stop):
                self.count += 1
                yield Row(seen, b"", dict(value) if isinstance(value, Mapping) else value)
        if not self.count:
            raise DataError("no rows", where=self.path, code="E104", next="give some")


def open_data(data: Any, format: str | None) -> list[Rows | _Table]:
    """The sources that `data` names, in order, none of them twice."""
    if not isinstance(data, (str, os.PathLike)):
        if isinstance(data, Mapping) or not isinstance(data, Iterable) or isinstance(data, (bytes, bytearray)):
            what = f"data is {dialects.kind(data)}"
            raise UsageError(what, next="give a path, a Hub id, or a list of objects in memory")
        data = data if isinstance(data, Sized) else list(data)
        if not len(data) or not all(isinstance(item, (str, os.PathLike)) for item in data):
            return [_Table("memory", data)]
        paths = [os.fspath(item) for item in data]
    else:
        paths = [os.fspath(data)]
    opened = [_open_one(path, format) for path in paths]
    for index, source in enumerate(opened):
        for other in opened[:index]:
            same = other.path == source.path or (
                isinstance(source, Rows) and isinstance(other, Rows) and os.path.samefile(source.file, other.file)
            )
            if same and (other.first, other.stop) == (source.first, source.stop):
                what = f"the same file twice (first as {shown(other.path, 200)})"
                raise DataError(what, where=shown(source.path, 400), code="E120", next="drop one")
    return opened


def _open_one(name: str, format: str | None) -> Rows | _Table:
    first, stop = 0, None
    found = None if "\0" in name or _exists(name) else _SLICE.fullmatch(name)
    if found:
        name, inside = found.groups()
        bounds = re.fullmatch(r"\s*(\d{0,15})\s*:\s*(\d{0,15})\s*", inside)
        if not bounds:
            what = f'the slice "[{shown(inside, 40)}]" is not understood'
            raise UsageError(what, where=shown(name, 400), code="E303", next="write [:500], [100:] or [100:200]")
        first, stop = int(bounds[1] or 0), int(bounds[2]) if bounds[2] else None
    if name.startswith(builtin.PREFIX):
        return Rows(str(builtin.data_file(name)), format="jsonl", first=first, stop=stop, name=name)
    ending = os.path.splitext(unpacked_name(name))[1].lower()
    owner = name.partition("/")[0]
    if _HUB.fullmatch(name) and ending not in FORMATS and not _exists(name) and not os.path.isdir(owner):
        return _hub(name, first, stop)
    return Rows(name, format=format, first=first, stop=stop)


def _exists(name: str) -> bool:
    try:
        return os.path.lexists(name)
    except (OSError, ValueError):
        return False


def _hub(name: str, first: int, stop: int | None) -> _Table:
    from datasets import load_dataset

    repository, _, split = name.partition(":")
    try:
        found = load_dataset(repository)
    except Exception as error:  # whatever the client raises offline, for a missing or a private repository
        what = f"no such file, and the Hub did not give it: {shown(f'{type(error).__name__}: {error}', 200)}"
        hint = "check the name and the network, or give a local file"
        raise NotThereError(what, where=shown(name), code="E101", next=hint) from error
    split = split or "train"
    if split not in found:
        what = f'no split "{shown(split)}"; there are {", ".join(map(shown, found))}'
        raise NotThereError(
            what, where=shown(name), code="E101", next=f"name one: {repository}:{next(iter(found), 'SPLIT')}"
        )
    return _Table(name, found[split], first, stop, format="hub")


# reading


def _read(how: tuple[bool, Records | None], *options) -> Records:
    """The records of a `_Reading`; not held, they are read again by another one each time they are asked for."""
    hold, known = how
    records = _Reading(*options).records(hold) if known is None else known
    if hold and known is None:
        return records
    digests = [source["sha256"] for source in records.sources]
    return replace(records, records=Reread(len(records), lambda: _Reading(*options).again(digests)))


class _Reading:
    """One reading: dialect, conversion, bad rows, warnings. finish: a record -> what is made of it."""

    def __init__(self, data, tables: list[Dialect], wanted: str, columns, format, bad_rows: str, rejects, finish=None):
        if bad_rows not in ("stop", "skip", "keep"):
            what = f'bad_rows "{shown(bad_rows)}" is unknown'
            raise UsageError(what, where="--bad-rows", code="E303", next="use stop or skip")
        self.names = dialects.check_columns(columns)
        self.opened = open_data(data, format)
        self.tables, self.wanted, self.bad_rows, self.rejects = tables, wanted, bad_rows, rejects
        self.finish: Callable[[Any], list] = finish or (lambda record: [record])
        self.count = 0
        self.bad: list[tuple[Source, str, str, str]] = []
        self.bad_count = self.seen = 0
        self.dropped: dict[str, int] = {}
        self.notes: list[str] = []
        self.splits: dict[str, int] = {}
        self.odd: dict[str, list] = {}
        self.dialects: dict[Dialect, list[str]] = {}
        self.hashes, self.warn = _Hashes(), True
        self.ids: dict[Any, Source] = {}
        self.form: tuple[bool, Source] | None = None

    def records(self, hold: bool) -> Records:
        sources, found = [], []
        for number, opened in enumerate(self.opened):
            for made in self._read(number, opened):
                self.count += len(made)
                if hold:
                    found += made
            source = {"path": opened.path, "sha256": opened.sha256, "rows": opened.count}
            if opened.first or opened.stop is not None:
                source["slice"] = f"[{opened.first or ''}:{'' if opened.stop is None else opened.stop}]"
            sources.append(source)
            self.notes += [f"{shown(opened.path, 200)}: {note}" for note in opened.notes]
        self._settle()
        self._repeated()
        warnings = [Warned(code, _WARNINGS[code], n, tuple(rows)) for code, (n, rows) in sorted(self.odd.items())]
        said = [self._said(dialect, used) for dialect, used in self.dialects.items()]
        said += [f"prompts end at {where} in {count} rows" for where, count in self.splits.items()]
        if self.dropped:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
            said.append(f"left out: {counts}")
        records = tuple(found) if hold else Reread(self.count, list)
        return Records(records, sources, self.dropped, self.bad, said + self.notes, warnings)

    def again(self, digests: list[str]) -> Iterator:
        """The records one by one, of files that were read and found good before. Raises DataError where one changed."""
        self.warn = False
        for number, (opened, digest) in enumerate(zip(self.opened, digests, strict=True)):
            for made in self._read(number, opened):
                yield from made
            if opened.sha256 != digest:
                what = "the file changed while it was read"
                raise DataError(what, where=opened.path, code="E117", next="stop what writes to it and start again")

    def _said(self, dialect: Dialect, used: list[str]) -> str:
        text = f"columns {', '.join(shown(c, 40) for c in used)}: {dialect.name}"
        if self.wanted == "demonstrations" and dialect.kind == "pair":
            text += ", of which the chosen side is taken"
        if self.wanted == "feedback" and dialect.kind == "pair":
            text += ", chosen taken as wanted and rejected as unwanted"
        if self.wanted == "prompts" and dialect.kind != "prompt":
            text += ", of which the prompt is taken"
        if self.form is not None:
            text += "; plain text, no template" if self.form[0] else "; conversations"
        return text

    def _read(self, number: int, opened: Rows | _Table) -> Iterator[list]:
        """What is made of each row of a source, the `number`-th."""
        waiting: list = []
        dialect, known = None, False
        for row in opened:
            if known:
                yield self._take(number, opened, row, dialect)
                continue
            waiting.append(row)
            if len(waiting) == _PROBE:
                dialect, known = self._recognise(opened, waiting), True
                yield from [self._take(number, opened, row, dialect) for row in waiting]
        if not known:
            dialect = self._recognise(opened, waiting)
            yield from [self._take(number, opened, row, dialect) for row in waiting]

    def _recognise(self, opened: Rows | _Table, waiting: list) -> Dialect | None:
        objects = [
            (Source(opened.path, row.line), row.value)
            for row in waiting
            if row.problem is None and isinstance(row.value, dict) and len(row.value) <= dialects.MAX_TURNS
        ]
        if not objects:
            return None
        dialect = dialects.recognise(objects, self.tables, self.names, self.wanted)
        view = next((v for v in (View(r, self.names) for _, r in objects) if dialect.matches(v)), None)
        self.dialects.setdefault(dialect, dialect.columns(view) if view else [])
        return dialect

    def _take(self, number: int, opened: Rows | _Table, row, dialect: Dialect | None) -> list:
        place = Source(opened.path, row.line)
        self.seen += 1
        try:
            if row.problem:
                raise row.problem
            if not isinstance(row.value, dict):
                raise RowError("E201", f"{dialects.kind(row.value)} where a row belongs", "make each row an object")
            if len(row.value) > dialects.MAX_TURNS:
                raise RowError("E229", f"{len(row.value)} keys, the cap is {dialects.MAX_TURNS}", "split the row")
            if dialect is None:  # no object among the first rows
                dialect = dialects.recognise([(place, row.value)], self.tables, self.names, self.wanted)
                self.dialects.setdefault(dialect, dialect.columns(View(row.value, self.names)))
            view = View(row.value, self.names, untyped=opened.format == "csv")
            record = replace(self._converted(view, dialect, place), source=place)
            made = self.finish(record)
        except Dropped as reason:
            self.dropped[reason.reason] = self.dropped.get(reason.reason, 0) + 1
        except RowError as problem:
            self._refuse(place, row, problem)
        except RecursionError:
            self._refuse(place, row, RowError("E115", "nested too deep", "flatten the row"))
        else:
            if self.warn:
                self._warn(view, record, number)
            for where in view.splits:
                self.splits[where] = self.splits.get(where, 0) + 1
            if not self.bad_count or self.bad_rows != "stop":
                return made
        return []

    def _converted(self, view: View, dialect: Dialect, place: Source) -> Record:
        record = dialect.read(view)
        identity = view.get("id") if view.has("id") else None
        named = isinstance(identity, (str, int)) and not isinstance(identity, bool) and identity != ""
        if named and identity in self.ids:
            what = f'"{shown(identity, 40)}" is the id of {self.ids[identity]} too'
            raise RowError(
                "E228", what, "give it a new id, or --columns id= if it names no row", shown(view.name("id"))
            )
        plain = isinstance(record.prompt, str)
        if self.form is None:
            self.form = plain, place
        elif self.form[0] != plain:
            now, then = ("plain text", "a conversation") if plain else ("a conversation", "plain text")
            raise RowError("E230", f"{now}, while {self.form[1]} is {then}", "keep one form in all rows")
        if named:
            self.ids[identity] = place
        return record

    def _refuse(self, place: Source, row, problem: RowError) -> None:
        self.bad_count += 1
        if self.bad_rows == "stop" and len(self.bad) >= SHOWN_ROWS:
            return
        raw = "" if self.bad_rows != "skip" else (row.raw or as_json(row.value)).decode("utf-8", "surrogateescape")
        self.bad.append((place, raw, problem.code, str(problem.at(place))))

    def _warn(self, view: View, record: Record, number: int) -> None:
        place = record.source
        for code in view.warnings:
            self._count(code, place)
        if isinstance(record, Prompt):
            return
        bare, swapped = hash((type(record).__name__, replace(record, source=None))), None
        if isinstance(record, PreferencePair):
            swapped = hash(("PreferencePair", PreferencePair(record.prompt, record.rejected, record.chosen)))
            for better, worse in _SCORES:
                high, low = view.row.get(better), view.row.get(worse)
                if isinstance(high, (int, float)) and isinstance(low, (int, float)) and high < low:
                    self._count("W227", place)
        self.hashes.add(bare, swapped, number, place.line)

    def _repeated(self) -> None:
        """Counts the rows that stand twice, and the pairs that stand in both orders."""
        names = [opened.path for opened in self.opened]
        for code, (count, cases) in zip(("W212", "W211"), self.hashes.repeated(), strict=True):
            if count:
                self.odd[code] = [count, [tuple(Source(names[n], line) for n, line in case) for case in cases]]

    def _count(self, code: str, *places: Source) -> None:
        entry = self.odd.setdefault(code, [0, []])
        entry[0] += 1
        if len(entry[1]) < 3:
            entry[1].append(places)

    def _settle(self) -> None:
        """Refuses the whole where rows are bad, or too many of them."""
        if self.bad_rows == "keep" or not self.bad_count:
            if not self.count and not self.bad_count:
                counts = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
                where = shown(self.opened[0].path, 400)
                raise DataError(
                    f"no row is left ({counts})", where=where, code="E104", next="give rows that say something"
                )
            return
        codes = {code for _, _, code, _ in self.bad}
        shown_rows = [message for _, _, _, message in self.bad[:SHOWN_ROWS]]
        if self.bad_count > len(shown_rows):
            shown_rows.append(f"… and {self.bad_count - len(shown_rows)} more")
        total = f"{self.bad_count} of {self.seen} rows cannot be used"
        if self.bad_rows == "stop":
            code = codes.pop() if len(codes) == 1 else None
            hint = "fix them, or --bad-rows skip copies them to rejects.jsonl and goes on"
            raise DataError("\n".join([*shown_rows, total]), code=code, next=hint)
        if self.rejects is not None:
            self._write_rejects()
        # a handful of bad rows in a small file is no sign of a broken one
        if self.bad_count > MOST_BAD * max(self.seen, 100) or not self.count:
            share = f"{total}: {100 * self.bad_count / self.seen:.1f} %, more than {100 * MOST_BAD:.0f} %"
            share = share if self.count else f"{total}: none is left"
            raise DataError(
                "\n".join([*shown_rows, share]), code="E234", next="fix the file; it may not be what it seems"
            )
        self.notes.append(f"{total} and were left out: {', '.join(sorted(codes))}")

    def _write_rejects(self) -> None:
        from palate import files

        files.write_bytes(Path(self.rejects), Records((), rejected=self.bad).rejects())


class _Hashes:
    """A hash of every row, 25 bytes in all, in which those that stand twice are looked for at the end."""

    def __init__(self):
        self._bare, self._swapped, self._place = array("q"), array("q"), array("q")
        self._pairs = array("b")

    def add(self, bare: int, swapped: int | None, source: int, line: int) -> None:
        """swapped: of the pair with its sides exchanged. source, line: where the row stands."""
        self._bare.append(bare)
        self._swapped.append(swapped or 0)
        self._pairs.append(swapped is not None)
        self._place.append(source << 40 | line)

    def repeated(self) -> list[tuple[int, list[tuple]]]:
        """Of equal rows, and of pairs that came before in the other order: how many, and the first three cases.

        A case is (first, later), each (source, line).
        """
        import numpy as np

        if not self._bare:
            return [(0, [])] * 2
        bare, swapped, place = (np.frombuffer(column, np.int64) for column in (self._bare, self._swapped, self._place))
        values, first = np.unique(bare, return_index=True)  # sorted; the first of equal ones
        rows, at = np.arange(len(bare)), first[np.searchsorted(values, bare)]
        other = np.minimum(np.searchsorted(values, swapped), len(values) - 1)
        turned = (np.frombuffer(self._pairs, np.int8) == 1) & (values[other] == swapped) & (first[other] <= rows)
        found = []
        for odd, before in ((at != rows, at), (turned, first[other])):
            shown = np.flatnonzero(odd)[:3]
            cases = zip(place[before[shown]].tolist(), place[shown].tolist(), strict=True)
            found.append((int(odd.sum()), [tuple((p >> 40, p & (1 << 40) - 1) for p in case) for case in cases]))
        return found
