"""Model x batch -> log-probs, or a scalar head's numbers: what every method's numbers come from.

A model that passes the probe runs on the shared-prompt stream; one that does not (it ignores the attention interface,
or mixes along the stream) is scored as padded rows through its stock forward, with the same numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from palate.data.batch import TokenBatch, collate, collate_ends, float64_device, stream_length
from palate.data.stream import pack
from palate.data.tokens import TokenGroup
from palate.errors import ModelError
from palate.layout import MICRO_BATCH_TOKENS
from palate.model.attention import NotShared, counted_calls, expected_calls, shared_attention
from palate.model.heads import backbone, scalar_head
from palate.model.logprob import ROWS, logit_transform, scored_rows
from palate.model.recurrent import Branching

Precision = Literal["float32", "bfloat16"]
STREAM = 64  # a multiple that is enough in float32 wherever it was tried, from one of these lengths on
SHORTEST = {"float32": (0, 256, 512, 768), "bfloat16": (0,)}  # bfloat16 kernels may change at any length


@dataclass(frozen=True)
class Support:
    """How a model is scored, as its probe found.

    path: "shared" (one stream), "padded" (rows, our head) or "plain" (rows, the model's own logits).
    error: largest difference from row-by-row scoring on the probe, nats a token. reason: why not "shared".
    """

    path: Literal["shared", "padded", "plain"]
    error: float
    reason: str = ""


@dataclass(frozen=True)
class Numerics:
    """How numbers are made. Policy and reference share one, so that equal weights give equal bits.

    precision: "bfloat16" runs the matmuls in bfloat16; weights, residual stream, norms and softmax stay float32.
    stream: streams are filled with an inert tail to a multiple of this length, since kernels round differently at
    some lengths; None: no tail. shortest: and to this length, since threads divide short products differently.
    temperature: logits are divided by it, in every log-prob: that of the policy that was sampled from.
    """

    precision: Precision = "float32"
    stream: int | None = None
    temperature: float = 1.0
    shortest: int = 0

    @classmethod
    def of(cls, model: nn.Module, precision: Precision = "float32", tokens: int = MICRO_BATCH_TOKENS) -> "Numerics":
        """The numerics a run should use: the shortest tail at which the model's bits do not depend on the stream.

        tokens: of a micro-batch, the longest. On padded rows nothing makes the bits so; there the tail is none.
        """
        if support(model).path != "shared":
            return cls(precision)
        known = _INVARIANT.setdefault(_bare(model), {})
        for shortest in (n for n in SHORTEST[precision] if n <= tokens):
            found = cls(precision, min(STREAM, tokens), shortest=shortest)
            key = found, torch.get_num_threads()
            if key not in known:
                known[key] = _invariant(model, found)
            if known[key]:
                return found
        return cls(precision, tokens)

    def tail(self, length: int) -> int:
        """Inert tokens after a stream of `length`."""
        if self.stream is None:
            return 0
        return -(-max(length, self.shortest) // self.stream) * self.stream - length

    def tag(self, model: nn.Module) -> str:
        """A name for everything besides weights and tokens that can move a rounding."""
        import transformers

        path = support(model).path
        versions = f"torch={torch.__version__} transformers={transformers.__version__}"
        where = f"device={model.device.type} threads={torch.get_num_threads()}"
        softer = "" if self.temperature == 1 else f" temperature={self.temperature}"
        longer = f"+{self.shortest}" if self.shortest else ""
        return f"{self.precision} {path} stream={self.stream}{longer}{softer} {where} {versions}"


@dataclass(frozen=True)
class SequenceLogps:
    """total: (S,) summed log-probs of the scored tokens, nats, float64. length: (S,) scored tokens, int64."""

    total: Tensor
    length: Tensor


def token_logps(model: nn.Module, batch: TokenBatch, *, numerics: Numerics = Numerics()) -> Tensor:
    """(N,) log-probs of the batch's targets, nats, float32 (float64 for a float64 model); differentiable.

    The batch must lie on the model's device.
    """
    if not len(batch.targets):
        return torch.zeros(0, device=batch.tokens.device)
    return _RUN[support(model).path](model, batch, numerics)


def logps_and_values(
    policy: nn.Module, critic: nn.Module | None, batch: TokenBatch, *, numerics: Numerics = Numerics()
) -> tuple[Tensor, Tensor | None]:
    """(N,) log-probs of the batch's targets and (N,) values of the states they were chosen in, float64; differentiable.

    critic: a model with a scalar head; or a linear layer, which reads the policy's own last states, so that one forward
    gives both; or None, and no values. Raises ModelError (E407) for such a layer on a model whose head is not ours.
    """
    device = float64_device(batch.tokens.device)
    if not isinstance(critic, nn.Linear):
        found = token_logps(policy, batch, numerics=numerics).to(device).double()
        own = replace(numerics, temperature=1.0)
        return found, None if critic is None else scalars(critic, batch, numerics=own) + reward_bias(critic)
    path = support(policy).path
    if path == "plain":
        what = f"{type(policy).__name__} gives no states for a value head ({support(policy).reason})"
        raise ModelError(what, code="E407", next="give the critic a trunk of its own")
    rows: list[Tensor] = []
    found = _RUN[path](policy, batch, numerics, rows)
    values = critic(rows[0].to(critic.weight.dtype))[: len(batch.targets), 0]  # in the head's own precision
    return found.to(device).double(), values.to(device).double()


def sequence_logps(tokens: Tensor, batch: TokenBatch) -> SequenceLogps:
    """Sums over each completion, in float64: a sum of 3,000 nats has a float32 step of 2e-4.

    Where a device has no float64 (MPS) the sums are taken on the CPU.
    """
    device = float64_device(tokens.device)
    length = batch.length.to(device)
    # by segments and not by index: a completion's tokens stand together, and the sum has one order on every device
    total = torch.segment_reduce(tokens.to(device).double(), "sum", lengths=length, axis=0, initial=0)
    return SequenceLogps(total, length)


def logps(model: nn.Module, batch: TokenBatch, *, numerics: Numerics = Numerics()) -> SequenceLogps:
    """Summed log-prob of every completion of the batch: `token_logps`, then `sequence_logps`."""
    return sequence_logps(token_logps(model, batch, numerics=numerics), batch)


def scalars(model: nn.Module, batch: TokenBatch, *, numerics: Numerics = Numerics()) -> Tensor:
    """(N,) what the model's scalar head says at the batch's predictors, float64; differentiable.

    At the predictors of `collate` these are values of the states in which a token was chosen; at those of
    `collate_ends` rewards of whole texts. `reward_bias` of the config is not in them.
    """
    if not len(batch.predictors):
        return torch.zeros(0, dtype=torch.float64, device=float64_device(batch.tokens.device))
    return _scalars(model, batch, numerics, support(model).path)


def rewards(
    model: nn.Module, groups: Sequence[TokenGroup], *, numerics=Numerics(), tokens: int = MICRO_BATCH_TOKENS
) -> list[float]:
    """The reward of every completion of every group, in order, read at its last token; `reward_bias` is in them.

    tokens: stream tokens per micro-batch.
    """
    found: list[float] = []
    with torch.no_grad(), evaluation_mode(model):
        for part in pack([stream_length(group) for group in groups], tokens):
            batch = collate_ends([groups[i] for i in part]).to(model.device)
            found += (scalars(model, batch, numerics=numerics) + reward_bias(model)).tolist()
    return found


def reward_bias(model: nn.Module) -> float:
    """What a reward model's config says is added to what its head says; 0 unless it says so."""
    return float(getattr(model.config, "reward_bias", 0.0))


# --- the three ways through a model -------------------------------------------------------------------------------


def _autocast(model: nn.Module, numerics: Numerics):
    if numerics.precision != "bfloat16":
        return nullcontext()
    return torch.autocast(model.device.type, torch.bfloat16)


def _shared(model: nn.Module, batch: TokenBatch, numerics: Numerics, hidden: list[Tensor] | None = None) -> Tensor:
    tail = numerics.tail(len(batch.tokens))
    head = _head(model, batch.predictors, batch.targets, numerics, hidden)
    layout = replace(batch.layout, tail=tail)
    with _autocast(model, numerics), shared_attention(model, layout), head as found:
        model(
            input_ids=nn.functional.pad(batch.tokens, (0, tail))[None],
            position_ids=nn.functional.pad(batch.positions, (0, tail))[None],
            use_cache=False,
        )
    return _only(found)


def _padded(model: nn.Module, batch: TokenBatch, numerics: Numerics, hidden: list[Tensor] | None = None) -> Tensor:
    ids, mask, rows = _rows(batch)
    with _autocast(model, numerics), _head(model, rows, batch.targets, numerics, hidden) as found:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return _only(found)


def _plain(model: nn.Module, batch: TokenBatch, numerics: Numerics) -> Tensor:
    ids, mask, rows = _rows(batch)
    with _autocast(model, numerics):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits = logits.reshape(-1, logits.shape[-1]).index_select(0, rows)
    wide = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / numerics.temperature).log_softmax(-1)
    return wide.gather(-1, batch.targets[:, None])[:, 0]


