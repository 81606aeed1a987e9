"""Policy gradients against hand-worked numbers, the printed sums, and exact gradients by enumeration."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from oracles import ppo as oracle
from palate.losses.policy import (
    KlController,
    clipped_policy_loss,
    clipped_value_loss,
    end_scores,
    explained_variance,
    generalised_advantages,
    group_advantages,
    k1,
    k2,
    k3,
    token_rewards,
    whiten,
)


def wide(values):
    return torch.tensor(values, dtype=torch.float64)


def advantages(rewards, values, gamma=1.0, lam=0.95):
    """Of completions given as lists, by our function on one flat column."""
    lengths = torch.tensor([len(row) for row in rewards])
    flat = [wide([x for row in rows for x in row]) for rows in (rewards, values)]
    made, returns = generalised_advantages(*flat, lengths, gamma=gamma, lam=lam)
    return [part.tolist() for part in made.split(lengths.tolist())], [
        part.tolist() for part in returns.split(lengths.tolist())
    ]


# rewards, values, gamma, lam -> advantages, worked by hand
HAND = {
    "one token": ([2.0], [0.5], 1, 0.95, [1.5]),
    "one token, no critic": ([2.0], [0.0], 1, 0.95, [2.0]),
    "score at the end, zero critic": ([0.0, 0.0, 1.0], [0.0, 0.0, 0.0], 1, 1, [1.0, 1.0, 1.0]),
    "zero critic, lam half": ([0.0, 0.0, 1.0], [0.0, 0.0, 0.0], 1, 0.5, [0.25, 0.5, 1.0]),
    "gamma half": ([0.0, 0.0, 1.0], [0.0, 0.0, 0.0], 0.5, 1, [0.25, 0.5, 1.0]),
    "lam 0 is the TD error": ([1.0, 2.0, 3.0], [0.5, 1.0, 2.0], 1, 0, [1.5, 3.0, 1.0]),
    "lam 1 is the return less V": ([1.0, 2.0, 3.0], [0.5, 1.0, 2.0], 1, 1, [5.5, 4.0, 1.0]),
    "lam 0.5": ([1.0, 2.0, 3.0], [0.5, 1.0, 2.0], 1, 0.5, [1.5 + 0.5 * 3.5, 3.5, 1.0]),
    "gamma and lam": ([0.0, 1.0], [2.0, 4.0], 0.5, 0.5, [0 + 2 - 2 + 0.25 * -3.0, -3.0]),
    "a right critic leaves nothing": ([0.0, 0.0, 1.0], [1.0, 1.0, 1.0], 1, 0.95, [0.0, 0.0, 0.0]),
    "KL costs on the way": ([-0.1, -0.2, 0.7], [0.0, 0.0, 0.0], 1, 1, [0.4, 0.5, 0.7]),
    "cut at the limit, penalised": ([0.0, 0.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], 1, 1, [-1.0, -1.0, -1.0, -1.0]),
    "end token first": ([-1.0], [0.25], 1, 0.95, [-1.25]),
}


@pytest.mark.parametrize("case", HAND)
def test_hand_worked_advantages(case):
    rewards, values, gamma, lam, expected = HAND[case]
    (found,), (returns,) = advantages([rewards], [values], gamma, lam)
    assert found == pytest.approx(expected, abs=1e-12)
    assert returns == pytest.approx([a + v for a, v in zip(expected, values, strict=True)], abs=1e-12)
    assert found == pytest.approx(oracle.advantages(rewards, values, gamma, lam), abs=1e-12)


def test_neighbours_of_other_lengths_reach_nobody():
    """All hand-worked shapes in one column, in every order tried, give what each gives alone."""
    chance = random.Random(0)
    cases = [case for case in HAND.values() if case[2:4] == (1, 1)]
    for _ in range(5):
        chance.shuffle(cases)
        found, _ = advantages([case[0] for case in cases], [case[1] for case in cases], 1, 1)
        for mine, case in zip(found, cases, strict=True):
            assert mine == pytest.approx(case[4], abs=1e-12)


def test_random_shapes_equal_the_printed_sum():
    chance = random.Random(1)
    for _ in range(50):
        gamma, lam = chance.choice([1.0, chance.random()]), chance.choice([0.0, 0.95, 1.0, chance.random()])
        rows = [[chance.gauss(0, 1) for _ in range(chance.randint(1, 9))] for _ in range(chance.randint(1, 7))]
        values = [[chance.gauss(0, 1) for _ in row] for row in rows]
        found, _ = advantages(rows, values, gamma, lam)
        for mine, row, value in zip(found, rows, values, strict=True):
            assert mine == pytest.approx(oracle.advantages(row, value, gamma, lam), abs=1e-12)


def test_rewards_stand_at_their_tokens_and_sum_to_score_less_kl():
    ratios, scores = [[0.5], [-0.25, 1.0, 0.5], [0.1, 0.2]], [3.0, -1.0, 0.0]
    lengths = torch.tensor([1, 3, 2])
    found = token_rewards(wide(scores), wide([x for row in ratios for x in row]), lengths, 0.2).split([1, 3, 2])
    for mine, score, ratio in zip(found, scores, ratios, strict=True):
        assert mine.tolist() == pytest.approx(oracle.rewards(score, ratio, 0.2), abs=1e-12)
        assert float(mine.sum()) == pytest.approx(score - 0.2 * sum(ratio), abs=1e-12)


def test_a_missing_end_token_is_what_counts():
    scores, finished = wide([2.0, 3.0, -5.0]), torch.tensor([True, False, False])
    assert end_scores(scores, finished, -1.0).tolist() == [2.0, -1.0, -1.0]
    assert end_scores(scores, finished, None).tolist() == [2.0, 3.0, -5.0]


def test_group_advantages_by_hand():
    totals = wide([[1.0, 2.0, 3.0, 6.0], [1.0, 1.0, 1.0, 1.0]])
    found = group_advantages(totals, kind="rloo")
    assert found[0].tolist() == pytest.approx([1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3])
    assert found[1].tolist() == [0, 0, 0, 0]
    grpo = group_advantages(totals, kind="grpo")
    assert grpo[0].tolist() == pytest.approx([x / math.sqrt(3.5) for x in (-2, -1, 0, 3)])
    assert grpo[1].tolist() == [0, 0, 0, 0]
    for bad in (lambda: group_advantages(totals[:, :1]), lambda: group_advantages(totals, kind="ppo")):
        with pytest.raises(ValueError):
            bad()


def test_at_the_optimum_no_group_advantage_is_left():
    """Where the policy is ref exp(r / beta) / Z every completion's score less KL is the same: no noise either."""
    rng, beta = np.random.default_rng(0), 0.7
    ref, score = rng.dirichlet(np.ones(6)), rng.normal(size=6)
    best = ref * np.exp(score / beta)
    best /= best.sum()
    totals = wide(score - beta * np.log(best / ref))[None]
    assert group_advantages(totals).abs().max() < 1e-12


