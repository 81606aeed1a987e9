"""Prompts and a reward to a policy: PPO under a KL penalty, as its authors ran it; without a critic RLOO and GRPO.

Each rollout is sampled from the policy as it is, scored, and trained on a few times over; checkpoints lie between
rollouts. Source: Ziegler et al. 2019, arXiv:1909.08593, and its code, with the details of Huang et al. 2024,
arXiv:2403.17031.
Departs: completions end at their end token instead of being cut behind it, which is the same law.
"""

import copy
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from palate.errors import CheckpointError, ModelError, UsageError
from palate.recipes.plan import plan_lines, preview
from palate.recipes.training import Ending, OwnBatches, TrainConfig, TrainingConfig, open_folder, prepare, train
from palate.recipes.verbs import number, stderr


class PpoTrainConfig(TrainConfig):
    """How the steps are taken; defaults of the published runs."""

    schedule: Annotated[
        Literal["constant", "linear", "cosine"], Field(description="After warm-up: constant, or falling to zero")
    ] = "linear"
    warmup_steps: Annotated[int | None, Field(ge=0, description="Steps from zero to the peak rate")] = 0
    eps: Annotated[float, Field(gt=0, lt=1, description="Added to the root of the second moment")] = 1e-5


class PpoConfig(TrainingConfig):
    """Options of `palate ppo`."""

    reward: Annotated[str, Field(description="What is rewarded: a reward model's folder, rule, or module:function")]
    critic: Annotated[
        Literal["separate", "trunk", "none"],
        Field(
            description="Value model of its own (begun from the reward model if it is one), a head on the policy, none"
        ),
    ] = "separate"
    group: Annotated[int, Field(ge=1, description="Samples of each prompt; without a critic at least 2")] = 1
    advantage: Annotated[Literal["rloo", "grpo"], Field(description="Of samples of one prompt, without a critic")] = (
        "rloo"
    )
    steps: Annotated[int | None, Field(gt=0, description="Rollouts; wins over epochs")] = None
    epochs: Annotated[int, Field(gt=0, description="Passes over the prompts, each sampled anew")] = 1
    batch: Annotated[int, Field(gt=0, description="Episodes per rollout")] = 64
    passes: Annotated[int, Field(ge=1, description="Passes over the episodes of a rollout")] = 4
    minibatches: Annotated[int, Field(ge=1, description="Optimizer steps per pass")] = 1
    max_tokens: Annotated[int, Field(ge=1, description="Tokens of a completion")] = 64
    temperature: Annotated[
        float, Field(gt=0, lt=math.inf, description="Of sampling, and in every log-prob; published runs: 0.7")
    ] = 1.0
    missing_end: Annotated[
        Literal["keep"] | float, Field(description="Score of a completion that does not end; keep: the judge's own")
    ] = -1.0
    kl_coef: Annotated[float, Field(ge=0, lt=math.inf, description="Reward lost per nat of KL; where it begins")] = 0.05
    target_kl: Annotated[
        float | None,
        Field(gt=0, lt=math.inf, description="Nats a completion that kl_coef steers to; default: it is fixed"),
    ] = None
    kl_horizon: Annotated[int, Field(gt=0, description="Episodes over which kl_coef follows --target-kl")] = 10_000
    gamma: Annotated[float, Field(ge=0, le=1, description="Discount per token")] = 1.0
    lam: Annotated[float, Field(ge=0, le=1, description="Decay of generalised advantages")] = 0.95
    clip: Annotated[float, Field(gt=0, lt=1, description="How far the ratio to the sampling policy counts")] = 0.2
    value_clip: Annotated[float, Field(gt=0, lt=math.inf, description="How far a value may move in one rollout")] = 0.2
    value_weight: Annotated[float, Field(ge=0, lt=math.inf, description="Of the value loss")] = 0.1
    whiten_rewards: Annotated[bool, Field(description="Scale each rollout's rewards to variance 1")] = False
    train: PpoTrainConfig = PpoTrainConfig()

    @model_validator(mode="after")
    def _fits(self):
        if self.critic == "none" and self.group < 2:
            what = "without a critic samples are judged by others of their prompt, and there are none"
            raise UsageError(what, where="group", code="E308", next="give --group 4, or a critic")
        if self.batch % self.group:
            what = f"{self.batch} episodes are no whole number of groups of {self.group}"
            raise UsageError(what, where="batch", code="E308", next=f"use a multiple of {self.group}")
        if self.batch // self.group < self.minibatches:
            what = f"{self.minibatches} minibatches need as many prompts, a rollout has {self.batch // self.group}"
            raise UsageError(what, where="minibatches", code="E308", next="lower it, or raise --batch")
        return self


