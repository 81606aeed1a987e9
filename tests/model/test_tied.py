"""One gradient for a matrix that is embedding and head, against plain autograd."""

import numpy as np
import pytest
import torch
import transformers

from palate.data.batch import collate
from palate.data.tokens import TokenGroup
from palate.model.tied import tied
from palate.scoring import support, token_logps


def model_of(*, tie=True, pad=7):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tie, pad_token_id=pad,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def batch_of(seed, prompt, *lengths):
    draw = np.random.default_rng(seed)
    stem, *branches = (draw.integers(3, 60, n).astype(np.int32) for n in (prompt, *lengths))
    return collate([TokenGroup(stem, tuple(branches), tuple(((0, n),) for n in lengths))])


def gradients(model, batches, times=1):
    model.zero_grad()
    logps = torch.cat([token_logps(model, batch) for batch in batches])
    loss = (logps * torch.linspace(-1, 1, len(logps))).sum()
    for left in range(times, 0, -1):
        loss.backward(retain_graph=left > 1)
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("pad", [None, 7])
@pytest.mark.parametrize("times", [1, 2])
def test_the_gradient_is_that_of_plain_autograd(pad, times, monkeypatch):
    """Of two forwards before one backward, and of two backwards; what pads has no gradient as an input."""
    model = model_of(pad=pad)
    support(model)
    batches = [batch_of(0, 12, 9, 20, 18), batch_of(1, 30, 6, 33)]
    assert all(7 in batch.tokens for batch in batches)
    found = gradients(model, batches, times)
    assert "forward" not in model.get_input_embeddings().__dict__
    monkeypatch.setattr("palate.model.tied._is_one", lambda *_: False)
    for name, truth in gradients(model, batches, times).items():
        torch.testing.assert_close(found[name], truth, rtol=1e-12, atol=1e-12)


def test_without_the_head_the_embedding_has_its_own_gradient():
    model, ids = model_of(), torch.tensor([[3, 7, 3]])
    with tied(model) as tie:
        model.get_input_embeddings()(ids).sum().backward()
    assert tie is not None and tie.gradient is None
    gradient = model.lm_head.weight.grad
    assert gradient[3].tolist() == [2.0] * 32 and gradient.sum(1).nonzero().flatten().tolist() == [3]


def test_no_one_else_is_tied():
    untied, frozen, sparse = model_of(tie=False), model_of().requires_grad_(False), model_of()
    sparse.get_input_embeddings().sparse = True
    for model in (untied, frozen, sparse):
        with tied(model) as tie:
            assert tie is None and "forward" not in model.get_input_embeddings().__dict__
