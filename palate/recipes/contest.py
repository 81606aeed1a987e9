"""How a round's model stands: against the model before round 1 and the one before it, on prompts nobody trained on.

Every model completes the prompts with the same seed, once, in chunks beside its round; what the judge says of a model
is kept there too.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.recipes import chain
from palate.recipes.compare import Drift, example, means, outcomes, paired, score_all
from palate.recipes.generate import check_prompts, encoded
from palate.recipes.verbs import every_tenth

if TYPE_CHECKING:
    from palate.recipes.rounds import OwnSamplesConfig, Round

EVALUATION = 2**31  # added to the seed of what is sampled here


def contest(this: "Round") -> dict[str, Any]:
    """Columns of the row: lengths, KL from the start, and win rates with a judge; comparison.json has the examples."""
    from palate.data.sources import read_prompts

    file, drift = this.out / "prompts.jsonl", Drift("after", "start", this.config.temperature)
    if not file.stat().st_size:
        return {}
    records = read_prompts(str(file))
    judge = opened(this.config, records)
    begun, own = chain.folder_of(this.out, 1) / "before", this.folder / "after"
    last = chain.folder_of(this.out, this.number - 1) / "after" if this.number > 1 else begun
    after = completed(this, records, str(this.folder), own, drift, "after")
    start = completed(this, records, this.first, begun, drift, "start")
    sides = {own: after, begun: start, last: start if last == begun else stored(last)}
    tables = {at: {r.prompt: [row] for r, row in zip(records, rows, strict=True)} for at, rows in sides.items()}
    for folder, table in tables.items():
        scored(judge, records, table, folder)
    found = {
        "length": mean(after, "tokens"),
        "ended": mean(after, "finished"),
        "kl": drift.kl,
        "score": mean(after, "score"),
        "start_score": mean(start, "score"),
        "start_length": mean(start, "tokens"),
        "compared": len(records),
    }
    return found if judge is None else found | matches(this, judge, records, tables, (own, begun, last), drift.kl)


def mean(rows: Sequence[dict], key: str) -> float | None:
    """The mean of a number over the rows; None where one has none."""
    values = [row.get(key) for row in rows]
    return None if None in values else sum(values) / len(values)


def opened(config: "OwnSamplesConfig", records: Sequence):
    """The judge that compares, which knows these prompts; None where nobody compares."""
    from palate.sampling.judge import open_judge

    name = config.compared_by
    if name is None:
        return None
    judge = open_judge(name, device=config.device, seed=config.seed)
    if name == "rule":
        check_prompts(judge, records)
    return judge


def completed(this: "Round", records: Sequence, name: str, folder: Path, drift: Drift, side: str) -> list[dict]:
    """A row for every prompt, completed by the model of this name; those that are there are not made again."""
    import numpy as np

    from palate.sampling.chunks import Draw, sample, samples
    from palate.sampling.generate import Sample

    config, loaded = this.config, this.load(name)
    kept, _ = encoded(loaded, records)
    prompts = [ids for _, ids in kept]
    how = Draw(config.max_tokens, config.temperature, 1, (config.seed << 32) + EVALUATION)
    chunks = samples(folder, loaded.fingerprint, prompts, how, size=config.chunk)
    told = every_tenth(lambda done, todo: this.tell(f"completed {done} of {todo} prompts to compare"))
    chunks.make(sample(loaded.model, loaded.tokenizer, prompts, how), tell=told)
    rows, nothing = chunks.rows(), np.zeros(0)
    drawn = [Sample(r["prompt"], 0, np.array(r["ids"], np.int32), nothing, r["logp"], r["finished"]) for r in rows]
    drift.see(side, loaded, kept, drawn)
    return rows


def stored(folder: Path) -> list[dict]:
    """The rows that an earlier round made."""
    from palate.sampling.chunks import Chunks

    return Chunks.there(folder).rows()


def scored(judge, records: Sequence, table: dict, folder: Path) -> None:
    """Writes "score" into the completions, where the judge scores one by itself; it is asked once for each model."""
    from palate.files import read_json, write_json

    if judge is None or not judge.scores_alone:
        return
    file = folder / "scores.json"
    if file.exists():
        for record, value in zip(records, read_json(file), strict=True):
            table[record.prompt][0]["score"] = value
        return
    score_all(judge, records, {"": table})
    write_json(file, [table[record.prompt][0]["score"] for record in records])


def matches(this: "Round", judge, records: Sequence, tables: dict, sides: Sequence[Path], kl) -> dict[str, Any]:
    """The matches with the start and with the model before; the first one's examples in comparison.json."""
    from palate.evaluation.winrate import comparison, match
    from palate.files import make_folder, write_json

    own, begun, last = sides
    names = {begun: "the start", last: f"round {this.number - 1}" if this.number > 1 else "the start"}
    pairs = {at: paired(records, tables[own], tables[at]) for at in names}
    judged = iter(outcomes(judge, records, [pair for at in names for pair in pairs[at]]))  # at once: people may judge
    found = {
        at: match(f"round {this.number}", names[at], judge.name, list(islice(judged, len(pairs[at]))), seed=0)
        for at in names
    }
    examples = [example(records[at].prompt, two, one) for at, one, two in pairs[begun]]
    keys = {"length": "tokens", "reward": "score"}
    facts = {name: means(records, tables[begun], tables[own], key) for name, key in keys.items()}
    make_folder(this.folder / "compare")
    write_json(this.folder / "compare" / "comparison.json", comparison(found[begun], examples, kl=kl, **facts))
    whole, step = found[begun], found[last]
    shares = {"win_rate": whole.win_rate, "win_low": whole.low, "win_high": whole.high}
    return shares | {"win_previous": step.win_rate, "verdict": step.verdict}


