"""Where a frontier is measured: the world that can be listed, or anyone's model, prompts and reward.

Each ground belongs to a seed. It has the files that its cells train on, the reward that counts by name, the numbers of
any policy, and those of the best of n samples of the reference.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.errors import DataError, UsageError
from palate.recipes.verbs import Say

if TYPE_CHECKING:
    from palate.recipes.frontier import FrontierConfig

DEMONSTRATIONS = 8192  # that a reference of the enumerable world is trained on, once each
EVALUATION = 2**31  # added to the seeds of what is sampled to measure
PAIRS = 2**30  # and to those of what pairs are made of


@dataclass(frozen=True)
class Drawn:
    """What the pairs of a seed cost: completions drawn, and seconds for drawing and labelling them."""

    pairs: int
    samples: int
    seconds: float


class Listed:
    """The world that can be listed, with the reward that `seed` draws: every number is by enumeration.

    The reference learnt demonstrations of a language that the seed draws too. Pairs are drawn from its table.
    """

    held_pairs = "none"

    def __init__(self, config: "FrontierConfig", seed: int, out: Path):
        from palate.worlds.enumerable import World

        self.config, self.seed, self.folder = config, seed, out / f"seed-{seed}"
        self.world, self.reward = World(), f"enumerable:{seed}"
        self.pairs, self.prompts = str(self.folder / "pairs.jsonl"), str(self.folder / "prompts.jsonl")
        self.model, self.reward_model = (str(out / "cells" / f"{name},seed={seed}") for name in ("reference", "reward"))
        self.made_from = {"model": f"new:{self.folder / 'start'}", "data": str(self.folder / "demonstrations.jsonl")}

    def prepare(self) -> None:
        """Writes what the reference is made from."""
        rows = self.world.demonstrations(self.world.language(self.seed), DEMONSTRATIONS, self.seed)
        data = [{"prompt": row.prompt, "completion": row.completion} for row in rows]
        _write(self.made_from["data"], data)
        self.world.write_start(self.folder / "start", spread=0.1)

    def check(self, say: Say) -> None:
        """Nothing: all of it is made."""

    def open(self, say: Say) -> None:
        """Takes the reference."""
        from palate.evaluation.exact import table_of
        from palate.model.load import load

        self.reference = table_of(load(self.model, device=self.config.device).model, self.world)

    def draw(self, say: Say) -> Drawn:
        """Writes the pairs, labelled after Bradley and Terry, and the prompts."""
        count, began = self.config.value("pairs"), time.perf_counter()
        rows = self.world.pairs(self.reference, self.truth, count, self.seed, sharpness=self.config.value("sharpness"))
        _write(self.pairs, [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in rows])
        _write(self.prompts, [{"prompt": row.prompt} for row in self.world.prompt_records()])
        return Drawn(count, 2 * count, time.perf_counter() - began)

    @cached_property
    def truth(self):
        """The reward that counts: (P, K)."""
        return self.world.reward(self.seed)

    def measure(self, model) -> dict[str, Any]:
        """Exact reward and KL, averaged over prompts, and the most that any policy gets at this KL."""
        from palate.evaluation.exact import table_of

        return self._numbers(table_of(model, self.world))

    def at_start(self) -> dict[str, Any]:
        """The numbers of the reference."""
        return self._numbers(self.reference)

    def best_of(self, counts: Sequence[int]) -> list[dict[str, Any]]:
        """The numbers of the exact law of the best of n by the reward model, for each n."""
        import numpy as np

        from palate.model.reward import load_reward, rewards
        from palate.worlds.enumerable import best_of

        model, ids = load_reward(self.reward_model, device=self.config.device).model, self.world.completion_ids.tolist()
        rows = [[*prompt, *completion] for prompt in self.world.prompt_ids.tolist() for completion in ids]
        judged = np.array(rewards(model, rows)).reshape(self.truth.shape)
        return [self._numbers(best_of(self.reference, judged, n)) for n in counts]

    def exact(self, kls: Sequence[float]) -> list[tuple[float, float]]:
        """(KL, the most reward that any policy gets within it) at these and at many more between."""
        import numpy as np

        from palate.worlds.enumerable import best_reward, frontier

        curve = zip(*frontier(self.reference, self.truth, np.geomspace(30, 0.03, 60)), strict=True)
        points = [*curve, *((kl, best_reward(self.reference, self.truth, kl)) for kl in (0.0, *kls))]
        return sorted((float(kl), float(reward)) for kl, reward in points)

    def _numbers(self, table) -> dict[str, Any]:
        from palate.evaluation.exact import measure

        found = measure(table, self.reference, self.truth, 1.0)
        exact = {name: found[f"exact/{name}"] for name in ("reward", "kl", "win_rate", "best_reward")}
        exact |= {"reward_se": 0.0, "kl_se": 0.0, "ended": 1.0, "count": self.world.prompts}
        exact |= {f"{name}_{end}": exact[name] for name in ("reward", "kl") for end in ("low", "high")}
        return {f"eval/{name}": value for name, value in exact.items()}


class Sampled:
    """Anyone's model, prompts and reward: numbers are means over one sample of every held-out prompt, temperature 1.

    The samples are drawn with the same seed for every policy.
    """

    held_pairs, made_from = "auto", None

    def __init__(self, config: "FrontierConfig", seed: int, out: Path):
        self.config, self.seed, self.folder = config, seed, out / f"seed-{seed}"
        self.model, self.reward = config.value("model"), config.value("reward")
        self.reward_model = str(out / "cells" / f"reward,seed={seed}")
        self.prompts = str(self.folder / "prompts.jsonl")
        self.pairs = str(self.folder / "pairs.jsonl") if config.value("samples") else config.value("data")

    def prepare(self) -> None:
        """Nothing: the reference is there."""

    def check(self, say: Say) -> None:
        """Nothing, where model, files and reward can be read; else what they raise, before anything is written."""
        self.open(say)

    def open(self, say: Say) -> None:
        """Takes the reference, the held-out prompts and the judge."""
        from palate.data.sources import read_prompts
        from palate.data.tokens import end_tokens
        from palate.model.load import load
        from palate.recipes.compare import check_prompts
        from palate.recipes.verbs import with_own_tokenizer
        from palate.sampling.judge import open_judge

        self.loaded = with_own_tokenizer(load(self.model, device=self.config.device))
        self.judge = open_judge(self.reward, device=self.config.device)
        self.judge.require_scores("reward")
        self.ends = bool(end_tokens(self.loaded.tokenizer))
        held, trained = (read_prompts(self.config.value(name)) for name in ("prompts", "data"))
        if self.reward == "rule":
            check_prompts(self.judge, [*held, *trained])
        self.asked, self.trained = self._asked(held), self._asked(trained)
        known = {ask.text for ask in self.asked}
        if shared := sum(ask.text in known for ask in self.trained):
            say(f"prompts: {shared} of {len(self.trained)} prompts of --data are held out too, in --prompts")

    def draw(self, say: Say) -> Drawn:
        """Writes the pairs, made of own samples and ordered by the reward, and the prompts."""
        rows = [{"prompt": _plain(ask.text)} for ask in self.trained]
        _write(self.prompts, rows)
        samples, began = self.config.value("samples"), time.perf_counter()
        if not samples:
            return Drawn(0, 0, 0.0)
        texts, scores = self._samples(self.trained, samples, PAIRS, self.judge)
        rows = self._pairs(texts, scores)
        if not rows:
            if self.ends and not any(one.finished for row in texts for one in row):
                what = f"none of {len(self.trained) * samples} samples ended within {self.config.max_tokens} tokens"
                raise UsageError(what, where="max_tokens", code="E308", next="raise it")
            what = f"no two of {samples} samples of a prompt differ in --reward, so there are no pairs"
            raise DataError(
                what, where=self.config.value("data"), code="E601", next="give other prompts, or --samples 8"
            )
        _write(self.pairs, rows)
        say(f"pairs: {len(rows)} of {len(self.trained) * samples} samples of {len(self.trained)} prompts")
        return Drawn(len(rows), len(self.trained) * samples, time.perf_counter() - began)

    def measure(self, model) -> dict[str, Any]:
        """Reward and KL, with intervals, on one sample of every held-out prompt."""
        import numpy as np

        from palate.evaluation.frontier import numbers
        from palate.sampling.rollout import collect

        groups = collect(
            model, self.loaded.model, None, self.loaded.tokenizer, self.asked, self.judge, self._episodes,
            coefficient=0.0, seed=self._seed(EVALUATION), learn=False,
        )  # fmt: skip
        columns = [np.concatenate([getattr(g, name) for g in groups]) for name in ("scores", "kl", "finished")]
        return numbers(*columns, lengths=[len(group.completions[0]) for group in groups])

    def at_start(self) -> dict[str, Any]:
        """The numbers of the reference."""
        return self.measure(self.loaded.model)

    def best_of(self, counts: Sequence[int]) -> list[dict[str, Any]]:
        """The numbers of the best of n by the reward model, out of the most that is asked for, for each n.

        The KL is its largest, log n - (n - 1) / n: what equal samples take off is not known.
        """
        import numpy as np

        from palate.evaluation.frontier import expected_best, numbers
        from palate.sampling.judge import open_judge
        from palate.worlds.enumerable import best_of_kl_bound

        most = max(counts)
        reward_model = open_judge(self.reward_model, device=self.config.device)
        texts, values = self._samples(self.asked, most, EVALUATION, self.judge)
        prompts = [ask.text for ask in self.asked for _ in range(most)]
        judged = np.array(reward_model.scores(prompts, [one for row in texts for one in row])).reshape(-1, most)
        ended = [[one.finished for one in row] for row in texts]
        found = []
        for n in counts:
            bound = best_of_kl_bound(n)
            means = numbers(expected_best(judged, values, n), [bound] * len(values), ended, [0])
            found.append({key: value for key, value in means.items() if key not in ("eval/length", "eval/ended")})
        return found

    def exact(self, kls: Sequence[float]) -> list[tuple[float, float]]:
        """Nobody knows it."""
        return []

    def _samples(self, asked, samples: int, seed: int, judge) -> tuple[list, Any]:
        """Completions of the reference, a row a prompt, and what the judge says of them: (P, samples)."""
        import numpy as np

        from palate.data.tokens import end_tokens
        from palate.sampling.generate import generate, text_of
        from palate.sampling.judge import Completion

        tokenizer, ids = self.loaded.tokenizer, [ask.ids for ask in asked]
        made = generate(
            self.loaded.model, tokenizer, ids, max_tokens=self.config.max_tokens, samples=samples,
            seed=self._seed(seed), end_ids=end_tokens(tokenizer),
        )  # fmt: skip
        texts = [Completion(text_of(one, ids[one.prompt], tokenizer), one.finished) for one in made]
        scores = judge.scores([ask.text for ask in asked for _ in range(samples)], texts)
        rows = [texts[i : i + samples] for i in range(0, len(texts), samples)]
        return rows, np.array(scores).reshape(-1, samples)

    def _pairs(self, texts: Sequence, scores) -> list[dict[str, Any]]:
        """Every two samples of a prompt that differ in reward, as rows of pairs, at most --pairs of them.

        Samples that did not end are left out where the model has an end token: a file would end them.
        """
        from random import Random

        from palate.recipes.retain import spread
        from palate.sampling.judge import Completion

        draw, rows, sharpness = Random(self.seed), [], self.config.value("sharpness")
        for ask, row, values in zip(self.trained, texts, scores.tolist(), strict=True):
            whole: list[tuple[Completion, float]] = [
                (one, value) for one, value in zip(row, values, strict=True) if one.finished or not self.ends
            ]
            for first, second in combinations(whole, 2):
                if first[0].text == second[0].text or first[1] == second[1]:
                    continue
                won = draw.random() < _chance((first[1] - second[1]) * sharpness)
                better, worse = (first[0], second[0]) if won else (second[0], first[0])
                rows.append({"prompt": _plain(ask.text)} | _sides(ask.text, better.text, worse.text))
        return spread(rows, self.config.value("pairs"))

    @cached_property
    def _episodes(self):
        from palate.sampling.rollout import Episodes
        from palate.scoring import Numerics

        return Episodes(Numerics.of(self.loaded.model), self.config.max_tokens, missing_end=None)

    def _seed(self, which: int) -> int:
        return (self.seed << 32) + which

    def _asked(self, records) -> list:
        from palate.data.tokens import encode_prompt
        from palate.model.load import context
        from palate.sampling.rollout import Asked

        distinct = list({record.prompt: record for record in records}.values())
        tokenizer, bound = self.loaded.tokenizer, context(self.loaded.model)
        asked = [Asked(encode_prompt(r.prompt, tokenizer, where=str(r.source)), r.prompt) for r in distinct]
        longest = max((len(ask.ids) for ask in asked), default=0)
        if bound is not None and longest + self.config.max_tokens > bound:
            what = (
                f"the longest prompt, {longest} tokens, and {self.config.max_tokens} more exceed the context of {bound}"
            )
            raise UsageError(what, where="max_tokens", code="E308", next="lower it, or leave long prompts out")
        return asked


def ground_of(config: "FrontierConfig", seed: int, out: Path) -> Listed | Sampled:
    """The ground of this seed, its files below `out`."""
    return (Listed if config.world == "enumerable" else Sampled)(config, seed, out)


def _chance(gap: float) -> float:
    import math

    return 1.0 if gap > 36 else 0.0 if gap < -36 else 1 / (1 + math.exp(-gap))


def _plain(prompt):
    from palate.recipes.generate import plain_prompt

    return plain_prompt(prompt)


def _sides(prompt, better: str, worse: str) -> dict[str, Any]:
    """A row's two completions, as messages where its prompt is messages."""
    if isinstance(prompt, str):
        return {"chosen": better, "rejected": worse}
    return {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", better), ("rejected", worse))}


def _write(path: str | Path, rows: list[dict[str, Any]]) -> None:
    from palate.files import make_folder, write_json_lines

    make_folder(Path(path).parent)
    write_json_lines(Path(path), rows)
