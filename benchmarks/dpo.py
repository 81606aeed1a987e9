"""DPO steps of palate and of its peers, side by side: seconds, memory, and losses as proof of equal work.

    python benchmarks/dpo.py --quick --json out.json --model FOLDER

Both sides run in one process, in turns, on the same batches of 4 pairs (ids given, nothing shuffled), with the same
AdamW, rate, clipping and dtype; one short warm-up step is dropped; a cell is the median of the paired steps. Ours is
the whole step: collation, forward, backward, clipping, update. TRL's is `DPOTrainer.train()` itself, its clock stopped
while we step and while it logs. Peak memory is VmHWM with each side alone in its process, over the warm-up and the
step with most tokens.

Peers and settings:
    trl default        TRL 1.16's defaults: gradient checkpointing, the reference in every step; `bf16=False` where
                       float32 is compared
    trl best           the fastest found for it on CPU: `precompute_ref_log_probs=True`, `gradient_checkpointing=False`,
                       one pair a device batch with 4 accumulated
    reference default  the loop of the DPO reference code: chosen and rejected padded in one forward, full logits, the
                       reference model in every step
    reference best     the same with the reference scored before, one pair a forward with 4 accumulated
The reference pass stands apart under "+ref": ours always, a peer's where it precomputes.

How to read a CPU ratio: most of the lead over TRL comes from TRL's LM head, which off CUDA scores every position
(prompt and padding too, entropy and top-1 with it); a GPU has no such gap. The smaller the body beside the vocabulary,
the more this counts, so the 4-layer model, nearly all head, is a tripwire for this repository and no result to quote.
Times on a shared machine vary by tens of percent; only ratios within one row mean anything.
"""

import argparse
import json
import logging
import statistics
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from sides import Ours, Reference, run_trl
from workload import (
    BATCH,
    DTYPES,
    PEERS,
    PROFILES,
    REAL,
    SETTINGS,
    SMALL,
    Cell,
    build,
    in_process,
    matmul_peak,
    peak_bytes,
    real_tokens,
    rows_of,
    useful_flops,
)

FIELDS = ("model", "profile", "dtype", "peer", "setting", "ratio_step", "ratio_memory", "loss_ours", "loss_peer")


# --- one process ----------------------------------------------------------------------------------------------------


