"""Sampling of palate beside `model.generate` of transformers: tokens a second, and proof of equal work.

    python benchmarks/generate.py --quick --json out.json --model FOLDER

Both sides run in one process, in turns, on the same weights (float32) and prompts: the first prompts of --data, N
samples each at temperature 1 from the whole vocabulary (`top_k=0`, `top_p=1`), up to --max-tokens. Theirs is one call
with left padding and `num_return_sequences=N`, so all rows are in one batch, with its own cache; ours is
`palate.sampling.generate`. Each draws its own completions, so what is compared is completion tokens, end tokens
included, a second; prompts are read within that time. "ends" says whether rows stop at the model's end token, as in
use, or all run to --max-tokens.

Equal work: the share of greedy completions that are the same token for token on both sides, and the largest difference,
in nats, between the log-probs that come with our samples and those that `palate.scoring` computes of the same tokens.
Times on a shared machine vary by tens of percent; only the two sides of one row compare. `--clock cpu` counts the
seconds that this process computes (of all its threads) instead of those that pass: with OMP_NUM_THREADS=1 these hardly
depend on what else runs.
"""

import argparse
import json
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Case:
    """Prompts, samples of each, tokens of a completion, and whether it may end before."""

    prompts: int
    samples: int
    max_tokens: int
    ends: bool


def cases(args) -> list[Case]:
    """What is measured: rows that stop, and rows that do not; with --all other numbers of samples too."""
    numbers = [args.samples] if not args.all else sorted({1, args.samples, 16})
    found = [Case(args.prompts, n, args.max_tokens, ends=True) for n in numbers]
    return found if args.quick else [*found, Case(args.prompts, args.samples, args.max_tokens, ends=False)]


def read(loaded, data: str, count: int) -> list[np.ndarray]:
    """Ids of the first prompts of the data that leave room for a completion."""
    from palate.data.sources import read_prompts
    from palate.data.tokens import tokenize
    from palate.model.load import context

    longest = (context(loaded.model) or 1024) // 2
    groups = (tokenize(record, loaded.tokenizer, max_length=None) for record in read_prompts(data))
    kept = [group.prompt for group in groups if 0 < len(group.prompt) <= longest]
    return kept[:count]


def theirs(model, prompts, how: Case, ends: list[int], seed: int, greedy: bool = False) -> list[list[int]]:
    """Completions by `model.generate`, each cut behind its end token."""
    import torch

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    torch.manual_seed(seed)
    chance = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=how.max_tokens,
        num_return_sequences=1 if greedy else how.samples,
        eos_token_id=ends or None,
        pad_token_id=0,
        use_cache=True,
        **chance,
    )
    found = []
    for row in out[:, width:].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        found.append(row[:stop])
    return found


def difference(model, prompts, made) -> float:
    """The largest difference, nats, of our samples' log-probs and `scoring`'s."""
    import torch

    from palate.data.batch import collate
    from palate.data.tokens import TokenGroup
    from palate.scoring import token_logps

    worst = 0.0
    for sample in made:
        prompt, span = prompts[sample.prompt], ((0, len(sample.ids)),)
        batch = collate([TokenGroup(prompt, (sample.ids,), (span,))])
        with torch.no_grad():
            scored = token_logps(model, batch.to(model.device)).cpu().double().numpy()
        worst = max(worst, float(np.abs(scored - sample.token_logps).max()))
    return worst


