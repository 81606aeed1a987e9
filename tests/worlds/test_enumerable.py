"""Worlds whose completions can be listed: every formula against slow enumeration in plain Python."""

import itertools
import math

import numpy as np
import pytest

from palate.errors import UsageError
from palate.worlds import enumerable
from palate.worlds.enumerable import World

WORLDS = [World(3, 3, 2), World(2, 4, 3), World(7, 1, 5)]
BETAS = [0.05, 0.2, 0.5, 1.0, 2.0, 10.0]


def law(world, seed):
    """A table without any structure."""
    scores = np.random.default_rng(seed).normal(size=(world.prompts, world.size)) * 1.5
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


@pytest.fixture(params=WORLDS, ids=str)
def world(request):
    return request.param


@pytest.fixture
def case(world):
    """(world, reference, reward, policies): laws far from each other, and the reference itself."""
    return world, law(world, 0), world.reward(5), [law(world, 0), law(world, 1), world.language(3)]


def test_the_default_world_is_that_of_the_methods():
    world = World()
    assert (world.symbols, world.length, world.size) == (6, 5, 7776)
    assert world.completion_ids.shape == (7776, 5)
    assert (world.completion(0), world.completion(1), world.completion(7775)) == ("aaaaa", "aaaab", "fffff")
    assert [world.prompt(p) for p in range(4)] == ["abcdea", "abcdeb", "abcdec", "abcded"]
    assert [World(2, 1, 5).prompt(p) for p in range(5)] == ["aaaa", "aaab", "aaba", "aabb", "abaa"]


def test_places_are_found_by_text(world):
    for p in range(world.prompts):
        for k in range(world.size):
            assert world.place(world.prompt(p), world.completion(k)) == (p, k)
    letters = world.alphabet
    for prompt, completion in [("", letters[0]), (world.prompt(0), letters[0] * (world.length + 1)), ("!", "a")]:
        with pytest.raises(UsageError):
            world.place(prompt, completion)
    with pytest.raises(UsageError):
        world.place(letters[-1] * world.prompt_ids.shape[1], world.completion(0))


@pytest.mark.parametrize("shape", [(1, 5, 1), (51, 1, 1), (6, 0, 1), (6, 5, 0), (50, 3, 1)])
def test_a_world_too_large_to_list_is_refused(shape):
    with pytest.raises(UsageError, match="cannot be listed"):
        World(*shape)


def test_rewards_are_drawn_by_the_seed(world):
    reward = world.reward(0)
    assert reward.shape == (world.prompts, world.size)
    assert reward.mean(1) == pytest.approx(0, abs=1e-12)
    assert reward.std(1) == pytest.approx(1)
    assert np.array_equal(reward, world.reward(0)) and not np.allclose(reward, world.reward(1))


def test_a_language_is_a_markov_chain(world):
    table = world.language(2)
    assert np.exp(table).sum(1) == pytest.approx(1)
    seen = {}
    for p in range(world.prompts):
        for t, step in enumerate(world.steps(table)):
            for number, row in enumerate(step[p]):
                before = number % world.symbols if t else world.prompt_ids[p, -1]
                assert row == pytest.approx(seen.setdefault(before, row), abs=1e-12)


def test_tables_and_steps_are_one_thing(world):
    """A policy as a function of what is written, as steps, and as a table."""
    table = law(world, 4)

    def policy(prompt, written):
        p = [world.prompt(i) for i in range(world.prompts)].index(prompt)
        mass = [
            sum(math.exp(table[p, k]) for k in range(world.size) if world.completion(k).startswith(written + symbol))
            for symbol in world.alphabet
        ]
        return [math.log(m / sum(mass)) for m in mass]

    assert world.tabulate(policy) == pytest.approx(table, abs=1e-12)
    assert world.chain(world.steps(table)) == pytest.approx(table, abs=1e-12)


# oracle 12


