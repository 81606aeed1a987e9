"""The plan of a run before it runs: rows as the loss will see them, steps, rate, memory by part, time, disk."""

import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from palate.errors import MachineError, UsageError
from palate.recipes.verbs import Say
from palate.report.words import duration, size


class PlanConfig(BaseModel):
    """What --dry-run plans for, where it is not this machine: asked for, it loads no weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    processes: Annotated[
        int | None, Field(gt=0, description="Plan from the config alone, without weights, for so many processes")
    ] = None
    device_memory: Annotated[
        float | None, Field(gt=0, lt=math.inf, description="GB of memory of one device: does the plan fit?")
    ] = None
    tflops: Annotated[
        float | None, Field(gt=0, lt=math.inf, description="TFLOP/s that one device reaches in training, for the time")
    ] = None


def auto_rate(config, parameters: int) -> tuple[float, str]:
    """The learning rate and the reason for it. parameters: of the whole model."""
    if config.lr != "auto":
        return config.lr, "as given"
    bounds = ((10e6, 2e-4, "under 10 M parameters"), (1e9, 5e-6, "under 1 B"), (math.inf, 5e-7, "1 B or more"))
    rate, reason = next((rate, reason) for limit, rate, reason in bounds if parameters < limit)
    return (rate * 10, f"{reason}, times ten with LoRA") if config.lora_rank else (rate, reason)


def dry_run(config, prepared, say: Say) -> dict[str, Any]:
    """The plan, on stdout by way of the result; no run is written (tokens of large files are kept), no weight moves."""
    outlined = prepared.loaded.model.device.type == "meta"
    needs = memory_plan(config, prepared)
    pace = None if outlined else pace_of(config, prepared, say)
    lines = plan_lines(
        config,
        prepared.loaded,
        prepared.rows,
        steps=prepared.steps,
        rate=prepared.rate,
        reason=prepared.reason,
        precision=prepared.precision,
        objective=prepared.objective,
        needs=needs,
        seconds=pace,
    )
    lines += [line for group in prepared.rows.train[:2] for line in preview(prepared.loaded.tokenizer, group)]
    memory = needs.as_dict() if isinstance(needs, Foreseen) else {}
    return {
        "plan": lines,
        "steps": prepared.steps,
        "rows": prepared.rows.counts,
        "held": len(prepared.rows.held),
        "lr": prepared.rate,
        "peak_bytes": memory.get("peak"),
        "memory": memory,
        "seconds_per_step": pace,
        "reference_scored": 0,
        "reference_reused": 0,
        "summary": lines,
    }


def plan_lines(
    config, loaded, rows, *, steps: int, rate: float, reason: str, precision: str, objective, needs=None, seconds=None
):
    """The plan of a run, as lines: rows as the loss will see them, steps, memory by part, time, disk.

    needs: of `memory_plan`; without, what the run's rows take is not known. seconds: of a step.
    """
    from palate.data.table import Lengths
    from palate.model.quantized import count_weights, is_quantized
    from palate.scoring import support

    model = loaded.model
    quantized = " (linear layers in 4 bits)" if is_quantized(model) else ""
    needs = needs or Estimated("its rows are made on the way", memory_needs(config, model, config.train.tokens))
    weights, each, kept = disk_needs(config, model)
    lengths = Lengths.of(rows.train).stream
    lines = [
        f"model      {loaded.name}: {count_weights(model):,} parameters{quantized}, {support(model).path} prompts"
        + (f" ({support(model).reason})" if support(model).reason else ""),
        f"data       {rows.summary()}",
        f"tokens     {lengths.sum():,} in streams; a row has {lengths.min()} to {lengths.max()}",
        f"training   {objective.name} {objective.options} · lr {rate:g} ({reason}) · {steps} steps of {config.batch} · "
        f"{precision}",
        *needs.lines(),
        f"disk       {size(weights + kept * each)}: the model and {kept} checkpoints",
    ]
    if seconds is not None:
        lines.append(
            f"time       about {duration(seconds * steps)} ({seconds:.2g} s a step, from {TIMED} timed micro-batches)"
        )
    elif isinstance(needs, Foreseen) and config.plan.tflops:
        seconds = needs.step_flops / (config.plan.tflops * 1e12 * needs.processes)
        work = f"{needs.step_flops / 1e12:,.0f} TFLOP a step"
        what = f"{work} at {config.plan.tflops:g} TFLOP/s on each of {needs.processes}"
        lines.append(f"time       about {duration(seconds * steps)} ({seconds:.2g} s a step: {what})")
    return lines


def refuse_plan(config, verb: str) -> None:
    """Nothing, unless options of PlanConfig are given to a verb whose work makes its own rows: UsageError (E308)."""
    for name in PlanConfig.model_fields:
        if getattr(config.plan, name) is not None:
            what = f"palate {verb} has no plan for other machines: its rows are made on the way"
            raise UsageError(what, where=f"plan.{name}", code="E308", next="plan the dpo or sft run that it will take")


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foreseen:
    """What a run will take: the bytes of `needs`, and what the process holds besides (`rest`: imports, data).

    processes: that share the rows of a step, and under `sharded` all that belongs to a weight. gathered: bytes of the
    weights that a sharded process has whole at one time. step_flops: of one optimizer step, all processes.
    """

    needs: Any
    rest: int = 0
    processes: int = 1
    gathered: int = 0
    step_flops: float = 0.0
    device_memory: float | None = None

    @property
    def peak(self) -> int:
        """Bytes of one process at its highest, every process with all weights."""
        return self.rest + self.needs.peak

    @property
    def sharded(self) -> int:
        """The same with all that belongs to a weight spread over the processes, layers gathered as they are used."""
        needs, each = self.needs, self.processes
        state = (needs.weights + needs.gradients + needs.optimizer) // each
        return self.rest + state + self.gathered + needs.activations + needs.working - needs.casts

    def as_dict(self) -> dict[str, Any]:
        """Bytes by part, for --json."""
        parts = {name: getattr(self.needs, name) for name in _PARTS}
        more = {"sharded": self.sharded} if self.processes > 1 else {}
        return parts | {"saving": self.needs.saving, "rest": self.rest, "peak": self.peak} | more

    def lines(self) -> list[str]:
        """For people."""
        parts = [f"{name} {size(getattr(self.needs, name))}" for name in _PARTS]
        if self.rest:
            parts.append(f"Python and data {size(self.rest)}")
        lines = [f"memory     about {size(self.peak)} at the peak{self._fits(self.peak)}: {', '.join(parts)}"]
        if self.needs.peak > self.needs.step:
            lines.append(f"           when the model is saved: a step alone takes {size(self.rest + self.needs.step)}")
        if self.processes > 1:
            lines[0] += f"; on each of {self.processes} processes, each with all weights"
            lines.append(
                f"sharded    about {size(self.sharded)} on each of {self.processes}{self._fits(self.sharded)}, "
                f"with {size(self.gathered)} of gathered weights, if all that belongs to a weight is spread over "
                "them (FSDP2), which palate does not do by itself yet"
            )
        return lines

    def _fits(self, size: int) -> str:
        if self.device_memory is None:
            return ""
        return f" ({'fits' if size <= self.device_memory * 2**30 else 'does not fit'} in {self.device_memory:g} GB)"


_PARTS = ("weights", "gradients", "optimizer", "activations", "working")


@dataclass(frozen=True)
class Estimated:
    """The memory of a model whose forward cannot be rehearsed, by rule of thumb."""

    why: str
    parts: dict[str, int]

    def lines(self) -> list[str]:
        """For people."""
        parts = ", ".join(f"{name} {size(part)}" for name, part in self.parts.items())
        return [f"memory     weights and about {parts} (by rule of thumb: {self.why})"]


def memory_plan(config, prepared) -> Foreseen | Estimated:
    """The memory that the run will take, from a rehearsal of its largest micro-batch."""
    from palate.data.batch import stream_length
    from palate.data.table import Lengths
    from palate.errors import ModelError
    from palate.train.rehearsal import rehearse

    model, groups = prepared.loaded.model, prepared.rows.train
    steps = _step_batches(config, groups, LOOKED_AT)
    largest = max((micro for step in steps for micro in step), key=lambda micro: sum(map(stream_length, micro)))
    several = (config.plan.processes or 1) > 1 or any(len(step) > 1 for step in steps)
    states = 1 if config.train.optimizer == "rmsprop" else 2
    outlined, processes = model.device.type == "meta", config.plan.processes or 1
    rest = 0 if outlined or model.device.type == "cuda" else resident() - _bytes_of(model)
    try:
        needs = rehearse(model, largest, prepared.objective.numerics, states=states, several=several)
    except ModelError as error:
        return Estimated(error.what, memory_needs(config, model, sum(map(stream_length, largest))))
    tokens = Lengths.of(groups).stream.mean() * min(config.batch, len(groups))
    return Foreseen(
        needs,
        rest=max(rest, 0),
        processes=processes,
        gathered=_gathered(model, prepared.precision) if processes > 1 else 0,
        step_flops=needs.flops * tokens / sum(map(stream_length, largest)),
        device_memory=config.plan.device_memory,
    )


def _gathered(model, precision: str) -> int:
    """Bytes of two layers, one in use and one on its way, and of all outside layers, in the matmuls' precision."""
    layers = max((module for module in model.modules() if hasattr(module, "__len__")), key=_numel, default=())
    each = max(map(_numel, layers), default=0)
    outside = _numel(model) - sum(map(_numel, layers))
    return (2 * each + outside) * (2 if precision == "bfloat16" else 4)


