"""What both sides of a benchmark are given: models, rows of the profiles' lengths, and measures of their work."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from palate.layout import MICRO_BATCH_TOKENS

SMALL = "llama-4-layers-49k"
# mean tokens of a prompt and of a completion
PROFILES = {"tldr": (350, 35), "hh": (100, 80), "ultrafeedback": (180, 300)}
REAL = "real"  # rows of data files, as they are
DTYPES = ("float32", "bfloat16")
SETTINGS = ("default", "best")
PEERS = ("trl", "reference")
BATCH, BETA, RATE, CLIP, BETAS, EPS, LONGEST = 4, 0.1, 1e-6, 1.0, (0.9, 0.999), 1e-8, 1024
Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids of prompt, chosen, rejected


@dataclass(frozen=True)
class Cell:
    """One process's work. side: "both" takes turns, "ours" and "peer" run alone for their peak.

    model: SMALL or a folder. data: files of the profile REAL. lora: rank of an adapter, 0 for full weights. steps:
    paired ones, after one of four short pairs. tokens: our stream tokens a micro-batch. scale: times the lengths.
    """

    model: str
    profile: str
    dtype: str
    peer: str
    setting: str
    steps: int
    side: str = "both"
    lora: int = 0
    tokens: int = MICRO_BATCH_TOKENS
    scale: float = 1.0
    data: tuple[str, ...] = ()
    tokenizer: str = ""

    @property
    def label(self) -> str:
        return Path(self.model).name + (f" LoRA {self.lora}" if self.lora else "")


def build(cell: Cell, ours: bool):
    """The model in float32, as palate or transformers loads it, with an adapter where one is asked for."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from palate.model.adapters import add_lora
    from palate.model.load import load

    if cell.model == SMALL:
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
        model = LlamaForCausalLM(config).float()
    elif ours:
        model = load(cell.model).model
    else:
        model = AutoModelForCausalLM.from_pretrained(cell.model, dtype=torch.float32)
    return add_lora(model, cell.lora) if cell.lora else model


def small_model(tokenizer: Path, folder: Path) -> Path:
    """The folder, which now holds SMALL and the tokenizer of another folder."""
    from transformers import AutoTokenizer

    build(Cell(SMALL, "tldr", "float32", "", "", 1), ours=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def model_options(parser: argparse.ArgumentParser) -> None:
    """Which models a script runs the real command with."""
    parser.add_argument("--model", metavar="FOLDER", help="with a tokenizer")
    parser.add_argument("--small", action="store_true", help="the 4-layer model too, with this tokenizer")


def model_folder(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Path:
    """--model, or builtin:tiny with --quick; ends the script where it is not there."""
    if given.quick:
        from palate.builtin import model_folder as shipped

        return Path(shipped("builtin:tiny"))
    if not given.model or not Path(given.model, "config.json").exists():
        parser.error(f"--model {given.model}: no config.json there")
    return Path(given.model).absolute()


def rows_of(cell: Cell, vocabulary: int) -> list[Row]:
    """4 short pairs to warm up on, then 4 a step; a side that runs alone gets the largest of these steps."""
    draw = np.random.default_rng([7, [*PROFILES, REAL].index(cell.profile)])

    def ids(count: int) -> np.ndarray:
        return draw.integers(3, vocabulary, count).astype(np.int32)

    warm = [(ids(8), ids(4), ids(5)) for _ in range(BATCH)]
    count = BATCH * cell.steps
    rows = _real(cell, count) if cell.profile == REAL else _drawn(cell, count, draw, ids)
    if cell.side != "both":
        steps = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rows = max(steps, key=lambda step: sum(len(ids) for row in step for ids in row))
    return warm + rows


def _drawn(cell: Cell, count: int, draw: np.random.Generator, ids) -> list[Row]:
    """Log-normal lengths; a prompt and its completion stay within 1,024 tokens, where TRL would cut."""
    prompt, completion = (mean * cell.scale for mean in PROFILES[cell.profile])

    def length(mean: float, sigma: float, most: int) -> int:
        return int(np.clip(draw.lognormal(np.log(mean) - sigma**2 / 2, sigma), 2, most))

    rows = []
    for _ in range(count):
        first = length(prompt, 0.5, LONGEST // 2)
        rows.append((ids(first), *(ids(length(completion, 0.6, LONGEST - first)) for _ in "cr")))
    return rows


def _real(cell: Cell, count: int) -> list[Row]:
    """Pairs of the data files in turn, as the tokenizer of the model (or of `cell.tokenizer`) writes them."""
    from palate.data.sources import read_pairs
    from palate.data.tokens import tokenize, without_signal
    from palate.model.load import outline

    tokenizer = outline(cell.tokenizer or cell.model).tokenizer
    files = [iter(read_pairs(path, bad_rows="skip")) for path in cell.data]
    rows: list[Row] = []
    while len(rows) < count:
        for records in files:
            group = tokenize(next(records), tokenizer, max_length=LONGEST)
            if len(group.prompt) and not without_signal(group):
                better, worse = group.preferences[0]
                rows.append((group.prompt, group.completions[better], group.completions[worse]))
    return rows[:count]


def real_tokens(rows: list[Row]) -> int:
    """What a step must learn from: prompts counted twice, as a row-by-row trainer sees them, no padding."""
    return sum(2 * len(p) + len(c) + len(r) for p, c, r in rows)


def useful_flops(model, rows: list[Row], lora: int) -> float:
    """Forward and backward of a step that wastes nothing: prompts once, no padding, head on scored rows alone.

    With an adapter the weights below it have no gradient, which saves a third.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    body = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.dim() == 2 and "embed" not in n and "lm_head" not in n and "lora" not in n
    )
    width = (
        config.num_hidden_layers
        * config.num_attention_heads
        * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    )
    linear = attention = 0.0
    for prompt, *completions in rows:
        lengths = [len(ids) for ids in completions]
        seen = len(prompt) ** 2 / 2 + sum(len(prompt) * n + n**2 / 2 for n in lengths)
        linear += 2 * body * (len(prompt) + sum(lengths)) + 2 * head * sum(lengths)
        attention += 4 * width * seen
    return (2 if lora else 3) * linear + 3 * attention


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


def peak_bytes() -> int:
    """Largest resident size of this process so far, of this program alone (VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def in_process(script: str, cell: Cell) -> dict:
    """What `script --cell` finds of the cell in a process of its own. Raises SystemExit with its last words."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cell.json"
        command = [sys.executable, script, "--cell", json.dumps(asdict(cell)), "--json", str(out)]
        done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{cell} failed:\n{done.stdout[-4000:]}")
        return json.loads(out.read_text())


def environment() -> dict[str, str]:
    """For processes that measure: nothing is fetched, no GPU, no chatter."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
