"""Prompts and a policy to completions: samples as they come, or the best of several by a judge."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from palate.data.records import plain as plain_prompt
from palate.errors import DataError, UsageError
from palate.recipes.rows import as_they_stood, rejects_file, write_rejects
from palate.recipes.verbs import (
    InputConfig,
    check_model_options,
    check_new_file,
    stderr,
    with_own_tokenizer,
    write_lines,
)


class SamplingConfig(BaseModel):
    """How completions are drawn."""

    max_tokens: Annotated[int, Field(gt=0, description="New tokens at most, the end token included")] = 256
    temperature: Annotated[float, Field(ge=0, le=100, description="0 takes the likeliest token")] = 1.0
    samples: Annotated[int, Field(gt=0, description="Completions of each prompt")] = 1
    seed: Annotated[int, Field(ge=0, description="Of the draws; every completion has its own")] = 0


class GenerateConfig(SamplingConfig, InputConfig):
    """Options of `palate generate`."""

    out: Annotated[str, Field(description="JSONL file to write; one object a completion")]
    best_of: Annotated[
        int,
        Field(gt=0, description="Draws for each completion, the best of which is kept: log N - (N - 1) / N nats of KL"),
    ] = 1
    judge: Annotated[
        str | None,
        Field(description="Gives scores: rule, random, implicit:RUN, a reward model's folder, module:function"),
    ] = None

    @model_validator(mode="after")
    def _judged(self):
        if self.best_of > 1 and self.judge is None:
            what, hint = "has no effect without --judge", "say who scores the draws, as --judge rule"
            raise UsageError(what, where="best_of", code="E316", next=hint)
        if self.best_of > 1 and self.temperature == 0:
            what, hint = "has no effect at --temperature 0, where all draws are the same", "raise the temperature"
            raise UsageError(what, where="best_of", code="E316", next=hint)
        return self


def run(config: GenerateConfig, *, verb: str = "generate", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """Writes `prompt completion sample logp tokens finished` rows to --out, in the order of the prompts.

    With --judge each has its `score`; with --best-of N it is the best of N draws, those that --samples N would write,
    and `sample` says which.
    """
    from palate.data.sources import read_prompts

    check_model_options(config, config.model)
    check_new_file(config.out)
    rejects = rejects_file(config)
    records = read_prompts(config.data, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows)
    judge = scorer(config, records)
    loaded = load_policy(config, config.model)
    kept, refused = encoded(loaded, records, config.bad_rows)
    if not kept:
        raise DataError(f"no prompt of {config.data} is left", code="E104", next="look at the messages above")
    rows = complete(loaded, kept, config.model_copy(update={"samples": config.samples * config.best_of}))
    rows, chosen = (rows, {}) if judge is None else best_rows(config, judge, kept, rows)
    write_lines(config.out, rows)
    aside = [(raw, message) for _, raw, _, message in records.rejected] + as_they_stood(refused, config.format)
    finished = sum(row["finished"] for row in rows)
    return {
        "out": config.out,
        "completions": len(rows),
        "refused": len(aside),
        **write_rejects(rejects, aside, say),
        "finished": finished,
        "tokens": sum(row["tokens"] for row in rows),
        **chosen,
        "summary": "".join([f"{config.out}: {len(rows)} completions, {finished} finished", *told(chosen)]),
    }


def scorer(config: GenerateConfig, records):
    """The judge of --judge, who scores a completion by itself and knows the prompts; None where none is named."""
    from palate.sampling.judge import open_judge

    if config.judge is None:
        return None
    judge = open_judge(config.judge, device=config.device, seed=config.seed)
    judge.require_scores()
    if config.judge == "rule":
        check_prompts(judge, records)
    return judge


def check_prompts(judge, records: Sequence) -> None:
    """Nothing, where the rule knows every prompt; else its DataError with the prompt's line, before a model is run."""
    from palate.sampling.judge import Completion

    for record in records:
        try:
            judge.scores([record.prompt], [Completion("")])
        except DataError as error:
            error.where = error.where or str(record.source)
            raise


