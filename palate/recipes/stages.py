"""The stages of a round: each reads the files of those before it, and what is there already is not made again."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.errors import CheckpointError, UsageError
from palate.recipes import chain, preference
from palate.recipes.cells import is_done
from palate.recipes.rows import prompt_key, write_rejects
from palate.recipes.training import Paused, TrainingConfig, refuse_other_data, reported
from palate.recipes.verbs import every_tenth

if TYPE_CHECKING:
    from palate.recipes.rounds import Case, Round, RoundsConfig

# the columns of a row that training and comparing fill; null where nobody does
LATER = ("win_rate", "win_low", "win_high", "win_previous", "judge_accuracy", "length", "kl", "ended", "score",
         "verdict", "compared", "accuracy", "chosen_logp")  # fmt: skip


CHUNKED = {"sample": "samples", "judge": "judged"}  # stage -> its folder of chunks


def open_round(this: "Round") -> None:
    """Writes down what the rounds are made of, or refuses files that have changed since; takes old checkpoints away."""
    from palate.files import make_folder, remove_tree, write_json, write_json_lines
    from palate.recipes.contest import opened
    from palate.recipes.generate import plain_prompt

    for number in range(1, this.number):  # nothing goes on from there
        remove_tree(chain.folder_of(this.out, number) / "checkpoints")
    sources = [dict(source, role="train") for source in getattr(this.records, "sources", [])]
    compared = None if this.config.compared_on is None else read_compared(this.config)
    sources += [dict(source, role="compared on") for source in (compared.sources if compared else [])]
    refuse_other_data(this.out, sources)
    make_folder(this.folder)
    if not (this.out / "data.json").exists():
        notes, refused = (list(getattr(this.records, name, [])) for name in ("notes", "rejected"))
        for note in [*notes, *getattr(this.records, "warnings", [])]:
            this.say(f"data: {note}")
        write_rejects(this.out / "rejects.jsonl", [(raw, message) for _, raw, _, message in refused], this.say)
        said = [message for *_, message in refused]
        write_json(this.out / "data.json", {"sources": sources, "notes": notes, "rejected": said})
    if not (this.out / "prompts.jsonl").exists():
        if compared is None:
            compared = [record for record in this.records if prompt_key(record) in this.held]
            opened(this.config, compared)
        prompts = dict.fromkeys(record.prompt for record in compared)
        known = {record.prompt for record in this.records if prompt_key(record) not in this.held}
        if shared := sum(prompt in known for prompt in prompts):
            this.tell(f"{shared} of {len(prompts)} prompts that rounds are compared on are trained on too")
        write_json_lines(this.out / "prompts.jsonl", [{"prompt": plain_prompt(prompt)} for prompt in prompts])


def read_compared(config: "RoundsConfig"):
    """The prompts of the file that rounds are compared on."""
    from palate.data.sources import read_prompts

    format = config.format if config.compared_on == config.prompts else None
    return read_prompts(config.compared_on, format=format)


def check_ready(this: "Round", stage: str) -> None:
    """Nothing, where the stages before this one are done; else UsageError naming the first that is not."""
    for before in this.way.stages[: this.way.stages.index(stage)]:
        if before != "score" and not is_stage_done(this, before):  # training scores by itself
            what = f"round {this.number} waits for its stage {before}"
            raise UsageError(what, where="stage", code="E308", next=f"run --stage {before} first")


def start_of(this: "Round") -> Path:
    """The run folder of the model before round 1, where the way makes one."""
    return this.out / "start"


def is_stage_done(this: "Round", stage: str) -> bool:
    """Whether what the stage makes is there."""
    if stage == "start":
        return is_done(start_of(this))
    if stage in CHUNKED:
        return not left(this, stage)
    there = {"pair": "pairs.json", "score": "reference.safetensors", "compare": chain.MANIFEST}
    return is_done(this.folder) if stage == "train" else (this.folder / there[stage]).exists()


def left(this: "Round", stage: str) -> int:
    """Chunks of sample or judge that are not there; 1 where none was begun."""
    from palate.sampling.chunks import Chunks

    chunks = Chunks.there(this.folder / CHUNKED[stage])
    return len(chunks.missing()) if len(chunks) else 1


def standing(this: "Round", stage: str) -> str:
    """What a stage that ran alone came to."""
    if this.sealed and stage != "start":
        return f"round {this.number} is done"
    if stage in CHUNKED and (count := left(this, stage)):
        return f"round {this.number}: {stage}: {count} chunks are left to other parts"
    after = this.way.stages[this.way.stages.index(stage) + 1]
    return f"round {this.number}: {stage} is done; next: --stage {after}"


# --- sample, judge ---------------------------------------------------------------------------------------------------


def sampled(this: "Round"):
    """The chunks of the round's samples, and what makes them."""
    from palate.sampling.chunks import Draw, sample, samples

    config, prompts = this.config, [ids for _, ids in this.asked]
    how = Draw(config.max_tokens, config.temperature, this.way.candidates, this.seed)
    chunks = samples(this.folder / "samples", this.loaded.fingerprint, prompts, how, size=config.chunk)
    return chunks, sample(this.loaded.model, this.loaded.tokenizer, prompts, how)


