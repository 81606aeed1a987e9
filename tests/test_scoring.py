"""The one log-prob function, against one stock forward a row: values, gradients, support, layout and bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FALLBACK, FAMILIES, build, lifted, random_group, totals, truth

from palate.data.batch import collate, stream_length
from palate.data.stream import pack
from palate.model.attention import NAME
from palate.scoring import Numerics, logps, support, token_logps


@pytest.fixture(scope="module")
def llama():
    model = build("llama")
    support(model)  # probed here, so that no test sees the probe's calls
    return model


def groups_of(seed, *shapes):
    generator = np.random.default_rng(seed)
    return [random_group(generator, *shape) for shape in shapes]


SHAPES = ((7, 5, 9), (1, 1, 1), (12, 3, 3, 8, 1), (20, 4), (7, 5, 9), (3, 14, 2))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_share_prompts_and_equal_row_by_row(name):
    model, groups = build(name), groups_of(1, *SHAPES)
    assert support(model).path == "shared", support(model)
    got = logps(model, collate(groups)).total.detach().numpy()
    lengths = np.array([len(c) for g in groups for c in g.completions])
    assert np.abs(got - totals(model, groups)).max() <= (1e-5 * lengths).max()


@pytest.mark.parametrize("name", FALLBACK)
def test_models_that_cannot_share_are_found_out_and_scored_with_the_same_numbers(name):
    model, groups = build(name), groups_of(2, *SHAPES)
    found = support(model)
    assert found.path == "padded"
    assert found.reason
    got = logps(model, collate(groups)).total.detach().numpy()
    assert np.abs(got - totals(model, groups)).max() <= 2e-4


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral", "granite"])
def test_float64_equality(name):
    model, groups = build(name, dtype=torch.float64), groups_of(3, *SHAPES)
    with lifted():
        got = logps(model, collate(groups)).total.detach().numpy()
        assert got == pytest.approx(totals(model, groups), rel=1e-10, abs=1e-10)


def test_gradients_equal_the_plain_formula_in_float64():
    model, groups = build("gemma2", dtype=torch.float64), groups_of(4, *SHAPES)
    weights = torch.linspace(-1, 1, sum(len(g.completions) for g in groups), dtype=torch.float64)
    with lifted():
        (logps(model, collate(groups)).total * weights).sum().backward()
        ours = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        plain, number = 0.0, 0
        for group in groups:
            for ids in group.completions:
                row = torch.tensor([[*group.prompt.tolist(), *ids.tolist()]])
                values = model(input_ids=row, use_cache=False).logits[0].log_softmax(-1)
                start = len(group.prompt)
                picked = values[start - 1 : -1].gather(-1, row[0, start:, None])
                plain = plain + weights[number] * picked.sum()
                number += 1
        plain.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(ours[name], parameter.grad, rtol=1e-9, atol=1e-11), name


def test_gradient_reaches_exactly_the_rows_that_predict(llama):
    """SUP: the loss moves the hidden states of predictors alone, and there are as many targets as scored tokens."""
    group = groups_of(5, (6, 4, 3))[0]
    batch = collate([group])
    seen = {}

    def keep(module, arguments):
        arguments[0].retain_grad()
        seen["hidden"] = arguments[0]

    hook = llama.get_output_embeddings().register_forward_pre_hook(keep)
    token_logps(llama, batch).sum().backward()
    hook.remove()
    rows = seen["hidden"].grad[0].abs().sum(-1) > 0
    # the prompt's last row predicts both first tokens; a branch's rows predict the rest; nothing else is moved
    assert rows.tolist() == [False] * 5 + [True] + [True] * 3 + [True] * 2
    assert len(batch.targets) == 4 + 3


def test_a_token_moves_its_own_branch_alone(llama):
    first, second = groups_of(6, (9, 6, 6), (4, 5, 5))
    before = token_logps(llama, collate([first, second])).detach()
    first.completions[0][1] = (first.completions[0][1] + 1) % 300
    after = token_logps(llama, collate([first, second])).detach()
    moved = (before != after).tolist()
    assert moved[:1] == [False]
    assert all(moved[1:6])
    assert not any(moved[6:])


def test_spans_pick_the_scored_tokens(llama):
    from dataclasses import replace

    group = groups_of(7, (5, 8, 6))[0]
    group = replace(group, spans=(((1, 3), (5, 8)), ((0, 2),)))
    got = token_logps(llama, collate([group])).detach().double().numpy()
    expected = truth(llama, group, 0) + truth(llama, group, 1)
    assert got == pytest.approx(expected, abs=1e-5)
    assert logps(llama, collate([group])).length.tolist() == [5, 2]


def test_an_empty_prompt_leaves_the_first_token_unscored(llama):
    group = groups_of(8, (0, 6))[0]
    found = logps(llama, collate([group]))
    assert found.length.tolist() == [5]
    assert float(found.total) == pytest.approx(sum(truth(llama, group, 0)), abs=1e-4)


def test_the_stock_attention_is_restored_also_after_an_error(llama):
    before = llama.config._attn_implementation
    batch = collate(groups_of(9, (5, 4)))
    broken = batch.__class__(**{**batch.__dict__, "targets": torch.tensor([10**6] * len(batch.targets))})
    with pytest.raises((RuntimeError, IndexError)):
        token_logps(llama, broken)
    assert llama.config._attn_implementation == before != NAME
    assert "forward" not in llama.get_output_embeddings().__dict__
    assert llama.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_dropout_in_the_config_changes_nothing():
    import transformers

    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300, bos_token_id=1, eos_token_id=2,
                                     resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    batch = collate(groups_of(10, (6, 5, 4)))
    assert torch.equal(token_logps(model, batch), token_logps(model, batch))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", ["gemma2", "llama"])  # with a soft cap, and a matrix alone
def test_chunks_give_the_gradients_of_all_logits_at_once(family, frozen, chunks, precision, monkeypatch):
    """Plain autograd through all logits at once is the truth. A second backward finds no logits kept; a frozen head
    needs none."""
    from palate.model import logprob

    model, batch = build(family), collate(groups_of(12, (9, 20, 18), (4, 11)))
    monkeypatch.setattr(logprob, "LOGITS_PER_CHUNK", -(-len(batch.targets) // 16 // chunks) * 16 * 300)
    numerics = Numerics(precision)
    support(model)
    head = model.get_output_embeddings().requires_grad_(not frozen)  # gemma's is the embedding, too
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    weights = torch.linspace(-1, 1, len(batch.targets))

    def gradients(value, **options):
        return torch.autograd.grad((value * weights).sum(), list(trained.values()), **options)

    value = token_logps(model, batch, numerics=numerics)
    kept = gradients(value, retain_graph=True)
    again = gradients(value)
    for name, one, two in zip(trained, kept, again, strict=True):
        assert torch.equal(one, two), name

    def plain(model, predictors, targets, transform, hidden=None):
        """The head on all scored rows, by autograd alone."""
        from contextlib import contextmanager

        @contextmanager
        def block():
            found, original = [], head.forward

            def forward(states):
                logits = original(states.reshape(-1, states.shape[-1]).index_select(0, predictors))
                wide = (transform or torch.nn.Identity())(logits).float().log_softmax(-1)
                found.append(wide.gather(-1, targets[:, None])[:, 0])
                return states[..., :1]

            head.forward = forward
            try:
                yield found
            finally:
                del head.forward

        return block()

    monkeypatch.setattr("palate.scoring.scored_rows", plain)
    truth = gradients(token_logps(model, batch, numerics=numerics))
    slack = 1e-5 if precision == "float32" else 3e-2
    for name, one, two in zip(trained, kept, truth, strict=True):
        assert float((one - two).norm()) <= slack * float(two.norm()), name


@pytest.mark.parametrize("frozen", [False, True])
def test_the_full_logits_never_exist(frozen, monkeypatch):
    """No head output is taller than a chunk, whatever the stream's length; a frozen head runs once on every chunk."""
    import palate.model.logprob as logprob

    model = build("llama")
    support(model)
    monkeypatch.setattr(logprob, "LOGITS_PER_CHUNK", 300 * 16)
    head, tallest = model.get_output_embeddings().requires_grad_(not frozen), []
    weight_forward = head.forward

    def forward(rows):
        tallest.append(rows.shape[-2])
        return weight_forward(rows)

    head.forward = forward
    batch = collate(groups_of(11, (30, 25, 31)))
    value = token_logps(model, batch)
    value.sum().backward()
    assert max(tallest) == 16
    chunks = -(-len(batch.targets) // 16)
    assert len(tallest) == (chunks if frozen else 2 * chunks - 1)  # backward begins with the last one, which is kept
    del head.forward
    assert torch.equal(value, token_logps(model, batch))


def test_bfloat16_is_no_further_from_float64_than_the_plain_path():
    groups = groups_of(12, *[(20, 15, 25)] * 4)
    ours, plain = [], []
    for seed in range(3):
        model = build("llama", seed=seed)
        exact = totals(build("llama", seed=seed, dtype=torch.float64), groups)
        got = logps(model, collate(groups), numerics=Numerics("bfloat16")).total.detach().numpy()
        with torch.autocast("cpu", torch.bfloat16):
            stock = totals(model, groups)
        ours.append(np.sqrt(((got - exact) ** 2).mean()))
        plain.append(np.sqrt(((stock - exact) ** 2).mean()))
    assert np.mean(ours) <= 1.5 * np.mean(plain)


def test_sums_are_taken_in_float64(llama):
    assert logps(llama, collate(groups_of(13, (4, 9)))).total.dtype == torch.float64


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_bits_do_not_depend_on_neighbours_order_or_cut(name, precision):
    """Scored alone, in a shuffled batch, as chosen or as rejected: the same bits, at the numerics a run uses."""
    model = build(name)
    generator = np.random.default_rng(14)
    groups = [random_group(generator, *generator.integers(1, 30, 3)) for _ in range(40)]
    numerics = Numerics.of(model, precision, tokens=256)
    known = {}
    for seed, tokens in ((0, 256), (1, 256), (2, 100 if numerics.stream is None else 256)):
        order = np.random.default_rng(seed).permutation(len(groups))
        for part in pack([stream_length(groups[i]) for i in order], tokens):
            with torch.no_grad():
                batch = collate([groups[order[i]] for i in part])
                values = logps(model, batch, numerics=numerics).total.view(-1, 2).tolist()
            for i, value in zip(part, values, strict=True):
                assert known.setdefault(order[i], value) == value
    for i in (0, 5, 9):
        from dataclasses import replace

        turned = replace(groups[i], completions=groups[i].completions[::-1], spans=groups[i].spans[::-1])
        with torch.no_grad():
            assert logps(model, collate([turned]), numerics=numerics).total.tolist() == known[i][::-1]


def test_streams_are_no_longer_than_the_bits_ask_for(monkeypatch):
    """The first floor whose bits hold is taken, and asked about once; a whole micro-batch where none does."""
    model, asked = build("llama"), []

    def invariant(model, numerics):
        asked.append(numerics.shortest)
        return numerics.shortest >= 512

    monkeypatch.setattr("palate.scoring._invariant", invariant)
    found = Numerics.of(model)
    assert (found.stream, found.shortest) == (64, 512)
    assert [found.tail(n) for n in (1, 512, 513, 600, 1024)] == [511, 0, 63, 40, 0]
    assert "stream=64+512" in found.tag(model)
    assert Numerics.of(model) == found
    assert asked == [0, 256, 512]
    whole = Numerics.of(model, tokens=300)
    assert (whole.stream, whole.tail(290), whole.tail(301)) == (300, 10, 299)
    assert Numerics.of(model, "bfloat16").stream == 1024
    assert asked == [0, 256, 512, 0]


def test_a_change_of_kernels_between_two_lengths_is_seen(monkeypatch):
    """A model whose products are rounded otherwise below 256 rows: streams are filled to that, and keep their bits."""
    model = build("llama")
    for layer in model.model.layers:
        project = layer.mlp.down_proj.forward

        def forward(rows, project=project):
            return project(rows) if rows.shape[-2] >= 256 else project(rows) * (1 + 2e-7)

        layer.mlp.down_proj.forward = forward
    assert Numerics.of(model).shortest == 256


_LLAMA = build("llama", dtype=torch.float64)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1, max_size=6
    ),
    st.integers(0, 2**31),
    st.integers(1, 60),
)
def test_any_tree_equals_row_by_row(shapes, seed, tail):
    """META: random trees of prompts and completions, with or without an inert tail, in any cut (float64)."""
    generator = np.random.default_rng(seed)
    groups = [random_group(generator, prompt, *completions) for prompt, completions in shapes]
    with lifted(), torch.no_grad():
        expected = totals(_LLAMA, groups)
        whole = logps(_LLAMA, collate(groups)).total.numpy()
        tailed = logps(_LLAMA, collate(groups), numerics=Numerics(stream=tail)).total.numpy()
        single = np.concatenate([logps(_LLAMA, collate([g])).total.numpy() for g in groups])
    for got in (whole, tailed, single):
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-9)
