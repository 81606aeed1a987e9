"""New requests out of old ones: a model is shown eight and writes a ninth; what is no new request is left out.

Source: Yuan et al. 2024 (Self-Rewarding), arXiv:2401.10020, section 2.2, and the filters of Wang et al. 2023
(Self-Instruct), arXiv:2212.10560, section 2.2.
Departs: no nucleus, only the temperature; the words that stand for what a text cannot show are our list.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from random import Random

SHOWN, OWN = 8, 2  # requests that are shown, of which the model's own at most
TEMPERATURE = 0.6
TOKENS = 128  # of a request at most
SHORTEST, LONGEST = 4, 150  # words
SIMILAR = 0.7  # ROUGE-L from which two requests are one
# what somebody who reads and writes text alone cannot be asked for
CANNOT = frozenset({
    "image", "images", "picture", "pictures", "photo", "photos", "graph", "graphs", "chart", "diagram", "diagrams",
    "plot", "figure", "map", "draw", "sketch", "video", "videos", "audio", "music", "file", "files", "website",
})  # fmt: skip
REASONS = ("unfinished", "length", "keyword", "not text", "similar")
_WORDS = re.compile(r"\w+")


def shown(seed: Sequence[str], own: Sequence[str], random: Random) -> list[str]:
    """The requests that are shown: two of the model's own where there are some, the others of the seed."""
    mine = random.sample(own, min(OWN, len(own)))
    found = [*random.sample(seed, min(SHOWN - len(mine), len(seed))), *mine]
    random.shuffle(found)
    return found


def few_shot(requests: Sequence[str]) -> str:
    """The text that a model goes on with: a numbered list whose last number waits for its request."""
    lines = [f"{number}. {' '.join(text.split())}" for number, text in enumerate(requests, 1)]
    return "\n".join(["A list of different requests to an assistant:", "", *lines, f"{len(requests) + 1}."])


def line_ends(tokenizer) -> set[int]:
    """Tokens that end a line, and so a request."""
    texts = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
    return {token for token, text in texts.items() if "\n" in text and not text.strip()}


def request_of(text: str, finished: bool) -> tuple[str, bool]:
    """(the request at the beginning of what the model wrote, whether it came to its end)."""
    line, broken, _ = text.lstrip(" ").partition("\n")
    return line.strip(), finished or bool(broken)


def unfit(text: str) -> str | None:
    """Why a text is no request by itself; None where it is one."""
    words = _words(text)
    if not SHORTEST <= len(words) <= LONGEST:
        return "length"
    if not text[0].isalnum() or "\0" in text:
        return "not text"
    return "keyword" if CANNOT & set(words) else None


class Pool:
    """Requests that are known, and whether another is new beside them."""

    def __init__(self, texts: Iterable[str]):
        self._known: list[tuple[tuple[str, ...], frozenset]] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Makes it a known one."""
        words = _words(text)
        self._known.append((words, _counted(words)))

    def knows(self, text: str) -> bool:
        """Whether one of them is as good as the same: ROUGE-L from SIMILAR on."""
        words = _words(text)
        counted = _counted(words)
        for others, theirs in self._known:
            # no common sequence is longer than what the two have in common in any order
            bound = 2 * len(counted & theirs) / max(1, len(words) + len(others))
            if bound >= SIMILAR and rouge_l(words, others) >= SIMILAR:
                return True
        return False


def new_ones(
    written: Iterable[tuple[str, bool]], known: Iterable[str], wanted: int
) -> tuple[list[int], dict[str, int]]:
    """(places of the first `wanted` that are new requests, how many were left out up to there by every one of REASONS).

    written: (request, whether it came to its end) in order. known: requests that they must not resemble.
    """
    pool, kept, counts = Pool(known), [], Counter(dict.fromkeys(REASONS, 0))
    for place, (text, ended) in enumerate(written):
        if len(kept) == wanted:
            break
        reason = unfit(text) if ended else "unfinished"
        if reason is None and pool.knows(text):
            reason = "similar"
        if reason is not None:
            counts[reason] += 1
            continue
        pool.add(text)
        kept.append(place)
    return kept, dict(counts)


def rouge_l(one: Sequence[str], two: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two lists of words. Source: Lin 2004, section 3.1, with equal weights."""
    if not one or not two:
        return 0.0
    before = [0] * (len(two) + 1)
    for word in one:
        row = [0]
        for at, other in enumerate(two):
            row.append(before[at] + 1 if word == other else max(row[at], before[at + 1]))
        before = row
    return 2 * before[-1] / (len(one) + len(two))


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORDS.findall(text.casefold()))


def _counted(words: Collection[str]) -> frozenset[tuple[str, int]]:
    """The words with their number, so that the size of what two have in common counts repetitions."""
    seen: Counter[str] = Counter()
    found = []
    for word in words:
        found.append((word, seen[word]))
        seen[word] += 1
    return frozenset(found)