def sample(this: "Round", **_: Any) -> None:
    """Samples of every prompt from the round's start."""
    if is_stage_done(this, "pair"):
        return
    chunks, work = sampled(this)
    this.tell(f"sampling {this.way.candidates} of each of {chunks.count} prompts")
    chunks.make(work, part=this.config.shares, tell=told(this, "sampled", "prompts"))


def judge(this: "Round", **_: Any) -> None:
    """A row for every sample with what the way's judge says of it, if it is asked."""
    from palate.sampling.chunks import Chunks
    from palate.sampling.judge import Completion

    if is_stage_done(this, "pair"):
        return
    drawn = sampled(this)[0].rows()
    name, scorer = this.way.judge(this)
    each, asked = this.way.candidates, this.asked

    def work(start: int, stop: int) -> Iterator[dict[str, Any]]:
        mine = drawn[start * each : stop * each]
        prompts = [asked[row["prompt"]][0].prompt for row in mine]
        found = scorer(prompts, [Completion(row["completion"], row["finished"]) for row in mine], start * each)
        for row, said in zip(mine, found, strict=True):
            yield {"prompt": row["prompt"], "sample": row["sample"], **said}

    facts = {"judge": name, "samples": chain.digest_of(this.folder / "samples"), "each": each}
    chunks = Chunks(this.folder / "judged", len(asked), this.config.chunk, facts)
    this.tell(f"judging {len(drawn)} samples by {name}")
    chunks.make(work, part=this.config.shares, tell=told(this, "judged the samples of", "prompts"))


def told(this: "Round", did: str, what: str) -> Callable[[int, int], None]:
    """Tells how far a stage is, at most ten times."""
    return every_tenth(lambda done, todo: this.tell(f"{did} {done} of {todo} {what}"))


# --- pair ------------------------------------------------------------------------------------------------------------


def cases(this: "Round") -> list["Case"]:
    """Every prompt with its samples, and their scores where they were judged."""
    from palate.recipes.rounds import Case
    from palate.sampling.chunks import Chunks
    from palate.sampling.pairing import Candidate

    drawn, each = sampled(this)[0].rows(), this.way.candidates
    scores: list[float | None] = [None] * len(drawn)
    if this.way.judge is not None:
        scores = [row["score"] for row in Chunks.there(this.folder / "judged").rows()]
    made = [
        Candidate(row["completion"], row["finished"], row["tokens"], score)
        for row, score in zip(drawn, scores, strict=True)
    ]
    parts = [tuple(made[at : at + each]) for at in range(0, len(made), each)]
    return [Case(record, part) for (record, _), part in zip(this.asked, parts, strict=True)]


