"""A frontier's folder to its page: reward against KL as one picture, what each method reached, where its runs ended."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from palate.files import read_json
from palate.report import tables, words
from palate.report.reading import read_run
from palate.report.verdict import full

FILE, PLOT = "frontier.json", "frontier.svg"
NAMES = {  # of methods, as a person reads them
    "exact": "exact frontier",
    "dpo": "DPO",
    "ppo": "PPO",
    "ppo_true": "PPO, true reward",
    "rloo": "RLOO",
    "best_of_n": "best of N",
    "unlikelihood": "Unlikelihood",
    "preferred_ft": "Preferred-FT",
    "sft": "the reference",
}
Cell = tuple[str, str]  # a number, and its spread below it


def is_frontier(path: Path) -> bool:
    """Whether a folder holds a frontier rather than a run."""
    return (path / FILE).is_file()


def frontier(path: Path) -> dict[str, Any]:
    """All that frontier.html shows, in its order."""
    found = read_json(path / FILE)
    run = read_run(path) if (path / "run.json").is_file() else None
    result = (read_json(path / "run.json").get("result") or {}) if run else {}
    rows = result.get("table") or []
    several = len(found["seeds"]) > 1
    return {
        "title": path.name,
        "source": f"{path / FILE}, {PLOT} and run.json",
        "world": found["world"],
        "points": len(found["points"]),
        "seeds": len(found["seeds"]),
        "exact": bool(found.get("exact")),
        "verdict": full(result["verdict"]) if result.get("verdict") else "",
        "picture": _picture(path / PLOT),
        "kls": list(rows[0]["reward"]) if rows else [],
        "rows": [_row(row, several) for row in rows],
        "ends": _ends(found["points"], several),
        "failed": result.get("failed", {}),
        "commands": tables.commands(run) if run else [],
        "facts": tables.facts(run) if run else [],
        "config": tables.config(run) if run else {},
    }


def _row(row: dict[str, Any], several: bool) -> tuple[str, list[Cell]]:
    cells = [_spread(found, several) for found in (*row["reward"].values(), row["hull"])]
    cells += [(str(row["runs"] or ""), ""), ("" if row["seconds"] is None else words.duration(row["seconds"]), "")]
    cells.append(("" if row["samples"] is None else f"{row['samples']:,.0f}", ""))
    return NAMES.get(row["method"], row["method"]), cells


def _ends(points: Sequence[dict[str, Any]], several: bool) -> list[tuple[str, list[Cell]]]:
    """The last point of every setting, over the seeds; none of the reference, which never moves."""
    last: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for point in points:
        if point["method"] != "sft":
            last.setdefault((point["method"], point["setting"]), {})[point["seed"]] = point
    rows = []
    for (method, setting), by_seed in last.items():
        cells = [_spread(_over([p[name] for p in by_seed.values()]), several) for name in ("kl", "reward")]
        cells.append((words.duration(_over([p["seconds"] for p in by_seed.values()])["mean"]), ""))
        cells.append((f"{_over([p['samples'] for p in by_seed.values()])['mean']:,.0f}", ""))
        rows.append((_said(method, setting), cells))
    return rows


def _said(method: str, setting: str) -> str:
    if method == "best_of_n":
        return setting.replace("n=", "best of ")
    setting = setting.replace("target_kl=", "aiming at KL ").replace("=", " ")
    return ", ".join(filter(None, (NAMES.get(method, method), setting)))


def _over(values: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}


def _spread(found: dict[str, float], several: bool) -> Cell:
    lowest, highest = (words.number(found[end], ".3f") for end in ("low", "high"))
    return words.number(found["mean"], ".3f"), f"{lowest} to {highest}" if several else ""


def _picture(path: Path) -> Markup:
    """The drawing as it was made, without what only a file of its own needs."""
    if not path.is_file():
        return Markup("")
    return Markup(re.sub(r"^.*?(?=<svg)", "", path.read_text(encoding="utf-8"), flags=re.DOTALL))
