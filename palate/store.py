"""The store of reference scores: a log-prob is computed once per (weights, precision, tokens) and found ever after.

One folder per identity holds immutable segments, each sorted by key and searched through a memory map, so that 20 M
rows open without being read. A segment is named by the hash of its tag and checksums; each of its blocks has a
checksum that is looked at before a value leaves it: what rots is refused. Other processes may write at any time.
"""

import contextlib
import hashlib
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from palate.errors import MachineError
from palate.files import Lock, make_folder, remove_file, save_tensors, write_json

BLOCK = 1024  # rows under one checksum
MAX_SEGMENTS = 64
AT_ONCE = 2**17  # rows that are looked at before mapped pages are given back
_COLUMNS = {"hi": np.uint64, "lo": np.uint64, "logp": np.float64, "length": np.int64}
_STALE_SECONDS = 86400


def cache_root() -> Path:
    """$PALATE_CACHE, else palate's folder in the user's cache. Not made here."""
    if given := os.environ.get("PALATE_CACHE"):
        return Path(given).expanduser()
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "palate"
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "palate"
        if os.name == "nt":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "palate" / "cache"
        return Path.home() / ".cache" / "palate"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"palate-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def reference_store(identity: str) -> "ScoreStore":
    """The user's store for one identity: weights, forward-relevant config and precision, as hex."""
    return ScoreStore(cache_root() / "reference" / identity)


