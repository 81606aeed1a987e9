"""The passes of `palate.model.softmax` as Triton kernels: one program a row, float32 inside.

`TRITON_INTERPRET=1` before the import runs them on the CPU: so they are tested.
"""

import torch
import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]
from torch import Tensor

BLOCK = 4096


@triton.jit
def _row_logps(logits, targets, logps, norms, width, stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    columns = tl.arange(0, block)
    largest = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, width, block):  # every lane keeps a running maximum and a sum below it
        x = tl.load(at + start + columns, mask=start + columns < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, x)
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a lane that has seen nothing yet
        total = total * tl.exp(largest - safe) + tl.exp(x - safe)
        largest = higher
    top = tl.max(largest, 0)
    norm = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    wanted = tl.load(at + tl.load(targets + row)).to(tl.float32)
    tl.store(norms + row, norm)
    tl.store(logps + row, wanted - norm)


@triton.jit
def _row_slopes(logits, norms, targets, weights, width, stride, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride + tl.program_id(1) * block
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    weight = tl.load(weights + row)
    x = tl.load(at + tl.arange(0, block), mask=inside, other=float("-inf")).to(tl.float32)
    onehot = tl.where(columns == tl.load(targets + row), 1.0, 0.0)
    slope = weight * (onehot - tl.exp(x - tl.load(norms + row)))
    tl.store(at + tl.arange(0, block), slope.to(logits.dtype.element_ty), mask=inside)


def row_logps(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs, log-sum-exps), (R,) float32 each, of contiguous (R, V) logits."""
    rows, width = logits.shape
    logps, norms = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    _row_logps[(rows,)](logits, targets, logps, norms, width, logits.stride(0), BLOCK)
    return logps, norms


def row_slopes(logits: Tensor, norms: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """weight * (onehot - softmax), written over contiguous (R, V) logits."""
    rows, width = logits.shape
    grid = (rows, triton.cdiv(width, BLOCK))
    _row_slopes[grid](logits, norms, targets, weights.float().contiguous(), width, logits.stride(0), BLOCK)
    return logits
