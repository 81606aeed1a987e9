"""Rounds without human preferences on the built-in world: does SPIN gain, and more than going on with SFT?

    python examples/self_play.py spin --work FOLDER [--seeds 0 1 2] [--out docs/results.md]
    python examples/self_play.py kills --work FOLDER [--verb self-reward]   # twenty times SIGKILL in a run
    python examples/self_play.py real --work FOLDER --model SmolLM2-135M-Instruct --data-dir FOLDER

The settings were fixed on seed 100. Runs that are in the folder already are gone on with, or read.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

from built_in_world import palate

LIGHT = ("--data", "builtin:demonstrations[:400]", "--eval", "none", "--steps", 2, "--batch", 32, "--lr", 2e-4)
# the other start has learnt the very demonstrations of the rounds, several times over, as in the paper's runs
FINE = ("--data", "builtin:demonstrations[400:1200]", "--eval", "none", "--steps", 65, "--batch", 64, "--lr", 2e-4)
DATA, ROUNDS, BATCH = "builtin:demonstrations[400:1200]", 4, 64
PROMPTS = "builtin:prompts[:300]"
SAMPLING = ("--max-tokens", 96, "--temperature", 1.0)
WAYS = {  # name -> lambda by round, rate
    "SPIN, lambda 1": ("1", 2e-4),
    "SPIN, lambda 0.1": ("0.1", 2e-4),
    "SPIN, lambda 0.1, a quarter of the rate": ("0.1", 5e-5),
    "SPIN, lambda 0.1, 0.1, 0.1, 5, a quarter of the rate": ("0.1,0.1,0.1,5", 5e-5),
}
SFT_RATE = 2e-4


def spin(args, keep) -> None:
    """Per seed: a light start, SPIN at each lambda, SFT on the same data for as many steps, and the data themselves."""
    spent = SPENT if args.spent else ""
    for seed in args.seeds:
        start = args.work / f"start {seed}"
        trained("sft", start, "--model", "builtin:base", *(FINE if args.spent else LIGHT), "--seed", seed)
        steps = 0
        for name in args.only:
            lam, rate = WAYS[name]
            began, run = time.perf_counter(), args.work / f"{name} {seed}"
            options = ("--data", DATA, "--lam", lam, "--lr", rate, "--epochs", 1, "--rounds", args.rounds, *SAMPLING)
            options += ("--batch", BATCH, "--prompts", PROMPTS, "--samples", 0, "--seed", seed)
            found = trained("spin", run, "--model", start, *options)
            steps = max(steps, sum(taken(run / "rounds" / f"{row['round']:02d}") for row in found["rounds"]))
            rows = [{key: row[key] for key in KEPT} for row in found["rounds"]]
            keep({"data": name + spent, "seed": seed, "rounds": rows, "best": found["best"], "ended": found["ended"],
                  "seconds": time.perf_counter() - began})  # fmt: skip
        began, run = time.perf_counter(), args.work / f"sft {seed} {steps}"
        options = ("--data", DATA, "--eval", "none", "--lr", SFT_RATE, "--batch", BATCH, "--steps", steps)
        trained("sft", run, "--model", start, *options, "--samples", 0, "--seed", seed)
        keep({"data": "SFT goes on" + spent, "seed": seed, "steps": steps} | compared(args, run, start, seed)
             | {"seconds": time.perf_counter() - began})  # fmt: skip
        began = time.perf_counter()
        row = compared(args, written(args.work, seed), start, seed)
        keep({"data": "the data" + spent, "seed": seed} | row | {"seconds": time.perf_counter() - began})


KEPT = ("round", "win_rate", "win_low", "win_high", "win_previous", "score", "start_score", "kl", "length", "pairs",
        "beta", "accuracy", "chosen_logp", "format_accuracy", "format_low", "format_high", "verdict")  # fmt: skip


def trained(verb: str, out: Path, *options: object) -> dict:
    """The result of a run, which is gone on with where it is there."""
    return palate(verb, *options, "--log-every", 1000, "--out", out, *(("--resume",) if out.exists() else ()))


def taken(run: Path) -> int:
    """Optimizer steps of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max((line["step"] for line in lines), default=0)


def compared(args, one: Path, start: Path, seed: int) -> dict:
    """A model or a file of completions against the start, by the rule."""
    out = args.work / f"compare {one.name}"
    if not (out / "comparison.json").exists():
        palate("compare", one, start, "--data", PROMPTS, "--judge", "rule", *SAMPLING, "--seed", seed, "--out", out)
    found = json.loads((out / "comparison.json").read_text())
    return {key: found[key] for key in ("win_rate", "low", "high", "reward", "kl", "length")}


