"""What a round asks: the next prompts of a file, or new requests that the model writes after those of the seed."""

from collections.abc import Sequence
from random import Random
from typing import Any

from palate.data.records import Message, Prompt, Records, Text, plain
from palate.errors import DataError
from palate.recipes import chain, stages
from palate.recipes.rounds import Round
from palate.recipes.verbs import every_tenth

WRITTEN = "written"  # --new-prompts: by the model
ATTEMPTS = 2  # requests that are written for each that is wanted
WRITING = 2**29  # added to the seed of what is written


def of_file(this: Round, name: str, count: int) -> Records[Prompt]:
    """`count` prompts of the file: another part of it every round, from the beginning again where it ends.

    Those that rounds are compared on are left out, and what stands there twice is taken once.
    """
    found = read(this.config, name)
    compared = _compared(this)
    distinct = {record.prompt: record for record in found if record.prompt not in compared}
    if not distinct:
        what = "holds no prompts but those that rounds are compared on"
        raise DataError(what, where=name, code="E104", next="name others by --new-prompts")
    rows = list(distinct.values())
    if (needed := count * this.config.rounds) > len(rows) and this.number == 1:
        this.say(f"new prompts: {name} has {len(rows)}, {needed} are asked for: rounds meet some again")
    at = (this.number - 1) * count
    mine = tuple(rows[(at + k) % len(rows)] for k in range(min(count, len(rows))))
    return Records(mine, found.sources, found.dropped, found.rejected, found.notes, found.warnings)


def read(config, name: str) -> Records[Prompt]:
    """The prompts of a file."""
    from palate.data.sources import read_prompts

    return read_prompts(name, bad_rows=config.bad_rows)


def _compared(this: Round) -> set[Text]:
    """The prompts that rounds are compared on; what round 1 holds out of its own is in its own."""
    file = this.out / "prompts.jsonl"
    if this.config.compared_on is not None:
        return {record.prompt for record in stages.read_compared(this.config)}
    return {record.prompt for record in _file(file)} if this.number > 1 else set()


def _file(path) -> Sequence[Prompt]:
    from palate.data.sources import read_prompts

    return read_prompts(str(path), format="jsonl") if path.exists() and path.stat().st_size else ()


def by_model(this: Round, seed: Sequence[Prompt], count: int) -> Records[Prompt]:
    """At most `count` new requests that --model writes, and keeps writing after itself and the seed, in asked.jsonl.

    They come in the form of the first request that was shown: its system message, and whether it is a conversation.
    Those that resemble the seed, an earlier round's or what rounds are compared on are left out.
    """
    from palate.files import write_json, write_json_lines

    if this.config.dry_run:  # nothing is written: as many of the seed stand for them
        return Records(tuple(seed[k % len(seed)] for k in range(count)))
    file = this.folder / "asked.jsonl"
    if not file.exists():
        kept, left_out = _chosen(this, seed, count)
        write_json(this.folder / "asked.json", {"wanted": count, "kept": len(kept), "left_out": left_out})
        write_json_lines(file, kept)
    if not file.stat().st_size:
        what = f"{this.config.model} wrote no new request that can be used"
        hint = "name a file of prompts by --new-prompts"
        raise DataError(what, where=str(this.folder / "asked.json"), code="E104", next=hint)
    return Records(tuple(_file(file)))


def _chosen(this: Round, seed: Sequence[Prompt], count: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows of asked.jsonl, and why the others are not among them."""
    from palate.sampling.requests import new_ones

    own = [one for number in range(1, this.number) for one in _file(chain.folder_of(this.out, number) / "asked.jsonl")]
    rows = _written(this, seed, own, ATTEMPTS * count)
    known = [asked(text) for text in (*(p.prompt for p in (*seed, *own)), *_compared(this))]
    places, left_out = new_ones(((row["request"], row["ended"]) for row in rows), known, count)
    why = ", ".join(f"{number} {reason}" for reason, number in left_out.items() if number)
    this.tell(f"{len(places)} new requests, {count} were wanted; left out: {why or 'none'}")
    return [{"prompt": rows[place]["prompt"]} for place in places], left_out


def _written(this: Round, seed: Sequence[Prompt], own: Sequence[Prompt], attempts: int) -> list[dict[str, Any]]:
    """What the model writes, in chunks: row by row a request, whether it ended, and the prompt that it becomes."""
    import hashlib

    from palate.data.tokens import encode_prompt, end_tokens
    from palate.model.load import context
    from palate.sampling import requests
    from palate.sampling.chunks import Chunks
    from palate.sampling.generate import generate, text_of

    loaded = this.load(this.config.model)
    texts = {asked(prompt.prompt): prompt for prompt in (*seed, *own)}
    ours, mine = list(dict.fromkeys(asked(p.prompt) for p in seed)), list(dict.fromkeys(asked(p.prompt) for p in own))
    ends = end_tokens(loaded.tokenizer) | requests.line_ends(loaded.tokenizer)
    limit = context(loaded.model)

    def work(start: int, stop: int):
        lists = [requests.shown(ours, mine, Random(f"palate requests {this.seed} {n}")) for n in range(start, stop)]
        prompts = [encode_prompt(requests.few_shot(found), loaded.tokenizer) for found in lists]
        prompts = prompts if limit is None else [ids[-(limit - requests.TOKENS) :] for ids in prompts]
        made = generate(
            loaded.model,
            loaded.tokenizer,
            prompts,
            max_tokens=requests.TOKENS,
            temperature=requests.TEMPERATURE,
            seed=this.seed + WRITING,
            numbers=range(start, stop),
            end_ids=ends,
        )
        for one, found in zip(made, lists, strict=True):
            text, ended = requests.request_of(text_of(one, prompts[one.prompt], loaded.tokenizer), one.finished)
            yield {"request": text, "ended": ended, "prompt": plain(like(texts[found[0]].prompt, text))}

    known = hashlib.sha256("\n".join([*ours, "", *mine]).encode()).hexdigest()
    chunks = Chunks(this.folder / "written", attempts, this.config.chunk, {"model": loaded.fingerprint, "known": known})
    this.tell(f"{this.config.model} writes {attempts} requests")
    chunks.make(work, tell=every_tenth(lambda done, todo: this.tell(f"wrote {done} of {todo} requests")))
    return chunks.rows()


def asked(prompt: Text) -> str:
    """What the person asks for: a plain prompt itself, of a conversation the last turn."""
    return prompt if isinstance(prompt, str) else prompt[-1].content


def like(prompt: Text, text: str) -> Text:
    """Another request in the form of this one."""
    return text if isinstance(prompt, str) else (*prompt[:-1], Message("user", text))