# --- a policy in training ---------------------------------------------------------------------------------------------


def against_start(
    config: "OwnSamplesConfig", model, reference, tokenizer, records, prompts, numerics, folder: Path, *, tokens, first
) -> dict[str, Any]:
    """`eval/...` numbers of a sample of each prompt, the same seed each time, and of its match with the start's.

    reference: the start; None where the adapters of the model, off, are. prompts: token ids of the records. first: this
    is the start itself, whose rows are kept in start.jsonl of the folder; later the match is in its comparison.json.
    """
    from palate.data.tokens import TokenGroup, end_tokens
    from palate.files import make_folder, remove_halves, write_json_lines
    from palate.model.adapters import reference_mode
    from palate.recipes.retain import totals
    from palate.run import read_lines
    from palate.sampling.generate import generate, text_of

    how = {"max_tokens": config.max_tokens, "temperature": config.temperature, "end_ids": end_tokens(tokenizer)}
    made = generate(model, tokenizer, prompts, seed=(config.seed << 32) + EVALUATION, **how)
    texts = [text_of(one, prompts[one.prompt], tokenizer) for one in made]
    rows: list[dict[str, Any]] = [
        {"completion": text, "finished": one.finished, "tokens": len(one.ids)}
        for one, text in zip(made, texts, strict=True)
    ]
    judge = opened(config, records)
    if judge is not None:
        score_all(judge, records, {"": {record.prompt: [row] for record, row in zip(records, rows, strict=True)}})
    groups = [TokenGroup(prompts[one.prompt], (one.ids,), (((0, len(one.ids)),),)) for one in made]
    own, _ = totals(model, groups, numerics, tokens)
    with reference_mode(model) if reference is None else nullcontext():
        base, _ = totals(model if reference is None else reference, groups, numerics, tokens)
    kl = sum(a - b for a, b in zip(own, base, strict=True)) / len(groups)
    found = {"eval/count": len(rows), "eval/kl": kl, "eval/length": mean(rows, "tokens")}
    found |= {"eval/ended": mean(rows, "finished")}
    if (score := mean(rows, "score")) is not None:
        found["eval/reward"] = score
    make_folder(folder)
    remove_halves(folder)
    if first:
        write_json_lines(folder / "start.jsonl", rows)
    elif judge is not None:
        found |= matched(judge, records, rows, read_lines(folder / "start.jsonl"), kl, folder / "comparison.json")
    return found


def matched(judge, records: Sequence, rows, began, kl: float, file: Path) -> dict[str, Any]:
    """`eval/win_...` of the policy's rows against its start's; the match is written down with its examples."""
    from palate.evaluation.winrate import comparison, match
    from palate.files import write_json

    pairs = [(at, one, two) for at, (one, two) in enumerate(zip(rows, began, strict=True))]
    found = match("the policy", "its start", judge.name, outcomes(judge, records, pairs), seed=0)
    sides = {
        name: {"before": before, "after": after}
        for name, key in (("length", "tokens"), ("reward", "score"))
        if (before := mean(began, key)) is not None and (after := mean(rows, key)) is not None
    }
    examples = [example(records[at].prompt, two, one) for at, one, two in pairs]
    write_json(file, comparison(found, examples, kl=kl, **sides))
    return {"eval/win_rate": found.win_rate, "eval/win_low": found.low, "eval/win_high": found.high}
