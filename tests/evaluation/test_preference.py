"""Held-out numbers: the interval of a share counts prompts, not rows that repeat each other."""

import numpy as np
import pytest

from palate.data.tokens import TokenGroup
from palate.evaluation.preference import evaluate
from palate.evaluation.statistics import design_effect, wilson
from palate.train.objectives import pairwise


def groups(count):
    """Random ones, each with a prompt of its own."""
    draw = np.random.default_rng(0)
    made = []
    for i in range(count):
        texts = tuple(draw.integers(3, 90, size=n) for n in draw.integers(2, 6, size=2))
        spans = tuple(((0, len(ids)),) for ids in texts)
        prompt = np.array([1, 3 + i, 5 + i])
        scores = tuple(draw.normal(-20, 3, 2).tolist())
        made.append(TokenGroup(prompt, texts, spans, preferences=((0, 1),), reference=scores))
    return made


def interval(found, name="rewards/accuracies"):
    return found[f"eval/{name}_low"], found[f"eval/{name}_high"]


def test_pairs_with_prompts_of_their_own_have_wilsons_interval(tiny_llama):
    found = evaluate(tiny_llama(3), groups(40), pairwise("dpo"), tokens=64)
    for name in ("rewards/accuracies", "logps/accuracies"):
        assert 0 < found[f"eval/{name}"] < 1
        share = wilson(found[f"eval/{name}"] * 40, 40)
        assert interval(found, name) == pytest.approx((share.low, share.high))


def test_pairs_of_one_prompt_are_no_independent_cases(tiny_llama):
    """Every pair four times says as much as once; and a prompt's pairs are found wherever they stand in the file."""
    model, once = tiny_llama(3), groups(40)
    plain, four = (evaluate(model, rows, pairwise("dpo"), tokens=64) for rows in (once, once * 4))
    assert four["eval/rewards/accuracies"] == pytest.approx(plain["eval/rewards/accuracies"])
    hits = np.array([1.0] * round(plain["eval/rewards/accuracies"] * 40) + [0.0] * 40)[:40]
    effect = design_effect(np.tile(hits, 4), np.tile(np.arange(40), 4))
    share = wilson(hits.sum() * 4 / effect, 160 / effect)
    assert interval(four) == pytest.approx((share.low, share.high))
    assert interval(four) == pytest.approx(interval(plain), abs=0.01)
    assert interval(four)[0] <= interval(plain)[0] and interval(four)[1] >= interval(plain)[1]
