"""Retention: what a preference run measures at its start and its end, to say what it broke.

Three sets of texts are scored by the function that scores everything: demonstrations, held-out chosen completions, and
what the model itself wrote at the start. What it writes on held-out prompts is counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from palate.recipes.verbs import Say
from palate.run import from_builtin

MOST_ROWS = 200  # demonstrations, and chosen completions, that are scored
MAX_TOKENS = 64
FILE = "retention.json"
PREFIX = "eval/retain/"


@dataclass
class Retention:
    """What is watched over a run; `begin` fills `start`.

    demonstrations, chosen: groups of one completion. prompts: token ids (P,) to be completed.
    start: log-probs (nats) and completions of the model as it was.
    """

    demonstrations: list
    chosen: list
    prompts: list
    tokenizer: Any
    numerics: Any
    tokens: int
    start: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.demonstrations or self.chosen or self.prompts)

    def begin(self, run, model, step: int) -> None:
        """Before the first step samples, scores and writes down the start; later reads what was written then."""
        from palate.files import read_json, write_json

        if step:
            self.start = read_json(run.path / FILE)
            return
        made = self._completions(model)
        own = [self._own(sample.prompt, sample.ids.tolist()) for sample in made]
        self.start = {
            "demonstrations": self._score(model, self.demonstrations)[0],
            "chosen": self._score(model, self.chosen)[0],
            "own": self._score(model, own)[0],
            "completions": [{"prompt": s.prompt, "ids": s.ids.tolist(), "finished": s.finished} for s in made],
        }
        write_json(run.path / FILE, self.start)

    def measure(self, model, *, whole: bool) -> dict[str, Any]:
        """`eval/retain/...` numbers of the model as it is now; not whole: the demonstrations' likelihood alone."""
        from palate.evaluation.retention import completion_numbers, displaced, nats_per_token

        found: dict[str, Any] = {}
        if self.demonstrations:
            found["loss"] = nats_per_token(*self._score(model, self.demonstrations))
        if whole and self.chosen:
            totals, lengths = self._score(model, self.chosen)
            found["chosen"] = nats_per_token(totals, lengths)
            found["displaced"] = displaced(self.start["chosen"], totals)
        if whole and self.prompts:
            own = [self._own(row["prompt"], row["ids"]) for row in self.start["completions"]]
            totals, lengths = self._score(model, own)
            found["drift"] = (sum(self.start["own"]) - sum(totals)) / sum(lengths)
            made = self._completions(model)
            texts = [sample.ids[: -1 if sample.finished else None].tolist() for sample in made]
            found |= completion_numbers(texts, [sample.finished for sample in made])
        return {PREFIX + name: value for name, value in found.items()}

    def result(self, lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """What run.json says: flags, then every number before and after. lines: of metrics.jsonl."""
        from palate.evaluation.retention import flags

        measured = [_numbers(line) for line in lines]
        measured = [numbers for numbers in measured if numbers]
        if not measured:
            return {"flags": []}
        before, after = measured[0], measured[-1]
        return {
            "flags": flags(before, after),
            "before": before,
            "after": after,
            "demonstrations": len(self.demonstrations),
            "completions": len(self.prompts),
            "max_tokens": MAX_TOKENS,
        }

    def _completions(self, model) -> list:
        from palate.data.tokens import end_tokens
        from palate.sampling.generate import generate

        if not self.prompts:
            return []
        ends = end_tokens(self.tokenizer)
        return generate(model, self.tokenizer, self.prompts, max_tokens=MAX_TOKENS, seed=1, end_ids=ends)

    def _own(self, prompt: int, ids: Sequence[int]):
        import numpy as np

        from palate.data.tokens import TokenGroup

        return TokenGroup(self.prompts[prompt], (np.array(ids, dtype=np.int32),), (((0, len(ids)),),))

    def _score(self, model, groups: Sequence) -> tuple[list[float], list[int]]:
        """Log-prob (nats) and scored tokens of every group's completion."""
        return totals(model, groups, self.numerics, self.tokens)


def totals(model, groups: Sequence, numerics, tokens: int) -> tuple[list[float], list[int]]:
    """Log-prob (nats) and scored tokens of the one completion of every group. tokens: of a micro-batch's stream."""
    import torch

    from palate.data.batch import collate, stream_length
    from palate.data.stream import pack
    from palate.scoring import logps

    found, lengths = [0.0] * len(groups), [0] * len(groups)
    for part in pack([stream_length(group) for group in groups], tokens) if groups else []:
        with torch.no_grad():
            scored = logps(model, collate([groups[i] for i in part]).to(model.device), numerics=numerics)
        for i, total, length in zip(part, scored.total.tolist(), scored.length.tolist(), strict=True):
            found[i], lengths[i] = total, length
    return found, lengths


def read_retained(config, say: Say):
    """The records of --retain; None where there are none to be had, which is said. Raises what reading raises."""
    from palate.data.sources import read_demonstrations

    if config.retain == "none":
        return None
    if config.retain != "auto":
        return read_demonstrations(config.retain)
    if from_builtin(config.model):
        return read_demonstrations("builtin:demonstrations[2800:]")  # on the others builtin:tiny was trained
    say("retention: no demonstrations to watch; --retain FILE names some that the model must not forget")
    return None


def retention(config, prepared, records) -> Retention:
    """What this run watches. Its demonstrations are listed among the run's sources, so that a resume finds the same.

    records: of --retain, or None. Raises DataError where one of them cannot be tokenised.
    """
    from palate.data.tokens import tokenize
    from palate.recipes.verbs import max_length

    tokenizer, numerics = prepared.loaded.tokenizer, prepared.objective.numerics
    limit = max_length(config, prepared.loaded.model)
    demonstrations = []
    if records is not None:
        prepared.rows.reading.sources.extend(dict(source, role="retain") for source in records.sources)
        demonstrations = [tokenize(record, tokenizer, max_length=limit) for record in spread(records, MOST_ROWS)]
    held = prepared.rows.held
    chosen = [group for group in map(_chosen, held) if group is not None]
    prompts = {group.prompt.tobytes(): group.prompt for group in held if len(group.prompt)}
    return Retention(
        demonstrations,
        spread(chosen, MOST_ROWS),
        list(prompts.values())[: config.retain_samples],
        tokenizer,
        numerics,
        config.train.tokens,
    )


def spread(rows: Sequence, most: int) -> list:
    """All rows, or `most` of them at even distances."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * len(rows) // most] for i in range(most)]


def _chosen(group):
    """The group with its wanted completion alone; None where it was not wanted."""
    from palate.data.batch import best_first

    if group.label is False:
        return None
    k = 0 if group.label else (best_first(group) or group.preferences[0])[0]
    alone = {"completions": (group.completions[k],), "spans": (group.spans[k],)}
    return replace(group, **alone, preferences=(), label=None, reference=None)


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(PREFIX): value for key, value in line.items() if key.startswith(PREFIX)}


def retention_lines(found: dict[str, Any]) -> list[str]:
    """Lines for the screen: the flags, or that there are none; none where nothing was measured."""
    if "after" not in found:
        return []
    before, after = found["before"], found["after"]
    words = {"loss": "demonstrations {} to {} nats a token", "distinct-2": "distinct-2 {} to {}",
             "length": "length {} to {}"}  # fmt: skip
    spec = {"length": ".0f"}
    shown = [
        text.format(*(format(side[name], spec.get(name, ".2f")) for side in (before, after)))
        for name, text in words.items()
        if before.get(name) is not None and after.get(name) is not None
    ]
    if after.get("displaced") is not None:
        shown.append(f"{after['displaced']:.0%} of chosen completions less likely")
    head = [f"flag       {flag}" for flag in found["flags"]] or ["retention  nothing flagged"]
    return [*head, "           " + ", ".join(shown)] if shown else head
