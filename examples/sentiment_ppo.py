"""A real model and a simple judge: PPO and DPO make SmolLM2-135M go on with openings of film reviews more warmly.

    python examples/sentiment_ppo.py --model SmolLM2-135M-Instruct --data-dir "$PALATE_TEST_DATA" --work FOLDER

The judge is naive Bayes, fitted here on half of `sentiment_sentences.jsonl`; the openings are the first four words of
the other half. PPO samples 30 rollouts of 32 episodes; DPO learns from 300 pairs of samples of the starting model,
which the same judge labels. Both train LoRA of one rank; both are then compared with the start on openings that
neither saw. What is in the folder already is gone on with, or read. `score` is the judge: `--reward
sentiment_ppo:score`.
"""

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROLLOUTS, EPISODES, PAIRS, HELD, TOKENS, RANK = 30, 32, 300, 150, 24, 16
TEMPERATURE = 0.7  # as in the runs that were published; the weights, of four bits, ramble at 1
BOTH = ("--lora-rank", RANK, "--lr", 2e-4, "--precision", "bfloat16", "--eval", "none", "--samples", 0)
PPO = ("--critic", "trunk", "--passes", 1, "--minibatches", 4, "--kl-coef", 0.05)
DPO = ("--beta", 0.1, "--batch", 16, "--retain", "none", "--retain-samples", 0)


# --- the judge -------------------------------------------------------------------------------------------------------


def sentences(part: int) -> list[dict]:
    """Half of the sentences, by a hash of their text."""
    path = Path(os.environ["PALATE_TEST_DATA"]) / "sentiment_sentences.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if hashlib.sha256(row["text"].encode()).digest()[0] % 2 == part]


def words(text: str) -> set[str]:
    """Each word once: to say it again is not to mean it more."""
    return set(re.findall(r"[a-z']+", text.lower()))


@cache
def weights() -> dict[str, float]:
    """What each word says for a warm sentence: its log-odds, with one count added to every word of either side."""
    counts = [Counter(), Counter()]
    for row in sentences(0):
        counts[row["label"]].update(words(row["text"]))
    vocabulary = counts[0] | counts[1]
    totals = [sum(count.values()) + len(vocabulary) for count in counts]
    return {
        word: math.log((counts[1][word] + 1) / totals[1]) - math.log((counts[0][word] + 1) / totals[0])
        for word in vocabulary
    }


def log_odds(text: str) -> float:
    """Of warm against cold, by naive Bayes."""
    return sum(weights().get(word, 0.0) for word in words(text))


@cache
def scale() -> tuple[float, float]:
    """Mean and standard deviation over the other half of the sentences."""
    found = [log_odds(row["text"]) for row in sentences(1)]
    mean = sum(found) / len(found)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in found) / len(found))


def score(prompt, completion: str) -> float:
    """How warm the completion is: log-odds of mean 0 and deviation 1 over real sentences."""
    mean, deviation = scale()
    return (log_odds(completion) - mean) / deviation


def accuracy() -> float:
    """Of the judge, on the half it has not seen."""
    rows = sentences(1)
    return sum((log_odds(row["text"]) > 0) == bool(row["label"]) for row in rows) / len(rows)


# --- the experiment --------------------------------------------------------------------------------------------------


def palate(*argv: object) -> tuple[dict, float]:
    """The result of a verb, run as a process of its own, and its seconds."""
    code = "import sys; from palate.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, argv), "--device", "cpu", "--json"]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=HERE)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1]), time.perf_counter() - began


def openings(work: Path) -> tuple[Path, Path]:
    """Files of the openings to train on and of those held out: the first four words of each sentence, each once."""
    texts = dict.fromkeys(" ".join(row["text"].split()[:4]) for row in sentences(1))
    held = dict(zip(list(texts)[:HELD], [None] * HELD, strict=True))
    files = work / "openings.jsonl", work / "held.jsonl"
    for file, chosen in zip(files, ([text for text in texts if text not in held], held), strict=True):
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in chosen), encoding="utf-8")
    return files