@dataclass
class Parts:
    """What the page holds besides the policy: the judge, each prompt's text, reference, critic, the run once begun."""

    judge: Any
    texts: dict[str, Any] = field(default_factory=dict)
    reference: Any = None
    critic: Any = None
    run: Any = None
    said: list[str] = field(default_factory=list)


def run(config: PpoConfig, *, verb: str = "ppo", argv=(), say=stderr, panel=None, stop: int | None = None) -> dict:
    """Trains --model to complete the prompts of --data as --reward likes them; returns the result object of --json.

    stop: as for `train`, in rollouts.
    """
    from palate.distributed import Ranks
    from palate.sampling.judge import open_judge
    from palate.train.objectives import ppo

    if Ranks.current().data_size > 1:
        raise UsageError("palate ppo runs in one process", code="E308", next="start it without torchrun")
    out, ended = open_folder(config, verb, say)
    if ended is not None:
        return ended
    parts = Parts(open_judge(config.reward, device=config.device))
    if not parts.judge.scores_alone:
        what = f"{config.reward} compares two completions, it gives none a score"
        raise UsageError(what, where="reward", code="E308", next="take a reward of one completion")
    prepared = prepare(
        config,
        partial(read, config, parts),
        lambda numerics: ppo(
            replace(numerics, temperature=config.temperature),
            parts.critic,
            clip=config.clip,
            value_clip=config.value_clip,
            value_weight=config.value_weight,
        ),
        usable=lambda group: None if len(group.prompt) else "prompts without a token",
        say=say,
        built=partial(build, config, parts, say),
    )
    check_room(config, prepared)
    every = config.passes * config.minibatches
    count = config.steps or config.epochs * -(-len(prepared.rows.train) * config.group // config.batch)
    prepared = replace(prepared, steps=count * every)
    if config.dry_run:
        return plan(config, prepared, count)
    say(f"plan: {count} rollouts of {config.batch} episodes, {every} optimizer steps on each")
    whitened = config.critic != "none" and config.minibatches == 1

    def inspect(step, outcomes) -> None:
        from palate.train.selfcheck import check_rollout

        if step == 1:
            say(check_rollout(outcomes, prepared.objective, whitened=whitened))

    def begin(run, groups, held):
        parts.run = run
        refuse_other_reward(config, run)
        return groups, held, {}, inspect

    return train(
        config,
        verb,
        out,
        prepared,
        argv=argv,
        say=say,
        panel=panel,
        annotate=begin,
        better="eval/reward",
        verdict=verdict,
        stop=None if stop is None else stop * every,
        own=OwnBatches(partial(rollouts, config, prepared, parts), every, parts.critic),
        ending=Ending(evaluate=partial(evaluate, config, prepared, parts, say), save=partial(finish, parts)),
    )


def read(config: PpoConfig, parts: Parts, data: str):
    """The prompts of a file; their texts are kept for the judge."""
    from palate.data.sources import read_prompts

    records = read_prompts(data, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows)
    parts.texts |= {str(record.source): record.prompt for record in records}
    return records


def build(config: PpoConfig, parts: Parts, say, loaded):
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


def from_reward(config: PpoConfig, loaded, say):
    """The reward model as a critic, if --reward is one and reads the policy's own tokens; else None, said."""
    from palate.model.load import check_same_tokenizer
    from palate.model.reward import load_reward

    if not Path(config.reward).expanduser().is_dir():
        return None
    found = load_reward(config.reward, device=loaded.model.device)
    try:
        check_same_tokenizer(loaded.tokenizer, found.tokenizer)
    except ModelError as error:
        say(f"critic: begun from the policy, for the reward model has another tokenizer ({error.what})")
        return None
    return found.model


def refuse_other_reward(config: PpoConfig, run) -> None:
    """Writes down what is rewarded by; on resume CheckpointError (E502) where its weights or its source changed."""
    now = reward_identity(config.reward)
    began = run.record.get("reward")
    if began is None:
        run.status("running", reward=now)
    elif began != now:
        what = "what --reward names has changed since the run began"
        raise CheckpointError(what, where=config.reward, code="E502", next="put it back, or take a new --out")


def reward_identity(name: str) -> str:
    """The name of a reward, with the SHA-256 of a model's weights and config, or of a function's module."""
    import sys

    folder = Path(name).expanduser()
    if folder.is_dir():
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


def check_room(config: PpoConfig, prepared) -> None:
    """Nothing, where each prompt leaves room for a completion; else UsageError (E308)."""
    from palate.model.load import context

    bound = context(prepared.loaded.model)
    longest = max(len(group.prompt) for group in [*prepared.rows.train, *prepared.rows.held])
    if bound is not None and longest + config.max_tokens > bound:
        what = (
            f"the longest prompt, {longest} tokens, and --max-tokens {config.max_tokens} exceed the context of {bound}"
        )
        hint = f"use --max-length {max(2, bound - config.max_tokens)}, which cuts prompts at their start"
        raise UsageError(what, where="max_tokens", code="E308", next=hint)


def episodes(config: PpoConfig, prepared):
    """How the run's episodes are made."""
    from palate.sampling.rollout import Episodes

    return Episodes(
        numerics=prepared.objective.numerics,
        max_tokens=config.max_tokens,
        samples=config.group,
        missing_end=None if config.missing_end == "keep" else float(config.missing_end),
        gamma=config.gamma,
        lam=config.lam,
        whiten_rewards=config.whiten_rewards,
        groups=config.advantage,
        tokens=config.train.tokens,
    )


def rollouts(config: PpoConfig, prepared, parts: Parts, state) -> Iterator:
    """Step batches, a rollout's after another's: each is sampled when the last update on the one before it is done.

    All that they depend on besides the weights is the seed, the number of the rollout, and the KL coefficient, which
    goes from checkpoint to checkpoint in the cursor.
    """
    from palate.data.batch import collate_rollouts, stream_length
    from palate.data.stream import StepBatch, order, pack
    from palate.losses.policy import KlController
    from palate.sampling.rollout import Asked, collect

    rows, each, how = prepared.rows.train, config.batch // config.group, episodes(config, prepared)
    every = config.passes * config.minibatches
    controller = KlController(state.cursor.get("kl_coef", config.kl_coef), config.target_kl, config.kl_horizon)
    for rollout in range(state.step // every, prepared.steps // every):
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


def evaluate(config: PpoConfig, prepared, parts: Parts, say, model, held, objective, *, tokens: int) -> dict[str, Any]:
    """Reward, KL, length and ended share of one sample of each held-out prompt, of the same seed each time."""
    import numpy as np

    from palate.evaluation.policy import health
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
    for word in health(parts.run.metrics()):
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


def finish(parts: Parts, run, model, tokenizer, held) -> dict[str, Any]:
    """Writes `model/`; the words about the run's health and its last KL coefficient are facts of the result."""
    from palate.evaluation.policy import health
    from palate.recipes.training import save_policy

    lines = [line for line in run.metrics() if "loss" in line]
    return save_policy(run, model, tokenizer, held) | {"health": health(lines), "kl_coef": lines[-1]["kl_coef"]}


def plan(config: PpoConfig, prepared, count: int) -> dict[str, Any]:
    """The plan of the run, before anything is sampled or written."""
    lines = plan_lines(
        config,
        prepared.loaded,
        prepared.rows,
        steps=prepared.steps,
        rate=prepared.rate,
        reason=prepared.reason,
        precision=prepared.precision,
        objective=prepared.objective,
        seconds=None,
    )
    held = 1 + (not config.lora_rank) + (config.critic == "separate")
    lines.append(f"rollouts   {count} of {config.batch} episodes of at most {config.max_tokens} tokens")
    lines.append(f"models     {held} of the policy's size (policy, reference, critic), and what rewards")
    lines += [line for group in prepared.rows.train[:2] for line in preview(prepared.loaded.tokenizer, group)]
    return {"plan": lines, "steps": prepared.steps, "rollouts": count, "rows": prepared.rows.counts, "summary": lines}


def verdict(before: dict, after: dict) -> tuple[bool, str]:
    """Better: held-out reward rose by more than chance would have it (two samples' normal interval)."""
    if after.get("eval/reward") is None:
        return False, "no held-out prompts, so nothing is shown"
    rise = after["eval/reward"] - before["eval/reward"]
    errors = (before.get("eval/reward_se"), after.get("eval/reward_se"))
    slack = 1.96 * math.hypot(*errors) if None not in errors else math.inf
    word = "better" if rise > slack else "worse" if rise < -slack else "not shown to be better"
    return rise > slack, (
        f"{word}: held-out reward {number(before['eval/reward'], '.3f')} to {number(after['eval/reward'], '.3f')} "
        f"(rise {rise:.3f} [{rise - slack:.3f}, {rise + slack:.3f}]) on {after['eval/count']:.0f} prompts, KL "
        f"{number(after['eval/kl'], '.2f')} nats a completion, {after['eval/ended']:.0%} end by themselves"
    )
