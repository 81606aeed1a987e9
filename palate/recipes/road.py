"""The whole road on what comes with the package: text, demonstrations, then DPO beside a reward model and PPO, and two
short rounds each of SPIN and Self-Rewarding, which need no preferences.

Every stage is a verb's own run, its command printed. All ways start from one fine-tuned model; the first two read one
file of pairs, and PPO samples and trains for about as long as DPO trains. In the time that is left both go short runs
of one length: from several seeds, and at several learning rates. What each took and what came of it ends in one table.
"""

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from palate.recipes.verbs import aligned

# of the time; PPO gets what DPO took, short runs at most their share of what is left; without rounds 8 minutes of 15
SHARES = {"pretrain": 0.12, "sft": 0.06, "dpo": 0.08, "reward": 0.06, "spin": 0.16, "self-reward": 0.22, "trials": 0.12}
FEWEST_TEXT = 100  # steps of pre-training, whatever the time: a start without a language is no start for the rest
MOST_REWARD = 76  # steps: two epochs
PPO_RATE = 3e-4  # what `auto` is at this size
SEEDS, TIMES = 3, (0.25, 1, 4)  # of short runs: how many, and multiples of the learning rate on the first
SHORT = {"dpo": (16, 60), "ppo": (2, 30)}  # their fewest and most steps or rollouts
TRIED = 150  # prompts that they are compared on
OPENED = 2  # seconds of a short run that are no steps
SMALL = 32  # texts or demonstrations of a step
TEXT, FINE = 56, 37  # their mean tokens
SELF_RATE = 1e-4  # of rounds on own samples
EPISODES, PASSES = 128, 4  # of a rollout
FEWEST, MOST = 3, 60  # rollouts
AROUND = 10  # seconds of a command that are no steps: loading, evaluation, saving
ROUNDS, COMPARED, LEAST = 2, 300, 64  # rounds, prompts that they are compared on, fewest prompts of a round
CANDIDATES, JUDGED = 4, 1  # samples of a prompt that judges itself, and how often each is judged
BATCH_OF_ROUNDS = 32
STARTED, ASKED = 40, 1.8  # steps that teach it to judge; a judgement's cost, in samples


@dataclass(frozen=True)
class Trial:
    """A short run. rate: its learning rate, so many times that of its way. n: comparisons; the rest: as a way's."""

    run: str
    seed: int
    rate: float
    times: float
    n: int
    win_rate: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Way:
    """What one way from the fine-tuned model to the tuned one took, and what came of it.

    commands: that a user writes. models: in memory at once, in its hungriest stage. samples: drawn from a policy.
    seconds: of its commands, start-up apart. peak_bytes: the most memory of any of them; None where nobody says.
    win_rate, low, high: against the fine-tuned model, by the rule. kl: from it, nats a completion. reward: the rule's
    mean. trials: its short runs, the first seed first; tried: what one is, as "16 steps".
    """

    name: str
    run: str
    commands: list[str]
    models: int
    samples: int
    seconds: float
    peak_bytes: int | None
    win_rate: float
    low: float
    high: float
    verdict: str
    kl: float
    reward: dict[str, float]
    trials: list[Trial] = field(default_factory=list)
    tried: str = ""


@dataclass(frozen=True)
class Stage:
    """A stage that was gone: its command, what its verb returned, its seconds."""

    command: str
    found: dict[str, Any]
    seconds: float


