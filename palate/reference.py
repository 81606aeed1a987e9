"""The reference column: every completion's log-prob under the reference, scored once, then read.

Values are found by content (weights, forward-relevant config, precision, token ids and spans), never by place or name,
so any beta, loss, rate, seed, slice or order shares them. A pass writes its plan before it starts and follows it when
resumed, so that it ends in the same bits.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import nn

from palate.data.batch import collate, scored_length, stream_length
from palate.data.stream import pack
from palate.data.tokens import TokenGroup
from palate.errors import CheckpointError
from palate.files import load_tensors, read_json, save_tensors, tensor_metadata, write_json
from palate.model.adapters import is_adapted, reference_mode
from palate.model.fingerprint import base_fingerprint
from palate.scoring import Numerics, Precision, evaluation_mode, logps
from palate.store import ScoreStore, row_key

MICRO_BATCHES_PER_PART = 16  # a part is what a kill can cost


@dataclass(frozen=True)
class ReferenceColumn:
    """Reference log-probs of some groups, and where they came from.

    totals: per group one sum per completion, nats, float64. scored, reused: distinct completions computed or found.
    tags: the numerics that the values were made under; where they are not the policy's own, margins at the start are
    tiny instead of zero. identity: of weights, forward-relevant config and precision. keys: (completions, 2) uint64,
    of the groups' contents in order.
    """

    totals: tuple[tuple[float, ...], ...]
    scored: int
    reused: int
    tags: tuple[str, ...]
    identity: str
    keys: np.ndarray = field(compare=False, repr=False)

    def write(self, path: Path) -> None:
        """Pins the column in a file, under its groups' content keys."""
        facts = {"scored": self.scored, "reused": self.reused, "tags": list(self.tags), "identity": self.identity}
        values = np.array([value for group in self.totals for value in group], dtype=np.float64)
        _save(path, {"keys": self.keys, "logps": values}, facts)

    @classmethod
    def read(cls, path: Path, groups: Sequence[TokenGroup]) -> "ReferenceColumn | None":
        """The pinned column; None where there is none. Raises CheckpointError where it belongs to other rows."""
        if not path.exists():
            return None
        tensors, facts = _load(path)
        keys = _keys(groups)
        if not np.array_equal(tensors["keys"], keys):
            raise CheckpointError(
                "the pinned reference column belongs to other rows or another tokenizer",
                where=str(path),
                code="E502",
                next="resume with the same data and model, or take a new --out",
            )
        values = iter(tensors["logps"].tolist())
        totals = tuple(tuple(next(values) for _ in group.completions) for group in groups)
        return cls(totals, facts["scored"], facts["reused"], tuple(facts["tags"]), facts["identity"], keys)


def annotate(
    groups: Sequence[TokenGroup],
    reference: nn.Module,
    *,
    numerics: Numerics | None = None,
    tokens: int = 2048,
    store: ScoreStore | None = None,
) -> list[TokenGroup]:
    """The groups with their `reference` filled in. A LoRA model scores with its adapters off."""
    column = reference_column(groups, reference, numerics=numerics, tokens=tokens, store=store)
    return with_reference(groups, column)


def with_reference(groups: Sequence[TokenGroup], column: ReferenceColumn) -> list[TokenGroup]:
    """The groups with a column's values filled in."""
    return [replace(group, reference=totals) for group, totals in zip(groups, column.totals, strict=True)]


def reference_identity(reference: nn.Module, precision: Precision) -> str:
    """What decides staleness, and nothing else does: weights, forward-relevant config, precision; 32 hex digits."""
    return hashlib.sha256(f"{base_fingerprint(reference)} {precision}".encode()).hexdigest()[:32]


