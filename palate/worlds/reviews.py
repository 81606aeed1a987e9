"""The world of reviews: short readable English from a grammar, and a rule that knows how good each text is.

A request asks for a review of a place in a town. A review has an opening, some sentences about what is there, and a
closing. One table of sentence forms both writes texts and reads them, so the rule judges exactly: it counts feeling
(with "not" turning it round), sentences that no form writes, wrong places and things, repetition, and a missing end.
People who label pairs follow the rule as Bradley and Terry have it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from random import Random

from palate.data.records import Text
from palate.errors import DataError

# --- words -----------------------------------------------------------------------------------------------------------

# place -> what is there: noun, kind, and "s" for a plural
PLACES = {
    "bakery": "bread food, rolls food s, cake food, baker person, counter thing",
    "cafe": "coffee food, cake food, waiter person, terrace spot, chairs thing s",
    "cinema": "film story, ending story, music art, seats thing s, foyer spot",
    "concert": "songs art s, music art, singer person, hall spot, seats thing s",
    "hotel": "room spot, bed thing, breakfast food, porter person, pool spot",
    "library": "stories story s, lamps thing s, chairs thing s, librarian person, hall spot",
    "market": "fruit food, cheese food, sellers person s, stalls thing s, bread food",
    "museum": "paintings art s, guide person, rooms spot s, tour story, terrace spot",
    "park": "lake spot, paths spot s, benches thing s, gardener person, flowers art s",
    "restaurant": "soup food, pasta food, waiter person, tables thing s, wine food",
    "school": "teachers person s, lessons story s, rooms spot s, chairs thing s, lunch food",
    "theatre": "play story, actors person s, costumes art s, seats thing s, ending story",
}
TOWNS = (
    "Alden", "Barrow", "Carden", "Dunmore", "Elmsford", "Farley", "Glenport", "Harwick", "Kelso", "Linton", "Marlow",
    "Norden", "Oakham", "Penrith", "Quarley", "Rosedale", "Stanton", "Thornby", "Upton", "Walden",
)  # fmt: skip
# kind -> adjectives by what they say: good, bad, nothing
ADJECTIVES = {
    "food": ("fresh tasty delicious", "stale bland soggy", "simple warm"),
    "person": ("kind friendly helpful", "rude grumpy careless", "young quiet"),
    "spot": ("clean bright pretty", "dirty dark noisy", "small large"),
    "thing": ("comfortable solid handsome", "broken wobbly shabby", "wooden old"),
    "story": ("clever touching funny", "dull silly confusing", "long short"),
    "art": ("beautiful charming lively", "ugly lifeless boring", "modern plain"),
}
ANYWHERE = {"wonderful": 2, "superb": 2, "good": 1, "lovely": 1, "bad": -1, "poor": -1, "awful": -2, "dreadful": -2}
FEELINGS = {"loved": 2, "enjoyed": 1, "liked": 1, "remember": 0, "disliked": -1, "hated": -2}
ADVERBS = ("very", "really", "rather", "quite")
OUTINGS = ("on Monday", "on a rainy day", "last week", "in May", "with my family", "with an old friend")
CLOSINGS = {
    "I will come back soon": 1,
    "You should go there": 1,
    "We were sorry to leave": 1,
    "That was our day": 0,
    "Now you know": 0,
    "I will not go there again": -1,
    "You should stay at home": -1,
    "We were glad to leave": -1,
}


@dataclass(frozen=True, slots=True)
class Noun:
    """Something that a place has. kind: which adjectives suit it."""

    word: str
    kind: str
    plural: bool

    @property
    def be(self) -> str:
        """The verb that agrees with it."""
        return "were" if self.plural else "was"


@cache
def things(place: str) -> tuple[Noun, ...]:
    """What a place has."""
    parts = [part.split() for part in PLACES[place].split(", ")]
    return tuple(Noun(word, kind, bool(plural)) for word, kind, *plural in parts)


@cache
def values(kind: str) -> dict[str, int]:
    """Every adjective that suits the kind, and what it says, from -2 (dreadful) to 2 (superb)."""
    own = zip(ADJECTIVES[kind], (1, -1, 0), strict=True)
    return {word: value for words, value in own for word in words.split()} | ANYWHERE


NOUNS = {noun.word: noun for place in PLACES for noun in things(place)}
_ADJECTIVES = sorted({word for kind in ADJECTIVES for word in values(kind)})

# --- sentences -------------------------------------------------------------------------------------------------------

# Gaps with one number belong together: {noun1} {be1} {adj1}. An adjective after "not" says the opposite, weakly.
OPENINGS = (
    "The {place} in {town} was {adj0}",
    "The {place} in {town} was {adverb} {adj0}",
    "The {place} in {town} was not {adj0}",
    "I {feeling} the {place} in {town}",
    "We went to the {place} in {town} {outing}",
)
MIDDLES = (
    "The {noun1} {be1} {adj1}",
    "The {noun1} {be1} {adverb} {adj1}",
    "The {noun1} {be1} not {adj1}",
    "The {noun1} {be1} {adj1} and {also1}",
    "The {noun1} {be1} {adj1}, but the {noun2} {be2} {adj2}",
    "The {noun1} {be1} {adj1}, and the {noun2} {be2} not {adj2}",
    "I found the {noun1} {adj1}",
    "I {feeling} the {noun1}",
    "I did not like the {noun1}",
)
CLOSING = "{closing}"
_GAPS = {
    "place": PLACES,
    "town": TOWNS,
    "noun": NOUNS,
    "be": ("was", "were"),
    "adj": _ADJECTIVES,
    "also": _ADJECTIVES,
    "adverb": ADVERBS,
    "feeling": FEELINGS,
    "outing": OUTINGS,
    "closing": CLOSINGS,
}


@dataclass(frozen=True, slots=True)
class Sentence:
    """What a sentence says: how much it likes (above 0) or dislikes, and which place, town and things it names."""

    feeling: int
    place: str | None
    town: str | None
    nouns: tuple[str, ...]


@cache
def _patterns(forms: tuple[str, ...] = (*OPENINGS, *MIDDLES, CLOSING)) -> tuple[tuple[str, re.Pattern], ...]:
    def group(gap: re.Match) -> str:
        words = _GAPS[gap[1].rstrip("012")]
        return f"(?P<{gap[1]}>{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})"

    return tuple((form, re.compile(re.sub(r"\{(\w+)\}", group, form))) for form in forms)


@cache
def read_sentence(text: str) -> Sentence | None:
    """What the sentence (without its full stop) says; None where no form writes it, or noun and adjective clash."""
    for form, pattern in _patterns():
        if (found := pattern.fullmatch(text)) is not None:
            return _meaning(form, found.groupdict())
    return None


def _meaning(form: str, words: dict[str, str]) -> Sentence | None:
    feeling = FEELINGS.get(words.get("feeling", ""), 0) + CLOSINGS.get(words.get("closing", ""), 0)
    feeling -= "did not like" in form
    for number, gap in re.findall(r"\{(?=\w+(\d)\})((?:adj|also)\d)\}", form):
        noun = NOUNS.get(words.get(f"noun{number}", ""))
        said = values(noun.kind if noun else "spot").get(words[gap])
        if said is None or (noun and words.get(f"be{number}", noun.be) != noun.be):
            return None
        feeling += (said < 0) - (said > 0) if f"not {{{gap}}}" in form else said
    nouns = tuple(words[gap] for gap in ("noun1", "noun2") if gap in words)
    twice = len(set(nouns)) < len(nouns) or words.get("also1") == words.get("adj1", "")
    return None if twice else Sentence(feeling, words.get("place"), words.get("town"), nouns)


# --- requests --------------------------------------------------------------------------------------------------------

REQUESTS = (
    "Write a review of the {place} in {town}.",
    "How was the {place} in {town}?",
    "Tell me about the {place} in {town}.",
    "Please review the {place} in {town}.",
)
WISHES = ("", " Mention the {noun}.", " Say a word about the {noun}.")


@dataclass(frozen=True, slots=True)
class Request:
    """A review of the place in the town is asked for, which mentions a thing (or ""). text: the prompt in words."""

    place: str
    town: str
    thing: str
    text: str


@cache
def requests() -> dict[str, Request]:
    """Every request by its text: 10,560 of them, in a fixed order that says nothing."""
    found = [
        Request(place, town, thing, form.format(place=place, town=town) + wish.format(noun=thing))
        for place in PLACES
        for town in TOWNS
        for form in REQUESTS
        for wish in WISHES
        for thing in ([noun.word for noun in things(place)] if wish else [""])
    ]
    return {request.text: request for request in sorted(found, key=lambda request: _hash(request.text))}


def sealed(text: str) -> str:
    """Which file a request belongs to, and no other: "reviews", "heldout", "demonstrations" or "prompts"."""
    share = _hash(text) % 100
    return next(name for name, bound in _SHARES if share < bound)


_SHARES = (("reviews", 40), ("heldout", 50), ("demonstrations", 85), ("prompts", 100))


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def request_of(prompt: Text) -> Request:
    """The request that a prompt makes: a string, or a conversation by its last turn. Raises DataError (E235)."""
    text = prompt if isinstance(prompt, str) else prompt[-1].content if prompt else ""
    if (request := requests().get(text.strip())) is None:
        what = f"the rule knows the requests of builtin:prompts alone, not {text[:80]!r}"
        raise DataError(what, code="E235", next="take another judge, or prompts of the built-in world")
    return request


# --- the rule --------------------------------------------------------------------------------------------------------

LEAST, MOST = -3, 3  # bounds of feeling: no text is better for going on and on
LONGEST = 6  # sentences of a review


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rule sees in a review.

    feeling: summed over sentences, within [-3, 3]. broken: sentences that are no English of this world, and those
    beyond the sixth. topic: the place and town that were asked for and what is there, and nothing else. mentions: the
    thing that was asked for. repeats: things spoken of twice, openings and closings after the first. ended: the text
    ends in a full stop and with an end token.
    """

    feeling: int
    broken: int
    topic: bool
    mentions: bool
    repeats: int
    ended: bool

    @property
    def reward(self) -> float:
        """The true reward: feeling, less 2 for each broken sentence, 2 off topic, 1 for each other lapse."""
        lapses = min(3, self.repeats) + (not self.mentions) + (not self.ended)
        return float(self.feeling - 2 * min(3, self.broken) - 2 * (not self.topic) - lapses)

    @property
    def points(self) -> dict[str, bool]:
        """The five points that a judgement can give."""
        return {
            "friendly": self.feeling > 0,
            "well made": not self.broken,
            "on topic": self.topic and self.mentions,
            "not repeated": not self.repeats,
            "complete": self.ended,
        }