def written(work: Path, seed: int) -> Path:
    """What the writers of the demonstrations say to the held-out prompts: the law that SPIN has as its goal."""
    from palate.data.sources import read_prompts
    from palate.worlds.reviews import Writer, request_of

    chance, path = random.Random(f"self play {seed}"), work / f"data {seed}.jsonl"
    rows = [
        {"prompt": [{"role": m.role, "content": m.content} for m in record.prompt],
         "completion": Writer(chance.random()).review(request_of(record.prompt), chance)}
        for record in read_prompts(PROMPTS)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def real(args, keep) -> None:
    """Two rounds with adapters on a real model and real demonstrations, judged by the implicit reward of a DPO run, and
    the likelihood of demonstrations that no round has seen."""
    began, lora = time.perf_counter(), ("--model", args.model, "--lora-rank", 8, "--max-length", 256, "--batch", 8)
    count = 16 if args.quick else 64
    judge, run = args.work / "real judge", args.work / "real"
    pairs = ("--data", f"{args.data_dir / 'mixed_dpo_en_conversational.jsonl'}[:{count}]", "--eval", "none")
    trained("dpo", judge, *lora, *pairs, "--samples", 0, "--retain-samples", 0, "--seed", 0)
    file = args.data_dir / "sft_self_instruct_messages.jsonl"
    fresh = f"{file}[{count}:{count + count // 2}]"
    data = ("--data", f"{file}[:{count}]", "--prompts", fresh, "--max-tokens", 128)
    options = ("--rounds", 2, "--epochs", 1, "--eval-judge", f"implicit:{judge}", "--samples", 0, "--seed", 0)
    found = trained("spin", run, *lora, *data, *options)
    rows = [{key: row[key] for key in (*KEPT, "left_out")} for row in found["rounds"]]
    for row in rows:
        row["fresh_logp"] = logp_per_token(run / "rounds" / f"{row['round']:02d}", fresh, args.work)
    keep({"data": "real", "seed": 0, "rounds": rows, "best": found["best"], "ended": found["ended"],
          "demonstrations": count, "fresh": count // 2, "start_logp": logp_per_token(args.model, fresh, args.work),
          "seconds": time.perf_counter() - began})  # fmt: skip


def logp_per_token(model: Path, data: str, work: Path) -> float:
    """Mean log-prob of a token of these demonstrations, nats."""
    out = work / f"scores {model.name}.jsonl"
    out.unlink(missing_ok=True)
    palate("score", "--model", model, "--data", data, "--max-length", 256, "--out", out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return sum(sum(line["logps"]) for line in lines) / sum(sum(line["tokens"]) for line in lines)


COMPARED = ("--prompts", "builtin:prompts[:64]", "--rounds", 2, "--epochs", 1, "--batch", 16)
KILLED = {  # verb -> what it does while it is killed
    "spin": ("--data", "builtin:demonstrations[:240]", *COMPARED, "--chunk", 16),
    "self-reward": ("--data", "builtin:seed[300:460]", *COMPARED, "--chunk", 8, "--prompts-per-round", 48,
                    "--candidates", 3, "--judgements", 2, "--judge-tokens", 40, "--start.steps", 6),
    "online-dpo": ("--data", "builtin:reviews[:64]", "--eval", "builtin:prompts[:32]", "--judge", "rule", "--steps", 8,
                   "--batch", 8, "--chunk", 2, "--eval-every", 2),
}  # fmt: skip


def kills(args, keep) -> None:
    """A verb's run, SIGKILLed twenty times at random moments and resumed, against the run that is left alone."""
    chance = random.Random(args.kill_seed)
    args.work.mkdir(parents=True, exist_ok=True)
    code = "from palate.cli import entry; entry()"
    options = ("--model", "builtin:tiny", *KILLED[args.verb], "--max-tokens", 64, "--lr", 2e-5, "--save-every", 1)
    command = [sys.executable, "-c", code, args.verb, *map(str, options)]

    def begin(out: Path):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PALATE_CACHE": str(args.work / f"cache-{out.name}")}
        log = (args.work / f"{out.name}.log").open("a")
        resume = ["--resume"] if (out / "run.json").exists() else []
        return subprocess.Popen([*command, "--out", str(out), *resume], env=environment, stdout=log, stderr=log)

    alone, killed, began = args.work / "alone", args.work / "killed", time.perf_counter()
    if begin(alone).wait() != 0:
        raise SystemExit((args.work / "alone.log").read_text())
    span, whole, where = time.perf_counter() - began, progress(alone), []
    while len(where) < 20:
        process, until = begin(killed), whole * (len(where) + chance.random()) / 21
        while progress(killed) < until and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, span / 60))
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"it ended by itself after {where}\n" + (args.work / "killed.log").read_text())
        where.append(moment(killed))
    if begin(killed).wait() != 0:
        raise SystemExit((args.work / "killed.log").read_text())
    same = {name: data == made(killed).get(name) for name, data in made(alone).items()}
    rounds = len(json.loads((alone / "rounds.json").read_text())["rounds"])
    keep({"data": "kills", "kind": args.verb, "seed": args.kill_seed, "rounds": rounds, "kills": len(where),
          "where": where, "files": len(same), "same": all(same.values()) and len(same) == len(made(killed)),
          "alone": span, "seconds": time.perf_counter() - began})  # fmt: skip


