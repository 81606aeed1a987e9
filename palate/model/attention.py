"""Attention over a shared-prompt stream, and the proof that a model really uses it.

transformers calls a registered function in place of its own attention; it runs over the stream stretch by stretch: a
prompt is plain causal text, each of its branches queries [prompt, branch].
The implementation is switched on inside `shared_attention` only: `generate` needs the stock one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from palate.layout import Layout
from palate.model.branching import Branches
from palate.model.recurrent import Branching, stateful_layers
from palate.model.varlen import flex_attention, varlen_attention

NAME = "palate_shared_prompt"
_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


class NotShared(Exception):
    """The model cannot run on a shared-prompt stream: it ignores the attention interface, or asks more of it."""


class _Calls:
    """What the probe wants to know: how often the function was called, and how often with a window."""

    total = 0
    windowed = 0


def stream_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    palate_layout: Layout | None = None,
    palate_branches: Branches | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Attention output (1, T, heads, dim) of a stream; query (1, heads, T, dim), key and value with kv heads.

    palate_layout: of the stream, where `shared_attention` was not given it.
    palate_branches: the cache of rows that are being sampled, which then knows what a query may see.
    scaling: the module's own; sliding_window: in positions; softcap: Gemma 2's tanh cap; s_aux: gpt-oss's sinks.
    Raises NotShared where the model gives a mask of its own (ALiBi, prefix masks).
    """
    if palate_branches is not None and attention_mask is None:
        return palate_branches.attend(query, scaling, sliding_window, softcap, s_aux), None
    layout = palate_layout or _LAYOUT.get()
    if layout is None or attention_mask is not None:
        raise NotShared("the model passes a mask of its own")
    _Calls.total += 1
    _Calls.windowed += sliding_window is not None
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # rotary tables made float32 of what the projections gave
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    kernel, operands = kernel_for(query, value, softcap, s_aux), (query[0], key[0], value[0])
    if kernel == "varlen":
        return varlen_attention(layout, *operands, scaling, sliding_window)[None], None
    if kernel == "flex":
        return flex_attention(layout, *operands, scaling, sliding_window, softcap, s_aux)[None], None
    # One split per layer: slicing stretch by stretch would make every backward allocate a full-size zero tensor.
    q, k, v = (x[0].split(layout.sizes, dim=1) for x in (query, key, value))
    out = list(q)  # empty stretches and the inert tail stay what they are

    def attend(stretches, keys, values, rows, columns):
        operands = (_filled([(q[i],) for i in stretches], rows), _filled(keys, columns), _filled(values, columns))
        result = _attention(*operands, rows, columns, scaling, sliding_window, softcap, s_aux)
        for stretch, part in zip(stretches, result.unbind(0), strict=True):
            out[stretch] = part

    for prompt, stems in layout.stems.items():
        attend(stems, [(k[i],) for i in stems], [(v[i],) for i in stems], prompt, prompt)
    for (prompt, length), pairs in layout.forks.items():
        # All branches are treated alike, the first one too: a completion's bits do not depend on what stands beside it.
        keys, values = ([(x[stem], x[branch]) for stem, branch in pairs] for x in (k, v))
        attend([branch for _, branch in pairs], keys, values, length, prompt + length)
    if value.shape[-1] != query.shape[-1]:  # an untouched stretch has the queries' width
        out = [x if x.shape[-1] == value.shape[-1] else x.new_zeros(*x.shape[:-1], value.shape[-1]) for x in out]
    return torch.cat([x.transpose(0, 1) for x in out]).unsqueeze(0), None


def kernel_for(query: Tensor, value: Tensor, softcap: float | None, sinks: Tensor | None) -> str:
    """How a stream is attended: "varlen" (one flash call), "flex" (soft cap, sinks), or "stretches" (everything else).

    Flash kernels are for half floats on CUDA, of at most 256 dimensions.
    """
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return "stretches"
    plain = softcap is None and sinks is None
    return "varlen" if plain and query.shape[-1] <= 256 and value.shape[-1] <= query.shape[-1] else "flex"


