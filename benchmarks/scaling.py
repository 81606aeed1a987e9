"""How cost grows: seconds of forward and backward against the tokens that stand in the stream.

    python benchmarks/scaling.py --quick --json out.json

One axis is moved at a time: the prompt's length (64 to 2,048), completions of one prompt (2 to 16), groups a step, and
the model's size. A step collates its groups, cuts them into micro-batches of --tokens, scores every completion and
goes backward from the mean log-prob a token. Beside its time stand the tokens of its stream, where a prompt stands
once, and those of rows that repeat it; a microsecond a token that stays level is a cost that grows linearly.
Each point is the least of --repeats runs, taken in turns over the axis, so that one slow minute spoils no single point.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from palate.layout import MICRO_BATCH_TOKENS

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SIZES = {  # hidden, intermediate, layers, heads
    "1M": (128, 352, 4, 4),
    "7M": (256, 688, 8, 4),
    "25M": (512, 1376, 8, 8),
}
VOCABULARY = 4096


@dataclass(frozen=True)
class Point:
    """A step: groups of one prompt and its completions, under a model of SIZES."""

    axis: str
    prompt: int = 256
    completions: int = 2
    completion: int = 64
    groups: int = 4
    model: str = "1M"


def points(quick: bool) -> list[Point]:
    """The curves, axis by axis; --quick has the ends and the middle of each."""
    axes = [
        [Point("prompt", prompt=n) for n in (64, 128, 256, 512, 1024, 2048)],
        [Point("completions", completions=n) for n in (2, 4, 8, 16)],
        [Point("groups", groups=n) for n in (2, 4, 8, 16, 32)],
        [Point("model", model=name) for name in SIZES],
    ]
    return [point for axis in axes for point in ([axis[0], axis[len(axis) // 2], axis[-1]] if quick else axis)]


def build(name: str):
    """A random Llama of that size, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads = SIZES[name]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
    )


def groups_of(point: Point) -> list:
    """Groups with random ids; lengths vary by a tenth, as rows do."""
    from palate.data.tokens import TokenGroup

    draw = np.random.default_rng(7)

    def ids(mean: int) -> np.ndarray:
        length = int(draw.integers(round(mean * 0.9), round(mean * 1.1) + 1))
        return draw.integers(3, VOCABULARY, length).astype(np.int32)

    made = []
    for _ in range(point.groups):
        completions = tuple(ids(point.completion) for _ in range(point.completions))
        made.append(TokenGroup(ids(point.prompt), completions, tuple(((0, len(c)),) for c in completions)))
    return made


def step(model, groups, tokens: int) -> None:
    """Forward and backward of one step, as training takes it."""
    from palate.data.batch import collate, stream_length
    from palate.data.stream import pack
    from palate.scoring import token_logps

    scored = sum(len(ids) for group in groups for ids in group.completions)
    for part in pack([stream_length(group) for group in groups], tokens):
        (-token_logps(model, collate([groups[i] for i in part])).sum() / scored).backward()
    model.zero_grad()


def measure(args) -> list[dict]:
    """A row a point."""
    from palate.data.batch import stream_length
    from palate.scoring import support

    clock, taken = CLOCKS[args.clock], points(args.quick)
    models = {name: build(name) for name in {point.model for point in taken}}
    work = [(models[point.model], groups_of(point)) for point in taken]
    for model in models.values():
        assert support(model).path == "shared"
    best = [float("inf")] * len(taken)
    for repeat in range(args.repeats + 1):  # the first warms up
        for i, (model, groups) in enumerate(work):
            started = clock()
            step(model, groups, args.tokens)
            if repeat:
                best[i] = min(best[i], clock() - started)
    rows = []
    for point, (model, groups), seconds in zip(taken, work, best, strict=True):
        stream = sum(stream_length(group) for group in groups)
        repeated = sum(len(group.prompt) + len(ids) for group in groups for ids in group.completions)
        parameters = model.num_parameters()
        rows.append(
            asdict(point)
            | {"stream_tokens": stream, "row_tokens": repeated, "seconds": seconds, "parameters": parameters}
            | {"us_per_token": seconds / stream * 1e6, "us_per_token_and_million": seconds / stream / parameters * 1e12}
        )
    return rows


HEADER = (
    "| axis | model | groups | completions | prompt tokens | stream tokens | of rows | ms a step | us a token "
    "| us a token and million weights |\n|" + "---|" * 10
)


def line_of(row: dict) -> str:
    """The row as Markdown."""
    return (
        f"| {row['axis']} | {row['model']} | {row['groups']} | {row['completions']} | {row['prompt']} "
        f"| {row['stream_tokens']:,} | {row['row_tokens']:,} | {row['seconds'] * 1e3:.0f} | {row['us_per_token']:.0f} "
        f"| {row['us_per_token_and_million']:.0f} |"
    )


def main() -> None:
    """Parses, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=MICRO_BATCH_TOKENS, help="stream tokens of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="seconds that pass, or that are computed")
    parser.add_argument("--quick", action="store_true", help="three points an axis")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    rows = measure(args)
    print("\n".join([HEADER, *map(line_of, rows)]))
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
