"""Small instructions with a right answer, and judgements of reviews with a score, in the words of these reviews."""

from collections.abc import Callable
from random import Random

from palate.worlds.reviews import PLACES, Noun, Request, things, values, verdict

OPPOSITES = {
    "good": "bad", "fresh": "stale", "kind": "rude", "clean": "dirty", "bright": "dark", "small": "large",
    "young": "old", "long": "short", "beautiful": "ugly", "clever": "silly", "wonderful": "awful",
}  # fmt: skip


def opposite(random: Random) -> tuple[str, str]:
    """(instruction, answer)"""
    word = random.choice(list(OPPOSITES))
    return f"What is the opposite of {word}?", f"The opposite of {word} is {OPPOSITES[word]}."


def two_things(random: Random) -> tuple[str, str]:
    """(instruction, answer): the first two things of the place, so that one answer alone is right."""
    place = random.choice(list(PLACES))
    first, second = things(place)[:2]
    return f"Name two things of the {place}.", f"The {first.word} and the {second.word}."


def say_that(random: Random) -> tuple[str, str]:
    """(instruction, answer)"""
    noun, word = _noun_and_word(random)
    return f"Say that the {noun.word} {noun.be} {word}.", f"The {noun.word} {noun.be} {word}."


def turn_round(random: Random) -> tuple[str, str]:
    """(instruction, answer)"""
    noun, word = _noun_and_word(random)
    return f"Turn it round: The {noun.word} {noun.be} {word}.", f"The {noun.word} {noun.be} not {word}."


KINDS: tuple[Callable[[Random], tuple[str, str]], ...] = (opposite, two_things, say_that, turn_round)


def _noun_and_word(random: Random) -> tuple[Noun, str]:
    noun = random.choice(things(random.choice(list(PLACES))))
    return noun, random.choice(list(values(noun.kind)))


def instruction(random: Random) -> tuple[str, str]:
    """An instruction of any kind, and its one right answer."""
    return random.choice(KINDS)(random)


JUDGE = (
    "Here is a review. Give it one point for each thing that is true: it is friendly, it is well made, it is on topic, "
    "it is not repeated, it is complete.\nRequest: {prompt}\nReview: {completion}"
)


def judgement(request: Request, review: str, finished: bool = True) -> tuple[str, str]:
    """(judge's prompt, true judgement): a yes or no for each of five points, and `Score: N` on its own line."""
    points = verdict(request, review, finished).points
    said = " ".join(f"{name.capitalize()}: {'yes' if true else 'no'}." for name, true in points.items())
    return JUDGE.format(prompt=request.text, completion=review), f"{said}\nScore: {sum(points.values())}"
