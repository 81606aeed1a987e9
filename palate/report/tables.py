"""The tables: length and distance, what broke, cost against the plan, commands, hashes, how several runs differ."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from palate.report import words
from palate.report.reading import Reading, series


@dataclass(frozen=True)
class Row:
    """A line with two numbers: before and after, or planned and spent."""

    what: str
    first: str
    second: str
    note: str = ""


def changes(run: Reading) -> list[Row]:
    """Length, the judge's score and KL before and after."""
    rows, found = [], run.comparison
    if found is not None and found.length is not None:
        rows.append(_row("Length of completions", found.length.before, found.length.after, "tokens, mean", ".1f"))
    elif (lengths := _sampled_lengths(run)) is not None:
        rows.append(_row("Length of the samples", *lengths, "tokens, mean", ".1f"))
    if found is not None and found.reward is not None:
        before, after = found.reward.before, found.reward.after
        spec = ".2f" if max(abs(before or 0), abs(after or 0)) >= 0.1 else ""
        rows.append(_row(f"Score by {found.judge}", before, after, "mean", spec))
    if found is not None and found.kl is not None:
        rows.append(_row("KL from the start", 0.0, found.kl, "nats a completion", ".2f"))
    return rows


def _row(what: str, first: float | None, second: float | None, note: str, spec: str = "") -> Row:
    return Row(what, words.number(first, spec), words.number(second, spec), note)


def _sampled_lengths(run: Reading) -> tuple[float, float] | None:
    """Mean tokens of the samples of step 0 and of the last step; None where one of them has none."""
    last = max((row.step for row in run.samples), default=0)
    found = [[row.scores.tokens for row in run.samples if row.step == step] for step in (0, last)]
    known = [[count for count in counts if count is not None] for counts in found]
    return (sum(known[0]) / len(known[0]), sum(known[1]) / len(known[1])) if last and all(known) else None


@dataclass(frozen=True)
class Retained:
    """flags: what the run broke, in its own words; None where it kept numbers alone."""

    flags: list[str] | None
    rows: list[Row]


def retention(run: Reading) -> Retained | None:
    """What the run broke; None where nobody looked."""
    said = run.record.result.retention if run.record.result else None
    prefix = "eval/retain/"
    names = list(dict.fromkeys(key.removeprefix(prefix) for key in (*run.before, *run.after) if key.startswith(prefix)))
    if said is None and not names:
        return None
    rows = []
    for name in names:
        what, note, spec = _RETAINED.get(name, (name, "", ""))
        rows.append(_row(what, run.before.get(prefix + name), run.after.get(prefix + name), note, spec))
    return Retained(said.flags if said else None, rows)


_RETAINED = {  # name: what it is, its unit, how it is written
    "loss": ("Loss on the demonstrations", "nats a token", ".3f"),
    "chosen": ("Loss on held-out chosen completions", "nats a token", ".3f"),
    "displaced": ("Chosen completions that lost likelihood", "share", ".1%"),
    "drift": ("Likelihood lost by its own first completions", "nats a token", ".3f"),
    "distinct-1": ("Distinct tokens", "share of all", ".1%"),
    "distinct-2": ("Distinct token pairs", "share of all", ".1%"),
    "distinct-3": ("Distinct token triples", "share of all", ".1%"),
    "repetition": ("Repeats within a completion", "share of 4-grams", ".1%"),
    "length": ("Length of completions", "tokens, mean", ".1f"),
    "finished": ("Completions that come to an end", "share", ".1%"),
}


def cost(run: Reading) -> list[Row]:
    """Steps, time, tokens and memory: what was planned and what was spent."""
    record, plan = run.record, run.record.plan
    tokens = sum(value for _, value in series(run.steps, "tokens"))
    rows = [Row("Steps", f"{run.planned:,}" if run.planned else "", f"{run.last_step:,}")]
    if run.seconds or plan.seconds:
        early = "as the third step took" if plan.seconds else ""
        rows.append(Row("Time in steps", _unless(plan.seconds, words.duration), words.duration(run.seconds), early))
    began, ended = (words.moment(record.times.get(end)) for end in ("started", "ended"))
    if began is not None and ended is not None:
        pauses = f"with {words.plural(len(record.resumed), 'pause')}" if record.resumed else ""
        rows.append(Row("From start to end", "", words.duration((ended - began).total_seconds()), pauses))
    if tokens:
        rows.append(Row("Tokens", _unless(plan.tokens, "{:,}".format), f"{tokens:,.0f}"))
    if tokens and run.seconds:
        rows.append(Row("Tokens per second", "", f"{tokens / run.seconds:,.0f}"))
    peak = record.result.peak_bytes if record.result else None
    if plan.peak_bytes or peak:
        rows.append(Row("Memory at the peak", _unless(plan.peak_bytes, words.size), _unless(peak, words.size)))
    if record.result and record.result.reference_scored is not None:
        reused = f"{record.result.reference_reused:,} reused" if record.result.reference_reused else ""
        rows.append(Row("Completions scored under the reference", "", f"{record.result.reference_scored:,}", reused))
    return rows


