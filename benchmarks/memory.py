"""What a DPO step of ours takes, what it could not do without, and what `--dry-run` said it would take.

    python benchmarks/memory.py --model FOLDER --json out.json

step / ideal   The peak (VmHWM) of a process that does nothing but steps, above the same process once a step of a
               model of next to no weights has loaded every library; over ideal = weights + gradients + two AdamW
               states + what autograd keeps of the largest micro-batch's stream for backward, each storage once,
               logits and casts of weights apart.
peak, s/step   `palate dpo --dry-run` foretells them; then the same command runs. Its peak is that of the whole run,
               saving included; its seconds are those of the steps after the first, at the mean tokens of a step.

Pairs are words that are one token each, in the profiles' lengths, 4 a step.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from sides import Ours, groups_of
from tables import deliver, machine, options, shown, table, threads, told_again
from workload import (
    BATCH,
    DTYPES,
    PROFILES,
    RATE,
    SMALL,
    Cell,
    build,
    environment,
    in_process,
    model_folder,
    model_options,
    peak_bytes,
    rows_of,
    small_model,
)

MARK = "memory"


# --- a process that does nothing but steps ----------------------------------------------------------------------------


def stepped(cell: Cell) -> dict[str, float]:
    """Peak of steps in this process, and the bytes that they could not do without."""
    import torch

    from palate.data.batch import collate, stream_length
    from palate.data.stream import pack
    from palate.scoring import Numerics

    warnings.filterwarnings("ignore")
    load_libraries(cell)
    imports = peak_bytes()
    model = build(cell, ours=True)
    built = peak_bytes()
    rows = rows_of(cell, model.config.vocab_size)
    ours = Ours(cell, rows, model)
    for _ in range(len(rows) // BATCH):
        ours.step()
    peak = peak_bytes()
    micros = []
    for first in range(0, len(rows), BATCH):
        groups = groups_of(rows[first : first + BATCH])
        micros += [[groups[i] for i in part] for part in pack([stream_length(g) for g in groups], cell.tokens)]
    largest = max(micros, key=lambda micro: sum(map(stream_length, micro)))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    kept, casts = kept_by_autograd(model, collate(largest), Numerics.of(model, cell.dtype, cell.tokens))
    return {
        "imports": imports,
        "built": built - imports,
        "step": peak - imports,
        "weights": weights,
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations": kept,
        "casts": casts,
        "tokens": sum(map(stream_length, largest)),
        "threads": torch.get_num_threads(),
    }


def load_libraries(cell: Cell) -> None:
    """A step of a model of next to no weights on pairs of next to no tokens: nothing is imported after it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    first = replace(cell, profile="tldr", steps=1, scale=0.02)
    Ours(first, rows_of(first, config.vocab_size), LlamaForCausalLM(config)).step()


def kept_by_autograd(model, batch, numerics) -> tuple[int, int]:
    """(bytes of the storages that a forward saves for backward, each once, weights apart; bytes of weights' casts)."""
    from torch.autograd.graph import saved_tensors_hooks

    from palate.scoring import logps

    held = [*model.parameters(), *model.buffers(), batch.tokens, batch.positions, batch.predictors, batch.targets]
    own = {tensor.untyped_storage()._cdata for tensor in held}
    shapes = {shape for p in model.parameters() if p.dim() == 2 for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
    found, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            alive.append(storage)  # so that no number is given twice
            found[storage._cdata] = storage.nbytes(), tuple(tensor.shape) in shapes and tensor.dtype.itemsize == 2
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logps(model, batch, numerics=numerics)
    sizes = [(size, cast and numerics.precision == "bfloat16") for size, cast in found.values()]
    return tuple(sum(size for size, cast in sizes if cast == wanted) for wanted in (False, True))


# --- the command, foretold and run ------------------------------------------------------------------------------------


def write_pairs(cell: Cell, model: Path, path: Path) -> None:
    """Pairs of the cell's lengths in words that are one token each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = []
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token])
        plain = word.startswith(" ") and word[1:].isascii() and word[1:].isalpha()
        if plain and tokenizer(word + word, add_special_tokens=False)["input_ids"] == [token, token]:
            words.append(word)
        if len(words) == 997:
            break
    rows = []
    for number, row in enumerate(rows_of(cell, len(tokenizer))[BATCH:]):
        texts = ["".join(words[(31 * i + 7 * number + side) % len(words)] for i in range(len(ids)))
                 for side, ids in enumerate(row)]  # fmt: skip
        rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def palate(model: Path, pairs: Path, folder: Path, cell: Cell, *more: str) -> dict:
    """The result of `palate dpo`."""
    command = [
        *(str(Path(sys.executable).with_name("palate")), "dpo", "--model", str(model), "--data", str(pairs)),
        *("--out", str(folder / "run"), "--eval", "none", "--retain", "none", "--samples", "0", "--device", "cpu"),
        *("--batch", str(BATCH), "--lr", str(RATE), "--precision", cell.dtype, "--train.tokens", str(cell.tokens)),
        *(("--lora-rank", str(cell.lora)) if cell.lora else ()),
        *("--save-every", "1000000", "--json", *more),
    ]
    env = environment() | {"PALATE_CACHE": str(folder / "scores"), "OMP_NUM_THREADS": str(threads())}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def foretold(cell: Cell, model: Path) -> dict[str, float]:
    """Peak and seconds of a step, as --dry-run says and as they were."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(cell, model, folder / "pairs.jsonl")
        plan = palate(model, folder / "pairs.jsonl", folder, cell, "--dry-run")
        ran = palate(model, folder / "pairs.jsonl", folder, cell)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["tokens"], line["seconds"]) for line in lines if "loss" in line]
    mean = sum(tokens for tokens, _ in steps) / len(steps)
    later = [sum(column) for column in zip(*steps[1:], strict=True)]
    return {
        "plan_peak": plan["peak_bytes"],
        "run_peak": ran["peak_bytes"],
        "plan_seconds": plan["seconds_per_step"],
        "run_seconds": later[1] / later[0] * mean,
        "plan": plan["memory"],
    }


