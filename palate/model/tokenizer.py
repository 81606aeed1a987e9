"""Tokenizers: one is trained where a new model has none, and two are compared before their log-probs are."""

import json
from collections.abc import Iterable, Sequence

from palate.errors import ModelError


def train_tokenizer(texts: Iterable[str], vocab_size: int, control: Sequence[str] = ()):
    """A BPE tokenizer of at most `vocab_size` tokens, learnt from `texts`, that falls back to bytes: any text decodes
    to itself.

    `<s>` (0) is put in front, `</s>` (1) ends a text, `<pad>` (2) pads. vocab_size: at least 259, one a byte and these.
    control: further control tokens, such as a chat template's; they take the ids from 3 on.
    """
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", *control]
    if vocab_size < 256 + len(special):
        raise ModelError(
            f"a tokenizer needs at least {256 + len(special)} tokens, the config's vocab_size is {vocab_size}",
            code="E407",
            next="raise vocab_size or put a tokenizer beside the config",
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=list(control),
        clean_up_tokenization_spaces=False,
    )


def tokenizer_difference(a, b) -> str | None:
    """The first thing in which two tokenizers differ, as text; None where they give the same ids."""
    if a is b:
        return None
    ours, theirs = a.get_vocab(), b.get_vocab()
    if ours != theirs:
        token, x, y = min(
            (str(token), ours.get(token), theirs.get(token))
            for token in ours.keys() | theirs.keys()
            if ours.get(token) != theirs.get(token)
        )
        return f"token {token!r} is {_id(x)} in one and {_id(y)} in the other"
    for role in ("bos_token_id", "eos_token_id"):
        if getattr(a, role) != getattr(b, role):
            return f"{role} is {getattr(a, role)} in one and {getattr(b, role)} in the other"
    for text in _PROBES:
        if a(text)["input_ids"] != b(text)["input_ids"]:
            return f"the text {text!r} gets other ids"
    x, y = _merges(a), _merges(b)
    if x != y:
        return "their merges differ"
    return None


def same_tokenizer(a, b) -> bool:
    """Whether two tokenizers give the same ids, begin and end tokens included."""
    return tokenizer_difference(a, b) is None


def check_same_tokenizer(policy, reference) -> None:
    """Raises ModelError (E410) where a reference's tokenizer is not the policy's: their log-probs would not compare."""
    difference = tokenizer_difference(policy, reference)
    if difference:
        raise ModelError(
            f"the reference's tokenizer is not the policy's: {difference}",
            code="E410",
            next="choose a reference with the same tokenizer",
        )


_PROBES = (
    "",
    " ",
    "The quick brown fox, doesn't it?\n\nYes: 3.14159 and 1,000,000!  Two spaces.",
    " leading and trailing ",
    "Ünïcödé, 你好，世界, مرحبا, \U0001f642\U0001f3fd, e\u0301",
    "def f(x):\n\treturn x**2  # tabs\r\n",
)


def _id(value: int | None) -> str:
    return "absent" if value is None else f"id {value}"


def _merges(tokenizer) -> list | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    merges = json.loads(backend.to_str())["model"].get("merges") or []
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
