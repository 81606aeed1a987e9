"""Episodes: every column against one stock forward of each text, at the temperature that was sampled at."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from oracles import ppo as oracle
from palate.data.batch import RolloutGroup, collate, collate_rollouts
from palate.errors import ModelError
from palate.model.heads import with_scalar_head
from palate.sampling.judge import Judge
from palate.sampling.rollout import Asked, Episodes, collect
from palate.scoring import Numerics, logps_and_values, token_logps
from palate.train.objectives import ppo
from palate.train.selfcheck import check_rollout, check_sampling


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


class Bigrams(torch.nn.Module):
    """The law of the next token is a row of a table of logits; token 1 ends, and is likely."""

    device = torch.device("cpu")

    def __init__(self, seed=0):
        super().__init__()
        self.table = 1.5 * torch.randn(30, 30, generator=torch.Generator().manual_seed(seed))
        self.table[:, 1] = 3.0

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.table[input_ids])

    def samples(self, wrong=lambda logits: logits, count=400, tokens=6, seed=0):
        """Groups of texts drawn from the logits, or from what `wrong` makes of them."""
        chance, ids = torch.Generator().manual_seed(seed), torch.full((count, 1), 5)
        for _ in range(tokens):
            law = wrong(self.table[ids[:, -1]].double()).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(law, 1, generator=chance)], 1)
        texts = ids[:, 1:].numpy().astype(np.int32)
        return [RolloutGroup(np.array([5], np.int32), (text,), (((0, tokens),),)) for text in texts]


SAMPLERS = {  # what goes wrong: logits -> those that are sampled from
    "a lower temperature": lambda logits: logits / 0.7,
    "a higher temperature": lambda logits: logits / 1.5,
    "top-k": lambda logits: logits.masked_fill(logits < logits.topk(8).values[:, -1:], -torch.inf),
    "top-p": lambda logits: logits.masked_fill(logits.softmax(-1) < 0.02, -torch.inf),
    "a suppressed end": lambda logits: logits.index_fill(-1, torch.tensor([1]), -torch.inf),
}


@pytest.mark.parametrize("how", SAMPLERS)
def test_another_sampler_than_the_policy_is_caught(how):
    policy = Bigrams()
    assert "samples follow the policy" in check_sampling(policy, policy.samples(), 1.0, most=400)
    with pytest.raises(ModelError, match="do not follow the policy") as caught:
        check_sampling(policy, policy.samples(SAMPLERS[how]), 1.0, most=400)
    assert caught.value.code == "E602"
    check_sampling(policy, policy.samples(SAMPLERS["a lower temperature"]), 0.7, most=400)  # where all agree on it


def test_a_right_sampler_has_mean_rank_one_half():
    """Over many short runs, of which none is stopped."""
    policy = Bigrams()
    said = [check_sampling(policy, policy.samples(count=8, tokens=3, seed=seed), 1.0) for seed in range(200)]
    found = [float(line.split("mean rank ")[1].split()[0]) for line in said]
    assert abs(np.mean(found) - 0.5) < 3 * np.std(found) / 200**0.5
    assert np.std(found) < 1.1 / (12 * 24) ** 0.5


def test_dropout_in_the_passes_is_caught(tiny_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    policy = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300, resid_pdrop=0.3)).eval()
    numerics = Numerics.of(policy)
    policy.train()  # what is sampled is sampled without it
    how = Episodes(numerics, max_tokens=5, samples=2)
    groups = collect(policy, policy, None, tiny_tokenizer, ASKED, JUDGE, how, coefficient=0.1, seed=0)
    made = ppo(numerics)
    with pytest.raises(ModelError, match="look for dropout"):
        check_rollout([made(policy, collate_rollouts(groups))], made)


@pytest.mark.parametrize("penalty", [-1.0, None])
def test_where_the_end_token_stands(penalty, models, tiny_tokenizer):
    """The same draws, and another of their tokens taken for the end: first, second, at the limit, never."""
    policy, reference, critic = models
    how = Episodes(Numerics.of(policy), max_tokens=5, missing_end=penalty, lam=0.8)

    def episode(end: int):
        tokenizer = deepcopy(tiny_tokenizer)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        made = collect(policy, reference, critic, tokenizer, ASKED[:1], JUDGE, how, coefficient=0.3, seed=6)
        return made[0]

    drawn = episode(2).completions[0].tolist()
    assert len(set(drawn)) == len(drawn) == 5 and 2 not in drawn
    for end, length in [(drawn[0], 1), (drawn[1], 2), (drawn[4], 5), (2, 5)]:
        group = episode(end)
        (ids,), prompt = group.completions, ASKED[0].ids.tolist()
        assert ids.tolist() == drawn[:length] and group.finished[0] == (end != 2)
        text = tiny_tokenizer.decode([*prompt, *(ids[:-1] if end != 2 else ids)])
        judged = float(len(text.removeprefix(tiny_tokenizer.decode(prompt)))) + (end != 2)
        score = judged if end != 2 or penalty is None else penalty
        assert group.scores.tolist() == [score]
        ratio = np.subtract(stock(policy, prompt, ids, 1.0), stock(reference, prompt, ids, 1.0))
        expected = oracle.advantages(oracle.rewards(score, ratio, 0.3), group.values.tolist(), 1.0, 0.8)
        np.testing.assert_allclose(group.returns - group.values, expected, atol=1e-3)


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
    assert health([good | {"ended": 0.1}] * 40, ends=False) == []
    steps = [good | {"policy/clipped": share} for share in (0.0, 0.5, 0.4)] * 10  # of three on each rollout
    assert health(steps, every=3) == [] and "learning rate" in health(steps[:-1] + steps[-2:-1], every=1)[0]
