"""The analytical oracles: optima, identities and invariances that are known on paper."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from bandits import K, minimise, pair_objective, world

from loss_cases import PAIRWISE, draw
from oracles import dpo as oracle_dpo
from oracles.numbers import Pair
from palate.losses import LOSSES, FeedbackLogps, PairLogps, RankedLogps, dpo, info, ipo, kto, plackett_luce, r_dpo


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_dpo_optimum_is_the_tilted_reference(beta):
    """The argmin is ref exp(r / beta) / Z, the least loss the labels' entropy, whatever the pairs' weights."""
    reference, reward, length, pairs, weight = world(0)
    win = torch.sigmoid(reward[pairs[:, 0]] - reward[pairs[:, 1]])
    objective = pair_objective(lambda logps: dpo(logps, beta=beta), reference, length, pairs, weight, win)
    policy, least = minimise(objective, reference)
    tilted = (reference + reward / beta).log_softmax(0)
    assert (policy.exp() - tilted.exp()).abs().max() < 2e-7
    entropy = -(win * win.log() + (1 - win) * (1 - win).log())
    assert least == pytest.approx((weight * entropy).sum().item(), rel=1e-12)


def test_cdpo_optimum_in_the_same_world_is_that_of_smoothed_labels():
    reference, reward, length, pairs, weight = world(1)
    win = torch.sigmoid(reward[pairs[:, 0]] - reward[pairs[:, 1]])
    flip = 0.2
    noisy = win * (1 - flip) + (1 - win) * flip
    plain, _ = minimise(pair_objective(lambda p: dpo(p, beta=1), reference, length, pairs, weight, noisy), reference)
    smooth = pair_objective(lambda p: dpo(p, beta=1, label_smoothing=flip), reference, length, pairs, weight, win)
    assert (minimise(smooth, reference)[0].exp() - plain.exp()).abs().max() < 2e-7


def test_robust_dpo_recovers_the_clean_optimum_from_flipped_labels():
    reference, reward, length, pairs, weight = world(2)
    win = torch.sigmoid(reward[pairs[:, 0]] - reward[pairs[:, 1]])
    flip = 0.15
    noisy = win * (1 - flip) + (1 - win) * flip
    robust = pair_objective(
        lambda p: LOSSES["robust_dpo"](p, beta=0.7, label_smoothing=flip), reference, length, pairs, weight, noisy
    )
    tilted = (reference + reward / 0.7).log_softmax(0)
    assert (minimise(robust, reference)[0].exp() - tilted.exp()).abs().max() < 2e-7


def test_r_dpo_optimum_takes_length_off_the_reward():
    """ref exp((r - alpha |y|) / beta); with the wrong sign the expected length would rise."""
    reference, reward, length, pairs, weight = world(3)
    win = torch.sigmoid(reward[pairs[:, 0]] - reward[pairs[:, 1]])
    beta, alpha = 0.8, 0.3
    loss = pair_objective(lambda p: r_dpo(p, beta=beta, alpha=alpha), reference, length, pairs, weight, win)
    policy, _ = minimise(loss, reference)
    expected = (reference + (reward - alpha * length) / beta).log_softmax(0)
    assert (policy.exp() - expected.exp()).abs().max() < 2e-7
    plain = (reference + reward / beta).log_softmax(0)
    assert (policy.exp() * length).sum() < (plain.exp() * length).sum()


def test_ipo_optimum():
    """Opponents from mu: policy prop. to ref exp(P(a beats mu) / tau)."""
    reference, reward, length, pairs, _ = world(4)
    mu = torch.rand(K, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).softmax(0)
    prefers = torch.sigmoid(3 * (reward[:, None] - reward[None, :]))  # any preference matrix will do
    a, b = pairs.T
    tau = 0.5
    loss = pair_objective(
        lambda p: ipo(p, tau=tau, average=False), reference, length, pairs, mu[a] * mu[b], prefers[a, b]
    )
    policy, _ = minimise(loss, reference)
    expected = (reference + prefers @ mu / tau).log_softmax(0)
    assert (policy.exp() - expected.exp()).abs().max() < 2e-7


def test_plackett_luce_optimum_is_that_of_pairs():
    """Rankings drawn by the model of r lead to the same tilted reference."""
    reference, reward, *_ = world(6)
    reference, reward, beta = reference[:4].log_softmax(0), reward[:4], 0.6
    orders = torch.tensor(list(itertools.permutations(range(4))))
    chance = torch.exp(-plackett_luce(RankedLogps(reward[orders], torch.zeros(24, 4)), beta=1))

    def objective(logps):
        return (chance * plackett_luce(RankedLogps(logps[orders], reference[orders]), beta=beta)).sum()

    policy, least = minimise(objective, reference)
    assert (policy.exp() - (reference + reward / beta).softmax(0)).abs().max() < 2e-7
    assert least == pytest.approx(-(chance * chance.log()).sum().item(), rel=1e-12)


def test_plackett_luce_is_a_distribution_over_orders():
    """Sums to 1 over K! orders; the top place is softmax(reward); K = 2 is DPO."""
    generator = torch.Generator().manual_seed(7)
    for places in (2, 3, 4, 5):
        total = torch.randn(places, generator=generator, dtype=torch.float64) * 3
        reference = torch.randn(places, generator=generator, dtype=torch.float64)
        orders = torch.tensor(list(itertools.permutations(range(places))))
        chance = torch.exp(-plackett_luce(RankedLogps(total[orders], reference[orders]), beta=0.7))
        assert chance.sum().item() == pytest.approx(1, rel=1e-12)
        top = torch.stack([chance[orders[:, 0] == i].sum() for i in range(places)])
        torch.testing.assert_close(top, (0.7 * (total - reference)).softmax(0))
    total, reference = torch.randn(2, 9, 2, generator=generator, dtype=torch.float64)
    pairs = PairLogps(total[:, 0], total[:, 1], reference[:, 0], reference[:, 1])
    torch.testing.assert_close(plackett_luce(RankedLogps(total, reference)), dpo(pairs), rtol=1e-12, atol=0)


@pytest.mark.parametrize("share", [0.6, 0.9, 0.99])
def test_two_armed_bandit(share):
    """Wins with share p: beta h* = logit(p), curvature beta^2 p (1 - p) there; IPO gives (p - 1/2) / tau."""
    beta, tau = 0.3, 0.4
    h = torch.tensor([math.log(share / (1 - share)) / beta], dtype=torch.float64, requires_grad=True)
    slope, curve = _calculus(lambda x: share * dpo(_at(x), beta=beta) + (1 - share) * dpo(_at(-x), beta=beta), h)
    assert abs(slope) < 1e-12 and curve == pytest.approx(beta**2 * share * (1 - share), rel=1e-9)
    h = torch.tensor([(share - 0.5) / tau], dtype=torch.float64, requires_grad=True)

    def averaged(x):
        return share * ipo(_at(x), tau=tau, average=False) + (1 - share) * ipo(_at(-x), tau=tau, average=False)

    assert abs(_calculus(averaged, h)[0]) < 1e-12


def test_deterministic_labels_have_no_finite_minimiser_under_dpo():
    for h in (0.0, 10.0, 1e3, 7e3):
        x = torch.tensor([h], dtype=torch.float64, requires_grad=True)
        slope, _ = _calculus(lambda x: dpo(_at(x)), x)
        assert slope < 0
    x = torch.tensor([1 / (2 * 0.1)], dtype=torch.float64, requires_grad=True)
    assert _calculus(lambda x: ipo(_at(x), tau=0.1, average=False), x)[0] == 0


def test_cdpo_stops_where_it_should():
    """Zero gradient exactly at beta h = log((1 - e) / e); with win share p the target is p (1 - e) + (1 - p) e."""
    for e, p, beta in [(0.1, 1.0, 0.1), (0.3, 1.0, 2.0), (0.2, 0.7, 0.5)]:
        target = p * (1 - e) + (1 - p) * e
        h = torch.tensor([math.log(target / (1 - target)) / beta], dtype=torch.float64, requires_grad=True)

        def averaged(x, e=e, p=p, beta=beta):
            return p * dpo(_at(x), beta=beta, label_smoothing=e) + (1 - p) * dpo(_at(-x), beta=beta, label_smoothing=e)

        slope, curve = _calculus(averaged, h)
        assert abs(slope) < 1e-12 < curve


def test_robust_dpo_is_unbiased_and_unbounded():
    """(1 - e) L(w, l) + e L(l, w) = L_DPO for every h; its slope tends to -beta e / (1 - 2e)."""
    h = torch.cat([torch.linspace(-50, 50, 101), torch.tensor([-1e4, 1e4])]).double()
    for e in (0.0, 0.1, 0.4):
        given, flipped = (LOSSES["robust_dpo"](_at(x), label_smoothing=e) for x in (h, -h))
        torch.testing.assert_close((1 - e) * given + e * flipped, dpo(_at(h)), rtol=1e-10, atol=1e-10)
        x = torch.tensor([1e4], dtype=torch.float64, requires_grad=True)
        slope, _ = _calculus(lambda x, e=e: LOSSES["robust_dpo"](_at(x), label_smoothing=e), x)
        assert slope == pytest.approx(-0.1 * e / (1 - 2 * e), rel=1e-12)


def test_scalar_calculus_of_dpo():
    """Slope -beta sigma(-beta h); at +-1e4 the loss is -beta h or 0; tails keep their relative accuracy."""
    for beta in (0.1, 1.0):
        h = torch.cat([torch.linspace(-80, 80, 161), torch.tensor([-1e4, 1e4, 600.0])]).double().requires_grad_()
        loss = dpo(_at(h), beta=beta)
        loss.sum().backward()
        torch.testing.assert_close(h.grad, -beta * torch.sigmoid(-beta * h.detach()), rtol=1e-12, atol=0)
    assert dpo(_at(torch.tensor([-1e4, 1e4]).double()), beta=1.0).tolist() == [1e4, 0]
    assert dpo(_at(torch.tensor([600.0]).double()), beta=1.0).item() == pytest.approx(math.exp(-600), rel=1e-12)
    pair = Pair.of(-3.5, -2.0, -4.0, -1.0, 3, 4)
    logps = PairLogps(*(torch.tensor([float(x)], dtype=torch.float64, requires_grad=True) for x in (-3.5, -2, -4, -1)))
    dpo(logps, beta=0.5).backward()
    by_hand = oracle_dpo.gradient(pair, type(pair.chosen)("0.5"))  # the paper's own gradient, section 4
    assert [logps.chosen.grad.item(), logps.rejected.grad.item()] == pytest.approx(
        [float(x) for x in by_hand], rel=1e-12
    )


def test_invariances():
    """Shifts that a loss must not feel, and (beta, r) -> (c beta, c r)."""
    rng = random.Random(1)
    logps = draw("dpo", rng, rows=8).logps
    with torch.no_grad():
        for name in ("dpo", "robust_dpo", "hinge", "r_dpo"):
            loss, shift = LOSSES[name], torch.linspace(-30, 30, 8).double()
            moved = replace(logps, chosen=logps.chosen + shift, rejected=logps.rejected + shift)
            torch.testing.assert_close(loss(moved), loss(logps))
            moved = replace(
                logps,
                reference_chosen=logps.reference_chosen + shift,
                reference_rejected=logps.reference_rejected + shift,
            )
            torch.testing.assert_close(loss(moved), loss(logps))
        halved = replace(logps, reference_chosen=logps.chosen, reference_rejected=logps.rejected)
        halved = replace(halved, chosen=logps.chosen + logps.chosen_log_ratio / 2)
        halved = replace(halved, rejected=logps.rejected + logps.rejected_log_ratio / 2)
        torch.testing.assert_close(dpo(halved, beta=0.6), dpo(logps, beta=0.3))  # (beta, r) -> (c beta, c r)


@pytest.mark.parametrize("name", sorted(PAIRWISE))
def test_a_common_prefix_moved_into_the_prompt(name):
    """Sums compared with a reference do not feel it, means do; nor do gradients."""
    logps = draw("dpo", random.Random(name), rows=8).logps
    options = {"average": False} if name == "ipo" else {}
    prefix = torch.linspace(1, 4, 8).double()
    shorter = PairLogps(
        (logps.chosen + prefix).detach().requires_grad_(),
        (logps.rejected + prefix).detach().requires_grad_(),
        logps.reference_chosen + 2 * prefix,
        logps.reference_rejected + 2 * prefix,
        logps.chosen_length + 1,
        logps.rejected_length + 1,
    )
    before, after = LOSSES[name](logps, **options), LOSSES[name](shorter, **options)
    before.sum().backward()
    after.sum().backward()
    if name in {"dpo", "robust_dpo", "ipo", "hinge", "r_dpo"}:
        torch.testing.assert_close(after, before)
        torch.testing.assert_close(shorter.chosen.grad, logps.chosen.grad)
        torch.testing.assert_close(shorter.rejected.grad, logps.rejected.grad)
    else:
        assert not torch.allclose(after, before)


def test_kto_at_the_start_and_its_reference_point():
    """At the start z0 = 0, loss 1/2, slope -+ beta / 4; z0 carries no gradient; matched pairs give another number."""
    completion = torch.tensor([-3.0, -4.0, -5.0, -2.0], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([True, False, True, False])
    apart = torch.tensor([-9.0, -8.0], dtype=torch.float64, requires_grad=True)
    start = FeedbackLogps(completion, completion.detach(), label, None, apart, apart.detach())
    assert start.baseline == 0
    loss = kto(start, beta=0.2)
    assert loss.tolist() == [0.5] * 4
    loss.sum().backward()
    assert completion.grad.tolist() == pytest.approx([-0.05, 0.05, -0.05, 0.05], rel=1e-12)
    assert apart.grad is None

    moved = replace(start, reference_mismatched=apart.detach() - torch.tensor([1.0, 3.0]))
    assert moved.baseline.item() == 2 and not moved.baseline.requires_grad
    below = replace(start, reference_mismatched=apart.detach() + 1)
    assert below.baseline.item() == 0  # never negative
    mixed = replace(start, reference_mismatched=apart.detach() + torch.tensor([1.0, -5.0]))
    assert mixed.baseline.item() == 2  # the mean is taken before the cut at 0, not after
    reference = completion.detach() - torch.tensor([1.0, -1.0, 2.0, 0.5])
    matched = replace(moved, reference=reference, mismatched=completion, reference_mismatched=reference)
    assert not torch.allclose(kto(matched), kto(replace(moved, reference=reference)))


@pytest.mark.parametrize("one_class", [True, False])
def test_kto_with_one_class_alone_and_with_batches_cut_in_two(one_class):
    completion, reference = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    label = torch.full((6,), one_class)
    whole = FeedbackLogps(completion, reference, label, None, completion.roll(1), reference.roll(1) - 1)
    assert kto(whole).isfinite().all()
    halves = [
        replace(whole, completion=completion[part], reference=reference[part], label=label[part])
        for part in (slice(0, 1), slice(1, 6))
    ]
    assert torch.equal(
        torch.cat([kto(half) for half in halves]), kto(whole)
    )  # z0 is the batch's, not the micro-batch's


def test_uniform_model():
    """On a uniform model a mean log-prob is -log V at any length."""
    vocabulary = 37
    long, short = torch.tensor([1, 5, 9, 2]), torch.tensor([4, 5, 1, 30])
    chosen, rejected = (-math.log(vocabulary) * n.double() for n in (long, short))
    logps = PairLogps(chosen, rejected, chosen.clone(), rejected.clone(), long, short)
    expected = {
        ("simpo", "gamma", 1.5): math.log(1 + math.exp(1.5)),
        ("ln_dpo", "beta", 5.0): math.log(2),
        ("dpo", "beta", 0.1): math.log(2),
        ("orpo", "lam", 0.25): math.log(vocabulary) + 0.25 * math.log(2),
    }
    for (name, option, value), wanted in expected.items():
        assert LOSSES[name](logps, **{option: value}).tolist() == pytest.approx([wanted] * 4, rel=1e-12)


def test_reference_columns_may_come_from_anywhere():
    """A stored column, in whatever float dtype and with or without a graph, acts as the online one."""
    rng = random.Random(2)
    for name in sorted(PAIRWISE):
        if not info(name).reference:
            continue
        online = draw(name, rng, rows=4).logps
        stored = replace(
            online,
            reference_chosen=online.reference_chosen.detach().clone(),
            reference_rejected=online.reference_rejected.detach().clone(),
        )
        assert torch.equal(LOSSES[name](online), LOSSES[name](stored))
        zero = replace(online, chosen=online.reference_chosen, rejected=online.reference_rejected)
        assert (zero.log_ratio == 0).all()


def test_orpo_at_and_near_certainty():
    """The odds are infinite at probability 1; value and gradient stay finite and point the right way up to it."""
    for dtype, near in ((torch.float64, -1e-15), (torch.float32, -1e-6)):
        chosen = torch.tensor([-1e-3, near, 0.0, -0.5], dtype=dtype, requires_grad=True)
        rejected = torch.tensor([-0.5, -0.5, 0.0, 0.0], dtype=dtype, requires_grad=True)
        one = torch.ones(4, dtype=torch.int64)
        loss = LOSSES["orpo"](PairLogps(chosen, rejected, None, None, one, one), lam=1.0)
        loss.sum().backward()
        assert loss.isfinite().all() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
        assert (chosen.grad <= 0).all() and (rejected.grad >= 0).all()
        assert loss[1] < loss[0] < loss[3]
    # log odds keep their relative accuracy where 1 - p is tiny: log(p / (1 - p)) is -log(1e-9) there
    tiny = torch.tensor([-1e-9], dtype=torch.float64)
    pair = PairLogps(torch.tensor([-math.log(2)]).double(), tiny, None, None, torch.tensor([1]), torch.tensor([1]))
    assert LOSSES["orpo"](pair, lam=1.0).item() == pytest.approx(math.log(2) + math.log1p(1 / 1e-9), rel=1e-9)


def _at(h):
    """Pairs whose log-ratio is h."""
    zero = torch.zeros_like(h)
    return PairLogps(h, zero, zero, zero)


def _calculus(function, x) -> tuple[float, float]:
    (slope,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), x, allow_unused=True) if slope.requires_grad else (None,)
    return slope.item(), 0.0 if curve is None else curve.item()
