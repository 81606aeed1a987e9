"""The engine of rounds: sample, (judge,) make pairs, score, train, compare, and again from the model that came of it.

A method is a `Way`: which prompts are sampled and how pairs are made. A round trains by `palate dpo`, from its start
and with its start as the reference, in a run folder of its own. Sampling and judging are cut into chunks that are a
pure function of (seed, round, chunk); a round that is killed goes on where it stood and ends in the same bytes.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from palate.errors import DataError, Interrupted, MachineError, NotBetterError, PalateError, UsageError
from palate.recipes import chain, stages
from palate.recipes.plan import check_disk, forget_peak, peak_memory, refuse_plan
from palate.recipes.rows import held_out, prompt_key
from palate.recipes.training import MAY_CHANGE, TrainingConfig, open_folder, reported, resolved
from palate.recipes.verbs import Say, aligned, check_model_options, number, stderr

Row = dict[str, Any]
# (prompts, completions, number of the first of them) -> a row each, with "score": a number, or None where it could not
# be read, or where nobody was asked since no pair could come of it; what else is in the row is kept
Scorer = Callable[[Sequence, Sequence, int], Iterable[Row]]

Band = Annotated[
    float | None,
    Field(ge=0, lt=0.5, description="Band, a share of the scores' range: the shortest within it of the best against "
          "the longest within it of the worst; default: off"),
]  # fmt: skip


class OwnSamplesConfig(TrainingConfig):
    """Options of every verb that trains on what the model itself samples."""

    max_tokens: Annotated[int, Field(gt=0, description="New tokens of a sample at most, the end token included")] = 256
    temperature: Annotated[float, Field(gt=0, lt=math.inf, description="Of the samples")] = 1.0
    eval_judge: Annotated[
        str | None,
        Field(description="Says which round is better, and when to stop; default: rule with built-in data, else none"),
    ] = None
    chunk: Annotated[int, Field(gt=0, description="Prompts of a file of samples: what a kill can cost")] = 64

    @property
    def shares(self) -> tuple[int, int]:
        """(K, N): every N-th chunk is made here, from the K-th."""
        return 1, 1

    @property
    def builtin(self) -> bool:
        """Whether the data come from the built-in world, whose rule knows every prompt."""
        return self.data.startswith("builtin:")

    @property
    def compared_by(self) -> str | None:
        """The judge of --eval-judge or what stands for it; None: nobody."""
        return self.eval_judge or ("rule" if self.builtin else None)


def share_of(part: str | None) -> tuple[int, int]:
    """(K, N) of a --part; (1, 1) where none is given."""
    k, _, n = (part or "1/1").partition("/")
    return int(k), int(n)


class RoundsConfig(OwnSamplesConfig):
    """Options of every verb that goes in rounds."""

    rounds: Annotated[int, Field(ge=1, le=100, description="Rounds at most; fewer, where one is shown worse")] = 3
    eval: Annotated[
        Literal["auto", "none"],
        Field(description="Held out of every round; auto: 5 % of the prompts of --data, at most 300; none"),
    ] = "auto"
    epochs: Annotated[int, Field(gt=0, description="Passes over the pairs of a round")] = 1
    steps: Annotated[int | None, Field(gt=0, description="Optimizer steps of a round; wins over epochs")] = None
    prompts: Annotated[
        str | None,
        Field(
            description="Held-out prompts that rounds are compared on; default: builtin:prompts[:300] with built-in "
            "data, else what --eval holds out"
        ),
    ] = None
    stage: Annotated[
        Literal["start", "sample", "judge", "pair", "score", "train", "compare"] | None,
        Field(description="Do this stage of the first unfinished round, and stop; default: all of all rounds"),
    ] = None
    part: Annotated[
        str | None,
        Field(pattern=r"^[1-9]\d*/[1-9]\d*$", description="K/N: of sample and judge every N-th chunk, from the K-th"),
    ] = None

    @model_validator(mode="after")
    def _stages_fit(self):
        if self.part is not None and self.stage not in ("sample", "judge"):
            what = "has no effect without --stage sample or judge"
            raise UsageError(what, where="part", code="E316", next="drop it, or name the stage")
        k, n = self.shares
        if k > n:
            raise UsageError(f"there is no part {k} of {n}", where="part", code="E307", next="count from 1 to N")
        if self.eval_judge is not None and self.compared_on is None and self.eval == "none":
            what = "has nothing to judge: no prompts are held out"
            raise UsageError(what, where="eval_judge", code="E316", next="give --prompts, or leave --eval out")
        if self.stage is not None and self.out is None:
            raise UsageError("needs --out", where="stage", code="E313", next="name the folder that stages share")
        return self

    @property
    def shares(self) -> tuple[int, int]:
        """(K, N) of --part."""
        return share_of(self.part)

    @property
    def compared_on(self) -> str | None:
        """The file of --prompts or what stands for it; None: what is held out."""
        return self.prompts or ("builtin:prompts[:300]" if self.builtin else None)


@dataclass(frozen=True)
class Way:
    """How a method makes pairs; all else is the engine's.

    read: () -> what --data holds; called once a process, before anything is written.
    pair: (round, cases) -> Pairing, of `palate.sampling.pairing`.
    beta: (number of the round) -> beta of its loss.
    records: (round) -> the records whose prompts are sampled; default: what was read.
    candidates: samples of each prompt.
    judge: (round) -> (its name, Scorer) of the samples; None: they are not judged.
    keeps_previous: whether a round trains on the pairs of the round before too.
    start: (round 1, folder, panel) makes, or goes on with, the run whose model is before round 1; default: --model.
    extra: (round, cases, pairing) -> further columns of the round's row, of plain values.
    about: (round 1) -> further lines of the plan.
    """

    read: Callable[[], Any]
    pair: Callable[["Round", Sequence["Case"]], Any]
    beta: Callable[[int], float]
    records: Callable[["Round"], Any] | None = None
    candidates: int = 1
    judge: Callable[["Round"], tuple[str, Scorer]] | None = None
    keeps_previous: bool = False
    start: Callable[["Round", Path, Any], Any] | None = None
    extra: Callable[["Round", Sequence["Case"], Any], Row] | None = None
    about: Callable[["Round"], Iterable[str]] | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages in their order; of them the start stands once, before round 1."""
        start, judge = (("start",) if self.start else ()), (("judge",) if self.judge else ())
        return (*start, "sample", *judge, "pair", "score", "train", "compare")


