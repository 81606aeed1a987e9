"""Text to ids with one tokenizer: what it writes of its own accord, what it takes for control, how it goes on.

Nothing here knows of models or records; tokens.py asks it for a row's ids.
"""

import json
import re
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from palate.data import template
from palate.data.records import Message
from palate.errors import DataError

# Put inside a control string that somebody wrote: added tokens are looked for before text is normalised, and then the
# mark is normalised away. Noncharacters, so no honest text has them.
_MARK = "\ufdd0\ufdd1\ufdd2"
_ANCHORS = ("\n", "1", "a", ".", "é", "漢", "\t", "~")


_encoders: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()


def encoder_of(tokenizer) -> "Encoder":
    """The tokenizer's Encoder, built once and again when its template or its special tokens changed."""
    state = (tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer))
    known = _encoders.get(tokenizer)
    if known is None or known[0] != state:
        known = _encoders[tokenizer] = (state, Encoder(tokenizer))
    return known[1]


class Encoder:
    """What is worth knowing once about a tokenizer: its BOS, ends, control strings, and how to continue a text.

    bos, eos: ids or None. prefix: ids it writes before every text. turn_end: text and id of the chat template's
    end-of-turn token, or (None, None).
    """

    def __init__(self, tokenizer):
        # The tokenizer is passed in again with each call: the cache would else keep it alive for ever.
        self._tokenizer = weakref.ref(tokenizer)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.control = _control_tokens(tokenizer)
        # <think> and </think>, where they are no special tokens, are words of the assistant's own.
        own = {text for text, special in self.control.items() if not special and _is_tag(text, self.control)}
        self._anyone = _any_of(self.control)
        self._assistant = _any_of(set(self.control) - own)
        self._marked = None
        self._know_unknown(None)
        self.prefix = _prefix(tokenizer)
        one = self.ids("1")
        self._dummy = self.decode(one + one) != self.decode(self.ids("11"))
        self._anchors = [(text, ids) for text in _ANCHORS if (ids := self.ids(text))]

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer()

    @cached_property
    def tail(self) -> str | None:
        """What the template writes after an assistant's content."""
        return template.turn_tail(self.tokenizer) if self.tokenizer.chat_template else None

    @cached_property
    def turn_end(self) -> tuple[str, int] | tuple[None, None]:
        match = self._anyone.search(self.tail) if self.tail and self._anyone else None
        return (match[0], self.tokenizer.convert_tokens_to_ids(match[0])) if match else (None, None)

    @cached_property
    def opens(self) -> str:
        """The thought that generation finds open and a stored reply does not begin with, as "<think>\\n"; often ""."""
        return template.opened_thought(self.tokenizer) if self.tokenizer.chat_template else ""

    # Text to ids

    def found(self, text: str, own: bool = False) -> list[str]:
        pattern = self._assistant if own else self._anyone
        return pattern.findall(text) if pattern else []

    def mark(self, text: str, own: bool = False) -> str:
        """`text` with a mark inside every control string; own: the assistant's own tags stay as they are."""
        pattern = self._assistant if own else self._anyone
        while pattern and pattern.search(text):
            text = pattern.sub(lambda match: match[0][0] + _MARK + match[0][1:], text)
        return text

    def ids(self, text: str) -> list[int]:
        """Ids of a text without BOS or end; control strings become control tokens unless they are marked."""
        return self.all_ids([text])[0]

    def all_ids(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            if not _is_text(text):
                raise DataError(
                    "the text has half of a surrogate pair, which is no character",
                    code="E203",
                    next="fix the row or skip it",
                )
        if any(_MARK in text for text in texts):
            return [self._marked_ids(text) if _MARK in text else self.ids(text) for text in texts]
        found = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, truncation=False, verbose=False
        )["input_ids"]
        # Normalisation can make a control string of what was none ("＜/s＞"): only marked text is safe from it.
        return [
            ids if self._control_ids.isdisjoint(ids) or self._honest(ids, text) else self._marked_ids(text)
            for ids, text in zip(found, texts, strict=True)
        ]

    def _honest(self, ids: list[int], text: str) -> bool:
        """Whether `ids` has no more control tokens than `text` has control strings that are not marked."""
        wanted = sum(found not in self._unknown for found in self.found(text))
        return sum(token in self._control_ids for token in ids) <= wanted

    def _marked_ids(self, text: str) -> list[int]:
        if self._marked is None:
            self._marked, unknown = _marked_encoder(self.tokenizer, self.control)
            self._know_unknown(unknown)
        ids = self._marked(text)
        if not self._honest(ids, text):
            raise DataError(
                "control text in the row cannot be kept as text with this tokenizer",
                code="E220",
                next="remove it from the row or skip the row",
            )
        return ids

    def _know_unknown(self, unknown: str | None) -> None:
        """Unknown characters become the unknown token too, so its presence says nothing."""
        self._unknown = {self.tokenizer.unk_token, unknown}
        self._control_ids = {
            self.tokenizer.convert_tokens_to_ids(text) for text in self.control if text not in self._unknown
        }

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def continuation(self, done: list[int], whole: list[int], rest: str) -> list[int]:
        """Ids that continue `done` so that both decode as `whole` does.

        done: ids that stay. whole: ids of the text that `done` and `rest` make together. Where a merge crosses the
        seam, `rest` is encoded behind an anchor that it does not merge with, and judged by decoding.
        """
        if whole[: len(done)] == done:
            return whole[len(done) :]
        target, first = self.decode(whole), None
        for ids in self._continuations(rest):
            if self.decode(done + ids) == target:
                return ids
            first = ids if first is None else first
        return first if first is not None else []

    def _continuations(self, rest: str) -> Iterator[list[int]]:
        for text in dict.fromkeys((rest, rest.lstrip())):
            if not self._dummy:
                yield self.ids(text)
            for anchor, head in self._anchors:
                ids = self.ids(anchor + text)
                if ids[: len(head)] == head:
                    yield ids[len(head) :]
            if self._dummy:
                yield self.ids(text)

    def without_end(self, text: str, chat: bool) -> str:
        """`text` without the end token's own text behind it."""
        ends = tuple(end for end in (self.tokenizer.eos_token, self.turn_end[0] if chat else None) if end)
        while text.endswith(ends):
            text = text[: -max(len(end) for end in ends if text.endswith(end))]
        return text

    # Rows to ids

    def plain(self, prompt: str, completions: Sequence[str]):
        """Prompt ids; per completion its ids, its spans and whether it ends in an end token."""
        bodies = [self.without_end(text, chat=False) for text in completions]
        own, *wholes = self.all_ids([self.mark(prompt), *(self.mark(prompt + body) for body in bodies)])
        head = self.prefix or ([self.bos] if not own and self.bos is not None else [])
        ids, sides = head + own, []
        for body, whole in zip(bodies, wholes, strict=True):
            rest = self.continuation(ids, head + whole, self.mark(body)) if body else []
            spans = ((0, len(rest)),)
            sides.append(self._ended(rest, spans))
        return ids, sides

    def chat_prompt(self, prompt: tuple[Message, ...]) -> tuple[list[int], str]:
        """Ids and (marked) text of a conversation up to where the assistant's turn opens."""
        if prompt and prompt[-1].role == "assistant":
            raise DataError(
                "the prompt ends with an assistant message, so there is no turn left to answer in",
                code="E216",
                next="end the prompt with a user message",
            )
        text = template.render(self._safe(prompt), self.tokenizer, prompt=True)
        return self.ids(text), text

    def chat(self, prompt: tuple[Message, ...], completions: Sequence[tuple[Message, ...]]):
        """As `plain`, for conversations."""
        ids, text = self.chat_prompt(prompt)
        return ids, [self._turns(prompt, completion, ids, text) for completion in completions]

    def _turns(self, prompt, completion, ids: list[int], opening: str):
        """Ids of the turns after `opening`, each assistant turn that stands as it was generated being a span."""
        messages = self._safe(prompt) + self._safe(completion, ending=True)
        whole = template.render(messages, self.tokenizer, prompt=False)
        if len(completion) == 1 and not whole.startswith(opening):
            whole = self._thought_through(messages[-1].content, opening, whole)
        if not whole.startswith(opening):
            raise DataError(
                f"the chat template writes this prompt otherwise once a reply follows: {_difference(opening, whole)}",
                code="E216",
                next="skip the row, or give another template with --chat-template FILE",
            )
        start, marks = len(opening), []
        *inner, last = [at for at in range(len(prompt), len(messages)) if messages[at].role == "assistant"]
        for at in inner:
            span = self._inner_turn(messages, at, whole)
            if span is not None:
                marks.append(span)
        if inner:
            text = template.render(messages[:last], self.tokenizer, prompt=True)
            if not whole.startswith(text):
                raise DataError(
                    f"the chat template rewrites earlier turns: {_difference(text, whole)}",
                    code="E216",
                    next="skip the row, or give another template with --chat-template FILE",
                )
            start = len(text)
        end, closed = self._turn_close(whole, start)
        marks.append((start, end))

        done, position, spans = list(ids), len(opening), []
        for begin, stop in marks:
            for edge in (begin, stop):
                if edge > position:
                    known = self.ids(whole[:edge])
                    first = len(done)
                    done += self.continuation(done, known, whole[position:edge])
                    position = edge
                    if edge == stop:
                        spans.append((first - len(ids), len(done) - len(ids)))
        rest = done[len(ids) :]
        if closed:
            return rest, tuple(spans), True
        return self._ended(rest, tuple(spans))

    def _thought_through(self, reply: str, opening: str, whole: str) -> str:
        """`whole` with the thought that `opening` opens and the template leaves out of a stored reply.

        A reply's own thought stands there as it would be generated; without one it is closed at once, as such models
        write it when they do not think. Elsewhere `whole` as it is.
        """
        before = opening.removesuffix(self.opens)
        if not self.opens or not opening.endswith(self.opens) or not whole.startswith(before):
            return whole
        stored, tag = whole[len(before) :], self.opens.strip()
        close, blank = tag.replace("<", "</"), self.opens.removeprefix(tag)

        def unopened(text: str) -> str:
            inside = text.lstrip().removeprefix(tag)
            return inside.removeprefix(blank) if text.lstrip().startswith(tag) else text

        if close in stored:
            return opening + unopened(stored)
        thought, closed, answer = reply.rpartition(close)
        if not closed:
            return opening + ("\n" if "\n" in blank else "\n\n") + close + "\n\n" + stored
        gap = answer[: len(answer) - len(answer.lstrip())]
        return opening + unopened(thought) + close + ("" if stored.startswith(gap) else gap) + stored

    def _inner_turn(self, messages, at: int, whole: str) -> tuple[int, int] | None:
        """Where in `whole` the turn `at` was generated, or None if it stands there otherwise than when it was last."""
        opening = template.render(messages[:at], self.tokenizer, prompt=True)
        alone = template.render(messages[: at + 1], self.tokenizer, prompt=False)
        if not whole.startswith(opening) or not alone.startswith(opening):
            return None
        end, _ = self._turn_close(alone, len(opening))
        return (len(opening), end) if whole.startswith(alone[:end]) else None

    def _turn_close(self, text: str, start: int) -> tuple[int, bool]:
        """Where the turn that opened at `start` and is the last of `text` ends, its end-of-turn token included."""
        end = self.turn_end[0]
        if end is not None:
            at = text.find(end, start)
            if at >= 0:
                return at + len(end), True
        stripped = text.removesuffix(self.tail) if self.tail else text
        return max(len(stripped), start), False

    def _ended(self, ids: list[int], spans):
        """The completion with the end token behind it, if the tokenizer has one."""
        if self.eos is None or not ids:
            return ids, spans, False
        return [*ids, self.eos], (*spans[:-1], (spans[-1][0], len(ids) + 1)), True

    def _safe(self, messages: Sequence[Message], ending: bool = False) -> tuple[Message, ...]:
        """Messages with marked contents; ending: without end tokens' text behind an assistant's."""
        safe = []
        for message in messages:
            own = message.role == "assistant"
            content = self.without_end(message.content, chat=True) if ending and own else message.content
            safe.append(Message(message.role, self.mark(content, own)))
        return tuple(safe)


