"""Sampling: greedy equals transformers', samples follow the model's distribution, and a batch changes nothing."""

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3NextConfig,
)

from palate.data.batch import collate
from palate.data.tokens import TokenGroup
from palate.errors import DataError, NotFiniteError, UsageError
from palate.model.adapters import add_lora
from palate.model.branching import GROWTH, Branches
from palate.sampling import generate as sampling
from palate.sampling.generate import branches, generate
from palate.scoring import token_logps

BASE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**BASE, **HEADS),
    "gpt2": lambda: GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "gemma3": lambda: Gemma3TextConfig(
        **BASE, **HEADS, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": lambda: MistralConfig(**BASE, **HEADS, head_dim=8, sliding_window=5),
    "neox": lambda: GPTNeoXConfig(**BASE, num_attention_heads=4, intermediate_size=48),
    "bloom": lambda: BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4),
    "mamba": lambda: MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=8),
    "qwen3next": lambda: Qwen3NextConfig(
        **BASE, **HEADS, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4, num_experts=0, layer_types=["linear_attention", "full_attention"],
        mlp_only_layers=[0, 1],
    ),
}  # fmt: skip


class Ends:
    """As much of a tokenizer as sampling needs."""

    eos_token_id = 2


def make(kind="llama", scale=8.0):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    with torch.no_grad():  # sharper than random weights start, so that argmax is clear of rounding
        model.get_output_embeddings().weight.mul_(scale)
    return model


def prompts(count=7, seed=0, longest=20):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 61, size=rng.integers(1, longest)).astype(np.int32) for _ in range(count)]


