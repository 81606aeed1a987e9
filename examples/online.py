"""Is it worth sampling anew for every step? Online DPO beside DPO on pairs of the start, at as many labels.

    python examples/online.py --work FOLDER [--seeds 0 1 2] [--out docs/results.md]

Both begin from the same lightly fine-tuned model, ask the same prompts, draw two samples of each and have them labelled
by the world's rule. Runs that are in the folder already are gone on with, or read.
"""

import argparse
import sys
import time
from pathlib import Path

from built_in_world import palate
from self_play import LIGHT, PROMPTS, SAMPLING, compared, taken, trained

ASKED, STEPS, BATCH = "builtin:reviews[:1600]", 25, 64
HOW = ("--beta", 0.5, "--lr", 2e-4, "--batch", BATCH, "--samples", 0)


def run(args, keep) -> None:
    """Per seed: online, and offline out of `palate pairs`, each against the start."""
    for seed in args.seeds:
        start, pairs = args.work / f"start {seed}", args.work / f"pairs {seed}.jsonl"
        trained("sft", start, "--model", "builtin:base", *LIGHT, "--seed", seed)
        shared, began = ("--judge", "rule", "--candidates", 2, *SAMPLING, "--seed", seed), time.perf_counter()
        labels = ("--data", ASKED, "--eval", PROMPTS, "--eval-every", STEPS)
        online = args.work / f"online {seed}"
        found = trained("online-dpo", online, "--model", start, *labels, "--steps", STEPS, *HOW, *shared)
        keep({"data": "online DPO", "seed": seed, "labels": STEPS * BATCH, "pairs": found["pairs"], "steps": STEPS}
             | compared(args, online, start, seed) | {"seconds": time.perf_counter() - began})  # fmt: skip

        began = time.perf_counter()
        if not pairs.exists():
            palate("pairs", "--model", start, "--data", ASKED, *shared, "--out", pairs)
        offline = args.work / f"offline {seed}"
        options = ("--data", pairs, "--eval", "none", "--epochs", 1, "--retain-samples", 0, "--retain", "none")
        trained("dpo", offline, "--model", start, *options, *HOW, "--seed", seed)
        count = sum(1 for _ in pairs.open())
        keep({"data": "offline DPO", "seed": seed, "labels": STEPS * BATCH, "pairs": count, "steps": taken(offline)}
             | compared(args, offline, start, seed) | {"seconds": time.perf_counter() - began})  # fmt: skip


def show(rows) -> str:
    """The section of the page."""
    lines = [
        "## Online beside offline DPO, at as many labels",
        "",
        f"From `builtin:base` after 2 steps of SFT: the prompts of `{ASKED}`, two samples of each, one",
        f"label by the rule; beta 0.5, rate 2e-4, batches of {BATCH}. *online*: `palate online-dpo`, every batch",
        "sampled from the policy as it stands. *offline*: `palate pairs` from the start, then `palate dpo`, one pass.",
        f"Wins: one sample of each of `{PROMPTS}` at temperature 1 against the start's, by the rule, ties",
        "half, 95 % interval.",
        "",
        "| what | seed | labels | pairs | steps | wins against the start | rule's mean | KL | length | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda row: (row["data"] != "online DPO", row["seed"])):
        share = f"{r['win_rate']:.1%} [{r['low']:.1%}, {r['high']:.1%}]"
        mean = f"{r['reward']['before']:.2f} → {r['reward']['after']:.2f}"
        lines.append(
            f"| {r['data']} | {r['seed']} | {r['labels']:,} | {r['pairs']:,} | {r['steps']} | {share} | {mean} | "
            f"{r['kl']:.2f} | {r['length']['after']:.1f} | {r['seconds']:.0f} |"
        )
    by = {(row["data"], row["seed"]): row["reward"]["after"] for row in rows}
    seeds = [seed for name, seed in by if name == "online DPO" and ("offline DPO", seed) in by]
    above = sum(by["online DPO", seed] > by["offline DPO", seed] for seed in seeds)
    return "\n".join([*lines, "", f"The rule's mean is higher online on {above} of {len(seeds)} seeds."]) + "\n"


def main() -> int:
    """The section on its seeds."""
    import real_input

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="page to write; rows lie beside it")
    args = parser.parse_args()
    args.work, args.quick = args.work.resolve(), False
    run(args, real_input.keeper(args, "online"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