def _control_tokens(tokenizer) -> dict[str, bool]:
    """Control strings -> whether the tokenizer calls them special.

    Special added tokens, and others that the chat template writes or that look like <|this|>. Added words and runs of
    blanks are text.
    """
    source = tokenizer.chat_template or ""
    source = source if isinstance(source, str) else " ".join(source.values())
    named = set(_variables_of(tokenizer))
    found = {}
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    # a template that opens a thought and never closes it means the closing tag too
    source += "".join(other for text in added if text in source and (other := _partner(text)) in added)
    for text, token in added.items():
        if len(text) < 2 or not text.strip():
            continue
        markup = re.search(r"[<>|｜\[\]{}]", text)  # the word "user" is in every template and controls nothing
        if token.special or text in named or (markup and text in source) or re.fullmatch(r"<[|｜].*[|｜]>", text):
            found[text] = token.special or text in named
    return found


def _variables_of(tokenizer) -> Iterator[str]:
    for value in tokenizer.special_tokens_map.values():
        yield from [value] if isinstance(value, str) else map(str, value)


def _partner(text: str) -> str | None:
    """The tag that closes or opens what `text` opens or closes, if it is one."""
    match = re.fullmatch(r"<(/?)(\w+)>", text)
    return match and (f"<{match[2]}>" if match[1] else f"</{match[2]}>")


