"""Self-Rewarding on the built-in world: does a model gain by its own judgement, and does its judgement get better?

    python examples/self_rewarding.py --work FOLDER [--seeds 0 1 2] [--out docs/results.md]
    python examples/self_rewarding.py --work FOLDER --model SmolLM2-135M-Instruct --data-dir FOLDER   # a real model

The settings were fixed on seed 100. Runs that are in the folder already are gone on with, or read.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from random import Random

from built_in_world import palate
from self_play import LIGHT, SAMPLING, trained

SEED, PROMPTS = "builtin:seed", "builtin:prompts[:300]"
START = ("--start.epochs", 6, "--start.lr", 1e-3)
ROUNDS = ("--rounds", 2, "--prompts-per-round", 600, "--candidates", 4, "--judgements", 3, "--judge-tokens", 48)
TRAINING = ("--beta", 0.1, "--lr", 2e-4, "--batch", 64, "--epochs", 2)
JUDGES = ("policy", "rule", "random", "untaught")  # the last: the policy, whose seed has no judgements
ANSWERS = "builtin:seed[:400]"
JUDGED = 100  # requests of whose reviews, four each, a judge's agreement with the rule is measured
KEPT = ("round", "pairs", "pair_yield", "tie_share", "unparsed_share", "histogram", "judge_accuracy", "judge_low",
        "judge_high", "judge_exact", "judge_spearman", "seed_accuracy", "win_rate", "win_low", "win_high",
        "win_previous", "score", "start_score", "kl", "length", "start_length", "alarms", "verdict")  # fmt: skip


def main() -> int:
    """The section on its seeds."""
    import real_input

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--judges", nargs="*", choices=JUDGES, default=list(JUDGES))
    parser.add_argument("--model", type=Path, help="folder of a real model that shall go a round instead")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("PALATE_TEST_DATA"), help="its data")
    parser.add_argument("--quick", action="store_true", help="few prompts: that everything runs")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="page to write; rows lie beside it")
    args = parser.parse_args()
    args.work = args.work.resolve()
    keep = real_input.keeper(args, "self_rewarding")
    if args.model:
        real(args, keep)
        return 0
    for seed in args.seeds:
        for name in args.judges:
            loop(args, seed, name, keep)
    plot(of_world(json.loads(args.out.with_suffix(".json").read_text())["self_rewarding"]), args.out.with_name(PLOT))
    return 0


REAL = ("--rounds", 1, "--prompts-per-round", 16, "--candidates", 3, "--judgements", 2, "--judge-tokens", 128,
        "--max-tokens", 96, "--lora-rank", 8, "--max-length", 512, "--batch", 8, "--chunk", 8, "--eval", "none",
        "--start.epochs", 0, "--samples", 0, "--seed", 0)  # fmt: skip


def real(args, keep) -> None:
    """A round of a real model that writes its requests, answers and judges them itself, after real demonstrations."""
    began, run = time.perf_counter(), args.work / "real"
    data = f"{args.data_dir / 'sft_self_instruct_messages.jsonl'}[:40]"
    found = trained("self-reward", run, "--model", args.model, "--data", data, *REAL)
    folder, (row,) = run / "rounds" / "01", found["rounds"]
    requests = [json.loads(line)["prompt"] for line in (folder / "asked.jsonl").read_text().split("\n") if line]
    keep({"data": "real", "seed": 0, "asked": json.loads((folder / "asked.json").read_text()),
          "requests": [turns[-1]["content"] for turns in requests], "ended": found["ended"],
          "rows": {key: row.get(key) for key in (*KEPT, "prompts", "left_out", "sampled_length", "sampled_ended")},
          "seconds": time.perf_counter() - began})  # fmt: skip


def of_world(rows) -> list[dict]:
    """The rows of the built-in world."""
    return [row for row in rows if row["data"] != "real"]


def show_real(r: dict) -> list[str]:
    """What a real model wrote, and what became of its judgements."""
    asked, row = r["asked"], r["rows"]
    left = ", ".join(f"{count} {reason}" for reason, count in asked["left_out"].items() if count)
    without = ", ".join(f"{count} {reason}" for reason, count in row["left_out"].items() if count)
    return [
        "",
        "SmolLM2-135M-Instruct, one round with LoRA of rank 8 after 40 rows of sft_self_instruct_messages, without SFT",
        f"before it: of {2 * asked['wanted']} requests that it wrote, {asked['kept']} were kept, all of them here",
        f"(left out: {left or 'none'}):",
        "",
        *(f"> {text}" + "\\" * (text != r["requests"][-1]) for text in r["requests"]),
        "",
        f"By the additive rubric, asked twice: {row['unparsed_share']:.1%} of its judgements have no score that can be",
        f"read, the others give 0 to 5 points {', '.join(map(str, row['histogram']))} times; {row['pairs']} pairs of "
        f"{row['prompts']} prompts",
        f"(without: {without or 'none'}). {' '.join(row['alarms'])} Nobody compared the result: a check that it",
        f"runs, and of what so small a model writes. {r['seconds']:.0f} s.",
    ]


def loop(args, seed: int, name: str, keep) -> None:
    """M0, a light start; M1, SFT on the seed; M2 and M3, rounds by this judge. A row with all that was measured.

    The start is the same whoever judges: the controls begin from the M1 of the policy's own run, where it is there.
    """
    began, run = time.perf_counter(), args.work / f"{name} {seed}"
    first = args.work / f"start {seed}"
    trained("sft", first, "--model", "builtin:base", *LIGHT, "--seed", seed)
    taught = (run if name == "untaught" else args.work / f"policy {seed}") / "start"
    own = ("--model", taught, "--start.epochs", 0) if name in ("rule", "random") else ("--model", first, *START)
    data, judge = (ANSWERS, "policy") if name == "untaught" else (SEED, name)
    options = ("--data", data, "--judge", judge, *ROUNDS, *TRAINING, *SAMPLING, "--prompts", PROMPTS)
    options = [40 if args.quick and one == 600 else one for one in options]
    found = trained("self-reward", run, *own, *options, "--samples", 0, "--seed", seed)
    seconds = time.perf_counter() - began
    models = {"M0": first, "M1": taught}
    models |= {
        f"M{row['round'] + 1}": run / "rounds" / f"{row['round']:02d}" for row in found["rounds"] if row["pairs"]
    }
    measured = {}
    for label, model in models.items():
        against = {} if label == "M0" else won(args, label, model, first, name, seed)
        measured[label] = against | {"judges": quality(args, label, model, name, seed)}
    rows = [{key: row.get(key) for key in KEPT} for row in found["rounds"]]
    keep({"data": name, "seed": seed, "models": measured, "rounds": rows, "best": found["best"],
          "ended": found["ended"], "ceiling": ceiling(), "seconds": seconds})  # fmt: skip


def own_name(label: str, name: str) -> str:
    """What tells a model from those of the other judges: M0 is that of all, M1 that of all whose seed it is."""
    return "" if label == "M0" or (label == "M1" and name != "untaught") else f" {name}"


def won(args, label: str, model: Path, first: Path, name: str, seed: int) -> dict:
    """A model against M0, by the rule; M1 is the same in all runs of a seed."""
    whose = own_name(label, name)
    out = args.work / f"compare {label}{whose} {seed}"
    if not (out / "comparison.json").exists():
        palate("compare", model, first, "--data", PROMPTS, "--judge", "rule", *SAMPLING, "--seed", seed, "--out", out)
    found = json.loads((out / "comparison.json").read_text())
    return {key: found[key] for key in ("win_rate", "low", "high", "reward", "kl", "length")}


def quality(args, label: str, model: Path, name: str, seed: int) -> dict:
    """How well a model judges reviews that no model wrote, beside the rule."""
    from palate.evaluation.judging import agreement
    from palate.model.load import load
    from palate.sampling.rubric import ModelJudge, default_rubric

    file = args.work / f"judging {label}{own_name(label, name)} {seed}.json"
    if not file.exists():
        cases = reviews()
        judge = ModelJudge(load(str(model)), default_rubric("builtin:base"), judgements=3, max_tokens=48, seed=seed)
        said = judge.judge([prompt for prompt, *_ in cases], [text for _, text, _ in cases])
        found = agreement([one.score for one in said], [v.reward for *_, v in cases], [p for p, *_ in cases])
        points = [one.judgements[0].score for one in said]
        found["same_points"] = sum(a == sum(v.points.values()) for a, (*_, v) in zip(points, cases, strict=True)) / len(
            cases
        )
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def reviews() -> list[tuple]:
    """(prompt, review, verdict) of four reviews to each of the last requests, by writers as those of the seed."""
    from palate.data.records import Message
    from palate.worlds.files import asked
    from palate.worlds.reviews import Writer, verdict

    chance, found = Random("self rewarding"), []
    for request in asked("prompts")[300 : 300 + JUDGED]:
        texts: dict[str, None] = {}
        while len(texts) < 4:
            texts |= {Writer(chance.random(), chance.choice((0.0, 0.1, 0.25, 0.4))).review(request, chance): None}
        found += [((Message("user", request.text),), text, verdict(request, text)) for text in texts]
    return found


def ceiling() -> float:
    """The accuracy of whoever gives every review its true points, which say less than the rule's reward."""
    from palate.evaluation.judging import agreement

    cases = reviews()
    points = [float(sum(v.points.values())) for *_, v in cases]
    found = agreement(points, [v.reward for *_, v in cases], [prompt for prompt, *_ in cases])["pairwise"]
    assert found is not None
    return found