def progress(out: Path) -> int:
    """Chunks of the rounds, and lines of what is logged."""
    logged = (path for where in (".", "start", "rounds/*") for path in out.glob(f"{where}/metrics.jsonl"))
    logs = sum(path.read_bytes().count(b"\n") for path in logged)  # `rglob` raises where a checkpoint goes meanwhile
    return logs + len(list(out.glob("rounds/*/*.json*"))) + len(list(out.glob("rounds/*/*/[0-9]*.jsonl")))


def made(out: Path) -> dict[str, bytes]:
    """All files that the manifests name, the manifests, the table and the model."""
    paths = [out / "rounds.json", *sorted(out.glob("model/*")), *sorted(out.glob("start/model/*"))]
    for manifest in sorted(out.glob("rounds/*/manifest.json")):
        paths += [manifest, *(manifest.parent / name for name in json.loads(manifest.read_text())["files"])]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def moment(out: Path) -> str:
    """How far a killed run was."""
    if not (folders := sorted(out.glob("rounds/*"))):
        return "the start" if (out / "start").exists() else "before round 1"
    last = folders[-1]
    done = "training" if (out / "metrics.jsonl").exists() else "done"  # online, the step comes after the round's files
    for name, what in (("manifest.json", done), ("after", "comparing"), ("model", "trained"),
                       ("metrics.jsonl", "training"), ("pairs.json", "scoring"), ("judged", "judging"),
                       ("samples", "sampling")):  # fmt: skip
        if (last / name).exists():
            return f"round {int(last.name)}, {what}"
    return f"round {int(last.name)}, beginning"


SPENT = ", from a spent start"


def show(rows) -> str:
    """The section of the page."""
    lines = [
        "## Rounds without human preferences: SPIN on the built-in world",
        "",
        "The start: `builtin:base` after 2 steps of SFT on `builtin:demonstrations[:400]`. `palate spin` on",
        f"`{DATA}`, one pass over the pairs a round, batches of {BATCH}, rate 2e-4, {ROUNDS} rounds; *SFT",
        f"goes on*: the same demonstrations, as many steps of {BATCH} as the rounds took together, the same rate; *the",
        "data*: new texts by the writers of the demonstrations, the law that SPIN has as its goal. *A spent start* has",
        "had 65 steps of SFT (5 passes) on the very demonstrations of the rounds, as in the paper's runs. Wins: one",
        f"sample of each of `{PROMPTS}` at temperature 1 against the start's, by the world's rule, ties half,",
        "95 % interval of the best round, whose model is handed back (*). Format: how well format alone tells",
        "demonstrations from samples, by round; one half is chance. Lambda and rates were not chosen on these seeds.",
        "Rounds and SFT were compared on other draws of the start: a mean of 300 has a standard error of 0.15.",
        "",
        "That SFT goes at least as far is not a matter of the rate. On seed 100 it came to -1.10 at 2e-4, to -1.06 at",
        "5e-4, to -1.17 at 1e-3; the best round of SPIN to -1.38 at 5e-4 with lambda 1 or 1/2, to -1.40 at 2e-4 with",
        "lambda 0.3, and at 1e-3 round 1 was shown worse with lambda 1 and 2. At the start of a round the gradient of",
        "SPIN is in the mean lambda / 2 times that of SFT: a model's own samples pull it nowhere, they add noise. From",
        "the spent start two passes at 2e-4 with lambda 0.1 end with 47 % of held-out pairs ordered well: what tells",
        "demonstrations from samples there is learnt by heart. Alone on two cores four rounds take 130 s (seed 100).",
        "",
        "![the rule's mean by round](spin-reviews.svg)",
        "",
        "| what | seed | rule's mean, start → rounds | wins against the start, % | KL, nats | format, % | seconds |",
        "|---|---|---|---|---|---|---|",
        *(line(row) for row in sorted(of_world(rows), key=place)),
        "",
        *(sentence(rows, name) for name in named(rows)),
    ]
    lines += [line for row in rows if row["data"] == "real" for line in show_real(row)]
    for r in [row for row in rows if row["data"] == "kills"]:
        word = "the same bytes" if r["same"] else "DIFFERENT BYTES"
        met = [(name, len(list(same))) for name, same in groupby(r["where"])]
        where = "; ".join(name + (f" {count}x" if count > 1 else "") for name, count in met)
        lines += ["", f"{r['kills']} times SIGKILL in a run of `palate {r['kind']}`, {r['rounds']} rounds, that takes "
                  f"{r['alone']:.0f} s when left alone (load {r['load']}): {where}. In the end {word} in all of "
                  f"{r['files']} files."]  # fmt: skip
    return "\n".join(lines) + "\n"


