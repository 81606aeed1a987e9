"""Prompts to a preference file, without training: samples that a judge puts in order, or of two models, one stronger.

The first stages of a round, in chunks that are made once: a process may be killed anywhere, several may share the work
(--part), and the file ends in the same bytes. Beside FILE.jsonl stands FILE.run, with the samples and what was said of
them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from palate.errors import AwaitsVotes, UsageError
from palate.recipes import stages
from palate.recipes.rounds import Band, Case, Round, Way, by, made_by_one, share_of
from palate.recipes.training import refuse_other_data, resolved
from palate.recipes.verbs import ReadConfig, check_model_options, check_new_file, stderr, write_lines


class PairsConfig(ReadConfig):
    """Options of `palate pairs`."""

    out: Annotated[str, Field(description="JSONL file of pairs to write; its work stands beside it, as FILE.run")]
    model: Annotated[str | None, Field(description="Whose samples --judge puts in order")] = None
    judge: Annotated[
        str | None,
        Field(
            description="rule, random, implicit:RUN, a reward model's folder, policy:MODEL, people:VOTES.jsonl, "
            "module:function"
        ),
    ] = None
    candidates: Annotated[int, Field(ge=2, description="Samples of each prompt; the best is held to the worst")] = 4
    length_control: Band = None
    strong: Annotated[
        str | None, Field(description="Model whose sample is chosen, in place of --model and --judge")
    ] = None
    weak: Annotated[str | None, Field(description="Model whose sample is rejected")] = None
    max_tokens: Annotated[int, Field(gt=0, description="New tokens of a sample at most, the end token included")] = 256
    temperature: Annotated[float, Field(gt=0, lt=math.inf, description="Of the samples")] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Of the samples; every one has its own")] = 0
    chunk: Annotated[int, Field(gt=0, description="Prompts of a file of samples: what a kill can cost")] = 64
    part: Annotated[
        str | None,
        Field(pattern=r"^[1-9]\d*/[1-9]\d*$", description="K/N: do every N-th chunk, from the K-th, as far as one can"),
    ] = None
    resume: Annotated[bool, Field(description="Go on where a killed run stood")] = False

    @model_validator(mode="after")
    def _has_effect(self):
        for name in ("candidates", "length_control"):
            if self.strong is not None and getattr(self, name) != type(self).model_fields[name].default:
                raise UsageError("has no effect without --judge", where=name, code="E316", next="drop it")
        if self.shares[0] > self.shares[1]:
            what = f"there is no part {self.part}"
            raise UsageError(what, where="part", code="E307", next="count from 1 to N")
        return self

    @property
    def shares(self) -> tuple[int, int]:
        """(K, N) of --part."""
        return share_of(self.part)

    @property
    def max_length(self) -> None:
        """No option of this verb: pairs are cut where they are trained on."""
        return None

    @property
    def sides(self) -> dict[str, str]:
        """The folder of each model's samples, and its name."""
        return {"": self.model} if self.model else {"strong": self.strong, "weak": self.weak}  # type: ignore


@dataclass
class Side(Round):
    """The samples of one model, in a folder of their own; no round comes after it."""

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.out

    def tell(self, text: str = "") -> None:
        """Says it with the model's name."""
        self.say(f"{self.start}: {text}")


