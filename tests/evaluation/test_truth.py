"""What a reward model loses to a true reward: by hand, by simulated labels, and for records as they are read."""

import math

import numpy as np
import pytest

from palate.data.records import Message, PreferencePair, Ranking
from palate.data.tokens import TokenGroup
from palate.evaluation.truth import against_truth, true_margins
from palate.sampling.judge import Judge


def sigma(x):
    return 1 / (1 + math.exp(-x))


def test_by_hand():
    true, found = [2.0, -1.0, 0.0, 3.0], [0.5, 1.0, -4.0, 0.0]
    seen = against_truth(found, true)
    assert seen["accuracy"] == pytest.approx((sigma(2) + sigma(1) + 0.5 + sigma(3)) / 4)
    assert seen["lost"] == pytest.approx(((2 * sigma(1) - 1) + (2 * sigma(3) - 1) / 2) / 4)  # a tie is right by half
    entropy = [-sum(q * math.log(q) for q in (sigma(t), 1 - sigma(t))) for t in true]
    assert seen["loss"] == pytest.approx(sum(entropy) / 4)
    cross = [-sigma(t) * math.log(sigma(f)) - sigma(-t) * math.log(sigma(-f)) for t, f in zip(true, found, strict=True)]
    assert seen["excess"] == pytest.approx((sum(cross) - sum(entropy)) / 4)
    assert 0 <= seen["lost_low"] <= seen["lost"] <= seen["lost_high"]


def test_the_truth_loses_nothing_and_extremes_stay_finite():
    true = np.array([-900.0, -2.0, 0.0, 0.3, 900.0])
    seen = against_truth(true, true)
    assert seen["lost"] == seen["lost_high"] == 0 and seen["excess"] == pytest.approx(0, abs=1e-12)
    worst = against_truth(-true, true)
    assert worst["lost"] == pytest.approx(2 * seen["accuracy"] - 1) and math.isfinite(worst["excess"])


def test_it_is_what_drawn_labels_show_in_the_mean():
    draw = np.random.default_rng(0)
    true = draw.normal(size=400) * 2
    found = true + draw.normal(size=400) * 2
    seen = against_truth(found, true)
    accuracy, loss, best, floor = [], [], [], []
    for _ in range(400):
        sign = np.where(draw.random(400) < 1 / (1 + np.exp(-true)), 1, -1)
        accuracy.append((found * sign > 0).mean())
        best.append((true * sign > 0).mean())
        loss.append(np.logaddexp(0, -found * sign).mean())
        floor.append(np.logaddexp(0, -true * sign).mean())
    assert np.mean(best) == pytest.approx(seen["accuracy"], abs=0.004)
    assert np.mean(best) - np.mean(accuracy) == pytest.approx(seen["lost"], abs=0.004)
    assert np.mean(floor) == pytest.approx(seen["loss"], abs=0.004)
    assert np.mean(loss) - np.mean(floor) == pytest.approx(seen["excess"], abs=0.01)


def test_records_are_scored_as_people_wrote_them():
    ids = np.array([3], dtype=np.int32)
    spans = (((0, 1),),)
    said = (Message("assistant", "three"),)
    records = {
        "a": PreferencePair("p", "one", ""),
        "b": PreferencePair((Message("user", "q"),), said, (Message("assistant", "a"),)),
        "c": Ranking("p", ("four", "fo", "f"), ((0, 1), (0, 2), (1, 2))),
    }
    groups = [TokenGroup(ids, (ids,) * 2, spans * 2, preferences=((0, 1),), source=name) for name in "ab"] + [
        TokenGroup(ids, (ids,) * 3, spans * 3, preferences=records["c"].preferences, source="c")
    ]
    asked = []

    def score(prompts, completions):
        asked.extend(prompts)
        assert all(completion.finished for completion in completions)
        return [len(completion.text) for completion in completions]

    assert true_margins(Judge("length", score=score), records, groups[::-1]) == [2, 3, 1, 4, 3]
    assert asked[-1] == "p" and (Message("user", "q"),) in asked