def run_cell(cell: Cell) -> dict:
    """Measures the cell in this process."""
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger().setLevel(logging.ERROR)
    if cell.side != "ours" and cell.peer == "trl":
        import trl  # noqa: F401, counted as an import

    imports = peak_bytes()
    ours, theirs = None, {}
    if cell.side != "peer":
        model = build(cell, ours=True)
        rows = rows_of(cell, model.config.vocab_size)
        ours = Ours(cell, rows if cell.side == "ours" else [*rows, *rows[-BATCH:]], model)  # one more for the profile
    step = ours.step if ours else lambda: None
    if cell.side == "ours":
        for _ in range(len(rows) // BATCH):
            step()
    else:
        model = build(cell, ours=False)
        rows = rows_of(cell, model.config.vocab_size)
        if cell.peer == "trl":
            theirs = run_trl(cell, rows, model, step)
        else:
            loop = Reference(cell, rows, model)
            for _ in range(len(rows) // BATCH):
                loop.step()
                step()
            theirs = vars(loop)
    result = {"peak": peak_bytes(), "imports": imports, "threads": torch.get_num_threads()}
    if cell.side == "both":
        timed = [rows[i : i + BATCH] for i in range(BATCH, len(rows), BATCH)]
        for name, side in (("ours", vars(ours)), ("peer", theirs)):
            result[name] = {key: side[key][1 : cell.steps + 1] for key in ("seconds", "losses", "norms")}
            result[name]["reference_seconds"] = side["reference_seconds"] / cell.steps
        result["tokens"] = [real_tokens(step) for step in timed]
        result["flops"] = [useful_flops(model, step, cell.lora) for step in timed]
        result["matmul_peak"] = matmul_peak(cell.dtype)
        result["shares"] = ours.shares()
    return result


# --- all processes --------------------------------------------------------------------------------------------------


def measure(cell: Cell) -> dict:
    """`run_cell` in a process of its own."""
    return in_process(__file__, cell)


def row_of(cell: Cell, timed: dict, peak_ours: int | None, peak_peer: int | None) -> dict:
    """A line of the table: FIELDS, and what they were made of."""
    ours, peer = timed["ours"], timed["peer"]
    ratios = [theirs / mine for theirs, mine in zip(peer["seconds"], ours["seconds"], strict=True)]
    tokens, flops, peak = sum(timed["tokens"]), sum(timed["flops"]), timed["matmul_peak"]
    with_reference = [statistics.median(side["seconds"]) + side["reference_seconds"] for side in (peer, ours)]
    row = {
        "model": cell.label,
        "profile": cell.profile,
        "dtype": cell.dtype,
        "peer": cell.peer,
        "setting": cell.setting,
        "ratio_step": statistics.median(ratios),
        "ratio_memory": peak_ours / peak_peer if peak_ours and peak_peer else None,
        "loss_ours": ours["losses"][0],
        "loss_peer": peer["losses"][0],
        "ratio_with_reference": with_reference[0] / with_reference[1],
        "ratios": ratios,
        "shares": timed["shares"],
        "threads": timed["threads"],
    }
    for name, side, most in (("ours", ours, peak_ours), ("peer", peer, peak_peer)):
        row |= {f"{key}_{name}": value for key, value in side.items()}
        row[f"peak_{name}"] = most
        row[f"tokens_per_second_{name}"] = tokens / sum(side["seconds"])
        row[f"matmul_share_{name}"] = flops / sum(side["seconds"]) / peak
    return row


HEADER = (
    "| model | profile | dtype | peer | s/step peer | s/step ours (+ref) | ratio | +ref | memory | tokens/s "
    "| of matmul peak | attention, head, optimizer, data | loss peer / ours | gradient norm peer / ours |\n|"
    + "---|"
    * 14
)


def line_of(row: dict) -> str:
    """The row as Markdown."""
    memory = "-"
    if row["ratio_memory"]:
        memory = f"{row['ratio_memory']:.2f} ({row['peak_ours'] / 2**30:.1f} of {row['peak_peer'] / 2**30:.1f} GiB)"
    seconds = statistics.median(row["seconds_ours"])
    return (
        f"| {row['model']} | {row['profile']} | {row['dtype']} | {row['peer']} {row['setting']} "
        f"| {statistics.median(row['seconds_peer']):.2f} | {seconds:.2f} (+{row['reference_seconds_ours']:.2f}) "
        f"| **{row['ratio_step']:.1f}x** | {row['ratio_with_reference']:.1f}x | {memory} "
        f"| {row['tokens_per_second_peer']:.0f} -> {row['tokens_per_second_ours']:.0f} "
        f"| {row['matmul_share_peer']:.0%} -> {row['matmul_share_ours']:.0%} "
        f"| {', '.join(f'{share:.0%}' for share in row['shares'].values())} "
        f"| {row['loss_peer']:.6f} / {row['loss_ours']:.6f} | {row['norms_peer'][0]:.4f} / {row['norms_ours'][0]:.4f} |"
    )


def cells_of(given: argparse.Namespace) -> list[Cell]:
    """What was asked for; --all is every model, profile, dtype and setting in full, and LoRA in both dtypes on one."""
    models = [str(Path(folder).absolute()) for folder in given.model] + ([] if given.no_small else [SMALL])
    real = (REAL,) if given.data else ()
    profiles = given.profile or ((*PROFILES, *real) if given.all else ("tldr", *real))
    dtypes = given.dtype or (DTYPES if given.all else ("float32",))
    picked = given.profile or given.dtype or given.setting or given.all
    steps = given.steps or (3 if given.quick or not picked else 5)
    ranks = (0, given.lora or 16) if given.all else (given.lora,)
    return [
        Cell(
            model, profile, dtype, peer, setting, steps, lora=rank, tokens=given.tokens, scale=given.scale,
            data=tuple(given.data), tokenizer=models[0] if given.model else "",
        )
        for model in models
        for rank in ranks
        for profile in profiles
        if not (given.all and rank and profile != "tldr")
        for dtype in dtypes
        for peer in given.peer or PEERS
        for setting in given.setting or SETTINGS
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the cells, prints the table, writes the JSON after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float32, tldr, both settings, 3 steps (also: no flag)")
    parser.add_argument("--all", action="store_true", help="every profile, dtype, peer and setting, LoRA, 5 steps")
    parser.add_argument("--model", action="append", default=[], metavar="FOLDER", help="measured before the small one")
    parser.add_argument("--no-small", action="store_true", help="leave the 4-layer model out")
    parser.add_argument("--profile", action="append", choices=[*PROFILES, REAL])
    parser.add_argument(
        "--data", action="append", default=[], metavar="FILE", help=f"preference rows of --profile {REAL}"
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--peer", action="append", choices=PEERS)
    parser.add_argument("--setting", action="append", choices=SETTINGS)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters instead of full weights")
    parser.add_argument("--steps", type=int, help="paired steps (default 5; 3 with --quick)")
    parser.add_argument("--tokens", type=int, default=Cell.tokens, help="our stream tokens a micro-batch")
    parser.add_argument("--scale", type=float, default=1.0, help="times the profiles' lengths, to try the script")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--json", metavar="OUT", help='writes {"rows": [...], "details": [...]}')
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.cell:
        Path(given.json).write_text(json.dumps(run_cell(Cell(**json.loads(given.cell)))))
        return 0
    for folder in given.model:
        if not Path(folder, "config.json").exists():
            parser.error(f"--model {folder}: no config.json there")
    if REAL in (given.profile or ()) and not (given.data and given.model):
        parser.error(f"--profile {REAL} takes --data FILE, and --model FOLDER for its tokenizer")
    print(HEADER, flush=True)
    rows, alone = [], {}
    for cell in cells_of(given):
        timed, mine, peer = measure(cell), None, None
        if not given.no_memory:
            same = replace(cell, side="ours", peer="", setting="")
            mine = alone[same] = alone[same] if same in alone else measure(same)["peak"]
            peer = measure(replace(cell, side="peer"))["peak"]
        rows.append(row_of(cell, timed, mine, peer))
        print(line_of(rows[-1]), flush=True)
        if given.json:
            found = {"rows": [{key: row[key] for key in FIELDS} for row in rows], "details": rows}
            Path(given.json).write_text(json.dumps(found, indent=1) + "\n")
    print(
        "\nCPU ratios: TRL's head scores every position off CUDA, which is most of this lead. Losses: first timed step."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