def of_world(rows) -> list[dict]:
    """The rows of the built-in world."""
    return [row for row in rows if row["data"] not in ("kills", "real")]


def named(rows) -> list[str]:
    """The ways that rounds were gone in, those from the first start first."""
    return [name + end for end in ("", SPENT) for name in WAYS if any(row["data"] == name + end for row in rows)]


def place(row) -> tuple:
    """Where a row stands in the table."""
    names = [*WAYS, "SFT goes on", "the data"]
    return row["data"].endswith(SPENT), names.index(row["data"].removesuffix(SPENT)), row["seed"]


def line(row) -> str:
    """A way on one seed."""
    if "rounds" not in row:
        share = f"{row['win_rate']:.1%} [{row['low']:.1%}, {row['high']:.1%}]".replace("%", "")
        kl = "" if row["kl"] is None else f"{row['kl']:.2f}"
        mean = f"{row['reward']['before']:.2f} → {row['reward']['after']:.2f}"
        return f"| {row['data']} | {row['seed']} | {mean} | {share} | {kl} | | {row['seconds']:.0f} |"
    found, best = row["rounds"], row["best"]
    star = ["*" if one["round"] == best else "" for one in found]
    means = ", ".join(f"{one['score']:.2f}{mark}" for one, mark in zip(found, star, strict=True))
    spread = [f" [{one['win_low']:.1%}, {one['win_high']:.1%}]" if one["round"] == best else "" for one in found]
    wins = ", ".join(f"{one['win_rate']:.1%}{more}" for one, more in zip(found, spread, strict=True)).replace("%", "")
    kl = ", ".join(f"{one['kl']:.2f}" for one in found)
    told = ", ".join(f"{one['format_accuracy']:.0%}" for one in found).replace("%", "")
    mean = f"{found[0]['start_score']:.2f} → {means}"
    return f"| {row['data']} | {row['seed']} | {mean} | {wins} | {kl} | {told} | {row['seconds']:.0f} |"


