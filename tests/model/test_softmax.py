"""The kernels over logits: Triton's interpreter against plain torch, which is against autograd."""

import os
import subprocess
import sys

import pytest
import torch

from palate.model.softmax import row_logps, row_slopes


def test_the_two_passes_are_log_softmax_and_its_gradient():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 33, generator=draw, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.arange(7) * 4, torch.linspace(-1, 1, 7, dtype=torch.float64)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    logps, norms = row_logps(logits, targets)
    torch.testing.assert_close(logps, expected.detach(), rtol=1e-12, atol=1e-12)
    before = logits.detach().clone()
    torch.testing.assert_close(
        row_slopes(logits, norms, targets, weights, spare=False), gradient, rtol=1e-12, atol=1e-12
    )
    assert torch.equal(logits, before)


INTERPRETED = """
import torch
from palate.model import softmax, softmax_triton
draw = torch.Generator().manual_seed(0)
for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
    for rows, width in ((3, 5), (2, 4096), (5, 9001)):
        logits = (torch.randn(rows, width, generator=draw) * 4).to(dtype)
        logits[0, 1:] = float("-inf")  # one token certain, and whole blocks of nothing
        targets = torch.randint(width, (rows,), generator=draw)
        targets[0] = 0
        weights = torch.randn(rows, generator=draw)
        expected = softmax.row_logps(logits, targets)
        for got, want in zip(softmax_triton.row_logps(logits, targets), expected):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        want = softmax.row_slopes(logits, expected[1], targets, weights, spare=False)
        got = softmax_triton.row_slopes(logits.clone(), expected[1], targets, weights)
        torch.testing.assert_close(got, want, rtol=close, atol=1e-6)
"""


def test_the_triton_kernels_say_the_same_in_their_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
