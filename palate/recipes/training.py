"""What the training pages share: their options, rows to groups, the plan, the run folder around fit().

A page says which records it reads, which objective it trains and what it evaluates; the rest is here once.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from palate.errors import CheckpointError, DataError, MachineError, ModelError, NotBetterError, UsageError
from palate.train.optim import OptimConfig, UpdateConfig

Say = Callable[[str], None]


class TrainConfig(UpdateConfig):
    """How the steps are taken."""

    tokens: Annotated[int, Field(gt=0, description="Stream tokens per micro-batch: bounds memory, moves no number")] = (
        2048
    )
    checkpointing: Annotated[bool, Field(description="Recompute activations in backward: less memory, more time")] = (
        False
    )
    keep: Annotated[int, Field(ge=1, description="Checkpoints to keep besides the best")] = 2


class TrainingConfig(BaseModel):
    """Options of every training verb."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(description="Hub id, folder, run folder, GGUF file, or new:CONFIG.json")]
    data: Annotated[str, Field(description="JSONL, JSON, CSV or Parquet file, slice of one as FILE[:500], or Hub id")]
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
    device: Annotated[str, Field(description="auto, cpu, cuda, mps")] = "auto"
    save_every: Annotated[int | None, Field(gt=0, description="Steps between checkpoints; default: a fifth")] = None
    eval_every: Annotated[int | None, Field(gt=0, description="Steps between evaluations; default: a fifth")] = None
    log_every: Annotated[int, Field(gt=0, description="Steps between lines on the screen; files have all")] = 1
    bad_rows: Annotated[
        Literal["stop", "skip"], Field(description="stop: name them and write nothing; skip: keep them aside")
    ] = "stop"
    columns: Annotated[dict[str, str], Field(description="Column names, as chosen=good,rejected=bad")] = {}
    format: Annotated[str | None, Field(description="jsonl, json, csv or parquet, where the name does not tell")] = None
    chat_template: Annotated[str | None, Field(description="Jinja file to use instead of the model's template")] = None
    samples: Annotated[int, Field(ge=0, description="Held-out prompts completed before and after")] = 4
    resume: Annotated[bool, Field(description="Go on from the last verified checkpoint of --out")] = False
    require_better: Annotated[bool, Field(description="Exit 4 unless shown better on held-out data")] = False
    dry_run: Annotated[bool, Field(description="Print the plan and stop")] = False
    trust_remote_code: Annotated[bool, Field(description="Run Python code that the model brings")] = False
    revision: Annotated[str | None, Field(description="Commit of a Hub model; 40 hex digits with remote code")] = None
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
        for name in ("eval_every", "require_better"):
            if self.eval == "none" and getattr(self, name):
                raise UsageError("has no effect without --eval", where=name, code="E316", next="drop one of the two")
        return self


# what may differ between a run and its resumption: nothing that moves a number
MAY_CHANGE = ("log_every", "require_better", "save_every")


@dataclass(frozen=True)
class Rows:
    """Tokenised data of a run, and everything that was counted on the way.

    train, held: groups. counts: what was cut, dropped and without signal. rejects: refused rows as they stood, each
    with its message.
    """

    train: list
    held: list
    counts: dict[str, int]
    sources: list[dict[str, Any]]
    notes: list[str]
    rejects: list[tuple[str, str]] = field(default_factory=list)

    def summary(self) -> str:
        """One line for the screen."""
        shown = [f"{self.counts['rows']} rows, {len(self.held)} held out"]
        shown += [f"{count} {name}" for name, count in self.counts.items() if name != "rows" and count]
        return ", ".join(shown)


