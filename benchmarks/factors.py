"""What each of the engine's savings is worth: a step without it over the step as it is, in turns in one process.

    python benchmarks/factors.py --model FOLDER --json out.json

Both take the same pairs, 4 a step; what is shown is the median of the paired ratios, "1.8x" meaning that a step takes
1.8 times as long without the saving. One short warm-up step is dropped. Losses are those of the first timed step.

    shared prompt         a prompt stands before each of its completions
    packing               every pair is a micro-batch of its own
    head on completions   the head runs on every position, prompts included
    kept reference        a copy of the first weights is run in every step. Over one epoch a kept reference has its pass
                          as well, before training: it pays from the second epoch, the second loss, the second run on
    no recompute          activations are made again in backward
    bfloat16              the step in float32 over the step in bfloat16
    compiled blocks       the step as it is over the step with its layers under torch.compile (where this works)
    none of the first 5   all of them left out at once, beside the product of the five
    plain loop            the loop of the DPO reference code (`dpo.py`): padded rows, full logits, the reference in
                          every step, no recomputation; beside the product of the first four
    trl default           TRL's own trainer with its defaults, beside the product of the first five; TRL's head, which
                          off CUDA costs many times a plain one, is in none of the factors
"""

import argparse
import gc
import json
import math
import statistics
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from dpo import measure, row_of
from sides import KEPT, PACKED, SCORED, SHARED, Ours, Reference
from tables import deliver, machine, options, shown, table, told_again
from workload import BATCH, DTYPES, PROFILES, SMALL, Cell, build, rows_of

MARK = "factors"
RECOMPUTE, BFLOAT16, COMPILED = "no recompute", "bfloat16", "compiled blocks"
SAVINGS = (SHARED, PACKED, SCORED, KEPT)
NONE, LOOP, TRL = "none of the first 5", "plain loop", "trl default"
COLUMNS = (*SAVINGS, RECOMPUTE, BFLOAT16, COMPILED, NONE, LOOP)
# what a side does without, so that the product of these factors foretells its ratio
PARTS = {NONE: (*SAVINGS, RECOMPUTE), LOOP: SAVINGS, TRL: (*SAVINGS, RECOMPUTE)}


def side_of(name: str, cell: Cell, rows) -> Ours | Reference:
    """The step that is timed against the base."""
    if name == LOOP:
        return Reference(replace(cell, peer="reference", setting="default"), rows, build(cell, ours=False))
    model = build(cell, ours=True)
    if name in (RECOMPUTE, NONE):
        from palate.model.recompute import enable_recompute

        enable_recompute(model)
    if name == COMPILED:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    dtype = "bfloat16" if name == BFLOAT16 else cell.dtype
    without = SAVINGS if name == NONE else (name,) if name in SAVINGS else ()
    return Ours(replace(cell, dtype=dtype), rows, model, without=without)


def ratio_of(name: str, cell: Cell, rows) -> dict:
    """What one saving is worth: ratios of paired steps, and the losses of the first of them."""
    base = Ours(cell, rows, build(cell, ours=True))
    try:
        other = side_of(name, cell, rows)
        for _ in range(len(rows) // BATCH):
            base.step()
            other.step()
    except Exception as error:
        if name != COMPILED:
            raise
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    pairs = list(zip(base.seconds, other.seconds, strict=True))[1:]
    quicker = name in (BFLOAT16, COMPILED)
    ratios = [mine / theirs if quicker else theirs / mine for mine, theirs in pairs]
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds": statistics.median(mine for mine, _ in pairs),
        "losses": [base.losses[1], other.losses[1]],
    }


def trl_of(cell: Cell) -> dict:
    """TRL's default beside us, by `dpo.py`."""
    row = row_of(cell, measure(replace(cell, peer="trl", setting="default")), None, None)
    return {"ratio": row["ratio_step"], "ratios": row["ratios"], "losses": [row["loss_ours"], row["loss_peer"]]}


def product(row: dict, name: str) -> float:
    """What the factors foretell of a side that does without all of its parts."""
    return math.prod(row["factors"][part]["ratio"] for part in PARTS[name])


def cells(row: dict) -> list[str]:
    """The row as the table has it."""

    def cell(name: str) -> str:
        found = row["factors"].get(name)
        if found is None:
            return "-"
        if "failed" in found:
            return "fails"
        known = name in PARTS and all(part in row["factors"] for part in PARTS[name])
        return f"{found['ratio']:.2f}x" + (f" ({product(row, name):.2f}x)" if known else "")

    seconds = statistics.median(found["seconds"] for found in row["factors"].values() if "seconds" in found)
    return [row["model"], row["profile"], row["dtype"], f"{seconds:.2f}", *map(cell, (*COLUMNS, TRL))]


def text(found: dict) -> str:
    """The table, and why something failed."""
    head = ("model", "profile", "dtype", "s/step", *(f"{n} (product)" if n in PARTS else n for n in (*COLUMNS, TRL)))
    failed = {f["failed"] for row in found["rows"] for f in row["factors"].values() if "failed" in f}
    lines = [table(head, [cells(row) for row in found["rows"]])]
    return "\n\n".join(lines + [f"Compiled blocks fail with: {why}" for why in sorted(failed)])


def main(argv: list[str] | None = None) -> int:
    """Measures factor after factor, prints the table, writes the JSON after every factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="FOLDER")
    parser.add_argument("--small", action="store_true", help="the 4-layer model too (it alone, without --model)")
    parser.add_argument("--profile", action="append", choices=PROFILES, help="tldr unless given")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="float32 unless given")
    parser.add_argument("--factor", action="append", choices=(*COLUMNS, TRL), help="all but trl unless given")
    parser.add_argument("--steps", type=int, default=5, help="paired steps")
    parser.add_argument("--tokens", type=int, default=Cell.tokens, help="stream tokens a micro-batch")
    parser.add_argument("--scale", type=float, default=1.0, help="times the profiles' lengths, to try the script")
    options(parser)
    given = parser.parse_args(argv)
    if told_again(given, MARK, text):
        return 0
    for folder in given.model:
        if not Path(folder, "config.json").exists():
            parser.error(f"--model {folder}: no config.json there")
    warnings.filterwarnings("ignore")
    models = [str(Path(folder).absolute()) for folder in given.model]
    models += [SMALL] * (given.small or not models)
    found = {"command": shown("factors.py", argv), "machine": machine(), "rows": []}
    for model in models:
        for profile in given.profile or ("tldr",):
            for dtype in given.dtype or ("float32",):
                cell = Cell(model, profile, dtype, "", "", given.steps, tokens=given.tokens, scale=given.scale)
                row = {"model": cell.label, "profile": profile, "dtype": dtype, "factors": {}}
                found["rows"].append(row)
                for name in given.factor or COLUMNS:
                    if name == BFLOAT16 == dtype:
                        continue
                    rows = rows_of(cell, _vocabulary(cell))
                    row["factors"][name] = trl_of(cell) if name == TRL else ratio_of(name, cell, rows)
                    gc.collect()
                    deliver(given, MARK, found, text)
    print(text(found))
    return 0


def _vocabulary(cell: Cell) -> int:
    if cell.model == SMALL:
        return build(cell, ours=True).config.vocab_size
    return json.loads(Path(cell.model, "config.json").read_text())["vocab_size"]


if __name__ == "__main__":
    sys.exit(main())
