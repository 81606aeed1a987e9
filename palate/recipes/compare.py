"""Two or more contestants on the same prompts, a judge, and how often each is preferred to each other one.

A contestant is a model, which then completes the prompts, or a file of completions as `palate generate` writes it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import combinations, islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from palate.errors import AwaitsVotes, CheckpointError, DataError, NotBetterError, UsageError
from palate.files import json_line
from palate.recipes.generate import SamplingConfig, as_rows, check_prompts, draw, encoded, load_policy, plain_prompt
from palate.recipes.verbs import ReadConfig, Say, aligned, check_model_options, stderr


class CompareConfig(SamplingConfig, ReadConfig):
    """Options of `palate compare`."""

    contestants: Annotated[list[str], Field(description="Two or more models or JSONL files of completions")] = []
    judge: Annotated[
        str,
        Field(
            description="rule, random, implicit:RUN, a reward model's folder, policy:MODEL, people:VOTES.jsonl, "
            "module:function in Python"
        ),
    ]
    out: Annotated[str | None, Field(description="New folder for comparison.json and the completions")] = None
    allow_self_judge: Annotated[bool, Field(description="Let a model judge itself: implicit:RUN, policy:MODEL")] = False
    resume: Annotated[bool, Field(description="Go on with the completions in --out, where they wait for votes")] = False
    require_better: Annotated[bool, Field(description="Exit 4 unless the first is shown better than the second")] = (
        False
    )

    @model_validator(mode="after")
    def _two(self):
        if len(self.contestants) < 2:
            what = f"compare needs two contestants or more, not {len(self.contestants)}"
            raise UsageError(what, code="E300", next="palate compare A B --data PROMPTS --judge rule")
        if self.out is None and self.resume:
            raise UsageError("--resume needs --out", code="E313", next="name the folder whose completions wait")
        if self.out is None and self.judge.startswith("people:") and self.models:
            what = "needs --out, where completions wait for votes"
            raise UsageError(what, where="judge", code="E313", next="add --out FOLDER")
        return self

    @property
    def models(self) -> list[str]:
        """The contestants that complete the prompts themselves, each once."""
        return [name for name in dict.fromkeys(self.contestants) if not is_file(name)]


def run(config: CompareConfig, *, verb: str = "compare", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """Compares every contestant with every later one; returns the first match's numbers, and all from three on.

    Every sample of a prompt is used: the first of one side against the first of the other, and so on, the shorter
    side's again from its beginning. Raises what the files, models and the judge raise, DataError (E236) where a file
    has no completion of a prompt, AwaitsVotes once the completions are kept in --out, and NotBetterError under
    --require-better.
    """
    from palate.data.sources import read_prompts
    from palate.evaluation.winrate import comparison, match, sentence
    from palate.sampling.judge import open_judge

    check_model_options(config, *(config.models or ["new:"]))
    refuse_self_judge(config, config.models)
    check_folder(config)
    records = read_prompts(config.data, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows)
    distinct = list({record.prompt: record for record in reversed(records)}.values())[::-1]
    if len(distinct) < len(records):
        say(f"data: {len(records)} prompts, {len(distinct)} of them different")
    judge = open_judge(config.judge, device=config.device, seed=config.seed)
    if config.judge == "rule":
        check_prompts(judge, distinct)
    made, kl = kept(config, records) if config.resume else complete(config, distinct, say)
    distinct = [record for record in distinct if all(record.prompt in table for table in made.values())]
    if not distinct:
        raise DataError(f"no prompt of {config.data} is left", code="E104", next="look at the messages above")

    score_all(judge, distinct, made)
    say_unscored(distinct, made, say)
    cases = [(a, b, paired(distinct, made[a], made[b])) for a, b in combinations(config.contestants, 2)]
    try:  # all at once, for people may judge
        judged = iter(outcomes(judge, distinct, [pair for *_, pairs in cases for pair in pairs]))
    except AwaitsVotes as error:
        error.next, error.result = keep(config, records, distinct, made, kl), {"out": config.out}
        raise
    matches = []
    for a, b, pairs in cases:
        prompts, told = [at for at, _, _ in pairs], list(islice(judged, len(pairs)))
        matches.append(match(a, b, config.judge, told, prompts=prompts, seed=config.seed))
    first, after, before = matches[0], made[config.contestants[0]], made[config.contestants[1]]
    facts: dict[str, Any] = {
        "length": means(distinct, before, after, "tokens"),
        "reward": means(distinct, before, after, "score"),
        "kl": kl,
    }
    several = {"matches": [asdict(one) for one in matches]} if len(matches) > 1 else {}
    if config.out is not None:
        examples = [example(distinct[at].prompt, two, one) for at, one, two in cases[0][2]]
        write(Path(config.out), comparison(first, examples, **facts) | several, distinct, made)
    result = asdict(first) | several | {"prompts": len(distinct), "out": config.out} | facts
    result["summary"] = [sentence(first), "", *table(matches)]
    if config.require_better and not first.better:
        error = NotBetterError(sentence(first), next="train longer, compare on more prompts, or look at the data")
        error.result = result
        raise error
    return result


# --- contestants -----------------------------------------------------------------------------------------------------


def is_file(name: str) -> bool:
    """Whether a contestant is a file of completions rather than a model: it ends in .jsonl, or is no GGUF file."""
    path = Path(name).expanduser()
    if name.endswith((".jsonl", ".ndjson")):
        return True
    if name.startswith(("new:", "builtin:")) or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) != b"GGUF"


def refuse_self_judge(config: CompareConfig, models: Sequence[str]) -> None:
    """Nothing, unless a run would judge its own model without being asked to (UsageError E308)."""
    kind, _, name = config.judge.partition(":")
    if kind not in ("implicit", "policy") or config.allow_self_judge:
        return
    judging = Path(name).expanduser().resolve()
    for name in models:
        if Path(name).expanduser().resolve().is_relative_to(judging):
            what = f"{config.judge} would judge its own model, {name}"
            raise UsageError(what, where="judge", code="E308", next="take another judge, or add --allow-self-judge")


def complete(config: CompareConfig, records: Sequence, say: Say) -> tuple[dict[str, dict], float | None]:
    """(contestant -> prompt -> its completions, KL of the first two); files are read before a model is loaded."""
    made = {name: read_completions(name) for name in dict.fromkeys(config.contestants) if name not in config.models}
    for name, table in made.items():
        check_complete(name, table, records, say)
    drift = Drift(config.contestants[0], config.contestants[1], config.temperature)
    for name in config.models:
        made[name] = completed(config, name, records, say, drift)
    return {name: made[name] for name in dict.fromkeys(config.contestants)}, drift.kl


def read_completions(name: str) -> dict[Any, list[dict[str, Any]]]:
    """Prompt -> its completions, in file order, of a JSONL file as `palate generate` writes it.

    A row has `prompt` and `completion`, may have `finished` (true unless it says otherwise) and `tokens`.
    Raises what reading data raises, and DataError naming the line and the field.
    """
    from palate.data.columns import absent, kind, side, string
    from palate.data.rows import RowError, Rows

    made: dict[Any, list[dict[str, Any]]] = {}
    path = str(Path(name).expanduser())
    for row in Rows(path, format="jsonl"):
        try:
            if row.problem is not None:
                raise row.problem
            if not isinstance(row.value, dict):
                raise RowError("E201", f"{kind(row.value)} where a row belongs", "make each row an object")
            for key in ("prompt", "completion"):
                if key not in row.value:
                    raise absent(key, row.value)
            reply = row.value["completion"]
            if isinstance(reply, list) and len(reply) == 1:  # one message, as chat data has it
                (message,) = side(reply, "completion")
                reply = message.content
            finished = row.value.get("finished", True)
            if not isinstance(finished, bool):
                raise RowError("E203", f"{kind(finished)} where true or false belongs", "mend the row", "finished")
            tokens = row.value.get("tokens")
            one = {
                "completion": string(reply, "completion"),
                "finished": finished,
                "tokens": tokens if isinstance(tokens, int) else None,
            }
            made.setdefault(side(row.value["prompt"], "prompt"), []).append(one)
        except RowError as problem:
            if "--" in problem.next:  # --columns and --bad-rows are of --data
                problem.next = "mend the row; palate generate writes such files"
            raise problem.at(f"{path}:{row.line}") from None
    return made


def check_complete(name: str, made: dict, records: Sequence, say: Say) -> None:
    """Nothing, where a file has a completion of every prompt; else DataError (E236) naming the first without."""
    missing = [record for record in records if record.prompt not in made]
    if missing:
        prompt = missing[0].prompt
        text = prompt if isinstance(prompt, str) else prompt[-1].content
        what = f"no completion of {len(missing)} of {len(records)} prompts; the first is {text[:80]!r}"
        hint = "complete the same prompts with palate generate, or give the --data it was made from"
        raise DataError(f"{what} ({missing[0].source})", where=name, code="E236", next=hint)
    if extra := len(made) - len(records):
        say(f"{name}: {extra} other prompts are left aside")


class Drift:
    """How far the first contestant's completions are from the second: the mean of log pi_a - log pi_b over them.

    Both are the laws that are sampled, at this temperature; at 0 there is no such number.
    kl: nats a completion, the sampled KL of `a` from `b`; None unless both are models with one tokenizer.
    """

    def __init__(self, a: str, b: str, temperature: float = 1.0):
        self.a, self.b, self.temperature = a, b, temperature
        self.kl: float | None = 0.0 if a == b else None
        self._seen: tuple | None = None

    def see(self, name: str, loaded, kept: Sequence[tuple], made: Sequence) -> None:
        """Takes a's samples, and scores them when b is there."""
        from palate.data.tokens import TokenGroup
        from palate.model.load import same_tokenizer

        if not self.temperature:
            return
        if name == self.a:
            groups = [TokenGroup(kept[s.prompt][1], (s.ids,), (((0, len(s.ids)),),)) for s in made]
            own = [s.logp for s in made] if self.temperature == 1 else self._logps(groups, loaded.model)
            self._seen = loaded.tokenizer, groups, own
        elif name == self.b and self._seen is not None:
            tokenizer, groups, logps = self._seen
            if groups and same_tokenizer(tokenizer, loaded.tokenizer):
                others = self._logps(groups, loaded.model)
                self.kl = sum(own - other for own, other in zip(logps, others, strict=True)) / len(logps)

    def _logps(self, groups: Sequence, model) -> list[float]:
        from dataclasses import replace

        from palate.reference import annotate
        from palate.scoring import Numerics

        numerics = replace(Numerics.of(model), temperature=self.temperature)
        return [group.reference[0] for group in annotate(groups, model, numerics=numerics)]


