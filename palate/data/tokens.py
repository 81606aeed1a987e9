"""Records to TokenGroups: a prompt once, its completions after it, and which of their tokens are scored.

Three rules make every id here. The prompt is encoded as generation will see it. A completion is what continues that
prompt, so its first token is one the model could have chosen there. Control tokens come from the template and from
the end of a completion, never from what somebody wrote.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from palate.data.encoding import encoder_of
from palate.data.records import (
    Demonstration,
    Feedback,
    Message,
    PreferencePair,
    Prompt,
    Ranking,
    Record,
    Source,
    Text,
)
from palate.errors import DataError, RefusedError


@dataclass(frozen=True, slots=True, eq=False)
class TokenGroup:
    """One prompt and the K completions that branch off it (pair 2, demonstration 1, ranking and samples K).

    prompt: (P,) int32 token ids as generation sees them, BOS included.
    completions: K arrays (C_k,) int32, the end token included unless the completion was cut.
    spans: per completion the half-open ranges of its tokens that are scored; elsewhere the policy did not write.
    preferences: (better, worse) indices into `completions`; a pair has ((0, 1),).
    label: of single feedback; its completions are then (own, mismatched).
    cut: per completion, whether truncation took its end; prompt_cut: tokens taken from the prompt's start.
    reference: per completion the summed log-prob under the reference, nats, float64, once annotated.
    margin: of a pair, by how much the better one is, where the data say so.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    preferences: tuple[tuple[int, int], ...] = ()
    label: bool | None = None
    cut: tuple[bool, ...] = ()
    prompt_cut: int = 0
    source: Source | None = None
    reference: tuple[float, ...] | None = None
    margin: float | None = None


def tokenize(record: Record, tokenizer, *, max_length: int | None = None) -> TokenGroup:
    """The record as one TokenGroup, its completions in the record's order, ids as PRODUCT and the rules above say.

    max_length: most tokens of prompt + longest completion, >= 1; the prompt's start is cut first (BOS and one more
    token stay), then all completions at the same limit. None: nothing is cut.
    Errors: DataError with code and source line where the row cannot be scored (E216 the template refuses it or its
    rendered prompt does not begin the rendered whole, E222 no token, E223 no room); ModelError E408 without a template.
    """
    match record:
        case PreferencePair():
            return tokenize_pair(record, tokenizer, max_length=max_length)
        case Demonstration():
            return tokenize_demonstration(record, tokenizer, max_length=max_length)
        case Feedback():
            return tokenize_feedback(record, tokenizer, max_length=max_length)
        case Ranking():
            return tokenize_ranking(record, tokenizer, max_length=max_length)
        case Prompt():
            return _group(record, (), (), tokenizer, max_length)
    raise TypeError(f"not a record: {type(record).__name__}")


def tokenize_pair(pair: PreferencePair, tokenizer, *, max_length: int | None = None) -> TokenGroup:
    """The pair's group: completions (chosen, rejected), preferences ((0, 1),). See `tokenize`."""
    group = _group(pair, (pair.chosen, pair.rejected), ("chosen", "rejected"), tokenizer, max_length)
    return replace(group, preferences=((0, 1),), margin=pair.margin)


def tokenize_demonstration(record: Demonstration, tokenizer, *, max_length: int | None = None) -> TokenGroup:
    """The demonstration's group: one completion; in conversations every assistant turn of it is a span.

    A turn that the template rewrites once others follow it (thinking that is dropped, say) is not scored: generation
    would never meet it so. Where not even the prompt's rendering begins the whole, the last turn alone is trained.
    See `tokenize`.
    """
    try:
        return _group(record, (record.completion,), ("completion",), tokenizer, max_length)
    except DataError as error:
        turns = record.completion
        if error.code != "E216" or isinstance(turns, str) or len(turns) < 2 or isinstance(record.prompt, str):
            raise
        last = replace(record, prompt=record.prompt + turns[:-1], completion=turns[-1:])
        try:
            return _group(last, (last.completion,), ("completion",), tokenizer, max_length)
        except DataError:
            raise error from None


