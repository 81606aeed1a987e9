"""Does halving find what the full grid finds? Twelve cells of beta and rate on the built-in world, both ways.

    python examples/halving.py --work FOLDER [--seeds 0 1] [--out docs/results.md]

Sweeps that are in the folder already are gone on with, or read. Exit 4 where the cell that halving chose lies more
than one point of accuracy below the one that the full grid chose, or halving took more than a third of the steps.
"""

import argparse
import json
import sys
from pathlib import Path

GRID = ("--grid", "beta=0.05,0.1,0.3,1.0", "--grid", "lr=5e-5,2e-4,8e-4")
COMMON = ("--model", "builtin:tiny", "--data", "builtin:reviews", "--eval", "builtin:reviews/heldout")


def sweep(seed: int, work: Path, *words: str) -> dict:
    """sweep.json of the sweep in this folder."""
    from palate.cli import main as palate

    if palate(["sweep", "dpo", *COMMON, *GRID, "--seed", str(seed), "--out", str(work), "--resume", *words]) != 0:
        sys.exit(f"{work} did not come to its end")
    return json.loads((work / "sweep.json").read_text())


def compared(full: dict, halved: dict) -> dict:
    """The best cell of both, both with the full grid's numbers, and what they cost."""
    cells = {cell["name"]: cell for cell in full["cells"]}
    best, chosen = cells[full["best"]], cells[halved["best"]]
    spent = [sum(cell["seconds"] for cell in table["cells"]) for table in (full, halved)]
    return {
        "best": best["name"],
        "accuracy": best["metric"],
        "low": best["low"],
        "high": best["high"],
        "chosen": chosen["name"],
        "chosen_accuracy": chosen["metric"],
        "accuracies": sorted(cell["metric"] for cell in full["cells"] if cell["metric"] is not None),
        "rungs": halved["rungs"],
        "compute_share": halved["compute_share"],
        "full_seconds": spent[0],
        "halving_seconds": spent[1],
        "seconds": sum(spent),
    }


def show(rows) -> str:
    """The section of the page."""
    same = sum(row["chosen"] == row["best"] for row in rows)
    above = max(100 * (row["accuracies"][-1] - row["chosen_accuracy"]) for row in rows)
    lines = [
        "## Halving against the full grid",
        "",
        "`palate sweep dpo --grid beta=0.05,0.1,0.3,1.0 --grid lr=5e-5,2e-4,8e-4` on `builtin:tiny` and",
        "`builtin:reviews`, 38 steps of 64 pairs a cell, 300 held-out pairs. The accuracies are the full grid's;",
        "*lowest, highest*: of any of its cells. A best cell is the one of the lowest held-out loss among those within",
        "a standard error (2.5 points) of the highest accuracy. Steps and seconds are those of training, without",
        f"evaluation and sampling. Halving chose the full grid's best cell in {same} of {len(rows)} seeds; the",
        f"highest accuracy, the largest of twelve that may each be off by 2.5 points, lies up to {above:.1f} above.",
        "",
        "| seed | full grid's best | accuracy | lowest, highest | halving's choice | accuracy | rungs | share of steps "
        "| seconds, full | seconds, halving |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['seed']} | {r['best']} | {r['accuracy']:.1%} [{r['low']:.1%}, {r['high']:.1%}] | "
            f"{r['accuracies'][0]:.1%}, {r['accuracies'][-1]:.1%} | {r['chosen']} | {r['chosen_accuracy']:.1%} | "
            f"{', '.join(map(str, r['rungs']))} | {r['compute_share']:.0%} | {r['full_seconds']:.0f} | "
            f"{r['halving_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Both sweeps on each seed."""
    import real_input

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the sweeps")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="page to write; rows lie beside it")
    args = parser.parse_args()
    args.quick, wrong = False, 0
    keep = real_input.keeper(args, "halving")
    for seed in args.seeds:
        halved = sweep(seed, args.work / f"halving-{seed}")
        full = sweep(seed, args.work / f"full-{seed}", "--full")
        row = compared(full, halved)
        keep({"data": "reviews", "seed": seed} | row)
        wrong += row["compute_share"] > 1 / 3 or row["chosen_accuracy"] < row["accuracy"] - 0.01 - 1e-9
    return 4 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
