"""A rehearsal counts what a real step takes: the same storages, live and dead, on tensors without numbers."""

import numpy as np
import pytest
import torch
from models import build, random_group
from torch.autograd.graph import saved_tensors_hooks

from palate.data.batch import collate
from palate.errors import ModelError
from palate.model.adapters import add_lora
from palate.model.heads import with_scalar_head
from palate.model.recompute import enable_recompute
from palate.scoring import Numerics, logps
from palate.train.rehearsal import rehearse

SHAPES = ((30, 9, 12), (12, 7, 5), (25, 20, 3), (40, 11))


def groups_of(seed=0):
    generator = np.random.default_rng(seed)
    return [random_group(generator, *shape) for shape in SHAPES]


def kept_by_autograd(model, groups, numerics=Numerics()):
    """Bytes that a real forward saves for backward, each storage once, weights apart."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    batch = collate(groups)
    own |= {t.untyped_storage()._cdata for t in (batch.tokens, batch.positions, batch.predictors, batch.targets)}
    found, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            alive.append(storage)  # so that no number is given twice
            found[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        total = logps(model, batch, numerics=numerics).total.sum()
    total.backward()
    model.zero_grad()
    return sum(found.values())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_activations_are_those_of_a_real_forward(name):
    """Up to what a graph keeps outside of saved tensors: the last chunk's logits, sums of the loss."""
    model, groups = build(name), groups_of()
    found = rehearse(model, groups)
    scored = -(-sum(len(c) for g in groups for c in g.completions) // 16) * 16
    logits = scored * model.config.vocab_size * 4 * (2 if name == "gemma2" else 1)  # tanh keeps its result
    assert found.activations == pytest.approx(kept_by_autograd(model, groups) + logits, rel=0.05)


def test_weights_gradients_and_states_are_counted_from_the_model():
    model, groups = build("llama"), groups_of()
    size = sum(p.numel() * 4 for p in model.parameters())
    found = rehearse(model, groups)
    assert found.weights == pytest.approx(size, rel=0.01)  # and the frequencies of positions
    assert (found.gradients, found.optimizer) == (size, 2 * size)
    assert rehearse(model, groups, states=1).optimizer == size
    adapted = add_lora(build("llama"), 2)
    small = rehearse(adapted, groups)
    assert small.gradients == sum(p.numel() * 4 for p in adapted.parameters() if p.requires_grad) < size / 4
    assert small.saving == 2 * small.weights


def test_nothing_is_touched():
    model, groups = build("llama"), groups_of()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    truth = logps(model, collate(groups)).total.detach()
    rehearse(model, groups)
    for name, parameter in model.named_parameters():
        assert type(parameter) is torch.nn.Parameter
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert torch.equal(logps(model, collate(groups)).total.detach(), truth)  # masks made inside serve nobody outside


def test_a_meta_model_needs_what_a_real_one_needs():
    model, groups = build("llama"), groups_of()
    for numerics in (Numerics(), Numerics("bfloat16")):
        assert rehearse(build("llama").to("meta"), groups, numerics) == rehearse(model, groups, numerics)


def test_recomputation_is_seen():
    model, groups = build("llama"), groups_of()
    plain = rehearse(model, groups)
    enable_recompute(model)
    again = rehearse(model, groups)
    assert again.activations < 0.6 * plain.activations
    assert again.flops > 1.15 * plain.flops


def test_bfloat16_holds_casts_of_the_weights():
    model, groups = build("llama"), groups_of()
    matrices = sum(p.numel() * 2 for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert rehearse(model, groups, Numerics("bfloat16")).casts == pytest.approx(matrices, rel=0.01)
    assert rehearse(model, groups).casts == 0


def test_flops_are_three_forwards():
    """2 a weight and token in forward, twice that in backward; the head at scored rows alone; and attention."""
    model, groups = build("llama"), groups_of()
    tokens = len(collate(groups).tokens)
    tokens += -tokens % 64  # the tail
    body = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name)
    head = model.lm_head.weight.numel() * -(-len(collate(groups).targets) // 16) * 16
    found = rehearse(model, groups, Numerics(stream=64)).flops
    assert 1 <= found / (6 * (body * tokens + head)) < 1.2


@pytest.mark.parametrize("name", ["mistral", "gpt_neox", "bloom"])
def test_windows_and_padded_rows_are_rehearsed(name):
    found = rehearse(build(name), groups_of())
    assert 0 < found.activations < found.step <= found.peak


def test_a_reward_model_is_rehearsed():
    assert rehearse(with_scalar_head(build("llama")), groups_of()).activations > 0


def test_a_forward_that_looks_at_numbers_is_refused_by_name():
    model = build("llama")
    logps(model, collate(groups_of()))  # probed before
    plain = model.model.forward

    def curious(*args, **kwargs):
        assert float(kwargs["input_ids"].sum()) >= 0
        return plain(*args, **kwargs)

    model.model.forward = curious
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be rehearsed"):
        rehearse(model, groups_of())