@pytest.mark.parametrize("beta", BETAS)
def test_the_gap_is_beta_times_the_kl_to_the_optimum(case, beta):
    world, ref, reward, policies = case
    best = enumerable.optimum(ref, reward, beta)
    assert np.exp(best).sum(1) == pytest.approx(1, rel=1e-10)
    for policy in [*policies, best]:
        for p in range(world.prompts):
            z = sum(math.exp(ref[p, k] + reward[p, k] / beta) for k in range(world.size))
            j = sum(
                math.exp(policy[p, k]) * (reward[p, k] - beta * (policy[p, k] - ref[p, k])) for k in range(world.size)
            )
            gap = enumerable.optimality_gap(policy, ref, reward, beta)[p]
            assert gap == pytest.approx(beta * math.log(z) - j, abs=1e-9)
            assert gap == pytest.approx(beta * enumerable.sequence_kl(policy, best)[p], rel=1e-9, abs=1e-9)
            assert gap > -1e-10
    assert enumerable.optimality_gap(best, ref, reward, beta) == pytest.approx(0, abs=1e-9)


# oracle 13


def test_along_the_frontier_reward_rises_by_beta_for_each_nat(case):
    _, ref, reward, _ = case
    for beta in BETAS:
        kl, value = enumerable.frontier(ref, reward, [beta * 0.9999, beta * 1.0001])
        assert (value[0] - value[1]) / (kl[0] - kl[1]) == pytest.approx(beta, rel=1e-4)
        at, got = (x[0] for x in enumerable.frontier(ref, reward, [beta]))
        assert at == pytest.approx((got - beta * enumerable.log_partition(ref, reward, beta).mean()) / beta, rel=1e-7)


def test_the_frontier_is_found_by_its_kl(case):
    _, ref, reward, _ = case
    kl, value = enumerable.frontier(ref, reward, BETAS)
    for k, r in zip(kl, value, strict=True):
        assert enumerable.best_reward(ref, reward, k) == pytest.approx(r, abs=1e-9)
    plain = enumerable.expected_reward(ref, reward).mean()
    assert enumerable.best_reward(ref, reward, 0.0) == enumerable.best_reward(ref, reward, -1e-17) == plain
    assert plain <= enumerable.best_reward(ref, reward, 1e-15) <= plain + 1e-6
    assert enumerable.best_reward(ref, reward, 1e3) == pytest.approx(reward.max(1).mean())


def test_nothing_lies_above_the_frontier(case):
    _, ref, reward, policies = case
    draw = np.random.default_rng(0)
    for number in range(200):
        near = ref + draw.normal(size=ref.shape) * 0.03 * number + reward * draw.random() * 3
        policies = [*policies, near - np.log(np.exp(near).sum(1, keepdims=True))]
    policies += [enumerable.best_of(ref, reward, n) for n in (2, 4, 16)]
    policies += [enumerable.preferred(ref, reward), enumerable.ipo_optimum(ref, ref, reward, 0.1)]
    for policy in policies:
        assert np.exp(policy).sum(1) == pytest.approx(1)
        kl = enumerable.sequence_kl(policy, ref).mean()
        got = enumerable.expected_reward(policy, reward).mean()
        assert got <= enumerable.best_reward(ref, reward, kl) + 1e-9


def test_one_beta_for_all_prompts_makes_the_averaged_frontier(case):
    """Other betas for other prompts, at the same mean KL, get less reward."""
    world, ref, reward, _ = case
    for spread in (0.3, 0.6, 1.5):
        betas = 0.7 * np.exp(spread * np.linspace(-1, 1, world.prompts))
        policy = np.stack([enumerable.optimum(ref, reward, b)[p] for p, b in enumerate(betas)])
        kl = enumerable.sequence_kl(policy, ref).mean()
        assert enumerable.expected_reward(policy, reward).mean() < enumerable.best_reward(ref, reward, kl)


# oracle 14


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_soft_values_by_recursion(case, beta):
    world, ref, reward, _ = case
    values = world.soft_values(ref, reward, beta)
    assert values[0][:, 0] == pytest.approx(beta * enumerable.log_partition(ref, reward, beta), abs=1e-9)
    best, ref_steps = enumerable.optimum(ref, reward, beta), world.steps(ref)
    telescoped = 0.0
    for t, (mine, its) in enumerate(zip(world.steps(best), ref_steps, strict=True)):
        after = values[t + 1].reshape(world.prompts, -1, world.symbols)
        token_reward = beta * (mine - its)
        assert token_reward == pytest.approx(after - values[t][..., None], abs=1e-8)
        spread = world.symbols ** (world.length - t - 1)
        telescoped = telescoped + np.repeat(token_reward.reshape(world.prompts, -1), spread, axis=1)
    partition = enumerable.log_partition(ref, reward, beta)[:, None]
    assert telescoped == pytest.approx(reward - beta * partition, abs=1e-8)


