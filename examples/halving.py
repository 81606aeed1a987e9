"""Does halving find what the full grid finds? Twelve cells of beta and rate on the built-in world, both ways.

    python examples/halving.py --work FOLDER [--seeds 0 1] [--out docs/results.md]

Sweeps that are in the folder already are gone on with, or read. Both choose on 300 held-out pairs; what every cell of
the full grid is worth is then measured on 3,465 fresh pairs of the world, on requests that no file has pairs of. Exit 4
where the cell that halving chose lies more than one point of their accuracy below the best of all cells, or
halving took more than a third of the steps.
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


def fresh_pairs(path: Path) -> Path:
    """The file, with a pair on each request that `builtin:reviews` and its held-out part leave over."""
    from palate.worlds.files import asked, pairs

    if not path.exists():
        rest = list(pairs("reviews", len(asked("reviews"))))[2400:] + list(pairs("prompts", len(asked("prompts"))))
        path.write_text("".join(json.dumps(row) + "\n" for row in rest), encoding="utf-8")
    return path


def worth(folder: Path, data: Path) -> float:
    """Implicit-reward accuracy of a cell's model on the fresh pairs."""
    import io
    from contextlib import redirect_stdout

    from palate.cli import main as palate

    told, scores = io.StringIO(), folder / "fresh.jsonl"
    scores.unlink(missing_ok=True)
    words = ["score", "--model", folder, "--reference", "builtin:tiny", "--data", data, "--out", scores, "--json"]
    with redirect_stdout(told):
        if palate([str(word) for word in words]) != 0:
            sys.exit(f"{folder} could not be scored")
    return json.loads(told.getvalue().splitlines()[-1])["accuracy"]


def compared(full: dict, halved: dict, fresh: dict[str, float]) -> dict:
    """The best cell of both, both with the full grid's numbers, and what they cost. fresh: accuracy of each cell."""
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
        "fresh": fresh,
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
    below = max(100 * (max(row["fresh"].values()) - row["fresh"][row["chosen"]]) for row in rows)
    lines = [
        "## Halving against the full grid",
        "",
        "`palate sweep dpo --grid beta=0.05,0.1,0.3,1.0 --grid lr=5e-5,2e-4,8e-4` on `builtin:tiny` and",
        "`builtin:reviews`, 38 steps of 64 pairs a cell, 300 held-out pairs. A best cell is the one of the lowest",
        "held-out loss among those within a standard error (2.5 points) of the highest accuracy. What the cells are",
        "worth is measured on 3,465 fresh pairs (standard error 0.7 points), on requests of no other pair: *best of",
        "all, worst* are of the full grid's twelve cells. Steps and seconds are those of training, without evaluation",
        f"and sampling. Halving chose the full grid's choice in {same} of {len(rows)} seeds, and at worst a cell",
        f"{below:.1f} points below the best of all.",
        "",
        "| seed | full grid's choice | held out | halving's choice | held out | fresh | best of all, fresh | worst "
        "| rungs | share of steps | seconds, full | seconds, halving |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        best = max(r["fresh"], key=r["fresh"].get)
        lines.append(
            f"| {r['seed']} | {r['best']} | {r['accuracy']:.1%} [{r['low']:.1%}, {r['high']:.1%}] | "
            f"{r['chosen']} | {r['chosen_accuracy']:.1%} | {r['fresh'][r['chosen']]:.1%} | "
            f"{r['fresh'][best]:.1%} ({best}) | {min(r['fresh'].values()):.1%} | "
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
        data = fresh_pairs(args.work / "fresh.jsonl")
        fresh = {c["name"]: worth(args.work / f"full-{seed}" / c["path"], data) for c in full["cells"]}
        row = compared(full, halved, fresh)
        keep({"data": "reviews", "seed": seed} | row)
        wrong += row["compute_share"] > 1 / 3 or fresh[row["chosen"]] < max(fresh.values()) - 0.01
    return 4 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
