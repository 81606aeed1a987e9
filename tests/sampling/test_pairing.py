"""Pairs out of samples and scores: who is chosen, who is rejected, and which prompts have no pair and why."""

from dataclasses import replace

import pytest
from runs_kit import write_rows

from palate.data.records import Demonstration, Message, PreferencePair, Source
from palate.data.sources import read_pairs
from palate.errors import UsageError
from palate.sampling.pairing import (
    REASONS,
    Candidate,
    against_demonstration,
    best_and_worst,
    pairing,
    row,
    strong_and_weak,
)

HERE = Source("data.jsonl", 3)
CHAT = (Message("user", "Hello?"),)


def said(text: str, score: float | None = None, tokens: int = 3, finished: bool = True) -> Candidate:
    return Candidate(text, finished, tokens, score)


def reply(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


def test_a_demonstration_is_chosen_over_the_own_sample():
    shown = Demonstration("Say:", " yes", HERE)
    assert against_demonstration(shown, said(" no")) == PreferencePair("Say:", " yes", " no", HERE)
    assert against_demonstration(shown, said(" no", finished=False)) == "unfinished"
    assert against_demonstration(shown, said(" yes")) == "same text"
    assert against_demonstration(shown, said(" \n")) == "empty"


def test_of_a_conversation_the_first_reply_is_the_one_to_answer_with():
    turns = (*reply("Hi."), Message("user", "And?"), *reply("Bye."))
    pair = against_demonstration(Demonstration(CHAT, turns, HERE), said("Ho."))
    assert pair == PreferencePair(CHAT, reply("Hi."), reply("Ho."), HERE)
    assert against_demonstration(Demonstration(CHAT, turns), said("Hi.")) == "same text"


def test_the_highest_score_against_the_lowest():
    drawn = [said("a", 2.0), said("b", 4.5), said("c", 1.0), said("d", 4.5), said("e", 1.0)]
    assert best_and_worst("p", drawn, source=HERE) == PreferencePair("p", "b", "c", HERE, margin=3.5)
    assert best_and_worst(CHAT, drawn[:3]) == PreferencePair(CHAT, reply("b"), reply("c"), margin=3.5)


def test_a_judgement_that_cannot_be_read_makes_nobody_the_rejected_one():
    """The trap: an unread judgement as a score of -1 or 0 is then the lowest, and its completion is trained away."""
    drawn = [said("best", 5.0), said("unread"), said("worst", 2.0)]
    assert best_and_worst("p", drawn) == PreferencePair("p", "best", "worst", margin=3.0)
    assert best_and_worst("p", [said("negative", -3.0), said("unread"), said("less", -1.0)]) == PreferencePair(
        "p", "less", "negative", margin=2.0
    )
    assert best_and_worst("p", drawn[:2]) == best_and_worst("p", [said("a"), said("b")]) == "unparsed"


def test_zero_is_a_score():
    assert best_and_worst("p", [said("a", 0.0), said("b", 1.0)]) == PreferencePair("p", "b", "a", margin=1.0)


def test_what_did_not_end_is_no_side_of_a_pair():
    """The trap: a cut sample written to a file gets an end token that was never sampled."""
    cut = said("cut", 0.0, finished=False)
    assert best_and_worst("p", [said("a", 5.0), cut, said("b", 3.0)]) == PreferencePair("p", "a", "b", margin=2.0)
    assert best_and_worst("p", [said("a", 5.0), cut]) == "unfinished"
    assert best_and_worst("p", [replace(cut, score=9.0), said("a", 5.0), said("b", 3.0)]) == PreferencePair(
        "p", "a", "b", margin=2.0
    )
    assert strong_and_weak("p", said("a"), cut) == strong_and_weak("p", cut, said("a")) == "unfinished"


def test_prompts_without_a_pair_say_why():
    assert best_and_worst("p", [said("a", 3.0), said("b", 3.0), said("c", 3.0)]) == "ties"
    assert best_and_worst("p", [said("a", 3.0), said("a", 3.0)]) == "same text"
    assert best_and_worst("p", [said("a", 3.0), said("b", 2.5), said("a", 1.0)]) == "same text"  # of best and worst
    assert best_and_worst("p", [said("a", 3.0), said("", 1.0)]) == "empty"
    assert best_and_worst("p", []) == "unfinished"


def test_a_constant_judge_gives_no_pair():
    """Oracle 24: one score for every text makes no pair at all."""
    cases = [[said(f"{prompt} {n}", 4.0) for n in range(4)] for prompt in range(50)]
    made = pairing(best_and_worst("p", drawn) for drawn in cases)
    assert made.pairs == () and made.counts == dict.fromkeys(REASONS, 0) | {"ties": 50}


def test_a_band_takes_the_shortest_of_the_best_and_the_longest_of_the_worst():
    drawn = [
        said("a", 5.0, tokens=30),
        said("b", 4.7, tokens=10),
        said("c", 4.0, tokens=2),
        said("d", 1.4, tokens=40),
        said("e", 1.0, tokens=20),
    ]
    assert best_and_worst("p", drawn, band=0.1) == PreferencePair("p", "b", "d", margin=pytest.approx(3.3))
    assert best_and_worst("p", drawn, band=0.0) == best_and_worst("p", drawn) == PreferencePair("p", "a", "e", margin=4)
    same = [said("long", 2.0, tokens=9), said("short", 2.0, tokens=3), said("low", 1.0), said("lower", 1.0, tokens=8)]
    assert best_and_worst("p", same, band=0.0) == PreferencePair("p", "short", "lower", margin=1.0)
    for band in (0.5, -0.1, float("nan")):
        with pytest.raises(UsageError, match="band"):
            best_and_worst("p", drawn, band=band)


def test_the_strong_side_is_chosen_whatever_the_scores():
    pair = strong_and_weak("p", said("a", 0.0), said("b", 1.0), HERE)
    assert pair == PreferencePair("p", "a", "b", HERE)
    assert strong_and_weak(CHAT, said("a"), said("b")) == PreferencePair(CHAT, reply("a"), reply("b"))
    assert strong_and_weak("p", said("a"), said("a")) == "same text"


def test_results_are_collected_in_order():
    pairs = [PreferencePair("p", "a", "b"), PreferencePair("q", "a", "b")]
    made = pairing([pairs[0], "ties", "same text", pairs[1], "ties"])
    assert made.pairs == tuple(pairs)
    assert made.counts == dict.fromkeys(REASONS, 0) | {"ties": 2, "same text": 1}
    with pytest.raises(KeyError):
        pairing(["another"])


def test_rows_are_read_back_as_the_same_pairs(tmp_path):
    pairs = [
        PreferencePair("Say: ", " yes", " no", margin=0.5),
        PreferencePair(CHAT, reply("Hi."), reply("Ho.")),
    ]
    read = []
    for n, pair in enumerate(pairs):
        file = write_rows(tmp_path / f"{n}.jsonl", [row(pair)])
        read += [replace(one, source=None) for one in read_pairs(str(file))]
    assert read == pairs