def tokenize_text(record: Demonstration, tokenizer, *, max_length: int | None = None) -> list[TokenGroup]:
    """A document as one group, or where it is longer than `max_length` as consecutive pieces of at most that.

    Nothing is lost: every token that the whole would score is scored once. A later piece's prompt is the token before
    it, so that its first token is predicted too, and no token says that a document begins there.
    max_length: tokens of a piece, at least 2. Errors: as `tokenize`.
    """
    whole = tokenize_demonstration(record, tokenizer)
    prompt, ids = whole.prompt, whole.completions[0]
    if max_length is None or len(prompt) + len(ids) <= max_length:
        return [whole]
    if len(prompt) >= max_length:
        return [tokenize_demonstration(record, tokenizer, max_length=max_length)]
    room = max_length - len(prompt)
    pieces = [replace(whole, completions=(ids[:room],), spans=(((whole.spans[0][0][0], room),),))]
    for start in range(room, len(ids), max_length - 1):
        rest = ids[start : start + max_length - 1]
        pieces.append(replace(whole, prompt=ids[start - 1 : start], completions=(rest,), spans=(((0, len(rest)),),)))
    return pieces


def tokenize_feedback(record: Feedback, tokenizer, *, max_length: int | None = None) -> TokenGroup:
    """The row's group: completions (own, mismatched), or own alone; the own one decides what the prompt loses."""
    completions, names = (record.completion,), ("completion",)
    if record.mismatched is not None:
        completions, names = (record.completion, record.mismatched), ("completion", "mismatched completion")
    return replace(_group(record, completions, names, tokenizer, max_length, deciding=1), label=record.label)


def tokenize_ranking(record: Ranking, tokenizer, *, max_length: int | None = None) -> TokenGroup:
    """The ranking's group: K completions and the record's preferences. See `tokenize`."""
    names = tuple(f"completion {index + 1}" for index in range(len(record.completions)))
    return replace(
        _group(record, record.completions, names, tokenizer, max_length), preferences=tuple(record.preferences)
    )


def encode_prompt(prompt: Text, tokenizer, *, where: str | None = None) -> np.ndarray:
    """(P,) int32 ids of the prompt exactly as generation sees it: at most one BOS, no end token.

    A plain string gets the tokenizer's own special tokens and no template; "" is BOS alone, or nothing without one.
    A conversation gets the template's text up to where the assistant's turn opens; its last message must not be the
    assistant's (DataError E216).
    """
    encoder = encoder_of(tokenizer)
    with _at(where):
        ids = encoder.plain(prompt, ())[0] if isinstance(prompt, str) else encoder.chat_prompt(tuple(prompt))[0]
    return np.asarray(ids, dtype=np.int32)


def end_tokens(tokenizer, chat: bool = True) -> frozenset[int]:
    """Ids that end a completion in generation: the end token, and in chats the template's end-of-turn token too."""
    encoder = encoder_of(tokenizer)
    found = (encoder.eos, encoder.turn_end[1] if chat else None)
    return frozenset(token for token in found if token is not None)


def without_signal(group: TokenGroup) -> bool:
    """Whether the group prefers one completion over another and all such two have equal ids (a cut can do that)."""
    return bool(group.preferences) and all(
        np.array_equal(group.completions[better], group.completions[worse]) for better, worse in group.preferences
    )


def notes(tokenizer, chat: bool = True) -> list[str]:
    """What a person should know about how this tokenizer's completions begin and end; often nothing."""
    found = []
    if not end_tokens(tokenizer, chat):
        found.append(
            "the tokenizer has no end token: completions are trained without one and generation runs to its limit"
        )
    if chat and (opens := encoder_of(tokenizer).opens):
        found.append(
            f"the chat template has generation begin inside {opens.strip()}: replies go on there with their own "
            "thought, or close it at once"
        )
    return found


def decode_completion(tokenizer, prompt: np.ndarray, completion: np.ndarray) -> str:
    """The completion's text as it stands after its prompt: a leading space that decoding alone would drop is kept."""
    before = tokenizer.decode(prompt.tolist())
    whole = tokenizer.decode([*prompt.tolist(), *completion.tolist()])
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(completion.tolist())


