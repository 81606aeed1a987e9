"""Whether format alone tells two sides of pairs apart: lengths, the end token, the first and last character.

Where it does, a policy learns the format instead of the content: an end token that one side lacks, a template that
only one side went through, completions that were cut. METHODS sections 4 and 7.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from palate.data.tokens import TokenGroup, decode_completion, end_tokens
from palate.evaluation.statistics import Share, wilson
from palate.sampling.pairing import Candidate

FOLDS = 10
_LAST = ("letter", "digit", "stop", "other mark", "space", "nothing")


@dataclass(frozen=True)
class Told:
    """accuracy: of telling by format which of two completions stands on the first side, on pairs not learnt from; 0.5
    is chance. by: the one feature that tells most alone, None unless accuracy's interval lies above one half."""

    accuracy: Share
    by: str | None


def told_apart(pairs: Sequence[tuple[Candidate, Candidate]], seed: int = 0) -> Told:
    """How well a linear classifier on features that say nothing of content tells the sides of pairs apart.

    A logistic regression on the difference of two completions' features, as a preference loss compares them, with a
    ridge; by 10-fold cross-validation, ties half. pairs: of one prompt each; (nan, 0, 1) for fewer than two.
    seed: of the folds.
    """
    if len(pairs) < 2:
        return Told(wilson(0, 0), None)
    sides = [side for pair in pairs for side in pair]
    columns = features(sides)
    table = np.stack(list(columns.values()), axis=1)
    differences = table[0::2] - table[1::2]  # (P, F)
    folds = np.random.default_rng(seed).permutation(len(pairs)) % min(FOLDS, len(pairs))
    margins = np.empty(len(pairs))
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        margins[held] = differences[held] @ _fit(differences[~held])
    accuracy = wilson(_right(margins), len(pairs))
    alone = {name: abs(_right(differences[:, i]) / len(pairs) - 0.5) for i, name in enumerate(columns)}
    return Told(accuracy, max(alone, key=lambda name: alone[name]) if accuracy.low > 0.5 else None)


def seen(group: TokenGroup, tokenizer) -> tuple[Candidate, ...]:
    """The completions of a group as training sees them, after the template and all cuts."""
    ends, made = end_tokens(tokenizer), []
    for ids, spans in zip(group.completions, group.spans, strict=True):
        ids = ids[: spans[-1][1]]
        finished = int(ids[-1]) in ends
        text = decode_completion(tokenizer, group.prompt, ids[:-1] if finished else ids)
        made.append(Candidate(text, finished, len(ids)))
    return tuple(made)


def features(completions: Sequence[Candidate]) -> dict[str, np.ndarray]:
    """Name to one number a completion, (S,) float64; none depends on which words are used."""
    tokens = np.log1p([one.tokens for one in completions])
    characters = np.log1p([len(one.text) for one in completions])
    kinds = [_last(one.text) for one in completions]
    starts = [one.text.lstrip()[:1] for one in completions]
    found = {
        "end token": [one.finished for one in completions],
        "tokens": tokens,
        "tokens, far from their mean": (tokens - tokens.mean()) ** 2,
        "characters": characters,
        "characters, far from their mean": (characters - characters.mean()) ** 2,
        "space at the start": [one.text[:1].isspace() for one in completions],
        "space at the end": [one.text[-1:].isspace() for one in completions],
        "line breaks": np.log1p([one.text.count("\n") for one in completions]),
        "capital at the start": [start.isupper() for start in starts],
        "letter at the start": [start.isalpha() for start in starts],
    }
    found |= {f"last character: {kind}": [one == kind for one in kinds] for kind in _LAST}
    return {name: np.asarray(column, dtype=np.float64) for name, column in found.items()}


def _last(text: str) -> str:
    end = text[-1:]
    tests = (end.isalpha(), end.isdigit(), end in (*".!?…。！？",), end and not end.isspace(), end.isspace(), True)
    return next(kind for kind, test in zip(_LAST, tests, strict=True) if test)


def _fit(differences: np.ndarray, ridge: float = 1.0, rounds: int = 25) -> np.ndarray:
    """(F,) weights of a logistic regression without intercept in which every row (P, F) is a "yes": Newton's steps.

    ridge: on the weights of columns scaled to a root mean square of 1, so that it is worth one pair.
    """
    scale = np.sqrt((differences**2).mean(0))
    scale[scale == 0] = np.inf  # a column that never differs tells nothing
    rows = differences / scale
    weights = np.zeros(rows.shape[1])
    for _ in range(rounds):
        chance = 1 / (1 + np.exp(rows @ weights))  # of being wrong
        gradient = ridge * weights - rows.T @ chance
        curvature = (rows * (chance * (1 - chance))[:, None]).T @ rows + ridge * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-8:
            break
    return weights / scale


def _right(margins: np.ndarray) -> float:
    """How many are above zero, a tie half."""
    return float((margins > 0).sum() + (margins == 0).sum() / 2)