def pair(this: "Round", **_: Any) -> None:
    """pairs.jsonl to train on, held.jsonl to evaluate on, and what became of the prompts in pairs.json.

    Where no pair is made the round ends here.
    """
    from palate.files import write_json, write_json_lines
    from palate.sampling.pairing import row

    if is_stage_done(this, "pair"):
        return
    found = cases(this)
    made, groups = whole(this, this.way.pair(this, found))
    mine: dict[bool, list] = {True: [], False: []}
    for one, group in zip(made.pairs, groups, strict=True):
        mine[prompt_key(one) in this.held].append((one, group))
    rows = [row(one) | {"round": this.number} for one, _ in mine[False]]
    before = previous(this) if rows else []
    write_json_lines(this.folder / "held.jsonl", [row(one) for one, _ in mine[True]])
    write_json_lines(this.folder / "pairs.jsonl", [*rows, *before])
    lengths = [one.tokens for case in found for one in case.candidates]
    facts = {
        "prompts": len(found),
        "pairs": len(rows),
        "held": len(mine[True]),
        "trained": len(rows) + len(before),
        "beta": this.way.beta(this.number),
        "left_out": made.counts,
        "unparsed": made.counts.get("unparsed") if this.way.judge else None,
        "ties": made.counts.get("ties") if this.way.judge else None,
        "pair_yield": len(made.pairs) / len(found),
        "tie_share": made.counts["ties"] / len(found) if this.way.judge else None,
        "sampled_length": sum(lengths) / len(lengths),
        "sampled_ended": sum(one.finished for case in found for one in case.candidates) / len(lengths),
        **formats(this, [group for _, group in mine[False]]),
        **(this.way.extra(this, found, made) if this.way.extra else {}),
    }
    write_json(this.folder / "pairs.json", facts)
    this.tell(f"{len(rows)} pairs, {len(mine[True])} more held out, {len(before)} from the round before")
    if not rows:
        seal(this, {})


def tokenized(this: "Round", pairs: Sequence) -> list:
    """The pairs as training sees them."""
    from palate.data.tokens import tokenize_pair
    from palate.recipes.verbs import max_length

    limit = max_length(this.config, this.loaded.model)
    return [tokenize_pair(one, this.loaded.tokenizer, max_length=limit) for one in pairs]


def whole(this: "Round", made) -> tuple[Any, list]:
    """The pairs that training sees as they were sampled, and how it sees them: --max-length cuts neither their prompt
    nor a side, which would lose its end token."""
    from palate.recipes.verbs import max_length
    from palate.sampling.pairing import Pairing

    seen = zip(made.pairs, tokenized(this, made.pairs), strict=True)
    kept = [(one, group) for one, group in seen if not any(group.cut) and not group.prompt_cut]
    if cut := len(made.pairs) - len(kept):
        this.tell(f"{cut} pairs are left out: --max-length {max_length(this.config, this.loaded.model)} would cut them")
    pairs = tuple(one for one, _ in kept)
    return Pairing(pairs, made.counts | {"too long": cut}), [group for _, group in kept]


def previous(this: "Round") -> list[dict[str, Any]]:
    """The rows of the round before that were its own, where the way trains on them too."""
    from palate.run import read_lines

    if not this.way.keeps_previous or this.number == 1:
        return []
    rows = read_lines(chain.folder_of(this.out, this.number - 1) / "pairs.jsonl")
    return [row for row in rows if row["round"] == this.number - 1]


def formats(this: "Round", groups: Sequence) -> dict[str, Any]:
    """How well format alone tells chosen from rejected completions. groups: the pairs as training sees them."""
    from palate.evaluation.formats import seen, told_apart

    told = told_apart([seen(group, this.loaded.tokenizer) for group in groups])
    share = told.accuracy if told.accuracy.count else None
    return {
        "format_accuracy": share and share.value,
        "format_low": share and share.low,
        "format_high": share and share.high,
        "format_by": told.by,
    }


# --- score, train ----------------------------------------------------------------------------------------------------


