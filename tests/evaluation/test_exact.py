"""Models in worlds that can be listed: their tables, exact gradients, and where palate's own training ends up."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import lifted
from runs_kit import Command, write_rows

import palate
from palate import losses
from palate.data.tokens import TokenGroup
from palate.evaluation import exact
from palate.scoring import logps
from palate.train.objectives import completion_nll, objective, pairwise
from palate.worlds import enumerable
from palate.worlds.enumerable import World


def model_of(world, seed=0, spread=0.3, dtype=torch.float64, **shape):
    """A random model that writes the world's symbols."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(**world.llama(spread=spread, **shape))
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()


def ids(*symbols):
    return np.array(symbols, dtype=np.int32)


def group_of(world, p, preferences=()):
    """All completions of a prompt in one group."""
    completions = tuple(row.astype(np.int32) for row in world.completion_ids)
    spans = (((0, world.length),),) * world.size
    return TokenGroup(world.prompt_ids[p].astype(np.int32), completions, spans, preferences=tuple(preferences))


def shown(world, p, counts):
    """Each symbol as often as its count, completions of one prompt in one group."""
    completions = tuple(ids(k) for k in np.repeat(np.arange(world.symbols), counts))
    return replace(group_of(world, p), completions=completions, spans=(((0, 1),),) * len(completions))


def trained(model, groups, objective, steps, lr=1e-2, watch=None, every=10):
    """The model after full-batch steps over the groups; watch(model) is collected every so often."""
    state = palate.TrainState.fresh(model, palate.OptimConfig(lr=lr, schedule="cosine"), steps)
    batches = palate.stream(groups, objective.collate, batch=len(groups), tokens=10**6, steps=steps)
    seen = []
    for step in palate.steps(state, batches, objective):
        if watch is not None and step.number % every == 0:
            seen.append(watch(model))
    return seen


# tables


@pytest.mark.parametrize("world", [World(3, 3, 2), World(2, 4, 3), World(7, 1, 9)], ids=str)
def test_a_table_is_what_scoring_gives_and_sums_to_one(world):
    """Once through palate's scoring, every completion a branch of its prompt; once step by step as a function."""
    with lifted():
        model = model_of(world)
        table = exact.table_of(model, world)
        batch = palate.collate([group_of(world, p) for p in range(world.prompts)])
        assert np.exp(table).sum(1) == pytest.approx(1, abs=1e-12)
        with torch.no_grad():
            assert logps(model, batch).total.numpy() == pytest.approx(table.ravel(), abs=1e-9)

        def policy(prompt, written):
            row = torch.tensor([[world.alphabet.index(symbol) for symbol in prompt + written]])
            with torch.no_grad():
                return model(input_ids=row).logits[0, -1].log_softmax(-1).tolist()

        assert world.tabulate(policy) == pytest.approx(table, abs=1e-9)
    assert np.ptp(table) > 0.1


def test_a_model_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="writes 4 symbols, the world has 3"):
        exact.table_of(model_of(World(4, 2, 1)), World(3, 2, 1))


def test_samples_of_the_model_follow_its_table():
    world = World(3, 2, 2)
    model, tokenizer = model_of(world, dtype=torch.float32), world.tokenizer()
    table, counts = exact.table_of(model, world), np.zeros((2, 9))
    made = palate.generate(model, tokenizer, list(world.prompt_ids), max_tokens=2, samples=4000)
    for sample in made:
        column = world.place(world.prompt(0), "".join(world.alphabet[i] for i in sample.ids))[1]
        counts[sample.prompt, column] += 1
        assert sample.logp == pytest.approx(table[sample.prompt, column], abs=1e-5)
    assert counts / 4000 == pytest.approx(np.exp(table), abs=0.035)


