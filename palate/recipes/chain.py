"""The chain of rounds: a finished round names by SHA-256 what it made, and the round that it went on from."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palate.errors import CheckpointError
from palate.files import read_json, sha256_file, write_json

MANIFEST, TABLE = "manifest.json", "rounds.json"
# what a round makes that is the same however often it was killed; the rest has times in it, or what was in a store
MADE = ("written", "asked.json", "asked.jsonl", "samples", "judged", "checked", "pairs.jsonl", "held.jsonl",
        "pairs.json", "model", "before", "after", "compare")  # fmt: skip


def folder_of(out: Path, number: int) -> Path:
    """The run folder of a round, from 1."""
    return out / "rounds" / f"{number:02d}"


def seal(out: Path, number: int, identity: str, row: dict[str, Any]) -> None:
    """Ends a round: writes its manifest, the last of its files. identity: of the model before round 1."""
    folder, parent = folder_of(out, number), parent_of(out, number, identity)
    row = {"round": number, "parent": parent} | row
    write_json(folder / MANIFEST, {"round": number, "parent": parent, "row": row, "files": _hashes(folder)})


def parent_of(out: Path, number: int, identity: str) -> str:
    """What a round goes on from: SHA-256 of the manifest before it, and for round 1 the start's identity."""
    return identity if number == 1 else sha256_file(folder_of(out, number - 1) / MANIFEST)


def row_of(out: Path, number: int) -> dict[str, Any]:
    """The row of a finished round, from its manifest."""
    return read_json(folder_of(out, number) / MANIFEST)["row"]


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows of the table of all finished rounds."""
    found = []
    while (folder_of(out, len(found) + 1) / MANIFEST).exists():
        found.append(row_of(out, len(found) + 1))
    return found


def write_table(out: Path, later: Mapping[int, dict[str, Any]] | None = None, **facts: Any) -> dict[str, Any]:
    """Replaces rounds.json: a row a finished round, the manifests' SHA-256, and what else is known.

    later: by round, the columns that were not known when it was sealed.
    """
    found = [row | (later or {}).get(row["round"], {}) for row in rows(out)]
    seals = [sha256_file(folder_of(out, row["round"]) / MANIFEST) for row in found]
    table = facts | {"rounds": found, "manifests": seals}
    write_json(out / TABLE, table)
    return table


def verify(out: Path) -> None:
    """Nothing, where every finished round is what its manifest says and goes on from the one before.

    Raises CheckpointError: E501 naming a file that is missing or was changed, E502 where a link is broken.
    """
    known = read_json(out / TABLE).get("manifests", []) if (out / TABLE).is_file() else []
    before = None
    for number in range(1, max(len(known), len(rows(out))) + 1):
        folder = folder_of(out, number)
        if not (folder / MANIFEST).is_file():
            raise _changed(folder / MANIFEST, "is missing")
        digest = sha256_file(folder / MANIFEST)
        if number <= len(known) and digest != known[number - 1]:
            raise _changed(folder / MANIFEST, f"was changed: {TABLE} knows another SHA-256")
        manifest = read_json(folder / MANIFEST)
        if before is not None and manifest.get("parent") != before:
            what = f"goes on from another round {number - 1} than the one that is here"
            hint = "put the rounds back as they were, or take a new --out"
            raise CheckpointError(what, where=str(folder / MANIFEST), code="E502", next=hint)
        there, said = _hashes(folder), manifest.get("files", {})
        for name in {**said, **there}:
            if there.get(name) != said.get(name):
                what = "is missing" if name not in there else "was changed" if name in said else "is not of this round"
                raise _changed(folder / name, what)
        before = digest


def _hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file that a round makes."""
    found = {}
    for name in MADE:
        path = folder / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and not (file.name.startswith(".") and file.name.endswith(".tmp")):
                found[file.relative_to(folder).as_posix()] = sha256_file(file)
    return found


def digest_of(folder: Path) -> str:
    """SHA-256 over the chunk files of a folder, 64 hex digits."""
    joined = " ".join(f"{file.name} {sha256_file(file)}" for file in sorted(folder.glob("*.jsonl")))
    return hashlib.sha256(joined.encode()).hexdigest()


def _changed(file: Path, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(file), code="E501", next="put a copy of the file back, or take a new --out")
