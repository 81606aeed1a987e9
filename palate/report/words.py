"""Numbers and text as a person reads them on the page."""

import math
import re
from collections.abc import Sequence
from datetime import datetime
from statistics import mean, stdev

from palate.errors import visible

_SURROGATES = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """The text with escapes for control characters and U+FFFD for half surrogate pairs, which no file can hold."""
    return _SURROGATES.sub("\ufffd", visible(text.replace("\r\n", "\n")))


def cut(text: str, most: int = 1200) -> tuple[str, int]:
    """The first `most` characters, and how many are left out."""
    return (text, 0) if len(text) <= most + 40 else (text[:most], len(text) - most)


def number(value: float | None, spec: str = "") -> str:
    """Four digits that matter, or what `spec` says; n/a for what was not finite or not there."""
    if value is None:
        return "n/a"
    if not spec:
        spec = ".4f" if 0.001 <= abs(value) < 1000 or value == 0 else ",.0f" if 1000 <= abs(value) < 1e7 else ".3e"
    return format(value, spec).replace("-", "\u2212")


def percent(value: float | None) -> str:
    """A share as 71.0%."""
    return "n/a" if value is None else f"{value:.1%}"


def interval(low: float | None, high: float | None) -> str:
    """[65.6%, 75.9%], or nothing where there is none."""
    return "" if low is None or high is None else f"[{low:.1%}, {high:.1%}]"


def spread(rates: Sequence[float]) -> str:
    """Their mean, and from two on their standard deviation: 71.4% (sd 1.3 points)."""
    return f"{mean(rates):.1%}" + (f" (sd {100 * stdev(rates):.1f} points)" if len(rates) > 1 else "")


def duration(seconds: float | None) -> str:
    """1 h 02 min, 1 min 30 s, 12 s, 0.4 s."""
    if seconds is None or not 0 <= seconds < math.inf:
        return "n/a"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def size(count: int | None) -> str:
    """Bytes as MB or GB."""
    if count is None:
        return "n/a"
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"


def plural(count: int, one: str, many: str | None = None) -> str:
    """1 step, 2 steps."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def moment(text: str | None) -> datetime | None:
    """A time of run.json; None where it is none."""
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        return None


_VERDICT = re.compile(r"(?:verdict: )?(better|worse|not shown to be better|not shown to be different): (.+)", re.S)


def verdict_parts(sentence: str) -> tuple[str | None, str]:
    """(word, rest) of a run's verdict; no word where it claims none, as held-out loss alone never does."""
    match = _VERDICT.fullmatch(sentence)
    return (match[1], match[2]) if match else (None, sentence)


def displacement(names: tuple[str, str], before: dict, after: dict) -> list[str]:
    """What became of the likelihood of chosen and rejected completions, as plain sentences; none without both sides.

    names: of the two sides. before, after: finite `eval/...` numbers of the first and the last evaluation, log-probs
    in nats a completion.
    """
    good, bad = names
    sides = [[values.get(f"eval/logps/{side}") for side in ("chosen", "rejected")] for values in (before, after)]
    if None in (*sides[0], *sides[1]):
        return []
    rose, other = sides[1][0] - sides[0][0], sides[1][1] - sides[0][1]
    said = [f"The log-prob of the {good} completions {_moved(rose)}, that of the {bad} ones {_moved(other)}."]
    share = after.get("eval/displaced")
    lost = f"{percent(share)} of the {good} completions lost likelihood. " if share is not None else ""
    if rose < 0:
        said.append(
            f"{lost}This is displacement: both sides fell, and the margin grew because the {bad} ones fell further, so "
            "the likelihood went to completions that nobody rated."
            if other < rose
            else f"{lost}The {good} completions lost likelihood, and the {bad} ones lost no more: this is not what the "
            "data asked for."
        )
        said.append(
            "A small fall is usual where the model was fine-tuned on these completions before. If the samples got "
            "worse, try a larger beta, a lower learning rate, --loss dpop or dpo_nll, or "
            f"{good} completions nearer to what the model writes."
        )
    elif rose > 0:
        said.append(f"{lost}On average there is no displacement.")
    return said


def _moved(by: float) -> str:
    if abs(by) < 0.005:
        return "did not move"
    return f"{'rose' if by > 0 else 'fell'} by {abs(by):,.2f} nats"
