"""Files of rows: bytes -> one JSON-like value a row with its physical line. Knows formats, nothing of preferences.

Only a line feed ends a row. What is wrong with one row is a `RowError` beside it, what is wrong with a file is raised.
"""

import csv
import hashlib
import io
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import Any

from palate.errors import DataError, MachineError, NotThereError, UsageError

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
PACKED = {".gz": "gzip", ".zst": "zstd"}
MAX_LINE_BYTES = 16 * 2**20
MAX_RATIO, FREE_BYTES = 200, 64 * 2**20  # a packed file may always unpack to FREE_BYTES
MAX_DEPTH = 64
MAX_DIGITS = 20
MAX_KEYS = 1000
FIX = "fix the row or use --bad-rows skip"

_MAGIC = [
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"PK\x03\x04", "zip"),
    (b"SQLite format 3", "SQLite"),
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"<!DOCTYPE", "HTML"),
    (b"<html", "HTML"),
]
_FETCH = {"a Git LFS pointer": "run `git lfs pull`", "HTML": "download the file itself, not the page that shows it"}
_ENCODINGS = [
    (b"\xff\xfe\x00\x00", "UTF-32LE"),
    (b"\x00\x00\xfe\xff", "UTF-32BE"),
    (b"\xff\xfe", "UTF-16LE"),
    (b"\xfe\xff", "UTF-16BE"),
]
_SPACE = re.compile(r"[ \t\n\r]*")
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},:]', re.DOTALL)


class RowError(Exception):
    """What is wrong with one row, before anyone has said where it stands."""

    def __init__(self, code: str, what: str, next: str = FIX, field: str | None = None):
        self.code, self.what, self.next, self.field = code, what, next, field
        super().__init__(what)

    def at(self, place: object) -> DataError:
        """The same as an error that names the place and the field."""
        where = f'{place}: field "{self.field}"' if self.field else str(place)
        return DataError(self.what, where=where, code=self.code, next=self.next)


@dataclass(frozen=True, slots=True)
class Row:
    """A value or a problem. line: physical, from 1 (row number in tables), and of no two rows the same: where several
    of an array begin on one line, the next number. raw: the row's bytes, empty in tables."""

    line: int
    raw: bytes
    value: Any = None
    problem: RowError | None = None