def measure(loaded, name: str, prompts, how: Case, pairs: int, clock) -> dict:
    """One row of the table: `pairs` times theirs and ours in turns, after a short warm-up of both."""
    from palate.data.tokens import end_tokens
    from palate.sampling.generate import generate

    model, tokenizer = loaded.model, loaded.tokenizer
    model.generation_config = type(model.generation_config)()  # nothing but what is given here
    ends = sorted(end_tokens(tokenizer)) if how.ends else []

    def ours(seed: int, **other):
        given = {"max_tokens": how.max_tokens, "samples": how.samples, "seed": seed, "end_ids": ends} | other
        return generate(model, tokenizer, prompts, **given)

    short = Case(how.prompts, how.samples, 2, how.ends)
    theirs(model, prompts, short, ends, 0), ours(0, max_tokens=2)
    speeds = {"ours": [], "peer": []}
    for seed in range(pairs):
        started = clock()
        rows = theirs(model, prompts, how, ends, seed)
        speeds["peer"].append(sum(map(len, rows)) / (clock() - started))
        started = clock()
        made = ours(seed)
        speeds["ours"].append(sum(len(sample.ids) for sample in made) / (clock() - started))
    greedy = [sample.ids.tolist() for sample in ours(0, temperature=0, samples=1)]
    same = [a == b for a, b in zip(greedy, theirs(model, prompts, how, ends, 0, greedy=True), strict=True)]
    return {
        "model": name,
        "prompts": len(prompts),
        "samples": how.samples,
        "prompt_tokens": statistics.mean(map(len, prompts)),
        "completion_tokens": statistics.mean(len(sample.ids) for sample in made),
        "max_tokens": how.max_tokens,
        "ends": how.ends,
        "tokens_per_second_ours": statistics.median(speeds["ours"]),
        "tokens_per_second_peer": statistics.median(speeds["peer"]),
        "ratio": statistics.median(a / b for a, b in zip(speeds["ours"], speeds["peer"], strict=True)),
        "ratios": [a / b for a, b in zip(speeds["ours"], speeds["peer"], strict=True)],
        "greedy_same": sum(same) / len(same),
        "logp_difference": difference(model, prompts, made[:: max(1, len(made) // 16)]),
    }


HEADER = (
    "| model | prompts x samples | prompt, completion tokens | ends | tokens/s generate | tokens/s ours | ratio "
    "| greedy the same | log-probs off by |\n|" + "---|" * 9
)


def line_of(row: dict) -> str:
    """The row as Markdown."""
    return (
        f"| {row['model']} | {row['prompts']} x {row['samples']} "
        f"| {row['prompt_tokens']:.0f}, {row['completion_tokens']:.0f} | {'yes' if row['ends'] else 'no'} "
        f"| {row['tokens_per_second_peer']:.0f} | {row['tokens_per_second_ours']:.0f} | **{row['ratio']:.2f}x** "
        f"({min(row['ratios']):.2f} to {max(row['ratios']):.2f}) "
        f"| {row['greedy_same']:.0%} | {row['logp_difference']:.1e} |"
    )


def main() -> None:
    """Parses, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder to measure beside builtin:tiny")
    parser.add_argument("--no-small", action="store_true", help="without builtin:tiny")
    parser.add_argument("--data", default="builtin:prompts", help="a file with prompts")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=3, help="paired runs a row")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="seconds that pass, or that are computed")
    parser.add_argument("--quick", action="store_true", help="only rows that end by themselves")
    parser.add_argument("--all", action="store_true", help="1 and 16 samples a prompt too")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    if args.model and not (Path(args.model) / "config.json").is_file():
        parser.error(f"no config.json in {args.model}; give the folder of a model")
    warnings.filterwarnings("ignore")
    import transformers

    from palate.model.load import load

    transformers.logging.set_verbosity_error()
    print(HEADER)
    rows = []
    for name in [] if args.no_small else ["builtin:tiny"]:
        rows += _measured(load(name), name, args)
    if args.model:
        rows += _measured(load(args.model), Path(args.model).name, args)
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=2) + "\n")


def _measured(loaded, name: str, args) -> list[dict]:
    prompts = read(loaded, args.data, args.prompts)
    rows = []
    for how in cases(args):
        rows.append(measure(loaded, name, prompts, how, args.pairs, CLOCKS[args.clock]))
        print(line_of(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