@dataclass(frozen=True)
class Case:
    """A prompt with its samples. record: as it was read. candidates: with their scores, where they were judged."""

    record: Any
    candidates: tuple


@dataclass
class Round:
    """A round. number: from 1. start: the model it samples, trains and stays close to; first: that of round 1.

    data: what the way read.
    """

    config: RoundsConfig
    way: Way
    out: Path
    number: int
    start: str
    first: str
    data: Any
    say: Say = stderr

    @property
    def folder(self) -> Path:
        """Its run folder, with the files of its stages beside those of the training."""
        return chain.folder_of(self.out, self.number)

    @property
    def sealed(self) -> bool:
        """Whether it came to its end."""
        return (self.folder / chain.MANIFEST).exists()

    @property
    def seed(self) -> int:
        """Of its samples: from the run's and the number."""
        return (self.config.seed << 32) + self.number

    @cached_property
    def records(self):
        """What is sampled in this round."""
        return self.way.records(self) if self.way.records else self.data

    @cached_property
    def held(self) -> set[str]:
        """The keys of the prompts that are held out."""
        keys = [prompt_key(record) for record in self.records]
        return held_out(keys, self.config.seed) if self.config.eval == "auto" else set()

    @cached_property
    def loaded(self):
        """The start with its tokenizer, and with the template of --chat-template as the training has it."""
        return self.load(self.start)

    @cached_property
    def asked(self) -> list[tuple]:
        """(record, token ids) of every prompt that is sampled, held out or not, in the order of the records."""
        from palate.recipes.generate import encoded

        kept, refused = encoded(self.loaded, self.records, self.config.bad_rows)
        if refused:
            self.tell(f"{len(refused)} prompts cannot be completed and are left out")
        if not kept:
            raise DataError(f"no prompt of {self.config.data} is left", code="E104", next="look at the messages above")
        return kept

    def load(self, name: str):
        """A model under the options of the run."""
        from palate.recipes.generate import load_policy

        loaded = load_policy(self.config.model_copy(update={"revision": self.revision(name)}), name)
        for note in loaded.notes:
            self.tell(f"model: {note}")
        return loaded

    def revision(self, name: str) -> str | None:
        """--revision for the model of this name: a commit belongs to --model alone, unless remote code asks for one."""
        mine = name == self.config.model or self.config.trust_remote_code
        return self.config.revision if mine else None

    def tell(self, text: str = "") -> None:
        """Says it with the round's number."""
        self.say(f"round {self.number}: {text}")

    def forget(self) -> None:
        """Lets the models go."""
        for name in ("loaded", "asked"):
            self.__dict__.pop(name, None)
        gc.collect()


