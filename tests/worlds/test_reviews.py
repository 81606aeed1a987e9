"""The world of reviews: its writers are faultless, the rule sees every fault, labellers are Bradley-Terry's."""

import math
from random import Random

import pytest

from palate.data.records import Message
from palate.errors import DataError
from palate.worlds.reviews import (
    CLOSINGS,
    PLACES,
    Writer,
    judge,
    prefers,
    read_sentence,
    request_of,
    requests,
    sealed,
    things,
    verdict,
)

HOTEL = "Write a review of the hotel in Alden. Mention the bed."
GOOD = "The hotel in Alden was clean. The bed was comfortable. The porter was kind."


def seen(text, prompt=HOTEL, finished=True):
    return verdict(request_of(prompt), text, finished)


def test_a_careful_writer_makes_no_faults():
    random = Random(1)
    for request in list(requests().values())[:1500]:
        found = verdict(request, Writer(random.random()).review(request, random))
        assert (found.broken, found.topic, found.mentions, found.repeats, found.ended) == (0, True, True, 0, True)


def test_kindness_is_what_the_rule_counts():
    wanted, random = list(requests().values())[:400], Random(2)
    means = [
        sum(verdict(request, Writer(kindness).review(request, random)).feeling for request in wanted) / len(wanted)
        for kindness in (0.0, 0.5, 1.0)
    ]
    assert means[0] < -1.5 < -0.5 < means[1] < 0.5 < 1.5 < means[2]
    assert all(-3 <= verdict(r, Writer(1.0).review(r, random)).reward <= 3 for r in wanted)


def test_a_careless_writer_shows_every_kind_of_fault():
    random = Random(3)
    found = [verdict(request, Writer(0.5, 0.3).review(request, random)) for request in list(requests().values())[:500]]
    for share in (
        sum(v.broken > 0 for v in found),
        sum(not v.topic for v in found),
        sum(not v.mentions for v in found),
        sum(v.repeats > 0 for v in found),
        sum(not v.ended for v in found),
    ):
        assert share > 20


@pytest.mark.parametrize(
    "text, feeling",
    [
        ("The bed was comfortable", 1),
        ("The bed was not comfortable", -1),
        ("The bed was superb", 2),
        ("The bed was not superb", -1),
        ("The bed was not dreadful", 1),
        ("The bed was old", 0),
        ("The bed was not old", 0),
        ("The bed was broken and lovely", 0),
        ("The bed was broken, but the porter was wonderful", 1),
        ("The bed was broken, and the porter was not kind", -2),
        ("I did not like the bed", -1),
        ("I hated the bed", -2),
        ("I found the bed solid", 1),
        ("The chairs were really shabby", -1),
        ("We went to the hotel in Alden in May", 0),
        ("I loved the hotel in Alden", 2),
        ("The hotel in Alden was not dirty", 1),
        *CLOSINGS.items(),
    ],
)
def test_feeling_of_a_sentence(text, feeling):
    assert read_sentence(text).feeling == feeling


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The bed were comfortable",
        "The chairs was comfortable",
        "The bed was kind",  # no bed is
        "The bed was was old",
        "The bed old was",
        "bed was old",
        "The bed was old and old",
        "The bed was old, but the bed was shabby",
        "the bed was old",
        "The bed was comfortable ",
        "The bed was very very old",
        "I loved the hotel Alden",
    ],
)
def test_what_is_no_sentence_of_this_world(text):
    assert read_sentence(text) is None


@pytest.mark.parametrize(
    "text, finished, reward",
    [
        (GOOD, True, 3),
        (GOOD, False, 2),  # no end token
        (GOOD.removesuffix("."), True, 2),
        (GOOD.replace("Alden", "Kelso"), True, 1),
        (GOOD.replace("The hotel in Alden", "The park in Alden"), True, 1),
        (GOOD.replace("The bed was comfortable", "The soup was tasty"), True, 0),  # not there, and no bed
        (GOOD.replace("The bed was comfortable", "The pool was clean"), True, 2),
        (GOOD.replace("was clean", "clean was"), True, -2),  # broken, and no place named
        (f"{GOOD} The porter was kind.", True, 2),
        (f"{GOOD} I will come back soon. You should go there.", True, 2),
        ("The hotel in Alden was clean. The bed was broken. The porter was rude. We were glad to leave.", True, -2),
        ("", True, -6),
        ("good good good", True, -6),
    ],
)
def test_the_reward_by_hand(text, finished, reward):
    assert seen(text, finished=finished).reward == reward == judge(HOTEL, text, finished)


def test_going_on_and_on_pays_nothing():
    long = "The hotel in Alden was superb. The bed was superb. The porter was superb. The room was superb. "
    assert seen(f"{long}The pool was superb. The breakfast was superb.").reward == 3
    assert seen(f"{long}The pool was superb. The breakfast was superb. You should go there.").reward == 1
    assert seen("The bed was superb. " * 20).reward < -3


def test_points_are_what_a_judgement_says():
    assert seen(GOOD).points == dict.fromkeys(("friendly", "well made", "on topic", "not repeated", "complete"), True)
    assert sum(seen("The bed was was old").points.values()) == 1  # nothing is said twice


def test_requests_are_read_back_and_sealed():
    assert len(requests()) == 10_560
    assert request_of([Message("system", "Hi"), Message("user", HOTEL)]) == request_of(HOTEL) == requests()[HOTEL]
    assert {sealed(text) for text in requests()} == {"reviews", "heldout", "demonstrations", "prompts"}
    with pytest.raises(DataError, match=r"builtin:prompts.*E235"):
        judge("What is the capital of France?", "Paris.")


@pytest.mark.parametrize("gap, temperature", [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5), (0.0, 1.0)])
def test_labellers_follow_bradley_and_terry(gap, temperature):
    random, n = Random(4), 20_000
    share = sum(prefers(gap, 0.0, random, temperature) for _ in range(n)) / n
    exact = 1 / (1 + math.exp(-gap / temperature))
    assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / n)


def test_a_labeller_at_temperature_0_never_errs():
    random = Random(5)
    assert all(prefers(0.1, 0.0, random, 0) and not prefers(0.0, 0.1, random, 0) for _ in range(50))
    assert 30 < sum(prefers(1.0, 1.0, random, 0) for _ in range(100)) < 70


def test_every_place_can_fill_every_form():
    for place in PLACES:
        assert len({noun.word for noun in things(place)}) == 5