def _scalars(model: nn.Module, batch: TokenBatch, numerics: Numerics, path: str) -> Tensor:
    body, head = backbone(model), scalar_head(model)
    assert head is not None
    if path == "shared":
        tail, rows = numerics.tail(len(batch.tokens)), batch.predictors
        layout = replace(batch.layout, tail=tail)
        with _autocast(model, numerics), shared_attention(model, layout):
            hidden = body(
                input_ids=nn.functional.pad(batch.tokens, (0, tail))[None],
                position_ids=nn.functional.pad(batch.positions, (0, tail))[None],
                use_cache=False,
            ).last_hidden_state
    else:
        ids, mask, rows = _rows(batch)
        with _autocast(model, numerics):
            hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    count = len(rows)
    hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, nn.functional.pad(rows, (0, -count % ROWS)))
    found = head(hidden.to(next(head.parameters()).dtype))[:count, 0]  # in the head's own precision
    return found.to(float64_device(found.device)).double()


_RUN = {"shared": _shared, "padded": _padded, "plain": _plain}


def _head(model: nn.Module, rows: Tensor, targets: Tensor, numerics: Numerics, hidden: list[Tensor] | None):
    own, temperature = logit_transform(model.config.get_text_config(decoder=True)), numerics.temperature

    def softened(logits: Tensor) -> Tensor:
        return (logits if own is None else own(logits)) / temperature

    return scored_rows(model, rows, targets, own if temperature == 1 else softened, hidden)


