"""Every causal family of transformers, as docs/architectures.md says: sharing prompts changes nothing but speed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import lifted, random_group
from transformers import LlamaConfig

from palate.data.batch import collate
from palate.errors import ModelError
from palate.model.recompute import enable_recompute
from palate.model.recurrent import Branching, States, stateful_layers
from palate.scoring import Numerics, logps, support

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import architectures  # noqa: E402

PAGE = {
    line.split("`")[1]: tuple("" if cell.strip() == "-" else cell.strip() for cell in line.split("|")[2:5])
    for line in (DOCS / "architectures.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
}
SHARED = [family for family, (path, _, _) in PAGE.items() if path == "shared"]
# layers with a state of every make, sinks, experts of every make, latent keys, a soft cap, twice the attention
SAMPLE = ["qwen3_next", "qwen3_5_text", "lfm2", "bamba", "falcon_h1", "mamba", "minimax", "gpt_oss"]
SAMPLE += ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gemma2", "diffllama"]
HYBRID = ["qwen3_next", "qwen3_5_text", "bamba", "mamba"]
FALLEN = ["bart", "llama4_text", "deepseek_v32", "xlnet", "cpmant"]
SHAPES = ((7, 5, 9), (1, 1, 1), (12, 3, 3, 8, 1), (20, 4), (3, 14, 2), (70, 66, 2))


def groups_of(seed, shapes=SHAPES):
    generator = np.random.default_rng(seed)
    return [random_group(generator, *shape) for shape in shapes]


def by_rows(model, groups) -> torch.Tensor:
    """Summed log-probs of every completion, by one stock forward a row."""
    found = []
    for group in groups:
        for ids in group.completions:
            row = torch.tensor([[*group.prompt.tolist(), *ids.tolist()]])
            values = model(input_ids=row, use_cache=False).logits[0].log_softmax(-1)
            start = len(group.prompt)
            found.append(values[start - 1 : -1].gather(-1, row[0, start:, None]).sum())
    return torch.stack(found)


def assert_equal_to_rows(model, groups, **how):
    """Values and gradients, in float64; the grouped product of experts knows no float64."""
    with lifted():
        model = model.double()
        model.set_experts_implementation("eager")
        model.zero_grad(set_to_none=True)
        ours = logps(model, collate(groups), **how).total
        weights = torch.linspace(-1, 1, len(ours), dtype=torch.float64)
        (ours * weights).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        rows = by_rows(model, groups)
        (rows * weights).sum().backward()
    torch.testing.assert_close(ours, rows, rtol=1e-9, atol=1e-9)
    scale = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-9 * scale, msg=name)


@pytest.mark.parametrize("family", SAMPLE)
def test_shared_prompts_change_no_loss_and_no_gradient(family):
    model = architectures.build(family)
    assert support(model).path == "shared", support(model)
    assert_equal_to_rows(model, groups_of(1))


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in SHARED if family not in SAMPLE])
def test_shared_prompts_change_nothing_in_any_family(family):
    assert_equal_to_rows(architectures.build(family), groups_of(2))


@pytest.mark.parametrize("family", [*SAMPLE, *FALLEN])
def test_the_page_says_what_the_probe_finds(family):
    assert architectures.row(family) == PAGE[family]


@pytest.mark.slow
def test_the_whole_page_is_current():
    assert list(PAGE) == list(architectures.FAMILIES)
    assert {family: architectures.row(family) for family in PAGE} == PAGE


_HYBRIDS = {family: architectures.build(family) for family in HYBRID}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.sampled_from(HYBRID),
    st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1, max_size=5
    ),
    st.integers(0, 2**31),
    st.integers(1, 60),
)
def test_any_tree_on_layers_with_a_state(family, shapes, seed, tail):
    groups = groups_of(seed, [(prompt, *completions) for prompt, completions in shapes])
    assert_equal_to_rows(_HYBRIDS[family], groups, numerics=Numerics(stream=tail))


def test_layers_with_a_state_run_over_a_prompt_once():
    """A prompt of 40 tokens with three branches: tokens that the layer saw, resumed or run again."""
    for family, rows in (("qwen3_next", 40 + 3 * 4), ("mamba", 40 + 3 * 44)):
        model = architectures.build(family)
        support(model)
        layer = stateful_layers(model)[0]
        seen, forward = [], layer.forward
        layer.forward = lambda hidden, *a, seen=seen, forward=forward, **k: (
            seen.append(hidden.shape[0] * hidden.shape[1]) or forward(hidden, *a, **k)
        )
        logps(model, collate(groups_of(3, [(40, 5, 5, 5)])))
        assert sum(seen) == rows


def test_states_are_recomputed_in_backward():
    model = architectures.build("qwen3_next")
    enable_recompute(model)
    assert_equal_to_rows(model, groups_of(4))


def test_stock_forwards_are_restored():
    model = architectures.build("lfm2")
    logps(model, collate(groups_of(5)))
    assert all("forward" not in layer.__dict__ for layer in stateful_layers(model))
    assert not isinstance(stateful_layers(model)[0].forward, Branching)


def test_a_convolution_keeps_what_it_needs():
    states = States()
    first = torch.arange(2.0).view(1, 1, 2)
    assert states.update_conv_state(first, 0, conv_kernel_size=4).tolist() == [[[0, 0, 0, 1]]]
    assert states.update_conv_state(first + 2, 0, conv_kernel_size=4).tolist() == [[[0, 0, 0, 1, 2, 3]]]
    assert states.get_conv_state(0).tolist() == [[[0, 1, 2, 3]]]
    assert states.get_recurrent_state(0) is None


def test_a_model_that_sees_what_it_predicts_is_refused():
    model = architectures.build("bert")
    assert support(model).path == "shared"
    model.config.is_decoder = False
    seeing = type(model)(model.config).eval()
    seeing.load_state_dict(model.state_dict())
    with pytest.raises(ModelError, match="sees the tokens that it is to predict"):
        support(seeing)


def test_a_small_config_keeps_one_layer_of_each_sort():
    options = architectures.small(architectures.CONFIG_MAPPING["qwen3_next"]())
    assert (options["num_hidden_layers"], options["layer_types"]) == (2, ["linear_attention", "full_attention"])
    assert architectures.small(LlamaConfig())["num_key_value_heads"] == 2
