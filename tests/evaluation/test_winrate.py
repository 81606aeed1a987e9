"""Head to head: counts by hand, intervals against their definition, and verdicts as right as they say."""

import math

import numpy as np
import pytest

from palate.evaluation.statistics import bootstrap_mean, design_effect, wilson
from palate.evaluation.winrate import Match, comparison, match, sentence


def draw(rng, n: int, win: float, tie: float = 0.0) -> list[float]:
    """Outcomes of a model whose win rate, ties half, is `win`."""
    return rng.choice([1.0, 0.5, 0.0], size=n, p=[win - tie / 2, tie, 1 - win - tie / 2]).tolist()


def test_a_match_by_hand():
    found = match("a", "b", "rule", [1, 1, 1, 0.5, 0])
    assert (found.n, found.wins, found.losses, found.ties) == (5, 3, 1, 1)
    assert found.win_rate == 0.7
    # Wilson's interval of 3.5 of 5, by its formula
    z = 1.959963984540054
    centre, half = 0.7 + z * z / 10, z * math.sqrt(0.7 * 0.3 / 5 + z * z / 100)
    assert found.low == pytest.approx((centre - half) / (1 + z * z / 5), abs=1e-12)
    assert found.high == pytest.approx((centre + half) / (1 + z * z / 5), abs=1e-12)
    assert found.verdict == "not shown to be different"
    assert not found.better


@pytest.mark.parametrize("tie", [0.0, 0.3, 0.9])
def test_null_matches_say_better_in_at_most_five_percent(tie):
    rng = np.random.default_rng(5)
    verdicts = [match("a", "b", "j", draw(rng, 300, 0.5, tie)).verdict for _ in range(200)]
    assert verdicts.count("better") <= 10
    assert verdicts.count("worse") <= 10


@pytest.mark.parametrize("tie", [0.0, 0.2])
def test_a_win_rate_of_sixty_percent_is_seen_with_three_hundred_prompts(tie):
    rng = np.random.default_rng(6)
    verdicts = [match("a", "b", "j", draw(rng, 300, 0.6, tie)).verdict for _ in range(400)]
    assert verdicts.count("better") >= 0.9 * 400
    assert "worse" not in verdicts


def test_several_samples_of_a_prompt_are_no_independent_cases():
    """Prompts that favour one model by nature: on the mean it is no better, and eight samples each do not hide that."""
    rng = np.random.default_rng(7)
    naive = honest = 0
    for _ in range(200):
        chance = np.repeat(rng.choice([0.1, 0.9], size=40), 8)
        outcomes, prompts = (rng.random(320) < chance).astype(float).tolist(), np.repeat(np.arange(40), 8).tolist()
        naive += match("a", "b", "j", outcomes).verdict == "better"
        honest += match("a", "b", "j", outcomes, prompts=prompts).verdict == "better"
    assert naive > 30
    assert honest <= 10


def test_design_effect_by_hand():
    assert design_effect([1, 0, 1, 0], [0, 1, 2, 3]) == 1
    # twelve clusters of two: sums of squares of 0.5, 12 / 11 and Student's 2.201 for the 11 that remain
    alike = design_effect([1, 1, 0, 0] * 3 + [1, 0] * 6, np.repeat(range(12), 2))
    assert alike == pytest.approx(min(2, (2.2009852 / 1.9599640) ** 2 * 12 / 11 * 6 / 24**2 / (0.25 / 24)))
    assert design_effect([1, 1, 0, 0], [0, 0, 1, 1]) == 2  # alike within: two cases, not four
    assert design_effect([1, 0, 0, 1], [0, 0, 1, 1]) == 1
    assert design_effect([1, 1, 1, 1], [0, 0, 1, 1]) == 2  # nothing shows that the four are independent
    assert design_effect([1, 0, 1], [0, 0, 0]) == 3


@pytest.mark.parametrize("count, each", [(1, 20), (2, 8), (3, 8), (10, 4), (30, 4)])
def test_few_prompts_with_many_samples_show_little(count, each):
    """Where every prompt has its own favourite and neither is better over all, hardly a match says better."""
    rng, better = np.random.default_rng(count), 0
    for _ in range(400):
        chance = np.repeat(rng.beta(0.3, 0.3, count), each)
        outcomes = (rng.random(len(chance)) < chance).astype(float).tolist()
        better += match("a", "b", "j", outcomes, prompts=np.repeat(range(count), each).tolist()).better
    assert better <= 0.025 * 400 + 6


