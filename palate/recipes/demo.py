"""The main job on what comes with the package: data, plan, training, comparison and report, in a few minutes.

No special path: every stage is a verb's own run, and the command that does the same is printed beside it. The clock
decides how many steps are taken; the rule of the built-in world, the truth there, says whether the model got better.
"""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from palate.errors import UsageError
from palate.recipes.verbs import Say, stderr

MODEL, DATA, HELD = "builtin:tiny", "builtin:reviews", "builtin:reviews/heldout"
PROMPTS = "builtin:prompts[:300]"  # no setting of this page was chosen on them, unlike on the held-out pairs
# Where the text stays whole: on builtin:prompts[300:], seed 101, 110 steps at 5e-4 falling to zero win 76 %, these 69,
# but then 22 % of the reviews have a broken sentence, here 8 %, at the start 7 %.
BETA, RATE, BATCH, TOKENS = 0.5, 2e-4, 64, 4096
FEWEST, MOST = 12, 60  # steps: fewer teach too little, more are not needed
TEMPERATURE = 0.7  # of the comparison, as `palate chat` has it
LONGEST = 96  # tokens of a completion; the longest reviews of this world have some 80
TRIED = 96  # pairs of the trial that the plan is made from
# all that a demo leaves in its folder, finished or not
MADE = {".lock", "run.json", "config.yaml", "data.json", "metrics.jsonl", "samples.jsonl", "retention.json"}
MADE |= {"reference.safetensors", "scoring", "checkpoints", "model", "compare", "report.html"}
ROAD_FILE = "road.json"
# what --full leaves besides
ROAD = {"data", "base", "sft", "dpo", "reward", "ppo", "short", "spin", "self-reward", ROAD_FILE}


class DemoConfig(BaseModel):
    """Options of `palate demo`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    full: Annotated[
        bool, Field(description="From text to tuned models: DPO, reward model + PPO, SPIN, self-rewarding")
    ] = False
    minutes: Annotated[
        float | None, Field(gt=0, le=600, description="Minutes it may take, which decide the steps; 2.5, of --full 15")
    ] = None
    out: Annotated[str, Field(description="Run folder; one that a demo made before is replaced")] = "runs/demo"
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Of the order of pairs and of what is sampled")] = 0


def run(config: DemoConfig, *, verb: str = "demo", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """Trains, compares and reports; the result has the match's numbers, the paths and the commands that were run.

    Exit code 4 unless the interval of the win rate lies above one half. Raises UsageError (E313) where --out holds
    something that no demo made.
    """
    from palate import __version__
    from palate.recipes import compare, doctor, preference, report
    from palate.report.words import duration, size
    from palate.run import machine

    out = Path(config.out)
    clear(out)
    told = Teller(say, config.minutes or (15 if config.full else 2.5))
    say(f" palate {__version__} · {machine()} · everything stays in {out}")

    if config.full:
        from palate.recipes.road import walk

        return walk(config, told, argv, panel)
    found = told.run("doctor", doctor.run, doctor.DoctorConfig, {"data": DATA}, operands=("data",))
    notes = "; ".join(finding["what"] for finding in found["findings"]) or "nothing to note"
    counts = f"{found['errors']} errors, {found['warnings']} warnings"
    told.line("data", f"{found['rows']:,} pairs · doctor: {counts}; {notes}")

    pace = measure()
    options = {"model": MODEL, "data": DATA, "eval": HELD, "beta": BETA, "lr": RATE, "batch": BATCH}
    options |= {"seed": config.seed, "train": {"tokens": TOKENS}}
    planned = told.run("dpo", preference.run, preference.PreferenceConfig, options | {"dry_run": True})
    steps = pace.steps(told.left())  # now that the plan has taken its time
    taken = f"{pace.step:.2f} s a step here, about {duration(pace.taken(steps))} in all"
    peak = f"peak about {size(planned['peak_bytes'])}"
    told.line("plan", f"dpo beta={BETA} lr={RATE:g}, {steps} steps of {BATCH} pairs · {peak} · {taken}")
    options |= {"steps": steps, "eval_every": -(-steps // 3), "save_every": steps, "out": config.out}
    if not sys.stderr.isatty():
        options |= {"log_every": -(-steps // 6)}
    trained = told.run("dpo", preference.run, preference.PreferenceConfig, options, panel=panel, argv=argv)
    accuracy = trained["after"]["eval/rewards/accuracies"]
    told.line("train", f"the chosen completion has the larger implicit reward in {accuracy:.1%} of held-out pairs")

    options = comparison(config.out, MODEL, config.seed)
    match = told.run("compare", compare.run, compare.CompareConfig, options, operands=("contestants",))
    told.line("compare", match_line(match))
    for before, after in examples(out):
        say(f"    before   {before}\n    after    {after}")
    page = told.run("report", report.run, report.ReportConfig, {"runs": [config.out]}, operands=("runs",))["out"]
    told.line("saved", f"{out / 'model'} (loads in transformers) · {page}")
    say(f" next        palate chat {shlex.quote(str(out))} · palate dpo --model YOURS --data pairs.jsonl --dry-run")
    return result(config, told, trained, match, page)


def comparison(run: str, start: str, seed: int) -> dict[str, Any]:
    """Options of `palate compare` for a run's model against the one that it began from."""
    options = {"contestants": [run, start], "data": PROMPTS, "judge": "rule", "max_tokens": LONGEST}
    return options | {"temperature": TEMPERATURE, "seed": seed, "out": str(Path(run) / "compare")}