def row_key(prompt: np.ndarray, completion: np.ndarray, spans: Sequence[tuple[int, int]]) -> bytes:
    """16 bytes that stand for a completion after its prompt with these scored spans, and for nothing else.

    prompt, completion: token ids, read as int32. spans: half-open ranges of the completion's tokens.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"palate row 1")
    for part in (np.asarray(prompt, "<i4"), np.asarray(completion, "<i4"), np.asarray(spans, "<i8")):
        digest.update(part.size.to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.digest()


class ScoreStore:
    """Log-probs and lengths of completions under one identity.

    folder: named by the identity; made at the first put. notes: what could not be read or stored, one line each;
    a store never ends a run, it finds less.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.notes: list[str] = []
        self._segments: dict[str, _Segment] = {}
        self._refused: set[str] = set()
        self._writable = True

    def __len__(self) -> int:
        """Rows on disk; a key stored under two tags counts twice."""
        self._refresh()
        return sum(segment.rows for segment in self._segments.values())

    def lookup(self, keys: np.ndarray, tag: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, set[str]]:
        """(found (n,) bool, logp (n,) float64 nats, length (n,) int64, numerics tags of what was found).

        keys: (n, 2) uint64. Values made under `tag` come first, those of other tags stand in where it has none; where
        nothing was found, logp is NaN and length 0.
        """
        keys = _as_keys(keys)
        self._refresh()
        found = np.zeros(len(keys), dtype=bool)
        logp, length = np.full(len(keys), np.nan), np.zeros(len(keys), dtype=np.int64)
        tags: set[str] = set()
        missing = np.argsort(keys[:, 0])  # neighbours lie on one page
        for segment in sorted(self._segments.values(), key=lambda s: (s.tag != tag, s.name)):
            at = segment.search(keys, missing)
            if not (here := at >= 0).any() or not self._sound(segment, at):
                continue
            for part in _parts(len(missing)):
                hits, rows = missing[part][here[part]], at[part][here[part]]
                found[hits], logp[hits], length[hits] = True, segment.logp[rows], segment.length[rows]
                segment.give_back()
            missing = missing[~here]
            tags.add(segment.tag)
        return found, logp, length, tags

    def put(self, keys: np.ndarray, logp: np.ndarray, length: np.ndarray, tag: str) -> int:
        """The number of rows that are new and now stored; 0 with a note where the folder cannot be written.

        Rows known under `tag` are left as they are; what is not finite is not kept.
        """
        keys, logp = _as_keys(keys), np.asarray(logp, np.float64).reshape(-1)
        length = np.asarray(length, np.int64).reshape(-1)
        if not len(keys) == len(logp) == len(length):
            raise ValueError(f"{len(keys)} keys, {len(logp)} log-probs and {len(length)} lengths")
        if not self._writable:
            return 0
        self._refresh()
        new = np.isfinite(logp)
        for segment in [segment for segment in self._segments.values() if segment.tag == tag]:
            at = segment.search(keys, np.arange(len(keys)))
            if self._sound(segment, at):
                new &= at < 0
        rows = _sorted_rows(keys[new], logp[new], length[new])
        if not len(rows["hi"]):
            return 0
        try:
            make_folder(self.folder)
            self._publish(rows, tag)
            if len(self._segments) > MAX_SEGMENTS:
                self._compact()
            self._write_manifest()
        except (MachineError, OSError) as error:
            self._writable = False
            self._note(f"scores are not stored from here on: {error}")
            return 0
        return len(rows["hi"])

    def _refresh(self) -> None:
        """Opens what other processes have published, forgets what they have merged."""
        for _ in range(10):
            try:
                names = {name for name in os.listdir(self.folder) if _is_segment(name)}
            except FileNotFoundError:
                names = set()
            except OSError as error:
                self._note(f"{self.folder} cannot be read: {error.strerror}")
                names = set()
            self._segments = {name: segment for name, segment in self._segments.items() if name in names}
            vanished = False
            for name in sorted(names - self._segments.keys() - self._refused):
                try:
                    self._segments[name] = _Segment.open(self.folder / name)
                except FileNotFoundError:
                    vanished = True
                except (ValueError, OSError) as error:
                    self._refuse(name, str(error))
            if not vanished:
                return

    def _sound(self, segment: "_Segment", at: np.ndarray) -> bool:
        """Whether the blocks of these rows are what was written; a segment with one that is not is refused whole."""
        try:
            segment.check(at)
        except ValueError as error:
            self._refuse(segment.name, str(error))
            del self._segments[segment.name]
            return False
        return True

    def _refuse(self, name: str, why: str) -> None:
        self._refused.add(name)
        self._note(f"{self.folder / name} is damaged and not used ({why}) [E501]; remove it")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _publish(self, rows: dict[str, np.ndarray], tag: str) -> None:
        name, tensors, metadata = _encode(rows, tag, self.folder.name)
        path = self.folder / name
        if name in self._refused:  # rotten, and its own content has come again
            self._refused.discard(name)
        elif path.exists():
            return
        save_tensors(path, tensors, metadata)
        self._segments[name] = _Segment.open(path)

    def _write_manifest(self) -> None:
        """What lies here, for people; segments speak for themselves, so a lost or old manifest costs nothing."""
        listed = {name: {"rows": segment.rows, "tag": segment.tag} for name, segment in sorted(self._segments.items())}
        write_json(self.folder / "manifest.json", {"format": 1, "identity": self.folder.name, "segments": listed})

    def _compact(self) -> None:
        """Merges the small segments of each tag; big ones stay, so that a row is rewritten only log(n) times.

        Readers keep what they have mapped, and look again where a name is gone. One process merges at a time.
        """
        try:
            lock = Lock(self.folder / ".compact.lock")
        except MachineError:
            return
        with lock:
            self._refresh()
            for tag in sorted({segment.tag for segment in self._segments.values()}):
                ranked = sorted((s for s in self._segments.values() if s.tag == tag), key=lambda s: (s.rows, s.name))
                merged, total = [], 0
                for segment in ranked:
                    if merged and segment.rows > max(2 * total, BLOCK):
                        break
                    merged.append(segment)
                    total += segment.rows
                merged = [segment for segment in merged if self._sound(segment, np.arange(segment.rows))]
                if len(merged) < 2:
                    continue
                keys = np.concatenate([np.stack([s.hi, s.lo], axis=1) for s in merged])
                logp, length = (np.concatenate([getattr(s, column) for s in merged]) for column in ("logp", "length"))
                self._publish(_sorted_rows(keys, logp, length), tag)
                for segment in merged:
                    self._segments.pop(segment.name)
                    remove_file(self.folder / segment.name)
            self._sweep()

    def _sweep(self) -> None:
        """Removes what writers that were killed left behind a day ago."""
        for path in self.folder.glob(".seg-*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    remove_file(path)


@dataclass(eq=False)
class _Segment:
    """One file, mapped: columns sorted by (hi, lo), a checksum per BLOCK rows."""

    name: str
    tag: str
    hi: np.ndarray
    lo: np.ndarray
    logp: np.ndarray
    length: np.ndarray
    checks: np.ndarray
    checked: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.hi)

    @classmethod
    def open(cls, path: Path) -> "_Segment":
        """Maps the file. ValueError where header, size, tag or checksums are not those that its name stands for."""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = int.from_bytes(file.read(8), "little")
            if not 0 < start < min(size, 1 << 20):
                raise ValueError("no header")
            header = json.loads(file.read(start))  # ValueError where it is none
        try:
            metadata = header.pop("__metadata__")
            rows = int(metadata["count"])
            arrays = {}
            for column, dtype in (*_COLUMNS.items(), ("check", np.uint64)):
                shape = (-(-rows // BLOCK) if column == "check" else rows,)
                begin, end = header[column]["data_offsets"]
                if end - begin != 8 * shape[0] or begin < 0 or 8 + start + end > size:
                    raise ValueError(f"column {column} has another size")
                arrays[column] = np.memmap(path, dtype, "r", 8 + start + begin, shape)
            if _name(metadata, arrays["check"]) != path.name:
                raise ValueError("its name stands for other content")
            if metadata["identity"] != path.parent.name:
                raise ValueError("it belongs to other weights")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"header: {error}") from None
        checks = np.array(arrays.pop("check"))
        return cls(path.name, metadata["tag"], **arrays, checks=checks, checked=np.zeros(len(checks), dtype=bool))

    def search(self, keys: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """(n,) int64: the row of each key that is asked for by its number, -1 where it is not here."""
        found = np.empty(len(asked), np.int64)
        for part in _parts(len(asked)):
            found[part] = self._search(keys[asked[part], 0], keys[asked[part], 1])
            self.give_back()
        return found

    def _search(self, hi: np.ndarray, lo: np.ndarray) -> np.ndarray:
        at = np.searchsorted(self.hi, hi)
        while len(todo := self._before(at, hi, lo)):  # rows that share the first half
            at[todo] += 1
        at = np.minimum(at, self.rows - 1)
        return np.where((self.hi[at] == hi) & (self.lo[at] == lo), at, -1)

    def _before(self, at: np.ndarray, hi: np.ndarray, lo: np.ndarray) -> np.ndarray:
        here = np.flatnonzero(at < self.rows)
        return here[(self.hi[at[here]] == hi[here]) & (self.lo[at[here]] < lo[here])]

    def give_back(self) -> None:
        """Mapped pages go back to the system, which reads them again when they are asked for."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for column in _COLUMNS:
                getattr(self, column)._mmap.madvise(mmap.MADV_DONTNEED)

    def check(self, at: np.ndarray) -> None:
        """ValueError where the block of one of these rows is not what was written. at: (n,); -1 is no row."""
        asked = np.zeros(len(self.checks), dtype=bool)
        for part in _parts(len(at)):
            asked[at[part][at[part] >= 0] // BLOCK] = True
        for number, block in enumerate(np.flatnonzero(asked & ~self.checked).tolist()):
            if number % (AT_ONCE // BLOCK) == 0:
                self.give_back()
            if _checksum({column: getattr(self, column) for column in _COLUMNS}, block) != int(self.checks[block]):
                raise ValueError(f"rows from {block * BLOCK} on were changed")
            self.checked[block] = True


def _parts(count: int) -> Iterator[slice]:
    """`count` rows, AT_ONCE at a time."""
    return (slice(start, start + AT_ONCE) for start in range(0, count, AT_ONCE))


def _encode(rows: dict[str, np.ndarray], tag: str, identity: str) -> tuple[str, dict[str, np.ndarray], dict[str, str]]:
    """A segment's name, tensors and metadata."""
    count = len(rows["hi"])
    checks = np.array([_checksum(rows, block) for block in range(-(-count // BLOCK))], dtype=np.uint64)
    metadata = {"tag": tag, "identity": identity, "count": str(count)}
    return _name(metadata, checks), rows | {"check": checks}, metadata


def _name(metadata: dict[str, str], checks: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16, person=b"palate segment 1")
    digest.update(json.dumps([metadata["tag"], metadata["identity"], metadata["count"]]).encode())
    digest.update(np.ascontiguousarray(checks).tobytes())
    return f"seg-{digest.hexdigest()}.safetensors"


def _is_segment(name: str) -> bool:
    return name.startswith("seg-") and name.endswith(".safetensors")


def _checksum(columns: dict[str, np.ndarray], block: int) -> int:
    digest = hashlib.blake2b(digest_size=8, person=b"palate block 1")
    for column in _COLUMNS:
        digest.update(np.ascontiguousarray(columns[column][block * BLOCK : (block + 1) * BLOCK]).tobytes())
    return int.from_bytes(digest.digest(), "little")


def _sorted_rows(keys: np.ndarray, logp: np.ndarray, length: np.ndarray) -> dict[str, np.ndarray]:
    """Columns in the order of their keys, the first of equal keys alone."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable
    keys = keys[order]
    first = np.ones(len(keys), dtype=bool)
    first[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    order = order[first]
    return {"hi": keys[first, 0], "lo": keys[first, 1], "logp": logp[order], "length": length[order]}


def _as_keys(keys: np.ndarray) -> np.ndarray:
    keys = np.asarray(keys)
    if keys.ndim != 2 or keys.shape[1] != 2 or keys.dtype != np.uint64:
        raise ValueError(f"keys are (n, 2) uint64, not {keys.shape} {keys.dtype}")
    return keys
