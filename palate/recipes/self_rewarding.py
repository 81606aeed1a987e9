"""Self-Rewarding: a model writes, judges what it wrote, and learns from the best against the worst, in rounds.

The seed holds answers to imitate and judgements to imitate; a row is a judgement where its prompt is the judge's
template, filled. Supervised fine-tuning on both makes the model that round 1 begins from. Every round asks new prompts,
samples several candidates of each, has each judged several times by the round's own start (or by whom --judge names),
and trains by DPO.

Source: Yuan et al. 2024, arXiv:2401.10020, section 2. length_control: Wu et al. 2024, arXiv:2407.19594, section 2.3.
Departs: a candidate that was cut makes no pair; a judgement without one readable score counts for nothing; samples are
drawn without a nucleus; held-out judgements are a twentieth of the seed's requests rather than a quarter.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from palate.data.records import Demonstration, Prompt, Records, Text
from palate.errors import DataError
from palate.recipes import judged, new_prompts
from palate.recipes.judged import JudgedConfig
from palate.recipes.rounds import Case, Round, Scorer, Way
from palate.recipes.rounds import run as go
from palate.recipes.seed import Seed, read_seed
from palate.recipes.training import TrainingConfig
from palate.recipes.verbs import stderr


class StartConfig(BaseModel):
    """How the model before round 1 learns from the seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Annotated[int, Field(ge=0, description="Passes over the seed; 0: --model has learnt from it already")] = 3
    steps: Annotated[int | None, Field(gt=0, description="Optimizer steps; wins over epochs")] = None
    lr: Annotated[Literal["auto"] | Annotated[float, Field(gt=0)], Field(description="Peak learning rate")] = "auto"
    batch: Annotated[int, Field(gt=0, description="Rows per optimizer step")] = 32


class SelfRewardConfig(JudgedConfig):
    """Options of `palate self-reward`."""

    new_prompts: Annotated[
        str | None,
        Field(description="What rounds ask: a file of prompts, or written (by the model, after those of the seed); "
              "default: builtin:reviews with built-in data, else written"),
    ] = None  # fmt: skip
    prompts_per_round: Annotated[int, Field(gt=0, description="New prompts of a round")] = 1000
    temperature: Annotated[float, Field(gt=0, lt=100, description="Of the samples")] = 0.7
    start: StartConfig = StartConfig()

    @property
    def asks(self) -> str:
        """Where new prompts come from."""
        return self.new_prompts or ("builtin:reviews" if self.builtin else new_prompts.WRITTEN)


