"""Writes the built-in data files: `python -m palate.worlds.files FOLDER` makes the same bytes that the package ships.

    reviews.jsonl           2,400 preference pairs, labelled after Bradley and Terry at temperature 1
    reviews-heldout.jsonl   300 more, for evaluation
    demonstrations.jsonl    3,000 conversations to imitate: a sixth are instructions, none in the last 200
    prompts.jsonl           600 requests
    seed.jsonl              1,600 conversations for a model that judges itself: 400 answers (a quarter to instructions),
                            then 1,200 judgements of reviews, four to a request
    text.jsonl              24,000 texts for pre-training and the tokenizer; not shipped
    text-heldout.jsonl      600 more, for evaluation; not shipped

No request stands in two of the shipped files; the texts know those of the demonstrations alone.
"""

import json
import sys
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from palate.worlds.instructions import instruction, judgement
from palate.worlds.reviews import Request, Writer, prefers, requests, sealed, verdict

SHIPPED = {"reviews": 2400, "reviews-heldout": 300, "demonstrations": 3000, "prompts": 600, "seed": 1600}
WRITTEN = SHIPPED | {"text": 24_000, "text-heldout": 600}


HELD_OUT = 200  # demonstrations, all reviews: instructions are few, and would stand on both sides


def asked(name: str) -> list[Request]:
    """The requests that are sealed for a file, in their fixed order."""
    return [request for text, request in requests().items() if sealed(text) == name]


def pairs(name: str, count: int) -> Iterator[dict[str, Any]]:
    """Preference pairs: two writers of different kindness and care, and one labeller; any number of them.

    Beyond the requests that are sealed for the file these come again, with other texts.
    """
    random = Random(f"palate {name}")
    for request in islice(cycle(asked(name)), count):
        texts = [""]
        while len(set(texts)) < 2:
            writers = [Writer(random.random(), random.choice((0.0, 0.1, 0.25))) for _ in range(2)]
            texts = [writer.review(request, random) for writer in writers]
        first, second = (verdict(request, text).reward for text in texts)
        chosen, rejected = texts if prefers(first, second, random) else reversed(texts)
        yield {"prompt": [user(request.text)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def demonstrations(count: int) -> Iterator[dict[str, Any]]:
    """Conversations by writers without faults, in every mood."""
    random = Random("palate demonstrations")
    wanted = asked("demonstrations")
    for number in range(count):
        if number % 6 == 5 and number < count - HELD_OUT:
            text, answer = instruction(random)
        else:
            request = wanted[number]
            text, answer = request.text, Writer(random.random()).review(request, random)
        yield {"messages": [user(text), assistant(answer)]}


ANSWERS = 400  # rows of the seed that show how to answer; those after them show how to judge
JUDGED = 4  # reviews of a request that are judged


def seed(count: int) -> Iterator[dict[str, Any]]:
    """Answers by writers without faults, then true judgements of reviews of every quality, each request's together."""
    random = Random("palate seed")
    wanted = iter(asked("demonstrations")[SHIPPED["demonstrations"] :])
    for number in range(min(count, ANSWERS)):
        if number % 4 == 3:
            text, answer = instruction(random)
        else:
            request = next(wanted)
            text, answer = request.text, Writer(random.random()).review(request, random)
        yield {"messages": [user(text), assistant(answer)]}
    for request in islice(wanted, max(0, count - ANSWERS) // JUDGED):
        texts: dict[str, None] = {}
        while len(texts) < JUDGED:
            writer = Writer(random.random(), random.choice((0.0, 0.1, 0.25, 0.4)))
            texts |= {writer.review(request, random): None}
        for text in texts:
            asking, answer = judgement(request, text)
            yield {"messages": [user(asking), assistant(answer)]}


def prompts(count: int) -> Iterator[dict[str, Any]]:
    """Requests alone."""
    for request in asked("prompts")[:count]:
        yield {"prompt": [user(request.text)]}


def texts(name: str, count: int) -> Iterator[dict[str, str]]:
    """Texts of every kind that this world writes; some have faults, as texts found anywhere do."""
    random = Random(f"palate {name}")
    wanted = asked("demonstrations")
    held = set() if name == "text-heldout" else {row["text"] for row in rows("text-heldout")}
    made = 0
    while made < count:
        text = _text(random.choice(wanted), random)
        if text not in held:
            made += 1
            yield {"text": text}


def _text(request: Request, random: Random) -> str:
    review = Writer(random.random(), random.choice((0.0, 0.0, 0.1))).review(request, random)
    return random.choices(
        (
            lambda: review,
            lambda: f"{request.text}\n{review}",
            lambda: "\n".join(instruction(random)),
            lambda: "\n".join(judgement(request, Writer(random.random(), 0.25).review(request, random))),
        ),
        (1, 6, 1, 2),
    )[0]()


def user(content: str) -> dict[str, str]:
    """A turn of the person who asks."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """A turn of the model."""
    return {"role": "assistant", "content": content}


def rows(name: str, count: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file by its name, as many as the file has unless `count` says so."""
    count = WRITTEN[name] if count is None else count
    if name.startswith("reviews"):
        return pairs(name.removeprefix("reviews-"), count)
    if name.startswith("text"):
        return texts(name, count)
    return {"demonstrations": demonstrations, "prompts": prompts, "seed": seed}[name](count)


def content(name: str) -> bytes:
    """The bytes of a file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(name)).encode()


def main(folder: str) -> None:
    """Writes all files into the folder, which is made if need be."""
    there = Path(folder)
    there.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:
        (there / f"{name}.jsonl").write_bytes(content(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
