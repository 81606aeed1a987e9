"""The reference column: every completion's log-prob under the reference, scored once, then read.

Values are found by content (weights, forward-relevant config, precision, token ids and spans), never by place or name,
so any beta, loss, rate, seed, slice or order shares them. A pass writes its plan before it starts and follows it when
resumed, so that it ends in the same bits.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from palate.data.batch import collate, scored_length
from palate.data.stream import cuts
from palate.data.table import Lengths, TokenTable, distinct, row_keys
from palate.data.tokens import TokenGroup
from palate.errors import CheckpointError
from palate.files import load_tensors, read_json, save_tensors, tensor_metadata
from palate.layout import MICRO_BATCH_TOKENS
from palate.model.adapters import is_adapted, reference_mode
from palate.model.fingerprint import base_fingerprint
from palate.scoring import Numerics, Precision, evaluation_mode, logps
from palate.store import ScoreStore

MICRO_BATCHES_PER_PART = 16  # a part is what a kill can cost


@dataclass(frozen=True, eq=False)
class ReferenceColumn:
    """Reference log-probs of some groups, and where they came from.

    values: (C,) float64, nats, of every completion of every group, in order. first: (G + 1,) int64, where each group's
    begin in it. scored, reused: distinct completions computed or found.
    tags: the numerics that the values were made under; where they are not the policy's own, margins at the start are
    tiny instead of zero. identity: of weights, forward-relevant config and precision. keys: (C, 2) uint64, of content.
    """

    values: np.ndarray
    first: np.ndarray
    scored: int
    reused: int
    tags: tuple[str, ...]
    identity: str
    keys: np.ndarray

    @property
    def totals(self) -> tuple[tuple[float, ...], ...]:
        """The values group by group; made on each call."""
        return tuple(tuple(self.values[a:b].tolist()) for a, b in pairwise(self.first))

    def write(self, path: Path) -> None:
        """Pins the column in a file, under its groups' content keys."""
        facts = {"scored": self.scored, "reused": self.reused, "tags": list(self.tags), "identity": self.identity}
        _save(path, {"keys": self.keys, "logps": self.values}, facts)

    @classmethod
    def read(cls, path: Path, groups: Sequence[TokenGroup], keys: np.ndarray | None = None) -> "ReferenceColumn | None":
        """The pinned column; None where there is none. Raises CheckpointError where it belongs to other rows.

        keys: of `row_keys(groups)`, where they are known.
        """
        if not path.exists():
            return None
        tensors, facts = _load(path)
        keys = row_keys(groups) if keys is None else keys
        if not np.array_equal(tensors["keys"], keys):
            raise CheckpointError(
                "the pinned reference column belongs to other rows or another tokenizer",
                where=str(path),
                code="E502",
                next="resume with the same data and model, or take a new --out",
            )
        first, tags = Lengths.of(groups).first, tuple(facts["tags"])
        return cls(tensors["logps"], first, facts["scored"], facts["reused"], tags, facts["identity"], keys)


def annotate(
    groups: Sequence[TokenGroup],
    reference: nn.Module,
    *,
    numerics: Numerics | None = None,
    tokens: int = MICRO_BATCH_TOKENS,
    store: ScoreStore | None = None,
) -> Sequence[TokenGroup]:
    """The groups with their `reference` filled in. A LoRA model scores with its adapters off."""
    column = reference_column(groups, reference, numerics=numerics, tokens=tokens, store=store)
    return with_reference(groups, column)


def with_reference(groups: Sequence[TokenGroup], column: ReferenceColumn) -> Sequence[TokenGroup]:
    """The groups with a column's values filled in: a list, or where they are a table the annotated table."""
    if isinstance(groups, TokenTable):
        return groups.with_reference(column.values)
    return [replace(group, reference=totals) for group, totals in zip(groups, column.totals, strict=True)]


def reference_identity(reference: nn.Module, precision: Precision) -> str:
    """What decides staleness, and nothing else does: weights, forward-relevant config, precision; 32 hex digits."""
    return hashlib.sha256(f"{base_fingerprint(reference)} {precision}".encode()).hexdigest()[:32]


def reference_column(
    groups: Sequence[TokenGroup],
    reference: nn.Module,
    *,
    numerics: Numerics | None = None,
    tokens: int = MICRO_BATCH_TOKENS,
    store: ScoreStore | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    keys: np.ndarray | None = None,
) -> ReferenceColumn:
    """Scores every distinct completion that neither `store` nor an earlier part of this pass knows.

    tokens: stream tokens per micro-batch. folder: where the plan and the finished parts lie until the caller has
    pinned the column. progress: called with (completions done, completions to score). keys: of `row_keys(groups)`,
    where they are known. Raises CheckpointError where `folder` holds the plan of another pass.
    """
    numerics = numerics or Numerics.of(reference, tokens=tokens)
    identity, tag = reference_identity(reference, numerics.precision), numerics.tag(reference)
    keys, lengths = row_keys(groups) if keys is None else keys, Lengths.of(groups)
    places, number = distinct(keys)
    own = keys if len(places) == len(keys) else keys[places]
    facts = {"identity": identity, "tag": tag, "tokens": tokens, "keys": content_digest(own)}
    plan = _plan(lengths, places, own, facts, store, folder)
    values = np.full(len(places), np.nan)
    values[plan.found] = plan.logps
    missing = np.flatnonzero(plan.missing(len(places)))
    for part, start in enumerate(range(0, len(plan.cuts) - 1, plan.per_part)):
        cut = plan.cuts[start : start + plan.per_part + 1]
        wanted = missing[cut[0] : cut[-1]]
        path = None if folder is None else folder / f"part-{part:05d}.safetensors"
        micros = [lengths.within(places[missing[a:b]]) for a, b in pairwise(cut)]
        if path is not None and path.exists():
            values[wanted] = _load(path)[0]["logps"]
        else:
            values[wanted] = _score(groups, micros, reference, numerics)
            if path is not None:
                _save(path, {"logps": values[wanted]}, {"part": part})
        if store is not None:
            scored = [scored_length(groups[g], k) for micro in micros for g, k in micro]
            store.put(own[wanted], values[wanted], np.array(scored, dtype=np.int64), tag)
        if progress is not None:
            progress(int(cut[-1]), len(missing))
    tags = tuple(sorted({*plan.tags, *([tag] if len(missing) else [])}))
    reused = len(places) - len(missing)
    return ReferenceColumn(values[number], lengths.first, len(missing), reused, tags, identity, keys)


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
        digest.update(_bytes(arrays[name]))
    return digest.hexdigest()


