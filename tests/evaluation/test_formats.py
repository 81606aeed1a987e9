"""What format alone tells: chance where sides are alike, all where one lacks its end token, and no word of content."""

import numpy as np
import pytest

from palate.data.records import PreferencePair
from palate.data.tokens import tokenize_pair
from palate.evaluation.formats import _fit, features, seen, told_apart
from palate.sampling.pairing import Candidate

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon")


def drawn(draw, low: int = 3, high: int = 12, end: str = ".", finished: bool = True) -> Candidate:
    words = draw.choice(WORDS, size=draw.integers(low, high))
    return Candidate(" ".join(words) + end, finished, len(words) + 1)


def pairs(count: int, seed: int = 0, **second) -> list[tuple[Candidate, Candidate]]:
    draw = np.random.default_rng(seed)
    return [(drawn(draw), drawn(draw, **second)) for _ in range(count)]


def test_sides_of_one_format_are_told_apart_by_chance_alone():
    """Nothing to tell: the interval covers one half about as often as it says, over fresh sides."""
    found = [told_apart(pairs(120, seed)) for seed in range(60)]
    assert abs(np.mean([one.accuracy.value for one in found]) - 0.5) < 0.02
    assert sum(one.accuracy.low <= 0.5 <= one.accuracy.high for one in found) >= 52
    assert sum(one.by is not None for one in found) <= 5


@pytest.mark.parametrize(
    "second, by",
    [
        ({"finished": False}, "end token"),
        ({"end": ".\n"}, "line breaks"),
        ({"end": ""}, "last character: stop"),
        ({"end": ". "}, "space at the end"),
        ({"low": 14, "high": 15}, "tokens"),
    ],
)
def test_one_difference_in_format_tells_all(second, by):
    """The traps of self-play: an end token that only one side has, a tail that its template adds, a cut."""
    told = told_apart(pairs(100, **second))
    assert told.accuracy.value > 0.97 and told.accuracy.low > 0.9
    columns = features([side for pair in pairs(100, **second) for side in pair])
    difference = (columns[by][0::2] - columns[by][1::2]) != 0
    assert difference.all() and told.by is not None


def test_a_missing_end_token_is_named():
    assert told_apart(pairs(100, finished=False)).by == "end token"


def test_some_difference_tells_some():
    """Shorter samples by a third: the accuracy lies between chance and certainty."""
    told = told_apart(pairs(400, low=2, high=8))
    assert 0.6 < told.accuracy.value < 0.9


def test_a_wider_spread_of_one_mean_is_told():
    draw = np.random.default_rng(0)
    lengths = [(10, int(draw.choice([4, 25]))) for _ in range(200)]  # of one geometric mean
    made = [(Candidate("a" * a, True, a), Candidate("a" * b, True, b)) for a, b in lengths]
    assert told_apart(made).accuracy.value > 0.97


def test_content_says_nothing():
    draw = np.random.default_rng(0)
    made = []
    for _ in range(200):
        n = int(draw.integers(3, 12))
        made.append((Candidate("good " * n + ".", True, n), Candidate("evil " * n + ".", True, n)))
    told = told_apart(made)
    assert told.accuracy.value == 0.5 and told.by is None


def test_exchanged_sides_are_told_as_well():
    made = pairs(80, finished=False)
    turned = [(second, first) for first, second in made]
    assert told_apart(made).accuracy == told_apart(turned).accuracy
    alike = pairs(80)
    assert told_apart(alike, seed=1) == told_apart(alike, seed=1)


def test_few_pairs_show_nothing():
    assert told_apart([]).accuracy[1:] == (0.0, 1.0, 0)
    assert told_apart(pairs(1, finished=False)).accuracy.count == 0
    assert told_apart(pairs(2, finished=False)).accuracy.count == 2


def test_the_fit_is_the_minimum():
    """The gradient of the ridge-penalised logistic loss is zero there, in the scaled columns."""
    rows = np.random.default_rng(0).normal(0.3, 1.0, size=(50, 4)) * [1, 10, 0.1, 0]
    weights, scale = _fit(rows), np.sqrt((rows**2).mean(0))
    chance = 1 / (1 + np.exp(rows @ weights))
    scaled = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
    assert np.allclose(weights * scale - scaled.T @ chance, 0, atol=1e-9)
    assert weights[3] == 0


def test_completions_as_training_sees_them(tiny_tokenizer):
    group = tokenize_pair(PreferencePair("Say: ", "yes it is", "no"), tiny_tokenizer)
    first, second = seen(group, tiny_tokenizer)
    assert (first.text, second.text) == ("yes it is", "no") and first.finished and second.finished
    assert [first.tokens, second.tokens] == [len(ids) for ids in group.completions]
    cut = tokenize_pair(PreferencePair("Say: ", "yes it is", "no"), tiny_tokenizer, max_length=len(group.prompt) + 2)
    assert [one.finished for one in seen(cut, tiny_tokenizer)] == [False, len(group.completions[1]) <= 2]
