"""Reward against KL: hulls against mixtures of policies, the best of n against all choices, intervals by hand."""

import itertools
import math

import numpy as np
import pytest

from palate.evaluation.frontier import check_below, expected_best, mean_reward, numbers, reward_at, upper_hull
from palate.worlds import enumerable
from palate.worlds.enumerable import World


def test_a_hull_by_hand():
    points = [(0, 0), (1, 2), (2, 2.5), (2, 1), (1.5, 1), (3, 4), (4, 3.9), (5, 4.2), (-0.01, -1)]
    assert upper_hull(points) == [(0, 0), (1, 2), (3, 4), (5, 4.2)]
    assert [reward_at(upper_hull(points), kl) for kl in (0, 0.5, 2, 4, 9)] == [0, 1, 3, 4.1, 4.2]
    assert mean_reward(upper_hull(points), 2) == pytest.approx((1 + 2.5) / 2)
    assert mean_reward(upper_hull(points), 7) == pytest.approx((1 + 6 + 8.2 + 8.4) / 7)
    assert upper_hull([(1, 1)]) == [(1, 1)] and math.isnan(reward_at([(1, 1)], 0.5))
    assert upper_hull([]) == [] and math.isnan(reward_at([], 1)) and math.isnan(mean_reward([], 1))
    assert upper_hull([(0, 1), (1, 0)]) == [(0, 1)]  # a method that only loses is left where it began


@pytest.mark.parametrize("seed", range(5))
def test_no_point_lies_above_the_hull_and_each_corner_is_a_point(seed):
    points = [(float(k), float(r)) for k, r in np.random.default_rng(seed).random((40, 2))]
    hull = upper_hull(points)
    assert set(hull) <= set(points)
    assert all(reward <= reward_at(hull, kl) + 1e-12 for kl, reward in points)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    assert all(slope > 0 for slope in slopes) and slopes == sorted(slopes, reverse=True)
    grid = np.linspace(hull[0][0], 1, 20_001)
    values = np.array([reward_at(hull, kl) for kl in grid])
    area = ((values[1:] + values[:-1]) / 2).mean()
    assert mean_reward(hull, 1.0) == pytest.approx(area, abs=1e-6)


def test_a_coin_between_two_policies_lies_on_the_hull_or_above():
    world = World(3, 3, 2)
    ref, reward = world.language(0), world.reward(0)
    ends = [enumerable.optimum(ref, reward, beta) for beta in (2.0, 0.3)]

    def point(table):
        return enumerable.sequence_kl(table, ref).mean(), enumerable.expected_reward(table, reward).mean()

    hull = upper_hull([point(table) for table in ends])
    for share in (0.2, 0.5, 0.9):
        kl, value = point(np.logaddexp(ends[0] + math.log(1 - share), ends[1] + math.log(share)))
        assert value >= reward_at(hull, kl) - 1e-12


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_the_best_of_n_is_the_mean_over_all_choices(n):
    judged = np.array([[0.0, 3, 1, 2, 4], [1.0, 2, 2, 0, 2]])  # with ties
    values = np.random.default_rng(0).normal(size=(2, 5))
    for said, true, found in zip(judged, values, expected_best(judged, values, n), strict=True):
        each = []
        for chosen in itertools.combinations(range(5), n):
            best = [k for k in chosen if said[k] == max(said[list(chosen)])]
            each.append(np.mean(true[best]))
        assert found == pytest.approx(np.mean(each), abs=1e-12)


def test_the_best_of_n_out_of_samples_is_that_of_the_law():
    """METHODS 8.16: its mean over draws is the reward under P = F_i**n - F_(i-1)**n."""
    world, draw = World(5, 1, 1), np.random.default_rng(0)
    ref, judge, reward = world.language(0), world.reward(1), world.reward(2)
    columns = draw.choice(5, size=(20_000, 6), p=np.exp(ref[0]) / np.exp(ref[0]).sum())
    for n in (2, 4, 6):
        found = expected_best(judge[0][columns], reward[0][columns], n)
        exact = enumerable.expected_reward(enumerable.best_of(ref, judge, n), reward)[0]
        assert found.mean() == pytest.approx(exact, abs=4 * found.std() / math.sqrt(20_000))
    with pytest.raises(ValueError, match="there are 6"):
        expected_best(judge[0][columns], reward[0][columns], 7)


def test_numbers_of_samples():
    found = numbers([1.0, 3.0], [0.0, 0.5], [1, 0], [4, 6])
    assert found["eval/reward"] == 2 and found["eval/reward_se"] == pytest.approx(1.0)
    assert (found["eval/reward_low"], found["eval/reward_high"]) == pytest.approx((0.04, 3.96))
    assert found["eval/kl"] == 0.25 and found["eval/kl_high"] == pytest.approx(0.25 + 1.96 * 0.25)
    assert (found["eval/ended"], found["eval/length"], found["eval/count"]) == (0.5, 5.0, 2)
    assert numbers([1.0], [0.0], [1], [4])["eval/reward_se"] == math.inf


def test_points_above_the_exact_frontier_are_named():
    points = [{"reward": r, "exact_reward": e} for r, e in [(1, 1.0), (1 + 1e-5, 1.0), (9, None), (0.5, 1.0)]]
    assert check_below(points) == [points[1]]
