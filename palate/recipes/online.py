"""Online DPO: samples of the policy as it is, put in order by a judge, trained on at once; then samples again.

The engine of rounds with rounds of one batch: sample, judge and pair are its stages, their files and the chain of
manifests its own. What differs, because rounds are many and small: one optimizer goes through all of them, since a
fresh one would forget its moments at every step; the model of a round stands in the run's checkpoints alone; and the
reference is the start throughout, for from the model of its own round a single step would begin at margin 0, where
beta is no more than a factor of the rate and nothing holds the policy near anything.
Source: Guo et al. 2024, arXiv:2402.04792 (OAIF), whose reference is the start too; two samples a prompt, one step.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

from pydantic import Field, model_validator

from palate.errors import UsageError
from palate.recipes import chain, stages
from palate.recipes.contest import against_start, opened
from palate.recipes.plan import plan_lines, refuse_plan
from palate.recipes.rounds import Band, OwnSamplesConfig, Round, Way, all_done, by
from palate.recipes.training import Ending, OwnBatches, open_folder, prepare, save_policy, train
from palate.recipes.verbs import max_length, number, stderr

BARREN = 256  # prompts without a single pair after which nothing more is expected of the judge


class OnlineConfig(OwnSamplesConfig):
    """Options of `palate online-dpo`."""

    judge: Annotated[
        str,
        Field(
            description="Labels: rule, random, implicit:RUN, a reward model's folder, policy:MODEL, "
            "people:VOTES.jsonl, module:function"
        ),
    ]
    candidates: Annotated[int, Field(ge=2, description="Samples of each prompt; the best is held to the worst")] = 2
    length_control: Band = None
    loss: Annotated[str, Field(description="A loss of the pairwise family, such as dpo, ipo, hinge")] = "dpo"
    loss_options: Annotated[
        dict[str, float | bool | int], Field(description="Options of the loss, by its own names")
    ] = {}
    beta: Annotated[float | None, Field(description="Short for loss_options.beta")] = None
    eval: Annotated[str, Field(description="Held-out prompts; auto: 5 % of those of --data, at most 300; none")] = (
        "auto"
    )
    epochs: Annotated[int, Field(gt=0, description="Passes over the prompts, each sampled anew")] = 1
    steps: Annotated[
        int | None, Field(gt=0, description="Rounds, of one batch and one step each; wins over epochs")
    ] = None
    batch: Annotated[int, Field(gt=0, description="Prompts of a round")] = 64

    @model_validator(mode="after")
    def _judged(self):
        if self.eval_judge is not None and self.eval == "none":
            what = "has nothing to judge: no prompts are held out"
            raise UsageError(what, where="eval_judge", code="E316", next="leave --eval out")
        return self

    @property
    def reference(self) -> None:
        """No option of this verb: the reference is the start."""
        return None


@dataclass
class Parts:
    """What the page holds besides the policy: the judge, the records by their place, the reference, the run.

    last: the numbers of the last evaluation. over: why no further round is gone, once that is so.
    """

    judge: Any
    records: dict[str, Any] = field(default_factory=dict)
    reference: Any = None
    run: Any = None
    last: dict[str, Any] = field(default_factory=dict)
    over: str | None = None


@dataclass(frozen=True)
class Now:
    """The policy as it stands in a round. fingerprint: it is what the run's start becomes in so many steps."""

    model: Any
    tokenizer: Any
    fingerprint: str