def by(judge, each: int = 1) -> Scorer:
    """The scorer that a judge is; each: samples of a prompt, which a judge that only compares holds to each other."""
    return lambda prompts, completions, first: [
        {"score": score} for score in judge.standings(prompts, completions, each)
    ]


def run(config: RoundsConfig, way: Way, *, verb: str, argv=(), say: Say = stderr, panel=None) -> dict[str, Any]:
    """Goes the rounds, or does the stage that was asked for; returns the result object of --json.

    Raises what reading, loading, sampling, judging and training raise; CheckpointError where a finished round is not
    what it was; Interrupted, after which --resume goes on; NotBetterError under --require-better.
    """
    from palate.distributed import Ranks

    if config.stage is not None:
        if config.stage not in way.stages:
            what = f"palate {verb} has no stage {config.stage}"
            raise UsageError(what, where="stage", code="E308", next=f"use one of {', '.join(way.stages)}")
        config = config.model_copy(update={"resume": Path(config.out or "").is_dir()})
    if Ranks.current().data_size > 1:
        raise UsageError(f"palate {verb} runs in one process", code="E308", next="start it without torchrun")
    refuse_plan(config, verb)
    check_model_options(config, config.model)
    out, ended = open_folder(config, verb, say)
    if ended is not None:
        return ended
    forget_peak()  # of a run before this one in the same process
    chain.verify(out)
    this = Round(config, way, out, 1, config.model, config.model, way.read(), say)
    if config.dry_run:
        return plan(this)
    if not chain.rows(out):
        check(this)
    try:
        result = _begun(this, verb, list(argv), panel)
    except (Interrupted, KeyboardInterrupt) as error:
        go_on = f"palate {verb} -c {out / 'config.yaml'} --resume --out {out}"
        known = {name: getattr(error, name, None) for name in ("where", "code")}
        interrupted = Interrupted(str(getattr(error, "what", "interrupted")), next=go_on, **known)
        interrupted.result = {"out": str(out)}
        raise interrupted from error
    except PalateError as error:
        error.result = {"out": str(out)} | (getattr(error, "result", None) or {})
        raise
    if "rounds" in result and config.report:
        result["summary"].append(f"report     {reported(out)}")
    if "rounds" in result and config.require_better and not result["better"]:
        error = NotBetterError(result["verdict"], next="go more rounds, change --lr, or look at the pairs")
        error.result = result
        raise error
    return result


def check(this: Round) -> None:
    """Nothing, where model, prompts and judge can be used, and the disk has room; else what they raise."""
    from palate.recipes.contest import opened

    config = this.config
    if this.way.start is None:
        check_disk(config, this.loaded.model, this.out)
        probe = this
        if this.way.records is not None:  # which may write; in a dry run others stand for what it would
            probe = replace(this, config=config.model_copy(update={"dry_run": True}), say=lambda text="": None)
            probe.loaded = this.loaded
        assert probe.asked
    if config.compared_on is not None:
        opened(config, stages.read_compared(config))


def _begun(this: Round, verb: str, argv: list, panel) -> dict[str, Any]:
    """The rounds within the run folder of the whole, which a single stage leaves unfinished."""
    from palate.run import Run

    config, out = this.config, this.out

    def begin() -> Run:
        return Run.create(
            out,
            verb=verb,
            config=resolved(config),
            argv=argv,
            resume=config.resume or config.stage is not None,
            may_change=MAY_CHANGE,
            parents=[{"model": config.model}],
        )

    if config.part is not None:  # one of several processes: none of them owns the folder
        made_by_one(out, begin)
        return _rounds(this, argv, panel)
    with begin() as run:
        this.say(f"run: {out} · {run.record['hardware']}")
        result = _rounds(this, argv, panel)
        if "rounds" in result:
            run.finish(result)
        else:
            run.status("interrupted")  # the next stage goes on
    return result


