"""One call for a whole stream equals stretch by stretch: gathered keys, alignment, windows, masks (float64, 1e-9)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, lifted, random_group

import palate.model.attention as attention
from palate.data.batch import collate
from palate.layout import Layout
from palate.model.varlen import eager_varlen, segments
from palate.scoring import Numerics, logps, support

MODELS = {name: build(name, dtype=torch.float64) for name in ("llama", "mistral", "gpt2")}
trees = st.lists(
    st.tuples(st.integers(0, 12), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1, max_size=5
)


def value_and_gradients(model, batch, numerics):
    model.zero_grad(set_to_none=True)
    with lifted():
        total = logps(model, batch, numerics=numerics).total
        (total * torch.linspace(-1, 1, len(total), dtype=torch.float64)).sum().backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(MODELS)), trees, st.integers(0, 2**31), st.integers(1, 40))
def test_a_variable_length_call_changes_no_loss_and_no_gradient(name, shapes, seed, tail):
    model, generator = MODELS[name], np.random.default_rng(seed)
    assert support(model).path == "shared"
    batch = collate([random_group(generator, prompt, *completions) for prompt, completions in shapes])
    if not len(batch.targets):
        return
    numerics, called = Numerics(stream=tail), []
    expected, gradients = value_and_gradients(model, batch, numerics)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "kernel_for", lambda *_: called.append(1) or "varlen")
        got, ours = value_and_gradients(model, batch, numerics)
    assert called
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(trees, st.sampled_from([None, 1, 4]), st.sampled_from([None, 3.0]), st.booleans(), st.integers(0, 20))
def test_flex_equals_stretches_with_soft_caps_sinks_and_windows(shapes, window, softcap, sunk, tail):
    """Values alone: FlexAttention has no backward on CPU."""
    layout = Layout(tuple(p for p, _ in shapes), tuple(tuple(n - 1 for n in lengths) for _, lengths in shapes), tail)
    if not layout.total:
        return
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, layout.total, 16, generator=draw) for heads in (4, 2, 2))
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    options |= {"palate_layout": layout, "s_aux": torch.randn(4, generator=draw) if sunk else None}
    expected, _ = attention.stream_attention(None, q, k, v, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "kernel_for", lambda *_: "flex")
        got, _ = attention.stream_attention(None, q, k, v, **options)
    inside = slice(layout.total - tail)
    torch.testing.assert_close(got[:, inside], expected[:, inside], rtol=1e-4, atol=1e-5)


def test_keys_of_a_prompt_are_gathered_for_every_branch():
    parts = segments(Layout((2, 0), ((1, 0, 2), (3,)), 4), torch.device("cpu"))
    assert parts.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    assert parts.query_starts.tolist() == [0, 2, 3, 5, 8]
    assert parts.key_starts.tolist() == [0, 2, 5, 9, 12]
    assert parts.longest == (3, 4)
    assert parts.group.tolist() == [0] * 5 + [1] * 3 + [-1] * 4
    assert parts.branch.tolist() == [0, 0, 1, 3, 3, 1, 1, 1] + [-1] * 4


def test_narrow_values_and_one_width_of_the_kernel():
    layout, draw = Layout((3,), ((2, 4),)), torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 9, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, 2, 9, 4, generator=draw, dtype=torch.float64)
    expected, _ = attention.stream_attention(None, q, k, v, palate_layout=layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "kernel_for", lambda *_: "varlen")
        got, _ = attention.stream_attention(None, q, k, v, palate_layout=layout)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_eager_form_takes_what_torch_takes():
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    theirs = inspect.signature(varlen_attn).parameters
    assert list(inspect.signature(eager_varlen).parameters)[:7] == list(theirs)[:7]
    assert set(inspect.signature(eager_varlen).parameters) <= set(theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_on_a_gpu_the_kernels_are_no_further_from_float64_than_padded_rows(name):
    from palate.scoring import _padded

    generator = np.random.default_rng(0)
    groups = [random_group(generator, 20, 15, 25) for _ in range(8)]
    exact = logps(build(name, dtype=torch.float64), collate(groups)).total.detach()
    model, batch = build(name, dtype=torch.bfloat16).cuda(), collate(groups).to("cuda")
    with torch.no_grad():
        ours = logps(model, batch).total.cpu() - exact
        rows = _padded(model, batch, Numerics()).double().cpu()
    theirs = torch.segment_reduce(rows, "sum", lengths=batch.length.cpu(), axis=0) - exact
    assert ours.square().mean() <= 2.25 * theirs.square().mean()
