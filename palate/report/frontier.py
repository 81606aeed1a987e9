"""A frontier's folder to its page: reward against KL as one picture, and what each method reached and took."""

import re
from pathlib import Path
from typing import Any

from markupsafe import Markup

from palate.files import read_json
from palate.report import words
from palate.report.verdict import full

FILE, PLOT = "frontier.json", "frontier.svg"


def is_frontier(path: Path) -> bool:
    """Whether a folder holds a frontier rather than a run."""
    return (path / FILE).is_file()


def frontier(path: Path) -> dict[str, Any]:
    """All that frontier.html shows, in its order."""
    found = read_json(path / FILE)
    result = (read_json(path / "run.json").get("result") or {}) if (path / "run.json").is_file() else {}
    rows = result.get("table") or []
    several = len(found["seeds"]) > 1
    return {
        "title": path.name,
        "source": f"{path / FILE}, {PLOT} and run.json",
        "world": found["world"],
        "points": len(found["points"]),
        "seeds": len(found["seeds"]),
        "verdict": full(result["verdict"]) if result.get("verdict") else "",
        "picture": _picture(path / PLOT),
        "kls": list(rows[0]["reward"]) if rows else [],
        "rows": [_row(row, several) for row in rows],
        "failed": result.get("failed", {}),
    }


def _row(row: dict[str, Any], several: bool) -> tuple[str, list[str]]:
    texts = [_spread(found, several) for found in (*row["reward"].values(), row["hull"])]
    texts += [str(row["runs"] or ""), words.duration(row["seconds"]) if row["seconds"] is not None else ""]
    return row["method"], [*texts, f"{row['samples']:,.0f}" if row["samples"] is not None else ""]


def _spread(found: dict[str, float], several: bool) -> str:
    lowest, highest = (words.number(found[end], ".3f") for end in ("low", "high"))
    return words.number(found["mean"], ".3f") + (f" [{lowest}, {highest}]" if several else "")


def _picture(path: Path) -> Markup:
    """The drawing as it was made, without what only a file of its own needs."""
    if not path.is_file():
        return Markup("")
    return Markup(re.sub(r"^.*?(?=<svg)", "", path.read_text(encoding="utf-8"), flags=re.DOTALL))