def draw(rows, path: Path) -> None:
    """The rule's mean by round: the mean of the seeds of every way, and where SFT and the data stand."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = of_world(rows)
    starts = [end for end in ("", SPENT) if any(row["data"].endswith(SPENT) == bool(end) for row in rows)]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "spin", "font.size": 10}):
        figure = Figure(figsize=(5.4 * len(starts), 4.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, len(starts), squeeze=False)[0]
        for where, end in zip(axes, starts, strict=True):
            for name in [name for name in named(rows) if name.endswith(SPENT) == bool(end)]:
                mine = [row["rounds"] for row in rows if row["data"] == name]
                curves = [[found[0]["start_score"], *(one["score"] for one in found)] for found in mine]
                (drawn,) = where.plot(*mean_curve(curves), marker="o", label=name.removesuffix(SPENT))
                for curve in curves:
                    where.plot(range(len(curve)), curve, color=drawn.get_color(), alpha=0.25, linewidth=1)
            for name, style in (("SFT goes on", "--"), ("the data", ":")):
                ends = [row["reward"]["after"] for row in rows if row["data"] == name + end]
                if ends:
                    where.axhline(sum(ends) / len(ends), color="black", linestyle=style, linewidth=1, label=name)
            where.xaxis.set_major_locator(MaxNLocator(integer=True))
            where.set(xlabel="round", ylabel="mean of the rule", title=end.removeprefix(", ") or "from a light start")
            where.grid(axis="y", alpha=0.3)
            where.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def mean_curve(curves) -> tuple[list[int], list[float]]:
    """Rounds and the mean of the curves that have come so far."""
    rounds = list(range(max(map(len, curves))))
    there = [[curve[n] for curve in curves if len(curve) > n] for n in rounds]
    return rounds, [sum(values) / len(values) for values in there]


def show_real(found) -> list[str]:
    """A real model: that it runs, and what was measured."""
    lines = [
        "",
        f"SmolLM2-135M-Instruct, LoRA of rank 8, {found['demonstrations']} demonstrations of",
        "sft_self_instruct_messages, one pass a round, lambda 1, samples of at most 128 tokens; judged by the implicit",
        "reward of a DPO run on as many pairs of mixed_dpo_en_conversational. A check that it runs: so few rows show",
        "nothing of what SPIN is worth. *cut*: samples that did not end, which make no pair. *Held-out*: the mean",
        f"log-prob of a token, nats, of the {found['fresh']} demonstrations whose prompts the rounds are compared on.",
        "",
        "| round | pairs | cut | wins against the start | held-out | KL | length | format |",
        "|---|---|---|---|---|---|---|---|",
        f"| start | | | | {found['start_logp']:.4f} | | | |",
    ]
    for row in found["rounds"]:
        share = f"{row['win_rate']:.1%} [{row['win_low']:.1%}, {row['win_high']:.1%}]"
        told = "" if row["format_accuracy"] is None else f"{row['format_accuracy']:.1%}"
        lines.append(
            f"| {row['round']} | {row['pairs']} | {row['left_out']['unfinished']} | {share} | "
            f"{row['fresh_logp']:.4f} | {row['kl']:.2f} | {row['length']:.1f} | {told} |"
        )
    return lines


def sentence(rows, name: str) -> str:
    """What the seeds say of one way: gains by round, and its best round against SFT and the data."""
    by, end = {(row["data"], row["seed"]): row for row in rows}, SPENT if name.endswith(SPENT) else ""
    seeds = sorted(seed for data, seed in by if data == name)
    mine = [by[name, seed]["rounds"] for seed in seeds]
    gains = []
    for number in range(max(map(len, mine))):
        there = [found for found in mine if len(found) > number]
        rises = [f[number]["score"] - (f[number - 1]["score"] if number else f[0]["start_score"]) for f in there]
        gains.append(f"{sum(rises) / len(rises):+.2f}{'' if len(there) == len(mine) else f' ({len(there)} seeds)'}")
    best = [max(row["score"] for row in found) for found in mine]
    shown = sum(any(row["win_low"] > 0.5 for row in found) for found in mine)
    told = f"{name}: the rule's mean moves by {', '.join(gains)} a round; shown better than the start on {shown} of"
    told += f" {len(seeds)} seeds"
    for other in ("SFT goes on", "the data"):
        theirs = [by[other + end, seed]["reward"]["after"] for seed in seeds if (other + end, seed) in by]
        above = sum(a > b for a, b in zip(best, theirs, strict=False))
        if theirs:
            told += f"; its best round is above {other} on {above} of {len(theirs)}"
    return f"- {told}."


def main() -> int:
    """A section on its seeds."""
    import real_input

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["spin", "real", "kills"])
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS), help="some of the ways")
    parser.add_argument("--spent", action="store_true", help="begin where SFT on the same data has done what it can")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--model", type=Path, help="model folder of real")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("PALATE_TEST_DATA"), help="data of real")
    parser.add_argument("--quick", action="store_true", help="few rows of real")
    parser.add_argument("--verb", choices=KILLED, default="spin", help="of kills")
    parser.add_argument("--kill-seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="page to write; rows lie beside it")
    args = parser.parse_args()
    args.work = args.work.resolve()
    {"spin": spin, "real": real, "kills": kills}[args.section](args, real_input.keeper(args, "spin"))
    rows = json.loads(args.out.with_suffix(".json").read_text())["spin"]
    if of_world(rows):
        draw(rows, args.out.with_name("spin-reviews.svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
