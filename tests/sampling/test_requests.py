"""New requests: the list that a model goes on with, and the filters that leave out what is none."""

from itertools import combinations
from random import Random

import pytest

from palate.sampling.requests import Pool, few_shot, new_ones, request_of, rouge_l, shown, unfit

WORDS = ["write", "a", "review", "of", "it"]


def longest(one, two) -> int:
    """The longest common subsequence, by trying every subsequence of the shorter one."""
    for size in range(min(len(one), len(two)), 0, -1):
        for places in combinations(range(len(one)), size):
            rest = iter(two)
            if all(any(word == other for other in rest) for word in (one[place] for place in places)):
                return size
    return 0


@pytest.mark.parametrize("seed", range(20))
def test_rouge_l_is_that_of_every_subsequence(seed):
    chance = Random(seed)
    one, two = ([chance.choice(WORDS) for _ in range(chance.randint(1, 7))] for _ in range(2))
    assert rouge_l(one, two) == pytest.approx(2 * longest(one, two) / (len(one) + len(two)))
    assert rouge_l(one, two) == rouge_l(two, one) and rouge_l(one, one) == 1


def test_rouge_l_by_hand():
    assert rouge_l(["how", "was", "the", "park", "in", "Walden"], ["how", "was", "the", "cafe", "in", "Alden"]) == 4 / 6
    assert rouge_l([], ["a"]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_pool_knows_what_rouge_l_says(seed):
    """The bound by common words alone leaves nothing out."""
    chance = Random(seed)
    texts = [" ".join(chance.choice(WORDS) for _ in range(chance.randint(4, 9))) for _ in range(60)]
    pool = Pool(texts[:30])
    said = [pool.knows(text) for text in texts[30:]]
    assert said == [any(rouge_l(text.split(), old.split()) >= 0.7 for old in texts[:30]) for text in texts[30:]]
    assert True in said and False in said


@pytest.mark.parametrize(
    "text, reason",
    [
        ("How was the park in Walden?", None),
        ("Go away now", "length"),
        ("word " * 151, "length"),
        ("Draw me a picture of the park", "keyword"),
        ("Mapping the park is what I want", None),  # a word, not a part of one
        ("- how was the park in Walden", "not text"),
    ],
)
def test_what_is_no_request(text, reason):
    assert unfit(text) == reason


def test_the_first_new_ones_are_kept_and_the_others_counted():
    written = [
        ("How was the lake in Walden?", True),
        ("How was the lake in Walden today?", True),  # resembles the one before
        ("Tell me about a long", False),
        ("How was the park in Alden?", True),  # of the seed
        ("Tell me", True),
        ("Plot the prices of bread for me", True),
        ("What do people say of the baker's new rolls?", True),
        ("This one is not reached any more", True),
    ]
    kept, left_out = new_ones(written, ["How was the park in Alden?"], 2)
    assert kept == [0, 6]
    assert left_out == {"unfinished": 1, "length": 1, "keyword": 1, "not text": 0, "similar": 2}


def test_eight_are_shown_and_two_of_them_are_its_own():
    seed, own = [f"seed {n}" for n in range(20)], [f"own {n}" for n in range(5)]
    found = shown(seed, own, Random(1))
    assert len(set(found)) == 8 and sum(text.startswith("own") for text in found) == 2
    assert len(shown(seed, [], Random(1))) == 8 and len(shown(seed[:3], own[:1], Random(1))) == 4
    assert found == shown(seed, own, Random(1)) != shown(seed, own, Random(2))
    assert few_shot(["Say\nit", "Do it"]).splitlines()[2:] == ["1. Say it", "2. Do it", "3."]


@pytest.mark.parametrize(
    "text, finished, request_, ended",
    [
        (" Say it", True, "Say it", True),
        (" Say it\n4. Do it", False, "Say it", True),
        (" Say it and", False, "Say it and", False),
        ("", True, "", True),
    ],
)
def test_a_request_ends_with_its_line(text, finished, request_, ended):
    assert request_of(text, finished) == (request_, ended)