def run(config: OnlineConfig, *, verb: str = "online-dpo", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """Trains --model on what --judge says of its own samples of the prompts of --data; the result object of --json."""
    from palate.distributed import Ranks
    from palate.recipes.rollouts import check_room
    from palate.sampling.judge import open_judge
    from palate.train.objectives import objective

    options = check_loss(config)
    if Ranks.current().data_size > 1:
        raise UsageError(f"palate {verb} runs in one process", code="E308", next="start it without torchrun")
    refuse_plan(config, verb)
    out, ended = open_folder(config, verb, say)
    if ended is not None:
        return ended
    chain.verify(out)
    parts = Parts(open_judge(config.judge, device=config.device, seed=config.seed))
    prepared = prepare(
        config,
        partial(read, config, parts),
        lambda numerics: objective(config.loss, numerics, **options),
        usable=lambda group: "prompts cut by --max-length" if group.prompt_cut else None,
        say=say,
        built=partial(build, config, parts),
    )
    check_room(config, prepared, max_length(config, prepared.loaded.model))
    held = [parts.records[str(group.source)] for group in prepared.rows.held]
    if held:
        opened(config, held)  # before anything is written
    if config.dry_run:
        return plan(config, prepared)
    say(f"plan: {config.candidates} samples of each of {config.batch} prompts a round, judged by {config.judge}")
    return train(
        config,
        verb,
        out,
        prepared,
        argv=argv,
        say=say,
        panel=panel,
        annotate=partial(begin, config, prepared, parts, say),
        better="eval/win_rate",
        verdict=partial(verdict, config, parts),
        own=OwnBatches(partial(rounds, config, prepared, parts), over=lambda: parts.over),
        ending=Ending(evaluate=partial(evaluate, config, prepared, parts), save=partial(finish, config, parts)),
    )


def check_loss(config: OnlineConfig) -> dict[str, Any]:
    """Every option of the loss. Raises UsageError for one that is not of the pairwise family."""
    from palate import losses
    from palate.recipes.preference import loss_options

    options = loss_options(config)
    if losses.info(config.loss).kind != "pairwise":
        what = f'loss "{config.loss}" is not one of pairs'
        raise UsageError(what, where="loss", code="E308", next="use dpo, ipo or another pairwise loss")
    return options


def read(config: OnlineConfig, parts: Parts, data: str):
    """The prompts of a file; kept as they were read, for the judge."""
    from palate.data.sources import read_prompts
    from palate.recipes.generate import check_prompts

    records = read_prompts(data, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows)
    if config.judge == "rule":
        check_prompts(parts.judge, records)
    parts.records |= {str(record.source): record for record in records}
    return records


def build(config: OnlineConfig, parts: Parts, loaded):
    """The loaded policy; its start is kept as the reference, which an adapter has inside."""
    if not config.lora_rank:
        parts.reference = copy.deepcopy(loaded.model).requires_grad_(False).eval()
    return loaded


def begin(config: OnlineConfig, prepared, parts: Parts, say, run, groups, held):
    """What the run holds on to, and the check of the first step: policy and reference are one there."""
    from palate.recipes.rollouts import refuse_other_reward
    from palate.train.selfcheck import check_start

    refuse_other_reward(config.judge, run, "judge")
    parts.run = run

    def inspect(step, outcomes) -> None:
        if step == 1 and prepared.objective.reference:
            say(str(check_start(outcomes, prepared.objective, lambda: "dropout, or another source of chance")))

    return groups, held, {}, inspect


# --- rounds ----------------------------------------------------------------------------------------------------------


def rounds(config: OnlineConfig, prepared, parts: Parts, state) -> Iterator:
    """Step batches, one round's after another's: each is sampled from the policy once the step before it is done.

    What a round holds depends on the weights, the seed and its number alone. A round without pairs takes no step.
    """
    from palate.data.batch import stream_length
    from palate.data.stream import StepBatch, pack

    evals = [line for line in parts.run.metrics() if "eval/count" in line]
    parts.last, done, barren = evals[-1] if evals else {}, state.cursor.get("round", 0), 0
    while state.step < prepared.steps and (stopped := stop(config, prepared, parts, barren)) is None:
        done, began = done + 1, time.perf_counter()
        groups, taken, facts = one_round(config, prepared, parts, state, done)
        if not groups:
            barren += config.batch
            continue
        barren = 0
        cut = pack([stream_length(group) for group in groups], config.train.tokens)
        micro = tuple(prepared.objective.collate([groups[i] for i in part]) for part in cut)
        cursor = {"step": state.step + 1, "round": done}
        yield StepBatch(micro, len(groups), taken, cursor, time.perf_counter() - began, {"round": done} | facts)
    if state.step < prepared.steps:
        parts.over = stopped


def stop(config: OnlineConfig, prepared, parts: Parts, barren: int) -> str | None:
    """Why no further round is gone; None where one is. barren: prompts since the last pair."""
    if parts.last.get("eval/win_high", 1.0) < 0.5:
        return f"the policy is shown worse than its start after step {parts.last['step']}"
    if barren >= min(BARREN, len(prepared.rows.train)):
        return f"the last {barren} prompts gave no pair"
    return None


def one_round(config: OnlineConfig, prepared, parts: Parts, state, place: int):
    """(groups of its pairs with their reference, numbers of the rows that were sampled, what came of the samples).

    The pairs' ids are those that were sampled: nothing is tokenised again.
    """
    from palate.data.stream import order
    from palate.reference import reference_column, with_reference
    from palate.sampling.chunks import Chunks

    rows = prepared.rows.train
    places = [divmod((place - 1) * config.batch + i, len(rows)) for i in range(config.batch)]
    epochs = {epoch: order(len(rows), config.seed, epoch) for epoch, _ in places}
    taken = tuple(int(epochs[epoch][at]) for epoch, at in places)
    this = Round(config, way(config, parts), parts.run.path, place, config.model, config.model, None, _quiet)
    identity = f"{prepared.identity} after {state.step} steps"
    this.loaded = Now(state.model, prepared.loaded.tokenizer, identity)
    this.asked = [(parts.records[str(rows[row].source)], rows[row].prompt) for row in taken]
    this.held = set()
    for stage in ("sample", "judge", "pair"):
        stages.DO[stage](this)
    found = stages.cases(this)
    drawn = Chunks.there(this.folder / "samples").rows()
    groups = []
    for at, (case, (record, prompt)) in enumerate(zip(found, this.asked, strict=True)):
        pair = paired(config, case)
        if not isinstance(pair, str):
            groups.append(group(prompt, record, pair, drawn[at * config.candidates : (at + 1) * config.candidates]))
    if not this.sealed:
        stages.seal(this, {})
    if groups and prepared.objective.reference:
        model = state.model if parts.reference is None else parts.reference
        numerics, tokens = prepared.objective.numerics, config.train.tokens
        groups = with_reference(groups, reference_column(groups, model, numerics=numerics, tokens=tokens))
    return groups, taken, facts_of(found, len(groups))


def way(config: OnlineConfig, parts: Parts) -> Way:
    """How the engine makes this method's pairs."""
    from palate.sampling.pairing import pairing

    scorer = by(parts.judge, config.candidates)
    return Way(
        read=lambda: None,
        pair=lambda this, cases: pairing(paired(config, case) for case in cases),
        beta=lambda number: beta(config),
        candidates=config.candidates,
        judge=lambda this: (config.judge, scorer),
    )


def paired(config: OnlineConfig, case):
    """The best sample of a prompt against the worst, or why there is no pair."""
    from palate.sampling.pairing import best_and_worst

    return best_and_worst(case.record.prompt, case.candidates, config.length_control, case.record.source)


def beta(config: OnlineConfig) -> float | None:
    """The loss's beta, where it has one."""
    return check_loss(config).get("beta")


def group(prompt, record, pair, drawn: Sequence[dict[str, Any]]):
    """A pair as tokens. drawn: the rows of its prompt's samples."""
    import numpy as np

    from palate.data.tokens import TokenGroup
    from palate.sampling.pairing import reply

    ids = {reply(record.prompt, row["completion"]): np.array(row["ids"], np.int32) for row in drawn if row["finished"]}
    sides = (ids[pair.chosen], ids[pair.rejected])
    spans = tuple(((0, len(side)),) for side in sides)
    return TokenGroup(prompt, sides, spans, ((0, 1),), source=record.source, margin=pair.margin)


def facts_of(found: Sequence, pairs: int) -> dict[str, float]:
    """Metrics of a step: what its samples were like."""
    made = [one for case in found for one in case.candidates]
    scores = [one.score for one in made if one.score is not None]
    facts = {"pairs": pairs, "ended": sum(one.finished for one in made) / len(made)}
    facts |= {
        "length": sum(one.tokens for one in made) / len(made),
        "unparsed": sum(one.score is None and one.unfit is None for one in made),
    }
    return facts | ({"reward": sum(scores) / len(scores)} if scores else {})


def _quiet(text: str = "") -> None:
    """A round of a single batch is too small to speak of itself."""


# --- evaluation and end ----------------------------------------------------------------------------------------------


def evaluate(config: OnlineConfig, prepared, parts: Parts, model, held, objective, *, tokens: int) -> dict[str, Any]:
    """The policy as it stands against its start, on the held-out prompts."""
    records, logged = [parts.records[str(one.source)] for one in held], parts.run.metrics()
    found = against_start(
        config,
        model,
        parts.reference,
        prepared.loaded.tokenizer,
        records,
        [one.prompt for one in held],
        replace(objective.numerics, temperature=config.temperature),
        parts.run.path / "compare",
        tokens=tokens,
        first=not logged,
    )
    parts.last = {"step": logged[-1]["step"] if logged else 0} | found
    return found


def finish(config: OnlineConfig, parts: Parts, run, model, tokenizer, held) -> dict[str, Any]:
    """Writes `model/` and rounds.json; what the rounds gave is in the result."""
    lines = run.metrics()
    round_of = {line["step"]: int(line["round"]) for line in lines if "round" in line}
    later = {}
    for line in lines:
        if "eval/count" in line and line["step"] in round_of:
            names = ("win_rate", "win_low", "win_high", "length", "kl", "ended")
            later[round_of[line["step"]]] = {name: line.get(f"eval/{name}") for name in names}
    ended = parts.over or all_done(run.record["plan"]["steps"])
    table = chain.write_table(run.path, later, judge=config.compared_by, ended=ended)
    rows = table["rounds"]
    counts: dict[str, Any] = {"rounds": len(rows), "pairs": sum(row["pairs"] for row in rows)}
    reasons = dict.fromkeys(reason for row in rows for reason in row["left_out"])
    counts["left_out"] = {reason: sum(row["left_out"][reason] for row in rows) for reason in reasons}
    return save_policy(run, model, tokenizer, held) | counts | {"ended": ended, "judge": config.compared_by}


def verdict(config: OnlineConfig, parts: Parts, before: dict, after: dict) -> tuple[bool, str]:
    """Better: the interval of the win rate against the start lies above one half."""
    why = f"; {parts.over}" if parts.over else ""
    if after.get("eval/count") is None or config.compared_by is None:
        return (
            False,
            f"nobody compared the policy with its start, so nothing is shown; --eval-judge names who does{why}",
        )
    if after.get("eval/win_rate") is None:
        return False, f"not shown to be better: {parts.over or 'no step was taken'}"
    rate, low, high = (after[f"eval/{name}"] for name in ("win_rate", "win_low", "win_high"))
    word = "better" if low > 0.5 else "worse" if high < 0.5 else "not shown to be better"
    same = ", the judge that trained it" if config.compared_by == config.judge else ""
    return low > 0.5, (
        f"{word}: it wins {rate:.1%} [{low:.1%}, {high:.1%}] of {after['eval/count']} held-out prompts against its "
        f"start, judged by {config.compared_by}{same}; KL {number(after['eval/kl'], '.2f')} nats a completion{why}"
    )


def plan(config: OnlineConfig, prepared) -> dict[str, Any]:
    """The plan of the run, before anything is sampled or written."""
    rows = prepared.rows
    lines = plan_lines(
        config,
        prepared.loaded,
        rows,
        steps=prepared.steps,
        rate=prepared.rate,
        reason=prepared.reason,
        precision=prepared.precision,
        objective=prepared.objective,
    )
    lines.append(
        f"samples    {config.candidates} of each of {config.batch} prompts a round, temperature "
        f"{config.temperature:g}, at most {config.max_tokens} tokens, judged by {config.judge}"
    )
    lines.append(f"compared   on {len(rows.held)} held-out prompts, by {config.compared_by or 'nobody'}")
    return {"plan": lines, "steps": prepared.steps, "rows": rows.counts, "held": len(rows.held), "summary": lines}