def test_measured_numbers():
    world = World(3, 3, 2)
    reference, reward = world.language(0), world.reward(0)
    own = exact.measure(reference, reference, reward, 0.5)
    assert own["exact/kl"] == 0 and own["exact/win_rate"] == pytest.approx(0.5)
    assert own["exact/reward"] == own["exact/best_reward"]
    best = exact.measure(enumerable.optimum(reference, reward, 0.5), reference, reward, 0.5)
    assert best["exact/gap"] == pytest.approx(0, abs=1e-12) and best["exact/tv"] == pytest.approx(0, abs=1e-12)
    assert best["exact/reward"] == pytest.approx(best["exact/best_reward"], abs=1e-9)
    assert best["exact/reward"] - 0.5 * best["exact/kl"] == pytest.approx(
        own["exact/reward"] + own["exact/gap"], abs=1e-9
    )
    assert best["exact/win_rate"] > 0.6 and own["exact/tv"] > 0.1


# oracle 27, in the weights of a model


def test_the_gradient_of_the_objective_in_weights_three_ways():
    """By autograd through the table, by finite differences, and as the policy gradient's surrogate at ratio 1."""
    world, beta = World(3, 3, 2), 0.4
    with lifted():
        reference, model = exact.table_of(model_of(world, 1), world), model_of(world, 2)
        reward, ref = torch.from_numpy(world.reward(0)), torch.from_numpy(reference)

        def gradient(value):
            model.zero_grad()
            value.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters()}

        def value():
            table = exact.completion_logps(model, world)
            return (table.exp() * (reward - beta * (table - ref))).sum(1).mean()

        whole = gradient(value())
        table = exact.completion_logps(model, world)
        law = table.detach().exp()
        advantage = reward - beta * (table.detach() - ref)
        advantage = advantage - (law * advantage).sum(1, keepdim=True)
        surrogate = gradient((law * advantage * (table - table.detach()).exp()).sum(1).mean())
        logits = enumerable.logit_gradient(table.detach().numpy(), reference, reward.numpy(), beta)
        by_logits = gradient((torch.from_numpy(logits) * exact.completion_logps(model, world)).sum(1).mean())
        draw = np.random.default_rng(0)
        for name, parameter in model.named_parameters():
            assert torch.allclose(whole[name], surrogate[name], atol=1e-10), name
            assert torch.allclose(whole[name], by_logits[name], atol=1e-10), name
            flat = parameter.data.view(-1)
            for place in draw.integers(len(flat), size=2):
                ends = []
                for sign in (1, -1):
                    flat[place] += sign * 1e-5
                    with torch.no_grad():
                        ends.append(float(value()))
                    flat[place] -= sign * 1e-5
                assert float(whole[name].view(-1)[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-7), name


def test_the_sampled_policy_gradient_is_within_three_standard_errors():
    world, beta, count = World(3, 2, 1), 0.4, 20_000
    reference, policy, reward = world.language(1), world.language(0), world.reward(0)
    law, advantage = np.exp(policy)[0], (reward - beta * (policy - reference))[0]
    drawn = np.random.default_rng(0).choice(world.size, size=count, p=law / law.sum())
    score = np.eye(world.size)[drawn] - law  # of log pi in free logits
    values = score * (advantage[drawn] - law @ advantage)[:, None]
    error = values.std(0) / math.sqrt(count)
    found = enumerable.logit_gradient(policy, reference, reward, beta)[0]
    assert (np.abs(values.mean(0) - found) < 3 * error).all()


# training: world A, where the expectation over pairs is exact


ODDS = np.array([[1, 2, 3, 1, 2, 6], [3, 1, 1, 2, 6, 1]])  # exp(r): labels in whole numbers


def all_pairs(weights, even: bool):
    """Preferences whose counts are Bradley and Terry's exactly; even: every two completions meet equally often."""
    found = []
    for a, b in itertools.permutations(range(len(weights)), 2):
        both = int(weights[a] + weights[b])
        times = math.lcm(*(int(x + y) for x, y in itertools.combinations(weights, 2))) // both if even else 1
        found += [(a, b)] * (int(weights[a]) * times)
    return found


@pytest.fixture(scope="module")
def bandit():
    """(world, reward, reference model, its table)."""
    world = World(6, 1, 2)
    reference = model_of(world, 3, dtype=torch.float32)
    return world, np.log(ODDS), reference, exact.table_of(reference, world)


@pytest.mark.parametrize("beta", [0.2, 0.5, 1.0, 2.0])
def test_dpo_goes_to_the_tilted_policy(beta, bandit):
    """Oracles 3, 12, 13: TV and gap fall to zero, and on the way no point lies above the frontier."""
    world, reward, reference, table = bandit
    groups = palate.annotate([group_of(world, p, all_pairs(ODDS[p], False)) for p in range(2)], reference)
    policy = model_of(world, 3, dtype=torch.float32)
    start = exact.measure(table, table, reward, beta)
    seen = trained(
        policy, groups, pairwise("dpo", beta=beta), 150, watch=exact.evaluator(world, table, reward, beta), every=15
    )
    assert start["exact/tv"] > 0.05 and seen[-1]["exact/tv"] < 0.005
    assert seen[-1]["exact/gap"] < 1e-3 * start["exact/gap"]
    for point in seen:
        assert point["exact/reward"] <= point["exact/best_reward"] + 1e-6


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_ipo_goes_to_its_own_optimum(tau, bandit):
    """Oracle 5, opponents drawn evenly: ref exp(P(y beats them) / tau), not the tilted policy."""
    world, _, reference, table = bandit
    odds = np.array([[1, 3, 1, 3, 1, 3], [3, 3, 3, 1, 1, 3]])  # few sums, so that few pairs are even
    reward = np.log(odds)
    groups = palate.annotate([group_of(world, p, all_pairs(odds[p], True)) for p in range(2)], reference)
    policy = model_of(world, 3, dtype=torch.float32)
    trained(policy, groups, pairwise("ipo", tau=tau), 150)
    even = np.full_like(table, -math.log(world.size))
    expected = enumerable.ipo_optimum(table, even, reward, tau)
    found = exact.table_of(policy, world)
    assert enumerable.total_variation(found, expected).max() < 0.005
    assert enumerable.total_variation(found, enumerable.optimum(table, reward, tau)).max() > 0.03


def test_imitating_the_chosen_goes_to_their_law(bandit):
    """Oracle 32: Preferred-FT ends at 2 ref(y) sum_b ref(b) sigma(r_y - r_b): its place under the frontier is known."""
    world, reward, _, table = bandit
    expected = enumerable.preferred(table, reward)
    counts = np.round(np.exp(expected) * 400).astype(int)
    groups = [shown(world, p, counts[p]) for p in range(2)]
    policy = model_of(world, 3, dtype=torch.float32)
    trained(policy, groups, completion_nll(), 60)
    found = exact.table_of(policy, world)
    assert enumerable.total_variation(found, expected).max() < 0.01
    point = exact.measure(found, table, reward, 1.0)
    assert point["exact/reward"] == pytest.approx(float(enumerable.expected_reward(expected, reward).mean()), abs=0.02)
    assert point["exact/reward"] < point["exact/best_reward"]


def test_demonstrations_go_to_their_frequencies(bandit):
    """Oracle 21: the law that fits them best is how often each occurs, and their mean loss is its entropy."""
    world, counts = bandit[0], np.array([[1, 4, 2, 5, 3, 5], [7, 1, 1, 6, 2, 3]])
    groups = [shown(world, p, counts[p]) for p in range(2)]
    policy, law = model_of(world, 3, dtype=torch.float32), counts / 20
    trained(policy, groups, completion_nll(), 150)
    assert enumerable.total_variation(exact.table_of(policy, world), np.log(law)).max() < 1e-3
    with torch.no_grad():
        found = float(completion_nll()(policy, palate.collate(groups)).loss.mean)
    assert found == pytest.approx(-(law * np.log(law)).sum(1).mean(), abs=1e-4)


# every loss there is; those that the tilted policy minimises, where all completions have one length
TILTED = ("dpo", "ln_dpo", "r_dpo")
OF_POLICIES = sorted(name for name in losses.LOSSES if losses.info(name).kind != "reward")


def rows_of(world, p, odds, kind):
    """Groups of one prompt whose labels are exactly those of the odds, as a loss of this kind takes them."""
    if kind == "pairwise":
        return [group_of(world, p, all_pairs(odds, False))]
    if kind == "demonstration":
        return [shown(world, p, odds)]
    if kind == "feedback":  # judged good as often as it beats another of the six
        good = [sum(odds[k] / (odds[k] + other) for other in odds) / len(odds) for k in range(6)]
        labels = [(k, n < round(4 * good[k])) for k in range(6) for n in range(4)]
        two = [(ids(k), ids((k + 1) % 6), label) for k, label in labels]
        return [replace(group_of(world, p), completions=(one, other), spans=(((0, 1),),) * 2, label=label)
                for one, other, label in two]  # fmt: skip
    # lists of three, drawn after Plackett and Luce
    draw, lists = np.random.default_rng(p), []
    for _ in range(30):
        picked = draw.permutation(6)[:3]
        order = picked[np.argsort(-(np.log(odds[picked]) + draw.gumbel(size=3)))]
        wins = tuple((a, b) for a in range(3) for b in range(a + 1, 3))
        lists.append(replace(group_of(world, p), completions=tuple(ids(k) for k in order), spans=(((0, 1),),) * 3,
                             preferences=wins))  # fmt: skip
    return lists


@pytest.mark.parametrize("name", OF_POLICIES)
def test_no_loss_leads_above_the_frontier(name, bandit):
    """Oracles 12 and 13 on every registered loss: the gap is beta KL to the optimum and never below zero, on the way
    and at the end; what the tilted policy minimises ends there."""
    world, reward, reference, table = bandit
    facts, beta = losses.info(name), 0.5
    options = {"beta": beta} if "beta" in facts.options else {}
    groups = [row for p in range(2) for row in rows_of(world, p, ODDS[p], facts.kind)]
    groups = palate.annotate(groups, reference) if facts.reference else groups
    policy, made = model_of(world, 3, dtype=torch.float32), objective(name, **options)
    steps = 45 if facts.kind in ("ranked", "feedback") else 150
    seen = trained(policy, groups, made, steps, watch=lambda model: exact.table_of(model, world), every=15)
    best = enumerable.optimum(table, reward, beta)
    for law in seen:
        gap = enumerable.optimality_gap(law, table, reward, beta)
        assert gap == pytest.approx(beta * enumerable.sequence_kl(law, best), abs=1e-9) and gap.min() >= 0
        point = exact.measure(law, table, reward, beta)
        assert point["exact/reward"] <= point["exact/best_reward"] + 1e-6
    assert enumerable.expected_reward(seen[-1], reward).mean() > enumerable.expected_reward(table, reward).mean()
    if name in TILTED:
        assert enumerable.total_variation(seen[-1], best).max() < 0.01


# training: a language, pairs drawn from the reference


@pytest.mark.parametrize("beta", [0.5, pytest.param(2.0, marks=pytest.mark.slow)])
def test_drawn_pairs_bring_dpo_near_the_optimum_of_a_language(beta):
    world = World(4, 3, 2)
    reference, policy = (model_of(world, 5, spread=0.1, dtype=torch.float32) for _ in range(2))
    table, reward = exact.table_of(reference, world), world.reward(7)
    drawn = [[], []]
    for pair in world.pairs(table, reward, 20_000, seed=1):
        p, better = world.place(pair.prompt, pair.chosen)
        drawn[p].append((better, world.place(pair.prompt, pair.rejected)[1]))
    groups = palate.annotate([group_of(world, p, drawn[p]) for p in range(2)], reference)
    start = exact.measure(table, table, reward, beta)
    seen = trained(
        policy, groups, pairwise("dpo", beta=beta), 150, 1e-2, exact.evaluator(world, table, reward, beta), 30
    )
    assert seen[-1]["exact/tv"] < 0.08 < start["exact/tv"]
    assert seen[-1]["exact/gap"] < 0.1 * start["exact/gap"]
    assert all(point["exact/reward"] <= point["exact/best_reward"] + 1e-6 for point in seen)


def test_the_command_line_trains_in_the_world(tmp_path, capsys):
    """new:FOLDER as the reference, pairs of its own samples in a file: `palate dpo`, and the trained model's table."""
    world = World(4, 2, 3)
    start = world.write_start(tmp_path / "start", spread=0.1)
    reference = palate.load(f"new:{start}", seed=0)
    palate.save(reference.model, reference.tokenizer, tmp_path / "reference")
    table, reward = exact.table_of(reference.model, world), world.reward(0)
    rows = [
        {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in world.pairs(table, reward, 400, 0)
    ]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    result = Command(capsys).ok(
        "dpo",
        model=tmp_path / "reference",
        data=data,
        eval="none",
        out=tmp_path / "run",
        beta=0.5,
        lr=3e-3,
        batch=16,
        epochs=3,
    )
    after = exact.measure(exact.table_of(palate.load(result["model"]).model, world), table, reward, 0.5)
    before = exact.measure(table, table, reward, 0.5)
    assert after["exact/gap"] < 0.6 * before["exact/gap"]
    assert after["exact/kl"] > 0.01 and after["exact/reward"] <= after["exact/best_reward"] + 1e-6


@pytest.mark.slow
def test_a_reward_model_and_ppo_go_to_the_optimum_of_the_truth(tmp_path, capsys):
    """The classic road, by its two commands, held to the reward that labelled the pairs: oracles 12, 13 and 22.

    A learnt reward is the truth over `reward_scale`, but for a number a prompt; so is the weight of its KL.
    """
    from palate.model.reward import load_reward

    world, beta, palate_ = World(8, 1, 2), 0.5, Command(capsys)
    start = world.write_start(tmp_path / "start", spread=0.1)
    reference = palate.load(f"new:{start}", seed=0)
    palate.save(reference.model, reference.tokenizer, tmp_path / "reference")
    table, reward = exact.table_of(reference.model, world), world.reward(4)
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}
            for p in world.pairs(table, reward, 8000, 0)]  # fmt: skip
    common = dict(model=tmp_path / "reference", eval="none", device="cpu", samples=0, report=False)
    data, asked = write_rows(tmp_path / "pairs.jsonl", rows), [{"prompt": p.prompt} for p in world.prompt_records()]
    palate_.ok("reward", data=data, out=tmp_path / "rm", lr=1e-2, train__schedule="cosine", **common)
    scale = load_reward(tmp_path / "rm").model.config.reward_scale
    found = palate_.ok(
        "ppo", data=write_rows(tmp_path / "prompts.jsonl", asked), reward=tmp_path / "rm", out=tmp_path / "run",
        critic="none", group=128, batch=256, steps=40, passes=2, max_tokens=1, missing_end="keep", lr=5e-3,
        kl_coef=beta / scale, **common,
    )  # fmt: skip
    law = exact.table_of(palate.load(found["model"]).model, world)
    before, after = (exact.measure(policy, table, reward, beta) for policy in (table, law))
    assert after["exact/gap"] < 0.1 * before["exact/gap"] and after["exact/tv"] < 0.15 < before["exact/tv"]
    assert after["exact/reward"] <= after["exact/best_reward"] + 1e-6