def shown(name: object, limit: int = 80) -> str:
    """A name from data or a path, fit to stand in a message: one line, no control characters, not too long."""
    text = "".join(c if c.isprintable() and c != '"' else ascii(c)[1:-1] for c in str(name))
    return text if len(text) <= limit else text[: limit // 2] + "…" + text[-limit // 2 + 1 :]


def unpacked_name(path: str) -> str:
    """A file's name without the ending that says how it is packed: "a.jsonl.gz" is "a.jsonl"."""
    stem, ending = os.path.splitext(path)
    return stem if ending.lower() in PACKED else path


def file_format(path: str, format: str | None = None) -> str:
    """The format a file is read as: `format` where given, else by the end of its name."""
    if format is not None:
        if format not in FORMATS.values():
            known = ", ".join(sorted(set(FORMATS.values())))
            what = f'"{shown(format)}" is no data format'
            raise UsageError(what, where="--format", code="E303", next=f"use one of {known}")
        return format
    ending = os.path.splitext(unpacked_name(path))[1].lower()
    if ending not in FORMATS:
        raise DataError(
            f'a name ending in "{shown(ending)}" does not say how to read the file',
            where=shown(path, 400),
            code="E113",
            next="rename it to .jsonl, .json, .csv, .parquet or .txt (.gz or .zst behind if packed), or give --format",
        )
    return FORMATS[ending]


class Rows:
    """Iterates over the `Row`s of one regular file; afterwards `sha256`, `count` and `notes` are whole.

    first, stop: half-open range of rows from 0, blank lines not counted; the file is hashed to its end all the same.
    name: what the file is called in messages and records, in place of its path.
    """

    def __init__(
        self,
        path: str,
        *,
        format: str | None = None,
        first: int = 0,
        stop: int | None = None,
        name: str | None = None,
    ):
        self.path, self.file, self.first, self.stop = name or path, path, first, stop
        self.notes: list[str] = []
        self.count = 0
        self._check_path()
        self.format = file_format(path, format)
        self.packed = PACKED.get(os.path.splitext(path)[1].lower())
        self._said = format is not None
        self._hash = hashlib.sha256()
        self._seen = 0
        self._json = _Json()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Row]:
        try:
            handle = open(self.file, "rb")  # noqa: SIM115, closed below
        except PermissionError as error:
            raise self._unreadable() from error
        except OSError as error:
            raise MachineError(f"cannot be opened: {error.strerror}", where=self._where(), code="E103") from error
        with handle:
            before = _mark(os.fstat(handle.fileno()))
            plain = self._unpacked(handle) if self.packed else handle
            self._check_start(plain.peek(64)[:64])
            read = {"jsonl": self._jsonl, "json": self._json_array, "csv": self._csv, "parquet": self._parquet}
            read["text"] = self._documents
            try:
                yield from read[self.format](plain)
                if self.packed:  # what is recorded is the file as it lies there
                    handle.seek(0)
                    self._hash = hashlib.file_digest(handle, "sha256")
            except OSError as error:
                raise MachineError(f"cannot be read: {error.strerror or error}", where=self._where()) from error
            after = _mark(os.fstat(handle.fileno()))
        try:
            named = _mark(os.stat(self.file))
        except OSError:
            named = None
        if before != after or named != after:
            raise self._refused("E117", "the file changed while it was read", "stop what writes to it and start again")
        if not self._seen:
            raise self._refused("E104", "no rows", "check the step that exported the file")
        if not self.count:
            span = f"[{self.first}:{'' if self.stop is None else self.stop}]"
            what = f"no rows: the slice {span} of {self._seen} rows is empty"
            raise self._refused("E104", what, f"choose rows between 0 and {self._seen}")

    # what is asked before a byte is read

    def _where(self, line: int | None = None) -> str:
        return shown(self.path, 400) + (f":{line}" if line else "")

    def _refused(self, code: str, what: str, next: str, line: int | None = None) -> DataError:
        return DataError(what, where=self._where(line), code=code, next=next)

    def _unreadable(self) -> MachineError:
        try:
            state = os.stat(self.file)
            what = f"no permission to read it: owner {state.st_uid}, mode {stat.S_IMODE(state.st_mode):o}"
        except OSError:
            what = "no permission to read it"
        return MachineError(
            what, where=self._where(), code="E103", next=f"run `chmod u+r {shown(self.path, 200)}` as its owner"
        )

    def _check_path(self) -> None:
        path = self.file
        odd = [c for c in path if unicodedata.category(c) in ("Cc", "Cs")]
        if odd or len(os.fsencode(path) if not odd else path) > 4096 or max(map(len, path.split("/"))) > 255:
            what = f"a name with {odd[0]!a}" if odd else f"a name of {len(path)} characters"
            raise self._refused("E119", f"{what} cannot be used", "rename the file")
        try:
            state = os.stat(path)
        except PermissionError as error:
            raise self._unreadable() from error
        except (FileNotFoundError, NotADirectoryError) as error:
            if os.path.islink(path):
                raise self._refused("E118", "a link to nothing", "give a regular file") from error
            raise self._missing() from error
        except OSError as error:
            kind = "a link that leads to itself" if os.path.islink(path) else f"not usable: {error.strerror}"
            raise self._refused("E118", kind, "give a regular file") from error
        if stat.S_ISDIR(state.st_mode):
            inside = [n for n in os.listdir(path) if os.path.splitext(unpacked_name(n))[1].lower() in FORMATS]
            inside = sorted(inside)[:3]
            found = "a folder; a data file ends in " + ", ".join(FORMATS)
            give = "give a file" + (
                ": " + ", ".join(shown(os.path.join(path, n), 200) for n in inside) if inside else ""
            )
            raise self._refused("E102", found, give)
        if not stat.S_ISREG(state.st_mode):
            kinds = [(stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a character device")]
            kind = next((name for test, name in kinds if test(state.st_mode)), "a device")
            raise self._refused("E118", kind, "give a regular file")

    def _missing(self) -> NotThereError:
        folder, name = os.path.split(os.path.abspath(self.file))
        try:
            near = get_close_matches(name, sorted(os.listdir(folder))[:10_000], n=3, cutoff=0.5)
        except OSError:
            near = []
        what = f"no such file (looked for {shown(os.path.join(folder, name), 400)})"
        hint = "check the path" + (", or give " + " or ".join(shown(n) for n in near) if near else "")
        return NotThereError(what, where=self._where(), code="E101", next=hint)

    def _check_start(self, start: bytes) -> None:
        if not start:
            raise self._refused("E104", "no rows: the file is empty", "check the step that exported the file")
        for magic, name in _MAGIC:
            if start.startswith(magic) and not (name == "Parquet" and self.format == "parquet"):
                todo = _FETCH.get(name, f"unpack the {name} file")
                if name == "Parquet":
                    todo = "rename it to .parquet or give --format parquet"
                ending = next((ending for ending, kind in PACKED.items() if kind == name), None)
                if ending and not self.packed:
                    todo = f"rename it to end in .{self.format}{ending}"
                raise self._refused("E113", f"this is {name}, not {self.format}", todo)
        if self.format == "parquet":
            if not start.startswith(b"PAR1"):
                raise self._refused("E113", "this is not Parquet", "rename it after what it holds or give --format")
            return
        encoding = next((name for bom, name in _ENCODINGS if start.startswith(bom)), None)
        if encoding is None and len(start) >= 4 and start[:1] in b'[{"\x00 \n':
            zeros = tuple(b == 0 for b in start[:4])
            patterns = {
                (False, True, False, True): "UTF-16LE",
                (True, False, True, False): "UTF-16BE",
                (False, True, True, True): "UTF-32LE",
                (True, True, True, False): "UTF-32BE",
            }
            encoding = next((name for pattern, name in patterns.items() if pattern == zeros), None)
        if encoding:
            name = shown(unpacked_name(self.path), 200)
            todo = f"run `iconv -f {encoding} -t UTF-8 {name} > utf8.{self.format}`"
            what = f"the text is {encoding}, not UTF-8"
            raise self._refused("E105", what, f"unpack it and {todo}" if self.packed else todo)

    def _unpacked(self, handle: io.BufferedReader) -> io.BufferedReader:
        """What a packed file holds, which is unpacked while it is read."""
        start = handle.peek(4)
        if start and not any(start.startswith(magic) for magic, name in _MAGIC if name == self.packed):
            what = f'the name ends in "{shown(os.path.splitext(self.file)[1])}", but this is not {self.packed}'
            raise self._refused("E113", what, "rename it after what it holds")
        if self.format == "parquet":
            raise self._refused("E113", f"Parquet inside {self.packed} is not read", f"unpack the {self.packed} file")
        plain = io.BufferedReader(_Unpacking(handle, self, os.fstat(handle.fileno()).st_size))
        # JSON is read at once, and from its beginning again where it turns out to be one object a line
        return io.BufferedReader(io.BytesIO(plain.read())) if self.format == "json" else plain

    # the formats

    def _wanted(self) -> bool:
        """Counts one row and says whether it lies in the slice."""
        index = self._seen
        self._seen += 1
        wanted = index >= self.first and (self.stop is None or index < self.stop)
        self.count += wanted
        return wanted

    def _lines(self, handle: io.BufferedReader) -> Iterator[tuple[int, int, bytes]]:
        """Physical lines with their number and byte offset, the line feed included."""
        number = offset = 0
        while line := handle.readline(MAX_LINE_BYTES + 1):
            number += 1
            self._hash.update(line)
            if len(line) > MAX_LINE_BYTES:
                raise self._refused(
                    "E114", f"the line is longer than {MAX_LINE_BYTES >> 20} MiB", "split the row", number
                )
            size = len(line)
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                self.notes.append("a byte order mark at the start was skipped")
                line = line[3:]
            yield number, offset + size - len(line), line
            offset += size

    def _jsonl(self, handle: io.BufferedReader) -> Iterator[Row]:
        for number, offset, line in self._lines(handle):
            raw = line[:-1] if line.endswith(b"\n") else line
            if not raw.strip(b" \t\r"):
                continue
            if not self._seen and raw.lstrip()[:1] == b"[":
                self._refuse_array(raw, number)
            if self._wanted():
                yield self._parsed(number, offset, raw, cut=not line.endswith(b"\n"))

    def _refuse_array(self, raw: bytes, number: int) -> None:
        try:
            first = json.loads(raw)
        except (ValueError, RecursionError):
            first = (
                None
                if raw.strip().rstrip(b",").rstrip() in (b"[", b"[{") or raw.lstrip()[1:].lstrip()[:1] in (b"{", b"")
                else 0
            )
        if first is None or (isinstance(first, list) and first and isinstance(first[0], dict)):
            raise self._refused(
                "E113", "this is one JSON array, not a row a line", "rename it to .json or give --format json", number
            )

    def _parsed(self, number: int, offset: int, raw: bytes, cut: bool = False) -> Row:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            what = f"byte 0x{raw[error.start]:02x} at offset {offset + error.start} of the file is not UTF-8"
            return Row(number, raw, problem=RowError("E106", what))
        try:
            return Row(number, raw, self._json.value(text))
        except RowError as problem:
            if problem.code == "E200" and b"\r" in raw.rstrip(b"\r"):
                problem = RowError(
                    "E109", "a carriage return alone stands inside the row", "convert the line ends to \\n"
                )
            elif problem.code == "E200" and cut:
                problem = RowError(
                    "E110", f"the last line is cut ({problem.what}): file truncated?", "copy the file again"
                )
            return Row(number, raw, problem=problem)

    def _documents(self, handle: io.BufferedReader) -> Iterator[Row]:
        """Plain text: what stands between blank lines is a document, a row with one column, "text"."""
        held: list[bytes] = []
        first = start = size = 0
        for number, offset, line in chain(self._lines(handle), [(0, 0, b"")]):
            if line.strip():
                if not held:
                    first, start, size = number, offset, 0
                held.append(line)
                size += len(line)
                if size > MAX_LINE_BYTES:
                    what = f"the document is longer than {MAX_LINE_BYTES >> 20} MiB"
                    raise self._refused("E114", what, "put a blank line between documents", first)
            elif held:
                if self._wanted():
                    yield self._document(first, start, b"".join(held).rstrip(b"\r\n"))
                held = []

    def _document(self, number: int, offset: int, raw: bytes) -> Row:
        line = raw.split(b"\n")[0]
        if not self._said and self._seen == 1 and line[:1] == b"{" and self._parsed(number, offset, line).value:
            what = f'the name ends in "{shown(os.path.splitext(self.path)[1])}", but rows of JSON stand there'
            raise self._refused("E113", what, "give --format jsonl, or --format text if they are meant as text", number)
        try:
            return Row(number, raw, {"text": raw.decode("utf-8")})
        except UnicodeDecodeError as error:
            what = f"byte 0x{raw[error.start]:02x} at offset {offset + error.start} of the file is not UTF-8"
            return Row(number, raw, problem=RowError("E106", what))

    def _json_array(self, handle: io.BufferedReader) -> Iterator[Row]:
        start = handle.peek(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start[:1] == b"{":
            first = handle.readline(MAX_LINE_BYTES + 1)
            handle.seek(0)
            try:
                self._json.value(first.decode("utf-8-sig"))
            except (RowError, UnicodeDecodeError) as error:
                if isinstance(error, UnicodeDecodeError) or error.code == "E200":
                    raise self._refused(
                        "E113",
                        "this is one JSON object, not an array of rows",
                        "write the rows as one array, or one a line",
                    ) from error
            self.notes.append("one object a line was found and read as JSONL")
            yield from self._jsonl(handle)
            return
        data = handle.read()
        self._hash.update(data)
        if data.startswith(b"\xef\xbb\xbf"):
            self.notes.append("a byte order mark at the start was skipped")
        # bytes that are not UTF-8 become lone surrogates here and are named with their row below
        text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        del data
        position = _skip_space(text, 0)
        if position == len(text):
            raise self._refused("E104", "no rows: the file is blank", "check the step that exported the file")
        line = 1 + text.count("\n", 0, position)
        if text[position] != "[":
            what = f"not a JSON array: it begins with {text[position]!a}"
            raise self._refused("E113", what, "rename it after what it holds or give --format", line)
        counted, position, number = position, position + 1, 0
        while True:
            position = _skip_space(text, position)
            line += text.count("\n", counted, position)
            counted = position
            if text[position : position + 1] == "]":
                position = _skip_space(text, position + 1)
                if position < len(text):
                    line += text.count("\n", counted, position)
                    raise self._refused("E200", "text after the end of the array", "remove it", line)
                return
            try:
                value, end = self._json.scan(text, position)
                problem = None
            except RowError as error:
                value, problem, end = None, error, _element_end(text, position)
            after = _skip_space(text, end)
            mark = text[after : after + 1]
            raw = text[position:end].encode("utf-8", "surrogateescape")
            if problem is None and mark not in (",", "]", ""):
                problem, value = RowError("E200", "not JSON: a comma is missing after the row"), None
                end = _element_end(text, end)
                raw, after = text[position:end].encode("utf-8", "surrogateescape"), _skip_space(text, end)
                mark = text[after : after + 1]
            if not mark and (problem is None or problem.code == "E200"):
                problem = RowError("E110", "the array does not end: file truncated?", "copy the file again")
            if problem is None or problem.code == "E200":
                try:
                    raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    offset = len(text[:position].encode("utf-8", "surrogateescape")) + error.start
                    what = f"byte 0x{raw[error.start]:02x} at offset {offset} of the text is not UTF-8"
                    value, problem = None, RowError("E106", what)
            if len(raw) > MAX_LINE_BYTES:
                raise self._refused("E114", f"the row is longer than {MAX_LINE_BYTES >> 20} MiB", "split the row", line)
            number = max(number + 1, line)
            if self._wanted():
                yield Row(number, raw, value, problem)
            if not mark:
                return
            position = after + 1 if mark == "," else after

    def _csv(self, handle: io.BufferedReader) -> Iterator[Row]:
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
        held: list[bytes] = []
        last = 0

        def texts() -> Iterator[str]:
            nonlocal last
            for number, _, line in self._lines(handle):
                last = number
                held.append(line)
                if sum(map(len, held)) > MAX_LINE_BYTES:
                    raise self._refused(
                        "E114", f"the row is longer than {MAX_LINE_BYTES >> 20} MiB", "split the row", number
                    )
                yield line.decode("utf-8", "surrogateescape")

        reader = csv.reader(texts(), strict=True)
        header: list[str] | None = None
        while True:
            held.clear()
            line, problem = last + 1, None
            cells: list[str] = []
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problem = RowError("E200", f"not CSV: {error}")
                if "unexpected end" in str(error):
                    problem = RowError("E110", "a quoted cell does not end: file truncated?", "copy the file again")
                elif "new-line character" in str(error) or any(b"\r" in h.rstrip(b"\r\n") for h in held):
                    problem = RowError("E109", "a carriage return alone ends a row", "convert the line ends to \\n")
            if problem is None and not any(c.strip() for c in cells) and len(cells) <= 1:
                continue
            raw = b"".join(held).removesuffix(b"\n").removesuffix(b"\r")
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                what = f"byte 0x{raw[error.start]:02x}, byte {error.start + 1} of the row, is not UTF-8"
                problem = RowError("E106", what)
            if header is None:
                if problem:
                    raise problem.at(self._where(line))
                header = [name.strip() for name in cells]
                twice = next((n for n in header if header.count(n) > 1), None)
                if twice is not None:
                    raise self._refused("E206", f'the header names "{shown(twice)}" twice', "keep one", line)
                continue
            if not self._wanted():
                continue
            if problem is None and len(cells) != len(header):
                problem = RowError("E200", f"{len(cells)} cells where the header has {len(header)}")
            if problem:
                yield Row(line, raw, problem=problem)
            else:
                yield Row(line, raw, dict(zip(header, cells, strict=True)))

    def _parquet(self, handle: io.BufferedReader) -> Iterator[Row]:
        import pyarrow
        import pyarrow.parquet

        broken = (pyarrow.ArrowException, OSError, ValueError, KeyError)
        while block := handle.read(2**20):
            self._hash.update(block)
        handle.seek(0)
        try:
            table = pyarrow.parquet.ParquetFile(handle)
            groups = table.metadata.num_row_groups
        except broken as error:
            raise self._refused("E121", f"damaged Parquet: {shown(error, 160)}", "write the file again") from error
        number = 0
        for group in range(groups):
            try:
                for batch in table.iter_batches(batch_size=256, row_groups=[group]):
                    for value in batch.to_pylist():
                        number += 1
                        if self._wanted():
                            yield Row(number, b"", value)
            except broken as error:
                column = self._damaged_column(table, group, broken)
                what = f"damaged Parquet: row group {group}{column}: {shown(error, 160)}"
                raise self._refused("E121", what, "write the file again") from error

    @staticmethod
    def _damaged_column(table: Any, group: int, broken: tuple) -> str:
        for name in table.schema_arrow.names:
            try:
                table.read_row_group(group, columns=[name]).to_pylist()
            except broken:
                return f', column "{shown(name)}"'
        return ""


class _Unpacking(io.RawIOBase):
    """The bytes inside a packed file. Raises DataError where it is cut (E111) or holds far too many (E112)."""

    def __init__(self, handle: io.BufferedReader, rows: Rows, size: int):
        import pyarrow

        self._rows, self._size, self._read = rows, size, 0
        self._broken = (OSError, ValueError, pyarrow.ArrowException)
        own = open(os.dup(handle.fileno()), "rb")  # noqa: SIM115, the stream closes it
        own.seek(0)
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(own), rows.packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        kind = self._rows.packed
        try:
            block = self._stream.read(len(buffer)) if self._size else b""
        except self._broken as error:
            what = f"the {kind} file is cut or damaged after {self._read} unpacked bytes: {shown(error, 120)}"
            raise self._rows._refused("E111", what, "copy the file again") from error
        self._read += len(block)
        if self._read > max(FREE_BYTES, MAX_RATIO * self._size):
            what = f"{self._size} bytes of {kind} hold more than {self._read}; the cap is {MAX_RATIO} times the size"
            raise self._rows._refused("E112", what, "if this is meant, unpack the file and give that")
        buffer[: len(block)] = block
        return len(block)


class _Json:
    """A JSON reader that refuses what the standard one lets through: repeated keys, NaN, huge integers, depth."""

    def __init__(self):
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._integer
        )
        self._odd = False
        self._many = 0

    def value(self, text: str) -> Any:
        """The one value that `text` holds; raises RowError."""
        value, end = self.scan(text, _skip_space(text, 0))
        end = _skip_space(text, end)
        if end != len(text):
            raise RowError("E200", f"not JSON: text after the end of the row at column {end + 1}")
        return value

    def scan(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends; raises RowError."""
        self._odd, self._many = False, 0
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise RowError("E200", f"not JSON: {error.msg} at column {error.pos - start + 1}") from None
        except RecursionError:
            raise RowError("E115", f"nested deeper than {MAX_DEPTH} levels", "flatten the row") from None
        if self._many:
            raise RowError("E229", f"{self._many} keys in one object, the cap is {MAX_KEYS}", "split the row")
        if self._odd or text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH:
            self._refuse_odd(value, "", 1, text[start:end])
        return value, end

    def _object(self, items: list[tuple[str, Any]]) -> dict:
        value: dict = dict(items)
        self._odd |= len(value) != len(items)
        if len(items) > MAX_KEYS:
            self._many = len(items)
        if len(value) != len(items):
            value[_DUPLICATE] = next(k for i, (k, _) in enumerate(items) if k in {n for n, _ in items[:i]})
        return value

    def _constant(self, text: str) -> "_Odd":
        self._odd = True
        return _Odd(RowError("E205", f"{text} is not JSON", "use a number"))

    def _integer(self, digits: str) -> Any:
        if len(digits.lstrip("-")) > MAX_DIGITS:
            self._odd = True
            return _Odd(
                RowError("E116", f"an integer of {len(digits.lstrip('-'))} digits, the cap is {MAX_DIGITS}", "quote it")
            )
        return int(digits)

    def _refuse_odd(self, value: Any, field: str, depth: int, text: str) -> None:
        if isinstance(value, _Odd):
            problem = value.problem
            raise RowError(problem.code, problem.what, problem.next, field or None)
        if not isinstance(value, (dict, list)):
            return
        if depth > MAX_DEPTH:
            raise RowError("E115", f"nested deeper than {MAX_DEPTH} levels", "flatten the row")
        if isinstance(value, list):
            for index, item in enumerate(value):
                self._refuse_odd(item, f"{field}[{index}]", depth + 1, text)
            return
        if _DUPLICATE in value:
            key = value[_DUPLICATE]
            path = f"{field}.{shown(key)}" if field else shown(key)
            at = " and ".join(map(str, _key_offsets(text, key)[:2]))
            raise RowError("E206", f"the key stands twice (characters {at} of the row)", "keep one", path)
        for name, item in value.items():
            self._refuse_odd(item, f"{field}.{shown(name)}" if field else shown(name), depth + 1, text)


@dataclass(frozen=True, slots=True)
class _Odd:
    problem: RowError


_DUPLICATE = object()


def _key_offsets(text: str, key: str) -> list[int]:
    """Where the object that repeats `key` writes it, characters from 1."""
    seen: list[dict[str, int]] = []
    last: re.Match | None = None
    for token in _TOKEN.finditer(text):
        mark = token.group()
        if mark == "{" or mark == "[":
            seen.append({})
        elif mark in "]}" and seen:
            seen.pop()
        elif mark == ":" and last is not None and seen:
            try:
                name = json.loads(last.group())
            except ValueError:
                continue
            if name == key and name in seen[-1]:
                return [seen[-1][name], last.start() + 1]
            seen[-1][name] = last.start() + 1
        last = token if mark[0] == '"' else None
    return []


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _element_end(text: str, position: int) -> int:
    """Where the array element that begins at `position` ends, going by brackets alone."""
    depth = 0
    for token in _TOKEN.finditer(text, position):
        mark = token.group()
        if mark in "[{":
            depth += 1
        elif depth == 0 and mark in ",]":
            return token.start()
        elif mark in "]}":
            depth -= 1
    return len(text)


def as_json(value: Any) -> bytes:
    """A row that has no text of its own, as one line of JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError):
        return ascii(type(value).__name__).encode()


def raw_rows(path: str, lines: set[int], format: str | None = None) -> dict[int, str]:
    """Line -> the row as it stands there, for some rows of a file that was read before.

    Bytes that are no UTF-8 are lone surrogates in the text; a table's rows, which have no text, are JSON.
    """
    found = (row for row in Rows(path, format=format) if row.line in lines)
    return {row.line: (row.raw or as_json(row.value)).decode("utf-8", "surrogateescape") for row in found}


def _mark(state: os.stat_result) -> tuple[int, int, int, int]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