def test_whitening():
    values = wide([1.0, 2.0, 3.0, 10.0])
    white = whiten(values)
    assert float(white.mean()) == pytest.approx(0, abs=1e-12)
    assert float(white.var(correction=0)) == pytest.approx(1, abs=1e-6)
    kept = whiten(values, shift_mean=False)
    assert float(kept.mean()) == pytest.approx(4)
    torch.testing.assert_close(kept - white, torch.full((4,), 4.0, dtype=torch.float64))
    assert whiten(wide([2.0, 2.0])).tolist() == [0, 0]


GRID = [0.3, 0.79, 0.8, 0.9, 1.0, 1.1, 1.2, 1.21, 3.0]


@pytest.mark.parametrize("advantage", [-2.0, -0.5, 0.0, 0.5, 2.0])
def test_the_clipped_loss_and_where_its_gradient_stops(advantage):
    for ratio in GRID:
        logp = wide([math.log(ratio) - 3.0]).requires_grad_()
        value = clipped_policy_loss(logp, wide([-3.0]), wide([advantage]), clip=0.2)
        assert value.item() == pytest.approx(oracle.policy_loss(ratio, advantage, 0.2), abs=1e-12)
        value.sum().backward()
        stopped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
        if not math.isclose(ratio, 0.8) and not math.isclose(ratio, 1.2):
            assert logp.grad.item() == pytest.approx(0 if stopped else -advantage * ratio, abs=1e-12)


def test_the_first_minibatch():
    """Ratio 1: the loss is minus the mean advantage, nothing is clipped, the gradient is the policy gradient."""
    logps = wide([-1.0, -2.0, -0.5]).requires_grad_()
    advantage = whiten(wide([0.3, -1.0, 2.0]))
    values = clipped_policy_loss(logps, logps, advantage)
    assert torch.equal(values, -advantage) and float(values.detach().mean()) == pytest.approx(0, abs=1e-12)
    values.sum().backward()
    torch.testing.assert_close(logps.grad, -advantage)


def test_the_clipped_value_loss():
    for value, old, target in itertools.product([-1.0, -0.1, 0.0, 0.15, 0.9], [0.0, 0.5], [-1.0, 0.1, 2.0]):
        mine = clipped_value_loss(wide([value]), wide([old]), wide([target]))
        assert mine.item() == pytest.approx(oracle.value_loss(value, old, target, 0.2), abs=1e-12)
    moved = wide([0.9]).requires_grad_()
    clipped_value_loss(moved, wide([0.0]), wide([0.1])).sum().backward()
    assert moved.grad.item() == pytest.approx(0.8)  # away from the target: pulled back
    gone = wide([0.9]).requires_grad_()
    clipped_value_loss(gone, wide([0.0]), wide([2.0])).sum().backward()
    assert gone.grad.item() == 0  # towards it, and already beyond the clip: enough


