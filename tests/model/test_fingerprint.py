"""The fingerprint names a function: same function, same name; anything that can move a logit changes it."""

import copy
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from palate.model.adapters import add_lora, merged_copy
from palate.model.fingerprint import base_fingerprint, fingerprint

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, **changes})).eval()


def gpt2(seed=0, **changes):
    torch.manual_seed(seed)
    config = GPT2Config(**{"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_is_64_hex_digits_and_repeats(make):
    name = fingerprint(make())
    assert len(name) == 64 and set(name) <= set("0123456789abcdef")
    assert name == fingerprint(make()) == base_fingerprint(make())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_survives_saving_copying_and_renaming_the_folder(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "another name")
    for folder in ("a", "another name"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        assert fingerprint(again) == fingerprint(make())


@pytest.mark.parametrize(
    "change",
    [
        {"use_cache": False},
        {"bos_token_id": 7},
        {"eos_token_id": 8},
        {"pad_token_id": 9},
        {"attention_dropout": 0.5},
        {"num_labels": 3},
        {"output_hidden_states": True},
        {"initializer_range": 0.02},
    ],
    ids=str,
)
def test_settings_that_no_evaluated_forward_reads_do_not_count(change):
    model = llama()
    for key, value in change.items():  # set afterwards: a padding row would be drawn as zeros
        setattr(model.config, key, value)
    assert fingerprint(model) == fingerprint(llama())


def test_attention_implementation_mode_and_flags_do_not_count():
    model, before = llama(), fingerprint(llama())
    model.config._attn_implementation = "eager"
    model.config._name_or_path = "/somewhere/else"
    assert fingerprint(model.train().requires_grad_(False)) == before


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"max_position_embeddings": 128},
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8},
        {"tie_word_embeddings": True},
        {"some_key_of_a_later_release": 1},
    ],
    ids=str,
)
def test_settings_that_a_forward_may_read_count(change):
    assert fingerprint(llama(**change)) != fingerprint(llama())


def test_one_bit_of_one_weight_counts_wherever_it_is():
    before = fingerprint(llama())
    for name, _ in llama().named_parameters():
        model = llama()
        weight = model.get_parameter(name).data.view(-1)
        weight[-1:].view(torch.int32)[0] ^= 1
        assert fingerprint(model) != before, name


def test_two_weights_exchanged_count():
    model = llama()
    first, second = (layer.self_attn.q_proj.weight.data for layer in model.model.layers)
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)
    assert fingerprint(model) != fingerprint(llama())


def test_dtype_counts_and_bfloat16_is_read_bit_by_bit():
    half = llama().to(torch.bfloat16)
    assert fingerprint(half) != fingerprint(llama())
    assert fingerprint(half) == fingerprint(llama().to(torch.bfloat16))
    half.lm_head.weight.data.view(torch.int16)[0, 0] ^= 1
    assert fingerprint(half) != fingerprint(llama().to(torch.bfloat16))


def test_memory_layout_does_not_count():
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert fingerprint(model) == fingerprint(llama())


def test_empty_and_scalar_tensors_are_read():
    model = llama()
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("empty", torch.zeros(0, 4))
    one = fingerprint(model)
    model.count += 1
    assert fingerprint(model) != one != fingerprint(llama())


def test_a_buffer_that_is_not_kept_does_not_count():
    model = llama()
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    assert fingerprint(model) == fingerprint(llama())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_below_an_adapter_stands_the_same_model(make):
    before = fingerprint(make())
    adapted = add_lora(make(), 2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    assert base_fingerprint(adapted) == before
    assert fingerprint(adapted) != before
    assert fingerprint(merged_copy(adapted)) not in (before, fingerprint(adapted))
    other = copy.deepcopy(adapted)
    next(w for n, w in other.named_parameters() if "lora_A" in n).data[0, 0] += 1
    assert fingerprint(other) != fingerprint(adapted) and base_fingerprint(other) == before