def ppo(args, data: Path) -> tuple[Path, dict]:
    """The PPO run, and what it cost."""
    run = args.work / f"ppo-{args.seed}"
    options = ("--model", args.model, "--data", data, "--reward", "sentiment_ppo:score", "--temperature", TEMPERATURE)
    options += ("--steps", args.rollouts, "--batch", EPISODES, "--max-tokens", TOKENS, "--save-every", 2)
    options += ("--seed", args.seed, "--out", run)
    result, _ = palate("ppo", *options, *BOTH, *PPO, *(("--resume",) if run.exists() else ()))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run, {
        "samples": args.rollouts * EPISODES,
        "training_seconds": sum(line["seconds"] for line in lines),
        "peak_bytes": result["peak_bytes"],
        "health": result["health"],
        "training_reward": [sum(line["reward"] for line in part) / 20 for part in (lines[:20], lines[-20:])],
        "clipped": sum(line["policy/clipped"] for line in lines) / len(lines),
        "explained": lines[-1]["value/explained"],
    }


def dpo(args, data: Path) -> tuple[Path, dict]:
    """The DPO run on pairs of the starting model's own samples, labelled by the judge, and what it cost."""
    run, made, pairs = (args.work / name for name in (f"dpo-{args.seed}", "samples.jsonl", "pairs.jsonl"))
    times = args.work / "sampling.json"
    if not times.exists():
        made.unlink(missing_ok=True)
        asked = f"{data}[:{PAIRS + 20}]"  # a few to spare: equal scores make no pair
        options = ("--model", args.model, "--data", asked, "--max-tokens", TOKENS, "--temperature", TEMPERATURE)
        _, seconds = palate("generate", *options, "--samples", 2, "--seed", args.seed, "--out", made)
        times.write_text(json.dumps(seconds))
    rows = [json.loads(line) for line in made.read_text(encoding="utf-8").splitlines()]
    labelled = []
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        texts = sorted((one["completion"], two["completion"]), key=lambda text: score("", text))
        if texts[0].strip() and texts[1].strip() and score("", texts[0]) < score("", texts[1]):
            labelled.append({"prompt": one["prompt"], "chosen": texts[1], "rejected": texts[0]})
    pairs.write_text("".join(json.dumps(row) + "\n" for row in labelled[:PAIRS]), encoding="utf-8")
    options = ("--model", args.model, "--data", pairs, "--seed", args.seed, "--out", run)
    result, seconds = palate("dpo", *options, *BOTH, *DPO, *(("--resume",) if run.exists() else ()))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    spent = sum(line["seconds"] for line in lines if "seconds" in line)
    return run, {
        "pairs": min(PAIRS, len(labelled)),
        "samples": 2 * (PAIRS + 20),
        "sampling_seconds": json.loads(times.read_text()),
        "training_seconds": spent,
        "process_seconds": seconds,
        "peak_bytes": result["peak_bytes"],
    }


def compared(args, run: Path, held: Path) -> dict:
    """The run against its start on the held-out openings: rewards, their paired rise, KL."""
    from palate.evaluation.statistics import bootstrap_mean

    out = run / "compare"
    if not (out / "comparison.json").exists():
        options = ("--data", held, "--judge", "sentiment_ppo:score", "--max-tokens", TOKENS)
        options += ("--temperature", TEMPERATURE, "--seed", 1000 + args.seed)
        palate("compare", run, args.model, *options, "--out", out)
    found = json.loads((out / "comparison.json").read_text())
    sides = {side: [row[f"score_{side}"] for row in found["examples"]] for side in ("before", "after")}
    rise = [after - before for before, after in zip(sides["before"], sides["after"], strict=True)]
    return {
        "held": found["n"],
        "win_rate": [found["win_rate"], found["low"], found["high"]],
        "kl": found["kl"],
        "length": found["length"],
        "rise": [sum(rise) / len(rise), *bootstrap_mean(rise)],
        **{side: [sum(values) / len(values), *bootstrap_mean(values)] for side, values in sides.items()},
        "example": {key: found["examples"][0][key] for key in ("prompt", "before", "after")},
    }


