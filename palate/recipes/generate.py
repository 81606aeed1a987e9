"""Prompts and a policy to completions."""

from typing import Annotated, Any

from pydantic import Field

from palate.errors import DataError
from palate.recipes.verbs import (
    InputConfig,
    check_model_options,
    check_new_file,
    stderr,
    with_own_tokenizer,
    write_lines,
)


class GenerateConfig(InputConfig):
    """Options of `palate generate`."""

    out: Annotated[str, Field(description="JSONL file to write; one object a completion")]
    max_tokens: Annotated[int, Field(gt=0, description="New tokens at most, the end token included")] = 256
    temperature: Annotated[float, Field(ge=0, le=100, description="0 takes the likeliest token")] = 1.0
    samples: Annotated[int, Field(gt=0, description="Completions of each prompt")] = 1
    seed: Annotated[int, Field(ge=0, description="Of the draws; every completion has its own")] = 0


def run(config: GenerateConfig, *, verb: str = "generate", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """Writes `prompt completion sample logp tokens finished` rows to --out, in the order of the prompts."""
    from palate.data.sources import read_prompts
    from palate.data.template import load_template
    from palate.data.tokens import encode_prompt, end_tokens
    from palate.model.load import context, load
    from palate.sampling.generate import generate, text_of

    check_model_options(config, config.model)
    check_new_file(config.out)
    records = read_prompts(config.data, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows)
    loaded = with_own_tokenizer(
        load(config.model, device=config.device, trust_remote_code=config.trust_remote_code, revision=config.revision)
    )
    tokenizer = loaded.tokenizer
    if config.chat_template is not None:
        load_template(config.chat_template, tokenizer)
    kept, prompts, refused, limit = [], [], [], context(loaded.model)
    for record in records:
        try:
            prompt = encode_prompt(record.prompt, tokenizer, where=str(record.source))
            if limit is not None and len(prompt) >= limit:
                what = f"the prompt has {len(prompt)} tokens, the model takes {limit} with the completion"
                raise DataError(what, where=str(record.source), code="E223", next="shorten it, or use --bad-rows skip")
            if not len(prompt):
                what = "the prompt has no tokens, so nothing predicts a first one"
                raise DataError(what, where=str(record.source), code="E222", next="give it some text")
            prompts.append(prompt)
            kept.append(record.prompt)
        except DataError as error:
            refused.append(str(error))
    if refused and config.bad_rows == "stop":
        raise DataError(
            f"{len(refused)} prompts cannot be completed; the first:\n" + "\n".join(refused[:20]),
            code="E200",
            next="mend these rows, or use --bad-rows skip",
        )
    if not prompts:
        raise DataError(f"no prompt of {config.data} is left", code="E104", next="look at the messages above")
    ends = end_tokens(tokenizer)
    made = generate(
        loaded.model,
        tokenizer,
        prompts,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        samples=config.samples,
        seed=config.seed,
        end_ids=ends,
    )
    rows = []
    for sample in made:
        prompt = kept[sample.prompt]
        rows.append(
            {
                "prompt": prompt
                if isinstance(prompt, str)
                else [{"role": m.role, "content": m.content} for m in prompt],
                "completion": text_of(sample, prompts[sample.prompt], tokenizer),
                "sample": sample.sample,
                "logp": sample.logp,
                "tokens": len(sample.ids),
                "finished": sample.finished,
            }
        )
    write_lines(config.out, rows)
    finished = sum(row["finished"] for row in rows)
    return {
        "out": config.out,
        "completions": len(rows),
        "refused": len(refused) + len(records.rejected),
        "finished": finished,
        "tokens": sum(row["tokens"] for row in rows),
        "summary": f"{config.out}: {len(rows)} completions, {finished} finished",
    }