class Walker:
    """Goes the stages one by one and says what came out."""

    def __init__(self, config, told, panel):
        from palate.recipes import compare, ppo, pretrain, reward, self_rewarding, sft, spin
        from palate.recipes.preference import PreferenceConfig
        from palate.recipes.preference import run as prefer

        self.out, self.told, self.panel, self.seed = Path(config.out), told, panel, config.seed
        self.recipes: dict[str, tuple[Callable, type]] = {
            "pretrain": (pretrain.run, pretrain.PretrainConfig),
            "sft": (sft.run, sft.SftConfig),
            "dpo": (prefer, PreferenceConfig),
            "reward": (reward.run, reward.RewardConfig),
            "ppo": (ppo.run, ppo.PpoConfig),
            "spin": (spin.run, spin.SpinConfig),
            "self-reward": (self_rewarding.run, self_rewarding.SelfRewardConfig),
            "compare": (compare.run, compare.CompareConfig),
        }

    def at(self, name: str) -> str:
        """The folder of a stage."""
        return str(self.out / name)

    def train(self, verb: str, name: str, steps: int, every: int = 1, **options) -> Stage:
        """A training verb, evaluated and saved at its end; every: optimizer steps to one of `steps`."""
        options |= {"steps": steps, "eval_every": steps * every, "save_every": steps * every, "seed": self.seed}
        if not sys.stderr.isatty():
            options["log_every"] = -(-steps * every // 3)
        return self.go(verb, options | {"out": self.at(name)}, panel=self.panel)

    def rounds(self, verb: str, **options) -> Stage:
        """A verb that goes in rounds, from the fine-tuned model."""
        options = {"model": self.at("sft"), "rounds": ROUNDS, "epochs": 1, "batch": BATCH_OF_ROUNDS} | options
        options |= {"max_tokens": 96, "samples": 0, "seed": self.seed, "out": self.at(verb)}
        return self.go(verb, options, panel=None)

    def trial(self, verb: str, name: str, steps: int, **options) -> None:
        """A short run of a verb: nothing is held out, no page is made."""
        options |= {"eval": "none", "steps": steps, "save_every": steps, "samples": 0, "report": False}
        self.go(verb, options | {"out": self.at(name)}, panel=None)

    def compare(self, name: str) -> Stage:
        """A tuned model against the fine-tuned one, by the rule."""
        from palate.recipes.demo import comparison

        return self.go("compare", comparison(self.at(name), self.at("sft"), self.seed), operands=("contestants",))

    def go(self, verb: str, options: dict[str, Any], **more) -> Stage:
        """Any verb."""
        recipe, kind = self.recipes[verb]
        began = self.told.spent()
        found = self.told.run(verb, recipe, kind, options, **more)
        return Stage(self.told.commands[-1], found, self.told.spent() - began)


def walk(config, told, argv=(), panel=None) -> dict[str, Any]:
    """All stages, the table and the page; the result has a row for each way."""
    from palate import builtin
    from palate.files import make_folder, write_json
    from palate.recipes.demo import BATCH, BETA, DATA, HELD, RATE, ROAD_FILE, TOKENS, measure
    from palate.recipes.demo import MOST as DPO_STEPS
    from palate.worlds import files

    walker = Walker(config, told, panel)
    make_folder(walker.out)
    write_json(walker.out / ROAD_FILE, {"argv": list(argv), "ways": []})
    pace = measure()
    seconds = {verb: share * told.seconds for verb, share in SHARES.items()}
    told.commands.append(shlex.join(["python", "-m", "palate.worlds.files", walker.at("data")]))
    told.say(f"   $ {told.commands[-1]}")
    files.main(walker.at("data"))
    text = walker.out / "data" / "text.jsonl"
    told.line("text", f"{files.WRITTEN['text']:,} texts of a grammar · {pace.step:.2f} s a step of DPO here")

    start = f"new:{builtin.model_folder('base') / 'config.json'}"
    steps = max(FEWEST_TEXT, pace.texts(seconds["pretrain"], TEXT) // SMALL)
    held = str(text.with_name("text-heldout.jsonl"))
    options = {"model": start, "data": str(text), "eval": held, "batch": SMALL, "lr": 2e-3}
    base = walker.train("pretrain", "base", steps, **options, train={"warmup_steps": min(50, steps // 4)})
    told.line("pretrain", base.found["verdict"])

    steps = max(8, min(262, pace.texts(seconds["sft"], FINE) // SMALL))
    options = {"model": walker.at("base"), "data": "builtin:demonstrations[:2800]", "batch": SMALL, "lr": 5e-4}
    options |= {"eval": "builtin:demonstrations[2800:]", "train": {"schedule": "cosine", "tokens": TOKENS}}
    told.line("sft", walker.train("sft", "sft", steps, **options).found["verdict"])

    pairs = {"model": walker.at("sft"), "data": DATA, "eval": HELD, "batch": BATCH}
    steps = max(8, min(DPO_STEPS, int(seconds["dpo"] / pace.step)))
    preferring = pairs | {"beta": BETA, "lr": RATE, "train": {"tokens": TOKENS}}
    dpo = walker.train("dpo", "dpo", steps, **preferring)
    told.line("dpo", dpo.found["verdict"])

    steps = max(8, min(MOST_REWARD, int(seconds["reward"] / pace.step)))
    reward = walker.train("reward", "reward", steps, **pairs, train={"tokens": TOKENS})
    told.line("reward", reward.found["verdict"])
    rollouts = max(FEWEST, min(MOST, int((dpo.seconds - AROUND) / pace.rollout(EPISODES, PASSES))))
    rewarded = {"model": walker.at("sft"), "data": DATA, "eval": "builtin:prompts[300:400]"}
    rewarded |= {"reward": walker.at("reward"), "batch": EPISODES, "passes": PASSES, "max_tokens": 96}
    rewarded |= {"kl_coef": 0.2, "lr": PPO_RATE, "train": {"tokens": TOKENS}}
    ppo = walker.train("ppo", "ppo", rollouts, PASSES, **rewarded)
    told.line("ppo", ppo.found["verdict"])

    count = min(2800, asked_of(pace, seconds["spin"], 1, 0))
    spin = walker.rounds("spin", data=f"builtin:demonstrations[:{count}]", temperature=1.0, lr=SELF_RATE)
    told.line("spin", spin.found["verdict"])
    count = min(2000, asked_of(pace, seconds["self-reward"], CANDIDATES, JUDGED))
    options = {"data": "builtin:seed", "candidates": CANDIDATES, "judgements": JUDGED, "prompts_per_round": count}
    options |= {"judge_template": "reviews"}
    judged = walker.rounds("self-reward", **options, lr=SELF_RATE, beta=BETA, start={"steps": STARTED})
    told.line("self", judged.found["verdict"])

    left = told.left() - 4 * (AROUND / 2 + 2 * COMPARED * pace.sampled) - AROUND  # comparisons and the page
    tried = trials(walker, pace, min(left, seconds["trials"]), {"dpo": preferring, "ppo": rewarded})
    sampled, drawn = rollouts * EPISODES + 256, CANDIDATES * (1 + JUDGED)
    ways = [
        way("DPO", "dpo", [dpo], walker, models=1, samples=0, **tried.get("dpo", {})),
        way("reward model + PPO", "ppo", [reward, ppo], walker, models=4, samples=sampled, **tried.get("ppo", {})),
        way("SPIN", "spin", [spin], walker, models=1, samples=prompts_of(spin)),
        way("self-rewarding", "self-reward", [judged], walker, models=1, samples=drawn * prompts_of(judged)),
    ]
    return finish(config, told, walker, ways, argv)


def trials(walker: Walker, pace, seconds: float, ways: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Short runs of DPO and PPO from SEEDS seeds, and of the first at TIMES their rates, all compared: fields of `Way`.

    ways: by verb, the options of the whole runs. They have half the batch and take about one time. None where there is
    too little of it.
    """
    from palate.recipes.demo import BATCH, DATA, comparison

    grid = [(walker.seed + i, 1) for i in range(SEEDS)] + [(walker.seed, times) for times in TIMES if times != 1]
    sizes, runs = {"dpo": BATCH // 2, "ppo": EPISODES // 2}, len(ways) * len(grid)
    costs = {"dpo": pace.step / 2, "ppo": pace.rollout(sizes["ppo"], PASSES)}
    around = AROUND / 2 + OPENED * runs + (runs + 1) * TRIED * pace.sampled
    least = max(SHORT[verb][0] * cost for verb, cost in costs.items())
    if (each := (seconds - around) / runs) < least:
        more = (around + runs * least - seconds) / SHARES["trials"]
        minutes = math.ceil((walker.told.seconds + more) / 60)
        walker.told.line("trials", f"no other seed or learning rate is tried: that takes --minutes {minutes}")
        return {}
    steps, made = {verb: min(SHORT[verb][1], int(each / cost)) for verb, cost in costs.items()}, {}
    for verb, options in ways.items():
        options = options | {"data": f"{DATA}[:{steps[verb] * sizes[verb]}]", "batch": sizes[verb]}
        for seed, times in grid:
            one = {"seed": seed, "lr": options["lr"] * times}
            made[verb, seed, times] = name = f"short/{verb},seed={seed},lr={one['lr']:g}"
            walker.trial(verb, name, steps[verb], **options | one)
    start = walker.at("sft")
    options = comparison(walker.at("short"), start, walker.seed) | {"data": f"builtin:prompts[:{TRIED}]"}
    options |= {"contestants": [*map(walker.at, made.values()), start]}
    found = walker.go("compare", options, operands=("contestants",)).found["matches"]
    matches = {match["a"]: match for match in found if match["b"] == start}
    rows: dict[str, list[Trial]] = {verb: [] for verb in ways}
    for (verb, seed, times), name in made.items():
        result = {key: matches[walker.at(name)][key] for key in ("n", "win_rate", "low", "high", "verdict")}
        rows[verb].append(Trial(name, seed, ways[verb]["lr"] * times, times, **result))
    words = {"dpo": f"{steps['dpo']} steps", "ppo": f"{steps['ppo']} rollouts"}
    better = [f"{verb} {sum(one.verdict == 'better' for one in rows[verb])} of {len(grid)}" for verb in ways]
    walker.told.line("trials", f"short runs shown better than the start on {TRIED} prompts: {', '.join(better)}")
    return {verb: {"trials": rows[verb], "tried": words[verb]} for verb in ways}


def asked_of(pace, seconds: float, each: int, judged: int) -> int:
    """Prompts of a round such that all rounds fit: samples, judgements, training and comparison."""
    around = ROUNDS * 2 * AROUND + (ROUNDS + 1) * COMPARED * (pace.sampled + pace.scored)
    around += judged * STARTED * pace.step / 2
    of_one = each * (1 + judged * ASKED) * pace.sampled + 2 * pace.scored + 1.5 * pace.step / 64
    return max(LEAST, int((seconds - around) / (ROUNDS * of_one)))


def prompts_of(stage: Stage) -> int:
    """Prompts that were sampled in all rounds."""
    return sum(row["prompts"] for row in stage.found["rounds"])


def way(name: str, run: str, stages: Sequence[Stage], walker: Walker, **facts) -> Way:
    """The row of a way, once its model is compared."""
    from palate.recipes.demo import match_line

    match = walker.compare(run).found
    walker.told.line("compare", match_line(match))
    peaks: list[Any] = [stage.found.get("peak_bytes") for stage in stages]
    return Way(
        name=name,
        run=run,
        commands=[stage.command for stage in stages],
        seconds=round(sum(stage.seconds for stage in stages), 1),
        peak_bytes=None if None in peaks else max(peaks),
        **{key: match[key] for key in ("win_rate", "low", "high", "verdict", "kl", "reward")},
        **facts,
    )


def finish(config, told, walker: Walker, ways: Sequence[Way], argv) -> dict[str, Any]:
    """The table in a file, on the screen and on the page, and the result object of --json."""
    from palate.files import write_json
    from palate.recipes import report
    from palate.recipes.demo import ROAD_FILE

    record = {"seconds": round(told.spent(), 1), "seed": config.seed, "commands": told.commands}
    write_json(walker.out / ROAD_FILE, record | {"argv": list(argv), "ways": [asdict(one) for one in ways]})
    options = {"runs": [config.out]}
    page = told.run("report", report.run, report.ReportConfig, options, operands=("runs",))["out"]
    told.line("saved", f"{walker.at('dpo')}/model · {walker.at('ppo')}/model · {page}")
    first = ways[0]
    word = "better" if first.low > 0.5 else "not shown to be better"
    share = f"{first.win_rate:.1%} [{first.low:.1%}, {first.high:.1%}]"
    last = f"{word}: DPO's model wins {share} of 300 held-out prompts against the fine-tuned one"
    found = {"out": config.out, "report": page, "better": first.low > 0.5, "exit_code": 0 if first.low > 0.5 else 4}
    return record | found | {"ways": [asdict(one) for one in ways], "summary": [*table(ways), "", last]}


def table(ways: Sequence[Way]) -> list[str]:
    """The claims as lines of the screen, a column a way."""
    from palate.report.road import claims

    columns = [claims(asdict(one)) for one in ways]
    rows = [[what, *(column[i][1] for column in columns)] for i, (what, _) in enumerate(columns[0])]
    return aligned([["", *(one.name for one in ways)], *rows], right=range(1, len(ways) + 1))