@pytest.mark.slow
def test_dpo_in_the_world_of_the_methods():
    """World B, 7,776 completions a prompt, one pass over 20,480 pairs: part of the way, below the frontier."""
    world, beta = World(), 1.0
    reference, policy = (model_of(world, 0, spread=0.1, dtype=torch.float32) for _ in range(2))
    table, reward, tokenizer = exact.table_of(reference, world), world.reward(0), world.tokenizer()
    pairs = [palate.tokenize(pair, tokenizer) for pair in world.pairs(table, reward, 20_480, seed=0)]
    batches = palate.stream(palate.annotate(pairs, reference), palate.collate_pairs, batch=256, tokens=4096)
    state = palate.TrainState.fresh(policy, palate.OptimConfig(lr=5e-3, schedule="cosine"), 80)
    watch, seen = exact.evaluator(world, table, reward, beta), [exact.measure(table, table, reward, beta)]
    for step in palate.steps(state, batches, pairwise("dpo", beta=beta)):
        if step.number % 20 == 0:
            seen.append(watch(policy))
    assert len(seen) == 5
    assert seen[-1]["exact/gap"] < 0.6 * seen[0]["exact/gap"]
    assert seen[-1]["exact/tv"] < 0.8 * seen[0]["exact/tv"]
    assert seen[-1]["exact/win_rate"] > 0.6
    assert all(point["exact/reward"] <= point["exact/best_reward"] + 1e-6 for point in seen)
