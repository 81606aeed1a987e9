"""Prompts and a policy in, completions with their log-probs out: the one arrow that goes back from model to records.

A small loop over the model's stock forward. What a prompt gets depends on the weights, the seed and its place in the
list, not on what else is in the batch: each sample has its own random stream and spends one number a token.
"""

import hashlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palate.data.tokens import decode_completion
from palate.errors import DataError, NotFiniteError, UsageError
from palate.model import Model
from palate.model.load import context


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
    first: int = 0,
    end_ids: Collection[int] | None = None,
    batch_tokens: int | None = None,
) -> list[Sample]:
    """`samples` completions of every prompt, in the order of the prompts: len(prompts) * samples.

    prompts: token ids (P,), at least one each, as the model is to see them.
    max_tokens: tokens of a completion, >= 1; the model's context bounds it too.
    temperature: 0 takes the likeliest token (as transformers' greedy search, token for token), 1 is the model itself.
    seed: another seed, another draw; a larger max_tokens prolongs the same completions.
    first: number of the first prompt, where these are a part of a longer list: each draws what it would draw there.
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
    for number, prompt in enumerate(prompts, first + 1):
        if len(prompt) == 0:
            raise DataError("the prompt has no tokens, so nothing predicts a first one", where=f"prompt {number}")
        if limit is not None and len(prompt) >= limit:
            raise DataError(
                f"the prompt has {len(prompt)} tokens, the model takes {limit} with the completion",
                where=f"prompt {number}",
                next="shorten it",
            )
    call = _Call(model, max_tokens, temperature, seed, first, frozenset(int(id) for id in end_ids), limit)
    if batch_tokens is None:
        batch_tokens = 8192 if call.device.type == "cpu" else 65536
    made: list[Sample] = []
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            for rows in _batches(prompts, samples, max_tokens, batch_tokens, equal=call.cache_name is None):
                made.extend(_complete(call, prompts, rows))
    finally:
        model.train(was)
    return sorted(made, key=lambda sample: (sample.prompt, sample.sample))


def text_of(sample: Sample, prompt: np.ndarray, tokenizer) -> str:
    """The sample's text as it stands after its prompt, without the token that ends it."""
    return decode_completion(tokenizer, prompt, sample.ids[:-1] if sample.finished else sample.ids)


class _Call:
    """What stays the same over all batches of one call."""

    def __init__(self, model, max_tokens, temperature, seed, first, ends, limit):
        self.model, self.max_tokens, self.temperature = model, max_tokens, temperature
        self.seed, self.first, self.ends, self.limit = seed, first, ends, limit
        self.device = model.get_input_embeddings().weight.device
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.takes = inspect.signature(base.forward).parameters.keys()
        # transformers calls it "cache" from 5.24 on, "past_key_values" before. Recurrent models keep their state under
        # other names: they are computed anew each step, unpadded.
        named = [name for name in ("cache", "past_key_values") if name in self.takes]
        self.cache_name = named[0] if named and not getattr(base, "_is_stateful", False) else None

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache) -> tuple[Tensor, Any]:
        """Logits of the last place, (B, V) float32, and the cache that now holds `ids`."""
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": self.cache_name is not None}
        if "attention_mask" in self.takes:
            inputs["attention_mask"] = mask
        if "position_ids" in self.takes:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        if cache is not None:
            inputs[self.cache_name] = cache
        out = self.model(**inputs)
        return out.logits[:, -1].float(), None if self.cache_name is None else getattr(out, self.cache_name)


def _batches(prompts, samples: int, max_tokens: int, places: int, equal: bool) -> Iterator[list[tuple[int, int]]]:
    """Lists of (prompt, sample) of about one length, longest first, so that memory runs out at once or never."""
    rows = [
        (at, sample)
        for at in sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
        for sample in range(samples)
    ]
    batch: list[tuple[int, int]] = []
    width = 0
    for row in rows:
        length = len(prompts[row[0]])
        if batch and ((len(batch) + 1) * (width + max_tokens) > places or (equal and length != width)):
            yield batch
            batch = []
        if not batch:
            width = length
        batch.append(row)
    if batch:
        yield batch


def _complete(call: _Call, prompts, rows: list[tuple[int, int]]) -> list[Sample]:
    """Completions of one batch. Prompts that occur in several rows are read once, finished rows leave."""
    device = call.device
    distinct = list(dict.fromkeys(at for at, _ in rows))
    ids, mask = _left_padded([prompts[at] for at in distinct], device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits, cache = call.forward(ids, mask, positions, None)
    place = {at: i for i, at in enumerate(distinct)}
    spread = torch.tensor([place[at] for at, _ in rows], device=device)
    logits, mask = logits[spread], mask[spread]
    if cache is None:
        ids = ids[spread]
    elif len(rows) > len(distinct):
        cache.batch_select_indices(spread)
    lengths = mask.sum(1)
    draws = [_stream(call.seed, call.first + at, sample, call.max_tokens) for at, sample in rows]
    room = [min(call.max_tokens, (call.limit or 1 << 60) - len(prompts[at])) for at, _ in rows]
    tokens: list[list[int]] = [[] for _ in rows]
    logps: list[list[float]] = [[] for _ in rows]
    live = list(range(len(rows)))  # row i of the tensors is rows[live[i]]

    for step in range(max(room)):
        uniform = torch.tensor([draws[row][step] for row in live], dtype=torch.float64)
        chosen, chosen_logps = _pick(logits, call.temperature, uniform)
        if not bool(torch.isfinite(chosen_logps).all()):
            bad = call.first + rows[live[int((~torch.isfinite(chosen_logps)).nonzero()[0])]][0]
            raise NotFiniteError("the model's logits are not finite", where=f"prompt {bad + 1}, token {step + 1}")
        for row, token, logp in zip(live, chosen.tolist(), chosen_logps.tolist(), strict=True):
            tokens[row].append(token)
            logps[row].append(logp)
        stay = [i for i, row in enumerate(live) if tokens[row][-1] not in call.ends and len(tokens[row]) < room[row]]
        if not stay:
            break
        if len(stay) < len(live):
            kept = torch.tensor(stay, device=device)
            chosen, mask, lengths, live = chosen[kept], mask[kept], lengths[kept], [live[i] for i in stay]
            if cache is None:
                ids = ids[kept]
            else:
                cache.batch_select_indices(kept)
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        if cache is None:
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            logits, _ = call.forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), None)
        else:
            logits, cache = call.forward(chosen[:, None], mask, lengths[:, None], cache)
        lengths = lengths + 1

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
    if temperature == 0:
        chosen = logits.argmax(-1)
    else:
        exact = logits.cpu() if logits.device.type == "mps" else logits  # MPS has no float64
        weights = ((exact - exact.amax(-1, keepdim=True)).double() / temperature).exp()
        sums = weights.cumsum(-1)
        # The first token whose sum is above u * total has a weight above zero, also where rounding meets the end.
        total = sums[:, -1:]
        target = torch.minimum(
            uniform.to(sums.device)[:, None] * total, torch.nextafter(total, torch.zeros_like(total))
        )
        chosen = torch.searchsorted(sums, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1).to(logits.device)
    return chosen, logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