# oracle 15


def test_sequence_kl_three_ways(case):
    world, ref, _, policies = case
    for policy in policies:
        whole = enumerable.sequence_kl(policy, ref)
        assert world.step_kl(policy, ref).shape == (world.prompts, world.length)
        assert world.step_kl(policy, ref).sum(1) == pytest.approx(whole, abs=1e-10)
        k1 = policy - ref
        assert (np.exp(policy) * k1).sum(1) == pytest.approx(whole, abs=1e-12)
        k3 = np.exp(-k1) - 1 + k1
        assert (k3 >= 0).all()
        assert (np.exp(policy) * k3).sum(1) == pytest.approx(whole, abs=1e-10)
        for p in range(world.prompts):
            plain = sum(math.exp(policy[p, k]) * (policy[p, k] - ref[p, k]) for k in range(world.size))
            assert whole[p] == pytest.approx(plain, abs=1e-10)
    k2 = (np.exp(policies[1]) * (policies[1] - ref) ** 2 / 2).sum(1)
    assert (np.abs(k2 - enumerable.sequence_kl(policies[1], ref)) > 0.01).any()


def test_what_is_never_written_adds_nothing_to_a_kl():
    policy, ref = np.log([[0.5, 0.5, 1e-300]]), np.log([[0.25, 0.5, 0.25]])
    policy[0, 2] = -np.inf
    assert enumerable.sequence_kl(policy, ref) == pytest.approx(0.5 * math.log(2))
    assert enumerable.sequence_kl(ref, policy) == pytest.approx(math.inf)


# oracle 16


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_by_all_draws(n):
    """Every draw of n completions; of equally good ones each drawn one is as likely: ties keep the reference's law."""
    world = World(5, 1, 2)
    ref, reward = law(world, 0), np.array([[3.0, 1, 2, 5, 4], [1.0, 2, 2, 0, 2]])
    found = enumerable.best_of(ref, reward, n)
    for p in range(2):
        plain = np.zeros(world.size)
        for drawn in itertools.product(range(world.size), repeat=n):
            chance = math.prod(math.exp(ref[p, k]) for k in drawn)
            best = max(reward[p, k] for k in drawn)
            tied = [k for k in drawn if reward[p, k] == best]
            for k in tied:
                plain[k] += chance / len(tied)
        assert np.exp(found[p]) == pytest.approx(plain, abs=1e-12)


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_best_of_n_stays_within_its_kl(case, n):
    _, ref, reward, _ = case
    kl = enumerable.sequence_kl(enumerable.best_of(ref, reward, n), ref)
    assert (kl <= enumerable.best_of_kl_bound(n) + 1e-12).all()
    world = World()
    wide = enumerable.sequence_kl(enumerable.best_of(world.language(0), world.reward(0), n), world.language(0))
    if n == 2:  # where no completion has much mass, nearly the bound itself
        assert wide == pytest.approx(enumerable.best_of_kl_bound(n), rel=0.05)


# oracle 23


def test_gumbel_labels_are_those_of_bradley_and_terry():
    draw = np.random.default_rng(0)
    for gap, scale in itertools.product((0.3, 1.0, 2.5), (0.5, 1.0, 2.0)):
        noise = draw.gumbel(size=(200_000, 2)) * scale
        wins = (gap + noise[:, 0] > noise[:, 1]).mean()
        expected = 1 / (1 + math.exp(-gap / scale))
        assert wins == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 200_000))