def match_line(match: dict[str, Any]) -> str:
    """The comparison in one line."""
    length = match["length"]
    return (
        f"{match['n']} held-out prompts, same seed: after beats before {match['win_rate']:.1%} "
        f"[{match['low']:.1%}, {match['high']:.1%}], ties {match['ties'] / match['n']:.0%}, KL {match['kl']:.1f} nats, "
        f"length {length['before']:.0f} to {length['after']:.0f} tokens"
    )


def examples(out: Path, shown: int = 3) -> list[tuple[str, str]]:
    """(before, after) of three prompts: those a quarter, half and three quarters of the way up in what they gained."""
    from palate.files import read_json

    rows = read_json(out / "compare" / "comparison.json")["examples"]
    rows.sort(key=lambda row: row["score_after"] - row["score_before"])
    picked = [rows[len(rows) * i // (shown + 1)] for i in range(1, shown + 1)]
    return [(row["before"], row["after"]) for row in picked]


def result(config: DemoConfig, told: "Teller", trained: dict, match: dict, page: str) -> dict[str, Any]:
    """What --json prints, and the exit code."""
    found = {name: value for name, value in match.items() if name not in ("summary", "out", "exit_code")}
    found |= {name: trained[name] for name in ("model", "steps", "reference_scored", "reference_reused")}
    found |= {"out": config.out, "report": page, "accuracy": trained["after"]["eval/rewards/accuracies"]}
    found |= {"seconds": round(told.spent(), 1), "commands": told.commands}
    better = match["low"] > 0.5
    word = "better" if better else "not shown to be better"
    why = "" if better else ": the interval reaches down to one half; give it more --minutes, or another --seed"
    share = f"{match['win_rate']:.1%} [{match['low']:.1%}, {match['high']:.1%}]"
    summary = f"{word}: the model after training wins {share} of {match['n']} held-out prompts{why}"
    return found | {"better": better, "exit_code": 0 if better else 4, "summary": [summary]}


class Teller:
    """Runs verbs and says what they are: the command before, what came out and the seconds after."""

    def __init__(self, say: Say, minutes: float):
        self.say, self.began, self.number, self.seconds = say, time.monotonic(), 0, minutes * 60
        self.since, self.commands = self.began, []

    def run(self, verb: str, recipe: Callable, config_type, options: dict, *, operands=(), panel=None, argv=()) -> dict:
        """What the verb returns; its own words are left out, its errors are not."""
        command = command_of(verb, options, operands)
        self.commands.append(command)
        self.say(f"   $ {command}")
        return recipe(config_type(**options), verb=verb, say=lambda text="": None, panel=panel, argv=list(argv))

    def line(self, stage: str, text: str) -> None:
        """What a stage came to."""
        self.number += 1
        now = time.monotonic()
        self.say(f" {self.number} {stage:<9} {text} · {now - self.since:.0f} s")
        self.since = now

    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def left(self) -> float:
        """Seconds that remain."""
        return self.seconds - self.spent()


def command_of(verb: str, options: dict[str, Any], operands: Sequence[str] = ()) -> str:
    """The command line that gives a verb these options."""
    from palate.run import flat_keys

    words = ["palate", verb]
    for name in operands:
        words += [options[name]] if isinstance(options[name], str) else options[name]
    for name, value in flat_keys({name: value for name, value in options.items() if name not in operands}).items():
        name = name.replace("_", "-")
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return shlex.join(words)


@dataclass(frozen=True)
class Pace:
    """What this machine needs, in seconds.

    step: one step. scored: a pair's log-probs. sampled: a completion. token: a trained stream token.
    """

    step: float
    scored: float
    sampled: float
    token: float

    def steps(self, seconds: float) -> int:
        """How many steps fit, between FEWEST and MOST, with a quarter of the time kept back."""
        return max(FEWEST, min(MOST, int((0.75 * seconds - self.taken(0)) / self.step)))

    def taken(self, steps: int) -> float:
        """Seconds of so many steps and of what stands around them: reference, evaluation, comparison."""
        pairs, held = 2400, 300
        return 10 + self.scored * (pairs + 5 * held) + self.sampled * 2.2 * held + steps * self.step

    def texts(self, seconds: float, tokens: float) -> int:
        """How many texts of so many tokens can be trained in the time."""
        return int(seconds / (self.token * tokens))

    def rollout(self, episodes: int, passes: int) -> float:
        """Seconds of one: an episode is sampled, scored by four models, and trained on with a critic beside."""
        return episodes * (self.sampled + 2 * self.scored + passes * self.step / BATCH)


def measure() -> Pace:
    """The pace of this machine, from a few pairs and prompts; no weight moves, nothing is written.

    Where other work shares the cores, several threads wait for each other: if one alone is faster, one is kept.
    """
    import torch

    from palate.data.batch import collate, stream_length
    from palate.data.sources import read_pairs
    from palate.data.stream import pack
    from palate.data.tokens import end_tokens, tokenize
    from palate.model.load import load
    from palate.recipes.plan import pass_seconds
    from palate.sampling.generate import generate
    from palate.scoring import Numerics, logps
    from palate.train.objectives import objective

    loaded = load(MODEL)
    model, tokenizer = loaded.model, loaded.tokenizer
    groups = [tokenize(record, tokenizer) for record in read_pairs(f"{DATA}[:{TRIED}]")]
    numerics = Numerics.of(model, "float32", TOKENS)
    plain = objective("cpo", numerics)  # a pairwise loss without a reference: the same work
    taken, lengths = {}, [stream_length(group) for group in groups]
    part = [groups[i] for i in pack(lengths, TOKENS)[0]]
    share = BATCH * sum(lengths) / len(lengths) / sum(stream_length(group) for group in part)  # of a step in `part`
    for threads in dict.fromkeys((torch.get_num_threads(), 1)):
        torch.set_num_threads(threads)
        taken[threads] = min(pass_seconds(model, part, plain) for _ in range(2)) * share
    torch.set_num_threads(min(taken, key=lambda threads: taken[threads]))
    step = min(taken.values())
    with torch.no_grad():
        logps(model, collate(groups[:8]), numerics=numerics)  # the first call of anything is slow
        scored = _seconds(lambda: logps(model, collate(groups[: TRIED // 2]), numerics=numerics)) / (TRIED // 2)
    prompts, ends = [group.prompt for group in groups[:24]], end_tokens(tokenizer)
    sampled = _seconds(lambda: generate(model, tokenizer, prompts, max_tokens=LONGEST, end_ids=ends)) / len(prompts)
    token = step / (BATCH * sum(stream_length(group) for group in groups) / len(groups))
    return Pace(step, scored, sampled / 2, token)  # many prompts at once cost less each


def _seconds(work: Callable) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def clear(out: Path) -> None:
    """Removes what a demo made at --out. An empty folder stays as it is.

    Raises UsageError (E313) where anything else is there, MachineError (E503) while another process works in it.
    """
    from palate.files import Lock, read_json, remove_tree

    left = {path.name for path in out.iterdir()} if out.is_dir() else {"a file"} if out.exists() else set()
    if not left:
        return
    records = [read_json(path) for path in (out / "run.json", out / ROAD_FILE) if path.is_file()]
    argv = next((record.get("argv") for record in records if isinstance(record, dict)), None)
    begun = ".lock" in left and not left - {".lock", "config.yaml"}  # it was stopped before it had a run.json
    if not begun and not (isinstance(argv, list) and argv[1:2] == ["demo"]):
        raise UsageError("holds something that no demo made", where=str(out), code="E313", next="take a new --out")
    if foreign := sorted(name for name in left - MADE - ROAD if not (name.startswith(".") and name.endswith(".tmp"))):
        what = f"holds {foreign[0]}, which no demo made, beside an earlier demo"
        raise UsageError(what, where=str(out), code="E313", next="move it elsewhere, or take a new --out")
    for lock in sorted(out.rglob(".lock")):
        Lock(lock).close()
    remove_tree(out)
