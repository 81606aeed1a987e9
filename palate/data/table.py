"""Groups of tokens in an Arrow table that is mapped, not read: a million of them take the memory of their lengths.

A row is made when it is asked for. What order, packing and look-up need of all rows at once is here as columns of
numbers, for tables and for lists alike.
"""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from palate.data.records import Source
from palate.data.tokens import TokenGroup
from palate.store import row_key

BATCH = 4096  # rows of an Arrow record batch
HELD = 32  # rows that are made before the pages under them, up to a MB a row, are given back


@dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of G groups and their C completions, int32.

    prompt: (G,). completion: (C,). first: (G + 1,) int64, where each group's completions begin.
    """

    prompt: np.ndarray
    completion: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[TokenGroup]) -> "Lengths":
        if isinstance(groups, TokenTable):
            return groups.lengths
        counts = [len(group.completions) for group in groups]
        return cls(
            np.array([len(group.prompt) for group in groups], np.int32),
            np.array([len(ids) for group in groups for ids in group.completions], np.int32),
            np.cumsum([0, *counts]),
        )

    @property
    def stream(self) -> np.ndarray:
        """(G,) tokens that each group takes in a stream, as `stream_length` counts them."""
        before = np.concatenate([[0], np.cumsum(np.maximum(self.completion - 1, 0))])[self.first]
        return self.prompt + np.diff(before)

    def group(self, places: np.ndarray) -> np.ndarray:
        """(n,) the groups of completions that are numbered through all groups."""
        return np.searchsorted(self.first, places, side="right") - 1

    def within(self, places: np.ndarray) -> list[tuple[int, int]]:
        """The same as (group, number within the group)."""
        groups = self.group(places)
        return list(zip(groups.tolist(), (places - self.first[groups]).tolist(), strict=True))


def row_keys(groups: Sequence[TokenGroup]) -> np.ndarray:
    """(C, 2) uint64 content keys of every completion after its prompt, in order, repeats included."""
    return groups.keys if isinstance(groups, TokenTable) else as_keys([key for group in groups for key in _keys(group)])


def distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places (D,) where each distinct key stands first, in order; and (n,) which of these every key is.

    keys: (n, 2) uint64.
    """
    hi, lo = keys[:, 0], keys[:, 1]
    sort = np.argsort(hi)
    ranked = hi[sort]
    equal = ranked[1:] == ranked[:-1]
    if not equal.any():
        return np.arange(len(keys)), np.arange(len(keys))
    del ranked
    if (lo[sort[1:]] != lo[sort[:-1]])[equal].any():  # half a key in common
        sort = np.lexsort((lo, hi))
        equal = (hi[sort[1:]] == hi[sort[:-1]]) & (lo[sort[1:]] == lo[sort[:-1]])
    runs = np.flatnonzero(np.concatenate([[True], ~equal]))
    first = np.empty(len(keys), np.int64)
    first[sort] = np.repeat(np.minimum.reduceat(sort, runs), np.diff(runs, append=len(keys)))
    new = first == np.arange(len(keys))
    return np.flatnonzero(new), (np.cumsum(new) - 1)[first]


def pick(groups: Sequence[TokenGroup], places: np.ndarray) -> Sequence[TokenGroup]:
    """Some of the groups, by their places."""
    return groups.pick(places) if isinstance(groups, TokenTable) else [groups[at] for at in places.tolist()]


def joined(one: Sequence[TokenGroup], two: Sequence[TokenGroup]) -> Sequence[TokenGroup]:
    """All groups of both, in order: a list, or a table where one of them is a table."""
    if isinstance(one, TokenTable) or isinstance(two, TokenTable):
        return TokenTable.joined(TokenTable.of(one), TokenTable.of(two))
    return [*one, *two]


