"""What the training pages share: their options, and the run folder around fit().

A page says which records it reads, which objective it trains and what it evaluates; the rest is here once.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from palate.errors import AwaitsVotes, CheckpointError, Interrupted, NotBetterError, PalateError, UsageError
from palate.layout import MICRO_BATCH_TOKENS
from palate.recipes.kept import read_kept, refuse_shared
from palate.recipes.plan import Foreseen, PlanConfig, auto_rate, check_disk, forget_peak, memory_plan, peak_memory
from palate.recipes.retain import Retention, retention_lines
from palate.recipes.rows import Rows, read_rows, strings_of
from palate.recipes.verbs import InputConfig, Say, check_model_options, max_length, resolve_precision
from palate.train.optim import OptimConfig, UpdateConfig


class TrainConfig(UpdateConfig):
    """How the steps are taken."""

    tokens: Annotated[int, Field(gt=0, description="Stream tokens per micro-batch: bounds memory, moves no number")] = (
        MICRO_BATCH_TOKENS
    )
    checkpointing: Annotated[bool, Field(description="Recompute activations in backward: less memory, more time")] = (
        False
    )
    keep: Annotated[int, Field(ge=1, description="Checkpoints to keep besides the best")] = 2


Quantize = Annotated[
    Literal["4bit"] | None,
    Field(description="Hold what lies under --lora-rank in 4 bits (QLoRA; needs palate[quantize]); default: off"),
]


class TrainingConfig(InputConfig):
    """Options of every training verb."""

    eval: Annotated[str, Field(description="Held-out data; auto: 5 % of the prompts, at most 300; none")] = "auto"
    out: Annotated[str | None, Field(description="Run folder; default: runs/VERB-N")] = None
    lr: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0, lt=math.inf)],
        Field(description="Peak learning rate; auto: by model size, ten times that with LoRA"),
    ] = "auto"
    epochs: Annotated[int, Field(gt=0, description="Passes over the data")] = 1
    steps: Annotated[int | None, Field(gt=0, description="Optimizer steps; wins over epochs")] = None
    batch: Annotated[int, Field(gt=0, description="Pairs or examples per optimizer step")] = 64
    max_length: Annotated[
        int | None,
        Field(gt=1, description="Tokens of prompt + longer completion; default: min(1024, the model's context)"),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Of order, split and new weights")] = 0
    lora_rank: Annotated[int | None, Field(gt=0, description="Train low-rank adapters of this rank; default: off")] = (
        None
    )
    lora_alpha: Annotated[float | None, Field(gt=0, lt=math.inf, description="LoRA scale; default: twice the rank")] = (
        None
    )
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="Of the matmuls; weights, sums and losses stay float32 or better; auto: bfloat16 on GPU"),
    ] = "auto"
    save_every: Annotated[int | None, Field(gt=0, description="Steps between checkpoints; default: a fifth")] = None
    eval_every: Annotated[int | None, Field(gt=0, description="Steps between evaluations; default: a fifth")] = None
    log_every: Annotated[int, Field(gt=0, description="Steps between lines on the screen; files have all")] = 1
    samples: Annotated[int, Field(ge=0, description="Held-out prompts completed before and after")] = 4
    resume: Annotated[bool, Field(description="Go on from the last verified checkpoint of --out")] = False
    require_better: Annotated[bool, Field(description="Exit 4 unless shown better on held-out data")] = False
    dry_run: Annotated[bool, Field(description="Print the plan and stop")] = False
    report: Annotated[bool, Field(description="Write report.html at the end")] = True
    track: Annotated[
        Literal["tensorboard", "trackio", "wandb", "mlflow"] | None,
        Field(description="Send the numbers to a tracker besides; tensorboard's files lie in the run folder"),
    ] = None
    plan: PlanConfig = PlanConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _has_effect(self):
        if self.lora_alpha is not None and self.lora_rank is None:
            raise UsageError(
                "has no effect without --lora-rank",
                where="lora_alpha",
                code="E316",
                next="drop it, or give --lora-rank",
            )
        if getattr(self, "quantize", None) is not None and self.lora_rank is None:
            what = "weights in 4 bits cannot be trained"
            raise UsageError(what, where="quantize", code="E308", next="add --lora-rank 16, or drop it")
        if self.train.optimizer == "rmsprop":
            for name in ("beta1", "beta2"):
                if getattr(self.train, name) == TrainConfig.model_fields[name].default:
                    continue  # as a run's own config.yaml says it
                what = "has no effect with rmsprop"
                raise UsageError(what, where=f"train.{name}", code="E316", next="drop it, or use adamw")
        for name in PlanConfig.model_fields:
            if getattr(self.plan, name) is not None and not self.dry_run:
                what = "has no effect without --dry-run"
                raise UsageError(what, where=f"plan.{name}", code="E316", next="drop it, or add --dry-run")
        for name in ("eval_every", "require_better"):
            if self.eval == "none" and getattr(self, name):
                raise UsageError("has no effect without --eval", where=name, code="E316", next="drop one of the two")
        return self


class Paused(Interrupted):
    """A run that stands, saved, at the step where it was asked to stop."""


# what may differ between a run and its resumption: nothing that moves a number
MAY_CHANGE = ("log_every", "require_better", "save_every", "report", "track")


@dataclass(frozen=True)
class Prepared:
    """A run before its first forward pass: model, rows, objective and the numbers they imply."""

    loaded: Any
    rows: Rows
    objective: Any
    precision: str
    rate: float
    reason: str
    steps: int
    identity: str  # of the starting weights under this precision


def prepare(
    config: TrainingConfig,
    read: Callable,
    objective_of: Callable,
    *,
    usable: Callable,
    say: Say,
    built: Callable[[Any], Any] | None = None,
    pieces: Callable | None = None,
    rate_of: Callable = auto_rate,
) -> Prepared:
    """Reads, loads, tokenises and counts; writes nothing.

    read: (data) -> Records. objective_of: (numerics) -> objective. usable: see `read_rows`. built: (loaded) -> the
    model that is trained in its place, such as one with another head. pieces: see `Reading.take`. rate_of: (config,
    parameters) -> learning rate, reason.
    """
    from palate.data.stream import count_steps
    from palate.data.template import load_template
    from palate.model.adapters import add_lora
    from palate.model.load import load, outline, with_tokenizer
    from palate.model.quantized import count_weights
    from palate.model.recompute import enable_recompute
    from palate.reference import reference_identity
    from palate.scoring import Numerics, support

    check_model_options(config, config.model, getattr(config, "reference", None))
    forget_peak()  # of a run before this one in the same process
    records = read_kept(read, config.data, say)  # bad rows are named before a model is loaded
    other = read_kept(read, config.eval, say) if config.eval not in ("auto", "none") else None
    if other is not None:
        refuse_shared(records, other, say)
    ahead = config.dry_run and config.plan.processes is not None  # of machines that are elsewhere: nothing is loaded
    code = dict(
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        quantize=getattr(config, "quantize", None),
    )
    if ahead:
        loaded = outline(config.model, **code)
    else:
        loaded = load(config.model, device=config.device, seed=config.seed, **code)
    if loaded.tokenizer is None:
        loaded = with_tokenizer(loaded, strings_of(records))
    for note in loaded.notes:
        say(f"model: {note}")
    if code["quantize"]:
        say("model: linear layers in 4 bits; what is saved has them whole, as they were rounded")
    if config.chat_template is not None:
        load_template(config.chat_template, loaded.tokenizer)
    if built is not None:
        loaded = built(loaded)
    model = loaded.model
    limit = max_length(config, model)
    rows = read_rows(
        config,
        records,
        other,
        loaded.tokenizer,
        limit,
        usable=usable,
        say=say,
        pieces=pieces,
    )
    precision = resolve_precision(config, "cuda" if ahead else model.device.type)
    numerics = Numerics(precision) if ahead else Numerics.of(model, precision, config.train.tokens)
    if support(model).path != "shared":
        say(f"model: scored as padded rows: {support(model).reason}")
    identity = "" if ahead else reference_identity(model, precision)
    if config.lora_rank:
        model = add_lora(model, config.lora_rank, config.lora_alpha, seed=config.seed)
        loaded = replace(loaded, model=model)
    if config.train.checkpointing:
        enable_recompute(model)
    rate, reason = rate_of(config, count_weights(loaded.model))
    steps = count_steps(len(rows.train), config.batch, config.epochs, config.steps)
    return Prepared(loaded, rows, objective_of(numerics), precision, rate, reason, steps, identity)


def save_policy(run, model, tokenizer, held) -> dict[str, Any]:
    """Writes the run's `model/`, if it is not there yet."""
    from palate.model.load import save

    if not (run.path / "model").exists():
        save(model, tokenizer, run.path / "model")
    return {}