def made_by_one(out: Path, begin: Callable) -> None:
    """Makes the folder of the whole, or waits while another process does."""
    for _ in range(300):
        if (out / "run.json").exists():
            return
        try:
            begin().close()
        except MachineError as error:
            if error.code != "E503":
                raise
            time.sleep(0.1)
    raise MachineError("is held by a process that does not begin", where=str(out), code="E503", next="look at it")


def _rounds(this: Round, argv: list, panel) -> dict[str, Any]:
    """The rounds from the first unfinished one on; with --stage, that stage of it. this: round 1."""
    config, way, out = this.config, this.way, this.out
    first = begun_from(this, panel)
    peaks = [peak_memory()]  # after every stage, for training counts its own
    if config.stage == "start":
        return {"out": str(out), "stage": config.stage, "summary": [stages.standing(this, config.stage)]}
    while (ended := end_of(config, chain.rows(out))) is None:
        number = len(chain.rows(out)) + 1
        start = str(chain.folder_of(out, number - 1)) if number > 1 else first
        if (this.number, this.start) != (number, start):
            this = replace(this, number=number, start=start, first=first)
        stages.open_round(this)
        for stage in [config.stage] if config.stage else [name for name in way.stages if name not in BY_THE_WAY]:
            stages.check_ready(this, stage)
            stages.DO[stage](this, argv=argv, panel=panel)
            peaks.append(peak_memory())
            if this.sealed:
                break
        this.forget()
        if this.sealed:
            row = chain.write_table(out, judge=config.compared_by)["rounds"][-1]
            this.tell(sentence(row))
            for alarm in row["alarms"]:
                this.tell(f"alarm: {alarm}")
        if config.stage is not None and end_of(config, chain.rows(out)) is None:
            return {"out": str(out), "stage": config.stage, "summary": [stages.standing(this, config.stage)]}
    result = finish(config, out, first, ended)
    return result | {"peak_bytes": max((peak for peak in peaks if peak is not None), default=None)}


BY_THE_WAY = ("start", "score")  # the one is done before the rounds are, training does the other


def begun_from(this: Round, panel) -> str:
    """The model before round 1, made where the way makes one; a stage alone waits for it."""
    if this.way.start is None:
        return this.config.model
    folder = stages.start_of(this)
    if this.config.stage in (None, "start"):
        this.way.start(this, folder, panel)
    else:
        stages.check_ready(this, this.config.stage)
    return str(folder)


def end_of(config: RoundsConfig, rows: Sequence[Row]) -> str | None:
    """Why there is no further round; None where there is one."""
    last = rows[-1] if rows else None
    if last is not None and not last["pairs"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in last["left_out"].items() if count)
        hint = "; raise --max-tokens" if 2 * last["left_out"].get("unfinished", 0) > last["prompts"] else ""
        return (
            f"round {last['round']} made no pairs: of {last['prompts']} prompts {reasons or 'all are held out'}{hint}"
        )
    if last is not None and last["verdict"] == "worse":
        return f"round {last['round']} is shown worse than the model it began from"
    return all_done(config.rounds) if len(rows) >= config.rounds else None


def all_done(rounds: int) -> str:
    """That no round is left."""
    return f"all {rounds} rounds are done" if rounds > 1 else "the one round is done"


def best_of(rows: Sequence[Row]) -> int:
    """The round with the highest win rate against the start, the later of equals; 0, the start, where none reaches one
    half. Where nobody compares the last that trained."""
    trained = [row for row in rows if row["pairs"]]
    rated = [(row["win_rate"], row["round"]) for row in trained if row["win_rate"] is not None]
    if rated:
        return max([(0.5, 0), *rated])[1]
    return trained[-1]["round"] if trained else 0


def finish(config: RoundsConfig, out: Path, first: str, ended: str) -> dict[str, Any]:
    """The best round's model in `model/`, the table, and the result object."""
    rows = chain.rows(out)
    best = best_of(rows)
    hand_back(config, str(chain.folder_of(out, best)) if best else first, out / "model")
    table = chain.write_table(out, judge=config.compared_by, best=best, ended=ended)
    better, verdict = verdict_of(config, rows, best, ended)
    return {
        "out": str(out),
        "model": str(out / "model"),
        "best": best,
        "better": better,
        "verdict": verdict,
        "ended": ended,
        "judge": config.compared_by,
        "rounds": table["rounds"],
        "summary": [
            *lines(rows, best),
            f"ended      {ended}",
            f"verdict    {verdict}",
            f"model      {out / 'model'}: {f'of round {best}' if best else 'the start'}",
            f"next       palate generate --model {out} --data PROMPTS --out FILE · palate report {out}",
        ],
    }


