"""How near does a reward model come to the truth that labelled its pairs? Worlds where the truth is known.

    python examples/reward_truth.py listed --work FOLDER [--seeds 0 1 2]
    python examples/reward_truth.py feeling --work FOLDER [--seeds 0 1 2] [--pairs 2400 19200]
    python examples/reward_truth.py reviews --work FOLDER [--seeds 0 1 2] [--pairs 2400 19200]
    python examples/reward_truth.py lists --work FOLDER [--seeds 0 1 2] [--pairs 19200 76800]

listed: a world of two prompts and 64 completions each, a small model from nothing, and what it is worth over all
pairs there are. reviews: `builtin:tiny` on pairs of the built-in world, as many as asked for, held to the rule on 2,000
fresh pairs of other requests. feeling: the same texts, labelled by what they feel alone, "not" turning it round. lists:
as reviews, but from lists of eight that the rule ranks. Runs that are in the folder already are gone on with, or read.
"""

import argparse
import json
import math
import sys
from itertools import cycle, islice
from pathlib import Path
from random import Random

import numpy as np

LISTED = {"lr": 1e-2, "batch": 64}
LISTED_SHAPE = (4, 3, 2)  # symbols, length, prompts
REVIEWS = {"lr": 1e-3, "batch": 32, "eval-every": 10_000, "save-every": 300}
LIST, LISTS = 8, {"batch": 8}  # replies in a list; a step sees 64 of them, as one of 32 pairs does
COMMON = {"train.schedule": "cosine", "train.tokens": 4096, "device": "cpu", "log-every": 100}
HELD = 2000  # fresh pairs of the requests that are sealed for holding out, behind the 300 that ship
POINT = 0.01


def reward(out: Path, options: dict) -> dict:
    """run.json's result of a finished `palate reward`, and the seconds of its steps."""
    from palate.cli import main as palate

    given = COMMON | options | {"out": out}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    if palate(["reward", *words, "--resume"]) != 0:
        sys.exit(f"{out} did not come to its end")
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    seconds = sum(line.get("seconds", 0) for line in lines)
    return json.loads((out / "run.json").read_text())["result"] | {"seconds": seconds}


def write(path: Path, rows) -> Path:
    """The rows as a JSONL file, unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def listed(seed: int, count: int, work: Path) -> dict:
    """One drawn reward and language of the world; the seed draws both, the pairs and the model."""
    from palate.model.reward import load_reward, rewards
    from palate.worlds.enumerable import World, ordered

    world, place = World(*LISTED_SHAPE), work / f"listed-{count}-{seed}"
    table, truth = world.language(seed), world.reward(seed)
    pairs = world.pairs(table, truth, count, seed)
    data = write(
        place / "pairs.jsonl", ({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs)
    )
    start = place / "start"
    if not start.exists():
        world.write_start(start, spread=0.15)
    passes = 3 if count <= 16_000 else 2
    options = LISTED | {"epochs": passes, "model": f"new:{start}", "data": data, "eval": "none", "seed": seed}
    found = reward(place / "run", options)
    model = load_reward(place / "run").model
    rows = [[*prompt, *ids] for prompt in world.prompt_ids.tolist() for ids in world.completion_ids.tolist()]
    learnt = np.reshape(rewards(model, rows), (world.prompts, world.size)) * model.config.reward_scale
    exact = {name: float(values.mean()) for name, values in ordered(table, truth, learnt).items()}
    return {
        "best": exact["best_accuracy"],
        "lost": exact["best_accuracy"] - exact["accuracy"],
        "floor": exact["floor"],
        "excess": exact["loss"] - exact["floor"],
        "steps": found["steps"],
        "seconds": found["seconds"],
    }


def felt(prompt, completion) -> float:
    """What a review says, good less bad, within [-3, 3]: the rule without grammar, topic and repetition."""
    from palate.worlds.reviews import request_of, verdict

    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return float(verdict(request_of(asked), completion).feeling)


def relabelled(rows, seed: str):
    """The rows' texts, labelled anew after Bradley and Terry by feeling alone."""
    from palate.worlds.reviews import prefers

    random = Random(seed)
    for row in rows:
        prompt = row["prompt"][0]["content"]
        one, two = (felt(prompt, row[side][0]["content"]) for side in ("chosen", "rejected"))
        swap = {} if prefers(one, two, random) else {"chosen": row["rejected"], "rejected": row["chosen"]}
        yield row | swap


