"""A rounds.json to its page: how each round's model stands against the start, what it learnt from, what it writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.files import read_json
from palate.report import tables, words
from palate.report.charts import Chart, Curve
from palate.report.completions import completions
from palate.report.reading import Reading, finite, read_run
from palate.report.verdict import Tile, Verdict, full

FILE = "rounds.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """A round above its column; page: its own report, beside this one. alarms: what went wrong, in sentences."""

    number: int
    page: str
    best: bool
    alarms: list[str]


def is_rounds(path: Path) -> bool:
    """Whether a folder holds rounds that are runs, rather than being one run itself."""
    return (path / FILE).is_file() and not (path / "metrics.jsonl").is_file()


def rounds(path: Path) -> dict[str, Any]:
    """All that rounds.html shows, in its order."""
    run, table = read_run(path), read_json(path / FILE)
    rows, best = table["rounds"], table.get("best")
    measured = [(name, [show(row) for row in rows]) for name, show in MEASURES]
    folder = path / "rounds" / f"{best:02d}" if best else None
    return {
        "run": run,
        "title": run.name,
        "source": f"{path / FILE}, run.json and the runs of its rounds",
        "over": run.status == "done",
        "verdict": _verdict(run, rows, best),
        "ended": full(table["ended"]) if table.get("ended") else "",
        "judge": table.get("judge"),
        "compared": next((row["compared"] for row in rows if row.get("compared")), None),
        "tiles": _tiles(rows, best),
        "heads": [_head(path, row, row["round"] == best) for row in rows],
        "measures": [(name, texts) for name, texts in measured if any(texts)],
        "charts": charts(rows),
        "left_out": _left_out(rows),
        "best": best,
        "completions": completions(read_run(folder)) if folder is not None else None,
        "commands": tables.commands(run),
        "facts": tables.facts(run),
        "config": tables.config(run),
    }


def _verdict(run: Reading, rows: Sequence[Row], best: int | None) -> Verdict:
    """What the run concluded, word for word, with the best round's interval."""
    word, rest = words.verdict_parts(run.record.verdict or "")
    row = rows[best - 1] if best else {}
    bar = tuple(finite(row.get(key)) for key in ("win_rate", "win_low", "win_high"))
    return Verdict(
        (word or "").capitalize(),
        "better" if word == "better" else "open",
        full(rest) if rest else "",
        interval=None if None in bar else bar,
        ends=("the start preferred", f"round {best} preferred"),
    )


def _tiles(rows: Sequence[Row], best: int | None) -> list[Tile]:
    """The figures of the best round, those that it has."""
    if not best:
        return []
    row, made = rows[best - 1], []
    if row.get("win_rate") is not None:
        made.append(Tile("Win rate", words.percent(row["win_rate"]), words.interval(row["win_low"], row["win_high"])))
    if row.get("kl") is not None:
        made.append(Tile("KL from the start", words.number(row["kl"], ".2f"), "nats a completion"))
    if row.get("length") is not None:
        made.append(Tile("Length", words.number(row["length"], ".1f"), "tokens"))
    if row.get("format_accuracy") is not None:
        spread = words.interval(row["format_low"], row["format_high"])
        made.append(Tile("Told apart by format", words.percent(row["format_accuracy"]), spread))
    return made


def _share(key: str, low: str = "", high: str = "") -> Callable[[Row], str]:
    def text(row: Row) -> str:
        if row.get(key) is None:
            return ""
        return f"{words.percent(row[key])} {words.interval(row.get(low), row.get(high))}".strip()

    return text


def _number(key: str, spec: str = "") -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else words.number(row[key], spec)


MEASURES: list[tuple[str, Callable[[Row], str]]] = [
    ("pairs", _number("pairs", ",d")),
    ("trained on", _number("trained", ",d")),
    ("wins against the start", _share("win_rate", "win_low", "win_high")),
    ("against the model before", _share("win_previous")),
    ("judge's score", _number("score", ".2f")),
    ("KL, nats", _number("kl", ".2f")),
    ("length", _number("length", ".1f")),
    ("end by themselves", _share("ended")),
    ("held-out pairs ordered rightly", _share("accuracy")),
    ("held-out chosen, nats", _number("chosen_logp", ".2f")),
    ("told apart by format", _share("format_accuracy", "format_low", "format_high")),
    ("own judge's accuracy", _share("judge_accuracy", "judge_low", "judge_high")),
    ("own judge: prompts ordered exactly", _share("judge_exact")),
    ("own judge: rank correlation", _number("judge_spearman", ".2f")),
    ("judgements without a score", _share("unparsed_share")),
    ("scores from 0 on, how often each", lambda row: " ".join(map(str, row.get("histogram") or []))),
    ("prompts with a pair", _share("pair_yield")),
    ("unparsed", _number("unparsed", ",d")),
    ("ties", _number("ties", ",d")),
    ("beta (lambda)", _number("beta", "g")),
]


def _head(path: Path, row: Row, best: bool) -> Head:
    page = f"rounds/{row['round']:02d}/report.html"
    return Head(row["round"], page if (path / page).is_file() else "", best, list(row.get("alarms") or []))


def _left_out(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """(reason, one count a round) of the prompts without a pair; reasons that no round has are left out."""
    reasons = dict.fromkeys(reason for row in rows for reason in row.get("left_out") or {})
    found = [(reason, [(row.get("left_out") or {}).get(reason, 0) for row in rows]) for reason in reasons]
    return [(reason, [f"{count:,}" for count in counts]) for reason, counts in found if any(counts)]


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Win rates with their intervals, KL, length and what format tells, by round; those that there are."""
    made = []
    if wins := _points(rows, "win_rate"):
        band = [(row["round"], row["win_low"], row["win_high"]) for row in rows if row.get("win_rate") is not None]
        curves = [Curve("against the start", wins, "s1", dots=True, band=band)]
        curves.append(Curve("against the model before", _points(rows, "win_previous"), "s2", quiet=True, dots=True))
        made.append(Chart("wins", "Win rate", "win rate", tuple(curves), x="round", share=True, level=0.5))
    for name, title, y, key, start in (
        ("score", "The judge's score", "mean score", "score", "start_score"),
        ("kl", "Distance", "KL from the start, nats", "kl", ""),
        ("length", "Length", "tokens", "length", "start_length"),
    ):
        if points := _points(rows, key):
            begun = [(0, value) for _, value in _points(rows[:1], start)]
            made.append(Chart(name, title, y, (Curve(y, [*begun, *points], "s1", dots=True),), x="round"))
    if points := _points(rows, "format_accuracy"):
        band = [(row["round"], row["format_low"], row["format_high"]) for row in rows if row.get("format_accuracy")]
        curve = Curve("accuracy of format alone", points, "s4", dots=True, band=band)
        made.append(Chart("format", "What format tells", "accuracy", (curve,), x="round", share=True, level=0.5))
    if points := _points(rows, "judge_accuracy"):
        curve = Curve("pairwise accuracy", points, "s3", dots=True)
        made.append(Chart("judge", "The judge that trains", "accuracy", (curve,), x="round", share=True, level=0.5))
    return made


def _points(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    return [(row["round"], value) for row in rows if (value := finite(row.get(key))) is not None]
