"""Head to head: how often one model's completions are preferred to another's, and what that shows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from palate.evaluation.statistics import bootstrap_mean, design_effect, wilson

Verdict = Literal["better", "worse", "not shown to be different"]


@dataclass(frozen=True)
class Match:
    """What a judge said of `a` against `b`.

    n: comparisons; wins, losses, ties: of `a`. win_rate: ties count half. low, high: its Wilson 95 % interval, of the
    effective number of comparisons where prompts have several. bootstrap_low, bootstrap_high: the same from drawing
    prompts. verdict: of `a`, by where [low, high] lies against one half.
    """

    a: str
    b: str
    judge: str
    n: int
    wins: int
    losses: int
    ties: int
    win_rate: float
    low: float
    high: float
    bootstrap_low: float
    bootstrap_high: float
    verdict: Verdict

    @property
    def better(self) -> bool:
        """Whether `a` is shown better."""
        return self.verdict == "better"

    def mirrored(self) -> "Match":
        """The same match as `b` sees it."""
        turned: dict[Verdict, Verdict] = {"better": "worse", "worse": "better"}
        return replace(
            self,
            a=self.b,
            b=self.a,
            wins=self.losses,
            losses=self.wins,
            win_rate=(self.losses + self.ties / 2) / self.n if self.n else float("nan"),
            low=1 - self.high,
            high=1 - self.low,
            bootstrap_low=1 - self.bootstrap_high,
            bootstrap_high=1 - self.bootstrap_low,
            verdict=turned.get(self.verdict, self.verdict),
        )


def match(
    a: str,
    b: str,
    judge: str,
    outcomes: Sequence[float],
    *,
    prompts: Sequence[int] | None = None,
    seed: int = 0,
) -> Match:
    """The match of `a` against `b` from one outcome a comparison: 1 where `a` won, 0.5 a tie, 0 where `b` won.

    prompts: which prompt each comparison is of, where some have several: these are not independent, so the interval
        gets wider by the design effect. seed: of the bootstrap.
    Calibrated: where neither is better, [low, high] lies above one half in at most 2.5 % of matches, and ties make
    that rarer. `b` against `a` is the mirror image, to the bit of every count and of the verdict.
    """
    scores = np.asarray(outcomes, dtype=np.float64)
    if not np.isin(scores, (0.0, 0.5, 1.0)).all():
        raise ValueError("an outcome is 1, 0.5 or 0")
    n, wins, losses = len(scores), int((scores == 1).sum()), int((scores == 0).sum())
    if losses > wins:  # counted from the side that is ahead, so that rounding cannot tell the two apart
        return match(b, a, judge, (1 - scores).tolist(), prompts=prompts, seed=seed).mirrored()
    ties = n - wins - losses
    points = wins + ties / 2
    clusters = np.arange(n) if prompts is None else np.asarray(prompts)
    effect = design_effect(scores, clusters)
    share = wilson(points / effect, n / effect)
    _, place = np.unique(clusters, return_inverse=True)
    leads, sizes = np.bincount(place, weights=scores - 0.5), np.bincount(place)
    low, high = bootstrap_mean(leads, sizes, seed=seed)
    verdict: Verdict = "better" if share.low > 0.5 else "worse" if share.high < 0.5 else "not shown to be different"
    rate = points / n if n else float("nan")
    return Match(a, b, judge, n, wins, losses, ties, rate, share.low, share.high, 0.5 + low, 0.5 + high, verdict)


def sentence(match: Match) -> str:
    """The match in plain words, the verdict first."""
    if not match.n:
        return f"{match.a} and {match.b} were not compared: there is no prompt, so nothing is shown"
    words = {"better": "is better than", "worse": "is worse than"}
    head = f"{match.a} {words.get(match.verdict, 'is not shown to be different from')} {match.b}"
    ties = f", {match.ties / match.n:.1%} ties counted half" if match.ties else ""
    return (
        f"{head}: it wins {match.win_rate:.1%} [{match.low:.1%}, {match.high:.1%}] of {match.n} comparisons{ties}, "
        f"judged by {match.judge}"
    )


def comparison(
    match: Match,
    examples: Sequence[Mapping[str, Any]] = (),
    *,
    kl: float | None = None,
    length: Mapping[str, float | None] | None = None,
    reward: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What comparison.json holds; in it `a` is the "after" and `b` the "before".

    examples: {"prompt", "before", "after", "score_before", "score_after"} of every comparison, in file order; the
        scores None for a judge that only compares. kl: of `a` from `b`, nats a completion. length: mean tokens,
        reward: mean score, both {"before", "after"}.
    """
    facts = {"kl": kl, "length": dict(length) if length else None, "reward": dict(reward) if reward else None}
    return asdict(match) | facts | {"examples": [dict(row) for row in examples]}
