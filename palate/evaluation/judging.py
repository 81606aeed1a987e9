"""How well a judge judges, how its scores are spread, and the words that say when the two no longer teach anything."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from palate.evaluation.statistics import design_effect, wilson

# An alarm is raised beyond these. The first four say that a judge gives (almost) no order any more, the last that
# something else than worth is followed: in the published run, lengths grew 1.4-fold and 1.6-fold in a round.
UNPARSED = 0.2  # of the judgements
ONE_SCORE = 0.9  # of the judgements that can be read
TIES = 0.5  # of the prompts
YIELD_FALL = 0.5  # of the first round's pairs a prompt
LENGTH_FACTOR = 1.5  # of the mean length at the start, up or down


def agreement(
    scores: Sequence[float | None], truth: Sequence[float], groups: Sequence[Any]
) -> dict[str, float | int | None]:
    """How a judge's scores agree with the truth, within groups (the completions of a prompt); None where none can say.

    pairwise: share of a group's pairs of different truth whose scores are ordered alike, equal scores as half: 1/2 is
    chance. low, high: its 95 % interval, groups as clusters. ties: share of these pairs with equal scores. exact: share
    of groups with all these pairs ordered alike. spearman: mean rank correlation of the groups where both vary.
    unparsed: share of cases without score, which are left out of all else. pairs, count: of pairs, of cases.
    Source: Yuan et al. 2024, arXiv:2401.10020, section 3.2.3.
    """
    members: dict[Any, list[tuple[float, float]]] = {}
    for score, true, group in zip(scores, truth, groups, strict=True):
        if score is not None:
            members.setdefault(group, []).append((score, true))
    outcomes: list[float] = []
    clusters: list[int] = []
    exact, correlations = [], []
    for number, cases in enumerate(members.values()):
        told = [_ordered(a, b) for a, b in combinations(cases, 2) if a[1] != b[1]]
        if told:
            outcomes += told
            clusters += [number] * len(told)
            exact.append(all(one == 1 for one in told))
            if len({score for score, _ in cases}) > 1:
                correlations.append(_spearman(cases))
    effect = design_effect(outcomes, clusters) if outcomes else 1.0
    share = wilson(sum(outcomes) / effect, len(outcomes) / effect)
    return {
        "pairwise": share.value if outcomes else None,
        "low": share.low if outcomes else None,
        "high": share.high if outcomes else None,
        "ties": outcomes.count(0.5) / len(outcomes) if outcomes else None,
        "exact": sum(exact) / len(exact) if exact else None,
        "spearman": float(np.mean(correlations)) if correlations else None,
        "unparsed": sum(score is None for score in scores) / len(scores) if scores else None,
        "pairs": len(outcomes),
        "count": len(scores),
    }


def _ordered(a: tuple[float, float], b: tuple[float, float]) -> float:
    """1 where (score, truth) of two cases are ordered alike, 0 where not, 0.5 where scores are equal."""
    return 0.5 if a[0] == b[0] else float((a[0] > b[0]) == (a[1] > b[1]))


def _spearman(cases: Sequence[tuple[float, float]]) -> float:
    """Rank correlation in [-1, 1], equal values at their mean rank. Spearman 1904, Am. J. Psychol. 15, p. 72."""
    from scipy.stats import rankdata

    scores, truth = (rankdata(column) for column in zip(*cases, strict=True))
    return float(np.corrcoef(scores, truth)[0, 1])


def histogram(scores: Sequence[int | None], most: int) -> list[int]:
    """How often each whole score from 0 to `most` was given; what could not be read is nowhere in it."""
    counts = Counter(score for score in scores if score is not None)
    return [counts[score] for score in range(most + 1)]


def alarms(row: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> list[str]:
    """What a person should worry about in a round's numbers, one sentence each; numbers that are not there say nothing.

    row: `unparsed_share` of judgements, `histogram`, `tie_share` and `pair_yield` of prompts, `length` and
    `start_length` in tokens. first: the numbers of the first round.
    """
    said = []
    if (unread := row.get("unparsed_share")) is not None and unread > UNPARSED:
        said.append(f"{unread:.0%} of the judgements have no score that can be read.")
    counts = row.get("histogram") or []
    if sum(counts) and max(counts) > ONE_SCORE * sum(counts):
        points = counts.index(max(counts))
        said.append(f"{max(counts) / sum(counts):.0%} of the scores are {points}: the judge hardly tells texts apart.")
    if (ties := row.get("tie_share")) is not None and ties > TIES:
        said.append(f"All completions are judged alike on {ties:.0%} of the prompts.")
    first = first or {}
    before, now = first.get("pair_yield"), row.get("pair_yield")
    if now is not None and (now == 0 or (before and now < YIELD_FALL * before)):
        said.append(
            f"{now:.0%} of the prompts give a pair" + (f", {before:.0%} in the first round." if before else ".")
        )
    before, now = row.get("start_length"), row.get("length")
    if before and now and not before / LENGTH_FACTOR <= now <= before * LENGTH_FACTOR:
        word = "longer" if now > before else "shorter"
        said.append(f"Completions became {word}: {now:.0f} tokens in the mean, {before:.0f} at the start.")
    return said