def run(config: SelfRewardConfig, *, verb: str = "self-reward", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """Trains --model on the seed of --data, then on what it thinks of its own samples; the result object of --json."""
    way = Way(
        read=partial(read, config, say),
        records=prompts,
        candidates=config.candidates,
        judge=judge,
        pair=judged.pair,
        beta=lambda number: config.beta,
        start=learn if config.start.epochs else None,
        extra=measured,
        about=about,
    )
    return go(config, way, verb=verb, argv=argv, say=say, panel=panel)


def read(config: SelfRewardConfig, say=stderr) -> Seed:
    """The seed, once judge, template and new prompts are known to be there too.

    Raises DataError (E104) where nothing is there after which new requests could be written.
    """
    judged.check_judge(config)
    seed = read_seed(config, judged.rubric(config))
    if config.asks != new_prompts.WRITTEN:
        new_prompts.read(config, config.asks)
    elif not seed.requests:
        what = "holds no request of one turn after which new ones could be written"
        raise DataError(what, where=config.data, code="E104", next="name a file of prompts by --new-prompts")
    for line in notes(config, seed):
        say(line)
    return seed


def notes(config: SelfRewardConfig, seed: Seed) -> list[str]:
    """What a reader should hear before anything is done."""
    told = []
    if not seed.judgements and config.start.epochs and config.judge == judged.POLICY:
        told.append(
            "warning: no row of the seed shows how to judge (none has the judge's template as its prompt): without "
            "such rows scores collapse onto one, in the published runs too"
        )
    if config.compared_by == config.judge:
        told.append(f"note: {config.judge} both trains and compares: win rates show what it likes, an upper bound")
    return told


def about(this: Round) -> tuple[str, ...]:
    """Lines of the plan."""
    config, seed = this.config, this.data
    rows = f"{len(seed.answers)} answers and {len(seed.judgements)} judgements, {len(seed.held_judgements)} held out"
    often = f", {config.judgements} times, by the rubric {judged.rubric(config).name}"
    return (
        f"start      {f'SFT, {config.start.epochs} passes over ' if config.start.epochs else 'none; '}{rows}",
        f"asked      {config.prompts_per_round} new prompts a round: {config.asks}",
        f"judge      {config.judge}{often if judged.is_asked(config) else ''}",
    )


def learn(this: Round, folder: Path, panel) -> None:
    """Supervised fine-tuning on the seed: the model before round 1, in a run of its own."""
    from palate.files import make_folder, write_json_lines
    from palate.recipes import sft

    config, seed = this.config, this.data
    train, held = this.out / "seed.jsonl", this.out / "seed-held.jsonl"
    make_folder(this.out)
    for path, rows in ((train, seed.rows(held=False)), (held, seed.rows(held=True))):
        if not path.exists():
            write_json_lines(path, rows)
    given = {name: getattr(config, name) for name in TrainingConfig.model_fields}
    own = {
        "data": str(train),
        "eval": str(held) if held.stat().st_size else "none",
        "out": str(folder),
        "resume": True,
        "columns": {},
        "format": None,
        "bad_rows": "stop",
        "require_better": False,
        "dry_run": False,
        **config.start.model_dump(),
    }
    if own["eval"] == "none":
        own["eval_every"] = None
    sft.run(sft.SftConfig(**(given | own)), say=lambda text: this.say(f"start: {text}"), panel=panel)


def judge(this: Round) -> tuple[str, Scorer]:
    """Who judges in this round; the start itself in the form that it has learnt from."""
    return judged.judge_of(this, this.data.form)


def prompts(this: Round) -> Records[Prompt]:
    """What this round asks."""
    config, seed = this.config, this.data
    if config.asks == new_prompts.WRITTEN:
        found = new_prompts.by_model(this, seed.requests, config.prompts_per_round)
    else:
        found = new_prompts.of_file(this, config.asks, config.prompts_per_round)
    if this.number == 1 and (differing := other_system(seed.answers, found)):
        this.say(f"warning: {differing}")
    sources = [*seed.records.sources, *found.sources, *judged.template_source(config)]
    said, rejected = [*seed.records.notes, *found.notes], [*seed.records.rejected, *found.rejected]
    return Records(found.records, sources, found.dropped, rejected, said, [*seed.records.warnings, *found.warnings])


def other_system(answers: Sequence[Demonstration], asked: Sequence[Prompt]) -> str | None:
    """What is wrong where all answers stand under a system message and no new prompt does, or the other way round."""
    one, two = ({begins_with_system(record.prompt) for record in records} for records in (answers, asked))
    if len(one) != 1 or len(two) != 1 or one == two:
        return None
    has, lacks = ("answers", "new prompts") if one == {True} else ("new prompts", "answers")
    return f"the {has} stand under a system message, the {lacks} do not: the start answers what it has not learnt to"


def begins_with_system(prompt: Text) -> bool:
    """Whether a conversation's first turn is a system message."""
    return not isinstance(prompt, str) and prompt[0].role == "system"


def measured(this: Round, cases: Sequence[Case], made) -> dict[str, Any]:
    """Columns of the row: those of all judged rounds, and how the judge agrees with held-out judgements of the seed.

    judge_accuracy is against these where nobody knows the truth of the samples.
    """
    row = judged.measured(this, cases, made) | checked(this)
    if row.get("judge_accuracy") is None and row.get("seed_accuracy") is not None:
        columns = {name.replace("seed_", "judge_"): value for name, value in row.items() if name.startswith("seed_")}
        row |= columns | {"judge_truth": "held-out judgements"}
    return row


def checked(this: Round) -> dict[str, Any]:
    """The agreement with held-out judgements; what the judge said of them is in chunks beside those of the samples."""
    from palate.evaluation.judging import agreement
    from palate.sampling.chunks import Chunks
    from palate.sampling.judge import Completion

    held = this.data.held_judgements
    if not held or not judged.scores_alone(this.config):
        return {}
    name, scorer = judge(this)

    def work(start: int, stop: int):
        mine = held[start:stop]
        prompts = [new_prompts.like(one.record.prompt[-1:], one.request) for one in mine]
        return scorer(prompts, [Completion(one.reply) for one in mine], CHECKING + start)

    chunks = Chunks(this.folder / "checked", len(held), this.config.chunk, {"judge": name})
    this.tell(f"judging {len(held)} held-out judgements again by {name}")
    chunks.make(work)
    scores = [row["score"] for row in chunks.rows()]
    found = agreement(scores, [one.points for one in held], [one.request for one in held])
    return judged.told("seed", found)


CHECKING = 10**9  # number of the first held-out judgement among all that a round's judge is asked
