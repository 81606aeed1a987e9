"""The built-in world: the numbers of docs/results.md that need neither data nor download.

    python examples/built_in_world.py demo      # three seeds of `palate demo`
    python examples/built_in_world.py control   # the same training on swapped labels, which must end worse

Rows go into results.json beside --out, and the page is written again, as examples/real_input.py does it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEEDS = (0, 1, 2)


def palate(*argv: object, fine: tuple[int, ...] = (0,)) -> dict:
    """The result of a verb, run as a command of its own."""
    code = "import sys; from palate.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv), "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode not in fine:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def demo(args, keep) -> None:
    """`palate demo` on each seed, whatever it ends with."""
    for seed in args.seeds or SEEDS:
        began = time.perf_counter()
        out = args.work / f"demo {seed}"
        found = palate("demo", "--seed", seed, "--minutes", args.minutes, "--out", out, fine=(0, 4))
        keep({"data": "demo", "seed": seed, "seconds": time.perf_counter() - began} | picked(found))


def control(args, keep) -> None:
    """Training on swapped labels: chosen for rejected; the held-out pairs are as they are."""
    from palate import builtin

    args.work.mkdir(parents=True, exist_ok=True)
    swapped = args.work / "swapped.jsonl"
    with builtin.data_file("reviews").open(encoding="utf-8") as rows, swapped.open("w", encoding="utf-8") as file:
        for row in map(json.loads, rows):
            file.write(json.dumps(row | {"chosen": row["rejected"], "rejected": row["chosen"]}) + "\n")
    for seed in args.seeds or SEEDS[:1]:
        began = time.perf_counter()
        out = args.work / f"swapped {seed}"
        trained = palate(
            *("dpo", "--model", "builtin:tiny", "--data", swapped, "--eval", "builtin:reviews/heldout"),
            *("--beta", 0.5, "--lr", 2e-4, "--steps", args.steps),
            *("--seed", seed, "--eval-every", args.steps, "--save-every", args.steps, "--out", out),
        )
        found = palate(
            *("compare", out, "builtin:tiny", "--data", "builtin:prompts[:300]", "--judge", "rule"),
            *("--max-tokens", 96, "--temperature", 0.7, "--seed", seed, "--out", out / "compare"),
        )
        palate("report", out)
        row = picked(found | {"steps": trained["steps"], "accuracy": trained["after"]["eval/rewards/accuracies"]})
        keep({"data": "swapped", "seed": seed, "seconds": time.perf_counter() - began} | row)


def picked(found: dict) -> dict:
    """What the page shows of a result."""
    names = ("steps", "n", "wins", "losses", "ties", "win_rate", "low", "high", "verdict", "kl", "length", "reward")
    return {name: found[name] for name in (*names, "accuracy")}


def show(rows) -> str:
    """The section of the page."""
    lines = [
        "## The demo on three seeds",
        "",
        "`palate demo`: `builtin:tiny` trained on `builtin:reviews`, compared with its start on",
        "`builtin:prompts[:300]`, on which nothing was tuned (same seed of sampling, temperature 0.7), by the world's",
        "own rule. Ties count half;",
        "Wilson's 95 % interval. KL: of the result from the start, nats a completion, sampled. Reward: the rule's",
        "mean, from -17 to 3.",
        "*swapped*: the same with chosen and rejected exchanged, which must come out worse.",
        "",
        "| run | seed | steps | win rate | ties | verdict | KL | reward before | after | tokens before | after | "
        "held-out accuracy | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['data']} | {r['seed']} | {r['steps']} | {r['win_rate']:.1%} [{r['low']:.1%}, {r['high']:.1%}] | "
            f"{r['ties'] / r['n']:.0%} | {r['verdict']} | {r['kl']:.1f} | {r['reward']['before']:.2f} | "
            f"{r['reward']['after']:.2f} | {r['length']['before']:.0f} | {r['length']['after']:.0f} | "
            f"{r['accuracy']:.1%} | {r['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


SECTIONS = {"demo": demo, "control": control}


def main() -> None:
    """One section."""
    import real_input

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="page to write; rows lie beside it")
    parser.add_argument("--work", type=Path, help="folder for the runs; default: one that goes away")
    parser.add_argument("--minutes", type=float, default=2.5, help="of the demo")
    parser.add_argument("--steps", type=int, default=60, help="of the control")
    parser.add_argument("--seeds", nargs="*", type=int, help="other seeds than 0 1 2, for pilots")
    args = parser.parse_args()
    args.quick = False
    with tempfile.TemporaryDirectory() as away:
        args.work = args.work or Path(away)
        SECTIONS[args.section](args, real_input.keeper(args, "world"))


if __name__ == "__main__":
    main()
