"""Which completions stand on the page: best, median, worst and what got worse, or the samples as they came."""

from collections.abc import Sequence
from dataclasses import dataclass

from palate.report import words
from palate.report.reading import Example, Prompt, Reading, Sample

MOST_DROPS = 3
MOST_SAMPLES = 8  # where no judge scored them


@dataclass(frozen=True)
class Shown:
    """One prompt, as (role, text) of its turns, with both completions, and why it is shown."""

    why: str
    prompt: list[tuple[str, str]]
    before: str | None
    after: str | None
    score_before: float | None = None
    score_after: float | None = None


@dataclass(frozen=True)
class Scored:
    """Completions chosen by a judge's scores. better, worse: of `count`, how many rose and fell."""

    judge: str
    picks: list[Shown]
    drops: list[Shown]
    better: int
    worse: int
    count: int


@dataclass(frozen=True)
class Unscored:
    """Completions in the order of their file, which holds `count`."""

    shown: list[Shown]
    count: int


def completions(run: Reading) -> Scored | Unscored | None:
    """Those of the comparison, else those of samples.jsonl; None where there are none."""
    found = run.comparison
    if found is not None and (scored := [e for e in found.examples if e.score_after is not None]):
        return _by_score(found.judge, scored)
    rows: Sequence[Example | Sample] = found.examples if found is not None else ()
    if not rows:
        last = max((row.step for row in run.samples if row.after is not None), default=None)
        samples = [row for row in run.samples if row.step == (last or 0) and (last is None or row.after is not None)]
        if scored := [example for row in samples if (example := _rewarded(row)) is not None]:
            return _by_score(str(run.config.get("reward", "its reward")), scored)
        rows = samples
    return Unscored([_shown("", row) for row in rows[:MOST_SAMPLES]], len(rows)) if rows else None


def _rewarded(row: Sample) -> Example | None:
    """A sample of a run that follows a reward, with what that says of it; None of other runs."""
    if row.before is None or row.after is None or row.scores.reward is None:
        return None
    return Example(
        prompt=row.prompt,
        before=row.before,
        after=row.after,
        score_before=row.scores.reward_before,
        score_after=row.scores.reward,
    )


def _by_score(judge: str, scored: Sequence[Example]) -> Scored:
    order = sorted(scored, key=lambda e: (e.score_after or 0.0, gain(e)))
    median = order[(len(order) - 1) // 2].score_after
    level = [e for e in order if e.score_after == median]  # scores can be few: the middle one of its equals by gain
    picks = {"Best": order[-1], "Median": level[(len(level) - 1) // 2], "Worst": order[0]}
    if len(order) < 3:
        picks = dict(zip(("Best", "Worst"), reversed(order), strict=False))
    falls = sorted((e for e in scored if gain(e) < 0), key=gain)
    drops = [e for e in falls if all(e is not pick for pick in picks.values())][:MOST_DROPS]
    return Scored(
        judge=judge,
        picks=[_shown(why, e) for why, e in picks.items()],
        drops=[_shown(f"Fell by {words.number(-gain(e), '.2f')}", e) for e in drops],
        better=sum(gain(e) > 0 for e in scored),
        worse=len(falls),
        count=len(scored),
    )


def gain(example: Example) -> float:
    """Score after minus score before; 0 where one of them is not there."""
    if example.score_after is None or example.score_before is None:
        return 0.0
    return example.score_after - example.score_before


def _shown(why: str, row: Example | Sample) -> Shown:
    scores = (row.score_before, row.score_after) if isinstance(row, Example) else (None, None)
    return Shown(why, turns(row.prompt), row.before, row.after, *scores)


def turns(prompt: Prompt) -> list[tuple[str, str]]:
    """(role, text) of each turn; a single turn needs no role."""
    if isinstance(prompt, str):
        return [("", prompt)]
    return [("" if len(prompt) == 1 else turn.role, turn.content) for turn in prompt]