@pytest.mark.parametrize("gap, inflated", [(0.2, 0.367), (1.0, 1.84)])
def test_best_against_worst_of_four_inflates_gaps(gap, inflated):
    """Orders after Plackett and Luce, which Gumbel noise makes; the two others lie midway. For small gaps 1+1/2+1/3."""
    rewards = [gap, 0.0, gap / 2, gap / 2]

    def chance(order):
        weights = [math.exp(rewards[k]) for k in order]
        return math.prod(w / sum(weights[i:]) for i, w in enumerate(weights))

    orders = list(itertools.permutations(range(4)))
    won = sum(chance(o) for o in orders if (o[0], o[-1]) == (0, 1))
    lost = sum(chance(o) for o in orders if (o[0], o[-1]) == (1, 0))
    assert math.log(won / lost) == pytest.approx(inflated, abs=0.004)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_pairs_are_labelled_by_the_sigmoid_of_their_gap(sharpness):
    """By their own samples: counts of every ordered two against ref(a) ref(b) sigma(k (r_a - r_b))."""
    world, count = World(3, 1, 2), 40_000
    ref, reward = law(world, 0), world.reward(1)
    counts = np.zeros((2, 3, 3))
    for pair in world.pairs(ref, reward, count, seed=1, sharpness=sharpness, distinct=False):
        p, better = world.place(pair.prompt, pair.chosen)
        counts[p, better, world.place(pair.prompt, pair.rejected)[1]] += 1
    for p in range(2):
        assert counts[p].sum() == count / 2
        for a, b in itertools.product(range(3), repeat=2):
            expected = 2 * math.exp(ref[p, a] + ref[p, b]) / (1 + math.exp(sharpness * (reward[p, b] - reward[p, a])))
            if a == b:
                expected = math.exp(2 * ref[p, a])
            assert counts[p, a, b] / (count / 2) == pytest.approx(expected, abs=0.01)


def test_pairs_are_distinct_by_seed_and_can_be_without_noise():
    world = World(4, 2, 3)
    ref, reward = world.language(0), world.reward(0)
    pairs = world.pairs(ref, reward, 300, seed=2, sharpness=math.inf)
    assert len(pairs) == 300 and all(pair.chosen != pair.rejected for pair in pairs)
    assert pairs == world.pairs(ref, reward, 300, seed=2, sharpness=math.inf) != world.pairs(ref, reward, 300, seed=3)
    for pair in pairs:
        assert reward[world.place(pair.prompt, pair.chosen)] > reward[world.place(pair.prompt, pair.rejected)]


def test_demonstrations_follow_their_table():
    world = World(2, 2, 2)
    table, counts = law(world, 3), np.zeros((2, 4))
    for row in world.demonstrations(table, 40_000, seed=5):
        counts[world.place(row.prompt, row.completion)] += 1
    assert counts / 20_000 == pytest.approx(np.exp(table), abs=0.015)


# oracle 24, judge sharpness: labels sigma(k gap) have the optimum of beta / k


def test_a_duller_judge_is_a_larger_beta(case):
    _, ref, reward, _ = case
    assert enumerable.optimum(ref, 3 * reward, 0.6) == pytest.approx(enumerable.optimum(ref, reward, 0.2), abs=1e-10)


# oracle 27


def test_the_gradient_in_free_logits_is_that_of_finite_differences(case):
    world, ref, reward, policies = case
    beta, step = 0.3, 1e-5
    found = enumerable.logit_gradient(policies[1], ref, reward, beta)
    assert found.sum(1) == pytest.approx(0, abs=1e-12)
    for p in range(world.prompts):
        for k in range(0, world.size, 3):
            values = []
            for sign in (1, -1):
                logits = policies[1].copy()
                logits[p, k] += sign * step
                logits -= np.log(np.exp(logits).sum(1, keepdims=True))
                values.append(enumerable.objective(logits, ref, reward, beta)[p])
            assert found[p, k] == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-8)
    best = enumerable.optimum(ref, reward, beta)
    assert enumerable.logit_gradient(best, ref, reward, beta) == pytest.approx(0, abs=1e-10)


# oracle 31


def test_win_rates_by_all_pairs_and_their_algebra(case):
    world, ref, reward, policies = case
    reward = np.round(reward)  # with ties
    for policy in policies:
        assert enumerable.win_rate(policy, policy, reward) == pytest.approx(0.5, abs=1e-12)
        found = enumerable.win_rate(policy, ref, reward)
        assert enumerable.win_rate(ref, policy, reward) == pytest.approx(1 - found, abs=1e-12)
        for p in range(world.prompts):
            plain = sum(
                math.exp(policy[p, a] + ref[p, b])
                * (1.0 if reward[p, a] > reward[p, b] else 0.5 if reward[p, a] == reward[p, b] else 0.0)
                for a, b in itertools.product(range(world.size), repeat=2)
            )
            assert found[p] == pytest.approx(plain, abs=1e-10)


