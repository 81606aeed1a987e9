"""One gradient for a matrix that is embedding and head, against plain autograd."""

import numpy as np
import pytest
import torch
import transformers

from palate.data.batch import collate
from palate.data.tokens import TokenGroup
from palate.model.tied import tied
from palate.scoring import Numerics, logps_and_values, support, token_logps
from palate.train.rehearsal import rehearse


def model_of(*, tie=True, pad=7, vocabulary=60):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tie, pad_token_id=pad,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def group_of(seed, prompt, *lengths):
    draw = np.random.default_rng(seed)
    stem, *branches = (draw.integers(3, 60, n).astype(np.int32) for n in (prompt, *lengths))
    return TokenGroup(stem, tuple(branches), tuple(((0, n),) for n in lengths))


def gradients(model, batches, times=1, numerics=Numerics()):
    model.zero_grad()
    logps = torch.cat([token_logps(model, batch, numerics=numerics) for batch in batches])
    loss = (logps * torch.linspace(-1, 1, len(logps))).sum()
    for left in range(times, 0, -1):
        loss.backward(retain_graph=left > 1)
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def alone(monkeypatch):
    """Plain autograd from now on."""
    monkeypatch.setattr("palate.model.tied._tied_rows", lambda model: None)


BATCHES = [collate([group_of(0, 12, 9, 20, 18)]), collate([group_of(1, 30, 6, 33)])]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("pad", [None, 7])
@pytest.mark.parametrize("times", [1, 2])
def test_the_gradient_is_that_of_plain_autograd(pad, times, chunks, monkeypatch):
    """Of two forwards before one backward, and of two backwards; what pads has no gradient as an input."""
    model = model_of(pad=pad)
    support(model)
    if chunks > 1:
        monkeypatch.setattr("palate.model.logprob.LOGITS_PER_CHUNK", 16 * 60)
    assert all(7 in batch.tokens for batch in BATCHES)
    found = gradients(model, BATCHES, times)
    assert "forward" not in model.get_input_embeddings().__dict__
    alone(monkeypatch)
    for name, truth in gradients(model, BATCHES, times).items():
        torch.testing.assert_close(found[name], truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["biased", "softer", "bfloat16"])
def test_heads_that_are_more_than_a_matrix(kind, monkeypatch):
    model, numerics = model_of(), Numerics(temperature=0.7 if kind == "softer" else 1.0)
    if kind == "biased":
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 60, dtype=torch.float64))
    if kind == "bfloat16":
        model, numerics = model.float(), Numerics("bfloat16")
    support(model)
    found = gradients(model, BATCHES, numerics=numerics)
    alone(monkeypatch)
    for name, truth in gradients(model, BATCHES, numerics=numerics).items():
        close = 1e-12 if truth.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(found[name], truth, rtol=close, atol=close)


def test_a_backward_that_stops_before_the_embedding_leaves_nothing_behind(monkeypatch):
    """A value head's gradient, after one of the log-probs for the last norm alone on the same forward."""
    model, critic = model_of(), torch.nn.Linear(32, 1).double()
    support(model)

    def found():
        model.zero_grad()
        logps, values = logps_and_values(model, critic, BATCHES[0])
        torch.autograd.grad(logps.sum(), [model.model.norm.weight], retain_graph=True)
        values.sum().backward()
        return model.lm_head.weight.grad.clone()

    mine = found()
    alone(monkeypatch)
    torch.testing.assert_close(mine, found(), rtol=1e-12, atol=1e-12)


def test_without_the_head_the_embedding_has_its_own_gradient():
    model, ids = model_of(), torch.tensor([[3, 7, 3]])
    with tied(model):
        model.get_input_embeddings()(ids).sum().backward()
    gradient = model.lm_head.weight.grad
    assert gradient[3].tolist() == [2.0] * 32 and gradient.sum(1).nonzero().flatten().tolist() == [3]


def test_no_one_else_is_tied():
    untied, frozen, sparse = model_of(tie=False), model_of().requires_grad_(False), model_of()
    sparse.get_input_embeddings().sparse = True
    for model in (untied, frozen, sparse):
        with tied(model):
            assert "forward" not in model.get_input_embeddings().__dict__


def test_a_rehearsal_sees_one_matrix_less(monkeypatch):
    """But not for a model that is planned elsewhere, where it may run on CUDA."""
    model, group = model_of(vocabulary=20_000), group_of(0, 12, 9, 20)
    with torch.device("meta"):
        outlined = model_of(vocabulary=20_000)
    matrix = model.lm_head.weight.numel() * 8
    found, elsewhere = rehearse(model, [group]).peak, rehearse(outlined, [group]).peak
    alone(monkeypatch)
    assert 0.9 * matrix < rehearse(model, [group]).peak - found < 1.1 * matrix
    assert elsewhere == rehearse(model, [group]).peak