def best_rows(config: GenerateConfig, judge, kept: Sequence[tuple], rows: list[dict]) -> tuple[list[dict], dict]:
    """The best of every --best-of rows with its score, and what the result says of them.

    kl_bound: nats; the law of what is kept has no larger KL to the law that was sampled.
    """
    from palate.sampling.best_of import best_of
    from palate.sampling.judge import Completion
    from palate.worlds.enumerable import best_of_kl_bound

    n = config.best_of
    parts = [rows[start : start + n] for start in range(0, len(rows), n)]
    prompts = [kept[place // config.samples][0].prompt for place in range(len(parts))]
    drawn = [[Completion(row["completion"], row["finished"]) for row in part] for part in parts]
    found = best_of(judge, prompts, drawn)
    return [part[best.place] | {"score": best.score} for part, best in zip(parts, found, strict=True)], {
        "judge": config.judge,
        "best_of": n,
        "score": sum(best.score for best in found) / len(found),
        "score_drawn": sum(sum(best.scores) for best in found) / len(rows),
        "kl_bound": best_of_kl_bound(n),
    }


def told(chosen: dict[str, Any]) -> list[str]:
    """What the summary adds where a judge scored the draws."""
    if not chosen:
        return []
    if chosen["best_of"] == 1:
        return [f"; mean score {chosen['score']:.4g} by {chosen['judge']}"]
    return [
        f"; best of {chosen['best_of']} by {chosen['judge']}: mean score {chosen['score_drawn']:.4g} of all draws, "
        f"{chosen['score']:.4g} of those kept; at most {chosen['kl_bound']:.2f} nats from the model"
    ]


def load_policy(config, name: str):
    """The model of this name with its tokenizer, under the options of the verb."""
    from palate.data.template import load_template
    from palate.model.load import load

    loaded = with_own_tokenizer(
        load(name, device=config.device, trust_remote_code=config.trust_remote_code, revision=config.revision)
    )
    if config.chat_template is not None:
        load_template(config.chat_template, loaded.tokenizer)
    return loaded


def encoded(loaded, records, bad_rows: str = "stop") -> tuple[list[tuple], list[tuple]]:
    """(record, ids) of every prompt that the model can complete, and (record, error) of the others under "skip".

    Raises DataError (E200) naming the first 20 of these under "stop".
    """
    from palate.data.tokens import encode_prompt
    from palate.model.load import context

    kept, refused, limit = [], [], context(loaded.model)
    for record in records:
        try:
            prompt = encode_prompt(record.prompt, loaded.tokenizer, where=str(record.source))
            if limit is not None and len(prompt) >= limit:
                what = f"the prompt has {len(prompt)} tokens, the model takes {limit} with the completion"
                raise DataError(what, where=str(record.source), code="E223", next="shorten it, or use --bad-rows skip")
            if not len(prompt):
                what = "the prompt has no tokens, so nothing predicts a first one"
                raise DataError(what, where=str(record.source), code="E222", next="give it some text")
            kept.append((record, prompt))
        except DataError as error:
            refused.append((record, error))
    if refused and bad_rows == "stop":
        raise DataError(
            f"{len(refused)} prompts cannot be completed; the first:\n"
            + "\n".join(str(error) for _, error in refused[:20]),
            code="E200",
            next="mend these rows, or use --bad-rows skip",
        )
    return kept, refused


def complete(loaded, kept: Sequence[tuple], config) -> list[dict[str, Any]]:
    """`prompt completion sample logp tokens finished` of every sample of the prompts that `encoded` kept."""
    return as_rows(loaded, kept, draw(loaded, kept, config))


def draw(loaded, kept: Sequence[tuple], config) -> list:
    """The samples of the prompts that `encoded` kept, in their order."""
    from palate.data.tokens import end_tokens
    from palate.sampling.generate import generate

    return generate(
        loaded.model,
        loaded.tokenizer,
        [ids for _, ids in kept],
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        samples=config.samples,
        seed=config.seed,
        end_ids=end_tokens(loaded.tokenizer),
    )


def as_rows(loaded, kept: Sequence[tuple], made: Sequence) -> list[dict[str, Any]]:
    """What is written of each sample."""
    from palate.sampling.generate import text_of

    return [
        {
            "prompt": plain_prompt(kept[sample.prompt][0].prompt),
            "completion": text_of(sample, kept[sample.prompt][1], loaded.tokenizer),
            "sample": sample.sample,
            "logp": sample.logp,
            "tokens": len(sample.ids),
            "finished": sample.finished,
        }
        for sample in made
    ]
