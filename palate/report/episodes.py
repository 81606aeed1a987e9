"""What the page shows of a run on its own samples: reward and KL, and whether its health is what it should be."""

from dataclasses import dataclass

from palate.report import words
from palate.report.charts import Chart, Curve
from palate.report.reading import Reading, series
from palate.report.tables import Row

MOST_CLIPPED = 0.3  # above it the rate is too high


@dataclass(frozen=True)
class Episodes:
    """said: what the run found wrong, in its own words; None where it never came to look. rows: first and last.

    progress: reward and KL. charts: of the health.
    """

    said: list[str] | None
    rows: list[Row]
    progress: list[Chart]
    charts: list[Chart]


def episodes(run: Reading) -> Episodes | None:
    """None of runs that learned from data."""
    if not any("policy/clipped" in line for line in run.steps):
        return None
    progress = [
        Chart("reward", "Reward", "mean score of a completion", _rewards(run)),
        Chart("kl", "KL from the start", "nats a completion", _both(run, "kl"), level=0),
    ]
    if len({f"{value:.6g}" for _, value in series(run.steps, "kl_coef")}) > 1:  # means of equal numbers are not equal
        progress.append(Chart("coefficient", "KL coefficient", "reward a nat", _one(run, "kl_coef")))
    charts = [
        Chart("clipped", "Tokens clipped", "share of the tokens", _one(run, "policy/clipped"), level=MOST_CLIPPED),
        Chart("explained", "Explained by the critic", "share of the variance", _one(run, "value/explained"), level=0),
        Chart("ended", "Completions that end", "share", _both(run, "ended"), share=True),
        Chart("length", "Length", "tokens a completion", _both(run, "length")),
        Chart("entropy", "Entropy", "nats a token", _one(run, "entropy")),
        Chart("loss", "Loss", "mean of the tokens", _one(run, "loss")),
    ]
    said = run.record.health
    return Episodes(
        None if said is None else [word[:1].upper() + word[1:] for word in said],
        [row for kind in _ROWS if (row := _row(run, *kind)) is not None],
        [chart for chart in progress if chart.curves],
        [chart for chart in charts if chart.curves],
    )


def sampled(run: Reading) -> list[Chart]:
    """What became of the samples of a run that was taught by pairs of its own; none of other runs."""
    if not any("round" in line for line in run.steps):
        return []
    wins = series(run.evals, "eval/win_rate")
    lows, highs = (dict(series(run.evals, f"eval/win_{end}")) for end in ("low", "high"))
    band = [(step, lows[step], highs[step]) for step, _ in wins if step in lows and step in highs]
    won = (Curve("held out, 95 % interval", wins, "s1", dots=True, band=band),) if wins else ()
    charts = [
        Chart("wins", "Win rate against the start", "win rate", won, share=True, level=0.5),
        Chart("score", "Held-out score", "mean, by the judge that compares", _held(run, "reward")),
        Chart("reward", "Score of the samples", "mean, by the judge that labels", _one(run, "reward")),
        Chart("kl", "KL from the start", "nats a completion", _both(run, "kl"), level=0),
        Chart("length", "Length", "tokens a sample", _both(run, "length")),
        Chart("ended", "Samples that end", "share", _both(run, "ended"), share=True),
        Chart("pairs", "Pairs", "pairs a round", _one(run, "pairs")),
    ]
    return [chart for chart in charts if chart.curves]


_ROWS = (  # key, what it is, its unit, how it is written
    ("reward", "Score", "", ".3f"),
    ("reward/total", "Score less KL", "", ".3f"),
    ("kl", "KL from the start", "nats", ".3f"),
    ("policy/clipped", "Tokens clipped", "", ".1%"),
    ("value/explained", "Explained by the critic", "", ".0%"),
    ("ended", "Completions that end", "", ".1%"),
    ("entropy", "Entropy of a token", "nats", ".2f"),
)


def _row(run: Reading, key: str, what: str, unit: str, spec: str) -> Row | None:
    """Means over the first and the last tenth of the steps."""
    values = [value for _, value in series(run.steps, key)]
    if not values:
        return None
    tenth = max(1, len(values) // 10)
    first, last = (words.number(sum(part) / len(part), spec) for part in (values[:tenth], values[-tenth:]))
    return Row(what, first, last, unit)


def _rewards(run: Reading) -> tuple[Curve, ...]:
    held = series(run.evals, "eval/reward")
    lows, highs = (dict(series(run.evals, f"eval/reward_{end}")) for end in ("low", "high"))
    band = [(step, lows[step], highs[step]) for step, _ in held if step in lows and step in highs]
    word = "held out, 95 % interval" if band else "held out"
    curves = (
        Curve("in training", series(run.steps, "reward"), "s1", quiet=bool(held)),
        Curve("less its KL", series(run.steps, "reward/total"), "s2", quiet=bool(held), dashed=True),
        Curve(word, held, "s1", dots=True, band=band),
    )
    return tuple(curve for curve in curves if curve.points)


def _both(run: Reading, key: str) -> tuple[Curve, ...]:
    held = series(run.evals, f"eval/{key}")
    curves = (
        Curve("in training", series(run.steps, key), "s1", quiet=bool(held)),
        Curve("held out", held, "s1", dots=True),
    )
    return tuple(curve for curve in curves if curve.points)


def _held(run: Reading, key: str) -> tuple[Curve, ...]:
    points = series(run.evals, f"eval/{key}")
    return (Curve("held out", points, "s1", dots=True),) if points else ()


def _one(run: Reading, key: str) -> tuple[Curve, ...]:
    points = series(run.steps, key)
    return (Curve("in training", points, "s1"),) if points else ()