@pytest.mark.parametrize("seed", range(20))
def test_b_against_a_is_the_mirror_image(seed):
    rng = np.random.default_rng(seed)
    outcomes, prompts = draw(rng, 60, rng.uniform(0.3, 0.7), 0.2), rng.integers(0, 30, 60).tolist()
    for clusters in (None, prompts):
        one = match("a", "b", "j", outcomes, prompts=clusters)
        two = match("b", "a", "j", [1 - outcome for outcome in outcomes], prompts=clusters)
        assert (two.wins, two.losses, two.ties) == (one.losses, one.wins, one.ties)
        assert {one.verdict, two.verdict} in ({"better", "worse"}, {"not shown to be different"})
        for name in ("win_rate", "low", "high", "bootstrap_low", "bootstrap_high"):
            assert getattr(two, name) == pytest.approx(getattr(one.mirrored(), name), abs=1e-15)
        assert one.mirrored().mirrored().win_rate == one.win_rate


def test_a_model_against_itself():
    found = match("a", "a", "rule", [0.5] * 300)
    assert (found.win_rate, found.verdict, found.ties) == (0.5, "not shown to be different", 300)
    assert (found.bootstrap_low, found.bootstrap_high) == (0.5, 0.5)


def test_nothing_compared_shows_nothing():
    found = match("a", "b", "rule", [])
    assert found.n == 0
    assert found.verdict == "not shown to be different"
    assert "nothing is shown" in sentence(found)


def test_the_bootstrap_interval_is_that_of_drawn_rows():
    rng = np.random.default_rng(8)
    scores = np.array(draw(rng, 120, 0.62, 0.1))
    low, high = bootstrap_mean(scores, resamples=20_000)
    means = scores[rng.integers(0, 120, (20_000, 120))].mean(1)  # the definition
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.006)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.006)
    assert (low, high) == bootstrap_mean(scores[::-1], resamples=20_000)
    assert bootstrap_mean(-scores, resamples=20_000) == (-high, -low)


def test_the_bootstrap_interval_covers():
    rng = np.random.default_rng(9)
    hits = 0
    for _ in range(300):
        low, high = bootstrap_mean(draw(rng, 200, 0.65, 0.2), resamples=1000)
        hits += low <= 0.65 <= high
    assert 0.92 <= hits / 300 <= 0.98


def test_wilson_of_an_effective_count():
    assert wilson(30, 100).low == pytest.approx(wilson(30.0, 100.0).low)
    assert wilson(15, 50).low < wilson(30, 100).low


@pytest.mark.parametrize(
    "outcomes, words",
    [
        ([1.0] * 30, "new is better than old: it wins 100.0% [88.6%, 100.0%] of 30 comparisons, judged by rule"),
        ([0.0] * 30, "new is worse than old: it wins 0.0% [0.0%, 11.4%] of 30 comparisons, judged by rule"),
        (
            [1.0, 0.0, 0.5, 0.5],
            "new is not shown to be different from old: it wins 50.0% [15.0%, 85.0%] of 4 comparisons, "
            "50.0% ties counted half, judged by rule",
        ),
    ],
)
def test_the_sentence_begins_with_the_verdict(outcomes, words):
    assert sentence(match("new", "old", "rule", outcomes)) == words


def test_the_record_of_a_comparison():
    examples = [{"prompt": "p", "before": "x", "after": "y", "score_before": 0.0, "score_after": 1.0}]
    record = comparison(match("new", "old", "rule", [1.0]), examples, kl=0.5, length={"before": 3.0, "after": 4.0})
    assert {*record} == {*Match.__dataclass_fields__} | {"kl", "length", "reward", "examples"}
    assert (record["wins"], record["kl"], record["reward"], record["examples"]) == (1, 0.5, None, examples)


def test_an_outcome_is_one_of_three():
    with pytest.raises(ValueError, match=r"1, 0\.5 or 0"):
        match("a", "b", "j", [0.7])
