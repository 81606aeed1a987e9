"""PPO, RLOO and GRPO on the built-in world, by its rule and by a reward model: do they really gain, and at what KL?

    python examples/ppo_world.py --work FOLDER [--seeds 0 1] [--out docs/results.md]

The settings were fixed on seed 100. Runs that are in the folder already are gone on with, or read. Exit 4 where the
held-out reward of one of them did not rise by more than chance would have it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from built_in_world import palate

COMMON = ("--model", "builtin:tiny", "--data", "builtin:prompts[300:]", "--eval", "builtin:prompts[:300]")
WAYS = {  # name -> options
    "separate critic": (),
    "critic on the trunk": ("--critic", "trunk"),
    "RLOO, groups of 4": ("--critic", "none", "--group", 4),
    "GRPO, groups of 4": ("--critic", "none", "--group", 4, "--advantage", "grpo"),
}
CELLS = {  # name -> reward, way, seeds at most
    "rule, separate critic": ("rule", "separate critic", 2),
    "rule, critic on the trunk": ("rule", "critic on the trunk", 1),
    "rule, RLOO": ("rule", "RLOO, groups of 4", 2),
    "rule, GRPO": ("rule", "GRPO, groups of 4", 1),
    "reward model, RLOO": ("model", "RLOO, groups of 4", 2),
}
ROLLOUTS, EPISODES = 8, 256


def reward_model(work: Path, seed: int) -> Path:
    """A reward model trained on the world's pairs; not trained again where it is there."""
    run = work / f"reward {seed}"
    options = ("--model", "builtin:tiny", "--data", "builtin:reviews", "--eval", "builtin:reviews/heldout")
    palate("reward", *options, "--seed", seed, "--out", run, *(("--resume",) if run.exists() else ()))
    return run


def trained(work: Path, name: str, seed: int) -> dict:
    """What the page shows of one run."""
    kind, way, _ = CELLS[name]
    run, reward = work / f"{name} {seed}", "rule" if kind == "rule" else reward_model(work, seed)
    options = (*COMMON, "--reward", reward, *WAYS[way], "--steps", ROLLOUTS, "--batch", EPISODES, "--seed", seed)
    options += ("--eval-every", ROLLOUTS // 2, "--save-every", 1, "--samples", 2, "--out", run)
    result = palate("ppo", *options, *(("--resume",) if run.exists() else ()))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    row = {
        "reward": [result["before"]["eval/reward"], result["after"]["eval/reward"]],
        "errors": [result["before"]["eval/reward_se"], result["after"]["eval/reward_se"]],
        "kl": result["after"]["eval/kl"],
        "ended": result["after"]["eval/ended"],
        "clipped": max(line["policy/clipped"] for line in steps),
        "explained": steps[-1].get("value/explained"),
        "better": result["better"],
        "health": result["health"],
        "training_seconds": sum(line["seconds"] for line in steps),
        "samples": ROLLOUTS * EPISODES,
        "peak_bytes": result["peak_bytes"],
    }
    if kind == "model":  # what the rule thinks of it
        out = run / "compare"
        if not (out / "comparison.json").exists():
            palate(
                *("compare", run, "builtin:tiny", "--data", "builtin:prompts[:300]", "--judge", "rule"),
                *("--max-tokens", 64, "--seed", seed, "--out", out),
            )
        row["by_rule"] = json.loads((out / "comparison.json").read_text())["reward"]
    return row


LEARNT = (
    "Where a reward model rewards (`palate reward` on `builtin:reviews`), its mean is 0 and its deviation 1 on samples",
    "of the start, and *by the rule* is what the rule says of the same run, before and after.",
)


def show(rows) -> str:
    """The section of the page; a column of what the rule says where a reward model rewarded."""
    learnt = any("by_rule" in row for row in rows)
    lines = [
        "## PPO on the built-in world",
        "",
        f"`palate ppo --model builtin:tiny --steps {ROLLOUTS}` on `builtin:prompts[300:]`, all else by default:",
        f"rollouts of {EPISODES} episodes, 4 passes, rate 3e-4 falling to zero, KL coefficient 0.05. Held out: one",
        "sample of each of `builtin:prompts[:300]`, the same draws before and after, with 95 % intervals. Reward: the",
        "rule's, from -17 to 3.",
        *(LEARNT if learnt else ()),
        "KL: nats a completion, sampled. *clipped*: the largest share of tokens of any step; *explained*: of the",
        "variance of the returns, by the critic, in the last rollout (a critic that begins at 0 has not learnt in",
        "32 updates to tell texts apart). Seconds: sampling and updates, one thread. The settings were fixed on",
        "seed 100.",
        "",
        f"| run | seed | reward before | after |{' by the rule |' * learnt} KL | ended | clipped | explained | "
        "seconds | health |",
        "|---" * (10 + learnt) + "|",
    ]
    for r in rows:
        sides = [f"{v:.2f} ± {1.96 * e:.2f}" for v, e in zip(r["reward"], r["errors"], strict=True)]
        said = "{before:.2f} → {after:.2f}".format(**r["by_rule"]) if "by_rule" in r else ""
        rule = f" {said} |" if learnt else ""
        lines.append(
            f"| {r['data']} | {r['seed']} | {sides[0]} | {sides[1]} |{rule} {r['kl']:.2f} | {r['ended']:.0%} | "
            f"{r['clipped']:.0%} | {'' if r['explained'] is None else format(r['explained'], '.2f')} | "
            f"{r['training_seconds']:.0f} | {'; '.join(r['health']) or 'nothing flagged'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Every run on its seeds."""
    import real_input

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--only", nargs="*", choices=CELLS, default=list(CELLS), help="some of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="page to write; rows lie beside it")
    args = parser.parse_args()
    args.quick, wrong = False, 0
    keep = real_input.keeper(args, "ppo")
    for name in args.only:
        for seed in args.seeds[: CELLS[name][2]]:
            began = time.perf_counter()
            row = trained(args.work.resolve(), name, seed)
            keep({"data": name, "seed": seed} | row | {"seconds": time.perf_counter() - began})
            wrong += not row["better"]
    return 4 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
