"""Prompts and a policy in, completions with their log-probs out: the one arrow that goes back from model to records.

A small loop over the model's own forward. What a prompt gets depends on the weights, the seed and its place in the
list, not on what else is in the batch: each sample has its own random stream and spends one number a token.
"""

import hashlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from palate.data.batch import float64_device
from palate.data.tokens import decode_completion
from palate.errors import DataError, ModelError, NotFiniteError, UsageError
from palate.layout import Layout
from palate.model import Model
from palate.model.attention import NotShared, shared_attention
from palate.model.branching import Branches
from palate.model.load import context
from palate.scoring import TOLERANCE, evaluation_mode, support

BLOCK = 256  # tokens of the vocabulary whose probabilities are summed at once, when one of them is drawn


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sampled completion.

    prompt: index into the prompts; sample: which of its samples, from 0.
    ids: (C,) int32, the end token included if there is one; never retokenise them.
    token_logps: (C,) float64 nats under the model at temperature 1, whatever it was sampled at. logp: their sum.
    finished: whether the last token is an end token; if not, the completion was cut by max_tokens or the context.
    """

    prompt: int
    sample: int
    ids: np.ndarray
    token_logps: np.ndarray
    logp: float
    finished: bool


def generate(
    model: Model,
    tokenizer,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    end_ids: Collection[int] | None = None,
    batch_tokens: int | None = None,
) -> list[Sample]:
    """`samples` completions of every prompt, in the order of the prompts: len(prompts) * samples.

    prompts: token ids (P,), at least one each, as the model is to see them.
    max_tokens: tokens of a completion, >= 1; the model's context bounds it too.
    temperature: 0 takes the likeliest token (as transformers' greedy search, token for token), 1 is the model itself.
    seed: another seed, another draw; a larger max_tokens prolongs the same completions.
    numbers: those of the prompts in a longer list that they are a part of: each draws what it would draw there.
    end_ids: tokens that end a completion; the tokenizer's end token unless given.
    batch_tokens: places for prompt and completion tokens computed at once; it bounds memory and changes results by
        rounding only.

    Raises UsageError on impossible settings, DataError where a prompt is empty or fills the context, NotFiniteError.
    """
    if max_tokens < 1 or samples < 1:
        raise UsageError(f"max_tokens and samples are at least 1, not {max_tokens} and {samples}")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"the temperature is a number from 0, not {temperature}")
    if end_ids is None:
        end_ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    limit = context(model)
    numbers = range(len(prompts)) if numbers is None else numbers
    for number, prompt in zip(numbers, prompts, strict=True):
        if len(prompt) == 0:
            raise DataError("the prompt has no tokens, so nothing predicts a first one", where=f"prompt {number + 1}")
        if limit is not None and len(prompt) >= limit:
            raise DataError(
                f"the prompt has {len(prompt)} tokens, the model takes {limit} with the completion",
                where=f"prompt {number + 1}",
                next="shorten it",
            )
    call = _Call(model, max_tokens, temperature, seed, numbers, frozenset(int(id) for id in end_ids), limit)
    if batch_tokens is None:
        batch_tokens = 8192 if model.device.type == "cpu" else 65536
    made: list[Sample] = []
    with torch.no_grad(), evaluation_mode(model):
        engine = _Branching if branches(model) else _Padded
        shared, equal = engine is _Branching, _cache_name(model) is None
        with shared_attention(model) if shared else nullcontext():
            for rows in _batches(prompts, samples, max_tokens, batch_tokens, shared=shared, equal=equal):
                made.extend(_complete(call, engine, prompts, rows))
    return sorted(made, key=lambda sample: (sample.prompt, sample.sample))


def text_of(sample: Sample, prompt: np.ndarray, tokenizer) -> str:
    """The sample's text as it stands after its prompt, without the token that ends it."""
    return decode_completion(tokenizer, prompt, sample.ids[:-1] if sample.finished else sample.ids)


@dataclass(frozen=True)
class _Call:
    """What stays the same over all batches of one call."""

    model: Model
    max_tokens: int
    temperature: float
    seed: int
    numbers: Sequence[int]
    ends: frozenset[int]
    limit: int | None


class _Branching:
    """Rows of one batch on the shared-prompt stream: each prompt is read once, and its keys stand once for its rows."""

    def __init__(self, model: Model, prompts: list[np.ndarray], owners: list[int], max_tokens: int):
        self.model, self.device = model, model.get_input_embeddings().weight.device
        self.prompts = prompts
        self.cache = Branches([len(prompt) for prompt in prompts], owners, max_tokens, self.device)
        name = _cache_name(model)
        assert name is not None, "a model without a cache does not branch"
        self.named: dict[str, Any] = {name: self.cache, "use_cache": True}

    def read(self) -> Tensor:
        """Logits after each row's prompt, (rows, V)."""
        lengths = self.cache.lengths
        logits = _last_logits(
            self.model,
            lengths.cumsum(0) - 1,
            input_ids=torch.from_numpy(np.concatenate(self.prompts).astype(np.int64)).to(self.device)[None],
            position_ids=torch.cat([torch.arange(len(prompt)) for prompt in self.prompts]).to(self.device)[None],
            palate_layout=Layout(tuple(lengths.tolist()), ((),) * len(lengths)),
            **self.named,
        )
        return logits[0][self.cache.of]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits after each row's next token, (rows, V)."""
        positions = self.cache.step()
        inputs = {"input_ids": tokens[None], "position_ids": positions, "palate_branches": self.cache}
        return self.model(**inputs, **self.named).logits[0]

    def keep(self, stay: list[int]) -> list[int]:
        """Only these rows go on; in the order that is returned."""
        return self.cache.keep(stay)


class _Padded:
    """Rows of one batch, padded at their left, through the model's stock forward; prompts are read once."""

    def __init__(self, model: Model, prompts: list[np.ndarray], owners: list[int], max_tokens: int):
        self.model, self.device = model, model.get_input_embeddings().weight.device
        self.takes = inspect.signature(_bare(model).forward).parameters.keys()
        self.name, self.cache = _cache_name(model), None
        self.spread = torch.tensor(owners, device=self.device)
        self.ids, self.mask = _left_padded(prompts, self.device)

    def read(self) -> Tensor:
        """Logits after each row's prompt, (rows, V)."""
        logits = self._forward(self.ids)
        self._select(self.spread)
        return logits[self.spread]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits after each row's next token, (rows, V)."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(self.ids if self.cache is None else tokens[:, None])

    def keep(self, stay: list[int]) -> list[int]:
        """Only these rows go on; in the order that is returned."""
        self._select(torch.tensor(stay, device=self.device))
        return stay

    def _select(self, rows: Tensor) -> None:
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        if self.cache is not None:
            self.cache.batch_select_indices(rows)

    def _forward(self, ids: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": self.name is not None}
        if "attention_mask" in self.takes:
            inputs["attention_mask"] = self.mask
        if "position_ids" in self.takes:
            inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        if self.cache is not None:
            inputs[self.name] = self.cache
        out = self.model(**inputs)
        self.cache = None if self.name is None else getattr(out, self.name)
        return out.logits[:, -1]


_BRANCHES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def branches(model: Model) -> bool:
    """Whether rows may share their prompt's keys: probed once a model, against plain forwards over a few tokens."""
    bare = _bare(model)
    if bare not in _BRANCHES:
        try:
            shared = support(model).path == "shared"
        except ModelError:  # weights that are not finite, say: whoever samples will see it
            return False
        _BRANCHES[bare] = shared and _cache_name(model) is not None and _probe(model)
    return _BRANCHES[bare]


def _probe(model: Model) -> bool:
    """Whether given tokens after three prompts, two of them shared, have the log-probs of plain forwards."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = np.arange(3, 13) % vocabulary
    prompts, owners = [ids[:5], ids[5:7], ids[7:10]], [0, 0, 1, 2, 2]
    texts = [prompts[owner].tolist() for owner in owners]
    found, read = [], []
    try:
        with torch.no_grad(), evaluation_mode(model):
            with shared_attention(model):
                batch = _Branching(model, prompts, owners, 3)
                found.append(batch.read())
                read += [list(text) for text in texts]
                for leaves in (None, 0, 2):  # a row, then a prompt with its only row
                    if leaves is not None:
                        order = batch.keep([i for i in range(len(texts)) if i != leaves])
                        texts = [texts[i] for i in order]
                    tokens = (ids[: len(texts)] * 3 + len(texts[0])) % vocabulary
                    found.append(batch.step(torch.from_numpy(tokens).to(batch.device)))
                    texts = [[*text, token] for text, token in zip(texts, tokens.tolist(), strict=True)]
                    read += texts
            expected = [model(input_ids=torch.tensor([text], device=batch.device)).logits[0, -1] for text in read]
    except (NotShared, TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    off = (torch.cat(found).double().log_softmax(-1) - torch.stack(expected).double().log_softmax(-1)).abs().max()
    return float(off) <= (TOLERANCE if model.dtype in (torch.float32, torch.float64) else 0.15)


def _bare(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _cache_name(model: Model) -> str | None:
    """The forward's argument for a cache: "cache" in transformers from 5.24 on, "past_key_values" before.

    None for models that keep their state under other names: they are computed anew each step, unpadded.
    """
    bare = _bare(model)
    takes = inspect.signature(bare.forward).parameters
    named = [name for name in ("cache", "past_key_values") if name in takes]
    return named[0] if named and not getattr(bare, "_is_stateful", False) else None


def _last_logits(model: Model, places: Tensor, **inputs) -> Tensor:
    """(B, len(places), V): the logits of some places alone, where the forward can do that."""
    if "logits_to_keep" in inspect.signature(_bare(model).forward).parameters:
        return model(logits_to_keep=places, **inputs).logits
    return model(**inputs).logits[:, places]


def _batches(
    prompts, samples: int, max_tokens: int, places: int, *, shared: bool, equal: bool
) -> Iterator[list[tuple[int, int]]]:
    """Lists of (prompt, sample) of about one length, longest first, so that memory runs out at once or never.

    shared: a prompt takes its places once, not once a row. equal: prompts of one length alone stand together.
    """
    batch: list[tuple[int, int]] = []
    width = used = 0
    for at in sorted(range(len(prompts)), key=lambda at: -len(prompts[at])):
        for sample in range(samples):
            stands = shared and bool(batch) and batch[-1][0] == at
            needs = max_tokens + (0 if stands else max(width, len(prompts[at])))
            if batch and (used + needs > places or (equal and len(prompts[at]) != width)):
                yield batch
                batch, used, needs = [], 0, max_tokens + len(prompts[at])
            if not batch:
                width = len(prompts[at])
            batch.append((at, sample))
            used += needs
    if batch:
        yield batch


def _complete(call: _Call, engine, prompts, rows: list[tuple[int, int]]) -> list[Sample]:
    """Completions of one batch. Prompts that occur in several rows are read once, finished rows leave."""
    distinct = list(dict.fromkeys(at for at, _ in rows))
    place = {at: i for i, at in enumerate(distinct)}
    batch = engine(call.model, [prompts[at] for at in distinct], [place[at] for at, _ in rows], call.max_tokens)
    draws = np.stack([_stream(call.seed, call.numbers[at], sample, call.max_tokens) for at, sample in rows])
    room = [min(call.max_tokens, (call.limit or 1 << 60) - len(prompts[at])) for at, _ in rows]
    tokens: list[list[int]] = [[] for _ in rows]
    logps: list[list[float]] = [[] for _ in rows]
    live = list(range(len(rows)))  # row i of the batch is rows[live[i]]
    logits = batch.read()
    for step in range(max(room)):
        chosen, chosen_logps = _pick(logits, call.temperature, torch.from_numpy(draws[live, step]))
        if not bool(torch.isfinite(chosen_logps).all()):
            bad = call.numbers[rows[live[int((~torch.isfinite(chosen_logps)).nonzero()[0])]][0]]
            raise NotFiniteError("the model's logits are not finite", where=f"prompt {bad + 1}, token {step + 1}")
        for row, token, logp in zip(live, chosen.tolist(), chosen_logps.tolist(), strict=True):
            tokens[row].append(token)
            logps[row].append(logp)
        stay = [i for i, row in enumerate(live) if tokens[row][-1] not in call.ends and len(tokens[row]) < room[row]]
        if not stay:
            break
        if len(stay) < len(live):
            order = batch.keep(stay)
            chosen, live = chosen[torch.tensor(order, device=chosen.device)], [live[i] for i in order]
        logits = batch.step(chosen)

    return [_sample(*rows[row], tokens[row], logps[row], call.ends) for row in range(len(rows))]


def _sample(prompt: int, sample: int, tokens: list[int], logps: list[float], ends: frozenset[int]) -> Sample:
    token_logps = np.array(logps, dtype=np.float64)
    finished = tokens[-1] in ends
    return Sample(prompt, sample, np.array(tokens, dtype=np.int32), token_logps, float(token_logps.sum()), finished)


def _left_padded(prompts: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask, (B, longest) int64: every row ends at the last column. Nobody reads what is under the padding."""
    width = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _stream(seed: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1), the stream of this sample alone. Hashed: neighbouring seeds share nothing."""
    key = hashlib.sha256(f"palate sample {seed} {prompt} {sample}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count)


def _pick(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen token of each row (B,) and its log-prob at temperature 1 (B,), by inverse distribution function."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = wide - wide.amax(-1, keepdim=True)
    if temperature == 0:
        chosen = wide.argmax(-1)
        return chosen, wide.gather(-1, chosen[:, None])[:, 0] - wide.logsumexp(-1)
    weights = wide.exp() if temperature == 1 else (wide / temperature).exp_()
    missing = -weights.shape[1] % BLOCK
    blocks = (nn.functional.pad(weights, (0, missing)) if missing else weights).unflatten(1, (-1, BLOCK))
    # The first token whose sum is above u * total: first its block, then its place there; float64 for few numbers.
    sums = _wider(blocks.sum(-1)).cumsum(-1)
    target = uniform.to(sums.device)[:, None] * sums[:, -1:]
    block = _first_above(sums, target)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0)
    mine = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0].to(blocks.device)]
    place = _first_above(_wider(mine).cumsum(-1), target - before)
    chosen = (block * BLOCK + place)[:, 0].clamp(max=wide.shape[1] - 1).to(wide.device)
    total = sums[:, -1].log().to(wide) if temperature == 1 else wide.logsumexp(-1)
    return chosen, wide.gather(-1, chosen[:, None])[:, 0] - total


def _wider(x: Tensor) -> Tensor:
    return x.to(float64_device(x.device)).double()


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """(B, 1) the first column whose sum is above the target; if rounding met the end, the last that adds anything."""
    last = torch.nextafter(sums[:, -1:], torch.zeros_like(target))
    found = torch.searchsorted(sums, torch.minimum(target, last).clamp(min=0), right=True)
    return found.clamp(max=sums.shape[1] - 1)  # which sums that are not finite need