def _filled(stretches: list[tuple[Tensor, ...]], length: int) -> Tensor:
    """(n, heads, L, dim): each tuple laid end to end, filled up to L, the next multiple of 8.

    The CPU kernel's scratch memory then is aligned for every thread, so that the bits do not depend on which thread
    takes a head, or on n. What fills is masked.
    """
    one = stretches[0][0]
    if missing := -length % 8:
        zeros = one.new_zeros(one.shape[0], missing, one.shape[2])
        stretches = [(*parts, zeros) for parts in stretches]
    rows = [parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in stretches]
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)


def _attention(q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, scaling, window, softcap, sinks) -> Tensor:
    """Causal attention (n, heads, rows, dim), the queries aligned to the lower right of `columns` keys."""
    window = None if window is None or window >= columns else window
    if softcap is None and sinks is None:
        plain = rows == columns and window is None
        mask = None if plain else _allowed(rows, columns, window, q.device)
        gqa = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(q, k, v, mask, is_causal=plain, scale=scaling, enable_gqa=gqa)
        return out[:, :, :rows]
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide).masked_fill(~_allowed(rows, columns, window, q.device), float("-inf"))
    if sinks is not None:  # a learned score per head that takes part in the softmax and has no value
        sinks = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    else:
        scores = scores.softmax(-1)
    return (scores.to(v.dtype) @ v)[:, :, :rows]


@lru_cache(maxsize=512)
def _allowed(rows: int, columns: int, window: int | None, device: torch.device) -> Tensor:
    """(rows, columns), filled up to multiples of 8, bool: which keys the last `rows` of `columns` positions may see."""
    distance = torch.arange(columns - rows, columns, device=device)[:, None] - torch.arange(columns, device=device)
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    allowed = nn.functional.pad(allowed, (0, -columns % 8, 0, -rows % 8))
    allowed[rows:, 0] = True  # a filling row sees one key, so that its softmax is finite; nothing reads it
    return allowed


def forget_masks() -> None:
    """Drops the masks that are kept from call to call: those made on tensors without numbers serve nobody else."""
    _allowed.cache_clear()


AttentionInterface.register(NAME, stream_attention)


@contextmanager
def shared_attention(model: nn.Module, layout: Layout | None = None) -> Iterator[None]:
    """Within the block the model's attention is `stream_attention`, and a layer that carries a state runs `Branching`.

    layout: of the stream that the block's forwards run on; without it each attention call is told, and states are not.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    forwards = [(layer, layer.__dict__.get("forward")) for layer in (stateful_layers(model) if layout else ())]
    token = _LAYOUT.set(layout)
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        for layer, _ in forwards:
            layer.forward = Branching(layer, layout)
        yield
    finally:
        _LAYOUT.reset(token)
        for config, name in before:
            config._attn_implementation_internal = name
        for layer, own in forwards:
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def current_layout() -> Layout | None:
    """The layout that `shared_attention` was entered with; None outside of it."""
    return _LAYOUT.get()


@contextmanager
def counted_calls() -> Iterator[_Calls]:
    """Counts the calls of `stream_attention` and `Branching` inside the block."""
    _Calls.total = _Calls.windowed = Branching.calls = 0
    yield _Calls


# kinds of layers that config and layer agree on: (attention, with a window)
_KINDS = {
    "full_attention": (1, 0),
    "sliding_attention": (1, 1),
    "linear_attention": (0, 0),
    "conv": (0, 0),
    "hybrid": (1, 0),
    "hybrid_sliding": (1, 1),
    "mlp": (0, 0),
    "moe": (0, 0),
}


def expected_calls(model: nn.Module) -> tuple[int, int, int]:
    """(attention layers, those with a window, layers with a state) that config and model promise.

    Raises NotShared for kinds of layers that are not known here (chunked, indexed attention): they may look right on a
    short probe.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    layers = getattr(config, "num_hidden_layers", None)
    stateful = len(stateful_layers(model))
    if layers is None or getattr(config, "alibi", False):
        raise NotShared("ALiBi" if layers else "the config has no number of layers")
    if kinds is not None:
        if unknown := sorted(set(kinds) - set(_KINDS)):
            raise NotShared(f"layers with {', '.join(unknown).replace('_', ' ')}")
        return sum(_KINDS[kind][0] for kind in kinds), sum(_KINDS[kind][1] for kind in kinds), stateful
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and getattr(config, "use_sliding_window", True)
    attending = layers - stateful
    return attending, attending if windowed else 0, stateful