def stock_greedy(model, prompt, max_tokens, ends):
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def reread(model, prompt, sample):
    """Log-probs of the sampled tokens by one plain forward in float64."""
    ids = torch.from_numpy(np.concatenate([prompt, sample.ids]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logps.gather(-1, ids[0, len(prompt) :, None])[:, 0].numpy()


def same(a, b, tolerance=1e-4):
    assert [(s.prompt, s.sample, s.ids.tolist(), s.finished) for s in a] == [
        (s.prompt, s.sample, s.ids.tolist(), s.finished) for s in b
    ]
    for x, y in zip(a, b, strict=True):
        assert np.allclose(x.token_logps, y.token_logps, atol=tolerance)


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_equals_transformers_token_for_token(kind):
    model, rows = make(kind), prompts()
    ends = [2, 7, 8, 9, 10, 11]
    made = generate(model, Ends(), rows, max_tokens=12, temperature=0, end_ids=ends)
    assert [sample.ids.tolist() for sample in made] == [stock_greedy(model, row, 12, ends) for row in rows]
    assert [sample.finished for sample in made] == [int(sample.ids[-1]) in ends for sample in made]


@pytest.mark.parametrize("kind", CONFIGS)
def test_logps_are_those_of_one_plain_forward_whatever_the_temperature(kind):
    model, rows = make(kind), prompts(4)
    for temperature in (0, 0.5, 1.0, 2.0):
        for sample in generate(model, Ends(), rows, max_tokens=8, temperature=temperature, samples=2, seed=1):
            expected = reread(model, rows[sample.prompt], sample)
            assert np.allclose(sample.token_logps, expected, atol=1e-4)
            assert sample.logp == pytest.approx(expected.sum(), abs=1e-4)
            assert sample.ids.dtype == np.int32 and sample.token_logps.dtype == np.float64
            assert len(sample.ids) == len(sample.token_logps)


@pytest.mark.parametrize(
    "kind, temperature", [("llama", 0), ("llama", 1.0), ("gpt2", 1.0), ("gemma3", 1.0), ("mamba", 0.8)]
)
def test_a_batch_changes_nothing(kind, temperature):
    model, rows = make(kind), prompts(9)
    how = {
        "max_tokens": 3 if kind == "mamba" else 10,
        "temperature": temperature,
        "samples": 3,
        "seed": 4,
        "end_ids": {2, 5, 6},
    }
    whole = generate(model, Ends(), rows, **how)
    assert [(s.prompt, s.sample) for s in whole] == list(itertools.product(range(9), range(3)))
    same(generate(model, Ends(), rows, batch_tokens=1, **how), whole)
    same(generate(model, Ends(), rows, batch_tokens=70, **how), whole)
    same(generate(model, Ends(), rows[:4], **how), whole[:12])
    same([s for s in generate(model, Ends(), rows, **{**how, "samples": 1})], whole[::3])


@pytest.mark.parametrize("kind, temperature", [("llama", 1.0), ("mamba", 0.8)])
def test_a_part_of_the_prompts_draws_what_the_whole_would(kind, temperature):
    model, rows = make(kind, scale=1.0), prompts(7)
    how = {"max_tokens": 6, "temperature": temperature, "samples": 2, "seed": 4, "end_ids": {2, 5, 6}}
    whole = generate(model, Ends(), rows, **how)
    parts = [
        generate(model, Ends(), rows[at : at + 3], numbers=range(len(rows))[at : at + 3], **how) for at in (0, 3, 6)
    ]
    drawn = [(s.ids.tolist(), s.finished) for part in parts for s in part]
    assert drawn == [(s.ids.tolist(), s.finished) for s in whole]
    assert [s.prompt for s in parts[1]] == [0, 0, 1, 1, 2, 2]
    assert drawn[6:12] != [(s.ids.tolist(), s.finished) for s in generate(model, Ends(), rows[3:6], **how)]


SHARES = {"llama", "gpt2", "gemma3", "mistral", "neox"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_which_models_share_a_prompt_among_its_samples(kind):
    assert branches(make(kind)) == (kind in SHARES)


@pytest.mark.parametrize("kind", sorted(SHARES))
def test_sharing_a_prompt_is_copying_it(kind, monkeypatch):
    model, rows = make(kind, scale=2.0), prompts(6)
    how = {"max_tokens": 20, "samples": 3, "seed": 4, "end_ids": {2, 5, 6, 7, 8}}
    shared = generate(model, Ends(), rows, **how)
    assert len({len(sample.ids) for sample in shared}) > 5, "rows should leave at different times"
    monkeypatch.setattr(sampling, "branches", lambda model: False)
    same(shared, generate(model, Ends(), rows, **how))


def test_a_model_that_does_not_share_is_found_out(monkeypatch):
    """Keys of the wrong prompt: the probe must see it, and the stock forward take over."""
    model, rows = make(), prompts(4)
    monkeypatch.setattr(Branches, "attend", lambda self, query, *_: query.transpose(1, 2))
    assert not branches(model)
    made = generate(model, Ends(), rows, max_tokens=6, temperature=0, end_ids=set())
    assert [sample.ids.tolist() for sample in made] == [stock_greedy(model, row, 6, None) for row in rows]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "bloom"])
def test_logps_are_those_of_scoring(kind):
    model, rows = make(kind, scale=2.0), prompts(4)
    made = generate(model, Ends(), rows, max_tokens=9, samples=3, seed=1)
    groups = [
        TokenGroup(row, tuple(s.ids for s in mine), tuple(((0, len(s.ids)),) for s in mine))
        for row, mine in zip(rows, [made[i : i + 3] for i in range(0, len(made), 3)], strict=True)
    ]
    with torch.no_grad():
        scored = token_logps(model, collate(groups)).numpy()
    assert np.allclose(np.concatenate([s.token_logps for s in made]), scored, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_every_token_is_computed_once(shared, monkeypatch):
    model, rows = make(), prompts(3)
    monkeypatch.setattr(sampling, "branches", lambda model: shared)
    seen = []
    watch = model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    generate(model, Ends(), rows, max_tokens=5, samples=2, end_ids=set())
    watch.remove()
    lengths = [len(row) for row in rows]
    assert seen == [sum(lengths) if shared else 3 * max(lengths), 6, 6, 6, 6], "the cache is not used"


def test_completions_outgrow_the_room_they_begin_with():
    torch.manual_seed(0)
    config = LlamaConfig(**BASE | {"max_position_embeddings": 400}, **HEADS)
    model, rows = AutoModelForCausalLM.from_config(config).eval(), prompts(2)
    made = generate(model, Ends(), rows, max_tokens=3 * GROWTH - 7, seed=0, end_ids=set())
    assert all(len(sample.ids) > 2 * GROWTH for sample in made)
    for sample in made:
        assert np.allclose(sample.token_logps, reread(model, rows[sample.prompt], sample), atol=1e-4)


def test_more_tokens_prolong_the_same_completions():
    model, rows = make(), prompts(5)
    short = generate(model, Ends(), rows, max_tokens=4, seed=3, end_ids=set())
    long = generate(model, Ends(), rows, max_tokens=9, seed=3, end_ids=set())
    assert all(a.ids.tolist() == b.ids[:4].tolist() for a, b in zip(short, long, strict=True))


def test_seeds_prompts_and_samples_have_streams_of_their_own():
    model = make(scale=0.0)  # uniform over 61 tokens: completions are the streams themselves
    row = np.array([5, 6, 7], dtype=np.int32)
    made = generate(model, Ends(), [row, row], max_tokens=6, samples=2, seed=0, end_ids=set())
    made += generate(model, Ends(), [row, row], max_tokens=6, samples=2, seed=1, end_ids=set())
    assert len({tuple(sample.ids.tolist()) for sample in made}) == 8


def test_no_global_randomness_is_read_or_spent():
    model, rows = make(), prompts(3)
    torch.manual_seed(1)
    np.random.seed(1)
    state, theirs = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    one = generate(model, Ends(), rows, max_tokens=5, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], theirs)
    torch.manual_seed(2)
    same(generate(model, Ends(), rows, max_tokens=5, seed=0), one, 0)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_samples_follow_the_distribution(temperature):
    model = make(scale=4.0)
    row = np.array([5, 9, 30], dtype=np.int32)
    count = 6000
    made = generate(
        model, Ends(), [row], max_tokens=1, temperature=temperature, samples=count, seed=2, batch_tokens=10**6
    )
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(row.astype(np.int64))[None]).logits[0, -1].double()
    expected = (logits / temperature).softmax(-1).numpy() * count
    found = np.bincount([int(sample.ids[0]) for sample in made], minlength=61)
    chi = ((found - expected) ** 2 / expected).sum()
    assert chi < 60 + 5 * math.sqrt(120), chi  # 60 degrees of freedom, five standard deviations


