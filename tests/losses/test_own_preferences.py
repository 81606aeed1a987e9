"""Preferences that a model makes for itself: what rounds of them go to, by exact minimisation of our own losses.

Oracles 17, 18, 23, 24 and 31 of METHODS; those of 31 that need no training stand with the judge and the world.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from bandits import minimise

from palate.evaluation.winrate import match
from palate.losses import LOSSES, PairLogps, dpo
from palate.sampling.judge import Completion, open_judge
from palate.sampling.pairing import Candidate, best_and_worst
from palate.worlds import enumerable
from palate.worlds.enumerable import World

BANDIT = World(5, 1, 1)


def law(seed: int, world: World = BANDIT, spread: float = 0.7) -> np.ndarray:
    """A table without any structure."""
    scores = np.random.default_rng(seed).normal(size=(world.prompts, world.size)) * spread
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


def all_pairs(policy: torch.Tensor, start: np.ndarray) -> PairLogps:
    """Every ordered two completions of the first prompt, under a policy (K,) and the start, which is the reference."""
    first, second = torch.cartesian_prod(*[torch.arange(len(policy))] * 2).T
    reference = torch.as_tensor(start[0])
    return PairLogps(policy[first], policy[second], reference[first], reference[second])


def best_response(data: np.ndarray, start: np.ndarray, lam: float) -> np.ndarray:
    """One round of SPIN, solved exactly: chosen from the data, rejected from the start, which is the reference."""
    weight = torch.tensor(np.exp(data[0])[:, None] * np.exp(start[0])).flatten()

    def objective(logps):
        return (weight * dpo(all_pairs(logps, start), beta=lam)).sum()

    found, _ = minimise(objective, torch.tensor(start[0]))
    return found.numpy()[None]


def preferred_by(reward: np.ndarray, start: np.ndarray, beta: float) -> np.ndarray:
    """One round of DPO, solved exactly: both sides drawn from the start, labelled after Bradley and Terry."""
    weight = torch.tensor(np.exp(start[0])[:, None] * np.exp(start[0])).flatten()
    gap = torch.tensor(reward[0][:, None] - reward[0]).flatten()

    def objective(logps):
        return (weight * 2 * torch.sigmoid(gap) * dpo(all_pairs(logps, start), beta=beta)).sum()

    found, _ = minimise(objective, torch.tensor(start[0]))
    return found.numpy()[None]


def centred(table: np.ndarray, data: np.ndarray) -> np.ndarray:
    ratio = table - data
    return ratio - ratio.mean()


# oracle 17: SPIN


@pytest.mark.parametrize("lam", [0.4, 0.5, 1.0, 2.0, 5.0])
def test_a_round_of_spin_goes_to_the_start_tilted_to_the_data(lam):
    """p (p_data / p)^(1 / lambda): the tilted optimum for the reward log p_data - log p at beta = lambda."""
    data, start = law(0), law(1)
    found = best_response(data, start, lam)
    assert np.abs(np.exp(found) - np.exp(enumerable.optimum(start, data - start, lam))).max() < 1e-7
    assert centred(found, data) == pytest.approx((1 - 1 / lam) * centred(start, data), abs=1e-6)


@pytest.mark.parametrize("lam, factor", [(1.0, 0.0), (2.0, 0.5), (5.0, 0.8)])
def test_rounds_of_spin_come_nearer_to_the_data(lam, factor):
    data, table = law(0), law(1)
    for _ in range(3):
        table, before = best_response(data, table, lam), table
        assert centred(table, data) == pytest.approx(factor * centred(before, data), abs=1e-6)
    assert enumerable.sequence_kl(table, data) < enumerable.sequence_kl(law(1), data)


def test_at_one_half_rounds_of_spin_swing():
    data, start = law(0), law(1)
    once = best_response(data, start, 0.5)
    assert centred(once, data) == pytest.approx(-centred(start, data), abs=1e-6)
    assert best_response(data, once, 0.5) == pytest.approx(start, abs=1e-5)


def test_below_one_half_rounds_of_spin_go_away_from_the_data():
    data, table = law(0), law(1)
    for _ in range(3):
        table, before = best_response(data, table, 0.4), table
        assert np.abs(centred(table, data)).max() > 1.49 * np.abs(centred(before, data)).max()


@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
def test_the_data_is_a_fixed_point_of_spin(lam):
    """There the loss is log 2 and its expected gradient zero, for every lambda; elsewhere it is not."""
    data = law(0)
    weight = torch.tensor(np.exp(data[0])[:, None] * np.exp(data[0])).flatten()
    logits = torch.tensor(data[0], requires_grad=True)
    loss = (weight * dpo(all_pairs(logits.log_softmax(0), data), beta=lam)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert logits.grad is not None and logits.grad.abs().max() < 1e-15
    assert best_response(data, data, lam) == pytest.approx(data, abs=1e-7)

    start = law(1)
    weight = torch.tensor(np.exp(data[0])[:, None] * np.exp(start[0])).flatten()
    logits = torch.tensor(start[0], requires_grad=True)
    (weight * dpo(all_pairs(logits.log_softmax(0), start), beta=lam)).sum().backward()
    # half of lambda (p_start - p_data): the policy gradient of likelihood on the data against its own samples
    assert logits.grad is not None
    assert logits.grad.numpy() == pytest.approx(lam / 2 * (np.exp(start[0]) - np.exp(data[0])), abs=1e-12)


@pytest.mark.parametrize("lam", [0.125, 0.5, 1.0, 4.0])
def test_spins_loss_is_that_of_dpo_to_the_bit(lam):
    """The main player's loss as the paper writes it, f = lambda log(p / p_t) of each side; at powers of two the
    factor rounds nothing. Chen et al. 2024, arXiv:2401.01335, section 4.1."""
    draw = torch.Generator().manual_seed(0)
    pair = PairLogps(*(torch.randn(500, generator=draw) * 30 - 60 for _ in range(4)))
    pair = replace(pair, chosen=pair.chosen.clone().requires_grad_(), rejected=pair.rejected.clone().requires_grad_())
    gains = [
        lam * (policy - start)
        for policy, start in ((pair.chosen, pair.reference_chosen), (pair.rejected, pair.reference_rejected))
    ]
    spin = -torch.nn.functional.logsigmoid(gains[0] - gains[1])
    ours = LOSSES["dpo"](pair, beta=lam)
    assert torch.equal(spin, ours)
    sides = (pair.chosen, pair.rejected)
    for one, two in zip(torch.autograd.grad(spin.sum(), sides), torch.autograd.grad(ours.sum(), sides), strict=True):
        assert torch.equal(one, two)


# oracle 18: a reference that is set anew each round


@pytest.mark.parametrize("rounds, beta", [(2, 1.0), (4, 2.0)])
def test_rounds_of_dpo_with_new_references_are_one_with_a_smaller_beta(rounds, beta):
    start, reward = law(2), BANDIT.reward(0)
    table = start
    for _ in range(rounds):
        table = preferred_by(reward, table, beta)
    assert np.abs(np.exp(table) - np.exp(enumerable.optimum(start, reward, beta / rounds))).max() < 1e-6
    assert np.abs(np.exp(preferred_by(reward, start, beta / rounds)) - np.exp(table)).max() < 1e-6


# oracle 23: the best against the worst of several samples


@pytest.mark.parametrize("count, gap, inflated", [(2, 0.2, 0.2), (4, 0.2, 0.367), (4, 1.0, 1.84)])
def test_the_best_against_the_worst_inflates_gaps(count, gap, inflated):
    """Scores r + Gumbel: log-odds of (a best, b worst) against (b best, a worst), by our own pairing.

    Of two samples that is Bradley and Terry's, of N for small gaps H_(N-1) times it; the others lie midway.
    """
    draws = 30_000 if count == 4 else 10_000
    rewards = np.array([gap, 0.0, *[gap / 2] * (count - 2)])
    scores = rewards + np.random.default_rng(0).gumbel(size=(draws, count))
    won = {("a", "b"): 0, ("b", "a"): 0}
    for row in scores.tolist():
        pair = best_and_worst("p", [Candidate(text, True, 1, score) for text, score in zip("abcd", row, strict=False)])
        assert not isinstance(pair, str)
        if (pair.chosen, pair.rejected) in won:
            won[pair.chosen, pair.rejected] += 1
    wins, losses = won.values()
    assert math.log(wins / losses) == pytest.approx(inflated, abs=4 * math.sqrt(1 / wins + 1 / losses))
    assert abs(math.log(wins / losses) - gap) < 0.1 or count == 4


# oracle 24: judges without sharpness


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_a_judges_sharpness_is_a_smaller_beta(sharpness):
    start, reward, beta = law(3), BANDIT.reward(1), 0.8
    found = preferred_by(sharpness * reward, start, beta)
    assert np.abs(np.exp(found) - np.exp(enumerable.optimum(start, reward, beta / sharpness))).max() < 1e-6


def test_four_scores_from_0_to_5_are_all_equal_once_in_216():
    made = [
        best_and_worst("p", [Candidate(text, True, 1, float(score)) for text, score in zip("abcd", row, strict=True)])
        for row in itertools.product(range(6), repeat=4)
    ]
    assert made.count("ties") / len(made) == 6**-3
    assert sum(isinstance(pair, str) for pair in made) == 6


# oracle 31: win rates


def test_a_sampled_win_rate_is_the_exact_one_and_turns_over_with_its_sides():
    world, seed = World(), 1
    first, second = world.language(4), world.language(5)
    exact = enumerable.win_rate(first, second, world.reward(seed)).mean()
    judge, count = open_judge(f"enumerable:{seed}"), 2000
    drawn = [world.demonstrations(table, count, seed=n) for n, table in enumerate((first, second))]
    prompts = [row.prompt for row in drawn[0]]
    ours, theirs = ([Completion(str(row.completion)) for row in rows] for rows in drawn)
    there = match("a", "b", judge.name, judge.prefer(prompts, ours, theirs))
    back = match("b", "a", judge.name, judge.prefer(prompts, theirs, ours))
    assert there.win_rate == pytest.approx(exact, abs=4 * math.sqrt(0.25 / count)) and abs(exact - 0.5) > 0.05
    assert (back.wins, back.losses, back.ties) == (there.losses, there.wins, there.ties)
    assert back.win_rate == pytest.approx(1 - there.win_rate, abs=1e-15)
    assert match("a", "a", judge.name, judge.prefer(prompts, ours, ours)).win_rate == 0.5