# --- the table --------------------------------------------------------------------------------------------------------


def measure(cell: Cell, model: Path) -> dict:
    """Everything of one row."""
    found = in_process(__file__, cell)
    ideal = found["weights"] + found["gradients"] + found["optimizer"] + found["activations"]
    facts = {"model": cell.label, "profile": cell.profile, "dtype": cell.dtype}
    return facts | found | {"ideal": ideal, "step_over_ideal": found["step"] / ideal} | foretold(cell, model)


HEAD = (
    *("model", "profile", "dtype", "tokens", "ideal, MiB (weights + gradients + AdamW + activations)", "step, MiB"),
    *("step / ideal", "run's peak, MiB: foretold / was", "off by", "s/step: foretold / was", "off by"),
)


def cells(row: dict) -> list[str]:
    """The row as the table has it."""

    def mib(name: str) -> str:
        return f"{row[name] / 2**20:,.0f}"

    parts = " + ".join(mib(name) for name in ("weights", "gradients", "optimizer", "activations"))
    return [
        *(row["model"], row["profile"], row["dtype"], f"{row['tokens']:,}", f"{mib('ideal')} ({parts})", mib("step")),
        *(f"**{row['step_over_ideal']:.2f}**", f"{mib('plan_peak')} / {mib('run_peak')}"),
        f"{row['plan_peak'] / row['run_peak'] - 1:+.0%}",
        f"{row['plan_seconds']:.2f} / {row['run_seconds']:.2f}",
        f"{row['plan_seconds'] / row['run_seconds'] - 1:+.0%}",
    ]


def text(found: dict) -> str:
    """The table of what was found."""
    return table(HEAD, [cells(row) for row in found["rows"]])


def main(argv: list[str] | None = None) -> int:
    """Measures row after row, prints the table, writes the JSON after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_options(parser)
    parser.add_argument("--only-small", action="store_true", help="the 4-layer model, with this tokenizer")
    parser.add_argument("--quick", action="store_true", help="builtin:tiny, tldr: the script's trial")
    parser.add_argument("--profile", action="append", choices=PROFILES, help="all unless given")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="float32 unless given")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters instead of full weights")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=Cell.tokens, help="stream tokens a micro-batch")
    parser.add_argument("--scale", type=float, default=1.0, help="times the profiles' lengths, to try the script")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options(parser)
    given = parser.parse_args(argv)
    if given.cell:
        Path(given.json).write_text(json.dumps(stepped(Cell(**json.loads(given.cell)))))
        return 0
    if told_again(given, MARK, text):
        return 0
    folder = model_folder(parser, given)
    profiles = given.profile or (["tldr"] if given.quick else PROFILES)
    found = {"command": shown("memory.py", argv), "machine": machine(), "rows": []}
    with ExitStack() as stack:
        todo = [] if given.only_small else [(str(folder), folder)]
        if given.small or given.only_small:
            todo.append(
                (SMALL, small_model(folder, Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"))
            )
        for name, path in todo:
            for profile in profiles:
                for dtype in given.dtype or ("float32",):
                    cell = Cell(
                        name, profile, dtype, "", "", given.steps, lora=given.lora, tokens=given.tokens,
                        scale=given.scale,
                    )  # fmt: skip
                    found["rows"].append(measure(cell, path))
                    deliver(given, MARK, found, text)
    print(text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