def content_digest(keys: np.ndarray) -> str:
    """SHA-256 that stands for every token id and span of the groups with these keys, in order."""
    return hashlib.sha256(_bytes(keys)).hexdigest()


def _bytes(array: np.ndarray) -> np.ndarray:
    """The array's bytes in C order, without a copy where they lie so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class _Plan:
    """found: (F,) distinct completions that were known, logps: (F,) their values, tags: of these.

    cuts: (M + 1,) where each micro-batch begins among those that were not; per_part: how many make a part.
    """

    found: np.ndarray
    logps: np.ndarray
    cuts: np.ndarray
    tags: list[str]
    per_part: int

    def missing(self, count: int) -> np.ndarray:
        """(count,) bool: what is to be scored."""
        absent = np.ones(count, dtype=bool)
        absent[self.found] = False
        return absent

    def write(self, folder: Path, facts: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"found": self.found, "logps": self.logps, "cuts": self.cuts}
        _save(folder / "plan.safetensors", arrays, facts | {"tags": self.tags, "per_part": self.per_part})

    @classmethod
    def read(cls, folder: Path) -> "tuple[_Plan, dict[str, Any]] | None":
        """The plan that a pass was begun with here, and its facts; None where there is none."""
        if (folder / "plan.safetensors").exists():
            arrays, facts = _load(folder / "plan.safetensors")
            return cls(arrays["found"], arrays["logps"], arrays["cuts"], facts["tags"], facts["per_part"]), facts
        if not (folder / "plan.json").exists():
            return None
        old = read_json(folder / "plan.json")  # as palate wrote it when the plan was one JSON file
        sizes = [len(micro) for part in old["parts"] for micro in part]
        cuts = np.cumsum([0, *sizes])
        found, logps = np.array(old["found"], np.int64), np.array(old["logps"], np.float64)
        return cls(found, logps, cuts, old["tags"], len(old["parts"][0]) if old["parts"] else 1), old


def _plan(
    lengths: Lengths, places: np.ndarray, keys: np.ndarray, facts: dict, store: ScoreStore | None, folder: Path | None
) -> _Plan:
    """What is known already, and the micro-batches that score the rest; written before anything is scored."""
    begun = None if folder is None else _Plan.read(folder)
    if begun is not None:
        plan, before = begun
        if differing := [name for name, value in facts.items() if before.get(name) != value]:
            raise CheckpointError(
                f"a reference pass with other {', '.join(differing)} was begun here",
                where=str(folder),
                code="E502",
                next="resume on the same machine with the same data and settings, or take a new --out",
            )
        return plan
    found, known, tags = np.zeros(len(places), dtype=bool), np.empty(len(places)), set()
    if store is not None and len(places):
        found, known, _, tags = store.lookup(keys, facts["tag"])
    missing = places[~found]
    group = lengths.group(missing)
    heads = np.flatnonzero(np.diff(group, prepend=-1))  # a group's completions stay together
    tokens = lengths.prompt[group[heads]]
    if len(heads):
        tokens = tokens + np.add.reduceat(np.maximum(lengths.completion[missing] - 1, 0), heads)
    starts = [*heads[cuts(tokens.tolist(), facts["tokens"])], len(missing)]
    per_part = MICRO_BATCHES_PER_PART
    plan = _Plan(np.flatnonzero(found), known[found], np.array(starts, np.int64), sorted(tags), per_part)
    if folder is not None:
        plan.write(folder, facts)
    return plan


def _score(groups, micros: list[list[tuple[int, int]]], reference: nn.Module, numerics: Numerics) -> np.ndarray:
    """Log-probs (nats) of the completions of these micro-batches, each named by its group and its number there."""
    values = []
    adapters_off = reference_mode(reference) if is_adapted(reference) else nullcontext()
    with torch.no_grad(), evaluation_mode(reference), adapters_off:
        for micro in micros:
            by_group = groupby(micro, key=lambda place: place[0])
            batch = collate([_only(groups[g], [k for _, k in same]) for g, same in by_group])
            values.append(logps(reference, batch.to(reference.device), numerics=numerics).total.cpu().numpy())
    return np.concatenate(values)


def _only(group: TokenGroup, picked: list[int]) -> TokenGroup:
    """The group with just these of its completions: a branch's numbers do not depend on its neighbours."""
    return replace(
        group,
        completions=tuple(group.completions[k] for k in picked),
        spans=tuple(group.spans[k] for k in picked),
        preferences=(),
        reference=None,
    )
