"""Prompts and a reward to a policy: PPO under a KL penalty, as its authors ran it; without a critic RLOO and GRPO.

Each rollout is sampled from the policy as it is, scored, and trained on a few times over; checkpoints lie between
rollouts. Source: Ziegler et al. 2019, arXiv:1909.08593, and its code, with the details of Huang et al. 2024,
arXiv:2403.17031.
Departs: completions end at their end token instead of being cut behind it, which is the same law.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from palate.errors import UsageError
from palate.recipes.plan import plan_lines, preview, refuse_plan
from palate.recipes.rollouts import (
    Parts,
    build,
    check_room,
    evaluate,
    finish,
    horizon,
    is_model,
    penalty,
    read,
    refuse_other_reward,
    rollouts,
    sample,
)
from palate.recipes.training import (
    Ending,
    OwnBatches,
    TrainConfig,
    TrainingConfig,
    Watch,
    open_folder,
    prepare,
    train,
)
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
    epochs: Annotated[int, Field(gt=0, description="Passes over the prompts, each sampled anew")] = 8
    batch: Annotated[int, Field(gt=0, description="Episodes per rollout; published runs: 512")] = 256
    passes: Annotated[int, Field(ge=1, description="Passes over the episodes of a rollout")] = 4
    minibatches: Annotated[int, Field(ge=1, description="Optimizer steps per pass")] = 1
    max_tokens: Annotated[int, Field(ge=1, description="Tokens of a completion")] = 64
    temperature: Annotated[
        float, Field(gt=0, lt=math.inf, description="Of sampling, and in every log-prob; published runs: 0.7")
    ] = 1.0
    missing_end: Annotated[
        Literal["auto", "keep"] | float,
        Field(
            description="Score of a completion that does not end; keep: the judge's own; auto: -1 with a reward model"
        ),
    ] = "auto"
    kl_coef: Annotated[float, Field(ge=0, lt=math.inf, description="Reward lost per nat of KL; where it begins")] = 0.05
    target_kl: Annotated[
        float | None,
        Field(gt=0, lt=math.inf, description="Nats a completion that kl_coef steers to; default: it is fixed"),
    ] = None
    kl_horizon: Annotated[
        Literal["auto"] | Annotated[int, Field(gt=0)],
        Field(description="Episodes over which kl_coef follows --target-kl; auto: a hundredth of all, at most 10000"),
    ] = "auto"
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


def run(
    config: PpoConfig,
    *,
    verb: str = "ppo",
    argv=(),
    say=stderr,
    panel=None,
    stop: int | None = None,
    watch: Watch | None = None,
) -> dict:
    """Trains --model to complete the prompts of --data as --reward likes them; returns the result object of --json.

    stop, watch: as for `train`, in rollouts.
    """
    from palate.distributed import Ranks
    from palate.sampling.judge import open_judge
    from palate.train.objectives import ppo

    if Ranks.current().data_size > 1:
        raise UsageError("palate ppo runs in one process", code="E308", next="start it without torchrun")
    refuse_plan(config, verb)
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
        rate_of=rate,
    )
    check_room(config, prepared)
    every = config.passes * config.minibatches
    count = config.steps or config.epochs * -(-len(prepared.rows.train) * config.group // config.batch)
    prepared = replace(prepared, steps=count * every)
    if config.dry_run:
        return plan(config, prepared, count)
    say(f"plan: {count} rollouts of {config.batch} episodes, {every} optimizer steps on each")
    for line in chosen(config, count):
        say(f"plan: {line}")
    whitened = config.critic != "none" and config.minibatches == 1

    def inspect(step, outcomes) -> None:
        from palate.train.selfcheck import check_rollout

        if step == 1:
            say(check_rollout(outcomes, prepared.objective, whitened=whitened))

    def begin(run, groups, held):
        parts.run = run
        refuse_other_reward(config.reward, run)
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
        watch=watch,
        own=OwnBatches(partial(rollouts, config, prepared, parts, say), every, parts.critic),
        ending=Ending(
            evaluate=partial(evaluate, config, prepared, parts, say),
            sample=partial(sample, config, parts),
            save=partial(finish, config, parts),
        ),
    )


def chosen(config: PpoConfig, count: int) -> list[str]:
    """What stands for `auto` besides the rate, and why. count: rollouts."""
    lines = []
    if config.missing_end == "auto":
        why = "a reward model's have mean 0 and deviation 1" if is_model(config.reward) else "its scale is not known"
        lines.append(f"completions that do not end score {penalty(config) or 'as the judge says'} ({why})")
    if config.target_kl is not None and config.kl_horizon == "auto":
        episodes = horizon(config, count)
        lines.append(f"kl_coef follows --target-kl over {episodes:,} episodes ({count * config.batch:,} in all)")
    return lines


def rate(config: PpoConfig, parameters: int) -> tuple[float, str]:
    """The learning rate and the reason for it: the published ones, and for models that small none was published for."""
    if config.lr != "auto":
        return config.lr, "as given"
    bounds = ((10e6, 3e-4, "under 10 M parameters"), (1e9, 1e-5, "under 1 B"), (math.inf, 3e-6, "1 B or more"))
    found, reason = next((found, reason) for limit, found, reason in bounds if parameters < limit)
    return (found * 10, f"{reason}, times ten with LoRA") if config.lora_rank else (found, reason)


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
    )
    held = 1 + (not config.lora_rank) + (config.critic == "separate")
    lines.append(f"rollouts   {count} of {config.batch} episodes of at most {config.max_tokens} tokens")
    lines += [f"           {line}" for line in chosen(config, count)]
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
