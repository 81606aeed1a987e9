"""From command to saved model: `palate dpo` against `trl dpo`, each a process of its own, on the same pairs.

    python benchmarks/whole.py --model FOLDER --data FILE --json out.json

The clock runs from the start of the command to its end: imports, loading, tokenising, the reference, every step, the
checkpoint at the end and the saved model (palate also reads it back, and writes its report). Same pairs in the same
order, same batch, learning rate (falling linearly), beta, clipping, AdamW and dtype; one pass over the pairs. The loss
of every step stands in both runs' own logs; the first, the last and the largest difference are the proof of equal work.

Pairs are plain strings on which the two tokenise alike and nothing is cut; others are passed over, and counted. The
sides take turns. Caches of data sets and of reference scores are empty at the start of every run.

TRL's settings:
    default   one device batch of --batch pairs, gradient checkpointing, the reference in every step; `--bf16 False`
              where float32 is compared
    best      the fastest found for it on CPU: `--precompute_ref_log_probs`, no checkpointing, one pair a device batch
              with --batch accumulated

TRL's CLI starts through accelerate, which takes OMP_NUM_THREADS, and one thread without it: both sides get the same
number. `--small` adds the 4-layer model of `dpo.py` with FOLDER's tokenizer; `--quick` tries the script.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tables import deliver, machine, options, shown, table, threads, told_again
from workload import (
    BETA,
    CLIP,
    DTYPES,
    LONGEST,
    RATE,
    SETTINGS,
    SMALL,
    environment,
    model_folder,
    model_options,
    small_model,
)

from palate.layout import MICRO_BATCH_TOKENS

MARK = "whole"


# --- pairs ------------------------------------------------------------------------------------------------------------


def pairs_of(data: list[str], tokenizer, count: int) -> tuple[list[dict[str, str]], int]:
    """`count` pairs of plain strings, and how many were passed over: too long, or tokenised in two ways."""
    import numpy as np

    from palate.data.records import PreferencePair, plain
    from palate.data.sources import read_pairs
    from palate.data.tokens import tokenize, without_signal
    from palate.errors import RefusedError

    def text(value) -> str:
        value = plain(value)
        return value if isinstance(value, str) else "\n\n".join(turn["content"] for turn in value)

    def trl_ids(prompt: str, completion: str) -> list[int]:
        """As TRL makes them of strings: prompt and completion in one, an end token after them."""
        return tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]

    found, passed = [], 0
    for path in data:
        for record in read_pairs(path, bad_rows="skip"):
            if len(found) == count:
                return found, passed
            row = {name: text(getattr(record, name)) for name in ("prompt", "chosen", "rejected")}
            try:
                group = tokenize(PreferencePair(**row), tokenizer)
            except RefusedError:
                passed += 1
                continue
            same = all(
                np.array_equal([*group.prompt, *ids], trl_ids(row["prompt"], row[side]))
                for side, ids in zip(("chosen", "rejected"), group.completions, strict=True)
            )
            short = len(group.prompt) + max(map(len, group.completions)) <= LONGEST
            if same and short and len(group.prompt) and not without_signal(group):
                found.append(row)
            else:
                passed += 1
    raise SystemExit(f"{', '.join(data)}: {len(found)} pairs that both sides tokenise alike; {count} were asked for")


def write_pairs(rows: list[dict[str, str]], folder: Path) -> tuple[Path, Path]:
    """The file of palate's run, and the folder of TRL's with the rows in the order in which palate takes them."""
    from palate.data.stream import order

    ours, theirs = folder / "pairs.jsonl", folder / "trl"
    theirs.mkdir()
    for path, lines in ((ours, rows), (theirs / "train.jsonl", [rows[i] for i in order(len(rows), 0, 0)])):
        path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return ours, theirs


# --- commands ---------------------------------------------------------------------------------------------------------


def palate_command(model: Path, pairs: Path, out: Path, given: argparse.Namespace) -> list[str]:
    return [
        *(_script("palate"), "dpo", "--model", str(model), "--data", str(pairs), "--out", str(out)),
        *("--eval", "none", "--retain", "none", "--samples", "0", "--save-every", "1000000"),
        *("--batch", str(given.batch), "--lr", str(given.lr), "--beta", str(BETA), "--precision", given.dtype),
        *("--train.schedule", "linear", "--train.warmup-steps", "0", "--train.clip-norm", str(CLIP)),
        *("--train.tokens", str(given.tokens), "--device", "cpu"),
    ]


def trl_command(model: Path, pairs: Path, out: Path, given: argparse.Namespace, setting: str) -> list[str]:
    best = setting == "best"
    settings = ["--per_device_train_batch_size", str(1 if best else given.batch)]
    if best:
        settings += ["--gradient_accumulation_steps", str(given.batch), "--precompute_ref_log_probs", "True"]
        settings += ["--gradient_checkpointing", "False"]
    return [
        *(_script("trl"), "dpo", "--model_name_or_path", str(model), "--dataset_name", str(pairs)),
        *("--output_dir", str(out), "--num_train_epochs", "1", "--train_sampling_strategy", "sequential"),
        *("--learning_rate", str(given.lr), "--lr_scheduler_type", "linear", "--warmup_steps", "0"),
        *("--beta", str(BETA), "--max_grad_norm", str(CLIP), "--bf16", str(given.dtype == "bfloat16")),
        *("--max_length", str(LONGEST), "--logging_steps", "1", "--report_to", "none", "--use_cpu", "True"),
        *settings,
    ]


def _script(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise SystemExit(f"{path} is not there: install {name} beside this Python")
    return str(path)


def timed(command: list[str], folder: Path) -> dict[str, float]:
    """Seconds and peak bytes (the largest of its processes) of a command whose caches lie in `folder`, empty."""
    caches = {"HF_DATASETS_CACHE": folder / "datasets", "PALATE_CACHE": folder / "scores"}
    env = environment() | {name: str(path) for name, path in caches.items()} | {"OMP_NUM_THREADS": str(threads())}
    with (folder / "log").open("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{shlex.join(command)} failed:\n{log.read()[-4000:]}")
    return {"seconds": seconds, "peak": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)}


def run_palate(model: Path, pairs: Path, given: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        found = timed(palate_command(model, pairs, out, given), Path(folder))
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [step for step in steps if "loss" in step]
        assert (out / "model" / "model.safetensors").exists()
        result = json.loads((out / "run.json").read_text())["result"]
        return found | {
            "losses": [step["loss"] for step in steps],
            "stepping": sum(step["seconds"] for step in steps),
            "reference": result["reference_seconds"],
        }


def run_trl(model: Path, pairs: Path, given: argparse.Namespace, setting: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        found = timed(trl_command(model, pairs, out, given, setting), Path(folder))
        assert (out / "model.safetensors").exists()
        (state,) = out.glob("checkpoint-*/trainer_state.json")
        logs = json.loads(state.read_text())["log_history"]
        return found | {"losses": [line["loss"] for line in logs if "loss" in line]}


# --- the table --------------------------------------------------------------------------------------------------------


def measure(label: str, model: Path, given: argparse.Namespace, folder: Path) -> list[dict]:
    """A row a setting of TRL; the sides take turns, `--rounds` times."""
    from transformers import AutoTokenizer

    rows, passed = pairs_of(given.data, AutoTokenizer.from_pretrained(model), given.pairs)
    ours, theirs = write_pairs(rows, folder)
    runs: dict[str, list[dict]] = {name: [] for name in ("ours", *given.setting)}
    for _ in range(given.rounds):
        runs["ours"].append(run_palate(model, ours, given))
        for setting in given.setting:
            runs[setting].append(run_trl(model, theirs, given, setting))
    return [_row(label, given, setting, runs["ours"], runs[setting], passed) for setting in given.setting]


def _row(label: str, given: argparse.Namespace, setting: str, ours: list[dict], peer: list[dict], passed: int) -> dict:
    ratios = [theirs["seconds"] / mine["seconds"] for theirs, mine in zip(peer, ours, strict=True)]
    losses = ours[0]["losses"], peer[0]["losses"]
    if len(losses[0]) != len(losses[1]):
        raise SystemExit(f"{label}: {len(losses[0])} steps of ours, {len(losses[1])} of TRL's")
    return {
        "model": label,
        "data": [Path(path).name for path in given.data],
        "pairs": given.pairs,
        "passed_over": passed,
        "batch": given.batch,
        "steps": len(losses[0]),
        "dtype": given.dtype,
        "setting": setting,
        "seconds_ours": statistics.median(run["seconds"] for run in ours),
        "seconds_peer": statistics.median(run["seconds"] for run in peer),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "stepping_ours": statistics.median(run["stepping"] for run in ours),
        "reference_ours": statistics.median(run["reference"] for run in ours),
        "peak_ours": max(run["peak"] for run in ours),
        "peak_peer": max(run["peak"] for run in peer),
        "losses_ours": losses[0],
        "losses_peer": losses[1],
        "loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }


HEAD = (
    *("model", "pairs", "dtype", "TRL setting", "s TRL", "s ours (reference, steps)", "ratio", "GiB TRL / ours"),
    *("first loss TRL / ours", "last loss TRL / ours", "largest difference"),
)


def cells(row: dict) -> list[str]:
    """The row as the table has it."""
    first, last = ((row["losses_peer"][i], row["losses_ours"][i]) for i in (0, -1))
    return [
        row["model"],
        f"{row['pairs']} of {', '.join(row['data'])}, {row['steps']} steps of {row['batch']}",
        row["dtype"],
        row["setting"],
        f"{row['seconds_peer']:.0f}",
        f"{row['seconds_ours']:.0f} ({row['reference_ours']:.0f}, {row['stepping_ours']:.0f})",
        f"**{row['ratio']:.1f}x**",
        f"{row['peak_peer'] / 2**30:.1f} / {row['peak_ours'] / 2**30:.1f}",
        f"{first[0]:.6f} / {first[1]:.6f}",
        f"{last[0]:.6f} / {last[1]:.6f}",
        f"{row['loss_difference']:.1g}",
    ]


def text(found: dict) -> str:
    """The table of what was found."""
    return table(HEAD, [cells(row) for row in found["rows"]])


def main(argv: list[str] | None = None) -> int:
    """Runs both commands, prints the table, writes the JSON after every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_options(parser)
    parser.add_argument("--data", action="append", metavar="FILE", help="preference pairs (default builtin:reviews)")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8, help="pairs a step (TRL's default 8)")
    parser.add_argument("--lr", type=float, default=RATE, help="peak rate (TRL's default 1e-6)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="of TRL (both)")
    parser.add_argument("--tokens", type=int, default=MICRO_BATCH_TOKENS, help="our stream tokens a micro-batch")
    parser.add_argument("--rounds", type=int, default=1, help="turns of both sides; medians are shown")
    parser.add_argument("--quick", action="store_true", help="builtin:tiny on 16 pairs, TRL's best: the script's trial")
    options(parser)
    given = parser.parse_args(argv)
    if told_again(given, MARK, text):
        return 0
    model = model_folder(parser, given)
    if given.quick:
        given.pairs, given.setting = 16, given.setting or ["best"]
    given.data, given.setting = given.data or ["builtin:reviews"], given.setting or list(SETTINGS)
    found = {"command": shown("whole.py", argv), "machine": machine(), "rows": []}
    with ExitStack() as stack:
        todo = [("builtin:tiny" if given.quick else model.name, lambda folder: model)]
        if given.small:
            todo.append((SMALL, lambda folder: small_model(model, folder / "model")))
        for label, made in todo:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found["rows"] += measure(label, made(folder), given, folder)
            deliver(given, MARK, found, text)
    print(text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