# oracle 32


def test_the_law_of_chosen_sides(case):
    world, ref, reward, _ = case
    table = enumerable.preferred(ref, reward)
    for p in range(world.prompts):
        plain = [
            2
            * math.exp(ref[p, y])
            * sum(math.exp(ref[p, b]) / (1 + math.exp(reward[p, b] - reward[p, y])) for b in range(world.size))
            for y in range(world.size)
        ]
        assert np.exp(table[p]) == pytest.approx(plain, abs=1e-12)
    assert np.exp(table).sum(1) == pytest.approx(1)
    sharp = enumerable.preferred(ref, reward, sharpness=1e9)
    assert np.exp(sharp) == pytest.approx(np.exp(enumerable.best_of(ref, reward, 2)), abs=1e-9)


def test_chosen_sides_follow_it():
    world = World(4, 1, 1)
    ref, reward = law(world, 0), world.reward(0)
    counts = np.zeros(4)
    for pair in world.pairs(ref, reward, 40_000, seed=0, distinct=False):
        counts[world.place(pair.prompt, pair.chosen)[1]] += 1
    assert counts / 40_000 == pytest.approx(np.exp(enumerable.preferred(ref, reward))[0], abs=0.01)


# oracle 22


@pytest.mark.parametrize("sharpness", [1.0, 0.5])
def test_what_a_learnt_reward_is_worth_by_all_pairs(case, sharpness):
    world, ref, reward, _ = case
    learnt = reward + np.random.default_rng(2).normal(size=reward.shape)
    learnt[:, 1] = learnt[:, 0]  # a tie
    found = enumerable.ordered(ref, reward, learnt, sharpness)
    for p in range(world.prompts):
        sums, mass = dict.fromkeys(found, 0.0), 0.0
        for a, b in itertools.permutations(range(world.size), 2):
            weight = math.exp(ref[p, a] + ref[p, b])
            mass += weight
            chance = 1 / (1 + math.exp(sharpness * (reward[p, b] - reward[p, a])))
            said = 1 / (1 + math.exp(learnt[p, b] - learnt[p, a]))
            sums["accuracy"] += weight * (0.5 if said == 0.5 else chance if said > 0.5 else 1 - chance)
            sums["best_accuracy"] += weight * max(chance, 1 - chance)
            sums["loss"] -= weight * (chance * math.log(said) + (1 - chance) * math.log(1 - said))
            sums["floor"] -= weight * (chance * math.log(chance) + (1 - chance) * math.log(1 - chance))
        assert {name: values[p] for name, values in found.items()} == pytest.approx(
            {name: total / mass for name, total in sums.items()}, abs=1e-9
        )
    own = enumerable.ordered(ref, reward, sharpness * reward + 7.0, sharpness)
    assert own["accuracy"] == pytest.approx(own["best_accuracy"]) and own["loss"] == pytest.approx(own["floor"])
    assert (found["accuracy"] < own["accuracy"]).all() and (found["loss"] > found["floor"]).all()


# the tokenizer


def test_one_symbol_is_one_token(world, tmp_path):
    from palate.data.records import PreferencePair
    from palate.data.tokens import end_tokens, tokenize

    tokenizer = world.tokenizer()
    assert len(tokenizer) == world.symbols and not end_tokens(tokenizer)
    for k in range(0, world.size, 5):
        assert tokenizer(world.completion(k))["input_ids"] == world.completion_ids[k].tolist()
        assert tokenizer.decode(world.completion_ids[k].tolist()) == world.completion(k)
    group = tokenize(PreferencePair(world.prompt(1), world.completion(0), world.completion(1)), tokenizer)
    assert group.prompt.tolist() == world.prompt_ids[1].tolist()
    assert [ids.tolist() for ids in group.completions] == world.completion_ids[:2].tolist()
    assert group.spans == (((0, world.length),),) * 2
