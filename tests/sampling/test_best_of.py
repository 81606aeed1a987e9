"""The best of n: which one is kept, and that what is kept follows the law that the worlds know."""

import math

import numpy as np
import pytest
import torch

from palate.errors import UsageError
from palate.evaluation import exact
from palate.sampling.best_of import Best, best_of
from palate.sampling.generate import generate, text_of
from palate.sampling.judge import Completion, Judge
from palate.worlds import enumerable
from palate.worlds.enumerable import World


def test_the_first_of_the_best_is_kept_and_all_scores_are_told():
    judge = Judge("length", score=lambda prompts, completions: [len(c.text) + c.finished for c in completions])
    drawn = [[Completion("aa"), Completion("bb"), Completion("ccc", finished=False)], [Completion("d")]]
    assert best_of(judge, ["p", "q"], drawn) == [Best(0, (3, 3, 3)), Best(0, (2,))]
    assert best_of(judge, ["p"], [[Completion("aa", finished=False), Completion("b"), Completion("cc")]])[0].place == 2
    assert best_of(judge, [], []) == []


def test_each_completion_is_judged_under_its_own_prompt():
    judge = Judge("own", score=lambda prompts, completions: [p == c.text for p, c in zip(prompts, completions, strict=True)])  # fmt: skip  # noqa: E501
    drawn = [[Completion(text) for text in "abc"] for _ in "bca"]
    assert [best.place for best in best_of(judge, list("bca"), drawn)] == [1, 2, 0]
    assert [best.score for best in best_of(judge, list("bca"), drawn)] == [1, 1, 1]


def test_a_judge_that_only_compares_is_refused():
    judge = Judge("longer", choose=lambda prompts, firsts, seconds: [0.5] * len(prompts))
    with pytest.raises(UsageError, match="longer compares two completions") as caught:
        best_of(judge, ["p"], [[Completion("a")]])
    assert caught.value.code == "E308"


@pytest.mark.parametrize("n", [2, 4])
def test_what_is_kept_follows_the_exact_law(n):
    """Oracle 16: of sampled groups of n, frequencies and mean reward are those of F_i^n - F_(i-1)^n, ties included."""
    import transformers

    world, groups = World(3, 2, 2), 1500
    reward = world.reward(0)
    reward[:, 4] = reward[:, 7]  # two completions that are equally good
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(**world.llama(spread=0.15))
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokenizer = world.tokenizer()

    def score(prompts, completions):
        return [reward[world.place(p, c.text)] for p, c in zip(prompts, completions, strict=True)]

    made = generate(model, tokenizer, list(world.prompt_ids), max_tokens=world.length, samples=n * groups, seed=n)
    texts = [text_of(sample, world.prompt_ids[sample.prompt], tokenizer) for sample in made]
    drawn = [[Completion(text) for text in texts[at : at + n]] for at in range(0, len(texts), n)]
    prompts = [world.prompt(p) for p in range(world.prompts) for _ in range(groups)]
    found = best_of(Judge("true", score=score), prompts, drawn)

    ref = exact.table_of(model, world)
    law = enumerable.best_of(ref, reward, n)
    counts = np.zeros_like(law)
    for prompt, ours, best in zip(prompts, drawn, found, strict=True):
        counts[world.place(prompt, ours[best.place].text)] += 1
        assert best.score == max(best.scores)
    expected = groups * np.exp(law)
    freedom = counts.size - world.prompts
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi2 - freedom) < 3 * math.sqrt(2 * freedom)
    mean = (np.exp(law) * reward).sum(1)
    deviation = np.sqrt((np.exp(law) * reward**2).sum(1) - mean**2)
    sampled = (counts / groups * reward).sum(1)
    assert (np.abs(sampled - mean) < 3 * deviation / math.sqrt(groups)).all()
    assert (np.abs(sampled - (np.exp(ref) * reward).sum(1)) > 10 * deviation / math.sqrt(groups)).all()
    assert (enumerable.sequence_kl(law, ref) <= enumerable.best_of_kl_bound(n)).all()