def reference_column(
    groups: Sequence[TokenGroup],
    reference: nn.Module,
    *,
    numerics: Numerics | None = None,
    tokens: int = 2048,
    store: ScoreStore | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ReferenceColumn:
    """Scores every distinct completion that neither `store` nor an earlier part of this pass knows.

    tokens: stream tokens per micro-batch. folder: where the plan and the finished parts lie until the caller has
    pinned the column. progress: called with (completions done, completions to score).
    Raises CheckpointError where `folder` holds the plan of another pass.
    """
    numerics = numerics or Numerics.of(reference, tokens=tokens)
    identity, tag = reference_identity(reference, numerics.precision), numerics.tag(reference)
    index, rows, columns = _distinct(groups)
    keys = np.frombuffer(b"".join(index), dtype=np.uint64).reshape(-1, 2)
    facts = {"identity": identity, "tag": tag, "tokens": tokens, "keys": hashlib.sha256(keys.tobytes()).hexdigest()}
    plan = _plan(groups, rows, keys, facts, store, folder)
    values = np.full(len(rows), np.nan)
    values[plan["found"]] = plan["logps"]
    todo, done = sum(len(micro) for part in plan["parts"] for micro in part), 0
    for number, part in enumerate(plan["parts"]):
        wanted = [row for micro in part for row in micro]
        path = None if folder is None else folder / f"part-{number:05d}.safetensors"
        if path is not None and path.exists():
            values[wanted] = _load(path)[0]["logps"]
        else:
            values[wanted] = _score(groups, rows, part, reference, numerics)
            if path is not None:
                _save(path, {"logps": values[wanted]}, {"part": number})
        if store is not None:
            lengths = np.array([scored_length(groups[g], k) for g, k in (rows[row] for row in wanted)], dtype=np.int64)
            store.put(keys[wanted], values[wanted], lengths, tag)
        done += len(wanted)
        if progress is not None:
            progress(done, todo)
    totals = tuple(tuple(float(values[row]) for row in group_rows) for group_rows in columns)
    tags = tuple(sorted({*plan["tags"], *([tag] if todo else [])}))
    every = keys[[row for group_rows in columns for row in group_rows]]
    return ReferenceColumn(totals, todo, len(rows) - todo, tags, identity, every)


def _save(path: Path, arrays: dict[str, np.ndarray], facts: dict) -> None:
    """A file that knows its own content: safetensors has no checksum."""
    save_tensors(path, arrays, {"facts": json.dumps(facts), "sha256": _digest(arrays, json.dumps(facts))})


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    arrays, metadata = load_tensors(path, framework="np"), tensor_metadata(path)
    facts = metadata.get("facts", "")
    if metadata.get("sha256") != _digest(arrays, facts):
        raise CheckpointError(
            "reference scores do not match their checksum",
            where=str(path),
            code="E501",
            next="take a new --out; scores that are in the store are not made again",
        )
    return arrays, json.loads(facts)


def _digest(arrays: dict[str, np.ndarray], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def content_digest(groups: Sequence[TokenGroup]) -> str:
    """SHA-256 of every token id and span of the groups, in order; another tokenizer, template or row changes it."""
    return hashlib.sha256(_keys(groups).tobytes()).hexdigest()


def _keys(groups: Sequence[TokenGroup]) -> np.ndarray:
    """(completions, 2) uint64 content keys, in order, repeats included."""
    keys = [row_key(g.prompt, ids, spans) for g in groups for ids, spans in zip(g.completions, g.spans, strict=True)]
    return np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2)


def _distinct(groups: Sequence[TokenGroup]) -> tuple[list[bytes], list[tuple[int, int]], list[list[int]]]:
    """Distinct keys; for each the (group, completion) where it stands first; and per group its completions' numbers."""
    numbers: dict[bytes, int] = {}
    rows, columns = [], []
    for g, group in enumerate(groups):
        columns.append([])
        for k, ids in enumerate(group.completions):
            key = row_key(group.prompt, ids, group.spans[k])
            if key not in numbers:
                numbers[key] = len(numbers)
                rows.append((g, k))
            columns[-1].append(numbers[key])
    return list(numbers), rows, columns


def _plan(groups, rows, keys, facts: dict, store: ScoreStore | None, folder: Path | None) -> dict:
    """What is known already, and the micro-batches that score the rest; written before anything is scored."""
    path = None if folder is None else folder / "plan.json"
    if path is not None and path.exists():
        plan = read_json(path)
        if differing := [name for name, value in facts.items() if plan.get(name) != value]:
            raise CheckpointError(
                f"a reference pass with other {', '.join(differing)} was begun here",
                where=str(folder),
                code="E502",
                next="resume on the same machine with the same data and settings, or take a new --out",
            )
        return plan
    found, known, tags = np.zeros(len(rows), dtype=bool), np.zeros(len(rows)), set()
    if store is not None and len(rows):
        found, known, _, tags = store.lookup(keys, facts["tag"])
    missing = [row for row in range(len(rows)) if not found[row]]
    parts = [list(part) for _, part in groupby(missing, key=lambda row: rows[row][0])]
    cut = pack([stream_length(_only(groups, rows, part)) for part in parts], facts["tokens"])
    micro = [[row for i in indices for row in parts[i]] for indices in cut]
    plan = facts | {
        "found": np.flatnonzero(found).tolist(),
        "logps": [float(value) for value in known[found]],
        "tags": sorted(tags),
        "parts": [micro[i : i + MICRO_BATCHES_PER_PART] for i in range(0, len(micro), MICRO_BATCHES_PER_PART)],
    }
    if path is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, plan)
    return plan


def _score(groups, rows, part: list[list[int]], reference: nn.Module, numerics: Numerics) -> np.ndarray:
    values = []
    adapters_off = reference_mode(reference) if is_adapted(reference) else nullcontext()
    with torch.no_grad(), evaluation_mode(reference), adapters_off:
        for micro in part:
            batch = collate([_only(groups, rows, same) for same in _by_group(micro, rows)])
            values.append(logps(reference, batch.to(reference.device), numerics=numerics).total.cpu().numpy())
    return np.concatenate(values)


def _by_group(micro: list[int], rows: list[tuple[int, int]]) -> Iterator[list[int]]:
    return (list(same) for _, same in groupby(micro, key=lambda row: rows[row][0]))


def _only(groups, rows, wanted: list[int]) -> TokenGroup:
    """The group with just these of its completions: a branch's numbers do not depend on its neighbours."""
    group, picked = groups[rows[wanted[0]][0]], [rows[row][1] for row in wanted]
    return replace(
        group,
        completions=tuple(group.completions[k] for k in picked),
        spans=tuple(group.spans[k] for k in picked),
        preferences=(),
        reference=None,
    )
