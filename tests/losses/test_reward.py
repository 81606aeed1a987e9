"""Bradley-Terry where the truth is known: logistic regression, the Bayes rate, the cross-entropy floor, calibration."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from palate.evaluation.calibration import accuracy_by, calibration, calibration_error, calibration_slope
from palate.losses import PairRewards, bradley_terry


def sigma(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def draw_pairs(truth, count, seed):
    """(better, worse) items, labelled by Bradley-Terry from their true rewards."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, len(truth), count)
    second = (first + rng.integers(1, len(truth), count)) % len(truth)
    wins = rng.random(count) < sigma(truth[first] - truth[second])
    return np.where(wins, first, second), np.where(wins, second, first)


def fit(better, worse, items):
    """Rewards of items by Newton's method on our loss, the last one held at 0."""
    rewards = torch.zeros(items - 1, dtype=torch.float64)

    def loss(free):
        whole = torch.cat([free, torch.zeros(1, dtype=torch.float64)])
        return bradley_terry(PairRewards(whole[better], whole[worse])).mean()

    for _ in range(20):
        free = rewards.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(free), free)
        rewards = rewards - torch.linalg.solve(torch.autograd.functional.hessian(loss, rewards), slope)
    return np.append(rewards.numpy(), 0.0)


TRUTH = np.array([-1.5, -0.6, 0.0, 0.2, 0.9, 2.0])


def test_on_one_hot_features_it_is_logistic_regression():
    better, worse = draw_pairs(TRUTH, 400, seed=0)
    features = np.eye(len(TRUTH))[better] - np.eye(len(TRUTH))[worse]
    found = minimize(
        lambda w: np.logaddexp(0, -features @ np.append(w, 0.0)).mean(),
        np.zeros(len(TRUTH) - 1),
        method="BFGS",
        tol=1e-10,
    )
    np.testing.assert_allclose(fit(better, worse, len(TRUTH)), np.append(found.x, 0.0), atol=1e-5)


def test_it_finds_the_truth_but_for_its_level_and_stands_at_the_bayes_rate_and_the_floor():
    learnt = fit(*draw_pairs(TRUTH, 40_000, seed=1), len(TRUTH))
    np.testing.assert_allclose(learnt - learnt.mean(), TRUTH - TRUTH.mean(), atol=0.08)
    cases = list(itertools.permutations(range(len(TRUTH)), 2))
    p = np.array([sigma(TRUTH[a] - TRUTH[b]) for a, b in cases])
    guess = np.array([learnt[a] - learnt[b] for a, b in cases])
    bayes, accuracy = np.maximum(p, 1 - p).mean(), np.where(guess > 0, p, 1 - p).mean()
    floor = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
    loss = (p * np.logaddexp(0, -guess) + (1 - p) * np.logaddexp(0, guess)).mean()
    assert accuracy <= bayes and bayes - accuracy < 0.01
    assert 0 <= loss - floor < 1e-3


def test_a_true_reward_is_calibrated():
    better, worse = draw_pairs(TRUTH, 40_000, seed=2)
    margins = TRUTH[better] - TRUTH[worse]
    curve = calibration(margins)
    assert sum(part["count"] for part in curve) == 40_000
    for part in curve:
        slack = 4 * (part["predicted"] * (1 - part["predicted"]) / part["count"]) ** 0.5
        assert abs(part["accuracy"] - part["predicted"]) < slack
    assert calibration_error(curve) < 0.01
    assert calibration_slope(margins) == pytest.approx(1, abs=0.05)
    assert calibration_slope(margins * 3) == pytest.approx(calibration_slope(margins) / 3)
    assert calibration_slope(-margins) == pytest.approx(-calibration_slope(margins))


def test_the_curve_by_hand():
    curve = calibration([1.0, -1.0, 1.0, 1.0, 0.0, -3.0], bins=3)
    assert [part["count"] for part in curve] == [5, 1]  # the four of margin 1 stay together
    assert [part["accuracy"] for part in curve] == [3.5 / 5, 0]
    assert curve[1]["predicted"] == pytest.approx(sigma(3))
    assert curve[0]["predicted"] == pytest.approx((4 * sigma(1) + 0.5) / 5)
    error = (5 * abs(curve[0]["predicted"] - 0.7) + sigma(3)) / 6
    assert calibration_error(curve) == pytest.approx(error)
    assert calibration([]) == [] and np.isnan(calibration_error([]))
    assert calibration_slope([1.0, 2.0]) is None and calibration_slope([]) is None and calibration_slope([0.0]) is None
    by = accuracy_by([1.0, -1.0, 2.0, 0.0], [5.0, 1.0, 4.0, 2.0], bins=2)
    assert [(part["count"], part["said"], part["accuracy"]) for part in by] == [(2, 1.5, 0.25), (2, 4.5, 1.0)]
    assert by[1]["low"] == pytest.approx(2 / (2 + 1.959964**2)) and by[1]["high"] == 1  # Wilson's, of two of two


def test_margin_and_centring_by_hand():
    rewards = PairRewards(*(torch.tensor(x, dtype=torch.float64) for x in ([2.0], [0.5], [1.0])))
    assert bradley_terry(rewards).item() == pytest.approx(np.log1p(np.exp(-1.5)))
    assert bradley_terry(rewards, margin=1.0).item() == pytest.approx(np.log1p(np.exp(-0.5)))
    assert bradley_terry(rewards, centring=0.1).item() == pytest.approx(np.log1p(np.exp(-1.5)) + 0.625)
    with pytest.raises(ValueError, match="needs margin"):
        bradley_terry(PairRewards(rewards.chosen, rewards.rejected), margin=1.0)