def verdict(request: Request, completion: str, finished: bool = True) -> Verdict:
    """What the rule sees in a completion. finished: whether it ended with an end token."""
    text = completion.strip()
    ended = finished and text.endswith(".")
    parts = [part.strip() for part in text.removesuffix(".").split(".")] if text else []
    read = [read_sentence(part) for part in parts]
    good = [sentence for sentence in read if sentence is not None]
    named = [thing for sentence in good for thing in sentence.nouns]
    about = [(sentence.place, sentence.town) for sentence in good if sentence.place]
    closings = sum(not sentence.nouns and not sentence.place for sentence in good)
    here = {noun.word for noun in things(request.place)}
    return Verdict(
        feeling=max(LEAST, min(MOST, sum(sentence.feeling for sentence in good))),
        broken=read.count(None) + max(0, len(parts) - LONGEST) + (not parts),
        topic=bool(about) and set(about) == {(request.place, request.town)} and here.issuperset(named),
        mentions=not request.thing or request.thing in named,
        repeats=len(named) - len(set(named)) + max(0, len(about) - 1) + max(0, closings - 1),
        ended=ended,
    )


def judge(prompt: Text, completion: str, finished: bool = True) -> float:
    """The true reward of a completion, from -17 to 3. Raises DataError (E235) for prompts of another world."""
    return verdict(request_of(prompt), completion, finished).reward


