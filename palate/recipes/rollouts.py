"""What palate ppo does between updates: the models beside the policy, rollouts, evaluation, what is rewarded."""

import copy
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.errors import CheckpointError, ModelError, UsageError

if TYPE_CHECKING:
    from palate.recipes.ppo import PpoConfig


@dataclass
class Parts:
    """What the page holds besides the policy: the judge, each prompt's text, reference, critic, the run once begun."""

    judge: Any
    texts: dict[str, Any] = field(default_factory=dict)
    reference: Any = None
    critic: Any = None
    run: Any = None
    said: list[str] = field(default_factory=list)


def read(config: "PpoConfig", parts: Parts, data: str):
    """The prompts of a file; their texts are kept for the judge."""
    from palate.data.sources import read_prompts

    records = read_prompts(data, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows)
    parts.texts |= {str(record.source): record.prompt for record in records}
    return records


def build(config: "PpoConfig", parts: Parts, say, loaded):
    """The loaded policy; its start is kept as the reference (an adapter has it inside), and the critic is made."""
    from torch import nn

    from palate.model.adapters import add_lora
    from palate.model.heads import scale_head, with_scalar_head

    model = loaded.model
    if not config.lora_rank:
        parts.reference = copy.deepcopy(model).requires_grad_(False).eval()
    if config.critic == "trunk":
        parts.critic = nn.Linear(model.config.get_text_config(decoder=True).hidden_size, 1).to(model.device)
        nn.init.zeros_(parts.critic.weight)
        nn.init.zeros_(parts.critic.bias)
    elif config.critic == "separate":
        critic = from_reward(config, loaded, say)
        if critic is None:
            critic = with_scalar_head(copy.deepcopy(model))
            scale_head(critic, 0.0)  # values begin at 0
        parts.critic = add_lora(critic, config.lora_rank, seed=config.seed) if config.lora_rank else critic
    return loaded


def from_reward(config: "PpoConfig", loaded, say):
    """The reward model as a critic, if --reward is one and reads the policy's own tokens; else None, said."""
    from palate.model.load import check_same_tokenizer
    from palate.model.reward import load_reward

    if not is_model(config.reward):
        return None
    found = load_reward(config.reward, device=loaded.model.device)
    try:
        check_same_tokenizer(loaded.tokenizer, found.tokenizer)
    except ModelError as error:
        say(f"critic: begun from the policy, for the reward model has another tokenizer ({error.what})")
        return None
    return found.model


def is_model(reward: str) -> bool:
    """Whether a reward of this name is a reward model's folder."""
    return Path(reward).expanduser().is_dir()


def refuse_other_reward(name: str, run, option: str = "reward") -> None:
    """Writes down what is rewarded by; on resume CheckpointError (E502) where its weights or its source changed."""
    now = reward_identity(name)
    began = run.record.get("reward")
    if began is None:
        run.status("running", reward=now)
    elif began != now:
        what = f"what --{option} names has changed since the run began"
        raise CheckpointError(what, where=name, code="E502", next="put it back, or take a new --out")


def reward_identity(name: str) -> str:
    """The name of a reward, with the SHA-256 of a model's weights and config, or of a function's module."""
    import sys

    if is_model(name):
        folder = Path(name).expanduser()
        folder = folder if (folder / "config.json").is_file() else folder / "model"  # of a run
        paths = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    else:
        module = sys.modules.get(name.rpartition(":")[0])
        paths = [Path(module.__file__)] if module is not None and module.__file__ else []
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{name} {digest.hexdigest()}"


def check_room(config, prepared, bound: int | None = None) -> None:
    """Nothing, where each prompt leaves room for a completion; else UsageError (E308). bound: default, the context."""
    from palate.data.table import Lengths, joined
    from palate.model.load import context

    bound = bound or context(prepared.loaded.model)
    longest = int(Lengths.of(joined(prepared.rows.train, prepared.rows.held)).prompt.max())
    if bound is not None and longest + config.max_tokens > bound:
        what = f"the longest prompt, {longest} tokens, and --max-tokens {config.max_tokens} exceed the limit of {bound}"
        hint = f"use --max-length {max(2, bound - config.max_tokens)}, which cuts prompts at their start"
        raise UsageError(what, where="max_tokens", code="E308", next=hint)


def episodes(config: "PpoConfig", prepared):
    """How the run's episodes are made."""
    from palate.sampling.rollout import Episodes

    return Episodes(
        numerics=prepared.objective.numerics,
        max_tokens=config.max_tokens,
        samples=config.group,
        missing_end=penalty(config),
        gamma=config.gamma,
        lam=config.lam,
        whiten_rewards=config.whiten_rewards,
        groups=config.advantage,
        tokens=config.train.tokens,
    )


def penalty(config: "PpoConfig") -> float | None:
    """The score of a completion without end token; None for the judge's own."""
    if config.missing_end == "auto":
        return -1.0 if is_model(config.reward) else None
    return None if config.missing_end == "keep" else float(config.missing_end)


