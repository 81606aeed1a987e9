"""Prompts and a policy to completions."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field

from palate.errors import DataError
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


def run(config: GenerateConfig, *, verb: str = "generate", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """Writes `prompt completion sample logp tokens finished` rows to --out, in the order of the prompts."""
    from palate.data.sources import read_prompts

    check_model_options(config, config.model)
    check_new_file(config.out)
    rejects = rejects_file(config)
    records = read_prompts(config.data, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows)
    loaded = load_policy(config, config.model)
    kept, refused = encoded(loaded, records, config.bad_rows)
    if not kept:
        raise DataError(f"no prompt of {config.data} is left", code="E104", next="look at the messages above")
    rows = complete(loaded, kept, config)
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
        "summary": f"{config.out}: {len(rows)} completions, {finished} finished",
    }


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


def plain_prompt(prompt) -> str | list[dict[str, str]]:
    """A prompt as JSON has it: a string, or a list of messages."""
    return prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]
