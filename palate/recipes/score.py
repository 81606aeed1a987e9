"""Log-probs, implicit rewards and margins of a data file under a model, and a reference where one is named."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from palate.errors import DataError
from palate.recipes.training import (
    check_model_options,
    check_new_file,
    max_length,
    resolve_precision,
    stderr,
    with_own_tokenizer,
    write_lines,
)


class ScoreConfig(BaseModel):
    """Options of `palate score`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(description="Hub id, folder, run folder or GGUF file")]
    data: Annotated[str, Field(description="Pairs, ranked lists, feedback or demonstrations")]
    out: Annotated[str, Field(description="JSONL file to write; one object a row")]
    reference: Annotated[str | None, Field(description="Model that rewards are measured against")] = None
    beta: Annotated[float, Field(gt=0, description="Implicit reward = beta times log-ratio")] = 0.1
    max_length: Annotated[int | None, Field(gt=1, description="Tokens of prompt + longer completion")] = None
    tokens: Annotated[int, Field(gt=0, description="Stream tokens per micro-batch")] = 2048
    precision: Annotated[Literal["auto", "float32", "bfloat16"], Field(description="Of the matmuls")] = "auto"
    device: Annotated[str, Field(description="auto, cpu, cuda, mps")] = "auto"
    bad_rows: Annotated[Literal["stop", "skip"], Field(description="stop, or leave bad rows out")] = "stop"
    columns: Annotated[dict[str, str], Field(description="Column names, as chosen=good,rejected=bad")] = {}
    format: Annotated[str | None, Field(description="jsonl, json, csv or parquet")] = None
    chat_template: Annotated[str | None, Field(description="Jinja file to use instead of the model's template")] = None
    trust_remote_code: Annotated[bool, Field(description="Run Python code that the model brings")] = False
    revision: Annotated[str | None, Field(description="Commit of a Hub model")] = None


def run(config: ScoreConfig, *, verb: str = "score", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """Writes one row per record to --out, and returns accuracy, margin and the path.

    Columns: `line`, then for pairs `chosen_logp rejected_logp chosen_tokens rejected_tokens` (with a reference also
    `chosen_reference rejected_reference chosen_reward rejected_reward margin`); for other records `logps tokens`.
    """
    from palate.data.batch import scored_length
    from palate.data.sources import read_any
    from palate.data.template import load_template
    from palate.data.tokens import tokenize
    from palate.model.load import check_same_tokenizer, load
    from palate.reference import reference_column, reference_identity
    from palate.scoring import Numerics
    from palate.store import reference_store

    check_model_options(config, config.model, config.reference)
    check_new_file(config.out)
    records = read_any(config.data, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows)
    for note in records.notes:
        say(f"data: {note}")
    options = dict(device=config.device, trust_remote_code=config.trust_remote_code, revision=config.revision)
    policy = with_own_tokenizer(load(config.model, **options))
    if config.chat_template is not None:
        load_template(config.chat_template, policy.tokenizer)
    limit = max_length(config, policy.model)
    other = None
    if config.reference is not None:
        other = with_own_tokenizer(load(config.reference, **options))
        check_same_tokenizer(policy.tokenizer, other.tokenizer)
    groups, refused = [], []
    for record in records:
        try:
            groups.append(tokenize(record, policy.tokenizer, max_length=limit))
        except DataError as error:
            refused.append(str(error))
    if refused and config.bad_rows == "stop":
        raise DataError(
            f"{len(refused)} rows cannot be scored; the first:\n" + "\n".join(refused[:20]),
            code="E200",
            next="mend these rows, or use --bad-rows skip",
        )
    if not groups:
        raise DataError(f"no row of {config.data} is left to score", code="E104", next="look at the messages above")

    def column(loaded):
        precision = resolve_precision(config, loaded.model.device.type)
        store = reference_store(reference_identity(loaded.model, precision))
        numerics = Numerics.of(loaded.model, precision, config.tokens)
        return reference_column(groups, loaded.model, numerics=numerics, tokens=config.tokens, store=store)

    scored = column(policy)
    reference = None if other is None else column(other)
    rows = []
    for index, group in enumerate(groups):
        lengths = [scored_length(group, k) for k in range(len(group.completions))]
        base = None if reference is None else reference.totals[index]
        rows.append(_row(group, scored.totals[index], base, lengths, config.beta))
    write_lines(config.out, rows)
    pairs = [row for row in rows if "chosen_logp" in row]
    result: dict[str, Any] = {
        "out": config.out,
        "rows": len(rows),
        "refused": len(refused) + len(records.rejected),
        "scored": scored.scored,
        "reused": scored.reused,
    }
    if reference is not None:
        result |= {"reference_scored": reference.scored, "reference_reused": reference.reused}
    if pairs:
        margins = [row.get("margin", row["chosen_logp"] - row["rejected_logp"]) for row in pairs]
        result["accuracy"] = sum(m > 0 for m in margins) / len(margins)
        result["ties"] = sum(m == 0 for m in margins) / len(margins)
        result["margin"] = sum(margins) / len(margins)
    shown = [f"{name} {result[name]:.4g}" for name in ("accuracy", "ties", "margin") if name in result]
    return result | {"summary": f"{config.out}: {len(rows)} rows" + "".join(f", {text}" for text in shown)}


def _row(group, totals, reference, lengths, beta: float) -> dict[str, Any]:
    row: dict[str, Any] = {"line": group.source.line if group.source else None}
    rewards = None if reference is None else [beta * (a - b) for a, b in zip(totals, reference, strict=True)]
    if len(group.completions) == 2 and group.preferences == ((0, 1),):
        for k, side in enumerate(("chosen", "rejected")):
            row |= {f"{side}_logp": totals[k], f"{side}_tokens": lengths[k]}
            if rewards is not None:
                row |= {f"{side}_reference": reference[k], f"{side}_reward": rewards[k]}
        if rewards is not None:
            row["margin"] = rewards[0] - rewards[1]
        return row
    count = 1 if group.label is not None else len(group.completions)
    row |= {"logps": list(totals[:count]), "tokens": lengths[:count]}
    if group.label is not None:
        row["label"] = group.label
    if rewards is not None:
        row |= {"reference": list(reference[:count]), "rewards": rewards[:count]}
    return row