def test_kl_estimates_against_enumeration():
    """E k1 = E k3 = KL, k3 never below 0, k2 off, by sums over every outcome; a sequence's KL is that of its steps."""
    rng = np.random.default_rng(3)
    policy, ref = (rng.dirichlet(np.ones(5), size=6) for _ in range(2))  # the next token, after each of 6 states
    ratio, p = wide(np.log(policy[0] / ref[0])), wide(policy[0])
    exact = float((policy[0] * np.log(policy[0] / ref[0])).sum())
    assert float((p * k1(ratio)).sum()) == pytest.approx(exact, rel=1e-12)
    assert float((p * k3(ratio)).sum()) == pytest.approx(exact, rel=1e-12)
    assert abs(float((p * k2(ratio)).sum()) - exact) > 0.005
    grid = torch.linspace(-20, 20, 401, dtype=torch.float64)
    assert (k3(grid) >= 0).all() and float(k3(wide([0.0]))) == 0
    assert float(k3(wide([1e-6]))) == pytest.approx(5e-13, rel=1e-4)
    # two tokens: the sequence's KL is the sum of the steps' expected ones
    whole = sum(
        policy[0, a] * policy[1 + a, b] * (np.log(policy[0, a] / ref[0, a]) + np.log(policy[1 + a, b] / ref[1 + a, b]))
        for a in range(5)
        for b in range(5)
    )
    steps = [(q * np.log(q / r)).sum() for q, r in zip(policy, ref, strict=True)]
    assert whole == pytest.approx(steps[0] + (policy[0] * steps[1:]).sum(), rel=1e-12)


def test_the_surrogate_has_the_exact_gradient_of_what_is_wanted():
    """J = E r - beta KL of a two-token language: by enumeration, by finite differences, by our loss over all outcomes,
    and by its Monte-Carlo average within three standard errors."""
    rng, beta, k = np.random.default_rng(5), 0.3, 3
    start, ref = (torch.tensor(rng.normal(size=(1 + k, k))) for _ in range(2))
    score = torch.tensor(rng.normal(size=(k, k)))
    ref = ref.log_softmax(1)
    cases = list(itertools.product(range(k), repeat=2))
    a, b = (torch.tensor(side) for side in zip(*cases, strict=True))

    def tokens(logits):  # (cases, 2) log-probs of both tokens
        logps = logits.log_softmax(1)
        return torch.stack([logps[0, a], logps[1 + a, b]], 1)

    reference = torch.stack([ref[0, a], ref[1 + a, b]], 1)

    def wanted(logits):
        logps = tokens(logits)
        return (logps.sum(1).exp() * (score[a, b] - beta * (logps - reference).sum(1))).sum()

    logits = start.clone().requires_grad_()
    (exact,) = torch.autograd.grad(wanted(logits), logits)
    for place in itertools.product(range(1 + k), range(k)):
        step = torch.zeros_like(start)
        step[place] = 1e-6
        slope = (wanted(start + step) - wanted(start - step)) / 2e-6
        assert float(slope) == pytest.approx(float(exact[place]), abs=1e-8)

    lengths = torch.full((len(cases),), 2)
    old = tokens(start)
    rewards = token_rewards(score[a, b], (old - reference).flatten(), lengths, beta)

    def surrogate(values, lam):
        adv, _ = generalised_advantages(rewards, values, lengths, lam=lam)
        logits = start.clone().requires_grad_()
        losses = clipped_policy_loss(tokens(logits).flatten(), old.flatten(), adv).reshape(-1, 2).sum(1)
        return logits, losses

    first, second = rng.normal(), rng.normal(size=k)  # any baseline of the state will do, at lam 1
    values = torch.stack([torch.full((len(cases),), first), torch.tensor(second)[a]], 1).flatten()
    logits, losses = surrogate(values, lam=1.0)
    (mine,) = torch.autograd.grad((old.sum(1).exp() * losses).sum(), logits)
    torch.testing.assert_close(-mine, exact, rtol=0, atol=1e-12)

    logits, losses = surrogate(values, lam=1.0)
    each = torch.stack([torch.autograd.grad(loss, logits, retain_graph=True)[0].flatten() for loss in losses])
    drawn = each[
        torch.multinomial(old.sum(1).exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    ]
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((-drawn.mean(0) - exact.flatten()).abs() < 3 * error + 1e-12).all()


def test_the_controller():
    start = KlController(0.15, target=6.0, horizon=10_000)
    assert start.after(12.0, 512).coefficient == pytest.approx(0.15 * (1 + 0.2 * 512 / 10_000))
    assert start.after(0.0, 512).coefficient == pytest.approx(0.15 * (1 - 0.2 * 512 / 10_000))
    assert start.after(6.6, 100).coefficient == pytest.approx(0.15 * (1 + 0.1 * 100 / 10_000))
    assert start.after(6.0, 512).coefficient == 0.15
    assert KlController(0.05).after(100.0, 512).coefficient == 0.05


def test_explained_variance():
    returns = wide([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.zeros(3).double(), returns) == 0
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(3).double()) == 0
