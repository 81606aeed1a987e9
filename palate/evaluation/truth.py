"""A reward model where the true reward is known: the best that there is, and how far below it stands."""

from collections.abc import Mapping, Sequence

import numpy as np

from palate.data.records import PreferencePair, Ranking, Text
from palate.data.tokens import TokenGroup
from palate.evaluation.calibration import sigma
from palate.evaluation.statistics import bootstrap_mean
from palate.sampling.judge import Completion, Judge


def true_margins(judge: Judge, records: Mapping[str, PreferencePair | Ranking], groups: Sequence[TokenGroup]) -> list:
    """Better minus worse score by the judge of every preference of the groups, in their order.

    records: by the text of their source, whole as people wrote them; every completion has ended.
    """
    ours = [records[str(group.source)] for group in groups]
    cases = [(record.prompt, text) for record in ours for text in _completions(record)]
    scores = iter(judge.scores([prompt for prompt, _ in cases], [Completion(_said(text)) for _, text in cases]))
    margins = []
    for record, group in zip(ours, groups, strict=True):
        found = [next(scores) for _ in _completions(record)]
        margins += [found[better] - found[worse] for better, worse in group.preferences]
    return margins


def _completions(record: PreferencePair | Ranking) -> tuple[Text, ...]:
    return record.completions if isinstance(record, Ranking) else (record.chosen, record.rejected)


def _said(text: Text) -> str:
    return text if isinstance(text, str) else "\n\n".join(message.content for message in text)


def against_truth(margins: Sequence[float] | np.ndarray, true: Sequence[float] | np.ndarray) -> dict[str, float]:
    """What is lost to the truth on pairs whose labels follow Bradley and Terry; means over the pairs.

    margins: chosen minus rejected reward, as learnt; true: the same by the true reward, both in nats of log-odds.
    accuracy, loss: of the truth itself, E max(p, 1 - p) and E H(p), which no model beats in the mean. lost: accuracy
    below it, with the ends of its 95 % interval over pairs; excess: loss above it, E KL(p || sigma(margin)). Neither
    has the labels' noise in it: a pair counts with the probability of its labels, not with the one that was drawn.
    Source: METHODS 8.22.
    """
    found, true = np.asarray(margins, dtype=np.float64), np.asarray(true, dtype=np.float64)
    p = sigma(true)
    costs = np.abs(2 * p - 1) * np.where(found == 0, 0.5, found * true < 0)
    low, high = bootstrap_mean(costs)
    floor = p * np.logaddexp(0, -true) + (1 - p) * np.logaddexp(0, true)
    loss = p * np.logaddexp(0, -found) + (1 - p) * np.logaddexp(0, found)
    return {
        "accuracy": float(np.maximum(p, 1 - p).mean()),
        "lost": float(costs.mean()),
        "lost_low": low,
        "lost_high": high,
        "loss": float(floor.mean()),
        "excess": float((loss - floor).mean()),
    }