def completed(
    config: CompareConfig, name: str, records: Sequence, say: Say, drift: Drift
) -> dict[Any, list[dict[str, Any]]]:
    """Prompt -> what the model of this name makes of it; every model gets the same seed."""
    loaded = load_policy(config, name)
    for note in loaded.notes:
        say(f"{name}: {note}")
    kept, refused = encoded(loaded, records, config.bad_rows)
    if refused:
        say(f"{name}: {len(refused)} prompts cannot be completed and are left out for all")
    say(f"{name}: completing {len(kept)} prompts")
    drawn = draw(loaded, kept, config)
    drift.see(name, loaded, kept, drawn)
    rows = as_rows(loaded, kept, drawn)
    made: dict[Any, list[dict[str, Any]]] = {}
    for place, row in enumerate(rows):
        made.setdefault(kept[place // config.samples][0].prompt, []).append(row)
    return made


# --- judging and telling --------------------------------------------------------------------------------------------


def paired(records: Sequence, first: dict, second: dict) -> list[tuple[int, dict, dict]]:
    """(number of the prompt, a completion of the first side, one of the second) of every comparison."""
    pairs = []
    for at, record in enumerate(records):
        ones, twos = first[record.prompt], second[record.prompt]
        pairs += [(at, ones[k % len(ones)], twos[k % len(twos)]) for k in range(max(len(ones), len(twos)))]
    return pairs


def score_all(judge, records: Sequence, made: dict[str, dict]) -> None:
    """Writes "score" into every completion, where the judge scores one by itself; None where it gave none."""
    if not judge.scores_alone:
        return
    cases = [(record.prompt, row) for table in made.values() for record in records for row in table[record.prompt]]
    values = judge.ratings([prompt for prompt, _ in cases], [_seen(row) for _, row in cases])
    for (_, row), value in zip(cases, values, strict=True):
        row["score"] = value


def say_unscored(records: Sequence, made: dict[str, dict], say: Say) -> None:
    """Says how many completions of each side have no score, which makes ties of them."""
    for name, table in made.items():
        rows = [row for record in records for row in table[record.prompt]]
        if without := sum(row.get("score", 0) is None for row in rows):
            say(f"{name}: {without} of {len(rows)} completions got no score that can be read, so they tie")


def outcomes(judge, records: Sequence, pairs: Sequence[tuple[int, dict, dict]]) -> list[float]:
    """1, 0.5 or 0 for the first side of each comparison."""
    from palate.sampling.judge import outcomes_of

    if judge.scores_alone:
        return outcomes_of([one["score"] for _, one, _ in pairs], [two["score"] for _, _, two in pairs])
    prompts = [records[at].prompt for at, _, _ in pairs]
    return judge.prefer(prompts, [_seen(one) for _, one, _ in pairs], [_seen(two) for _, _, two in pairs])


def _seen(row: dict[str, Any]):
    from palate.sampling.judge import Completion

    return Completion(row["completion"], row["finished"])


def means(records: Sequence, before: dict, after: dict, key: str) -> dict[str, float] | None:
    """The mean of a number over all completions of both sides; None where some have none."""
    sides = {"before": before, "after": after}
    values = {side: [row.get(key) for r in records for row in made[r.prompt]] for side, made in sides.items()}
    if any(value is None for side in values.values() for value in side):
        return None
    return {side: sum(numbers) / len(numbers) for side, numbers in values.items()}


def example(prompt, before: dict, after: dict) -> dict[str, Any]:
    """One comparison as comparison.json shows it."""
    return {
        "prompt": plain_prompt(prompt),
        "before": before["completion"],
        "after": after["completion"],
        "score_before": before.get("score"),
        "score_after": after.get("score"),
    }


def table(matches: Sequence) -> list[str]:
    """The matches as aligned lines under a head."""
    head = ("", "win rate", "95 % interval", "bootstrap", "wins", "losses", "ties", "")
    rows = [
        (
            f"{one.a} against {one.b}",
            f"{one.win_rate:.1%}",
            f"[{one.low:.1%}, {one.high:.1%}]",
            f"[{one.bootstrap_low:.1%}, {one.bootstrap_high:.1%}]",
            *(str(count) for count in (one.wins, one.losses, one.ties)),
            one.verdict,
        )
        for one in matches
    ]
    return aligned([head, *rows])


def write(out: Path, record: dict[str, Any], records: Sequence, made: dict[str, dict]) -> None:
    """comparison.json and, per contestant, the completions that were judged, each with its score."""
    from palate.files import remove_file, write_json

    write_completions(out, records, made)
    write_json(out / "comparison.json", record)
    if (out / WAITING).exists():
        remove_file(out / WAITING)


def write_completions(out: Path, records: Sequence, made: dict[str, dict]) -> None:
    """A file for each contestant."""
    from palate.files import make_folder, write_json_lines

    make_folder(out)
    for path, table_ in zip(files_of(out, made), made.values(), strict=True):
        rows = [
            {"prompt": plain_prompt(r.prompt), "sample": k} | row
            for r in records
            for k, row in enumerate(table_[r.prompt])
        ]
        write_json_lines(path, rows)


def files_of(out: Path, names: Iterable[str]) -> list[Path]:
    """Where the completions of each contestant lie."""
    found = []
    for number, name in enumerate(names, 1):
        short = re.sub(r"[^\w.-]+", "-", Path(name).name.removesuffix(".jsonl")).strip("-.") or "completions"
        found.append(out / f"{number}-{short[:80]}.jsonl")
    return found


# --- waiting for votes -----------------------------------------------------------------------------------------------

WAITING = "waiting.json"  # beside the completions that people are to judge: what they were made of


def check_folder(config: CompareConfig) -> None:
    """Nothing, where --out is new, or with --resume holds completions that wait; else UsageError (E313)."""
    from palate.run import check_out

    if config.out is None:
        return
    waits = (Path(config.out) / WAITING).exists()
    if config.resume and not waits:
        what = "holds no completions that wait for votes"
        raise UsageError(what, where=config.out, code="E313", next="drop --resume, or name another folder")
    if not config.resume:
        try:
            check_out(Path(config.out))
        except UsageError as error:
            error.next = "take a new --out, or add --resume" if waits else "take a new --out"
            raise


def keep(config: CompareConfig, records, judged: Sequence, made: dict[str, dict], kl: float | None) -> str:
    """Writes the completions into --out, and what they were made of; what to do once there are votes."""
    from palate.files import write_json

    if config.out is None:
        return "vote, then the same command again"
    if not config.resume:
        out = Path(config.out)
        write_completions(out, judged, made)
        write_json(out / WAITING, {"config": made_of(config), "sources": records.sources, "kl": kl})
    return "vote, then the same command with --resume"


def kept(config: CompareConfig, records) -> tuple[dict[str, dict], float | None]:
    """What `complete` gave when it was kept. Raises CheckpointError (E502) where data or options are not as then."""
    from palate.files import read_json, strict_json
    from palate.run import read_lines

    out = Path(config.out or "")
    was, now = read_json(out / WAITING), {"config": made_of(config), "sources": strict_json(records.sources)}
    differing = [name for name in now["config"] if was["config"].get(name) != now["config"][name]]
    if differing or was["sources"] != now["sources"]:
        what = f"its completions were made with other {', '.join(differing or ['prompts'])}"
        raise CheckpointError(what, where=str(out), code="E502", next="put these back, or take a new --out")
    prompts = {json_line(plain_prompt(record.prompt)): record.prompt for record in records}
    made: dict[str, dict] = {}
    for name, path in zip(names := dict.fromkeys(config.contestants), files_of(out, names), strict=True):
        for row in read_lines(path):
            made.setdefault(name, {}).setdefault(prompts[json_line(row["prompt"])], []).append(row)
    return made, was["kl"]


def made_of(config: CompareConfig) -> dict[str, Any]:
    """The options that completions and judge depend on."""
    return config.model_dump(mode="json", exclude={"out", "resume", "require_better"})