def horizon(config: "PpoConfig", count: int) -> int:
    """Episodes over which the KL coefficient follows its target, in a run of `count` rollouts.

    Departs: the published 10,000 are a hundredth of a million episodes; in a short run they would move nothing.
    """
    if config.kl_horizon != "auto":
        return config.kl_horizon
    return min(10_000, max(config.batch, count * config.batch // 100))


def rollouts(config: "PpoConfig", prepared, parts: Parts, say, state) -> Iterator:
    """Step batches, a rollout's after another's: each is sampled when the last update on the one before it is done.

    All that they depend on besides the weights is the seed, the number of the rollout, and the KL coefficient, which
    goes from checkpoint to checkpoint in the cursor. Before the first update the sampler is held to the policy's law.
    """
    from palate.data.batch import collate_rollouts, stream_length
    from palate.data.stream import StepBatch, order, pack
    from palate.losses.policy import KlController
    from palate.sampling.rollout import Asked, collect
    from palate.train.selfcheck import check_sampling

    rows, each, how = prepared.rows.train, config.batch // config.group, episodes(config, prepared)
    every = config.passes * config.minibatches
    count = prepared.steps // every
    start = state.cursor.get("kl_coef", config.kl_coef)
    controller = KlController(start, config.target_kl, horizon(config, count))
    for rollout in range(state.step // every, count):
        started = time.perf_counter()
        places = [divmod(rollout * each + i, len(rows)) for i in range(each)]
        epochs = {epoch: order(len(rows), config.seed, epoch) for epoch, _ in places}
        taken = [int(epochs[epoch][place]) for epoch, place in places]
        groups = collect(
            state.model,
            parts.reference,
            parts.critic,
            prepared.loaded.tokenizer,
            [Asked(rows[row].prompt, parts.texts[str(rows[row].source)]) for row in taken],
            parts.judge,
            how,
            coefficient=controller.coefficient,
            seed=(config.seed << 32) + rollout,
        )
        if rollout == 0:
            say(check_sampling(state.model, groups, config.temperature))
        groups = [replace(group, source=rows[row].source) for group, row in zip(groups, taken, strict=True)]
        kl = [float(value) for group in groups for value in group.kl]
        controller = controller.after(sum(kl) / len(kl), len(kl))
        for step in range(rollout * every, (rollout + 1) * every):
            once, part = divmod(step, config.minibatches)
            mixed = order(each, config.seed, once) if config.minibatches > 1 else range(each)
            mine = [groups[i] for i in mixed[part :: config.minibatches]]
            cut = pack([stream_length(group) for group in mine], config.train.tokens)
            micro = tuple(collate_rollouts([mine[i] for i in indices]) for indices in cut)
            cursor = {"step": step + 1, "rollout": rollout + 1, "kl_coef": controller.coefficient}
            seconds = 0.0 if step % every else time.perf_counter() - started  # of sampling and judging
            yield StepBatch(micro, sum(batch.units for batch in micro), tuple(taken), cursor, seconds)


def evaluate(
    config: "PpoConfig", prepared, parts: Parts, say, model, held, objective, *, tokens: int
) -> dict[str, Any]:
    """Reward, KL, length and ended share of one sample of each held-out prompt, of the same seed each time."""
    import numpy as np

    from palate.sampling.rollout import Asked, collect

    asked = [Asked(group.prompt, parts.texts[str(group.source)]) for group in held]
    how = replace(episodes(config, prepared), samples=1)
    groups = collect(
        model, parts.reference, None, prepared.loaded.tokenizer, asked, parts.judge, how,
        coefficient=0.0, seed=(config.seed << 32) + 2**31, learn=False,
    )  # fmt: skip
    scores, kl, finished = (
        np.concatenate([getattr(group, name) for group in groups]) for name in ("scores", "kl", "finished")
    )
    error = float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else math.inf
    for word in words(config, parts):
        if word not in parts.said:
            parts.said.append(word)
            say(f"health: {word}")
    return {
        "eval/reward": float(scores.mean()),
        "eval/reward_se": error,
        "eval/reward_low": float(scores.mean()) - 1.96 * error,
        "eval/reward_high": float(scores.mean()) + 1.96 * error,
        "eval/kl": float(kl.mean()),
        "eval/ended": float(finished.mean()),
        "eval/length": float(np.mean([len(group.completions[0]) for group in groups])),
        "eval/count": len(groups),
    }


def sample(
    config: "PpoConfig", parts: Parts, model, tokenizer, groups, step: int, before: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Rows for samples.jsonl, as `training.sample_rows` makes them: with prompts as they were written, and scored by
    what rewards; `reward_before` is of the completion that stands beside the new one."""
    from palate.data.records import plain
    from palate.recipes.training import sample_rows
    from palate.sampling.judge import Completion

    rows = sample_rows(model, tokenizer, groups, step, before)
    asked = [parts.texts[str(group.source)] for group in groups]
    said = [Completion(row["after"] if before else row["before"], row["scores"]["finished"]) for row in rows]
    for place, (row, text, reward) in enumerate(zip(rows, asked, parts.judge.scores(asked, said), strict=True)):
        row["prompt"] = plain(text)
        row["scores"] |= {"reward": reward}
        row["scores"] |= {"reward_before": before[place]["scores"].get("reward")} if before else {}
    return rows


def words(config: "PpoConfig", parts: Parts) -> list[str]:
    """What there is to say of the run's health so far; written into its record, for the report."""
    from palate.evaluation.policy import health

    every = config.passes * config.minibatches
    found = health(parts.run.metrics(), every=every, ends=penalty(config) is not None)
    parts.run.status("running", health=found)
    return found


def finish(config: "PpoConfig", parts: Parts, run, model, tokenizer, held) -> dict[str, Any]:
    """Writes `model/`; the words about the run's health and its last KL coefficient are facts of the result."""
    from palate.recipes.training import save_policy

    last = [line for line in run.metrics() if "loss" in line][-1]
    return save_policy(run, model, tokenizer, held) | {"health": words(config, parts), "kl_coef": last["kl_coef"]}
