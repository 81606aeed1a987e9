"""Retention numbers against values worked by hand, and the flags on either side of their thresholds."""

import pytest

from palate.evaluation import retention
from palate.evaluation.retention import completion_numbers, displaced, distinct, flags, nats_per_token, repetition


def test_distinct_by_hand():
    texts = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct(texts, 1) == 3 / 7
    assert distinct(texts, 2) == 3 / 5  # 12 21 12 | 12 23: three kinds of five
    assert distinct(texts, 3) == 3 / 3  # 121 212 | 123
    assert distinct([[1, 2]], 3) is None
    assert distinct([], 1) is None
    assert distinct([[7]], 1) == 1.0


def test_repetition_by_hand():
    loop = [5, 5, 5, 5, 5, 5]  # three 4-grams of one kind
    assert repetition([loop]) == pytest.approx(2 / 3)
    assert repetition([[1, 2, 3, 4, 5]]) == 0.0
    assert repetition([loop, [1, 2, 3, 4, 5]]) == pytest.approx(1 / 3)
    assert repetition([[1, 2]]) == 0.0
    assert repetition([[1, 1, 1]], n=2) == pytest.approx(1 / 2)
    assert repetition([]) is None
    assert repetition([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.0  # within a completion, not among them


def test_likelihood_and_displacement_by_hand():
    assert nats_per_token([-3.0, -1.0], [4, 4]) == 0.5
    assert nats_per_token([], []) is None
    assert displaced([-1.0, -2.0, -3.0, -4.0], [-1.5, -2.0, -2.0, -4.5]) == 0.5  # equal is not fallen
    assert displaced([], []) is None


def test_numbers_of_completions():
    found = completion_numbers([[1, 2, 3], [4]], [True, False])
    assert found == {
        "distinct-1": 1.0,
        "distinct-2": 1.0,
        "distinct-3": 1.0,
        "repetition": 0.0,
        "length": 2.0,
        "finished": 0.5,
    }
    assert completion_numbers([], []) == {}


WELL = {
    "loss": 1.0,
    "chosen": 1.5,
    "displaced": 0.0,
    "drift": 0.0,
    "distinct-2": 0.6,
    "repetition": 0.02,
    "finished": 1.0,
    "length": 20.0,
}
EPSILON = 1e-6
RULES = {
    "loss": (1.0 + retention.LOSS_RISE, 1, "demonstrations"),
    "drift": (retention.DRIFT, 1, "wrote before"),
    "distinct-2": (0.6 * (1 - retention.DISTINCT_FALL), -1, "alike"),
    "repetition": (0.02 + retention.REPETITION_RISE, 1, "repeat"),
    "finished": (1 - retention.FINISHED_FALL, -1, "come to an end"),
    "length": (20 * retention.LENGTH_FACTOR, 1, "longer"),
}


def test_nothing_changed_and_nothing_is_flagged():
    assert flags(WELL, WELL) == []
    assert flags({}, {}) == []


@pytest.mark.parametrize("name", RULES)
def test_each_flag_at_its_threshold(name):
    limit, sign, word = RULES[name]
    assert flags(WELL, WELL | {name: limit - sign * EPSILON}) == []
    (sentence,) = flags(WELL, WELL | {name: limit + sign * EPSILON})
    assert word in sentence
    assert sentence[0].isupper() and sentence.endswith(".")


def test_shorter_is_flagged_too():
    (sentence,) = flags(WELL, WELL | {"length": 20 / retention.LENGTH_FACTOR - EPSILON})
    assert "shorter" in sentence


def test_displacement_needs_most_completions_and_much_likelihood():
    much, little = {"chosen": 1.5 + retention.CHOSEN_RISE + EPSILON}, {"chosen": 1.5 + retention.CHOSEN_RISE - EPSILON}
    assert len(flags(WELL, WELL | much | {"displaced": 0.9})) == 1
    assert flags(WELL, WELL | much | {"displaced": 0.5}) == []
    assert flags(WELL, WELL | little | {"displaced": 1.0}) == []


def test_what_is_not_finite_is_flagged():
    (sentence,) = flags(WELL, WELL | {"loss": None})
    assert "Not finite" in sentence and "loss" in sentence
    assert flags(WELL | {"loss": None}, WELL) == []
    (sentence,) = flags(WELL, WELL | {"distinct-2": None, "length": 0.0})  # nothing is written any more
    assert "shorter" in sentence