def _unless(value: Any, show) -> str:
    return show(value) if value else ""


def commands(run: Reading) -> list[tuple[str, str]]:
    """(what it does, the command): as it was typed, to go on, and to do the same again."""
    config = ["palate", *run.record.verb.split(), "-c", str(run.path / "config.yaml"), "--out"]
    made = [("as it was typed", shlex.join(run.record.argv))] if run.record.argv else []
    if run.status == "interrupted":
        made.append(("goes on from the last checkpoint", shlex.join([*config, str(run.path), "--resume"])))
    return [*made, ("runs it again", shlex.join([*config, "NEW"]))]


def facts(run: Reading) -> list[tuple[str, str]]:
    """Names, hashes, versions and the machine."""
    record = run.record
    rows = [("run", record.id), ("seed", "" if record.seed is None else str(record.seed))]
    rows += [(name, text) for name, text in record.times.items()]
    for parent in record.parents:
        rows += [("begins from", parent.model or ""), ("weights", parent.identity or "")]
    rows += [("rows, as tokens", record.start.get("tokens") or ""), ("machine", record.hardware or "")]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items() if version)))
    return [(name, text) for name, text in rows if text]


def config(run: Reading) -> dict[str, str]:
    """config.yaml by dotted keys."""
    return {key: plain(value) for key, value in run.config.items()}


def plain(value: Any) -> str:
    """A value of the config as it is shown."""
    if value is None or value in ("", [], {}):
        return "\u2013"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def side_by_side(runs: Sequence[Reading]) -> list[tuple[str, list[str]]]:
    """(what, one text a run) of all that can be set beside each other; what no run has is left out."""
    key = "eval/rewards/accuracies"
    columns = {
        "verb": [run.record.verb for run in runs],
        "status": [run.status for run in runs],
        "win rate": [_comparison(run, lambda c: words.percent(c.win_rate)) for run in runs],
        "win rate, 95 %": [_comparison(run, lambda c: words.interval(c.low, c.high)) for run in runs],
        "judge": [_comparison(run, lambda c: c.judge) for run in runs],
        "held-out accuracy": [_unless_none(run.after.get(key), words.percent) for run in runs],
        "held-out accuracy, 95 %": [
            words.interval(run.after.get(f"{key}_low"), run.after.get(f"{key}_high")) for run in runs
        ],
        "held-out margin": [_unless_none(run.after.get("eval/rewards/margins"), words.number) for run in runs],
        "held-out reward": [_unless_none(run.after.get("eval/reward"), words.number) for run in runs],
        "held-out loss": [_unless_none(run.after.get("eval/loss"), words.number) for run in runs],
        "chosen that lost likelihood": [_unless_none(run.after.get("eval/displaced"), words.percent) for run in runs],
        "KL from the start, nats": [_comparison(run, lambda c: _unless_none(c.kl, words.number)) for run in runs],
        "length, tokens": [
            _comparison(run, lambda c: words.number(c.length.after, ".1f") if c.length else "") for run in runs
        ],
        "steps": [f"{run.last_step:,}" for run in runs],
        "time in steps": [_unless(run.seconds, words.duration) for run in runs],
    }
    return [(what, texts) for what, texts in columns.items() if any(texts)]


def _comparison(run: Reading, show) -> str:
    return show(run.comparison) if run.comparison is not None else ""


def _unless_none(value: float | None, show) -> str:
    return "" if value is None else show(value)


def differences(runs: Sequence[Reading]) -> list[tuple[str, list[str]]]:
    """(option, one value a run) of every option of the configs that is not the same in all."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [(key, [plain(run.config.get(key)) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
