"""The first screen: what run.json and comparison.json concluded, word for word, and the figures to see at once."""

from dataclasses import dataclass

from palate.report import words
from palate.report.reading import Comparison, Reading

_HOW = {"failed": "This run failed", "interrupted": "This run was interrupted", "running": "This run is not over"}
_TONES = {"better": "better", "worse": "worse"}


@dataclass(frozen=True)
class Verdict:
    """The first thing on the page. tone: better, worse, open or broken, which gives the colour.

    interval: (value, low, high) of a share, drawn against one half; ends: what its two ends mean. more: what else is
    known, in sentences.
    """

    word: str
    tone: str
    sentence: str
    interval: tuple[float, float, float] | None = None
    ends: tuple[str, str] = ("", "")
    more: tuple[str, ...] = ()


def verdict(run: Reading) -> Verdict:
    """What the run and its comparison concluded; the page concludes nothing of its own.

    A comparison speaks first, the run's own verdict after it; a run that did not come to its end has none.
    """
    found, own = run.comparison, run.record.verdict
    if found is not None:
        bar = (found.win_rate, found.low, found.high)
        return Verdict(
            found.verdict.capitalize(),
            _TONES.get(found.verdict, "open"),
            comparison_sentence(found),
            interval=None if None in bar else bar,
            ends=(f"{found.b} preferred", f"{found.a} preferred"),
            more=(f"The run's own verdict, from held-out data: {full(own)}",) if own else (),
        )
    if run.status != "done":
        return Verdict(run.status.capitalize(), "broken", "There is no verdict: the run did not come to its end.")
    if own is None:
        return Verdict("", "open", "The run recorded no verdict.")
    word, rest = words.verdict_parts(own)
    if word is None:
        return Verdict("", "open", full(own))
    key = "eval/rewards/accuracies"
    bar = tuple(run.after.get(f"{key}{end}") for end in ("", "_low", "_high"))
    return Verdict(
        word.capitalize(),
        _TONES.get(word, "open"),
        full(rest),
        interval=None if None in bar else bar,
        ends=("rejected preferred", "chosen preferred"),
    )


def comparison_sentence(found: Comparison) -> str:
    """The comparison in plain words."""
    if not found.n:
        return f"{found.a} and {found.b} were not compared: there is no prompt, so nothing is shown."
    ties = f"; ties, {words.percent(found.ties / found.n)}, count half" if found.ties else ""
    rate = f"{words.percent(found.win_rate)} {words.interval(found.low, found.high)}".strip()
    of = words.plural(found.n, "comparison")
    return f"Judged by {found.judge}, {found.a} wins {rate} of {of} with {found.b}{ties}."


def banner(run: Reading) -> str:
    """How far a run came that has not ended; empty for one that has."""
    if run.status == "done":
        return ""
    of = f" of {run.planned:,}" if run.planned else ""
    how = _HOW.get(run.status, f"This run is {run.status}")
    return f"{how} after step {run.last_step:,}{of}. What follows is the run so far."


@dataclass(frozen=True)
class Tile:
    """A figure that should be seen at once."""

    label: str
    value: str
    detail: str = ""


def tiles(run: Reading) -> list[Tile]:
    """The figures under the verdict, those that the run has."""
    found, before, after, made = run.comparison, run.before, run.after, []
    if found is not None and found.win_rate is not None:
        made.append(Tile("Win rate", words.percent(found.win_rate), words.interval(found.low, found.high)))
    key = "eval/rewards/accuracies"
    if key in after:
        spread = words.interval(after.get(f"{key}_low"), after.get(f"{key}_high"))
        made.append(Tile("Held-out accuracy", words.percent(after[key]), spread))
    if "eval/rewards/margins" in after:
        margin = words.number(after["eval/rewards/margins"], ".3f")
        made.append(Tile("Held-out margin", margin, "{} minus {} reward".format(*run.sides)))
    elif "eval/reward" in after:
        began = f"from {words.number(before['eval/reward'], '.3f')}" if "eval/reward" in before else ""
        made.append(Tile("Held-out reward", words.number(after["eval/reward"], ".3f"), began))
    elif "eval/loss" in after:
        began = f"from {words.number(before['eval/loss'])}" if "eval/loss" in before else ""
        made.append(Tile("Held-out loss", words.number(after["eval/loss"]), began))
    kl = found.kl if found is not None else after.get("eval/kl") if "eval/reward" in after else None
    if kl is not None:
        made.append(Tile("KL from the start", words.number(kl, ".2f"), "nats a completion"))
    if found is not None and found.length is not None:
        was = words.number(found.length.before, ".1f")
        made.append(Tile("Length", words.number(found.length.after, ".1f"), f"tokens, {was} before"))
    if run.seconds:
        made.append(Tile("Time in steps", words.duration(run.seconds), words.plural(run.last_step, "step")))
    return made


def full(sentence: str) -> str:
    """A sentence with a capital and a full stop."""
    sentence = sentence.strip()
    return f"{sentence[:1].upper()}{sentence[1:]}{'' if sentence.endswith('.') else '.'}"