def run(config: PairsConfig, *, verb: str = "pairs", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """Writes `prompt chosen rejected` rows (`margin` with a judge) to --out; says why the other prompts have none."""
    from palate.data.sources import read_prompts
    from palate.files import remove_halves
    from palate.recipes.generate import check_prompts
    from palate.run import Run, status_of
    from palate.sampling.judge import open_judge

    check_way(config)
    check_model_options(config, *config.sides.values())
    work = Path(config.out).with_suffix(".run")
    if (config.resume or config.part) and (work / "run.json").exists() and status_of(work) == "done":
        say(f"{config.out} is finished: nothing to do")
        with Run.create(work, verb=verb, config=resolved(config), resume=True) as run:
            return run.result
    if not (config.resume or config.part):
        check_new_file(config.out)
    records = read_prompts(config.data, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows)
    judge = None if config.judge is None else open_judge(config.judge, device=config.device, seed=config.seed)
    if judge is not None and config.judge == "rule":
        check_prompts(judge, records)

    def begin() -> Run:
        again = config.resume or config.part is not None
        parents = [{"model": name} for name in config.sides.values()]
        facts = {"config": resolved(config), "argv": list(argv), "resume": again and work.is_dir(), "parents": parents}
        return Run.create(work, verb=verb, **facts)

    try:
        if config.part is not None:  # one of several processes: none of them owns the folder
            made_by_one(work, begin)
            write_down(work, records)
            found = drawn(config, judge, work, records, say)
            return shared(config, work, done=found is not None)
        with begin() as run:
            write_down(work, records)
            found = drawn(config, judge, work, records, say)
            result = written(config, records, found)
            remove_halves(work)
            run.finish(result)
    except AwaitsVotes as error:
        error.next, error.result = go_on(config, work, config.part), {"out": config.out}
        raise
    for alarm in result["alarms"]:
        say(f"alarm: {alarm}")
    return result


def check_way(config: PairsConfig) -> None:
    """Nothing, where the options name one way of making pairs; else UsageError (E308)."""
    judged, matched = (config.model, config.judge), (config.strong, config.weak)
    if (None in judged and None in matched) or (any(judged) and any(matched)):
        what = "takes either --model and --judge, or --strong and --weak"
        raise UsageError(what, where="palate pairs", code="E308", next="give the two of one way")


def write_down(work: Path, records) -> None:
    """What the pairs are made from, or CheckpointError (E502) where that has changed since."""
    from palate.files import write_json

    sources = [dict(source, role="prompts") for source in records.sources]
    refuse_other_data(work, sources)
    if not (work / "data.json").exists():
        write_json(work / "data.json", {"sources": sources, "notes": list(records.notes)})


def drawn(config: PairsConfig, judge, work: Path, records, say) -> tuple[list[list[Case]], dict[str, Any]] | None:
    """(every side's prompts with their samples, how well format tells them apart); None while chunks are missing."""
    found, told = [], {}
    scorer = None if judge is None else by(judge, config.candidates)
    way = Way(
        read=lambda: None,
        pair=lambda this, cases: None,
        beta=lambda number: 0.0,
        candidates=1 if judge is None else config.candidates,
        judge=None if scorer is None else lambda this: (config.judge, scorer),
    )
    for number, (name, model) in enumerate(config.sides.items(), 1):  # the number makes the seed of the side its own
        side = Side(config, way, work / name, number, model, model, records, say)
        for stage in ("sample", "judge") if judge else ("sample",):
            if not stages.is_stage_done(side, stage):
                stages.DO[stage](side)
            if stages.left(side, stage):
                return None
        found.append(stages.cases(side))
        if number == len(config.sides) and config.part is None:
            told = stages.formats(side, stages.tokenized(side, made(config, found).pairs))
        side.forget()
    return found, told


def made(config: PairsConfig, found: Sequence[list[Case]]):
    """The pairs, and how many prompts have none."""
    from palate.sampling.pairing import best_and_worst, pairing, strong_and_weak

    if config.judge is not None:
        return pairing(
            best_and_worst(c.record.prompt, c.candidates, config.length_control, c.record.source) for c in found[0]
        )
    both = ((case.record, *case.candidates, *other.candidates) for case, other in together(*found))
    return pairing(strong_and_weak(record.prompt, one, two, record.source) for record, one, two in both)


def together(strong: Sequence[Case], weak: Sequence[Case]) -> Iterator[tuple[Case, Case]]:
    """The cases of the prompts that both models can complete."""
    others = {str(case.record.source): case for case in weak}
    return ((case, others[place]) for case in strong if (place := str(case.record.source)) in others)


def written(config: PairsConfig, records, found) -> dict[str, Any]:
    """The file, and the result object."""
    from palate.evaluation.judging import alarms
    from palate.sampling.pairing import row

    cases, told = found
    pairs = made(config, cases)
    left_out = {"refused": len(records) - len(pairs.pairs) - sum(pairs.counts.values()), **pairs.counts}
    write_lines(config.out, [row(pair) for pair in pairs.pairs])
    facts: dict[str, float | None] = {"pair_yield": len(pairs.pairs) / len(records)}
    if config.judge is not None:
        scores = [one.score for case in cases[0] for one in case.candidates if one.unfit is None]
        facts["unparsed_share"] = scores.count(None) / len(scores) if scores else None
        facts["tie_share"] = pairs.counts["ties"] / len(records)
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    return {
        "out": config.out,
        "prompts": len(records),
        "pairs": len(pairs.pairs),
        "left_out": left_out,
        **facts,
        **told,
        "alarms": alarms(facts),
        "summary": [
            f"pairs      {len(pairs.pairs)} of {len(records)} prompts" + (f"; without: {reasons}" if reasons else ""),
            *([f"format     tells the sides apart in {told['format_accuracy']:.1%} of them"] if pairs.pairs else []),
            f"next       palate doctor {config.out} · palate dpo --model MODEL --data {config.out}",
        ],
    }


def shared(config: PairsConfig, work: Path, *, done: bool) -> dict[str, Any]:
    """What a part comes to, which writes no file."""
    text = (
        f"all parts are done; next: {go_on(config, work)}"
        if done
        else "done as far as it can be; others have chunks left"
    )
    return {"out": config.out, "part": config.part, "done": done, "summary": [f"part {config.part}: {text}"]}


def go_on(config: PairsConfig, work: Path, part: str | None = None) -> str:
    """The command that does what is left, or what is left of a part."""
    return f"palate pairs -c {work / 'config.yaml'} --out {config.out} " + (f"--part {part}" if part else "--resume")
