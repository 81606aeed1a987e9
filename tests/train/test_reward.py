"""The objective of a reward model: its loss is the hand-computed one, whatever the cut into micro-batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import build, random_group
from training_cases import gradients, lifted

from palate.data.batch import collate_rewards
from palate.data.stream import stream
from palate.data.tokens import TokenGroup
from palate.evaluation.preference import evaluate
from palate.losses import PairRewards, bradley_terry
from palate.model.heads import with_scalar_head
from palate.scoring import rewards
from palate.train.loop import TrainState, steps
from palate.train.objectives import reward
from palate.train.optim import OptimConfig


def rows(seed=0):
    """Pairs with margins and ranked lists of three and four."""
    generator = np.random.default_rng(seed)
    pair = [random_group(generator, 4, 3, 5), random_group(generator, 2, 1, 1), random_group(generator, 7, 6, 2)]
    three = random_group(generator, 5, 2, 4, 3, preferences=((0, 1), (0, 2), (1, 2)))
    four = random_group(generator, 3, 2, 2, 5, 1, preferences=((3, 0), (3, 1), (2, 1)))
    return [*pair, three, four]


def model_of(dtype=torch.float64):
    return with_scalar_head(build("llama", dtype=dtype), seed=1)


def test_every_prompt_counts_once_however_many_pairs_it_has():
    model, groups = model_of(), rows()
    model.config.reward_bias = 0.3
    with lifted():
        values, at, expected = rewards(model, groups), 0, []
        for group in groups:
            mine = values[at : at + len(group.completions)]
            at += len(mine)
            sides = torch.tensor([[mine[a], mine[b]] for a, b in group.preferences], dtype=torch.float64).T
            expected.append(float(bradley_terry(PairRewards(*sides), centring=0.05).mean()))
        made = reward("bradley_terry", centring=0.05)
        outcome = made(model, collate_rewards(groups))
    assert outcome.loss.count == 5
    assert float(outcome.loss.total.detach()) / 5 == pytest.approx(np.mean(expected), rel=1e-10)
    assert len(outcome.margins) == 9 and outcome.metrics["rewards/accuracies"].count == 9


@pytest.mark.parametrize("tokens", [1, 12, 10**6])
def test_micro_batches_move_no_number(tokens):
    model, groups = model_of(), rows()
    made, found = reward(), []
    with lifted():
        for size in (tokens, 10**6):
            (step,) = stream(groups, made.collate, batch=5, tokens=size)
            model.zero_grad()
            outcomes = [made(model, part) for part in step]
            sum((outcome.loss.total / step.units).backward() or 0 for outcome in outcomes)
            found.append((sum(float(o.loss.total.detach()) for o in outcomes), gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-10)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][name], rtol=1e-8, atol=1e-10)


def test_margins_are_read_where_every_pair_has_one():
    generator = np.random.default_rng(0)
    groups = [random_group(generator, 3, 2, 2, margin=m) for m in (0.5, 2.0)]
    assert collate_rewards(groups).margin.tolist() == [0.5, 2.0]
    assert collate_rewards([groups[0], replace(groups[1], margin=None)]).margin is None
    model = model_of()
    plain, moved = (reward(margin=m)(model, collate_rewards(groups)) for m in (0.0, 1.0))
    expected = bradley_terry(PairRewards(plain.margins, torch.zeros(2).double(), torch.tensor([0.5, 2.0])), margin=1.0)
    assert float(moved.loss.total.detach()) == pytest.approx(float(expected.sum()), rel=1e-10)
    with pytest.raises(ValueError, match="needs margin"):
        reward(margin=1.0)(model, collate_rewards([replace(group, margin=None) for group in groups]))


def test_a_trained_model_stands_at_the_bayes_rate_of_a_known_truth():
    """Eight texts of known reward, pairs labelled by Bradley-Terry: accuracy within a point of the best there is."""
    truth = np.array([-2.0, -1.2, -0.5, 0.0, 0.3, 0.8, 1.5, 2.2])
    rng = np.random.default_rng(3)
    prompt, texts = np.array([5, 6, 7], np.int32), [np.array([20 + 9 * k, 40 + 3 * k, 2], np.int32) for k in range(8)]

    def group(better, worse):
        sides = (texts[better], texts[worse])
        return TokenGroup(prompt, sides, (((0, 3),), ((0, 3),)), preferences=((0, 1),))

    first = rng.integers(0, 8, 6000)
    second = (first + rng.integers(1, 8, 6000)) % 8
    wins = rng.random(6000) < 1 / (1 + np.exp(truth[second] - truth[first]))
    groups = [group(a, b) if win else group(b, a) for a, b, win in zip(first, second, wins, strict=True)]
    model, made = model_of(torch.float32), reward()
    state = TrainState.fresh(model, OptimConfig(lr=2e-3, schedule="linear"), total_steps=40)
    for _ in steps(state, stream(groups, made.collate, batch=150, steps=40, tokens=4096), made):
        pass
    learnt = np.array(rewards(model, [TokenGroup(prompt, tuple(texts), (((0, 3),),) * 8)]))
    cases = [(a, b) for a in range(8) for b in range(8) if a != b]
    p = np.array([1 / (1 + np.exp(truth[b] - truth[a])) for a, b in cases])
    guess = np.array([learnt[a] - learnt[b] for a, b in cases])
    bayes = np.maximum(p, 1 - p).mean()
    assert bayes - 0.01 < np.where(guess > 0, p, 1 - p).mean() <= bayes
    floor = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
    loss = (p * np.logaddexp(0, -guess) + (1 - p) * np.logaddexp(0, guess)).mean()
    assert 0 <= loss - floor < 0.02
    found = evaluate(model, groups[:300], made)
    assert found["eval/count"] == 300