def prefers(first: float, second: float, random: Random, temperature: float = 1.0) -> bool:
    """Whether a labeller who follows Bradley and Terry takes the first of two rewards; temperature 0 never errs.

    Equal rewards are a coin's toss. Source: Bradley and Terry 1952, Biometrika 39, p. 324.
    """
    draw = random.random()
    if temperature == 0:
        return first > second or (first == second and draw < 0.5)
    return draw < 1 / (1 + math.exp(-(first - second) / temperature))


# --- writers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Writer:
    """Somebody who writes reviews. kindness: chance that a word is a good one. lapses: chance of each kind of fault."""

    kindness: float = 0.5
    lapses: float = 0.0

    def review(self, request: Request, random: Random) -> str:
        """A review for the request; without lapses the rule finds no fault in it."""
        place, town = request.place, request.town
        if random.random() < self.lapses:  # somewhere else
            place, town = random.choice([(random.choice(list(PLACES)), town), (place, random.choice(TOWNS))])
        nouns = list(things(place))
        random.shuffle(nouns)
        if request.thing and random.random() >= self.lapses:
            nouns.sort(key=lambda noun: noun.word != request.thing)
        sentences = [self._sentence(random.choice(OPENINGS), random, [], place=place, town=town)]
        for _ in range(random.choice((1, 1, 2, 2, 3))):
            form = random.choice(MIDDLES if len(nouns) > 1 else [form for form in MIDDLES if "{noun2}" not in form])
            count = 1 + ("{noun2}" in form)
            sentences.append(self._sentence(form, random, nouns[:count]))
            nouns = nouns[count:] if random.random() >= self.lapses / 2 else nouns
            if not nouns:
                break
        if random.random() < 0.8:
            sentences.append(self._sentence(CLOSING, random, []))
        if random.random() < self.lapses:
            at = random.randrange(len(sentences))
            sentences[at] = _spoilt(sentences[at], random)
        if random.random() < self.lapses:
            sentences.append(random.choice(sentences))
        text = ". ".join(sentences) + "."
        return text.rsplit(" ", random.randint(1, 3))[0].rstrip(".,") if random.random() < self.lapses / 2 else text

    def _sentence(self, form: str, random: Random, nouns: Sequence[Noun], **words: str) -> str:
        for number, noun in enumerate(nouns, 1):
            words |= {f"noun{number}": noun.word, f"be{number}": noun.be}
        praise = random.random() < self.kindness
        words |= {"adverb": random.choice(ADVERBS), "outing": random.choice(OUTINGS)}
        words |= {"feeling": _word(FEELINGS, praise, random), "closing": _word(CLOSINGS, praise, random)}
        for number, kind in enumerate(["spot", *(noun.kind for noun in nouns)]):
            # "but" turns the feeling, and so does "not"
            turned = (f"not {{adj{number}}}" in form) != (number == 2 and ", but" in form)
            first = _word(values(kind), praise != turned, random)
            others = {word: value for word, value in values(kind).items() if word != first}
            words |= {f"adj{number}": first, f"also{number}": _word(others, praise, random)}
        return form.format(**words)


def _word(table: dict[str, int], praise: bool, random: Random) -> str:
    """A word that says something good or something bad; now and then one that says nothing."""
    fitting = [word for word, value in table.items() if (value > 0 if praise else value < 0)]
    silent = [word for word, value in table.items() if value == 0]
    return random.choice(silent if silent and random.random() < 0.15 else fitting)


def _spoilt(sentence: str, random: Random) -> str:
    """The sentence with a word lost, doubled or out of place."""
    words = sentence.split(" ")
    at = random.randrange(1, len(words) - 1)
    how = random.randrange(3)
    if how == 0:
        del words[at]
    elif how == 1:
        words.insert(at, words[at])
    else:
        words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join(words)
