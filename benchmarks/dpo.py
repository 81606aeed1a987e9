"""DPO steps of palate and of its peers, side by side: seconds, memory, and losses as proof of equal work.

    python benchmarks/dpo.py --quick --json out.json --model FOLDER

Both sides run in one process, in turns, on the same batches of 4 pairs (ids given, nothing shuffled), with the same
AdamW, rate, clipping and dtype; one short warm-up step is dropped; a cell is the median of the paired steps. Ours is
the whole step: collation, forward, backward, clipping, update. TRL's is `DPOTrainer.train()` itself, its clock stopped
while we step and while it logs. Peak memory is VmHWM with each side alone in its process, over the warm-up and the
step with most tokens.

Settings of TRL 1.16:
    default  its defaults: gradient checkpointing, the reference in every step; `bf16=False` where float32 is compared
    best     the fastest found for it on CPU: `precompute_ref_log_probs=True`, `gradient_checkpointing=False`, one pair
             a device batch with 4 accumulated
The reference pass stands apart under "+ref": ours always, TRL's where it precomputes.

How to read a CPU ratio: most of the lead over TRL comes from TRL's LM head, which off CUDA scores every position
(prompt and padding too, entropy and top-1 with it); a GPU has no such gap. The smaller the body beside the vocabulary,
the more this counts, so the 4-layer model, nearly all head, is a tripwire for this repository and no result to quote.
Times on a shared machine vary by tens of percent; only ratios within one row mean anything.
"""

import argparse
import copy
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

SMALL = "llama-4-layers-49k"
# mean tokens of a prompt and of a completion
PROFILES = {"tldr": (350, 35), "hh": (100, 80), "ultrafeedback": (180, 300)}
DTYPES = ("float32", "bfloat16")
SETTINGS = ("default", "best")
BATCH, BETA, RATE, CLIP, BETAS, EPS, LONGEST = 4, 0.1, 1e-6, 1.0, (0.9, 0.999), 1e-8, 1024


@dataclass(frozen=True)
class Cell:
    """One process's work. side: "both" takes turns, "ours" and "trl" run alone for their peak."""

    model: str  # SMALL or a folder
    profile: str
    dtype: str
    setting: str
    steps: int
    side: str = "both"
    tokens: int = 2048
    scale: float = 1.0


# --- the work -------------------------------------------------------------------------------------------------------


