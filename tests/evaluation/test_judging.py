"""How well a judge judges: numbers worked by hand, chance, constants, and what raises an alarm."""

import numpy as np
import pytest

from palate.evaluation.judging import agreement, alarms, histogram


def test_numbers_worked_by_hand():
    #        group a: right, right, tie in score; group b: wrong, and one that cannot be read
    scores = [3.0, 2.0, 2.0, 1.0, 4.0, None]
    truth = [5, 3, 1, 2, 1, 0]
    found = agreement(scores, truth, [*"aaabbb"])
    assert found["pairs"] == 4 and found["count"] == 6
    assert found["pairwise"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert found["ties"] == 1 / 4 and found["unparsed"] == 1 / 6
    assert found["exact"] == 0
    assert found["spearman"] == pytest.approx((np.sqrt(3) / 2 - 1) / 2)  # ranks 3, 1.5, 1.5 against 3, 2, 1; then -1
    assert found["low"] < found["pairwise"] < found["high"]


def test_a_judge_who_knows_the_truth_and_one_who_says_the_opposite():
    truth = [1, 2, 3, 3, 0, 1]
    right = agreement([0.1, 0.2, 0.3, 0.4, -5.0, 7.0], truth, [*"aaaabb"])
    assert (right["pairwise"], right["exact"], right["ties"]) == (1, 1, 0)  # pairs of equal truth are not asked about
    wrong = agreement([-value for value in truth], truth, [*"aaaabb"])
    assert (wrong["pairwise"], wrong["exact"], wrong["spearman"]) == (0, 0, -1)


def test_a_constant_judge_is_chance_and_one_of_no_words_is_nothing():
    constant = agreement([4.0] * 6, [1, 2, 3, 1, 2, 3], [*"aaabbb"])
    assert (constant["pairwise"], constant["ties"], constant["exact"], constant["spearman"]) == (0.5, 1, 0, None)
    silent = agreement([None] * 3, [1, 2, 3], [*"aaa"])
    assert silent["pairwise"] is None and silent["exact"] is None and silent["unparsed"] == 1
    assert agreement([], [], [])["count"] == 0
    assert agreement([1.0, 2.0], [3, 3], [*"aa"])["pairwise"] is None  # nothing is better than anything


def test_a_judge_of_chance_lies_around_one_half_with_groups_as_clusters():
    random = np.random.default_rng(0)
    truth = random.integers(0, 6, 2000).tolist()
    scores = random.random(2000).tolist()
    groups = [n // 4 for n in range(2000)]
    found = agreement(scores, truth, groups)
    assert found["low"] < 0.5 < found["high"] and abs(found["spearman"]) < 0.1
    twice = agreement([*scores] * 2, [*truth] * 2, [*groups] * 2)  # the same cases again are no new evidence
    assert twice["high"] - twice["low"] > 0.8 * (found["high"] - found["low"])


def test_a_histogram_counts_what_could_be_read():
    assert histogram([0, 5, 5, None, 3], 5) == [1, 0, 0, 1, 0, 2]
    assert histogram([None], 5) == [0] * 6


HEALTHY = {
    "unparsed_share": 0.02, "histogram": [1, 2, 5, 9, 20, 12], "tie_share": 0.1, "pair_yield": 0.85, "length": 30.0,
    "start_length": 30.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, word",
    [
        ({"unparsed_share": 0.21}, "21% of the judgements have no score"),
        ({"unparsed_share": 1.0, "histogram": [0] * 6}, "100% of the judgements have no score"),
        ({"histogram": [0, 0, 0, 0, 95, 5]}, "95% of the scores are 4"),
        ({"tie_share": 0.6}, "judged alike on 60%"),
        ({"pair_yield": 0.4}, "40% of the prompts give a pair, 85% in the first round"),
        ({"pair_yield": 0.0}, "0% of the prompts give a pair"),
        ({"length": 46.0}, "longer: 46 tokens in the mean, 30 at the start"),
        ({"length": 19.0}, "shorter: 19 tokens"),
    ],
)
def test_each_collapse_raises_its_alarm_alone(change, word):
    assert alarms(HEALTHY) == alarms(HEALTHY, HEALTHY) == []
    (said,) = alarms(HEALTHY | change, HEALTHY)
    assert word in said


def test_what_is_not_known_raises_none():
    assert alarms({}) == alarms(dict.fromkeys(HEALTHY), HEALTHY) == []
    assert alarms({"pair_yield": 0.2, "length": 90.0}) == []  # there was no round before