def hand_back(config: RoundsConfig, name: str, folder: Path) -> None:
    """A copy of the model of this name in a folder."""
    from palate.model.load import save
    from palate.recipes.generate import load_policy

    revision = config.revision if name == config.model or config.trust_remote_code else None
    loaded = load_policy(config.model_copy(update={"revision": revision}), name)
    save(loaded.model, loaded.tokenizer, folder)


def verdict_of(config: RoundsConfig, rows: Sequence[Row], best: int, ended: str) -> tuple[bool, str]:
    """Better: the interval of the best round's win rate against the start lies above one half."""
    if not any(row["pairs"] for row in rows):
        return False, f"not shown to be better: {ended}"
    if config.compared_by is None:
        return False, "nobody compared the rounds, so nothing is shown; --eval-judge names who does"
    if not best:
        return False, "not shown to be better: no round wins more than half against the start"
    row = rows[best - 1]
    better = row["win_low"] > 0.5
    share = f"{row['win_rate']:.1%} [{row['win_low']:.1%}, {row['win_high']:.1%}]"
    return better, (
        f"{'better' if better else 'not shown to be better'}: round {best} wins {share} of {row['compared']} held-out "
        f"prompts against the start, judged by {config.compared_by}"
    )


def sentence(row: Row) -> str:
    """A row in a line of the screen."""
    if not row["pairs"]:
        return "no pairs"
    told = [f"{row['pairs']} pairs"]
    if row["win_rate"] is not None:
        told.append(f"wins {row['win_rate']:.1%} [{row['win_low']:.1%}, {row['win_high']:.1%}] against the start")
        told.append(f"{row['win_previous']:.1%} against the model before")
    else:
        told.append("not compared: no --eval-judge")
    told += [f"KL {number(row['kl'], '.2f')}", f"length {number(row['length'], '.1f')}"]
    return ", ".join(told)


def lines(rows: Sequence[Row], best: int) -> list[str]:
    """The rounds as a table of the screen, the best one marked."""
    head = ["", "round", "pairs", "win rate", "95 % interval", "before", "KL", "length", "format"]
    table = [head]
    for row in rows:
        shares = [number(row[name], ".1%") for name in ("win_rate", "win_low", "win_high", "win_previous")]
        interval = f"[{shares[1]}, {shares[2]}]" if row["win_low"] is not None else ""
        drift = [number(row["kl"], ".2f"), number(row["length"], ".1f"), number(row["format_accuracy"], ".1%")]
        mark = "*" if row["round"] == best else ""
        table.append([mark, str(row["round"]), str(row["pairs"]), shares[0], interval, shares[3], *drift])
    return aligned(table, right=range(1, len(head)))


def plan(this: Round) -> dict[str, Any]:
    """What the rounds would be, before anything is sampled or written."""
    config, way = this.config, this.way
    held = sum(prompt_key(record) in this.held for record, _ in this.asked)
    count = len(this.asked)
    trained = (count - held) * (2 if way.keeps_previous and config.rounds > 1 else 1)
    steps = config.steps or config.epochs * -(-trained // config.batch)
    betas = ", ".join(f"{way.beta(n):g}" for n in range(1, config.rounds + 1))
    told = [
        f"model      {config.model}: {this.loaded.model.num_parameters():,} parameters",
        f"rounds     {config.rounds} at most, beta {betas}",
        f"samples    {count} prompts, {held} of them held out, {way.candidates} samples each, temperature "
        f"{config.temperature:g}, at most {config.max_tokens} tokens; {-(-count // config.chunk)} files a round",
        f"training   at most {steps} steps of {config.batch} pairs a round",
        f"compared   on {config.compared_on or f'the {held} held-out prompts'}, by {config.compared_by or 'nobody'}",
        *(way.about(this) if way.about else ()),
    ]
    return {"plan": told, "rounds": config.rounds, "prompts": count, "held": held, "steps": steps, "summary": told}
