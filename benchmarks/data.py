"""The path of data at scale: reading, tokenising, starting again, looking up scores, packing; and what memory it holds.

    python benchmarks/data.py --quick --json out.json

For every size it writes that many pairs (those of builtin:reviews over and over, each prompt with a number of its own),
and runs each part in a process of its own, under an empty cache:

    lists   reading and tokenising into lists in memory, as files under 1 MiB are
    first   reading and tokenising into a table that is kept
    again   starting on what is kept: the file and the table hashed, rows split, every reference score found in the
            store, the first batch made; then --steps steps of the data path alone (rows made, packed, collated), and
            a few steps of the model (builtin:tiny, the smallest there is) over the same rows

Seconds count from when everything is imported and a model was loaded once. Memory is what the process grew by since
then: `resident` at the end of the part, `peak` at its highest, `own` without the pages of mapped files, which
the system takes back when it needs them. A store of --store rows is opened and asked too. On a shared machine the
seconds that were computed (in brackets) say more than those that passed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from tables import deliver, machine, options, shown, table, told_again
from workload import environment

SIZES, QUICK = (10_000, 100_000, 1_000_000), (100, 400)
BATCH, TOKENS, ASKED = 64, 2048, 20_000


def write_pairs(path: Path, count: int) -> None:
    """Pairs of plain texts with distinct prompts, one JSON object a line."""
    from palate.data.sources import read_pairs

    rows = [[text[-1].content for text in (r.prompt, r.chosen, r.rejected)] for r in read_pairs("builtin:reviews")]
    with path.open("w", encoding="utf-8") as file:
        for number, (prompt, chosen, rejected) in enumerate(islice(cycle(rows), count)):
            row = {"prompt": f"{number}. {prompt}", "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")


# --- memory -----------------------------------------------------------------------------------------------------------


def memory() -> dict[str, int]:
    """Bytes of this process: resident, of its own, and the most that were resident; Linux alone says so."""
    names = {"VmRSS": "resident", "RssAnon": "own", "VmHWM": "peak"}
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {names[line[0][:-1]]: int(line[1]) * 1024 for line in lines if line and line[0][:-1] in names}


class Clock:
    """Seconds since it began: those that passed, and those that this process computed."""

    def __init__(self):
        self.began = time.perf_counter(), time.process_time()

    def __call__(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.began[0], "cpu_seconds": time.process_time() - self.began[1]}


class Growth:
    """What memory grew by since it began."""

    def __init__(self):
        from palate.recipes.plan import forget_peak

        forget_peak()
        self.before = memory()

    def __call__(self) -> dict[str, int]:
        now = memory()
        return {name: now[name] - self.before["own" if name == "own" else "resident"] for name in now}


# --- the parts, each in its own process -------------------------------------------------------------------------------


def prepared(data: str):
    """The run as `palate dpo` has it before its first forward pass."""
    from palate.data.sources import read_pairs
    from palate.recipes.preference import PreferenceConfig
    from palate.recipes.rows import with_signal
    from palate.recipes.training import prepare
    from palate.train.objectives import objective

    config = PreferenceConfig(model="builtin:tiny", data=data, device="cpu", batch=BATCH)
    read = partial(read_pairs, columns=None, format=None, bad_rows="stop")
    return prepare(
        config, read, lambda numerics: objective("dpo", numerics, beta=0.1), usable=with_signal, say=lambda text: None
    )


def import_all() -> None:
    """All that a run imports, by way of two over a few rows: one makes a table, one finds it."""
    import palate.recipes.kept
    from palate.data.stream import stream

    palate.recipes.kept.KEPT_BYTES = 0
    for _ in range(2):
        made = prepared("builtin:reviews[:40]")
        next(stream(made.rows.train, made.objective.collate, batch=4))


def store_for(made):
    """The store that holds the reference scores of this run, and the tag of their numerics."""
    from palate.reference import reference_identity
    from palate.store import reference_store

    model = made.loaded.model
    return reference_store(reference_identity(model, made.precision)), made.objective.numerics.tag(model)


def first(data: str, kept: bool) -> dict:
    """Reads and tokenises; with `kept` into a table, and then puts a score for every completion into the store."""
    import palate.recipes.kept

    import_all()
    palate.recipes.kept.KEPT_BYTES = 0 if kept else sys.maxsize
    grown, clock = Growth(), Clock()
    made = prepared(data)
    found = {f"start_{name}": seconds for name, seconds in clock().items()} | grown()
    if kept:
        store, tag = store_for(made)
        keys = made.rows.keys
        store.put(keys, -np.arange(1.0, len(keys) + 1), np.ones(len(keys)), tag)
    return found


def again(data: str, steps: int, trained: int) -> dict:
    """Starts on what is kept, then takes steps of the data path, then of the model."""
    import palate.recipes.kept
    from palate.data.stream import stream
    from palate.data.table import joined
    from palate.distributed import Ranks
    from palate.recipes.training import update_config
    from palate.reference import reference_column, with_reference
    from palate.train.loop import TrainState
    from palate.train.loop import steps as optimizer_steps

    import_all()
    palate.recipes.kept.KEPT_BYTES = 0
    grown, clock = Growth(), Clock()
    made = prepared(data)
    ready = clock()["seconds"]
    store, _ = store_for(made)
    everything, model = joined(made.rows.train, made.rows.held), made.loaded.model
    column = reference_column(
        everything, model, numerics=made.objective.numerics, tokens=TOKENS, store=store, keys=made.rows.keys
    )
    assert column.scored == 0, "every score is in the store"
    looked_up = clock()["seconds"] - ready
    groups = with_reference(everything, column)[: len(made.rows.train)]
    del column, everything  # as a run does

    def batches(epochs=10**6):
        return stream(groups, made.objective.collate, batch=BATCH, tokens=TOKENS, seed=0, epochs=epochs)

    def tokens_of(step) -> int:
        return sum(len(part.batch.tokens) for part in step)

    path = batches()
    next(path)
    found = {f"start_{name}": number for name, number in (clock() | grown()).items()}
    found |= {"rows_seconds": ready, "lookup_seconds": looked_up}
    clock, done = Clock(), 0
    for step in islice(path, steps):
        done += tokens_of(step)
    found |= speeds("data", done, clock) | grown()
    state, counted = TrainState.fresh(model, update_config(_config(), 1e-5)), []
    batches_seen = (counted.append(tokens_of(step)) or step for step in islice(batches(), trained + 1))
    for step in optimizer_steps(state, batches_seen, made.objective, Ranks.single()):
        if step.number == 1:  # the first one is slow
            clock, counted[:] = Clock(), []
    return found | speeds("model", sum(counted), clock)


def speeds(side: str, tokens: int, clock: Clock) -> dict[str, float]:
    """Tokens a second that passed, and of one that was computed."""
    spent = clock()
    return {
        f"{side}_tokens_per_second": tokens / spent["seconds"],
        f"{side}_tokens_per_cpu_second": tokens / spent["cpu_seconds"],
    }


def _config():
    from palate.recipes.preference import PreferenceConfig

    return PreferenceConfig(model="builtin:tiny", data="")


def fill_store(rows: int) -> dict:
    """A store of random keys, in segments of 5 M rows."""
    from palate.store import reference_store

    draw, began = np.random.default_rng(0), time.perf_counter()
    store = reference_store("0" * 32)
    for start in range(0, rows, 5_000_000):
        count = min(5_000_000, rows - start)
        keys = draw.integers(0, 2**64, (count, 2), dtype=np.uint64)
        store.put(keys, np.zeros(count), np.ones(count), f"tag {start}")
        np.save(Path(store.folder).parent / "asked.npy", keys[:ASKED])
    return {"fill_seconds": time.perf_counter() - began}


def open_store(rows: int) -> dict:
    """Opens it, asks for ASKED rows that are there and as many that are not."""
    from palate.store import reference_store

    keys = np.load(Path(reference_store("0" * 32).folder).parent / "asked.npy")
    other = np.random.default_rng(1).integers(0, 2**64, keys.shape, dtype=np.uint64)
    grown, clock = Growth(), Clock()
    store = reference_store("0" * 32)
    assert len(store) == rows
    found = {"store_rows": rows} | {f"open_{name}": number for name, number in (clock() | grown()).items()}
    clock = Clock()
    hits = store.lookup(np.concatenate([keys, other]), "tag 0")[0]
    assert hits[: len(keys)].all()
    assert not hits[len(keys) :].any()
    return found | {"asked": 2 * len(keys), "ask_seconds": clock()["seconds"], **grown()}


PARTS = {"first": first, "again": again, "fill": fill_store, "open": open_store}


def run(cache: Path, part: str, **options) -> dict:
    """What a part found, in a fresh process with this cache."""
    command = [sys.executable, __file__, "--part", json.dumps({"part": part, **options})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment() | {"PALATE_CACHE": str(cache)})
    if done.returncode:
        raise SystemExit(f"{part} {options}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# --- the table --------------------------------------------------------------------------------------------------------


def measure(args, folder: Path) -> Iterator[dict]:
    """A row a size and way to start, and one of the store."""
    for size in args.sizes:
        data, cache = folder / f"{size}.jsonl", folder / f"cache-{size}"
        write_pairs(data, size)
        ways = [("first", "first", {"kept": True}), ("again", "again", {"steps": args.steps, "trained": args.trained})]
        if size <= args.lists:
            ways.insert(0, ("lists", "first", {"kept": False}))
        for way, part, how in ways:
            found = run(cache, part, data=str(data), **how)
            yield {"way": way, "pairs": size, "file_bytes": data.stat().st_size, **found}
        data.unlink()
    if args.store:
        cache = folder / "cache-store"
        filled = run(cache, "fill", rows=args.store)
        yield {"way": "store", **filled, **run(cache, "open", rows=args.store)}


HEAD = ["what", "way", "s to start (computed)", "MB own", "MB resident", "MB peak"]
HEAD += ["data tokens/s (computed)", "model tokens/s (computed)"]


def cells(row: dict) -> list[str]:
    """The row for people."""
    memory = [f"{row[name] / 1e6:.0f}" for name in ("own", "resident", "peak")]
    if row["way"] == "store":
        asked = f"opened, then {row['asked']:,} keys asked in {row['ask_seconds']:.2f} s"
        start = f"{row['open_seconds']:.3f} ({row['open_cpu_seconds']:.3f})"
        return [f"{row['store_rows']:,} scores", asked, start, *memory, "", ""]
    start = f"{row['start_seconds']:.2f} ({row['start_cpu_seconds']:.2f})"
    sides = [(f"{side}_tokens_per_second", f"{side}_tokens_per_cpu_second") for side in ("data", "model")]
    paces = [f"{row[one]:,.0f} ({row[two]:,.0f})" if one in row else "" for one, two in sides]
    return [f"{row['pairs']:,} pairs", row["way"], start, *memory, *paces]


def text(found: dict) -> str:
    """The table for the docs."""
    return table(HEAD, [cells(row) for row in found["rows"]])


def main(argv: list[str] | None = None) -> None:
    """Parses, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="hundreds of pairs, a small store")
    parser.add_argument("--sizes", type=int, nargs="+", help=f"pairs; default: {SIZES}")
    parser.add_argument("--lists", type=int, default=100_000, help="most pairs that are read into lists too")
    parser.add_argument("--steps", type=int, help="steps of the data path; default: 1,000")
    parser.add_argument("--trained", type=int, help="steps of the model; default: 8")
    parser.add_argument("--store", type=int, help="rows of the store; default: 20,000,000; 0: none")
    parser.add_argument("--folder", help="where files and cache are made; default: a temporary folder")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options(parser)
    args = parser.parse_args(argv)
    if args.part:
        chosen = json.loads(args.part)
        print(json.dumps(PARTS[chosen.pop("part")](**chosen)))
        return
    if told_again(args, "data", text):
        return
    defaults = dict(sizes=QUICK, steps=20, trained=2, store=50_000) if args.quick else {}
    defaults = dict(sizes=SIZES, steps=1000, trained=8, store=20_000_000) | defaults
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    found: dict = {"machine": machine(), "command": shown("data.py", argv), "rows": []}
    print(table(HEAD, []), flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for row in measure(args, Path(folder)):
            found["rows"].append(row)
            print("| " + " | ".join(cells(row)) + " |", flush=True)
            deliver(args, "data", found, text)


if __name__ == "__main__":
    main()