class TokenTable(Sequence[TokenGroup]):
    """Rows of tables, as groups that are made on access; slices and picks share what lies under them.

    rows: (G,) int32, of the whole below. reference: float64 nats of every completion of the whole, once annotated.
    """

    def __init__(self, whole: "_Whole", rows: np.ndarray, reference: np.ndarray | None = None):
        self._whole, self.rows, self._reference = whole, rows.astype(np.int32, copy=False), reference

    @classmethod
    def open(cls, path: Path) -> "TokenTable":
        """The rows of a file that a `TableWriter` wrote; it is mapped, and must be known to be whole."""
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls._of_arrow(mapped, [mapped])

    @classmethod
    def of(cls, groups: Sequence[TokenGroup]) -> "TokenTable":
        """The groups as a table in memory; a table as it is."""
        import pyarrow

        if isinstance(groups, TokenTable):
            return groups
        sink = pyarrow.BufferOutputStream()
        with TableWriter(sink) as writer:
            for group in groups:
                writer.append(group)
        return cls._of_arrow(sink.getvalue(), [])

    @classmethod
    def joined(cls, one: "TokenTable", two: "TokenTable") -> "TokenTable":
        """The rows of both, in order."""
        if one._whole is two._whole and one._reference is two._reference:
            return cls(one._whole, np.concatenate([one.rows, two.rows]), one._reference)
        whole = _Whole(one._whole.batches + two._whole.batches, one._whole.maps + two._whole.maps)
        parts = [part for part in (one._reference, two._reference) if part is not None]
        reference = np.concatenate(parts) if len(parts) == 2 else None
        return cls(whole, np.concatenate([one.rows, two.rows + one._whole.size]), reference)

    @classmethod
    def _of_arrow(cls, buffer: Any, maps: list) -> "TokenTable":
        import pyarrow

        reader = pyarrow.ipc.open_file(pyarrow.BufferReader(pyarrow.py_buffer(buffer)))
        whole = _Whole([_Batch.of(reader.get_batch(number)) for number in range(reader.num_record_batches)], maps)
        return cls(whole, np.arange(whole.size))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.pick(np.arange(len(self))[index])
        return self._whole.group(int(self.rows[index]), self._reference)

    def pick(self, places: np.ndarray) -> "TokenTable":
        """The rows at these places, in that order."""
        return TokenTable(self._whole, self.rows[places], self._reference)

    def with_reference(self, values: np.ndarray) -> "TokenTable":
        """The same rows, annotated. values: (C,) float64, nats, of every completion in order."""
        reference = np.full(len(self._whole.completion), np.nan)
        reference[self._completions()] = values
        return TokenTable(self._whole, self.rows, reference)

    @property
    def lengths(self) -> Lengths:
        """Of these rows; put together on each call, as `keys` and `marks` are."""
        whole = self._whole
        first = np.concatenate([[0], np.cumsum(np.diff(whole.first)[self.rows])])
        return Lengths(whole.prompt[self.rows], whole.completion[self._completions()], first)

    @property
    def keys(self) -> np.ndarray:
        """(C, 2) uint64, as `row_keys`."""
        return self._whole.column("keys", self._completions())

    def _completions(self) -> np.ndarray:
        first = self._whole.first
        return _ranges(first[self.rows], np.diff(first)[self.rows])

    @property
    def marks(self) -> np.ndarray:
        """(G, 2) uint64: what each row was marked with when it was written."""
        return self._whole.column("mark", self.rows)


