"""Weights in 4 bits: what a product with them is, what adapters over them learn, what is saved, what it all takes."""

import copy
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from models import build, random_group
from torch.autograd.graph import saved_tensors_hooks

from palate.builtin import model_folder
from palate.data.batch import collate
from palate.errors import UsageError
from palate.model.adapters import add_lora, merged_copy
from palate.model.load import load, outline, save
from palate.model.quantized import BLOCK, Linear4bit, count_weights, is_quantized, need_bitsandbytes, quantize, restore
from palate.model.recompute import enable_recompute
from palate.recipes.preference import PreferenceConfig
from palate.scoring import Numerics, logps, support
from palate.train.rehearsal import rehearse

# the quantiles of the paper's NormalFloat (appendix E of arXiv:2305.14314)
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip


@pytest.fixture
def kernels():
    pytest.importorskip("bitsandbytes")
    need_bitsandbytes()


def groups(count=3, seed=0):
    draw = np.random.default_rng(seed)
    return [random_group(draw, 20, 9, 12) for _ in range(count)]


def adapted(seed=0):
    """A quantized model under an adapter that already says something."""
    model = add_lora(quantize(build("llama")), 4, seed=seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
    return model


def test_a_layer_rounds_to_the_papers_quantiles(kernels):
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 24)
    whole = Linear4bit.of(layer).whole(torch.float32)
    blocks, was = whole.reshape(-1, BLOCK), layer.weight.detach().reshape(-1, BLOCK)
    scale = was.abs().amax(1, keepdim=True)
    table = torch.tensor(NF4)
    nearest = table[(was[..., None] / scale[..., None] - table).abs().argmin(-1)] * scale
    assert torch.allclose(blocks, nearest, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_product_is_that_of_the_whole_weights_and_keeps_none(kernels, dtype):
    layer = Linear4bit.of(torch.nn.Linear(64, 48))
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = layer(x)
    assert sum(kept) < 64 * 48
    whole = layer.whole(dtype)
    assert torch.equal(out, torch.nn.functional.linear(x, whole, layer.bias.to(dtype)))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.allclose(gradient, whole.sum(0).expand(5, 64), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_quantized_model_scores_as_its_whole_copy_and_so_do_its_gradients(kernels):
    model, batch = adapted(), collate(groups())
    assert support(model).path == "shared"
    whole = restore(copy.deepcopy(model))
    assert not is_quantized(whole) and is_quantized(model)
    found = []
    for one in (model, whole):
        total = logps(one, batch).total
        total.sum().backward()
        found.append((total, [p.grad for n, p in one.named_parameters() if "lora" in n]))
    (total, gradients), (truth, wanted) = found
    assert torch.allclose(total, truth, atol=1e-3)
    for one, two in zip(gradients, wanted, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-4)


def test_what_is_rounded_is_every_linear_layer_but_the_head(kernels):
    plain, model = build("llama"), quantize(build("llama"))
    assert count_weights(model) == plain.num_parameters()
    names = {name for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    assert names == {n for n, m in plain.named_modules() if type(m) is torch.nn.Linear} - {"lm_head"}


def test_read_rounded_equals_rounded_once_read(kernels):
    """A folder is rounded weight by weight as transformers reads it."""
    streamed = load("builtin:tiny", quantize="4bit").model
    after = quantize(load("builtin:tiny").model)
    assert is_quantized(streamed)
    ours, theirs = streamed.state_dict(), after.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert not hasattr(streamed.config, "quantization_config")


def test_what_is_saved_is_what_was_trained_over(kernels, tmp_path):
    loaded = load("builtin:tiny", quantize="4bit")
    model = add_lora(loaded.model, 4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.01)
    save(model, loaded.tokenizer, tmp_path / "model")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        truth = model(ids).logits
        assert torch.allclose(load(tmp_path / "model").model(ids).logits, truth, atol=1e-3)
        bare = load("builtin:tiny").model(ids).logits
        over_bare = load(tmp_path / "adapter").model(ids).logits  # the adapter goes over any form of its base
    assert not torch.allclose(over_bare, truth, atol=1e-3)  # whose weights are not those it was trained over
    assert not torch.allclose(over_bare, bare, atol=1e-2)
    assert not is_quantized(merged_copy(model)) and is_quantized(model)


def test_a_run_from_its_command_to_a_saved_model(kernels, tmp_path, capsys):
    from palate.cli import main

    argv = ["dpo", "--model", "builtin:tiny", "--data", "builtin:reviews[:24]", "--out", str(tmp_path / "run")]
    argv += ["--quantize", "4bit", "--lora-rank", "4", "--steps", "2", "--batch", "8", "--device", "cpu"]
    argv += ["--retain", "none", "--samples", "0", "--eval", "none", "--json", "--lr", "1e-3"]
    assert main(argv, {}) == 0
    said = capsys.readouterr()
    assert "linear layers in 4 bits" in said.err
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, second = [step for step in steps if "loss" in step]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert first["rewards/margins"] == 0.0  # policy and reference are made by one kernel
    assert second["loss"] != first["loss"]
    assert load(tmp_path / "run").model.dtype == torch.float32


def llama_8b(folder):
    """The config of Llama 3 8B, with a small tokenizer."""
    shutil.copytree(model_folder("builtin:tiny"), folder)
    (folder / "model.safetensors").unlink()
    sizes = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    heads = dict(num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text()) | sizes | heads | {"head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_an_8b_model_with_streams_of_2048_tokens_is_planned_under_16_gb(kernels, tmp_path):
    model = add_lora(outline(llama_8b(tmp_path / "8b"), quantize="4bit").model, 16)
    assert count_weights(model) == pytest.approx(8.07e9, rel=0.01)
    enable_recompute(model)
    draw = np.random.default_rng(0)
    rows = [random_group(draw, 350, 80, 82) for _ in range(4)]
    assert 2000 <= len(collate(rows).tokens) <= 2048
    found = rehearse(model, rows, Numerics("bfloat16"))
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    whole = 2 * 128256 * 4096
    assert found.weights == pytest.approx(linear * (0.5 + 4 / BLOCK) + 4 * whole + 4 * 42e6, rel=0.01)
    assert found.peak < 16e9
    assert found.saving == 0  # of a GPU's memory: what is saved is made whole on the CPU


def test_numbers_on_meta_are_those_of_a_real_model(kernels):
    real = rehearse(adapted(), groups())
    meta = rehearse(add_lora(quantize(build("llama").to("meta")), 4), groups())
    for name in ("weights", "gradients", "optimizer", "activations", "working", "flops"):
        assert getattr(meta, name) == getattr(real, name), name


def test_without_an_adapter_it_is_refused():
    with pytest.raises(ValueError, match="cannot be trained"):
        PreferenceConfig(model="m", data="d", quantize="4bit")


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError) as caught:
        load("builtin:tiny", quantize="4bit")
    assert "pip install 'palate[quantize]'" in str(caught.value)