def _is_tag(text: str, others) -> bool:
    return text in others and _partner(text) in others


def _any_of(texts) -> re.Pattern | None:
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _prefix(tokenizer) -> list[int]:
    """What the tokenizer writes before a text of its own accord; what it writes behind is left to us."""
    prefix: list[int] = []
    for probe in ("1", "a", "the"):
        body = tokenizer(probe, add_special_tokens=False)["input_ids"]
        full = tokenizer(probe)["input_ids"]
        starts = (at for at in range(len(full) - len(body) + 1) if full[at : at + len(body)] == body)
        if body and (at := next(starts, None)) is not None:
            prefix = full[:at]
            break
    bos = tokenizer.bos_token_id
    while len(prefix) > 1 and prefix[0] == prefix[1] == bos:
        prefix = prefix[1:]
    return prefix


def _marked_encoder(tokenizer, control):
    """A function from marked text to ids where marked control strings are text and all else as the tokenizer has it.

    With it the unknown token of the model, if it has one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return (lambda text: _piecewise(tokenizer, control, text)), tokenizer.unk_token
    from tokenizers import Tokenizer

    try:
        spec = json.loads(backend.to_str())
    except Exception:  # a part of it is written in Python
        return (lambda text: _piecewise(tokenizer, control, text)), tokenizer.unk_token
    spec["truncation"] = spec["padding"] = spec["post_processor"] = None
    unmark = {"type": "Replace", "pattern": {"String": _MARK}, "content": ""}
    old = spec["normalizer"]
    spec["normalizer"] = {"type": "Sequence", "normalizers": [unmark, *([old] if old else [])]}
    for token in spec["added_tokens"]:
        if token["content"] in control:
            token["normalized"] = False
    unknown = spec["model"].get("unk_token")
    if spec["model"]["type"] == "Unigram":
        at = spec["model"].get("unk_id")
        unknown = None if at is None else spec["model"]["vocab"][at][0]
        # Its pieces are looked for in the text itself, control strings among them.
        for piece in spec["model"]["vocab"]:
            if piece[0] in control:
                piece[0] = f"{_MARK}{piece[0]}"
    clone = Tokenizer.from_str(json.dumps(spec))
    clone.encode_special_tokens = False
    moved = {
        clone.token_to_id(token["content"]): token["id"]
        for token in spec["added_tokens"]
        if clone.token_to_id(token["content"]) != token["id"]
    }
    return (
        lambda text: [moved.get(token, token) for token in clone.encode(text, add_special_tokens=False).ids]
    ), unknown


def _piecewise(tokenizer, control, text: str) -> list[int]:
    """The same for tokenizers without a Rust backend: what stands between control tokens is encoded apart."""
    pattern, ids, at = _any_of(control), [], 0
    found = pattern.finditer(text) if pattern else ()
    edges = [(match.start(), match.end()) for match in found] + [(len(text), len(text))]
    for start, stop in edges:
        piece = text[at:start].replace(_MARK, "")
        if piece:
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if stop > start:
            ids.append(tokenizer.convert_tokens_to_ids(text[start:stop]))
        at = stop
    return ids


def _difference(one: str, other: str) -> str:
    """Where two renderings part, quoted shortly."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    one, other = (text[at : at + 30].replace(_MARK, "") for text in (one, other))
    return f'"{_quoted(one)}" became "{_quoted(other)}"'


def _quoted(text: str) -> str:
    return text.encode("unicode_escape").decode()


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