def ranked(count: int):
    """Lists of replies by writers of every kind, ranked after Plackett and Luce: any two of a list as the labeller of
    pairs would order them. Source: Yellott 1977, J. Math. Psych. 15, p. 109."""
    from palate.worlds.files import asked, assistant, user
    from palate.worlds.reviews import Writer, verdict

    random = Random("ranked lists")
    for request in islice(cycle(asked("reviews")), count):
        texts: dict[str, float] = {}
        while len(texts) < LIST:
            text = Writer(random.random(), random.choice((0.0, 0.1, 0.25))).review(request, random)
            if text not in texts:
                texts[text] = verdict(request, text).reward - math.log(-math.log(random.random()))
        order = sorted(texts, key=texts.__getitem__, reverse=True)
        yield {"prompt": [user(request.text)], "completions": [[assistant(text)] for text in order]}


def reviews(seed: int, count: int, work: Path, world: str = "reviews") -> dict:
    """The built-in world: the first 2,400 pairs are those that ship; the seed is that of head and order."""
    from palate.worlds import files

    def behind(rows, first: int):
        return (row for number, row in enumerate(rows) if number >= first)

    learnt, fresh = files.pairs("reviews", count), behind(files.pairs("heldout", 300 + HELD), 300)
    if world == "lists":
        learnt = ranked(count)
    if world == "feeling":
        learnt, fresh = relabelled(learnt, "learnt"), relabelled(fresh, "fresh")
    data = write(work / f"{world}-{count}.jsonl", learnt)
    held = write(work / f"{world}-heldout.jsonl", fresh)
    passes = 4 if count <= 2400 else 1
    given = REVIEWS | (LISTS if world == "lists" else {})
    options = given | {
        "epochs": passes,
        "model": "builtin:tiny",
        "data": data,
        "eval": held,
        "truth": "reward_truth:felt" if world == "feeling" else "rule",
        "seed": seed,
    }
    found = reward(work / f"{world}-{count}-{seed}", options)
    after = found["after"]
    row = {name: after[f"eval/truth/{name}"] for name in ("lost", "lost_low", "lost_high", "excess")}
    row |= {"best": after["eval/truth/accuracy"], "floor": after["eval/truth/loss"]}
    row |= {"accuracy": after["eval/rewards/accuracies"], "loss": after["eval/loss"]}
    row |= {"slope": after["eval/calibration_slope"], "curve": after["eval/calibration"]}
    return row | {"steps": found["steps"], "seconds": found["seconds"]}