class _Whole:
    """Every row of one or several tables. prompt, completion: tokens of each; first: where completions begin."""

    def __init__(self, batches: "list[_Batch]", maps: list[mmap.mmap]):
        self.batches, self.maps = batches, maps
        self.starts = np.cumsum([0, *(len(batch) for batch in batches)])
        self.size = int(self.starts[-1])
        self.prompt = self._joined([np.diff(batch.prompt_at) for batch in batches], np.int32)
        self.completion = self._joined([np.diff(batch.ids_at) for batch in batches], np.int32)
        counts = self._joined([np.diff(batch.first) for batch in batches], np.int32)
        self.first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._made = 0
        self.give_back()

    @staticmethod
    def _joined(parts: list[np.ndarray], kind: Any) -> np.ndarray:
        return np.concatenate(parts) if parts else np.empty(0, kind)

    def column(self, name: str, places: np.ndarray) -> np.ndarray:
        """(n, 2) uint64 of a column at these places."""
        parts = [getattr(batch, name) for batch in self.batches]
        found, end = np.empty(sum(map(len, parts)), np.uint64), 0
        for part in parts:
            end += len(part)
            found[end - len(part) : end] = part
            self.give_back()
        return found.reshape(-1, 2)[places]

    def group(self, row: int, reference: np.ndarray | None) -> TokenGroup:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        self._made += 1
        if self._made % HELD == 0:
            self.give_back()
        own = None if reference is None else tuple(reference[self.first[row] : self.first[row + 1]].tolist())
        return self.batches[number].group(row - int(self.starts[number]), own)

    def give_back(self) -> None:
        """Pages that were touched go back to the system, which reads them again when they are asked for."""
        for mapped in self.maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, eq=False)
class _Batch:
    """The columns of one record batch, as they lie in the file; `..._at` say where each item begins."""

    prompt_at: np.ndarray
    prompt: np.ndarray
    first: np.ndarray
    ids_at: np.ndarray
    ids: np.ndarray
    spans_at: np.ndarray
    spans: np.ndarray
    preferences_at: np.ndarray
    preferences: np.ndarray
    cut_at: np.ndarray
    cut: np.ndarray
    keys: np.ndarray
    mark: np.ndarray
    label: np.ndarray
    prompt_cut: np.ndarray
    line: np.ndarray
    margin: np.ndarray
    file: np.ndarray
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.line)

    @classmethod
    def of(cls, batch: Any) -> "_Batch":
        def flat(column: Any) -> np.ndarray:
            return column.to_numpy(zero_copy_only=True)

        def nested(column: Any) -> tuple[np.ndarray, Any]:
            return flat(column.offsets), column.values

        found: dict[str, Any] = {}
        for name in ("prompt", "preferences", "cut", "mark"):
            at, values = nested(batch.column(name))
            found |= {f"{name}_at": at, name: flat(values)}
        del found["mark_at"]
        found["first"], ids = nested(batch.column("completions"))
        found["ids_at"], values = nested(ids)
        found["ids"] = flat(values)
        found["spans_at"], values = nested(batch.column("spans").values)
        found["spans"] = flat(values)
        found["keys"] = flat(batch.column("keys").values)
        for name in ("label", "prompt_cut", "line", "margin"):
            found[name] = flat(batch.column(name))
        file = batch.column("file")
        return cls(**found, file=flat(file.indices), files=tuple(file.dictionary.to_pylist()))

    def group(self, row: int, reference: tuple[float, ...] | None) -> TokenGroup:
        """The row as a group; its arrays are copies."""
        completions = range(int(self.first[row]), int(self.first[row + 1]))
        spans = [self.spans[self.spans_at[k] : self.spans_at[k + 1]].tolist() for k in completions]
        preferences = self.preferences[self.preferences_at[row] : self.preferences_at[row + 1]].tolist()
        label, line, margin = int(self.label[row]), int(self.line[row]), float(self.margin[row])
        return TokenGroup(
            prompt=self.prompt[self.prompt_at[row] : self.prompt_at[row + 1]].copy(),
            completions=tuple(self.ids[self.ids_at[k] : self.ids_at[k + 1]].copy() for k in completions),
            spans=tuple(_pairs(flat) for flat in spans),
            preferences=_pairs(preferences),
            label=None if label < 0 else bool(label),
            cut=tuple(map(bool, self.cut[self.cut_at[row] : self.cut_at[row + 1]].tolist())),
            prompt_cut=int(self.prompt_cut[row]),
            source=None if line < 0 else Source(self.files[int(self.file[row])], line),
            reference=reference,
            margin=None if np.isnan(margin) else margin,
        )