def show(rows) -> str:
    """The section of the page."""

    def interval(values, spec="+.2f") -> str:
        return f"{values[0]:{spec}} [{values[1]:{spec}}, {values[2]:{spec}}]"

    first = rows[0]
    lines = [
        "## PPO and DPO with SmolLM2-135M-Instruct and a judge of sentiment",
        "",
        "`examples/sentiment_ppo.py`: going on with the first four words of film reviews, 24 tokens, temperature 0.7.",
        f"The judge, naive Bayes on half of sentiment_sentences (right on {first['accuracy']:.1%} of the other half),",
        "is the reward: log-odds of a warm text, with mean 0 and deviation 1 over real sentences. PPO: 30 rollouts of",
        "32 episodes, a value head on the policy's trunk. DPO: 300 pairs of samples of the starting model, the",
        f"better-judged one chosen, once over. Both with LoRA of rank {RANK}, rate 2e-4, bfloat16 matmuls. Nothing was",
        "tuned, and PPO takes 120 steps where DPO takes 19: each is held to its start here, not to the other. Score:",
        f"mean over {first['held']} openings that neither saw (another seed of sampling than in training), with a",
        "bootstrap interval; the rise is paired. KL: sampled, nats a completion, from the start. Seconds: of sampling",
        "and training, without start-up and comparison. Memory: the process's own peak.",
        "",
        "| method | seed | score before | after | rise | win rate | KL | samples drawn | seconds | memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        spent = r["training_seconds"] + r.get("sampling_seconds", 0)
        lines.append(
            f"| {r['data']} | {r['seed']} | {interval(r['before'])} | {interval(r['after'])} | {interval(r['rise'])} | "
            f"{r['win_rate'][0]:.0%} [{r['win_rate'][1]:.0%}, {r['win_rate'][2]:.0%}] | {r['kl']:.1f} | "
            f"{r['samples']:,} | {spent:.0f} | {r['peak_bytes'] / 2**30:.1f} GB |"
        )
    for r in rows:
        if "health" in r:
            said = "; ".join(r["health"]) or "nothing was flagged"
            lines += [
                "",
                f"PPO's health (seed {r['seed']}): {said}; {r['clipped']:.0%} of the tokens clipped, explained "
                f"variance {r['explained']:.2f} at the end, reward in training {r['training_reward'][0]:+.2f} to "
                f"{r['training_reward'][1]:+.2f} (the first and the last five rollouts).",
            ]
    for r in rows:
        one = {key: " ".join(value.split()) for key, value in r["example"].items()}
        said = f"before *{one['before']}*; after *{one['after']}*"
        lines += ["", f"{r['data']}, the first opening, *{one['prompt']}*: {said}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Both runs on one seed, and both comparisons."""
    import real_input

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder, as real_input.py convert writes it")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("PALATE_TEST_DATA"), help="folder of the data")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rollouts", type=int, default=ROLLOUTS, help="fewer, for a pilot")
    parser.add_argument("--only", choices=["ppo", "dpo"], help="one of the two")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="page to write; rows lie beside it")
    args = parser.parse_args()
    os.environ["PALATE_TEST_DATA"] = str(Path(args.data_dir).resolve())
    args.model, args.work, args.quick = args.model.resolve(), args.work.resolve(), args.rollouts < ROLLOUTS
    args.work.mkdir(parents=True, exist_ok=True)
    data, held = openings(args.work)
    keep = real_input.keeper(args, "sentiment")
    for method in (ppo, dpo):
        if args.only in (None, method.__name__):
            began = time.perf_counter()
            run, cost = method(args, data)
            row = {"data": method.__name__, "seed": args.seed, "accuracy": accuracy()} | cost
            keep(row | compared(args, run, held) | {"seconds": time.perf_counter() - began})


if __name__ == "__main__":
    main()