def test_a_tiny_temperature_is_greedy_and_an_impossible_token_is_never_drawn():
    model, rows = make(), prompts(5)
    cold = generate(model, Ends(), rows, max_tokens=6, temperature=1e-9, seed=1)
    same(cold, generate(model, Ends(), rows, max_tokens=6, temperature=0))
    from palate.sampling.generate import _pick

    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for u in (0.0, 0.25, 0.5, 1 - 2**-53):
        chosen, logp = _pick(logits, 1.0, torch.tensor([u], dtype=torch.float64))
        assert int(chosen) == (1 if u < 0.5 else 3) and float(logp) == pytest.approx(-math.log(2))


def test_the_end_token_is_kept_and_stops_only_its_row():
    model, rows = make(scale=0.0), prompts(20)
    made = generate(model, Ends(), rows, max_tokens=30, seed=0, end_ids=set(range(0, 61, 5)))
    assert any(sample.finished for sample in made)
    for sample in made:
        ends = [int(token) % 5 == 0 for token in sample.ids]
        assert not any(ends[:-1]) and ends[-1] == sample.finished
        assert sample.finished or len(sample.ids) == 30


def test_the_tokenizer_names_the_end_where_nobody_else_does():
    model, rows = make(scale=0.0), prompts(20)
    made = generate(model, Ends(), rows, max_tokens=40, seed=0)
    assert any(s.finished for s in made) and all(s.ids[-1] == 2 for s in made if s.finished)
    silent = type("NoEnd", (), {"eos_token_id": None})()
    assert not any(s.finished for s in generate(model, silent, rows, max_tokens=5))


