"""A road.json to its page: the ways side by side, what each took, what they write, and every command."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.files import read_json
from palate.report import words
from palate.report.verdict import Verdict

FILE = "road.json"
SHOWN = 4  # prompts
UNTRIED = "not tried"


@dataclass(frozen=True)
class Way:
    """A way's bar, its page, and its cells of the table: (what, text)."""

    name: str
    run: str
    verdict: Verdict
    cells: list[tuple[str, str]]


def is_road(path: Path) -> bool:
    """Whether a folder holds a road rather than a run."""
    return (path / FILE).is_file()


def road(path: Path) -> dict[str, Any]:
    """All that road.html shows, in its order."""
    record = read_json(path / FILE)
    ways = [_way(row) for row in record["ways"]]
    return {
        "title": path.name,
        "source": f"{path / FILE} and the runs beside it",
        "ways": ways,
        "tried": [row for row in record["ways"] if row["trials"]],
        "samples": _samples(path, record["ways"]),
        "commands": record.get("commands", []),
        "seconds": record.get("seconds"),
        "over": bool(ways),
    }


def _way(row: dict[str, Any]) -> Way:
    tone = {"better": "better", "worse": "worse"}.get(row["verdict"], "open")
    bar = (row["win_rate"], row["low"], row["high"])
    shown = Verdict(row["verdict"], tone, "", interval=bar, ends=("before preferred", "after preferred"))
    return Way(row["name"], row["run"], shown, claims(row))


def claims(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, text) of what a way came to, what it took, and how it depends on the seed and on the learning rate."""
    reward, peak, trials = row["reward"], row["peak_bytes"], row["trials"]
    wins = [trial["win_rate"] for trial in trials if trial["times"] == 1]
    rates = [trial for trial in trials if trial["seed"] == trials[0]["seed"]]
    better, worse = (sum(trial["verdict"] == word for trial in rates) for word in ("better", "worse"))
    return [
        ("Wins", f"{words.percent(row['win_rate'])} {words.interval(row['low'], row['high'])}"),
        ("True reward, mean", f"{reward['before']:.2f} → {reward['after']:.2f}"),
        ("KL, nats a completion", words.number(row["kl"], ".2f")),
        ("Lines to write", str(len(row["commands"]))),
        ("Models in memory", str(row["models"])),
        ("Peak memory", words.size(peak)),
        ("Time", words.duration(row["seconds"])),
        ("Samples drawn", f"{row['samples']:,}"),
        ("Short runs", f"{len(trials)}, {row['tried']} each" if trials else UNTRIED),
        ("Wins of short runs", f"{words.spread(wins)}, {words.plural(len(wins), 'seed')}" if wins else UNTRIED),
        ("Learning rates shown to improve", f"{better} of {len(rates)}, {worse} worse" if rates else UNTRIED),
    ]


def _samples(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompts spread over what the first way gained on them, with every way's completion."""
    found = [read_json(path / row["run"] / "compare" / "comparison.json")["examples"] for row in rows]
    if not found:
        return []
    order = sorted(found[0], key=lambda example: example["score_after"] - example["score_before"])
    picked = [order[len(order) * i // (SHOWN + 1)] for i in range(1, SHOWN + 1)]
    others = [{_text(example["prompt"]): example for example in examples} for examples in found]
    return [
        {
            "prompt": _text(one["prompt"]),
            "texts": [("before", one["before"], one["score_before"])]
            + [
                (row["name"], table[_text(one["prompt"])]["after"], table[_text(one["prompt"])]["score_after"])
                for row, table in zip(rows, others, strict=True)
            ],
        }
        for one in picked
    ]


def _text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