class TableWriter:
    """Writes groups to `sink` (an Arrow stream or a path) as they come, holding BATCH of them at most.

    What a group says of itself is kept, its `reference` left out.
    """

    def __init__(self, sink: Any):
        import pyarrow as pa

        ids, flat = pa.list_(pa.int32()), pa.list_(pa.uint64())
        columns = {"prompt": ids, "completions": pa.list_(ids), "spans": pa.list_(ids), "preferences": ids}
        columns |= {"cut": pa.list_(pa.int8()), "keys": flat, "mark": flat}
        columns |= {"label": pa.int8(), "prompt_cut": pa.int32(), "line": pa.int64(), "margin": pa.float64()}
        columns["file"] = pa.dictionary(pa.int32(), pa.string())
        self._schema = pa.schema(columns)
        options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
        self._writer = pa.ipc.new_file(
            os.fspath(sink) if isinstance(sink, os.PathLike) else sink, self._schema, options=options
        )
        self._waiting: list[tuple[TokenGroup, bytes]] = []
        self._files = {"": 0}  # without a source

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def append(self, group: TokenGroup, mark: bytes = bytes(16)) -> None:
        """mark: 16 bytes that the row is to be known by."""
        self._waiting.append((group, mark))
        if len(self._waiting) == BATCH:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._waiting:
            return
        groups, marks = [group for group, _ in self._waiting], [mark for _, mark in self._waiting]
        self._waiting = []
        counts = [len(group.completions) for group in groups]
        spans = [_flat(spans) for group in groups for spans in group.spans]
        for group in groups:
            if group.source is not None:
                self._files.setdefault(group.source.file, len(self._files))
        columns = {
            "prompt": _lists([group.prompt for group in groups], np.int32),
            "completions": _nested(counts, _lists([ids for group in groups for ids in group.completions], np.int32)),
            "spans": _nested([len(group.spans) for group in groups], _lists(spans, np.int32)),
            "preferences": _lists([_flat(group.preferences) for group in groups], np.int32),
            "cut": _lists([group.cut for group in groups], np.int8),
            "keys": _nested(
                [2 * count for count in counts], pa.array(as_keys([k for g in groups for k in _keys(g)]).reshape(-1))
            ),
            "mark": _nested([2] * len(groups), pa.array(as_keys(marks).reshape(-1))),
            "label": pa.array([-1 if g.label is None else int(g.label) for g in groups], pa.int8()),
            "prompt_cut": pa.array([group.prompt_cut for group in groups], pa.int32()),
            "line": pa.array([-1 if g.source is None else g.source.line for g in groups], pa.int64()),
            "margin": pa.array(np.array([np.nan if g.margin is None else g.margin for g in groups], np.float64)),
            "file": pa.DictionaryArray.from_arrays(
                pa.array([0 if g.source is None else self._files[g.source.file] for g in groups], pa.int32()),
                pa.array(list(self._files), pa.string()),
            ),
        }
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))


def _keys(group: TokenGroup) -> list[bytes]:
    return [row_key(group.prompt, ids, spans) for ids, spans in zip(group.completions, group.spans, strict=True)]


def as_keys(keys: Sequence[bytes]) -> np.ndarray:
    """(n, 2) uint64 out of 16 bytes each."""
    return np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2)


def _flat(pairs: Sequence[tuple[int, int]]) -> list[int]:
    return [value for pair in pairs for value in pair]


def _pairs(flat: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _lists(items: Sequence[Sequence[int]], kind: Any) -> Any:
    """An Arrow list array of these rows of numbers."""
    import pyarrow as pa

    values = np.concatenate([np.asarray(item, kind) for item in items]) if items else np.empty(0, kind)
    return _nested([len(item) for item in items], pa.array(values))


def _nested(counts: Sequence[int], values: Any) -> Any:
    """An Arrow list array whose rows have so many of the values each."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *counts], dtype=np.int32)), values)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """All numbers from each start on, so many of each."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))