def sample_rows(model, tokenizer, groups, step: int, before: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Rows for samples.jsonl: the groups' prompts completed as the model is now (temperature 0.7, a fixed seed).

    before: the rows of step 0, whose completions stand beside these.
    """
    from palate.data.tokens import end_tokens
    from palate.sampling.generate import generate, text_of

    if not groups:
        return []
    prompts = [group.prompt for group in groups]
    made = generate(model, tokenizer, prompts, max_tokens=64, temperature=0.7, seed=0, end_ids=end_tokens(tokenizer))
    rows = []
    for number, sample in enumerate(made):
        text = text_of(sample, prompts[sample.prompt], tokenizer)
        rows.append(
            {
                "step": step,
                "prompt": tokenizer.decode(prompts[sample.prompt].tolist()),
                "before": before[number]["before"] if before else text,
                "after": text if before else None,
                "scores": {"logp": sample.logp, "tokens": len(sample.ids), "finished": sample.finished},
            }
        )
    return rows


@dataclass(frozen=True)
class Ending:
    """What a run leaves beside its steps; the defaults are a policy's.

    evaluate: (model, held, objective, tokens=) -> numbers, as `palate.evaluation.preference.evaluate`. sample: rows of
    samples.jsonl. save: (run, model, tokenizer, held) -> facts of the result, once `model/` is there; it may be called
    again after a kill. next: the command to go on with.
    """

    evaluate: Callable[..., dict[str, Any]] | None = None
    sample: Callable[..., list[dict[str, Any]]] = sample_rows
    save: Callable[..., dict[str, Any]] = save_policy
    next: str = "palate generate --model {run} --data PROMPTS --out FILE"


@dataclass(frozen=True)
class OwnBatches:
    """Step batches that are made on the way, such as rollouts, in place of those of the rows.

    make: (state) -> step batches from where the state stands. every: optimizer steps that belong together, after whose
    multiples alone a run is evaluated, saved and stopped; --save-every and --eval-every count them as one.
    critic: trained beside the policy. over: () -> why they ended before the last step, which ends the run; None else.
    """

    make: Callable[[Any], Iterator[Any]]
    every: int = 1
    critic: Any = None
    over: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Watch:
    """What else is measured of the model, at the start, every so many steps (or rollouts) and at the end.

    measure: (model) -> numbers, as `eval/...`. every: in place of --eval-every. start: the numbers of the start, where
    they are known already.
    """

    measure: Callable[[Any], dict[str, Any]]
    every: int
    start: dict[str, Any] | None = None


def update_config(config: TrainingConfig, rate: float) -> OptimConfig:
    """The optimizer's config out of the run's."""
    fields = {name: getattr(config.train, name) for name in UpdateConfig.model_fields}
    return OptimConfig(lr=rate, **fields)


def open_folder(config, verb: str, say: Say) -> tuple[Path, dict[str, Any] | None]:
    """The folder of the run, and the result of the one that is finished there already, if --resume names such a one.

    --out, or the next free runs/VERB-N. Looked at before data and model are, so that neither need be there any more.
    """
    from palate.run import Run, check_out, next_folder, status_of
    from palate.track import check_tracker

    check_tracker(getattr(config, "track", None))
    if config.out is None:
        if config.resume:
            raise UsageError("--resume needs --out", code="E313", next="name the run folder to go on with")
        return next_folder(Path("runs"), verb.replace(" ", "-")), None
    out = Path(config.out)
    if not config.dry_run:
        check_out(out, resume=config.resume)
    if config.resume and (out / "run.json").exists() and status_of(out) == "done":
        with Run.create(out, verb=verb, config=resolved(config), resume=True, may_change=MAY_CHANGE) as run:
            say(f"{out} is finished: nothing to do")
            return out, dict(run.result, out=str(out), reference_scored=0)
    return out, None


def resolved(config) -> dict[str, Any]:
    """What config.yaml holds: all that a run is made of, and not where it lies, so that it can run again."""
    return config.model_dump(mode="json", exclude={"out", "resume", "dry_run", "plan", "stage", "part"})


def train(
    config: TrainingConfig,
    verb: str,
    out: Path,
    prepared: Prepared,
    *,
    argv: Sequence[str],
    say: Say,
    panel: Callable | None,
    annotate: Callable | None = None,
    facts: dict[str, Any] | None = None,
    better: str,
    verdict: Callable[[dict, dict], tuple[bool, str]],
    retention: Retention | None = None,
    stop: int | None = None,
    ending: Ending | None = None,
    own: OwnBatches | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """The run folder from first line to saved model; resumes where --resume asks for it.

    annotate: (run, train, held) -> (train, held, facts, inspect), for objectives with a reference. facts: of the
    result, where there is none. better: the evaluation's key that picks the best checkpoint, as for `fit`.
    verdict: (before, after) -> (shown better, sentence). retention: what is watched beside the held-out rows.
    stop: the step after which the run is saved and Paused is raised, unless it is the last: another call goes on.
    ending: what is evaluated, sampled and saved, where it is no policy that is trained. own: where batches come from
    instead of the rows. watch: what else is measured, also where no row is held out.
    What is raised names the folder in its `result`.
    """
    from palate.run import Run
    from palate.track import tracking

    go_on = f"palate {verb} -c {out / 'config.yaml'} --resume --out {out}"
    if not config.resume:
        check_disk(config, prepared.loaded.model, out)
    try:
        with (
            Run.create(
                out,
                verb=verb,
                config=resolved(config),
                argv=list(argv),
                resume=config.resume,
                may_change=MAY_CHANGE,
                parents=[{"model": prepared.loaded.name, "identity": prepared.identity}],
            ) as run,
            tracking(config.track, run, resolved(config), say),
        ):
            result = _train(
                config, run, prepared, say, panel, annotate, dict(facts or {}), better, verdict, retention, stop,
                ending or Ending(), own, watch,
            )  # fmt: skip
            run.finish(result)
        if config.report:
            result["summary"].append(f"report     {reported(out)}")
        if config.require_better and not result["better"]:
            error = NotBetterError(result["verdict"], next="train longer, change --lr or --beta, or look at the data")
            error.result = result
            raise error
        return result
    except KeyboardInterrupt as error:
        interrupted = Interrupted("interrupted before a step could be saved", next=go_on)
        interrupted.result = {"out": str(out)}
        raise interrupted from error
    except PalateError as error:
        if isinstance(error, AwaitsVotes):
            error.next = go_on
        error.result = {"out": str(out)} | (getattr(error, "result", None) or {})
        raise


def _train(
    config, run, prepared, say, panel, annotate, facts, better, verdict, retention, stop, ending, own, watch
) -> dict[str, Any]:
    from palate.data.stream import count_tokens, stream
    from palate.data.table import Lengths
    from palate.distributed import Ranks
    from palate.evaluation.preference import evaluate
    from palate.reference import content_digest
    from palate.run import read_lines
    from palate.train import checkpoint
    from palate.train.fit import fit
    from palate.train.loop import TrainState

    model, tokenizer = prepared.loaded.model, prepared.loaded.tokenizer
    objective, rows, ranks = prepared.objective, prepared.rows, Ranks.current()
    if config.resume:
        refuse_other_data(run.path, rows.reading.sources)
    # what a run and its checkpoints belong to: frozen weights, rows and template are in no checkpoint
    meta = {"run": run.id, "start": prepared.identity, "tokens": content_digest(rows.keys)}
    refuse_other_start(run, meta)
    run.write_data(
        {
            "sources": rows.reading.sources,
            "counts": rows.counts,
            "notes": rows.notes,
            "seed": config.seed,
            "train": len(rows.train),
            "held": len(rows.held),
            "rejected": [message for _, message in rows.reading.rejects],
            "doctor": said_by_doctor(config, rows.counts.get("rows", 0)),
        }
    )
    if "plan" not in run.record:
        # a rehearsal takes a second or two, which rounds and sweeps of short runs would pay again and again
        needs = memory_plan(config, prepared) if own is None and config.report else None
        foreseen: dict[str, Any] = {"peak_bytes": needs.peak} if isinstance(needs, Foreseen) else {}
        if own is None and rows.train[0].label is None:  # KTO runs other prompts' completions too
            lengths = Lengths.of(rows.train).stream
            foreseen["tokens"] = count_tokens(lengths, config.batch, config.epochs, config.steps, seed=config.seed)
        run.status("running", plan={"steps": prepared.steps} | foreseen)
    if rows.reading.rejects:
        run.write_rejects(raw for raw, _ in rows.reading.rejects)
    say(f"run: {run.path} · {run.record['hardware']}")
    say(f"data: {rows.summary()}")
    say(
        f"plan: {objective.name} {objective.options} lr={prepared.rate:g} ({prepared.reason}), "
        f"{prepared.steps} steps of {config.batch}, {prepared.precision}"
    )
    if len(rows.train) < config.batch and own is None:
        say(f"plan: every step sees all {len(rows.train)} rows: there are fewer than --batch {config.batch}")
    groups, held, inspect = rows.train, rows.held, None
    if annotate is not None:
        groups, held, facts, inspect = annotate(run, groups, held)

    every = 1 if own is None else own.every
    critic = None if own is None else own.critic
    state = TrainState.fresh(model, update_config(config, prepared.rate), prepared.steps, critic)
    found, damaged = checkpoint.latest(run.checkpoints) if config.resume else (None, [])
    for path in damaged:
        say(f"resume: {path} is damaged and was left aside")
    if found is not None:
        say(f"resume: from {found}")
        for difference in checkpoint.load(found, state, meta):
            say(f"resume: not bit-exact: {difference}")
    elif config.resume:
        say("resume: no checkpoint yet, starting at step 0")
    run.rewind(state.step)

    if retention:
        retention.begin(run, model, state.step)

    def evaluation() -> dict[str, Any]:
        measure = ending.evaluate or evaluate
        found = measure(model, held, objective, tokens=config.train.tokens) if held else {}
        found = found | (retention.measure(model, whole=state.step in (0, prepared.steps)) if retention else {})
        if watch is None:
            return found
        known = watch.start if state.step == 0 else None
        return found | (watch.measure(model) if known is None else known)

    shown_prompts = [group for group in held if len(group.prompt)][: config.samples]
    if state.step == 0:
        if held or retention or watch:
            run.log({"step": 0} | evaluation() | {"time": time.time()})
        run.samples(ending.sample(model, tokenizer, shown_prompts, 0))
    fifth = max(1, prepared.steps // every // 5)
    batches = (
        own.make(state)
        if own is not None
        else stream(
            groups,
            objective.collate,
            batch=config.batch,
            tokens=config.train.tokens,
            seed=config.seed,
            epochs=config.epochs,
            steps=config.steps,
            start=state.step,
            rank=ranks.data_rank,
            size=ranks.data_size,
        )
    )
    with (panel or _no_panel)(prepared.steps) as shown:

        def show(line: dict[str, Any]) -> None:
            foresee(run, line, prepared.steps)
            if line["step"] % config.log_every == 0 or "loss" not in line:
                shown(line)

        fit(
            state,
            batches,
            objective,
            run,
            ranks=ranks,
            evaluate=evaluation if held or retention or watch else None,
            eval_every=(watch.every if watch else config.eval_every or fifth) * every,
            save_every=(config.save_every or fifth) * every,
            keep=config.train.keep,
            meta=meta,
            better=better,
            inspect=inspect if state.step == 0 else None,
            stop=stop,
            every=every,
            show=show,
        )
    if state.step < prepared.steps:
        if own is None or own.over() is None:
            what = f"paused after step {state.step} of {prepared.steps}"
            raise Paused(what, next="the same run with --resume goes on")
        if held and not any("eval/count" in line and line["step"] == state.step for line in run.metrics()):
            run.log({"step": state.step} | evaluation() | {"time": time.time()})
    first = [row for row in read_lines(run.path / "samples.jsonl") if row["step"] == 0]
    run.samples(ending.sample(model, tokenizer, shown_prompts, state.step, first))
    facts = facts | ending.save(run, model, tokenizer, held)
    evals = [line for line in run.metrics() if "eval/count" in line]
    before, after = (_evals(evals[0]), _evals(evals[-1])) if evals else ({}, {})
    is_better, sentence = verdict(before, after)
    kept = {} if retention is None else {"retention": retention.result(run.metrics())}
    return {
        "out": str(run.path),
        "model": str(run.path / "model"),
        "steps": state.step,
        "better": is_better,
        "verdict": sentence,
        "before": before,
        "after": after,
        "data": rows.counts,
        "peak_bytes": peak_memory(),
        **facts,
        **kept,
        "summary": [
            f"verdict    {sentence}",
            *(retention_lines(kept["retention"]) if kept else []),
            f"model      {run.path / 'model'}",
            f"next       {ending.next.format(run=run.path)} · palate runs show {run.path}",
        ],
    }


PACE = 3  # the step whose seconds foretell those of all: the first ones are slow


def foresee(run, line: dict[str, Any], steps: int) -> None:
    """Puts into the plan what all steps should take, in seconds, once the line of step PACE is there."""
    if line["step"] == PACE < steps and "seconds" in line and "seconds" not in run.record["plan"]:
        run.status("running", plan=run.record["plan"] | {"seconds": line["seconds"] * steps})


def refuse_other_data(run: Path, sources: Sequence[dict[str, Any]]) -> None:
    """Nothing, where the run was begun with files of this content; else CheckpointError (E502) naming the first."""
    from palate.files import read_json

    if not (run / "data.json").exists():
        return
    before = {(old.get("path"), old.get("role")): old.get("sha256") for old in read_json(run / "data.json")["sources"]}
    for source in sources:
        was = before.get((source["path"], source["role"]))
        if was != source["sha256"]:
            what = f"has changed since the run began: SHA-256 was {str(was)[:16]}…, is {source['sha256'][:16]}…"
            raise CheckpointError(what, where=source["path"], code="E502", next="put it back, or take a new --out")


def refuse_other_start(run, meta: dict[str, str]) -> None:
    """Writes down what the run starts from; on resume CheckpointError (E502) where that is not what it was."""
    began = run.record.get("start")
    if began is None:
        run.status("running", start=meta)
        return
    words = {"start": "the model, its config or the precision", "tokens": "the tokenizer, the template or the rows"}
    for name, word in words.items():
        if began.get(name) != meta[name]:
            what = f"has begun from something else: {word} changed"
            raise CheckpointError(what, where=str(run.path), code="E502", next="put it back, or take a new --out")


DOCTORED = 50_000  # rows up to which the doctor's second look at a file is not felt


def said_by_doctor(config: TrainingConfig, rows: int) -> dict[str, Any] | None:
    """What `palate doctor` finds in --data; None beyond DOCTORED rows, and where it cannot say."""
    from palate.data.doctor import doctor

    if rows > DOCTORED:
        return None
    try:
        return doctor(config.data, columns=config.columns or None, format=config.format).as_dict()
    except PalateError:  # a text file, or one that is gone since it was read
        return None


def reported(out: Path) -> str:
    """The path of the run's report, written now; or why there is none, which ends no run."""
    from palate.report import write_report

    try:
        return str(write_report([out]))
    except (PalateError, OSError) as error:
        return f"none: {error}"


def _evals(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key.startswith("eval/")}


@contextmanager
def _no_panel(total: int) -> Iterator[Callable]:
    yield lambda line: None
