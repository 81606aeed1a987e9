"""Scalar heads: on every family that transformers can put one on, read in the stream as in a row alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import FAMILIES, build, lifted, random_group

from palate.data.batch import collate, collate_ends
from palate.errors import ModelError
from palate.model.adapters import add_lora
from palate.model.heads import scalar_head, scaled_head, set_pad, with_scalar_head
from palate.scoring import Numerics, rewards, scalars, support

HEADLESS = ("cohere", "granite")
HEADED = [name for name in FAMILIES if name not in HEADLESS]


def headed(name="llama", dtype=torch.float32):
    return with_scalar_head(build(name, dtype=dtype), seed=3)


def groups_of(seed=0):
    generator = np.random.default_rng(seed)
    return [random_group(generator, 5, 4, 7, 1), random_group(generator, 1, 3), random_group(generator, 9, 2, 6)]


def stock(model, group, k):
    """The reward by the model's own forward, of the one row."""
    ids = [*group.prompt.tolist(), *group.completions[k].tolist()]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


@pytest.mark.parametrize("name", HEADED)
def test_rewards_of_the_stream_are_those_of_rows_alone(name):
    dtype = torch.float32 if name == "gpt_oss" else torch.float64  # its experts know no float64
    model, groups = headed(name, dtype), groups_of()
    assert support(model).path == "shared"
    with lifted():
        found = rewards(model, groups, tokens=20)
        expected = [stock(model, g, k) for g in groups for k in range(len(g.completions))]
    assert found == pytest.approx(expected, abs=1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", HEADLESS)
def test_families_without_a_head_are_refused(name):
    with pytest.raises(ModelError, match="no sequence classification") as caught:
        headed(name)
    assert caught.value.code == "E412"


@pytest.mark.parametrize("name", ["gpt_neo", "bloom"])
def test_models_that_cannot_share_are_read_as_padded_rows(name):
    model, groups = headed(name), groups_of()
    assert support(model).path == "padded"
    expected = [stock(model, g, k) for g in groups for k in range(len(g.completions))]
    assert rewards(model, groups) == pytest.approx(expected, abs=1e-5)


def test_a_completion_does_not_see_the_one_beside_it():
    model, (group, *_) = headed(), groups_of()
    numerics = Numerics.of(model)
    before = rewards(model, [group], numerics=numerics)
    other = replace(group, completions=(group.completions[0], (group.completions[1] + 1) % 300, group.completions[2]))
    after = rewards(model, [other], numerics=numerics)
    assert (before[0], before[2]) == (after[0], after[2]) and before[1] != after[1]
    alone = [replace(group, completions=(ids,), spans=(((0, len(ids)),),)) for ids in group.completions]
    assert rewards(model, alone, numerics=numerics) == before  # to the bit


def test_the_end_is_read_and_no_reward_depends_on_what_follows():
    group, *_ = groups_of()
    batch = collate_ends([group])
    rows = batch.predictors.tolist()
    assert [int(batch.tokens[row]) for row in rows] == [int(ids[-1]) for ids in group.completions]
    assert collate([group]).layout.branches == ((3, 6, 0),) and batch.layout.branches == ((4, 7, 1),)
    empty = replace(group, completions=(np.empty(0, np.int32),), spans=((),))
    assert collate_ends([empty]).predictors.tolist() == [4]


def test_values_are_read_where_tokens_are_chosen():
    model, group = headed(dtype=torch.float64), groups_of()[2]
    with lifted(), torch.no_grad():
        found = scalars(model, collate([group]))
        ids = [*group.prompt.tolist(), *group.completions[0].tolist()]
        expected = [float(model(input_ids=torch.tensor([ids[:n]])).logits[0, 0]) for n in (9, 10)]
    assert found[:2].tolist() == pytest.approx(expected, abs=1e-9)
    assert len(found) == 8


def test_the_backbone_is_shared_and_the_head_is_drawn_from_the_seed():
    policy = build("llama")
    model = with_scalar_head(policy, seed=1)
    assert model.base_model is policy.base_model and model.config.num_labels == 1
    weight = scalar_head(model).weight
    assert weight.shape == (1, 32)
    again, other = (scalar_head(with_scalar_head(build("llama"), seed=s)).weight for s in (1, 2))
    assert torch.equal(weight, again) and not torch.equal(weight, other)
    drawn = torch.cat([scalar_head(with_scalar_head(policy, seed=s)).weight.detach().flatten() for s in range(40)])
    assert float(drawn.std()) == pytest.approx(33**-0.5, rel=0.06)
    with scaled_head(model, 2.0):
        assert torch.equal(scalar_head(model).weight, 2 * again)
    assert torch.equal(scalar_head(model).weight, again)


def test_an_adapter_trains_the_head_too():
    model = headed()
    before = rewards(model, groups_of())
    adapted = add_lora(model, 2)
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert any("score" in name for name in trained) and all("score" in n or "lora_" in n for n in trained)
    assert rewards(adapted, groups_of()) == before
    with scaled_head(adapted, 2.0):
        assert rewards(adapted, groups_of()) == pytest.approx([2 * x for x in before])


class Tokens:
    """As much of a tokenizer as `set_pad` asks for."""

    def __init__(self, pad, bos):
        self.names = {"<pad>": 0, "<s>": 1, "</s>": 2}
        self.pad_token, self.bos_token_id = pad, bos

    @property
    def pad_token_id(self):
        return self.names.get(self.pad_token)

    def convert_ids_to_tokens(self, id):
        return next(name for name, number in self.names.items() if number == id)

    def add_special_tokens(self, tokens):
        self.pad_token = tokens["pad_token"]
        self.names[self.pad_token] = 300

    def __len__(self):
        return max(self.names.values()) + 1


@pytest.mark.parametrize("pad, bos, expected", [("<pad>", 1, 0), ("</s>", 1, 1), (None, 1, 1), ("</s>", 2, 300)])
def test_the_pad_token_ends_no_completion(pad, bos, expected):
    model, tokenizer = headed(), Tokens(pad, bos)
    before = rewards(model, groups_of())
    set_pad(model, tokenizer, {2})
    assert model.config.pad_token_id == tokenizer.pad_token_id == expected
    assert model.get_input_embeddings().weight.shape[0] == max(300, expected + 1)
    assert rewards(model, groups_of()) == pytest.approx(before)
