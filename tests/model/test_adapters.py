"""Adapters move what they should, and nothing else: the base below them stays the reference, bit for bit."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from palate.errors import ModelError, UsageError
from palate.model.adapters import add_lora, is_adapted, merged_copy, reference_mode

IDS = torch.tensor([[5, 9, 2, 11, 60, 3, 3, 8], [1, 90, 44, 7, 7, 12, 50, 31]])


def trainable(model) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def llama(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**config, **changes})).to(dtype).eval()


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def tied(dtype=torch.float32):
    return llama(dtype, tie_word_embeddings=True)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def train(model, steps=5):
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


FAMILIES = pytest.mark.parametrize("make", [llama, tied, gpt2])


@FAMILIES
def test_a_new_adapter_changes_no_logit(make):
    assert torch.equal(logits(add_lora(make(), 4)), logits(make()))


@FAMILIES
def test_training_moves_the_adapters_and_no_other_bit(make):
    adapted = add_lora(make(), 4)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    train(adapted)
    moved = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(trainable(adapted))
    assert all("lora_" in name for name in moved) and any("lora_A" in name for name in moved)


@FAMILIES
def test_switched_off_it_is_the_model_that_was_loaded_also_after_training(make):
    adapted = add_lora(make(), 4)
    names = trainable(adapted)
    train(adapted)
    assert not torch.allclose(logits(adapted), logits(make()), atol=1e-3)
    with reference_mode(adapted) as reference:
        assert torch.equal(logits(reference), logits(make()))
    assert trainable(adapted) == names
    train(adapted, 1)


def test_reference_mode_is_left_when_the_body_raises():
    adapted = add_lora(llama(), 4)
    train(adapted)
    expected, names = logits(adapted), trainable(adapted)
    with pytest.raises(KeyError), reference_mode(adapted):
        raise KeyError
    assert torch.equal(logits(adapted), expected) and trainable(adapted) == names


def test_a_plain_model_has_no_reference_inside():
    with pytest.raises(ValueError), reference_mode(llama()):
        pass
    with pytest.raises(ValueError):
        merged_copy(llama())


@FAMILIES
def test_all_linear_layers_but_the_head_are_adapted(make):
    model = make()
    head = model.get_output_embeddings()
    linear = {
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not head
    }
    adapted = add_lora(model, 4)
    found = {n.split(".lora_A")[0].removeprefix("base_model.model.") for n in trainable(adapted) if "lora_A" in n}
    assert found == linear and linear


def test_the_seed_alone_decides_the_start_and_no_randomness_is_spent():
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    one = add_lora(llama(), 4, seed=1)
    torch.manual_seed(123)
    torch.random.set_rng_state(before)
    model = llama()
    state = torch.random.get_rng_state()
    two = add_lora(model, 4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = add_lora(llama(), 4, seed=2)
    a, b, c = (m.get_parameter(next(n for n in trainable(m) if "lora_A" in n)) for m in (one, two, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_rank_and_alpha_mean_what_they_say():
    config = add_lora(llama(), 4).peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 8)
    adapted = add_lora(llama(), 4, 12)
    name = next(n for n in trainable(adapted) if "lora_A" in n)
    assert adapted.get_parameter(name).shape[0] == 4
    assert adapted.get_submodule(name.split(".lora_A")[0]).scaling["default"] == 3.0


@FAMILIES
def test_a_merged_copy_gives_the_adapted_logits_and_leaves_the_model_alone(make):
    adapted = add_lora(make(), 4)
    train(adapted)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    expected = logits(adapted)
    plain = merged_copy(adapted)
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    assert type(plain) is type(make()) and not is_adapted(plain)
    assert set(plain.state_dict()) == set(make().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    assert torch.equal(logits(adapted), expected)
    with torch.no_grad():
        plain.get_input_embeddings().weight.add_(1)
    assert torch.equal(logits(adapted), expected), "the copy must not share storage"


def test_bfloat16_base_stays_the_reference():
    adapted = add_lora(llama(torch.bfloat16), 4)
    train(adapted)
    with reference_mode(adapted):
        assert torch.equal(logits(adapted), logits(llama(torch.bfloat16)))


@pytest.mark.parametrize("rank, alpha", [(0, None), (-1, None), (4, 0), (4, float("nan"))])
def test_impossible_sizes_are_refused(rank, alpha):
    with pytest.raises(UsageError):
        add_lora(llama(), rank, alpha)


def test_two_adapters_on_each_other_are_refused():
    with pytest.raises(ModelError, match="already"):
        add_lora(add_lora(llama(), 4), 4)
