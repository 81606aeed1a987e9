"""A layout's attention in one call on a GPU: variable-length flash attention over gathered keys, or FlexAttention.

Every stretch of the stream is a segment of queries; its keys are its own, after those of the prompt it goes on from,
gathered by one index. Queries are aligned to the lower right of their keys, as in stretches of their own.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from palate.layout import Layout


class Segments:
    """The index tensors of a layout on a device, made once a micro-batch.

    keys: (K,) the stream row of every key. query_starts, key_starts: (N + 1,) int32, cumulative lengths of segments.
    group, branch: (T,) int64 of every stream row: its group, and 0 for a prompt, k for its k-th branch; -1 in the tail.
    position: (T,) int64.
    """

    def __init__(self, layout: Layout, device: torch.device):
        keys, queries, lengths, group, branch, position = [], [], [], [], [], []
        start = 0
        for number, (prompt, branches) in enumerate(zip(layout.prompts, layout.branches, strict=True)):
            stem = range(start, start + prompt)
            for k, length in enumerate((prompt, *branches)):
                own = range(start, start + length)
                start += length
                group += [number] * length
                branch += [k] * length
                position += range(prompt if k else 0, (prompt if k else 0) + length)
                if length:
                    keys += [*stem, *own] if k else own
                    queries.append(length)
                    lengths.append(prompt + length if k else length)
        self.rows, self.tail = start, layout.tail
        self.longest = (max(queries, default=0), max(lengths, default=0))
        self.keys = torch.tensor(keys, dtype=torch.int64, device=device)
        self.query_starts, self.key_starts = (
            nn.functional.pad(torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)
            for sizes in (queries, lengths)
        )
        padded = ((group, -1), (branch, -1), (position, 0))
        self.group, self.branch, self.position = (
            torch.tensor(values + [fill] * layout.tail, dtype=torch.int64, device=device) for values, fill in padded
        )


@lru_cache(maxsize=8)
def segments(layout: Layout, device: torch.device) -> Segments:
    """The layout's segments: every layer of a micro-batch asks for the same."""
    return Segments(layout, device)


def varlen_attention(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """(T, heads, dim) of a stream; query (heads, T, dim), key and value with kv heads. The tail's rows are zero."""
    parts = segments(layout, query.device)
    q = query[:, : parts.rows].transpose(0, 1)
    k, v = (x.transpose(0, 1).index_select(0, parts.keys) for x in (key, value))
    width = v.shape[-1]
    if width < q.shape[-1]:  # the kernel knows one width
        v = nn.functional.pad(v, (0, q.shape[-1] - width))
    call: Callable[..., Tensor] = _flash() if query.is_cuda else eager_varlen
    out = call(
        *(x.contiguous() for x in (q, k, v)),
        parts.query_starts,
        parts.key_starts,
        *parts.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return nn.functional.pad(out[..., :width], (0, 0, 0, 0, 0, parts.tail))


@lru_cache(maxsize=1)
def _flash() -> Callable:
    """torch's kernel; where it can, in the form whose bits do not depend on the other segments."""
    from torch.nn.attention.varlen import varlen_attn

    if "num_splits" not in inspect.signature(varlen_attn).parameters:
        return varlen_attn
    return lambda *operands, **options: varlen_attn(*operands, num_splits=1, **options)


def eager_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` computes, segment by segment in any dtype on any device.

    query (T_q, heads, dim), key and value (T_k, kv heads, dim); a segment's queries stand at the end of its keys.
    """
    left, right = window_size
    out = []
    sizes = (starts.diff().tolist() for starts in (cu_seq_q, cu_seq_k))
    queries, lengths = sizes
    parts = (query.split(queries), key.split(lengths), value.split(lengths))
    for q, k, v in zip(*parts, strict=True):
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        at = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
        distance = at - torch.arange(len(k), device=q.device)
        seen = (distance >= -right) if right >= 0 else torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            seen = seen & (distance <= left)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out) if out else torch.zeros_like(query)


@lru_cache(maxsize=8)
def _block_mask(layout: Layout, window: int | None, device: torch.device):
    """FlexAttention's mask of the whole stream: a token sees its prompt's and its own branch's, up to itself."""
    from torch.nn.attention.flex_attention import create_block_mask

    parts, total = segments(layout, device), layout.total

    def seen(batch, head, q, k):
        same = (parts.group[q] == parts.group[k]) & ((parts.branch[k] == 0) | (parts.branch[q] == parts.branch[k]))
        near = parts.position[q] - parts.position[k] < (total if window is None else window)
        return (q == k) | (same & near & (k <= q))  # the tail sees itself, so that its softmax is finite

    return create_block_mask(seen, None, None, total, total, device=device)


def flex_attention(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, scaling, window: int | None, softcap, sinks
) -> Tensor:
    """As `varlen_attention`, with a soft cap on the scores or sinks; the tail's rows are of no meaning."""

    from torch.nn.attention.flex_attention import AuxRequest

    def capped(score, batch, head, q, k):
        return softcap * torch.tanh(score / softcap)

    out, aux = _flex(query.is_cuda)(
        query[None],
        key[None],
        value[None],
        score_mod=None if softcap is None else capped,
        block_mask=_block_mask(layout, window, query.device),
        scale=scaling,
        enable_gqa=query.shape[0] != key.shape[0],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:  # one more score in the softmax, without a value, scales what the others give
        out = out * torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])[..., None].to(out.dtype)
    return out[0].transpose(0, 1)


@lru_cache(maxsize=2)
def _flex(compiled: bool) -> Callable:
    from torch.nn.attention import flex_attention as flex

    return torch.compile(flex.flex_attention, dynamic=True) if compiled else flex.flex_attention