def read_rows(config: TrainingConfig, records, other, tokenizer, limit: int, *, usable: Callable, say: Say) -> Rows:
    """Records as groups; rows refused here too stop the run, or are kept aside under --bad-rows skip.

    records: of --data. other: of --eval, where that is data of its own. usable: (group) -> None, or why the group
    cannot teach anything.
    """
    from palate.data.rows import raw_rows
    from palate.data.tokens import control_text, notes, tokenize

    for note in [*records.notes, *records.warnings, *notes(tokenizer)]:
        say(f"data: {note}")
    counts = Counter({"rows": len(records)} | {f"dropped ({reason})": n for reason, n in records.dropped.items()})
    counts["refused"] = len(records.rejected)
    rejects = [(raw, message) for _, raw, _, message in records.rejected]
    sources = [dict(source, role="train") for source in records.sources]

    def groups_of(records) -> list:
        groups, refused = [], []
        for record in records:
            try:
                group = tokenize(record, tokenizer, max_length=limit)
            except DataError as error:
                refused.append((record, error))
                continue
            reason = usable(group)
            if reason is not None:
                counts[reason] += 1
                continue
            if any(control_text(text, tokenizer) for text in texts_of([record])):
                counts["with control text, kept as text"] += 1
            counts["prompts cut"] += group.prompt_cut > 0
            counts["rows with a cut completion"] += any(group.cut)
            groups.append((record, group))
        if refused and config.bad_rows == "stop":
            lines = "\n".join(str(error) for _, error in refused[:20])
            raise DataError(
                f"{len(refused)} of {len(records)} rows cannot be used; the first:\n{lines}",
                code="E200",
                next="mend these rows, or use --bad-rows skip",
            )
        lines_of: dict[str, set[int]] = {}
        for record, _ in refused:
            lines_of.setdefault(record.source.file, set()).add(record.source.line)
        stood = {path: raw_rows(path, lines, config.format) for path, lines in lines_of.items() if os.path.isfile(path)}
        for record, error in refused:
            counts["refused"] += 1
            as_read = json.dumps(asdict(record), ensure_ascii=False)
            rejects.append((stood.get(record.source.file, {}).get(record.source.line, as_read), str(error)))
        return groups

    pairs = groups_of(records)
    if config.eval == "none":
        held = []
    elif config.eval == "auto":
        held_prompts = _held_out([_prompt_key(record) for record, _ in pairs], config.seed)
        held = [group for record, group in pairs if _prompt_key(record) in held_prompts]
        pairs = [(record, group) for record, group in pairs if _prompt_key(record) not in held_prompts]
    else:
        sources += [dict(source, role="eval") for source in other.sources]
        counts["refused"] += len(other.rejected)
        rejects += [(raw, message) for _, raw, _, message in other.rejected]
        held_pairs = groups_of(other)
        shared = {_prompt_key(record) for record, _ in pairs} & {_prompt_key(record) for record, _ in held_pairs}
        counts["prompts shared with eval"] = len(shared)
        held = [group for _, group in held_pairs]
    train = [group for _, group in pairs]
    if not train:
        raise DataError(f"no row of {config.data} is left to train on", code="E104", next="look at the counts above")
    return Rows(train, held, dict(counts), sources, list(records.notes), rejects)