def _only(found: list[Tensor]) -> Tensor:
    if len(found) != 1:
        raise NotShared(f"the forward called the LM head {len(found)} times")
    return found[0]


def _rows(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded (S, L) ids and mask, and the predictors as indices into the flattened rows.

    Pads follow the text, so a causal model never sees them; any valid id serves.
    """
    device = batch.tokens.device
    rows, where, start = [], [], 0
    for prompt, branches in zip(batch.layout.prompts, batch.layout.branches, strict=True):
        stem = torch.arange(start, start + prompt, device=device)
        start += prompt
        for length in branches:
            where.append(torch.cat((stem, torch.arange(start, start + length, device=device))))
            rows.append(batch.tokens[where[-1]])
            start += length
    width = max((len(row) for row in rows), default=1) or 1
    ids = torch.zeros(len(rows), width, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    # a predictor is a stream row; in its completion's padded row it stands as many places in as its position says
    return ids, mask, batch.sequence * width + batch.positions[batch.predictors]


# --- the probe ------------------------------------------------------------------------------------------------------

_SUPPORT: WeakKeyDictionary[nn.Module, Support] = WeakKeyDictionary()
_INVARIANT: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()
TOLERANCE = 5e-4  # nats a token; float32 differs by 1e-5, a model that ignores the layout by 0.1 and more
_HALF_TOLERANCE = 0.15  # the same where the weights are half floats
_ROUNDING = 1e-5  # between two calls of the same forward


def support(model: nn.Module) -> Support:
    """How the model is scored; probed once per model, on a dozen tokens, in the weights' own dtype.

    The shared stream is taken only if our attention is called once per layer (with a window where the config has one),
    every log-prob equals row-by-row scoring by the stock forward, and a changed token moves its own branch alone.
    Raises ModelError where the model gives no logits at all. A model without numbers (on the meta device) cannot be
    probed, and is taken at its config's word.
    """
    key = _bare(model)
    if key not in _SUPPORT and key.device.type == "meta":
        shared = expected_calls(key) is not None
        _SUPPORT[key] = Support("shared" if shared else "padded", 0.0, "" if shared else "as its config says")
    if key not in _SUPPORT:
        with torch.no_grad(), evaluation_mode(model):
            _SUPPORT[key] = _probe(model)
    return _SUPPORT[key]


def _bare(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block, whatever the model's mode; every module gets its mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _probe(model: nn.Module) -> Support:
    batches = [collate(groups).to(model.device) for groups in _probe_groups(model)]
    try:
        truth = [_row_by_row(model, batch) for batch in batches]
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ModelError(f"{type(model).__name__} gives no logits for input_ids: {error}", code="E407") from error
    before = batches[0].sequence.tolist().index(1)  # the first token of the branch whose second token is another one
    if not _same(model, truth[0][before], truth[1][before]):
        what = f"{type(model).__name__} sees the tokens that it is to predict"
        raise ModelError(what, code="E407", next="take a causal model, or set is_decoder in its config")
    tolerance = TOLERANCE if model.dtype in (torch.float32, torch.float64) else _HALF_TOLERANCE
    reasons = []
    for path in ("shared", "padded") if scalar_head(model) is not None else ("shared", "padded", "plain"):
        try:
            got = _probe_path(model, path, batches)
        except (NotShared, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reasons.append(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        error = max(float((a - b).abs().max()) for a, b in zip(got, truth, strict=True))
        if error <= tolerance:
            return Support(path, error, "; ".join(reasons))
        reasons.append(f"{path}: log-probs differ from row-by-row scoring by {error:.2g} nats a token")
    raise ModelError(f"{type(model).__name__} cannot be scored ({'; '.join(reasons)})", code="E407")


def _invariant(model: nn.Module, numerics: Numerics) -> bool:
    """Whether a group's log-probs have the same bits alone, and in streams some hundred tokens longer than any."""
    with torch.no_grad(), evaluation_mode(model):
        return _same_bits(model, numerics)


def _same_bits(model: nn.Module, numerics: Numerics) -> bool:
    (group, *_), _ = _probe_groups(model)
    config = model.config.get_text_config(decoder=True)
    room = getattr(config, "max_position_embeddings", 1024) - max(map(len, group.completions))
    long = [replace(group, prompt=np.arange(min(n, room), dtype=np.int32) % config.vocab_size) for n in (64, 200)]

    def totals(many: list[TokenGroup]) -> Tensor:
        batch = collate(many).to(model.device)
        return sequence_logps(_probed(model, "shared", batch, numerics), batch).total

    alone = [totals([one]) for one in (group, *long)]
    more = [long[1]] * (2 + numerics.shortest // 200)
    for many in ([group, *long], [*long[::-1], group, *more], [long[0], group, long[0]]):
        together = totals(many)
        expected = torch.cat([alone[(group, *long).index(one)] for one in many])
        if not torch.equal(together, expected):
            return False
    return True


def _probe_path(model: nn.Module, path: str, batches: list[TokenBatch]) -> list[Tensor]:
    if path != "shared":
        return [_probed(model, path, batch, Numerics()).double() for batch in batches]
    expected = expected_calls(model)
    got = []
    for batch in batches:
        with counted_calls() as calls:
            got.append(_probed(model, path, batch, Numerics()).double())
            found = (calls.total, calls.windowed, Branching.calls)
            if found not in (expected, tuple(2 * n for n in expected)):  # twice: differential attention
                raise NotShared(f"(attention, windowed, stateful) layers called {found} times, not {expected}")
    others = batches[0].sequence != 1
    if not _same(model, got[0][others], got[1][others]):
        raise NotShared("a token of one branch moves another branch")
    return got


def _same(model: nn.Module, first: Tensor, second: Tensor) -> bool:
    """Whether they are the same but for the rounding of matrix products that another token of the batch went into."""
    tolerance = _ROUNDING if model.dtype in (torch.float32, torch.float64) else _HALF_TOLERANCE
    return bool((first - second).abs().max() <= tolerance)


def _probed(model: nn.Module, path: str, batch: TokenBatch, numerics: Numerics) -> Tensor:
    """(N,) what the model is for: numbers of its scalar head, or log-probs."""
    return (
        _scalars(model, batch, numerics, path) if scalar_head(model) is not None else _RUN[path](model, batch, numerics)
    )


def _probe_groups(model: nn.Module) -> list[list[TokenGroup]]:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = [(7 * i * i + 3 * i + 11) % max(vocabulary - 1, 1) for i in range(40)]

    def group(prompt: list[int], *completions: list[int]) -> TokenGroup:
        arrays = tuple(np.array(c, dtype=np.int32) for c in completions)
        return TokenGroup(np.array(prompt, dtype=np.int32), arrays, tuple(((0, len(c)),) for c in arrays))

    first, second = ids[5:9], ids[9:15]
    changed = [second[0], (second[1] + 1) % vocabulary, *second[2:]]
    other = group(ids[15:18], ids[18:20], ids[20:23], ids[23:28])
    return [[group(ids[:5], first, second), other], [group(ids[:5], first, changed), other]]


def _row_by_row(model: nn.Module, batch: TokenBatch) -> Tensor:
    """(N,) float64, as `_probed`, by one stock forward a completion: slow, and right for any causal model."""
    ids, mask, rows = _rows(batch)
    head = scalar_head(model)
    width = ids.shape[1]
    parts = []
    for number in range(len(ids)):
        length = int(mask[number].sum())
        row, mine = ids[number : number + 1, :length], batch.sequence == number
        if head is not None:
            hidden = backbone(model)(input_ids=row, use_cache=False).last_hidden_state[0]
            parts.append(head(hidden)[rows[mine] - number * width, 0].double())
            continue
        logits = model(input_ids=row, use_cache=False).logits[0].double()
        chosen = logits[rows[mine] - number * width].log_softmax(-1)
        parts.append(chosen.gather(-1, batch.targets[mine][:, None])[:, 0])
    return torch.cat(parts)