def training(this: "Round") -> preference.PreferenceConfig:
    """The options of `palate dpo` that train this round: its start is the model and the reference."""
    from palate.files import read_json

    facts = read_json(this.folder / "pairs.json")
    given = {name: getattr(this.config, name) for name in TrainingConfig.model_fields}
    own = {
        "model": this.start,
        "revision": this.revision(this.start),
        "data": str(this.folder / "pairs.jsonl"),
        "eval": str(this.folder / "held.jsonl") if facts["held"] else "none",
        "out": str(this.folder),
        "resume": True,
        "beta": facts["beta"],
        "columns": {},
        "format": None,
        "bad_rows": "stop",
        "retain": "none",
        "retain_samples": 0,
        "require_better": False,
        "dry_run": False,
        "report": False,
    }
    if not facts["held"]:
        own["eval_every"] = None
    return preference.PreferenceConfig(**(given | own))


def score(this: "Round", *, argv=(), panel=None) -> None:
    """The reference column alone; training scores it where this was left out."""
    if is_stage_done(this, "score"):
        return
    this.forget()
    with contextlib.suppress(Paused):
        preference.run(training(this), argv=argv, say=this.tell, panel=panel, stop=0)


def train(this: "Round", *, argv=(), panel=None) -> None:
    """`palate dpo` on the pairs."""
    if is_done(this.folder):
        return
    this.forget()
    preference.run(training(this), argv=argv, say=this.tell, panel=panel)
    check_start(this)


def check_start(this: "Round") -> None:
    """Nothing, where the training began from, and stayed close to, the very weights that were sampled from."""
    import hashlib

    from palate.files import read_json
    from palate.sampling.chunks import Chunks

    sampled = Chunks.there(this.folder / "samples").facts["model"]
    identities = {hashlib.sha256(f"{sampled} {p}".encode()).hexdigest()[:32] for p in ("float32", "bfloat16")}
    if read_json(this.folder / "run.json")["parents"][0]["identity"] not in identities:
        what = f"was trained from other weights than it sampled from: {this.start} changed in between"
        hint = "put the model back, and take a new --out"
        raise CheckpointError(what, where=str(this.folder), code="E502", next=hint)


# --- compare ---------------------------------------------------------------------------------------------------------


def compare(this: "Round", **_: Any) -> None:
    """The row of the round, once its model is compared with the start and with the model before; then the manifest."""
    from palate.recipes.contest import contest

    if this.sealed:
        return
    this.forget()
    seal(this, learnt(this) | contest(this))
    if this.config.report:
        reported(this.folder)


def learnt(this: "Round") -> dict[str, Any]:
    """Of the held-out pairs: how many the round's model orders rightly, and its log-prob of the chosen side."""
    from palate.run import read_lines

    evals = [line for line in read_lines(this.folder / "metrics.jsonl") if "eval/loss" in line]
    names = {"accuracy": "eval/rewards/accuracies", "chosen_logp": "eval/logps/chosen"}
    return {name: evals[-1].get(key) for name, key in names.items()} if evals else {}


def seal(this: "Round", facts: dict[str, Any]) -> None:
    """Ends the round with its row, alarms included; what killed processes left half written is taken away."""
    from palate.evaluation.judging import alarms
    from palate.files import read_json, remove_halves
    from palate.sampling.chunks import Chunks

    remove_halves(this.folder)
    row = dict.fromkeys(("pairs", "unparsed", "ties", *LATER)) | {"compared_by": this.config.compared_by}
    row |= read_json(this.folder / "pairs.json") | facts
    row["alarms"] = alarms(row, chain.row_of(this.out, 1) if this.number > 1 else None)
    chain.seal(this.out, this.number, Chunks.there(this.folder / "samples").facts["model"], row)


DO: dict[str, Callable[..., None]] = {
    "sample": sample,
    "judge": judge,
    "pair": pair,
    "score": score,
    "train": train,
    "compare": compare,
}