def _numel(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes_of(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _step_batches(config, groups, count: int) -> list[list[list]]:
    """The groups of every micro-batch of the first `count` optimizer steps, as the run will take them."""
    from palate.data.batch import stream_length
    from palate.data.stream import order, pack

    rows, share = order(len(groups), config.seed, 0), config.plan.processes or 1
    steps = []
    for start in range(0, min(len(rows), count * config.batch), config.batch):
        mine = [groups[row] for row in rows[start : start + config.batch][::share]]
        steps.append([[mine[i] for i in part] for part in pack([stream_length(g) for g in mine], config.train.tokens)])
    return steps


LOOKED_AT = 64  # steps whose micro-batches are compared to find a large one


# --- time -------------------------------------------------------------------------------------------------------------

TIMED = 3


def pace_of(config, prepared, say: Say) -> float:
    """Seconds that an optimizer step will take: three micro-batches of the run itself, forward and backward, and an
    update of copies. No weight moves."""
    from palate.data.batch import stream_length
    from palate.data.table import Lengths
    from palate.reference import annotate

    model, objective = prepared.loaded.model, prepared.objective
    steps = _step_batches(config, prepared.rows.train, TIMED)
    micros = [micro for step in steps for micro in step][:TIMED]
    tokens, seconds = [], []
    for number, micro in enumerate([micros[0], *micros]):  # the first call of anything is slow
        if objective.reference:
            micro = annotate(micro, model, numerics=objective.numerics, tokens=config.train.tokens)
        spent = pass_seconds(model, micro, objective)
        if number:
            seconds.append(spent)
            tokens.append(sum(map(stream_length, micro)))
    lengths = Lengths.of(prepared.rows.train).stream
    in_step = lengths.mean() * min(config.batch, len(lengths))
    return in_step * sum(seconds) / sum(tokens) + update_seconds(config, prepared)


def pass_seconds(model, groups, objective) -> float:
    """Seconds of one micro-batch: collated, forward, backward. Moves no weight."""
    from palate.distributed import Ranks

    started = time.perf_counter()
    part = objective.collate(groups).to(model.device)
    outcome = objective(model, part, objective.prepare(model, [part], Ranks.single()))
    outcome.loss.total.backward()
    float(outcome.loss.total.detach())  # a GPU has done it all by then
    spent = time.perf_counter() - started
    model.zero_grad()
    return spent


def update_seconds(config, prepared) -> float:
    """Seconds of clipping and updating the weights, from copies of the first 32 M of them."""
    import torch
    from torch import nn

    from palate.train.optim import OptimConfig, UpdateConfig, build_optimizer

    copies, total = nn.ParameterList(), 0
    for parameter in prepared.loaded.model.parameters():
        if parameter.requires_grad:
            total += parameter.numel()
            if sum(copy.numel() for copy in copies) < 2**25:
                copies.append(nn.Parameter(parameter.detach().clone()))
                copies[-1].grad = torch.zeros_like(copies[-1])
    optim = OptimConfig(lr=prepared.rate, **{name: getattr(config.train, name) for name in UpdateConfig.model_fields})
    optimizer = build_optimizer(copies, optim)
    for _ in range(2):  # the first one makes the states
        started = time.perf_counter()
        float(nn.utils.clip_grad_norm_(copies.parameters(), optim.clip_norm))
        optimizer.step()
        spent = time.perf_counter() - started
    return spent * total / sum(copy.numel() for copy in copies)


# --- the rest ---------------------------------------------------------------------------------------------------------


def preview(tokenizer, group) -> list[str]:
    """One row as the loss sees it: prompt and completions token by token, the scored ones in brackets."""
    lines = [f"prompt     {tokenizer.decode(group.prompt.tolist())!r}  ({len(group.prompt)} tokens)"]
    names = tokenizer.convert_ids_to_tokens
    for ids, spans in zip(group.completions, group.spans, strict=True):
        scored = {i for start, stop in spans for i in range(start, stop)}
        shown = " ".join(f"[{name}]" if i in scored else name for i, name in enumerate(names(ids.tolist())))
        lines.append(f"completion {shown}  ({len(scored)} scored)")
    return lines


def check_disk(config, model, out: Path) -> None:
    """Nothing, where the model and the checkpoints fit; else MachineError (E315)."""
    weights, each, kept = disk_needs(config, model)
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(above).free
    if weights + kept * each > free:
        what = (
            f"the run needs about {size(weights + kept * each)}, of which each of {kept} checkpoints takes "
            f"{size(each)}; {size(free)} are free"
        )
        raise MachineError(what, where=str(out), code="E315", next="free some space, or lower --train.keep")


def memory_needs(config, model, tokens: int) -> dict[str, int]:
    """Bytes that training takes besides the weights, by part. tokens: of all rows in streams."""
    trained = disk_needs(config, model)[1] // 3
    text = model.config.get_text_config(decoder=True)
    micro = min(config.train.tokens, tokens)
    layers = text.hidden_size * text.num_hidden_layers * 4 * (4 if config.train.checkpointing else 22)
    head = min(2**25, micro * text.vocab_size) * 4 * 2
    return {
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations about": micro * layers,
        "head about": head,
    }


def resident() -> int:
    """Bytes of memory that this process has now; 0 where nobody says."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def peak_memory() -> int | None:
    """The most bytes that were taken so far: of the GPU's memory where any was, else of this process's; None where
    nobody says."""
    import torch

    if torch.cuda.is_initialized() and (taken := torch.cuda.max_memory_allocated()):
        return taken
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Counts `peak_memory` from now on, of a process where the system can do so: Linux; elsewhere nothing."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def disk_needs(config, model) -> tuple[int, int, int]:
    """Bytes of the saved model, bytes of a checkpoint, and how many of these are kept: the last ones and the best."""
    from palate.model.quantized import count_weights, is_quantized

    weights = 4 * count_weights(model) if is_quantized(model) else _bytes_of(model)
    return weights, 3 * sum(p.numel() * 4 for p in model.parameters() if p.requires_grad), config.train.keep + 1