def control_text(text: Text, tokenizer) -> tuple[str, ...]:
    """Control strings of the tokenizer that stand in a text; they are encoded as the text they are (W220)."""
    encoder = encoder_of(tokenizer)
    if isinstance(text, str):
        return tuple(encoder.found(text))
    return tuple(found for message in text for found in encoder.found(message.content, own=message.role == "assistant"))


def ends_with_end_text(completion: Text, tokenizer) -> bool:
    """Whether a completion's text already ends with the end token's text; it is not doubled (W221)."""
    encoder = encoder_of(tokenizer)
    text = completion if isinstance(completion, str) else completion[-1].content if completion else ""
    return encoder.without_end(text, chat=not isinstance(completion, str)) != text


def _group(record, completions, names, tokenizer, max_length, deciding: int | None = None) -> TokenGroup:
    """The group of a prompt and completions, cut to `max_length`; the first `deciding` decide the prompt's cut."""
    where = str(record.source) if record.source is not None else None
    encoder = encoder_of(tokenizer)
    kinds = {isinstance(text, str) for text in (record.prompt, *completions)}
    if len(kinds) > 1:
        raise DataError(
            "the row mixes plain strings and messages", where=where, code="E219", next="use one form for both"
        )
    with _at(where):
        if isinstance(record.prompt, str):
            prompt, sides = encoder.plain(record.prompt, completions)
        else:
            for name, completion in zip(names, completions, strict=True):
                _check_turns(name, completion)
            prompt, sides = encoder.chat(tuple(record.prompt), [tuple(turns) for turns in completions])

    for name, (_, spans, closed) in zip(names, sides, strict=True):
        if sum(stop - start for start, stop in spans) - closed < 1:
            raise DataError(f"the {name} has no token", where=where, code="E222", next="fix the row or skip it")
    longest = max((len(ids) for ids, _, _ in sides[:deciding]), default=0)
    keep = len(prompt)
    if max_length is not None and keep + longest > max_length:
        has_bos = encoder.bos is not None and prompt[:1] == [encoder.bos]
        least = min(len(prompt), 1 + has_bos)
        keep = max(least, min(keep, max_length - longest))
        dropped = len(prompt) - keep
        prompt = prompt[:1] + prompt[1 + dropped :] if has_bos else prompt[dropped:]
    else:
        dropped = 0
    limit = None if max_length is None else max(0, max_length - keep)
    arrays, scored, cut = [], [], []
    first = 0 if prompt else 1  # nothing predicts the first token of a text
    for name, (ids, spans, _) in zip(names, sides, strict=True):
        kept = ids if limit is None else ids[:limit]
        spans = tuple(
            (max(start, first), min(stop, len(kept)))
            for start, stop in spans
            if max(start, first) < min(stop, len(kept))
        )
        if not spans:
            raise DataError(
                f"no token of the {name} is left to score: prompt {keep + dropped}, {name} {len(ids)} tokens"
                + (f", max length {max_length}" if max_length is not None else ""),
                where=where,
                code="E222" if limit is None else "E223",
                next="fix the row or skip it" if limit is None else "raise --max-length or skip the row",
            )
        arrays.append(np.asarray(kept, dtype=np.int32))
        scored.append(spans)
        cut.append(len(kept) < len(ids))
    return TokenGroup(
        prompt=np.asarray(prompt, dtype=np.int32),
        completions=tuple(arrays),
        spans=tuple(scored),
        cut=tuple(cut),
        prompt_cut=dropped,
        source=record.source,
    )


def _check_turns(name: str, completion: Sequence[Message]) -> None:
    if not completion:
        raise DataError(f"the {name} has no message", code="E208", next="fix the row or skip it")
    for message, place, code in ((completion[0], "begin", "E216"), (completion[-1], "end", "E215")):
        if message.role != "assistant":
            raise DataError(
                f'the {name} must {place} with an assistant message, not "{message.role}"',
                code=code,
                next="fix the row or skip it",
            )


@contextmanager
def _at(where: str | None):
    """Adds the row to errors that do not name one."""
    try:
        yield
    except RefusedError as error:
        error.where = error.where or where
        raise
