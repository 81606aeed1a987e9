"""Episodes: every column against one stock forward of each text, at the temperature that was sampled at."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from oracles import ppo as oracle
from palate.data.batch import collate, collate_rollouts
from palate.errors import ModelError
from palate.model.heads import with_scalar_head
from palate.sampling.judge import Judge
from palate.sampling.rollout import Asked, Episodes, collect
from palate.scoring import Numerics, logps_and_values, token_logps
from palate.train.objectives import ppo
from palate.train.selfcheck import check_rollout


@pytest.fixture(scope="module")
def models(tiny_llama):
    """(policy, reference, critic), each of weights of its own."""
    return tiny_llama(0), tiny_llama(1), with_scalar_head(tiny_llama(2))


JUDGE = Judge("length", score=lambda prompts, texts: [float(len(text.text)) + text.finished for text in texts])
ASKED = [Asked(np.array([5, 9, 30], np.int32), "one"), Asked(np.array([7], np.int32), "two")]


def stock(model, prompt, ids, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0].double()
    logps = (logits / temperature).log_softmax(-1)
    return [float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(ids)]


def values_of(critic, prompt, ids):
    whole = [*prompt, *ids]
    with torch.no_grad():
        return [float(critic(torch.tensor([whole[: len(prompt) + i]])).logits[0, 0]) for i in range(len(ids))]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_column_is_what_it_says(models, tiny_tokenizer, temperature):
    policy, reference, critic = models
    numerics = replace(Numerics.of(policy), temperature=temperature)
    how = Episodes(numerics, max_tokens=5, samples=3, gamma=0.9, lam=0.8, tokens=20)
    groups = collect(policy, reference, critic, tiny_tokenizer, ASKED, JUDGE, how, coefficient=0.3, seed=4)
    assert [len(group.completions) for group in groups] == [3, 3]
    made, expected = [], []
    for group in groups:
        at = 0
        for k, ids in enumerate(group.completions):
            mine = slice(at, at + len(ids))
            at += len(ids)
            prompt, ids = group.prompt.tolist(), ids.tolist()
            logps, base = stock(policy, prompt, ids, temperature), stock(reference, prompt, ids, temperature)
            ratio = [a - b for a, b in zip(logps, base, strict=True)]
            np.testing.assert_allclose(group.old_logps[mine], logps, atol=1e-4)
            assert group.kl[k] == pytest.approx(sum(ratio), abs=1e-4)
            assert group.finished[k] == (ids[-1] == tiny_tokenizer.eos_token_id)
            if not group.finished[k]:
                assert group.scores[k] == -1
            values = values_of(critic, prompt, ids)
            np.testing.assert_allclose(group.values[mine], values, atol=1e-4)
            credit = oracle.advantages(oracle.rewards(group.scores[k], ratio, 0.3), values, 0.9, 0.8)
            np.testing.assert_allclose(group.returns[mine], np.add(credit, values), atol=1e-3)
            made += group.advantages[mine].tolist()
            expected += credit
    white = (np.array(expected) - np.mean(expected)) / np.std(expected)
    np.testing.assert_allclose(made, white, atol=1e-3)


def test_without_a_critic_a_sample_is_judged_by_the_others(models, tiny_tokenizer):
    policy, reference, _ = models
    how = Episodes(Numerics.of(policy), max_tokens=4, samples=4, missing_end=None)
    groups = collect(policy, reference, None, tiny_tokenizer, ASKED, JUDGE, how, coefficient=0.2, seed=1)
    for group in groups:
        totals, at = group.scores - 0.2 * group.kl, 0
        for k, ids in enumerate(group.completions):
            others = np.delete(totals, k).mean()
            np.testing.assert_allclose(group.advantages[at : at + len(ids)], totals[k] - others, atol=1e-9)
            at += len(ids)
        assert np.isnan(group.values).all() and np.isnan(group.explained).all()


def test_a_head_on_the_trunk_reads_the_policys_own_states(models):
    policy, *_ = models
    head = torch.nn.Linear(64, 1)
    trunk = with_scalar_head(policy)
    with torch.no_grad():
        trunk.score.weight.copy_(head.weight)
    batch = collate([replace_group(ASKED[0].ids)])
    logps, values = logps_and_values(policy, head, batch, numerics=Numerics.of(policy))
    assert torch.equal(logps, token_logps(policy, batch, numerics=Numerics.of(policy)).double())
    expected = [float(head.bias.detach()) + value for value in values_of(trunk, ASKED[0].ids.tolist(), [11, 12, 1])]
    assert values.tolist() == pytest.approx(expected, abs=1e-5)
    policy.zero_grad()
    values.sum().backward()
    assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in policy.parameters())
    policy.zero_grad()


def replace_group(prompt):
    from palate.data.tokens import TokenGroup

    return TokenGroup(prompt, (np.array([11, 12, 1], np.int32),), (((0, 3),),))


def test_the_first_update_is_checked(models, tiny_tokenizer):
    policy, _, critic = models
    numerics = replace(Numerics.of(policy), temperature=0.7)
    how = Episodes(numerics, max_tokens=5, samples=2)
    groups = collect(policy, policy, critic, tiny_tokenizer, ASKED, JUDGE, how, coefficient=0.1, seed=0)
    right = ppo(numerics, critic)
    said = check_rollout([right(policy, collate_rollouts(groups))], right, whitened=True)
    assert said.startswith("start: ratio 1 within 0, KL 0 nats")
    wrong = ppo(replace(numerics, temperature=1.0), critic)  # another temperature in the update than in sampling
    with pytest.raises(ModelError, match="differ from those of the update") as caught:
        check_rollout([wrong(policy, collate_rollouts(groups))], wrong)
    assert caught.value.code == "E602"
    far = collect(policy, models[1], critic, tiny_tokenizer, ASKED, JUDGE, how, coefficient=0.1, seed=0)
    with pytest.raises(ModelError, match="policy and reference differ"):
        check_rollout([right(policy, collate_rollouts(far))], right)


def test_micro_batches_move_no_number(models, tiny_tokenizer):
    policy, reference, critic = models
    numerics = Numerics.of(policy)
    found = []
    for tokens in (1, 10_000):
        how = Episodes(numerics, max_tokens=5, samples=2, tokens=tokens)
        groups = collect(policy, reference, critic, tiny_tokenizer, ASKED, JUDGE, how, coefficient=0.1, seed=2)
        found.append(np.concatenate([np.concatenate([g.old_logps, g.advantages, g.returns]) for g in groups]))
    np.testing.assert_allclose(found[0], found[1], atol=1e-9)


def test_health_speaks_of_what_is_wrong():
    from palate.evaluation.policy import health

    good = {
        "loss": 0,
        "kl": 0.5,
        "kl_coef": 0.1,
        "policy/clipped": 0.1,
        "value/explained": 0.4,
        "ended": 0.9,
        "reward": 1,
    }
    assert health([]) == [] and health([{"eval/reward": 1}]) == [] and health([good] * 40) == []
    for change, word in [
        ({"kl": -0.5}, "below zero"),
        ({"policy/clipped": 0.5}, "learning rate"),
        ({"value/explained": -0.1}, "explains nothing"),
        ({"ended": 0.1}, "end by themselves"),
    ]:
        (said,) = health([good | change] * 40)
        assert word in said
    rising = [good | {"reward": 0.01 * n, "kl": 0.5 * n} for n in range(40)]
    assert "less its KL falls" in health(rising)[0]
    assert health([good | {"value/explained": None}] * 40) == []
