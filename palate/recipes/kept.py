"""Tokens of large data files, made once: found again by the content of all that they are made of.

A folder of the user's cache stands for a file's content and how it is read. In it lie what reading it had to say, which
is all that another run needs to know of the text, and beside that the tokens of each tokenizer, template and limit.
What lies there is verified whenever it is opened; what is damaged is made again.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from palate.errors import CheckpointError, MachineError, PalateError, UsageError
from palate.recipes.verbs import Say

KEPT_BYTES = 2**20  # of a file; smaller ones are tokenised within a second or so
UNUSED_SECONDS = 30 * 86400  # until what nobody asked for is removed


def read_kept(read: Callable, data: str, say: Say):
    """The records of `read(data)`. Those of a large file are not held, and not read where they were read before.

    Their `folder` is where what is made of them is kept; None where nothing is. Raises what `read` raises.
    """
    place, digest = _place(read, data)
    if place is None:
        return read(data)
    facts = _found(place / "reading", say)
    if facts is not None:
        return replace(_known(read, data, facts["reading"]), folder=place)
    records = read(data, hold=False)
    if records.sources[0]["sha256"] != digest:  # it changed in between: what was read is good, and not what was named
        return records
    _sealed(place / "reading", {"reading": _story(records)}, say)
    return replace(records, folder=place)


@dataclass(frozen=True)
class Recipe:
    """How records become groups: all that decides their tokens besides the text. Functions are known by their names."""

    tokenizer: Any
    limit: int
    usable: Callable
    pieces: Callable | None

    def key(self) -> str | None:
        """32 hex digits that stand for it; None where something has no name, as a tokenizer in Python."""
        from palate.data.encoding import encoder_of

        names = [f"{made.__module__}.{made.__qualname__}" for made in (self.usable, self.pieces) if made is not None]
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or "<" in "".join(names):
            return None
        try:
            vocabulary = backend.to_str()
        except Exception:  # a part of it is written in Python
            return None
        encoder = encoder_of(self.tokenizer)
        special = [encoder.bos, encoder.eos, encoder.prefix, encoder.control, self.tokenizer.unk_token]
        template = self.tokenizer.chat_template
        return _digest([type(self.tokenizer).__name__, vocabulary, special, template, self.limit, names])


def tokens_kept(records, recipe: Recipe, make: Callable[[], tuple[Iterator, dict]], say: Say):
    """(table, facts) of the records' groups, found or made and kept; None where they cannot be kept.

    make: begins anew and gives (group, mark) one by one, and facts that are whole when these have ended.
    """
    from palate.data.table import TableWriter, TokenTable
    from palate.files import new_folder

    key = None if records.folder is None else recipe.key()
    if key is None:
        return None
    place = records.folder / f"tokens-{key}"
    _sweep(records.folder, ".*.tmp", 86400)  # what killed processes left
    for last in (False, True):  # another process may have made it meanwhile
        facts = _found(place, say)
        if facts is not None:
            return TokenTable.open(place / TABLE), facts["tokens"]
        if last:
            return None
        rows, facts = make()
        content: dict[str, Any] = {}
        try:
            with new_folder(place, content) as folder:
                with TableWriter(folder / TABLE) as writer:
                    for group, mark in rows:
                        writer.append(group, mark)
                content["tokens"] = facts
        except (MachineError, UsageError, OSError) as error:
            if not place.is_dir():
                say(f"data: tokens are not kept: {error}")
                return None
    return None


TABLE = "tokens.arrow"


def refuse_shared(records, other, say: Say) -> None:
    """Raises DataError (E231) where a row of one stands in the other too; files that were compared are not again."""
    from palate.data.sources import refuse_shared_rows

    place = None if records.folder is None else records.folder / f"apart-{_digest(other.sources)}"
    if place is None or _found(place, say) is None:
        refuse_shared_rows(records, other)
        if place is not None:
            _sealed(place, {}, say)


# --- what lies there --------------------------------------------------------------------------------------------------


def _place(read: Callable, data: str) -> tuple[Path | None, str]:
    """The folder of a file's content and how it is read, and its SHA-256; None where nothing of it is kept."""
    from palate.data.sources import open_data
    from palate.files import sha256_file
    from palate.store import cache_root

    if not isinstance(read, partial) or read.args or read.func.__module__ != "palate.data.sources":
        return None, ""  # a verb that wants the records themselves
    opened = open_data(data, read.keywords.get("format"))
    if len(opened) > 1 or opened[0].format in ("memory", "hub"):
        return None, ""
    file = opened[0]
    try:
        if os.path.getsize(file.file) < KEPT_BYTES:
            return None, ""
        digest = sha256_file(file.file)
    except OSError:
        return None, ""  # reading says why
    how = [read.func.__name__, dict(read.keywords), file.path, file.format, file.first, file.stop]
    return cache_root() / "data" / _digest([_code(), how, digest]), digest


@cache
def _code() -> str:
    """Stands for the code that reads and tokenises: palate's, and the tokenizers'."""
    from importlib.metadata import version

    root = Path(__file__).parents[1]
    files = [*sorted((root / "data").glob("*.py")), root / "recipes" / "rows.py", root / "store.py"]
    sources = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return _digest([sources, [version(name) for name in ("transformers", "tokenizers", "pyarrow")]])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _found(folder: Path, say: Say) -> dict[str, Any] | None:
    """What a sealed folder says; None where it is not there, or was damaged, which is said, and is gone now."""
    from palate.files import remove_tree, verify_folder

    if not folder.is_dir():
        return None
    try:
        facts = verify_folder(folder)
    except CheckpointError as error:
        if error.code == "E311":  # of a later palate
            return None
        say(f"data: {error.where} {error.what}: it is made again")
        with contextlib.suppress(OSError, PalateError):
            remove_tree(folder)
        return None
    except (MachineError, OSError):
        return None
    with contextlib.suppress(OSError):
        os.utime(folder.parent)
    return facts


def _sealed(folder: Path, facts: dict[str, Any], say: Say) -> None:
    from palate.files import new_folder

    try:
        with new_folder(folder, facts):
            pass
    except (MachineError, UsageError, OSError) as error:
        if not folder.is_dir():
            say(f"data: {error}")
        return
    _sweep(folder.parent.parent, "*", UNUSED_SECONDS)


def _sweep(root: Path, pattern: str, seconds: int) -> None:
    """Removes folders that nobody has touched for so long."""
    from palate.files import remove_tree

    for folder in root.glob(pattern):
        with contextlib.suppress(OSError, PalateError):
            if time.time() - folder.stat().st_mtime > seconds:
                remove_tree(folder)


def _story(records) -> dict[str, Any]:
    """What reading had to say, as JSON has it."""
    return {
        "count": len(records),
        "sources": records.sources,
        "dropped": records.dropped,
        "rejected": [[[place.file, place.line], *rest] for place, *rest in records.rejected],
        "notes": records.notes,
        "warnings": [
            [w.code, w.what, w.count, [[[place.file, place.line] for place in case] for case in w.rows]]
            for w in records.warnings
        ],
    }


def _known(read: Callable, data: str, story: dict[str, Any]):
    """The records that this was said of; who iterates over them reads the file again."""
    from palate.data.records import Records, Reread, Source, Warned

    warnings = [
        Warned(code, what, count, tuple(tuple(Source(*place) for place in case) for case in cases))
        for code, what, count, cases in story["warnings"]
    ]
    rejected = [(Source(*place), *rest) for place, *rest in story["rejected"]]
    known = Records(
        Reread(story["count"], list), story["sources"], story["dropped"], rejected, story["notes"], warnings
    )
    return read(data, known=known)
