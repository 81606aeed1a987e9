"""What bfloat16 does to the log-ratios that a DPO loss is made of, in our stream and in plain padded rows.

    python benchmarks/rounding.py --model FOLDER --json out.json

A model takes a few steps in float32. Between the weights before and after lies the margin of every pair: (chosen
less rejected) log-ratio, nats. The same margins are taken in bfloat16, by `palate.scoring` and by a loop over pairs
whose padded rows run under plain autocast with full logits; what float32 says is the truth. Pairs are random ids in the
profiles' lengths, of which a model thinks little: their log-probs are large, and so is what is rounded off.
"""

import argparse
import copy
import sys
from dataclasses import replace

import numpy as np
from sides import Ours, Reference, groups_of
from tables import deliver, machine, options, shown, table, told_again
from workload import BATCH, BETA, PROFILES, Cell, build, model_folder, model_options, rows_of

MARK = "rounding"


def of_ours(model, rows: list, precision: str) -> np.ndarray:
    """(G, 2) log-probs as palate scores them, nats."""
    from palate.reference import annotate
    from palate.scoring import Numerics

    groups = annotate(groups_of(rows), model, numerics=Numerics.of(model, precision))
    return np.array([group.reference for group in groups])


def of_rows(model, rows: list, cell: Cell) -> np.ndarray:
    """(G, 2) log-probs of two padded rows a pair, under autocast, through the model's own logits."""
    return np.array([pair.tolist() for pair in Reference(cell, rows, model).stored])


def measure(cell: Cell) -> dict:
    """One row of the table."""
    model = build(cell, ours=True)
    before = copy.deepcopy(model)
    rows = rows_of(cell, model.config.vocab_size)
    ours = Ours(cell, rows, model)
    for _ in range(2):
        ours.step()
    rows, plain = rows[BATCH:], replace(cell, dtype="bfloat16", setting="best")

    def margins(score, how) -> np.ndarray:
        ratios = score(model, rows, how) - score(before, rows, how)
        return ratios[:, 0] - ratios[:, 1]

    truth = margins(of_ours, "float32")
    found = {"model": cell.label, "profile": cell.profile, "pairs": len(rows), "margin": _root(truth)}
    for side, error in (("ours", margins(of_ours, "bfloat16") - truth), ("rows", margins(of_rows, plain) - truth)):
        # at a margin of 0 the loss moves by half of beta times the margin
        batches = BETA / 2 * error.reshape(-1, BATCH).mean(1)
        found |= {f"{side}_error": _root(error), f"{side}_mean": float(error.mean()), f"{side}_loss": _root(batches)}
    return found


def _root(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


HEAD = ("model", "profile", "pairs", "margin, nats", "off in ours (mean)", "off in rows (mean)")
HEAD += (f"loss of {BATCH} pairs off in ours / rows",)


def text(found: dict) -> str:
    """The table of what was found; all but the means are root mean squares."""
    rows = [
        [
            *(r["model"], r["profile"], str(r["pairs"]), f"{r['margin']:.2f}"),
            *(f"{r[f'{side}_error']:.2f} ({r[f'{side}_mean']:+.2f})" for side in ("ours", "rows")),
            f"{r['ours_loss']:.3f} / {r['rows_loss']:.3f}",
        ]
        for r in found["rows"]
    ]
    return table(HEAD, rows)


def main(argv: list[str] | None = None) -> int:
    """Measures profile after profile, prints the table, writes the JSON after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_options(parser)
    parser.add_argument("--quick", action="store_true", help="builtin:tiny, tldr: the script's trial")
    parser.add_argument("--profile", action="append", choices=PROFILES, help="all unless given")
    parser.add_argument("--pairs", type=int, default=24, help=f"of each profile, a multiple of {BATCH}")
    options(parser)
    given = parser.parse_args(argv)
    if told_again(given, MARK, text):
        return 0
    if given.pairs < 2 * BATCH or given.pairs % BATCH:
        parser.error(f"--pairs {given.pairs}: give a multiple of {BATCH}, {2 * BATCH} or more")
    folder = model_folder(parser, given)
    found: dict = {"command": shown("rounding.py", argv), "machine": machine(), "rows": []}
    for profile in given.profile or (["tldr"] if given.quick else PROFILES):
        found["rows"].append(measure(Cell(str(folder), profile, "float32", "", "", given.pairs // BATCH)))
        deliver(given, MARK, found, text)
    print(text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