# --- the page --------------------------------------------------------------------------------------------------------

PLOT = "self-rewarding.svg"
COMMAND = "palate self-reward --model START --data builtin:seed --judge JUDGE"


def show(rows) -> str:
    """The section of the page."""
    words = " ".join(map(str, (*ROUNDS, *TRAINING, *SAMPLING)))
    others = [row for row in rows if row["data"] == "real"]
    rows = of_world(rows)
    lines = [
        "## Self-Rewarding on the built-in world",
        "",
        "M0: `builtin:base` after 2 steps of SFT on `builtin:demonstrations[:400]`. M1: SFT on the answers and",
        f"judgements of `{SEED}` (`{' '.join(map(str, START))}`). M2, M3: two rounds of",
        "",
        "```",
        f"{COMMAND} {words} --prompts {PROMPTS}",
        "```",
        "",
        "with new prompts out of `builtin:reviews`. *policy*: the model of the round's start judges, three times, by",
        "points; *rule*: the world's truth judges, the upper bound; *random*: the null control; both begin from the M1",
        f"of the policy's run. *untaught*: the policy, whose M1 saw the answers alone (`{ANSWERS}`).",
        f"Wins: a sample of each of `{PROMPTS}` at temperature 1, by the world's rule, ties half, 95 %",
        "intervals; *before*: against the model that the round began from. *Judges*: how the model",
        f"itself judges four reviews to each of {JUDGED} further requests, by writers of every kind, beside the rule's",
        "reward: pairs ordered alike (one half is chance; whoever gives the true points reaches",
        f"{rows[0]['ceiling']:.1%}), requests with all pairs right, rank correlation. *Own*: the same accuracy of the",
        "round's judge on the samples that it made pairs of. Yield: prompts with a pair. *: the round whose model is",
        "handed back. The settings were fixed on seed 100: M3 won 60.7 % against M1 at beta 0.1, 55.3 % at 0.5; in",
        "both the judge of round 2 could not be read most of the time, which the taught policy does on no seed here.",
        "",
        "| judge | seed | model | wins against M0 | before | rule's mean | length | judges | exact | Spearman | own | "
        "yield | unparsed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda row: (JUDGES.index(row["data"]), row["seed"])):
        by = {row["round"]: row for row in r["rounds"]}
        for number, (label, model) in enumerate(r["models"].items()):
            if label == "M0" and r["data"] != "policy":
                continue
            lines.append(_line(r, label, model, by.get(number - 1)))
    lines += ["", f"![Wins against M0]({PLOT})", ""]
    lines += [sentence([row for row in rows if row["data"] == name], name) for name in JUDGES]
    lines += [line for r in others for line in show_real(r)]
    return "\n".join(lines) + "\n"


def _line(r: dict, label: str, model: dict, row: dict | None) -> str:
    judges = model["judges"]
    mark = " *" if row and row["round"] == r["best"] else ""
    share = f"{model['win_rate']:.1%} [{model['low']:.1%}, {model['high']:.1%}]" if "win_rate" in model else ""
    before = f"{row['win_previous']:.1%}" if row else ""
    means = f"{model['reward']['after']:.2f}" if "reward" in model else ""
    length = f"{model['length']['after']:.1f}" if "length" in model else ""
    accuracy = _share(judges["pairwise"]) + (f" [{judges['low']:.1%}, {judges['high']:.1%}]" if judges["pairs"] else "")
    told = "" if judges["spearman"] is None else f"{judges['spearman']:.2f}"
    own = [_share(row["judge_accuracy"]), _share(row["pair_yield"]), _share(row["unparsed_share"])] if row else [""] * 3
    cells = [
        r["data"],
        str(r["seed"]),
        label + mark,
        share,
        before,
        means,
        length,
        accuracy,
        _share(judges["exact"]),
        told,
    ]
    return f"| {' | '.join([*cells, *own])} |"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def sentence(rows: list[dict], name: str) -> str:
    """What the seeds say of one judge: every round against M1, its own judging, and what was alarming."""
    if not rows:
        return ""
    told = []
    for number in range(1, max(len(row["rounds"]) for row in rows) + 1):
        there = [row["rounds"][number - 1] for row in rows if len(row["rounds"]) >= number]
        there = [row for row in there if row["win_rate"] is not None]
        shares = ", ".join(f"{row['win_rate']:.1%} [{row['win_low']:.1%}, {row['win_high']:.1%}]" for row in there)
        above, below = sum(row["win_low"] > 0.5 for row in there), sum(row["win_high"] < 0.5 for row in there)
        told.append(
            f"M{number + 1} wins {shares} against M1, the interval above one half on {above}, below it on {below}"
        )
    moved = [(row["models"][max(row["models"])]["judges"]["pairwise"] or 0)
             - (row["models"]["M1"]["judges"]["pairwise"] or 0) for row in rows]  # fmt: skip
    alarms = [f"M{one['round'] + 1} of seed {row['seed']}: {alarm}"
              for row in rows for one in row["rounds"] for alarm in one["alarms"]]  # fmt: skip
    return (
        f"- {name} ({len(rows)} seeds): {'; '.join(told)}. The model's own judging moves by "
        f"{', '.join(f'{100 * value:+.1f}' for value in moved)} points from M1 to the last round. "
        + (f"Alarms: {' '.join(alarms)}" if alarms else "No alarm.")
    )


def plot(rows, file: Path) -> None:
    """Wins against M0 by model: the mean of the seeds of every judge, and the seeds."""
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inks = dict(zip(JUDGES, ("#1f6f8b", "#3a7d34", "#8a8a8a", "#b5651d"), strict=True))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "self-rewarding", "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0.5, color="#444444", linewidth=0.8, linestyle=(0, (2, 3)))
        for name in JUDGES:
            mine = [[m.get("win_rate", 0.5) for m in row["models"].values()] for row in rows if row["data"] == name]
            if not mine:
                continue
            for wins in mine:
                axes.plot(range(len(wins)), wins, color=inks[name], linewidth=0.8, alpha=0.5)
            there = [[wins[at] for wins in mine if len(wins) > at] for at in range(max(map(len, mine)))]
            means = [sum(values) / len(values) for values in there]
            axes.plot(range(len(means)), means, "o-", color=inks[name], linewidth=2, label=f"judge: {name}")
        count = max(len(row["models"]) for row in rows)
        axes.set_xticks(range(count), [f"M{at}" for at in range(count)])
        axes.set_title("wins against M0 by the world's rule", loc="left", fontsize=9)
        axes.legend(frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    sys.exit(main())
