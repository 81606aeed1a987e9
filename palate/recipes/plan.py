"""The plan of a run before it runs: rows as the loss will see them, steps, rate, memory by part, time, disk."""

import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from palate.errors import MachineError
from palate.recipes.verbs import Say


def auto_rate(config, parameters: int) -> tuple[float, str]:
    """The learning rate and the reason for it. parameters: of the whole model."""
    if config.lr != "auto":
        return config.lr, "as given"
    bounds = ((10e6, 2e-4, "under 10 M parameters"), (1e9, 5e-6, "under 1 B"), (math.inf, 5e-7, "1 B or more"))
    rate, reason = next((rate, reason) for limit, rate, reason in bounds if parameters < limit)
    return (rate * 10, f"{reason}, times ten with LoRA") if config.lora_rank else (rate, reason)


def dry_run(config, prepared, say: Say) -> dict[str, Any]:
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
    return {
        "plan": lines,
        "steps": prepared.steps,
        "rows": rows.counts,
        "held": len(rows.held),
        "lr": prepared.rate,
        "reference_scored": 0,
        "reference_reused": 0,
        "summary": lines,
    }


def plan_lines(config, loaded, rows, *, steps: int, rate: float, reason: str, precision: str, objective, seconds):
    """The plan of a run, as lines: rows as the loss will see them, steps, memory by part, time, disk."""
    from palate.data.batch import stream_length
    from palate.scoring import support

    model = loaded.model
    weights, each, kept = disk_needs(config, model)
    lengths = [stream_length(group) for group in rows.train]
    parts = ", ".join(f"{name} {_mb(size)}" for name, size in memory_needs(config, model, sum(lengths)).items())
    lines = [
        f"model      {loaded.name}: {model.num_parameters():,} parameters, {support(model).path} prompts"
        + (f" ({support(model).reason})" if support(model).reason else ""),
        f"data       {rows.summary()}",
        f"tokens     {sum(lengths):,} in streams; a row has {min(lengths)} to {max(lengths)}",
        f"training   {objective.name} {objective.options} · lr {rate:g} ({reason}) · {steps} steps of {config.batch} · "
        f"{precision}",
        f"memory     weights {_mb(weights)}, {parts}",
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
    from palate.distributed import Ranks

    taken = [groups[i] for i in pack([stream_length(g) for g in groups], tokens)[0]]
    part = objective.collate(taken).to(model.device)
    started = time.perf_counter()
    outcome = objective(model, part, objective.prepare(model, [part], Ranks.single()))
    outcome.loss.total.backward()
    model.zero_grad()
    spent = time.perf_counter() - started
    mean = sum(stream_length(g) for g in groups) / len(groups)
    return spent * mean * min(batch, len(groups)) / sum(stream_length(g) for g in taken)


def check_disk(config, model, out: Path) -> None:
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


def peak_memory(model) -> int | None:
    """The most bytes that were taken so far: of the GPU's memory, else of this process's; None where nobody says."""
    import torch

    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Counts `peak_memory` of this process from now on, where the system can do so: Linux; elsewhere nothing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def disk_needs(config, model) -> tuple[int, int, int]:
    """Bytes of the saved model, bytes of a checkpoint, and how many of these are kept: the last ones and the best."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights, 3 * sum(p.numel() * 4 for p in model.parameters() if p.requires_grad), config.train.keep + 1


def _mb(size: float) -> str:
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.0f} MB"


def _clock(seconds: float) -> str:
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
