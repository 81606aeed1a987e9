"""What DPO spares: DPO against a reward model and PPO, from one model and one file of pairs, to one win rate.

    python examples/claims.py --work FOLDER [--seeds 0 1 2] [--out docs/results.md]

Each command is a process of its own. PPO goes 10 rollouts, and where its model then wins less often than DPO's of the
same seed again from the start with 20: a run is planned to its end. Then both ways at other learning rates, a quarter,
four and sixteen times theirs and a sixteenth, on the first seed, PPO for 10 rollouts: how many still end better?
Runs that are in the folder already are read, not trained again.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import mean

from palate.report.words import spread

START, PAIRS, HELD = "builtin:tiny", "builtin:reviews", "builtin:reviews/heldout"
PROMPTS = "builtin:prompts[:300]"
RATES = {"dpo": 2e-4, "ppo": 3e-4}
FACTORS = (1 / 16, 1 / 4, 1, 4, 16)
ROLLOUTS = (10, 20)
EPISODES = 128
DRAWN = 256  # by `palate reward`, to normalise


def palate(verb: str, out: Path, *words: object) -> dict:
    """The result of a verb in a new process, as --json prints it, with its seconds; kept beside --out."""
    kept = out.with_name(out.name + ".json")
    if not kept.exists():
        line = [sys.executable, "-c", "import sys; from palate.cli import main; sys.exit(main(sys.argv[1:]))", verb]
        line += [*map(str, words), "--out", str(out), "--json", *(["--resume"] if verb != "compare" else [])]
        began = spent()
        told = subprocess.run(line, stdout=subprocess.PIPE, text=True)
        if told.returncode:
            sys.exit(f"{out} did not come to its end")
        kept.write_text(json.dumps(json.loads(told.stdout.splitlines()[-1]) | {"seconds": spent() - began}))
    return json.loads(kept.read_text()) | {"words": len(words) // 2}


def compared(run: Path, seed: int) -> dict:
    """A run's model against the start, by the world's rule."""
    words = (run, START, "--data", PROMPTS, "--judge", "rule", "--max-tokens", 96, "--temperature", 0.7)
    return palate("compare", run.with_name(run.name + "-compare"), *words, "--seed", seed)


def dpo(work: Path, seed: int, rate: float) -> dict:
    """One run of DPO, compared."""
    out = work / f"dpo {seed} {rate:g}"
    words = ("--model", START, "--data", PAIRS, "--eval", HELD, "--beta", 0.5, "--lr", rate, "--steps", 60)
    found = palate("dpo", out, *words, "--seed", seed)
    return row([found], compared(out, seed), samples=0, models=1, more={"rollouts": None})


def ppo(work: Path, seed: int, rate: float, rollouts: int) -> dict:
    """A reward model on the same pairs, PPO against it on their prompts, compared."""
    reward, out = work / f"reward {seed}", work / f"ppo {seed} {rate:g} {rollouts}"
    words = ("--model", START, "--data", PAIRS, "--eval", HELD, "--lr", 1e-3, "--epochs", 2, "--seed", seed)
    learnt = palate("reward", reward, *words)
    words = ("--model", START, "--data", PAIRS, "--reward", reward, "--eval", "builtin:prompts[300:400]", "--lr", rate)
    words += (
        "--batch",
        EPISODES,
        "--max-tokens",
        96,
        "--kl-coef",
        0.2,
        "--steps",
        rollouts,
        "--eval-every",
        10_000,
        "--seed",
        seed,
    )
    found = palate("ppo", out, *words)
    samples = DRAWN + rollouts * EPISODES
    return row([learnt, found], compared(out, seed), samples=samples, models=4, more={"rollouts": rollouts})


def row(runs: list[dict], match: dict, *, samples: int, models: int, more: dict) -> dict:
    """What the page shows of a way."""
    names = ("win_rate", "low", "high", "verdict", "kl", "length", "reward", "n")
    return more | {
        "commands": len(runs),
        "options": sum(run["words"] for run in runs),
        "models": models,
        "samples": samples,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "seconds": sum(run["seconds"] for run in runs),
        **{name: match[name] for name in names},
    }


def spent() -> float:
    """Processor seconds of the processes that have ended: other work on the machine does not count."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def show(rows) -> str:
    """The section of the page."""
    ways = {kind: [r for r in rows if r["kind"] == kind] for kind in ("DPO", "reward model + PPO")}
    grids = {kind: [r for r in rows if r["kind"] == f"{kind}, other rate"] for kind in ways}
    lines = [
        "## What DPO spares, beside a reward model and PPO",
        "",
        "`builtin:tiny` and the 2,400 pairs of `builtin:reviews`: `palate dpo` (60 steps of 64 pairs, beta 0.5),",
        f"beside `palate reward` (2 epochs) and `palate ppo` against it (rollouts of {EPISODES}). PPO's",
        "coefficient, 0.2, and the reward model's rate were chosen on seed 100. A model wins by the world's rule",
        "against the start on 300 prompts at temperature 0.7; ties count half. PPO goes 10 rollouts, and 20 from",
        "the start again where it then wins less often than DPO on that seed. Seconds: of the processor, of the",
        "commands that count, start-up included, without a run that fell short. Memory: the peak of the hungriest",
        "command; at this size the libraries are most of it. Models: in memory at once while training, DPO's",
        "reference being scored before it.",
        "",
        "| seed | way | rollouts | win rate | KL | true reward | tokens | models | peak memory | seconds | samples |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted((r for kind in ways.values() for r in kind), key=lambda r: (r["seed"], r["kind"])):
        lines.append(
            f"| {r['seed']} | {r['kind']} | {r['rollouts'] or ''} | {r['win_rate']:.1%} [{r['low']:.1%}, "
            f"{r['high']:.1%}] | {r['kl']:.1f} | {r['reward']['before']:.2f} → {r['reward']['after']:.2f} | "
            f"{r['length']['after']:.0f} | {r['models']} | {r['peak_bytes'] / 2**30:.2f} GB | {r['seconds']:.0f} | "
            f"{r['samples']:,} |"
        )
    if not all(ways.values()):
        return "\n".join(lines) + "\n"
    lines += ["", "| over the seeds | " + " | ".join(ways) + " |", "|---|---|---|"]
    for what, cell in CLAIMS.items():
        lines.append(f"| {what} | " + " | ".join(cell(found, grids[kind]) for kind, found in ways.items()) + " |")
    lines += ["", "Other learning rates, seed 0, PPO for 10 rollouts (above: how many end better than the start):", ""]
    lines += ["| way | rate | win rate | KL | tokens |", "|---|---|---|---|---|"]
    for r in [r for found in grids.values() for r in found]:
        lines.append(
            f"| {r['kind'].partition(',')[0]} | {r['precision']} | {r['win_rate']:.1%} [{r['low']:.1%}, "
            f"{r['high']:.1%}] | {r['kl']:.1f} | {r['length']['after']:.0f} |"
        )
    return "\n".join(lines) + "\n"


CLAIMS = {
    "lines that a user writes, a command each": lambda found, grid: str(found[0]["commands"]),
    "options set in them": lambda found, grid: str(found[0]["options"]),
    "models in memory": lambda found, grid: str(found[0]["models"]),
    "peak memory, mean": lambda found, grid: f"{mean(r['peak_bytes'] for r in found) / 2**30:.2f} GB",
    "seconds, mean": lambda found, grid: f"{mean(r['seconds'] for r in found):.0f}",
    "samples drawn, mean": lambda found, grid: f"{mean(r['samples'] for r in found):,.0f}",
    "win rate over seeds": lambda found, grid: spread([r["win_rate"] for r in found]),
    "KL over seeds, mean": lambda found, grid: f"{mean(r['kl'] for r in found):.1f} nats",
    "learning rates that end better": lambda found, grid: (
        f"{sum(r['verdict'] == 'better' for r in grid)} of {len(grid)}" if grid else "not measured"
    ),
}


def main() -> None:
    """All of it, row by row."""
    import real_input

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="page to write; rows lie beside it")
    args = parser.parse_args()
    args.quick = False
    args.work.mkdir(parents=True, exist_ok=True)
    keep = real_input.keeper(args, "claims")
    for seed in args.seeds:
        first = dpo(args.work, seed, RATES["dpo"])
        keep({"kind": "DPO", "seed": seed} | first)
        for rollouts in ROLLOUTS:
            found = ppo(args.work, seed, RATES["ppo"], rollouts)
            if found["win_rate"] >= first["win_rate"]:
                break
        keep({"kind": "reward model + PPO", "seed": seed} | found)
    seed = args.seeds[0]
    for factor in FACTORS:
        for kind, rate in (("DPO", RATES["dpo"] * factor), ("reward model + PPO", RATES["ppo"] * factor)):
            found = dpo(args.work, seed, rate) if kind == "DPO" else ppo(args.work, seed, rate, ROLLOUTS[0])
            keep({"kind": f"{kind}, other rate", "precision": f"{rate:.2g}", "seed": seed} | found)


if __name__ == "__main__":
    main()