def every_tenth(tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """`tell(done, todo)` at most ten times, and at the end."""
    told = [0]

    def maybe(done: int, todo: int) -> None:
        if done == todo or done * 10 // todo > told[0]:
            told[0] = done * 10 // todo
            tell(done, todo)

    return maybe


def _prompt_key(record) -> str:
    """What decides the split: the prompt, and where there is none (texts) the row itself."""
    text = repr(record.prompt or getattr(record, "completion", ""))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _held_out(keys: Sequence[str], seed: int) -> set[str]:
    """5 % of the distinct prompts, at most 300, by a hash of (seed, prompt): the same however the file is ordered."""
    distinct = sorted(set(keys), key=lambda key: hashlib.blake2b(f"{seed} {key}".encode()).digest())
    return set(distinct[: min(300, len(distinct) // 20)])


def check_model_options(config, *names: str | None) -> None:
    """Nothing, where --revision and --trust-remote-code fit the models of these names; else UsageError."""
    if config.trust_remote_code:
        if not re.fullmatch(r"[0-9a-f]{40}", config.revision or ""):
            what = "runs Python that comes with the model, so it needs the commit that you read"
            raise UsageError(what, where="trust_remote_code", code="E308", next="give --revision with its 40 digits")
        return

    def here(name: str) -> bool:  # an adapter here may have its base on the Hub
        path = Path(name).expanduser()
        return name.startswith("new:") or (path.exists() and not (path / "adapter_config.json").is_file())

    if config.revision is not None and all(here(name) for name in names if name is not None):
        raise UsageError("has no effect on local models", where="revision", code="E316", next="drop it")


def check_new_file(out: str) -> None:
    """Nothing, where a file may be made at --out; else UsageError or MachineError."""
    from palate.files import check_new

    if Path(out).exists():
        raise UsageError(f"{out} exists already", code="E313", next="name another --out")
    check_new(out)


def write_lines(out: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes --out of score and generate, and the folder above it."""
    from palate.files import make_folder, write_json_lines

    make_folder(Path(out).parent)
    write_json_lines(Path(out), rows)


def with_own_tokenizer(loaded):
    """The same model. Raises ModelError where it came without a tokenizer."""
    if loaded.tokenizer is None:
        raise ModelError(
            "has no tokenizer beside it", where=loaded.name, code="E401", next="train it first, or add one"
        )
    return loaded


def max_length(config: TrainingConfig, model) -> int:
    """--max-length, by default min(1024, context). Raises UsageError beyond the model's context."""
    from palate.model.load import context

    bound = context(model)
    if config.max_length is not None and bound is not None and config.max_length > bound:
        raise UsageError(
            f"--max-length {config.max_length} is beyond the model's context of {bound} tokens",
            code="E308",
            next=f"use at most {bound}",
        )
    return config.max_length or min(1024, bound or 1024)


def auto_rate(config: TrainingConfig, parameters: int) -> tuple[float, str]:
    """The learning rate and the reason for it. parameters: of the whole model."""
    if config.lr != "auto":
        return config.lr, "as given"
    rate, reason = (
        next(
            (rate, f"under {limit / 1e6:,.0f} M parameters")
            for limit, rate in ((10e6, 2e-4), (1e9, 5e-6), (math.inf, 5e-7))
            if parameters < limit
        )
        if parameters < 1e9
        else (5e-7, "1 B parameters or more")
    )
    if config.lora_rank:
        return rate * 10, f"{reason}, times ten with LoRA"
    return rate, reason


def resolve_precision(config, device: str) -> str:
    """--precision; auto is bfloat16 on GPUs and float32 elsewhere."""
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if device == "cuda" else "float32"


def update_config(config: TrainingConfig, rate: float) -> OptimConfig:
    """The optimizer's config out of the run's."""
    fields = {name: getattr(config.train, name) for name in UpdateConfig.model_fields}
    return OptimConfig(lr=rate, **fields)


def default_out(config, verb: str) -> Path:
    """--out, or the next free runs/VERB-N."""
    from palate.run import next_folder

    if config.out is not None:
        return Path(config.out)
    if getattr(config, "resume", False):
        raise UsageError("--resume needs --out", code="E313", next="name the run folder to go on with")
    return next_folder(Path("runs"), verb)


def plan_lines(config, loaded, rows: Rows, *, steps: int, rate: float, reason: str, precision: str, objective, seconds):
    """The plan of a run, as lines: rows as the loss will see them, steps, memory by part, time, disk."""
    from palate.data.batch import stream_length
    from palate.scoring import support

    model = loaded.model
    weights, each, kept = disk_needs(config, model)
    trained = each // 3
    lengths = [stream_length(group) for group in rows.train]
    micro = min(config.train.tokens, sum(lengths))
    text = model.config.get_text_config(decoder=True)
    activations = micro * text.hidden_size * text.num_hidden_layers * 4 * (4 if config.train.checkpointing else 22)
    head = min(2**25, micro * text.vocab_size) * 4 * 2
    lines = [
        f"model      {loaded.name}: {model.num_parameters():,} parameters, {support(model).path} prompts"
        + (f" ({support(model).reason})" if support(model).reason else ""),
        f"data       {rows.summary()}",
        f"tokens     {sum(lengths):,} in streams; a row has {min(lengths)} to {max(lengths)}",
        f"training   {objective.name} {objective.options} · lr {rate:g} ({reason}) · {steps} steps of {config.batch} · "
        f"{precision}",
        f"memory     weights {_mb(weights)}, gradients {_mb(trained)}, optimizer {_mb(2 * trained)}, activations about "
        f"{_mb(activations)}, head about {_mb(head)}",
        f"disk       {_mb(weights + kept * each)}: the model and {kept} checkpoints",
    ]
    if seconds is not None:
        lines.append(f"time       about {_clock(seconds * steps)} ({seconds:.1f} s a step, from one micro-batch)")
    return lines


def preview(tokenizer, group) -> list[str]:
    """One row as the loss sees it: prompt and completions token by token, the scored ones in brackets."""
    lines = [f"prompt     {tokenizer.decode(group.prompt.tolist())!r}  ({len(group.prompt)} tokens)"]
    names = tokenizer.convert_ids_to_tokens
    for ids, spans in zip(group.completions, group.spans, strict=True):
        scored = {i for start, stop in spans for i in range(start, stop)}
        shown = " ".join(f"[{name}]" if i in scored else name for i, name in enumerate(names(ids.tolist())))
        lines.append(f"completion {shown}  ({len(scored)} scored)")
    return lines


def micro_seconds(model, groups, objective, tokens: int, batch: int) -> float:
    """Seconds a step should take: one micro-batch forward and backward, scaled by tokens. Moves no weight."""
    from palate.data.batch import stream_length
    from palate.data.stream import pack

    taken = [groups[i] for i in pack([stream_length(g) for g in groups], tokens)[0]]
    part = objective.collate(taken).to(model.device)
    started = time.perf_counter()
    outcome = objective(model, part, objective.prepare(model, [part], _ranks()))
    outcome.loss.total.backward()
    model.zero_grad()
    spent = time.perf_counter() - started
    mean = sum(stream_length(g) for g in groups) / len(groups)
    return spent * mean * min(batch, len(groups)) / sum(stream_length(g) for g in taken)


def _ranks():
    from palate.distributed import Ranks

    return Ranks.current()


def hardware() -> str:
    """CPU or GPU in a few words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def stderr(text: str) -> None:
    """Messages go to stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def require(better: bool, what: str, result: dict[str, Any]) -> None:
    """--require-better. Raises NotBetterError, which carries the result: the run is finished all the same."""
    if not better:
        error = NotBetterError(what, next="train longer, change --lr or --beta, or look at the data with palate doctor")
        error.result = result
        raise error


def _mb(size: float) -> str:
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.0f} MB"


def _clock(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds > 5400
        else f"{seconds / 60:.0f} min"
        if seconds > 90
        else f"{seconds:.0f} s"
    )


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


def prepare(config: TrainingConfig, read: Callable, objective_of: Callable, *, usable: Callable, say: Say) -> Prepared:
    """Reads, loads, tokenises and counts; writes nothing.

    read: (data) -> Records. objective_of: (numerics) -> objective. usable: see `read_rows`.
    """
    from palate.data.sources import refuse_shared_rows
    from palate.data.stream import count_steps
    from palate.data.template import load_template
    from palate.model.adapters import add_lora
    from palate.model.load import load, with_tokenizer
    from palate.model.recompute import enable_recompute
    from palate.reference import reference_identity
    from palate.run import check_out
    from palate.scoring import Numerics, support

    check_model_options(config, config.model, getattr(config, "reference", None))
    if config.out is not None and not config.dry_run:
        check_out(Path(config.out), resume=config.resume)
    records = read(config.data)  # bad rows are named before a model is loaded
    other = read(config.eval) if config.eval not in ("auto", "none") else None
    if other is not None:
        refuse_shared_rows(records, other)
    loaded = load(
        config.model,
        device=config.device,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
    )
    for note in loaded.notes:
        say(f"model: {note}")
    if loaded.tokenizer is None:
        loaded = with_tokenizer(loaded, texts_of(records))
    if config.chat_template is not None:
        load_template(config.chat_template, loaded.tokenizer)
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
    )
    precision = resolve_precision(config, model.device.type)
    numerics = Numerics.of(model, precision, config.train.tokens)
    if support(model).path != "shared":
        say(f"model: scored as padded rows: {support(model).reason}")
    identity = reference_identity(model, precision)
    if config.lora_rank:
        model = add_lora(model, config.lora_rank, config.lora_alpha, seed=config.seed)
        loaded = replace(loaded, model=model)
    if config.train.checkpointing:
        enable_recompute(model)
    rate, reason = auto_rate(config, loaded.model.num_parameters())
    steps = count_steps(len(rows.train), config.batch, config.epochs, config.steps)
    return Prepared(loaded, rows, objective_of(numerics), precision, rate, reason, steps, identity)


def texts_of(records) -> list[str]:
    """Every text of the records, for a tokenizer to be trained on."""

    def flat(value) -> list[str]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, tuple):
            return [text for item in value for text in flat(item)]
        return [value.content] if hasattr(value, "content") else []

    fields = ("prompt", "completion", "chosen", "rejected", "completions")
    return [text for record in records for name in fields for text in flat(getattr(record, name, ""))]


def dry_run(config: TrainingConfig, prepared: Prepared, say: Say) -> dict[str, Any]:
    """The plan, on stdout by way of the result; nothing is written, no weight moves."""
    from palate.reference import annotate

    model, objective, rows = prepared.loaded.model, prepared.objective, prepared.rows
    groups = rows.train[: min(len(rows.train), 8)]
    if objective.reference:
        groups = annotate(groups, model, numerics=objective.numerics, tokens=config.train.tokens)
    seconds = micro_seconds(model, groups, objective, config.train.tokens, config.batch)
    lines = plan_lines(
        config,
        prepared.loaded,
        rows,
        steps=prepared.steps,
        rate=prepared.rate,
        reason=prepared.reason,
        precision=prepared.precision,
        objective=objective,
        seconds=seconds,
    )
    lines += [line for group in rows.train[:2] for line in preview(prepared.loaded.tokenizer, group)]
    return {"plan": lines, "steps": prepared.steps, "rows": rows.counts, "lr": prepared.rate, "summary": lines}


def train(
    config: TrainingConfig,
    verb: str,
    prepared: Prepared,
    *,
    argv: Sequence[str],
    say: Say,
    panel: Callable | None,
    annotate: Callable | None = None,
    better: str,
    verdict: Callable[[dict, dict], tuple[bool, str]],
) -> dict[str, Any]:
    """The run folder from first line to saved model; resumes where --resume asks for it.

    annotate: (run, train, held) -> (train, held, facts, inspect), for objectives with a reference.
    better: the evaluation's key that picks the best checkpoint, as for `fit`.
    verdict: (before, after) -> (shown better, sentence).
    """
    from palate.data.stream import stream
    from palate.evaluation.preference import evaluate
    from palate.model.load import save
    from palate.run import Run, read_lines
    from palate.train import checkpoint
    from palate.train.fit import fit
    from palate.train.loop import TrainState

    out = default_out(config, verb)
    if not config.resume:
        check_disk(config, prepared.loaded.model, out)
    ranks = _ranks()
    resolved = config.model_dump(mode="json", exclude={"out", "resume", "dry_run"})
    with Run.create(
        out, verb=verb, config=resolved, argv=list(argv), resume=config.resume, may_change=MAY_CHANGE
    ) as run:
        if run.finished:
            say(f"{run.path} is finished: nothing to do")
            return dict(run.result, out=str(run.path), reference_scored=0)
        model, tokenizer, objective, rows = (
            prepared.loaded.model,
            prepared.loaded.tokenizer,
            prepared.objective,
            prepared.rows,
        )
        if config.resume:
            refuse_other_data(run.path, rows.sources)
        run.write_data(
            {
                "sources": rows.sources,
                "counts": rows.counts,
                "notes": rows.notes,
                "seed": config.seed,
                "train": len(rows.train),
                "held": len(rows.held),
                "rejected": [message for _, message in rows.rejects],
            }
        )
        if rows.rejects:
            run.write_rejects(raw for raw, _ in rows.rejects)
        say(f"run: {run.path} · {hardware()}")
        say(f"data: {rows.summary()}")
        say(
            f"plan: {objective.name} {objective.options} lr={prepared.rate:g} ({prepared.reason}), "
            f"{prepared.steps} steps of {config.batch}, {prepared.precision}"
        )
        if len(rows.train) < config.batch:
            say(f"plan: every step sees all {len(rows.train)} rows: there are fewer than --batch {config.batch}")
        groups, held, facts, inspect = rows.train, rows.held, {}, None
        if annotate is not None:
            groups, held, facts, inspect = annotate(run, groups, held)

        # what a checkpoint belongs to: with LoRA the frozen weights are not in it, and the rows never are
        data = hashlib.sha256(json.dumps([source.get("sha256") for source in rows.sources]).encode()).hexdigest()
        meta = {"run": run.id, "start": prepared.identity, "data": data}
        state = TrainState.fresh(model, update_config(config, prepared.rate), prepared.steps)
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

        def evaluation() -> dict[str, Any]:
            return evaluate(model, held, objective, tokens=config.train.tokens)

        if state.step == 0:
            if held:
                run.log({"step": 0} | evaluation() | {"time": time.time()})
            if config.samples and held:
                run.samples(sample_rows(model, tokenizer, held[: config.samples], 0))
        fifth = max(1, prepared.steps // 5)
        batches = stream(
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
        with (panel or _no_panel)(prepared.steps) as shown:
            fit(
                state,
                batches,
                objective,
                run,
                ranks=ranks,
                evaluate=evaluation if held else None,
                eval_every=config.eval_every or fifth,
                save_every=config.save_every or fifth,
                keep=config.train.keep,
                meta=meta,
                better=better,
                inspect=inspect if state.step == 0 else None,
                show=lambda line: shown(line) if line["step"] % config.log_every == 0 or "loss" not in line else None,
            )
        if not ranks.first:
            return {}
        if config.samples and held:
            first = [row for row in read_lines(run.path / "samples.jsonl") if row["step"] == 0]
            run.samples(sample_rows(model, tokenizer, held[: config.samples], state.step, first))
        if not (run.path / "model").exists():
            save(model, tokenizer, run.path / "model")
        evals = [line for line in run.metrics() if "eval/loss" in line]
        before, after = (evals[0], evals[-1]) if evals else ({}, {})
        is_better, sentence = verdict(before, after)
        result = {
            "out": str(run.path),
            "model": str(run.path / "model"),
            "steps": state.step,
            "better": is_better,
            "verdict": sentence,
            "before": _evals(before),
            "after": _evals(after),
            "data": rows.counts,
            **facts,
            "summary": [
                f"verdict    {sentence}",
                f"model      {run.path / 'model'}",
                f"next       {after_that(run.path)}",
            ],
        }
        run.finish(result)
    if config.require_better:
        require(is_better, sentence, result)
    return result


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


def check_disk(config: TrainingConfig, model, out: Path) -> None:
    """Nothing, where the model and the checkpoints fit; else MachineError (E315)."""
    weights, each, kept = disk_needs(config, model)
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(above).free
    if weights + kept * each > free:
        what = (
            f"the run needs about {_mb(weights + kept * each)}, of which each of {kept} checkpoints takes {_mb(each)}; "
            f"{_mb(free)} are free"
        )
        raise MachineError(what, where=str(out), code="E315", next="free some space, or lower --train.keep")


def disk_needs(config: TrainingConfig, model) -> tuple[int, int, int]:
    """Bytes of the saved model, bytes of a checkpoint, and how many of these are kept: the last ones and the best."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights, 3 * sum(p.numel() * 4 for p in model.parameters() if p.requires_grad), config.train.keep + 1


def after_that(path: Path) -> str:
    """Commands that go on from a finished run."""
    return f"palate generate --model {path} --data PROMPTS --out FILE · palate runs show {path}"


def _evals(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key.startswith("eval/")}


@contextmanager
def _no_panel(total: int):
    yield lambda line: None


def sample_rows(model, tokenizer, groups, step: int, before: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Rows for samples.jsonl: the groups' prompts completed as the model is now (temperature 0.7, a fixed seed).

    before: the rows of step 0, whose completions stand beside these.
    """
    from palate.data.tokens import decode_completion, end_tokens
    from palate.sampling.generate import generate

    prompts = [group.prompt for group in groups]
    made = generate(model, tokenizer, prompts, max_tokens=64, temperature=0.7, seed=0, end_ids=end_tokens(tokenizer))
    rows = []
    for number, sample in enumerate(made):
        text = decode_completion(tokenizer, prompts[sample.prompt], sample.ids)
        rows.append(
            {
                "step": step,
                "prompt": tokenizer.decode(prompts[sample.prompt].tolist()),
                "before": before[number]["before"] if before else text,
                "after": text if before else None,
                "logp": sample.logp,
                "tokens": len(sample.ids),
                "finished": sample.finished,
            }
        )
    return rows