def pairs(cell: Cell, vocabulary: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(prompt, chosen, rejected) ids: 4 short pairs to warm up on, then 4 a step with log-normal lengths.

    A prompt and its completion stay within 1,024 tokens, where TRL would cut.
    """
    draw = np.random.default_rng([7, list(PROFILES).index(cell.profile)])
    prompt, completion = (mean * cell.scale for mean in PROFILES[cell.profile])

    def length(mean: float, sigma: float, most: int) -> int:
        return int(np.clip(draw.lognormal(np.log(mean) - sigma**2 / 2, sigma), 2, most))

    def ids(count: int) -> np.ndarray:
        return draw.integers(3, vocabulary, count).astype(np.int32)

    rows = [(ids(8), ids(4), ids(5)) for _ in range(BATCH)]
    for _ in range(BATCH * cell.steps):
        first = length(prompt, 0.5, LONGEST // 2)
        rows.append((ids(first), *(ids(length(completion, 0.6, LONGEST - first)) for _ in "cr")))
    if cell.side == "both":
        return rows
    timed = [rows[i : i + BATCH] for i in range(BATCH, len(rows), BATCH)]
    return rows[:BATCH] + max(timed, key=lambda step: sum(len(ids) for row in step for ids in row))


def small_model():
    """A random Llama of 4 layers and 16M parameters under a tied vocabulary of 49,152."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).float()


def our_model(cell: Cell):
    """The model in float32, as palate loads it."""
    from palate.model.load import load

    return small_model() if cell.model == SMALL else load(cell.model).model


def their_model(cell: Cell):
    """The same weights, as transformers loads them."""
    import torch
    from transformers import AutoModelForCausalLM

    return (
        small_model() if cell.model == SMALL else AutoModelForCausalLM.from_pretrained(cell.model, dtype=torch.float32)
    )


class Ours:
    """palate, one optimizer step at a time."""

    def __init__(self, cell: Cell, rows, model):
        from palate.data.batch import stream_length
        from palate.data.stream import StepBatch, pack
        from palate.data.tokens import TokenGroup
        from palate.reference import annotate
        from palate.scoring import Numerics
        from palate.train.loop import TrainState, steps
        from palate.train.objectives import pairwise
        from palate.train.optim import OptimConfig

        optim = OptimConfig(lr=RATE, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, clip_norm=CLIP, warmup_steps=0)
        state = TrainState.fresh(model, optim)
        numerics = Numerics.of(model, cell.dtype, cell.tokens)
        objective = pairwise("dpo", numerics, beta=BETA)
        groups = [
            TokenGroup(prompt, (chosen, rejected), (((0, len(chosen)),), ((0, len(rejected)),)), ((0, 1),))
            for prompt, chosen, rejected in rows
        ]
        started = time.perf_counter()
        groups = annotate(groups, model, numerics=numerics, tokens=cell.tokens)
        self.reference_seconds = time.perf_counter() - started

        def batches():
            for first in range(0, len(groups), BATCH):
                mine = groups[first : first + BATCH]
                parts = pack([stream_length(group) for group in mine], cell.tokens)
                micro = tuple(objective.collate([mine[i] for i in part]) for part in parts)
                yield StepBatch(micro, BATCH, tuple(range(first, first + BATCH)), {"step": first // BATCH})

        self.steps = steps(state, batches(), objective)
        self.seconds, self.losses, self.norms = [], [], []

    def step(self) -> None:
        """Collate, forward, backward, clip, update; timed."""
        started = time.perf_counter()
        done = next(self.steps)
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(done.loss)
        self.norms.append(done.grad_norm)


def run_trl(cell: Cell, rows, model, between) -> dict:
    """TRL's own `train()` over the rows; `between` is called after each of its steps, off its clock."""
    import torch
    import trl
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    disable_progress_bars()
    # the ids are given: this tokenizer only says which id pads
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1, "a": 2}, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    best = cell.setting == "best"
    found = {"seconds": [], "losses": [], "norms": [], "reference_seconds": 0.0}

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, *args, **kwargs):
            started = time.perf_counter()
            made = super()._precompute_ref_logps(*args, **kwargs)
            found["reference_seconds"] += time.perf_counter() - started
            return made

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            found["seconds"].append(time.perf_counter() - self.started)
            between()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "grad_norm" in logs:
                found["losses"].append(float(logs["loss"]))
                found["norms"].append(float(logs["grad_norm"]))
            self.started = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        args = trl.DPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=cell.dtype == "bfloat16",
            beta=BETA,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=0.0,
            max_grad_norm=CLIP,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **(
                dict(
                    per_device_train_batch_size=1,
                    gradient_accumulation_steps=BATCH,
                    precompute_ref_log_probs=True,
                    gradient_checkpointing=False,
                )
                if best
                else dict(per_device_train_batch_size=BATCH)
            ),
        )
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        data = Dataset.from_list([{n: ids.tolist() for n, ids in zip(names, row, strict=True)} for row in rows])
        trainer = Trainer(
            model=model,
            ref_model=None if best else copy.deepcopy(model),
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()
    assert len(found["losses"]) == len(rows) // BATCH, "TRL logged another number of steps"
    assert next(model.parameters()).dtype == torch.float32
    return found


# --- one process ----------------------------------------------------------------------------------------------------


def run_cell(cell: Cell) -> dict:
    """Measures the cell in this process."""
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger().setLevel(logging.ERROR)
    if cell.side != "ours":
        import trl  # noqa: F401, counted as an import

    imports = peak_bytes()
    ours = theirs = None
    if cell.side != "trl":
        model = our_model(cell)
        rows = pairs(cell, model.config.vocab_size)
        ours = Ours(cell, rows, model)
    if cell.side == "ours":
        for _ in range(len(rows) // BATCH):
            ours.step()
    else:
        model = their_model(cell)
        rows = pairs(cell, model.config.vocab_size)
        theirs = run_trl(cell, rows, model, ours.step if ours else lambda: None)
    result = {"peak": peak_bytes(), "imports": imports, "threads": torch.get_num_threads()}
    if cell.side == "both":
        result["ours"] = {
            "seconds": ours.seconds[1:],
            "losses": ours.losses[1:],
            "norms": ours.norms[1:],
            "reference_seconds": ours.reference_seconds / cell.steps,
        }
        result["peer"] = {name: theirs[name][1:] for name in ("seconds", "losses", "norms")}
        result["peer"]["reference_seconds"] = theirs["reference_seconds"] / cell.steps
        # real tokens: what a step must learn from, the prompt counted twice as TRL does
        result["tokens"] = [
            sum(2 * len(p) + len(c) + len(r) for p, c, r in rows[i : i + BATCH]) for i in range(BATCH, len(rows), BATCH)
        ]
        result["flops"] = [useful_flops(model, rows[i : i + BATCH]) for i in range(BATCH, len(rows), BATCH)]
        result["matmul_peak"] = matmul_peak(cell.dtype)
    return result


def peak_bytes() -> int:
    """Largest resident size of this process so far, of this program alone (VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def useful_flops(model, rows) -> float:
    """Forward and backward of a step that wastes nothing: prompts once, no padding, head on scored rows alone."""
    config = model.config
    head = config.vocab_size * config.hidden_size
    body = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n
    )
    width = (
        config.num_hidden_layers
        * config.num_attention_heads
        * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    )
    total = 0.0
    for prompt, *completions in rows:
        lengths = [len(ids) for ids in completions]
        seen = len(prompt) ** 2 / 2 + sum(len(prompt) * n + n**2 / 2 for n in lengths)
        total += 2 * body * (len(prompt) + sum(lengths)) + 2 * head * sum(lengths) + 4 * width * seen
    return 3 * total


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a 2048 x 2048 product, the best of a second."""
    import torch

    left, right = (torch.randn(2048, 2048).to(getattr(torch, dtype)) for _ in "ab")
    best, until = float("inf"), time.perf_counter() + 1
    while time.perf_counter() < until:
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


# --- all processes --------------------------------------------------------------------------------------------------


def measure(cell: Cell) -> dict:
    """`run_cell` in a process of its own."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cell.json"
        command = [sys.executable, __file__, "--cell", json.dumps(asdict(cell)), "--json", str(out)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{cell} failed:\n{done.stdout[-4000:]}")
        return json.loads(out.read_text())


def row_of(cell: Cell, timed: dict, peak_ours: int | None, peak_peer: int | None) -> dict:
    """A line of the table; the fields that others read come first."""
    ours, peer = timed["ours"], timed["peer"]
    seconds, peer_seconds = statistics.median(ours["seconds"]), statistics.median(peer["seconds"])
    pairs_of = zip(peer["seconds"], ours["seconds"], strict=True)
    tokens = sum(timed["tokens"])
    peak = timed["matmul_peak"]
    with_reference = seconds + ours["reference_seconds"]
    return {
        "model": Path(cell.model).name,
        "profile": cell.profile,
        "dtype": cell.dtype,
        "peer": "trl",
        "setting": cell.setting,
        "ratio_step": statistics.median(theirs / mine for theirs, mine in pairs_of),
        "ratio_memory": peak_ours / peak_peer if peak_ours and peak_peer else None,
        "loss_ours": ours["losses"][0],
        "loss_peer": peer["losses"][0],
        "ratio_with_reference": (peer_seconds + peer["reference_seconds"]) / with_reference,
        "norm_ours": ours["norms"][0],
        "norm_peer": peer["norms"][0],
        "losses_ours": ours["losses"],
        "losses_peer": peer["losses"],
        "norms_ours": ours["norms"],
        "norms_peer": peer["norms"],
        "seconds_ours": ours["seconds"],
        "seconds_peer": peer["seconds"],
        "reference_seconds_ours": ours["reference_seconds"],
        "reference_seconds_peer": peer["reference_seconds"],
        "peak_ours": peak_ours,
        "peak_peer": peak_peer,
        "tokens_per_second_ours": tokens / sum(ours["seconds"]),
        "tokens_per_second_peer": tokens / sum(peer["seconds"]),
        "matmul_share_ours": sum(timed["flops"]) / sum(ours["seconds"]) / peak,
        "matmul_share_peer": sum(timed["flops"]) / sum(peer["seconds"]) / peak,
        "threads": timed["threads"],
    }


HEADER = (
    "| model | profile | dtype | TRL setting | s/step TRL | s/step ours (+ref) | ratio | +ref | memory | tokens/s "
    "| of matmul peak | loss TRL / ours | gradient norm TRL / ours |\n|" + "---|" * 13
)


def line_of(row: dict) -> str:
    """The row as Markdown."""
    memory = "-"
    if row["ratio_memory"]:
        memory = f"{row['ratio_memory']:.2f} ({row['peak_ours'] / 2**30:.1f} of {row['peak_peer'] / 2**30:.1f} GiB)"
    seconds = statistics.median(row["seconds_ours"])
    return (
        f"| {row['model']} | {row['profile']} | {row['dtype']} | {row['setting']} "
        f"| {statistics.median(row['seconds_peer']):.2f} | {seconds:.2f} (+{row['reference_seconds_ours']:.2f}) "
        f"| **{row['ratio_step']:.1f}x** | {row['ratio_with_reference']:.1f}x | {memory} "
        f"| {row['tokens_per_second_peer']:.0f} -> {row['tokens_per_second_ours']:.0f} "
        f"| {row['matmul_share_peer']:.0%} -> {row['matmul_share_ours']:.0%} "
        f"| {row['loss_peer']:.6f} / {row['loss_ours']:.6f} | {row['norm_peer']:.4f} / {row['norm_ours']:.4f} |"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the cells, prints the table, writes the JSON after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float32, tldr, both settings, 3 steps (also: no flag)")
    parser.add_argument("--all", action="store_true", help="every profile, dtype and setting, 5 steps")
    parser.add_argument("--model", action="append", default=[], metavar="FOLDER", help="measured before the small one")
    parser.add_argument("--no-small", action="store_true", help="leave the 4-layer model out")
    parser.add_argument("--profile", action="append", choices=list(PROFILES))
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--setting", action="append", choices=SETTINGS)
    parser.add_argument("--steps", type=int, help="paired steps (default 5; 3 with --quick)")
    parser.add_argument("--tokens", type=int, default=2048, help="our stream tokens a micro-batch")
    parser.add_argument("--scale", type=float, default=1.0, help="times the profiles' lengths, to try the script")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--json", metavar="OUT", help='writes {"rows": [...]}')
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.cell:
        Path(given.json).write_text(json.dumps(run_cell(Cell(**json.loads(given.cell)))))
        return 0
    models = given.model + ([] if given.no_small else [SMALL])
    for folder in given.model:
        if not Path(folder, "config.json").exists():
            parser.error(f"--model {folder}: no config.json there")
    profiles = given.profile or (list(PROFILES) if given.all else ["tldr"])
    dtypes = given.dtype or (DTYPES if given.all else ["float32"])
    picked = given.profile or given.dtype or given.setting or given.all
    steps = given.steps or (3 if given.quick or not picked else 5)
    print(HEADER, flush=True)
    rows = []
    for model in models:
        for profile in profiles:
            for dtype in dtypes:
                alone = None
                for setting in given.setting or SETTINGS:
                    cell = Cell(
                        str(Path(model).absolute()) if model != SMALL else SMALL, profile, dtype, setting, steps
                    )
                    cell = Cell(**(asdict(cell) | {"tokens": given.tokens, "scale": given.scale}))
                    timed, peer = measure(cell), None
                    if not given.no_memory:
                        alone = alone or measure(Cell(**(asdict(cell) | {"side": "ours"})))["peak"]
                        peer = measure(Cell(**(asdict(cell) | {"side": "trl"})))["peak"]
                    rows.append(row_of(cell, timed, alone, peer))
                    print(line_of(rows[-1]), flush=True)
                    if given.json:
                        Path(given.json).write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(
        "\nCPU ratios: TRL's head scores every position off CUDA, which is most of this lead. Losses: first timed step."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