def test_end_id_zero_is_an_end():
    made = generate(make(scale=0.0), Ends(), prompts(20), max_tokens=40, end_ids={0})
    assert any(sample.finished and sample.ids[-1] == 0 for sample in made)


def test_the_context_bounds_each_row_on_its_own():
    model = make()
    rows = [np.full(length, 5, dtype=np.int32) for length in (60, 63, 10)]
    made = generate(model, Ends(), rows, max_tokens=20, end_ids=set())
    assert [len(sample.ids) for sample in made] == [4, 1, 20] and not any(sample.finished for sample in made)


def test_adapters_and_training_mode():
    adapted = add_lora(make(), 2).train()
    rows = prompts(4)
    same(generate(adapted, Ends(), rows, max_tokens=6, seed=0), generate(make(), Ends(), rows, max_tokens=6, seed=0))
    assert adapted.training
    assert all(weight.grad is None for weight in adapted.parameters())


def test_dropout_is_off():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5)
    model = AutoModelForCausalLM.from_config(config).train()
    rows = prompts(4)
    same(generate(model, Ends(), rows, max_tokens=6), generate(model, Ends(), rows, max_tokens=6), 0)


def test_bfloat16():
    model, rows = make().to(torch.bfloat16), prompts(4)
    for sample in generate(model, Ends(), rows, max_tokens=6, seed=0):
        assert np.allclose(sample.token_logps, reread(model, rows[sample.prompt], sample), atol=0.2)


@pytest.mark.parametrize(
    "how",
    [{"max_tokens": 0}, {"samples": 0}, {"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}],
    ids=str,
)
def test_impossible_settings(how):
    with pytest.raises(UsageError):
        generate(make(), Ends(), prompts(1), **{"max_tokens": 3, **how})


@pytest.mark.parametrize("length", [0, 64, 100])
def test_a_prompt_that_leaves_no_room(length):
    rows = [np.full(3, 5, dtype=np.int32), np.full(length, 5, dtype=np.int32)]
    with pytest.raises(DataError, match="prompt 2"):
        generate(make(), Ends(), rows, max_tokens=3)


def test_nothing_in_nothing_out():
    assert generate(make(), Ends(), [], max_tokens=3) == []


def test_logits_that_are_not_finite_stop():
    model = make()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    for temperature in (0, 1.0):
        with pytest.raises(NotFiniteError, match="prompt"):
            generate(model, Ends(), prompts(2), max_tokens=3, temperature=temperature)


@pytest.fixture(scope="module")
def real():
    data = os.environ.get("PALATE_TEST_DATA")
    if not data:
        pytest.skip("PALATE_TEST_DATA is not set: the real 260k model is not tested")
    from palate.model.load import load

    folder = Path(data) / "tiny-llama-260k"
    return load(folder), json.loads((folder / "expected.json").read_text())


def test_the_260k_model_tells_its_published_story(real):
    loaded, expected = real
    story = expected["greedy_from_bos"]
    start = np.array(story["ids"][:1], dtype=np.int32)
    others = [loaded.tokenizer(text, return_tensors="np")["input_ids"][0] for text in ("Once upon a time", "Lily")]
    made = generate(loaded.model, loaded.tokenizer, [start, *others], max_tokens=200, temperature=0, end_ids=set())
    ids = story["ids"][:1] + made[0].ids.tolist()
    assert ids[: len(story["ids"])] == story["ids"] and len(made[0].ids) == 200
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True).strip() == story["text"].strip()
    for sample, prompt in zip(made, [start, *others], strict=True):
        assert sample.ids.tolist() == stock_greedy(loaded.model, np.asarray(prompt), 200, [])
