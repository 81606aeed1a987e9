"""Log-probs, implicit rewards and margins of a data file under a model, and a reference where one is named."""

from typing import Annotated, Any, Literal

from pydantic import Field

from palate.errors import DataError
from palate.layout import MICRO_BATCH_TOKENS
from palate.recipes.rows import Reading, anything, rejects_file, write_rejects
from palate.recipes.verbs import (
    InputConfig,
    check_model_options,
    check_new_file,
    max_length,
    resolve_precision,
    stderr,
    with_own_tokenizer,
    write_lines,
)


class ScoreConfig(InputConfig):
    """Options of `palate score`."""

    out: Annotated[str, Field(description="JSONL file to write; one object a row")]
    reference: Annotated[str | None, Field(description="Model that rewards are measured against")] = None
    beta: Annotated[float, Field(gt=0, description="Implicit reward = beta times log-ratio")] = 0.1
    max_length: Annotated[int | None, Field(gt=1, description="Tokens of prompt + longer completion")] = None
    tokens: Annotated[int, Field(gt=0, description="Stream tokens per micro-batch")] = MICRO_BATCH_TOKENS
    precision: Annotated[Literal["auto", "float32", "bfloat16"], Field(description="Of the matmuls")] = "auto"


def run(config: ScoreConfig, *, verb: str = "score", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """Writes one row per record to --out, and returns accuracy, margin and the path.

    Columns: `line`, then for pairs `chosen_logp rejected_logp chosen_tokens rejected_tokens` (with a reference also
    `chosen_reference rejected_reference chosen_reward rejected_reward margin`); for other records `logps tokens`, best
    first where there is an order. Accuracy, ties and margin are over all pairs, those inside ranked lists too.
    """
    from palate.data.sources import read_any
    from palate.data.template import load_template
    from palate.model.load import check_same_tokenizer, load
    from palate.reference import reference_column, reference_identity
    from palate.scoring import Numerics
    from palate.store import reference_store

    check_model_options(config, config.model, config.reference)
    check_new_file(config.out)
    rejects = rejects_file(config)
    records = read_any(config.data, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows)
    for note in [*records.notes, *records.warnings]:
        say(f"data: {note}")
    options = {"device": config.device, "trust_remote_code": config.trust_remote_code}
    policy = with_own_tokenizer(load(config.model, revision=config.revision, **options))
    if config.chat_template is not None:
        load_template(config.chat_template, policy.tokenizer)
    other = None
    if config.reference is not None:
        revision = config.revision if config.reference == config.model else None  # a commit of one repository
        other = with_own_tokenizer(load(config.reference, revision=revision, **options))
        check_same_tokenizer(policy.tokenizer, other.tokenizer)
    reading = Reading()
    limit = max_length(config, policy.model)
    groups, _ = reading.take(records, policy.tokenizer, limit, config, usable=anything)
    if not groups:
        raise DataError(f"no row of {config.data} is left to score", code="E104", next="look at the messages above")
    if not any(group.completions for group in groups):
        what = "the rows are prompts, with no completion to score"
        raise DataError(what, where=config.data, code="E202", next="give completions, or palate generate writes some")
    say(f"data: {reading.summary()}")

    def column(loaded):
        precision = resolve_precision(config, loaded.model.device.type)
        store = reference_store(reference_identity(loaded.model, precision))
        numerics = Numerics.of(loaded.model, precision, config.tokens)
        return reference_column(groups, loaded.model, numerics=numerics, tokens=config.tokens, store=store)

    scored = column(policy)
    reference = None if other is None else column(other)
    bases = [None] * len(groups) if reference is None else reference.totals
    lines = [_line(*row, config.beta) for row in zip(groups, scored.totals, bases, strict=True)]
    write_lines(config.out, lines)
    kept_aside = write_rejects(rejects, reading.rejects, say)
    against = reference or scored
    result: dict[str, Any] = {
        "out": config.out,
        "rows": len(lines),
        "refused": reading.counts["refused"],
        **kept_aside,
        "data": dict(reading.counts),
        "scored": scored.scored,
        "reused": scored.reused,
        "reference_scored": against.scored,
        "reference_reused": against.reused,
    }
    margins = [m for row in zip(groups, scored.totals, bases, strict=True) for m in _margins(*row, config.beta)]
    if margins:
        result["pairs"] = len(margins)
        result["accuracy"] = sum(m > 0 for m in margins) / len(margins)
        result["ties"] = sum(m == 0 for m in margins) / len(margins)
        result["margin"] = sum(margins) / len(margins)
    shown = [f"{name} {result[name]:.4g}" for name in ("pairs", "accuracy", "ties", "margin") if name in result]
    return result | {"summary": f"{config.out}: {len(lines)} rows" + "".join(f", {text}" for text in shown)}


def _values(totals, reference, beta: float) -> list[float]:
    """What margins are differences of: implicit rewards, without a reference the log-probs."""
    return list(totals) if reference is None else [beta * (a - b) for a, b in zip(totals, reference, strict=True)]


def _margins(group, totals, reference, beta: float) -> list[float]:
    values = _values(totals, reference, beta)
    return [values[better] - values[worse] for better, worse in group.preferences]


def _line(group, totals, reference, beta: float) -> dict[str, Any]:
    from palate.data.batch import best_first, scored_length

    line: dict[str, Any] = {"line": group.source.line if group.source else None}
    lengths = [scored_length(group, k) for k in range(len(group.completions))]
    values = _values(totals, reference, beta)
    if len(group.preferences) == 1 and len(totals) == 2:
        for side, k in zip(("chosen", "rejected"), group.preferences[0], strict=True):
            line |= {f"{side}_logp": totals[k], f"{side}_tokens": lengths[k]}
            if reference is not None:
                line |= {f"{side}_reference": reference[k], f"{side}_reward": values[k]}
        return line if reference is None else line | {"margin": _margins(group, totals, reference, beta)[0]}
    shown = [0] if group.label is not None else best_first(group) or range(len(totals))
    line |= {"logps": [totals[k] for k in shown], "tokens": [lengths[k] for k in shown]}
    if group.label is not None:
        line["label"] = group.label
    if reference is not None:
        line |= {"reference": [reference[k] for k in shown], "rewards": [values[k] for k in shown]}
    return line