def show(rows) -> str:
    """The section of the page."""
    lines = [
        "## Reward models beside the truth",
        "",
        "`palate reward` on pairs that a known reward labelled after Bradley and Terry. *Best*: the accuracy of",
        "the truth itself, E max(p, 1 - p), which no model beats in the mean; *lost*: points of accuracy below it;",
        "*floor*: E H(p), nats; *excess*: loss above it. None of them has the labels' noise in it: a pair counts with",
        "the probability of its labels. *Slope* of calibration: 1 is as sure as it may be.",
        "",
        "*listed*: a world of two prompts with 64 completions each; each seed draws another reward, language, data and",
        "model, a Llama of 30,000 parameters from nothing. The numbers are exact, over all pairs there are. 16,000",
        "pairs are seen three times, 48,000 twice.",
        "",
        f"*reviews*: `builtin:tiny` (857,000 parameters) and the world's rule, on {HELD:,} fresh pairs of other",
        "requests, with the 95 % interval over these; the first 2,400 pairs are `builtin:reviews`, seen four times,",
        "the further ones come from the same writers and labeller and are seen once. Batch 32, rate 1e-3, cosine,",
        "after a pilot (seed 100, 1,000 other held-out pairs, 4,800 pairs seen once): at batch 64 rate 2e-4 lost",
        "25.1 points and 3e-3 17.1; at batch 16 1e-3 lost 11.2 and 2e-3 16.8; at batch 8 7e-4 lost 12.3; from",
        "`builtin:base`, at batch 16 and 1e-3, 11.0. Of the rule's parts, feeling alone would lose 8.3 points, all",
        "but grammar 2.9, all but topic 1.8.",
        "In that pilot's pairs the model of 19,200 pairs weighs feeling by 0.52 of its true weight, grammar by 0.02",
        "and topic by 0.04: it has learnt the first of the three alone. How many pairs it takes to come within a",
        "point was not found; lists get nearer.",
        "",
        "*feeling*: the same texts, requests and settings, but labelled by feeling alone: good words less bad ones,",
        "*not* turning them round, from -3 to 3. Best and floor are those of that truth.",
        "",
        "*lists*: as *reviews*, but learnt from lists of eight replies by those writers, which the rule ranks after",
        "Plackett and Luce: any two of a list are ordered as a pair would be. The 28 pairs of a list are learnt at",
        "once, its prompt computed once; batch 8, each list seen once. 19,200 lists hold the texts of 76,800 pairs.",
        "On another draw of such data, in a pilot, 19,200 lists left 3.8 points [3.1, 4.5] and 76,800 lists 2.0",
        "[1.6, 2.5] after 9,600 steps: four times the lists halve what is lost, so a point would take some 300,000.",
        "It is the steps that count: on another draw 4,800 lists seen once left 6.6 points [5.4, 8.0], and seen four",
        "times 3.9 [3.0, 4.9], as four times the lists do. Nothing tried got there sooner: 6.7 at batch 2 and rate",
        "7e-4, 7.2 at rate 2e-3, 6.8 after next-token training on the lists' own texts.",
        "",
        "| world | rows | seed | steps | best | lost, points | floor | excess | held-out accuracy | slope | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r["data"], r["kind"], r["seed"])):
        spread = f" [{100 * r['lost_low']:.1f}, {100 * r['lost_high']:.1f}]" if "lost_low" in r else ""
        found = (f"{r['accuracy']:.1%}", f"{r['slope']:.2f}") if "slope" in r else ("", "")
        lines.append(
            f"| {r['data']} | {r['kind']:,} | {r['seed']} | {r['steps']:,} | {r['best']:.1%} | "
            f"{100 * r['lost']:.2f}{spread} | {r['floor']:.4f} | {r['excess']:.4f} | {found[0]} | {found[1]} | "
            f"{r['seconds']:,.0f} |"
        )
    for name in ("listed", "feeling", "reviews", "lists"):
        if mine := [row for row in rows if row["data"] == name]:
            most, what = max(row["kind"] for row in mine), "lists" if name == "lists" else "pairs"
            near = [row["lost"] < POINT for row in mine if row["kind"] == most]
            told = f"*{name}*, {most:,} {what}: within one point of the best in {sum(near)} of {len(near)} seeds."
            lines += ["", told]
    return "\n".join(lines) + "\n"


def main() -> int:
    """One world on each seed and number of pairs; exit 4 where most of them leave more than a point."""
    import real_input

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=["listed", "feeling", "reviews", "lists"])
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--pairs", nargs="*", type=int, help="numbers of pairs, or of lists, to learn from")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="page to write; rows lie beside it")
    args = parser.parse_args()
    args.quick, wrong = False, 0
    keep = real_input.keeper(args, "reward")
    counts = args.pairs or {"listed": [16_000, 48_000], "lists": [19_200, 76_800]}.get(args.world, [2400, 19_200])
    for count in counts:
        for seed in args.seeds:
            found = (
                listed(seed, count, args.work)
                if args.world == "listed"
                else reviews(seed, count, args.work, args.world)
            )
            keep({"data": args.world, "kind": count, "seed": seed} | found)
            wrong += count == max(counts) and found["lost"] > POINT
    return 4 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
