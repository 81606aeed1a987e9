"""Samples and scores to preference pairs: which is chosen, which rejected, or why a prompt has no pair.

A completion that did not end is no side of a pair: written to a file it would get an end token that nobody sampled.
One without a score, because nobody judged it or the judgement could not be read, is no side of a pair that is made by
scores: a score by default would make it the rejected one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from palate.data.records import Demonstration, Message, PreferencePair, Source, Text, plain
from palate.errors import UsageError

REASONS = ("unfinished", "empty", "same text", "unparsed", "ties")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sampled completion.

    finished: whether it ended with an end token. tokens: its length. score: larger is better; None: not judged, or the
    judgement could not be read.
    """

    text: str
    finished: bool
    tokens: int
    score: float | None = None

    @property
    def unfit(self) -> str | None:
        """Why it is no side of any pair, whatever its score; None where it may be one."""
        return unfit(self.text, self.finished)


@dataclass(frozen=True)
class Pairing:
    """The pairs, in the order of their prompts. counts: how many prompts have none, by every one of REASONS."""

    pairs: tuple[PreferencePair, ...]
    counts: dict[str, int]


def unfit(text: str, finished: bool) -> str | None:
    """Why a completion is no side of any pair, whatever its score; None where it may be one."""
    if not finished:
        return "unfinished"
    says = text.strip() and "\0" not in text  # a reader of preference files refuses the rest
    return None if says else "empty"


def against_demonstration(demonstration: Demonstration, candidate: Candidate) -> PreferencePair | str:
    """The demonstration against a sample of its prompt, or the reason why there is no pair. Scores are not read.

    Of a conversation that goes on the first reply is taken, which is the one that the sample answers with.
    Source: Chen et al. 2024 (SPIN), arXiv:2401.01335, algorithm 1.
    """
    shown, prompt = demonstration.completion, demonstration.prompt
    chosen = shown if isinstance(shown, str) else shown[:1]
    return candidate.unfit or _pair(prompt, chosen, reply(prompt, candidate.text), demonstration.source)


def best_and_worst(
    prompt: Text, candidates: Sequence[Candidate], band: float | None = None, source: Source | None = None
) -> PreferencePair | str:
    """The highest score against the lowest, or the reason why there is no pair, such as that all scores are equal.

    Of equal scores the first is taken. margin: the difference of the two scores.
    band: in [0, 0.5), length control: the shortest of those whose score is within this share of the scores' range from
        the highest, against the longest of those as near to the lowest.
    Source: Yuan et al. 2024, arXiv:2401.10020 (Self-Rewarding); band: Wu et al. 2024, arXiv:2407.19594.
    """
    if band is not None and not 0 <= band < 0.5:
        raise UsageError(f"a band is a share from 0 to below one half, not {band}", code="E307")
    finished = [one for one in candidates if one.finished]
    said = [one for one in finished if one.unfit is None]
    scored = [(one.score, one) for one in said if one.score is not None]
    for left, reason in ((finished, "unfinished"), (said, "empty"), (scored, "unparsed")):
        if len(left) < 2:
            return reason
    if len({one.text for _, one in scored}) == 1:
        return "same text"
    high, low = max(score for score, _ in scored), min(score for score, _ in scored)
    if high == low:
        return "ties"
    near = (high - low) * (band or 0.0)
    top = [case for case in scored if case[0] >= high - near]
    bottom = [case for case in scored if case[0] <= low + near]
    if band is not None:
        top.sort(key=lambda case: case[1].tokens)
        bottom.sort(key=lambda case: -case[1].tokens)
    (best, chosen), (worst, rejected) = top[0], bottom[0]
    return _pair(prompt, reply(prompt, chosen.text), reply(prompt, rejected.text), source, best - worst)


def strong_and_weak(
    prompt: Text, strong: Candidate, weak: Candidate, source: Source | None = None
) -> PreferencePair | str:
    """A sample of the stronger model against one of the weaker, or why there is no pair. Scores are not read."""
    sides = reply(prompt, strong.text), reply(prompt, weak.text)
    return strong.unfit or weak.unfit or _pair(prompt, *sides, source)


def pairing(results: Iterable[PreferencePair | str]) -> Pairing:
    """What the functions above gave for each prompt, collected."""
    pairs, counts = [], dict.fromkeys(REASONS, 0)
    for result in results:
        if isinstance(result, str):
            counts[result] += 1
        else:
            pairs.append(result)
    return Pairing(tuple(pairs), counts)


def row(pair: PreferencePair) -> dict[str, Any]:
    """The pair as a row of a preference file, which `palate.data.sources.read_pairs` reads back as the same pair."""
    sides = {"prompt": plain(pair.prompt), "chosen": plain(pair.chosen), "rejected": plain(pair.rejected)}
    return sides if pair.margin is None else sides | {"margin": pair.margin}


def reply(prompt: Text, text: str) -> Text:
    """A sampled text as the completion of its prompt: a string, or in a conversation the assistant's turn."""
    return text if isinstance(prompt, str) else (Message("assistant", text),)


def _pair(prompt, chosen: Text, rejected: Text, source, margin: float | None = None) -> PreferencePair | str:
    return "same text" if chosen == rejected else PreferencePair(prompt, chosen, rejected, source, margin)
