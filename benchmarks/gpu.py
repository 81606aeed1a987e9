"""DPO steps of palate and of TRL on a GPU: tokens a second, peak memory, useful MFU; equality comes first.

    python benchmarks/gpu.py --json out.json          # every cell that fits; needs CUDA and trl
    python benchmarks/gpu.py --quick                  # tiny models, two steps, on the CPU too: tries the script

First log-probs of the stream are held against padded float32 rows, on a small model in the benchmark's own precision;
nothing is timed where they differ. Then each side runs alone on the same batches: float32 weights with bfloat16
matmuls, fused AdamW, the reference scored beforehand (its time is not in the steps). A batch is as many pairs as fill
`--tokens` of our stream. TRL runs without gradient checkpointing, with flash attention where the package is there,
with its own head, the pairs of a step split into device batches of 1, 2, 4, ... up to all, the fastest counted.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass

import numpy as np

PROFILES = {"tldr": (350, 35), "ultrafeedback": (180, 300)}
WARM, BETA, RATE, CLIP = 2, 0.1, 1e-6, 1.0
# hidden, intermediate, layers, heads, kv heads, vocabulary, tied, LoRA rank
MODELS = {
    "qwen2-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 151936, True, 0),
    "qwen2-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True, 0),
    "llama-1b": ("llama", 2048, 8192, 16, 32, 8, 128256, True, 0),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 151936, False, 16),
    "llama-8b": ("llama", 4096, 14336, 32, 32, 8, 128256, False, 16),
}
TINY = {
    "qwen2-tiny": ("qwen2", 64, 128, 2, 4, 2, 512, True, 0),
    "llama-tiny": ("llama", 64, 128, 2, 4, 2, 512, False, 4),
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16, by vendor


@dataclass(frozen=True)
class Cell:
    """One comparison: shape of the model, profile of lengths, stream tokens a step, steps that count."""

    model: str
    shape: tuple
    profile: str
    tokens: int
    steps: int
    scale: float = 1.0


def build(shape: tuple, attention: str = "sdpa"):
    """A random model of the shape on the device, float32, with its adapter."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from palate.model.adapters import add_lora

    kind, hidden, inner, layers, heads, kv, vocabulary, tied, rank = shape
    config = CONFIG_MAPPING[kind](
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=hidden // heads, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=16384,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return add_lora(model, rank) if rank else model


def device() -> str:
    """Where this runs."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def batches_of(cell: Cell) -> list[list]:
    """Groups a step, as many as fill the stream; log-normal lengths."""
    from palate.data.batch import stream_length
    from palate.data.tokens import TokenGroup

    draw, (prompt, completion) = np.random.default_rng(0), PROFILES[cell.profile]

    def ids(mean: float):
        count = int(np.clip(draw.lognormal(np.log(mean * cell.scale) - 0.125, 0.5), 2, cell.tokens // 4))
        return draw.integers(3, cell.shape[6], count).astype(np.int32)

    steps = []
    for _ in range(WARM + cell.steps):
        groups, filled = [], 0
        while True:
            first, sides = ids(prompt), (ids(completion), ids(completion))
            group = TokenGroup(first, sides, tuple(((0, len(side)),) for side in sides), ((0, 1),))
            filled += stream_length(group)
            if groups and filled > cell.tokens:
                break
            groups.append(group)
        steps.append(groups)
    return steps


def row_tokens(groups: list) -> int:
    """Tokens of a step as a trainer of rows sees them, no padding: the same work for both sides."""
    return sum(len(g.completions) * len(g.prompt) + sum(map(len, g.completions)) for g in groups)


def useful_flops(cell: Cell, groups: list) -> float:
    """Of forward and backward, prompts once, head on scored tokens alone; an adapter saves gradients of weights."""
    _, hidden, inner, layers, heads, kv, vocabulary, _, rank = cell.shape
    body = layers * (hidden * hidden * 2 + 2 * hidden * kv * (hidden // heads) + 3 * hidden * inner)
    total = 0.0
    for group in groups:
        prompt, lengths = len(group.prompt), [len(ids) for ids in group.completions]
        pairs = prompt**2 / 2 + sum(n * prompt + n * n / 2 for n in lengths)  # of a query and a key that it sees
        total += (
            2 * body * (prompt + sum(lengths)) + 4 * layers * hidden * pairs + 2 * hidden * vocabulary * sum(lengths)
        )
    return total * (2 if rank else 3)


def check(quick: bool) -> dict:
    """Largest difference from padded float32 rows, nats a completion, beside padded rows in the same precision."""
    import torch

    from palate.data.batch import collate
    from palate.scoring import Numerics, logps, sequence_logps, support

    cell = Cell("check", next(iter(TINY.values())), "tldr", 1024, 1, scale=0.2 if quick else 1.0)
    model, batch = build(cell.shape).eval(), collate(batches_of(cell)[0]).to(device())
    found = support(model)
    assert found.path == "shared", found
    import palate.scoring as scoring

    def rows(numerics):
        return sequence_logps(scoring._padded(model, batch, numerics), batch).total

    with torch.no_grad():
        exact = rows(Numerics())
        result = {
            "float32": float((logps(model, batch).total - exact).abs().max()),
            "bfloat16": float((logps(model, batch, numerics=Numerics("bfloat16")).total - exact).abs().max()),
            "padded bfloat16": float((rows(Numerics("bfloat16")) - exact).abs().max()),
        }
    length = int(batch.length.max())
    if result["float32"] > 1e-4 * length or result["bfloat16"] > 2 * result["padded bfloat16"] + 1e-3 * length:
        raise SystemExit(f"the stream's log-probs differ from padded rows: {result}; nothing is timed")
    return result


class Meter:
    """Seconds of steps and peak memory of one side."""

    def __init__(self):
        import torch

        self.cuda, self.torch, self.seconds, self.losses = torch.cuda.is_available(), torch, [], []
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.start()

    def start(self) -> None:
        self.began = self.now()

    def now(self) -> float:
        if self.cuda:
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def stop(self, loss: float | None = None) -> None:
        self.seconds.append(self.now() - self.began)
        if loss is not None:
            self.losses.append(loss)
        self.start()

    @property
    def peak(self) -> int:
        """Bytes allocated at most; 0 on the CPU, where the process says nothing of one side."""
        return self.torch.cuda.max_memory_allocated() if self.cuda else 0


def ours(cell: Cell, plan: list[list]) -> Meter:
    """palate's own loop over the plan, one micro-batch a step."""
    from palate.data.stream import StepBatch
    from palate.reference import annotate
    from palate.scoring import Numerics
    from palate.train.loop import TrainState, steps
    from palate.train.objectives import pairwise
    from palate.train.optim import OptimConfig

    model = build(cell.shape)
    state = TrainState.fresh(model, OptimConfig(lr=RATE, clip_norm=CLIP, warmup_steps=0))
    numerics = Numerics.of(model, "bfloat16", cell.tokens)
    objective = pairwise("dpo", numerics, beta=BETA)
    scored = [annotate(groups, model, numerics=numerics, tokens=cell.tokens) for groups in plan]
    parts = (
        StepBatch((objective.collate(groups),), len(groups), tuple(range(len(groups))), {"step": i})
        for i, groups in enumerate(scored)
    )
    meter = Meter()
    for step in steps(state, parts, objective):
        meter.stop(step.loss)
    return meter


def theirs(cell: Cell, plan: list[list], split: int) -> Meter:
    """TRL's `train()` over the first step's count of pairs a step, `split` of them a device batch."""
    import importlib.util

    import trl
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

    disable_progress_bars()
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1, "a": 2}, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    count = min(map(len, plan)) // split * split
    rows = [group for groups in plan for group in groups[:count]]

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.meter = Meter()

        def on_step_end(self, *args, **kwargs):
            self.meter.stop()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "grad_norm" in logs:
                self.meter.losses.append(float(logs["loss"]))
            self.meter.start()

    flash = device() == "cuda" and importlib.util.find_spec("flash_attn") is not None
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = trl.DPOConfig(
            output_dir=folder, use_cpu=device() == "cpu", bf16=True, beta=BETA, learning_rate=RATE,
            lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=CLIP, num_train_epochs=1, max_length=None,
            train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, per_device_train_batch_size=split, gradient_accumulation_steps=count // split,
            precompute_ref_log_probs=True, gradient_checkpointing=False,
        )  # fmt: skip
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        data = [{name: ids.tolist() for name, ids in zip(names, (g.prompt, *g.completions), strict=True)} for g in rows]
        trainer = Trainer(
            model=build(cell.shape, "flash_attention_2" if flash else "sdpa"), args=args,
            train_dataset=Dataset.from_list(data), processing_class=tokenizer, callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    clock.meter.tokens = [row_tokens(groups[:count]) for groups in plan]
    return clock.meter


def compare(cell: Cell) -> dict:
    """The row of a cell: both sides, one after the other."""
    import torch

    plan = batches_of(cell)
    mine = ours(cell, plan)
    rate = statistics.median(row_tokens(g) / s for g, s in zip(plan[WARM:], mine.seconds[WARM:], strict=True))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = next((flops for part, flops in PEAKS.items() if part in name), None)
    useful = statistics.median(useful_flops(cell, g) / s for g, s in zip(plan[WARM:], mine.seconds[WARM:], strict=True))
    best, split = None, 1
    while split <= min(map(len, plan)):
        try:
            other = theirs(cell, plan, split)
        except torch.OutOfMemoryError:
            break
        found = statistics.median(t / s for t, s in zip(other.tokens[WARM:], other.seconds[WARM:], strict=True))
        if best is None or found > best[0]:
            best = (found, split, other.peak, other.losses[0])
        split *= 2
    row = {"model": cell.model, "profile": cell.profile, "tokens": cell.tokens, "device": name}
    row |= {"ours_tokens_per_second": rate, "ours_peak": mine.peak, "loss_ours": mine.losses[0]}
    row |= {"mfu": useful / peak if peak else None}
    if best is None:
        return row | {"ratio": None, "ratio_memory": None, "trl_split": None, "loss_trl": None}
    row |= {"ratio": rate / best[0], "trl_split": best[1], "loss_trl": best[3]}
    return row | {"ratio_memory": mine.peak / best[2] if best[2] else None}


def line_of(row: dict) -> str:
    """A line of the printed table."""

    def show(value, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = (row["model"], row["profile"], str(row["tokens"]), f"{row['ours_tokens_per_second']:.0f}")
    cells += (show(row["ratio"], ".2f"), show(row["ratio_memory"], ".2f"), show(row["mfu"], ".1%"))
    cells += (show(row["trl_split"], "d"), format(row["loss_ours"], ".4f"), show(row["loss_trl"], ".4f"))
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    """Checks, then prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models and texts, two steps; runs on the CPU")
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--profile", action="append", choices=list(PROFILES))
    parser.add_argument("--tokens", action="append", type=int, help="stream tokens a step (default: 2048 and 8192)")
    parser.add_argument("--steps", type=int, default=8, help="steps that count (default 8)")
    parser.add_argument("--json", metavar="OUT", help='writes {"check": ..., "rows": [...]}')
    given = parser.parse_args(argv)
    if not given.quick and device() == "cpu":
        parser.error("no CUDA device; --quick tries the script on the CPU")
    checked = check(given.quick)
    print("largest difference from padded float32 rows, nats:", {k: f"{v:.2g}" for k, v in checked.items()})
    shapes = TINY if given.quick else {name: MODELS[name] for name in given.model or MODELS}
    cells = [
        Cell(name, shape, profile, tokens, 2 if given.quick else given.steps, 0.2 if given.quick else 1.0)
        for name, shape in shapes.items()
        for profile in given.profile or (("tldr",) if given.quick else PROFILES)
        for tokens in given.tokens or ((512,) if given.quick else (2048, 8192))
    ]
    print(
        "| model | profile | tokens | ours, tokens/s | over TRL | memory | MFU | TRL's split | first loss, ours | TRL |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for cell in cells:
        rows.append(compare(cell))
        print(line_of(rows[-1]), flush=True)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"check": checked, "rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
