"""Judges: which of two completions is better, or how good one is. One interface for comparing, pairing and rewarding.

A name becomes a judge: `rule` (the built-in world's truth), `random` (the null control), `implicit:RUN`, a reward
model's folder, `policy:MODEL` (a language model that is asked), `people:VOTES.jsonl` (who vote in that file),
`module:function`, `enumerable:SEED` (the reward that SEED draws in the world that can be listed).
"""

import hashlib
import importlib
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from palate.data.records import Demonstration, Message, Text, plain
from palate.data.tokens import TokenGroup, encode_prompt, end_tokens, tokenize
from palate.errors import DataError, ModelError, NotThereError, PalateError, UsageError
from palate.sampling.pairing import unfit

NAMES = (
    "rule", "random", "implicit:RUN", "a reward model's folder", "policy:MODEL", "people:VOTES.jsonl", "module:function"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Completion:
    """What a judge sees of a completion: its text, and whether it ended with an end token rather than being cut."""

    text: str
    finished: bool = True


Completions: TypeAlias = Sequence[Completion]
Score = Callable[[Sequence[Text], Completions], Sequence[float | None]]
Choose = Callable[[Sequence[Text], Completions, Completions], Sequence[float]]


@dataclass(frozen=True)
class Judge:
    """A name and one of two functions: `score` gives a completion a number, `choose` compares two.

    score: (prompts, completions) -> one finite number each, larger is better; None where a judge that writes its score
        wrote none that can be read.
    costly: whether each of its scores has to be written, so that it is not asked in vain.
    choose: (prompts, firsts, seconds) -> one vote each: 1 for the first, 0 for the second, 0.5 for neither. Votes may
        depend on the order: `prefer` asks for both.
    """

    name: str
    score: Score | None = None
    choose: Choose | None = None
    costly: bool = False

    @property
    def scores_alone(self) -> bool:
        """Whether the judge gives a completion a number by itself, as rewards and best-of-N need it."""
        return self.score is not None

    def require_scores(self, where: str = "judge") -> None:
        """Nothing, where it gives a completion a number by itself; UsageError (E308) for a judge that only compares.

        where: the option that names it.
        """
        if self.score is None:
            what = f"{self.name} compares two completions, it gives none a score"
            raise UsageError(what, where=where, code="E308", next="take a judge of one completion")

    def ratings(self, prompts: Sequence[Text], completions: Completions) -> list[float | None]:
        """One number a completion, larger is better, or None. What is there twice is asked once, so it has one score.

        Raises UsageError for a judge that only compares, DataError (E601) where a number is not finite.
        """
        self.require_scores()
        assert self.score is not None
        asked = dict.fromkeys(zip(prompts, completions, strict=True))
        values = self.score([prompt for prompt, _ in asked], [completion for _, completion in asked])
        _finite([value for value in values if value is not None], self.name)
        known = dict(zip(asked, (None if value is None else float(value) for value in values), strict=True))
        return [known[case] for case in zip(prompts, completions, strict=True)]

    def scores(self, prompts: Sequence[Text], completions: Completions) -> list[float]:
        """As `ratings`, for those who need a number of every completion: DataError (E601) where one has none."""
        values = self.ratings(prompts, completions)
        found = [value for value in values if value is not None]
        if len(found) < len(values):
            what = f"judge {self.name} gave {len(values) - len(found)} of {len(values)} completions no score"
            raise DataError(what, code="E601", next="take a judge that scores every completion")
        return found

    def standings(self, prompts: Sequence[Text], completions: Completions, each: int) -> list[float | None]:
        """As `ratings`, for samples to make pairs of; of a judge that only compares the share of a prompt's other
        completions that each one beats, a tie being half a win.

        each: consecutive completions of one prompt, of which such a judge needs at least two. Who compares, or is
        costly, is not asked about what can be no side of a pair (`pairing.unfit`), which has None.
        """
        compares = self.choose is not None and each > 1
        asked = places(completions) if compares or self.costly else list(range(len(completions)))
        there = [prompts[place] for place in asked], [completions[place] for place in asked]
        values = self._shares(*there, [place // each for place in asked]) if compares else self.ratings(*there)
        known = dict(zip(asked, values, strict=True))
        return [known.get(place) for place in range(len(completions))]

    def _shares(self, prompts: Sequence[Text], completions: Completions, owners: Sequence[int]) -> list[float]:
        """The share of the others of the same owner that each completion beats; one half where there is no other."""
        rivals = [list(mine) for _, mine in groupby(range(len(completions)), lambda place: owners[place])]
        meetings = [meeting for mine in rivals for meeting in combinations(mine, 2)]
        ones, twos = ([completions[meeting[side]] for meeting in meetings] for side in (0, 1))
        met: list[list[float]] = [[] for _ in completions]
        for (i, j), outcome in zip(meetings, self.prefer([prompts[i] for i, _ in meetings], ones, twos), strict=True):
            met[i].append(outcome)
            met[j].append(1 - outcome)
        return [sum(outcomes) / len(outcomes) if outcomes else 0.5 for outcomes in met]

    def prefer(self, prompts: Sequence[Text], firsts: Completions, seconds: Completions) -> list[float]:
        """One outcome each: 1 where the first is better, 0 where the second is, 0.5 for a tie.

        Equal completions tie unasked, and so does one without a score. A judge of two is asked in both orders, and
        what it does not say twice is a tie.
        Source of that rule: Zheng et al. 2023, arXiv:2306.05685, section 3.4.
        """
        if self.choose is None:
            both = self.ratings([*prompts, *prompts], [*firsts, *seconds])
            return outcomes_of(both[: len(firsts)], both[len(firsts) :])
        cases = zip(prompts, firsts, seconds, strict=True)
        asked = list(dict.fromkeys(case for case in cases if case[1] != case[2]))
        if not asked:
            return [0.5] * len(firsts)
        there = [list(part) for part in zip(*asked, strict=True)]
        votes = self.choose(  # one call for both orders
            [*there[0], *there[0]], [*there[1], *there[2]], [*there[2], *there[1]]
        )
        votes = _finite(votes, self.name)
        known = {}
        for case, one, two in zip(asked, votes[: len(asked)], votes[len(asked) :], strict=True):
            known[case] = 1.0 if one > 0.5 > two else 0.0 if one < 0.5 < two else 0.5
        return [known.get(case, 0.5) for case in zip(prompts, firsts, seconds, strict=True)]


def places(completions: Completions) -> list[int]:
    """Which of the completions may be a side of a pair."""
    return [place for place, one in enumerate(completions) if unfit(one.text, one.finished) is None]


def outcomes_of(firsts: Sequence[float | None], seconds: Sequence[float | None]) -> list[float]:
    """One outcome for each two scores: 1 where the first is larger, 0 where it is smaller, else 0.5, None a tie too."""
    return [
        0.5 if a is None or b is None else float(a > b) + (a == b) / 2 for a, b in zip(firsts, seconds, strict=True)
    ]


def open_judge(name: str, *, device: str = "cpu", seed: int = 0) -> Judge:
    """The judge that `name` stands for. seed: of `random`, of what `policy:MODEL` says. device: of models that judge.

    Raises UsageError (E303) where nothing is called so, NotThereError, and what loading a model raises.
    """
    if name == "rule":
        return Judge(name, score=_rule)
    if name == "random":
        return Judge(name, score=_random(seed))
    if name.startswith("enumerable:"):
        return Judge(name, score=_listed(name.removeprefix("enumerable:")))
    if name.startswith("implicit:"):
        return implicit(name.removeprefix("implicit:"), device=device)
    if name.startswith("people:"):
        from palate.sampling.votes import people

        return people(name.removeprefix("people:"))
    if name.startswith("policy:"):
        return asked_model(name.removeprefix("policy:"), device=device, seed=seed)
    if Path(name).expanduser().is_dir():
        return reward_model(name, device=device)
    module, colon, function = name.rpartition(":")
    if colon and all(part.isidentifier() for part in (*module.split("."), function)):
        return from_callable(_imported(module, function), name)
    known = {"rule": "rule", "random": "random", "implicit": "implicit:RUN", "policy": "policy:MODEL"}
    known |= {"enumerable": "enumerable:SEED", "people": "people:VOTES.jsonl"}
    if os.sep in name or name.startswith(("~", ".")):
        raise NotThereError("no such folder", where=name, code="E101", next="name a reward model's folder")
    near = get_close_matches(name.partition(":")[0], known, n=1)
    hint = f"did you mean {known[near[0]]}" if near else f"use {', '.join(NAMES)}"
    raise UsageError(f'there is no judge "{name[:80]}"', where="judge", code="E303", next=hint)


# --- rule and chance -------------------------------------------------------------------------------------------------


def _rule(prompts: Sequence[Text], completions: Completions) -> list[float]:
    from palate.worlds.reviews import judge

    return [judge(p, completion.text, completion.finished) for p, completion in zip(prompts, completions, strict=True)]


def _listed(seed: str) -> Score:
    from palate.worlds.enumerable import World

    if not (seed.isascii() and seed.isdigit()):
        raise UsageError(f'"{seed[:80]}" is no seed', where="judge", code="E303", next="write enumerable:0")
    world = World()
    reward = world.reward(int(seed))

    def score(prompts, completions):
        cases = (world.place(str(p), c.text) for p, c in zip(prompts, completions, strict=True))
        return [float(reward[case]) for case in cases]

    return score


def _random(seed: int) -> Score:
    """Uniform in [0, 1) by a hash of seed, prompt and completion: no order and no neighbour moves it."""

    def score(prompts, completions):
        texts = (f"palate judge {seed} {prompt!r} {c!r}" for prompt, c in zip(prompts, completions, strict=True))
        digests = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts)
        return [int.from_bytes(digest[:6], "big") / 2**48 for digest in digests]

    return score


# --- models ----------------------------------------------------------------------------------------------------------


def implicit(run: str | os.PathLike, *, device: str = "cpu") -> Judge:
    """The implicit reward of a finished preference run: beta times its model's log-ratio to its reference.

    As the run's own metrics count it: per token where the loss compares means, the log-prob alone where the loss has
    no reference. Source: Rafailov et al. 2023, arXiv:2305.18290, section 5.1.
    Raises NotThereError, CheckpointError (E501), UsageError (E308) for other runs, ModelError (E409) where the
    reference's weights are no longer those that the run began with.
    """
    from palate import losses
    from palate.model.load import load
    from palate.run import status_of

    folder = Path(run).expanduser()
    if not (folder / "run.json").is_file():
        raise NotThereError("there is no run here", where=str(run), code="E101", next="palate runs list names them")
    if (status := status_of(folder)) != "done":
        what = f"this run is {status}, so it cannot judge"
        raise UsageError(what, where=str(run), code="E308", next="finish it with --resume")
    config, parents = _run_config(folder)
    loss = config.get("loss")
    if loss not in losses.LOSSES:
        what = "this run learnt from no preferences, so it implies no reward"
        raise UsageError(what, where=str(run), code="E308", next="name a run of palate dpo or kto")
    given = dict(config.get("loss_options") or {})
    options = losses.check_options(loss, given | ({"beta": config["beta"]} if config.get("beta") is not None else {}))
    policy = load(folder, device=device)
    reference = None
    if losses.info(loss).reference:
        other = config.get("reference") or config["model"]
        try:
            reference = load(other, device=device, seed=config.get("seed") or 0, revision=config.get("revision"))
        except PalateError as error:
            error.next = f"put {other} back: implicit:{run} is measured against it"
            raise
        if config.get("reference") is None:
            _check_start(reference.model, parents, other)
    scale, normalised = losses.reward_scale(loss, options), losses.is_normalised(loss, options)

    def score(prompts, completions):
        groups = token_groups(prompts, completions, policy)
        values = _logps(policy.model, groups)
        if reference is not None:
            values = values - _logps(reference.model, groups)
        if normalised:
            values = values / [max(1, len(group.completions[0])) for group in groups]
        return (scale * values).tolist()

    return Judge(f"implicit:{run}", score=score)


def reward_model(folder: str | os.PathLike, *, device: str = "cpu") -> Judge:
    """The reward model in a folder; see `model.reward.load_reward`. It reads prompt and completion as training does."""
    from palate.model.reward import load_reward, rewards

    loaded = load_reward(folder, device=device)

    def score(prompts, completions):
        groups = token_groups(prompts, completions, loaded)
        return rewards(loaded.model, [[*group.prompt.tolist(), *group.completions[0].tolist()] for group in groups])

    return Judge(os.fspath(folder), score=score)


def asked_model(name: str, *, device: str = "cpu", seed: int = 0) -> Judge:
    """A language model that is asked three times for points: the mean of what can be read, None where nothing can.

    By the rubric of the built-in world where the model comes from a built-in one, else by the additive one.
    Raises what loading raises, ModelError (E401) where the model has no tokenizer.
    """
    from palate.model.load import load
    from palate.sampling.rubric import ModelJudge, default_rubric

    loaded = load(name, device=device)
    if loaded.tokenizer is None:
        what = "has no tokenizer, so it can be asked nothing"
        raise ModelError(what, where=name, code="E401", next="train it first, or name another")
    asked = ModelJudge(loaded, default_rubric(name), seed=seed)

    def score(prompts, completions):
        return [judged.score for judged in asked.judge(prompts, [completion.text for completion in completions])]

    return Judge(f"policy:{name}", score=score, costly=True)


def token_groups(prompts: Sequence[Text], completions: Completions, loaded) -> list[TokenGroup]:
    """One group a completion, ids as in training: with the end token where it is finished, cut at the context.

    A conversation goes through the chat template; where the tokenizer has none, its contents stand as paragraphs.
    """
    from palate.model.load import context

    tokenizer, limit = loaded.tokenizer, context(loaded.model)
    ends, groups = end_tokens(tokenizer), []
    for prompt, completion in zip(prompts, completions, strict=True):
        if not isinstance(prompt, str) and not tokenizer.chat_template:
            prompt = "\n\n".join(message.content for message in prompt) + "\n\n"
        if not completion.text:  # it ended before it said anything: only that is left to score
            ids = encode_prompt(prompt, tokenizer)[-limit + 1 if limit else 0 :]
            end = np.array(sorted(ends)[:1] if completion.finished else [], dtype=np.int32)
            groups.append(TokenGroup(ids, (end,), (((0, len(end)),),)))
            continue
        reply = completion.text if isinstance(prompt, str) else (Message("assistant", completion.text),)
        group = tokenize(Demonstration(prompt, reply), tokenizer, max_length=limit)
        ids, stop = group.completions[0], group.spans[0][-1][1]
        if not completion.finished and int(ids[stop - 1]) in ends:
            stop -= 1
        groups.append(TokenGroup(group.prompt, (ids[:stop],), (((0, stop),),)))
    return groups


def _logps(model, groups: Sequence[TokenGroup]) -> np.ndarray:
    from palate.reference import reference_column
    from palate.scoring import Numerics

    column = reference_column(groups, model, numerics=Numerics.of(model))
    return column.values[column.first[:-1]]


def _run_config(folder: Path) -> tuple[dict[str, Any], list]:
    """config.yaml of a run, and the parents that run.json names."""
    import yaml

    from palate.errors import CheckpointError
    from palate.files import read_json

    file = folder / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        what = "cannot be read: no keys with values"
        raise CheckpointError(what, where=str(file), code="E501", next="put a copy of the file back")
    return config, list(read_json(folder / "run.json").get("parents") or [])


def _check_start(model, parents: list, name: str) -> None:
    """Nothing, where the weights are those that the run began with, under whichever precision it ran."""
    from palate.reference import reference_identity

    began = {parent.get("identity") for parent in parents if isinstance(parent, dict)}
    now = {reference_identity(model, precision) for precision in ("float32", "bfloat16")}
    if began and not began & now:
        what = "its weights are not those that the run began with"
        raise ModelError(what, where=name, code="E409", next="put them back, or take another judge")


# --- a function of the user's ----------------------------------------------------------------------------------------


def from_callable(function: Callable, name: str) -> Judge:
    """The judge that a Python function makes, by what it takes.

    (prompt, completion) -> a finite number, larger is better; or (prompt, first, second) -> who is better, in [0, 1]
    (1 the first) or in -1, 0, 1: where any vote of a call is negative, all are read so. A prompt is a string, or a
    list of {"role", "content"}; completions are strings. A function that also takes `finished` is told, by that name,
    whether the completion (or each of the two) ended by itself.
    Raises UsageError (E308) for other signatures. What it raises when called becomes DataError (E601).
    """
    count, takes_finished = _signature(function, name)

    def ask(prompt: Text, *given: Completion):
        ended = tuple(completion.finished for completion in given)
        extra = {"finished": ended if count == 3 else ended[0]} if takes_finished else {}
        try:
            return _number(function(plain(prompt), *(completion.text for completion in given), **extra), name)
        except PalateError as error:
            error.where = error.where or _start(prompt)
            raise
        except Exception as error:
            words = " ".join(str(error).split())[:200]
            what = f"judge {name} failed on a prompt: {type(error).__name__}: {words}"
            raise DataError(what, where=_start(prompt), code="E601", next="mend the function") from error

    if count == 2:
        return Judge(name, score=lambda *columns: [ask(*case) for case in zip(*columns, strict=True)])

    def choose(prompts, firsts, seconds):
        votes = [ask(*case) for case in zip(prompts, firsts, seconds, strict=True)]
        signed = any(vote < 0 for vote in votes)
        for prompt, vote in zip(prompts, votes, strict=True):
            if vote not in (-1, 0, 1) if signed else not 0 <= vote <= 1:
                what = f"judge {name} gave {vote:g}, which is neither in [0, 1] nor -1, 0 or 1"
                raise DataError(what, where=_start(prompt), code="E601", next="mend the function")
        return [(vote + 1) / 2 for vote in votes] if signed else votes

    return Judge(name, choose=choose)


def _imported(module: str, function: str) -> Callable:
    """The function, from the working directory or wherever Python finds the module."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and module.startswith(error.name):
            what, hint = f'there is no Python module "{error.name}"', "check the spelling, or go to the folder it is in"
        else:
            what = f'the module "{module}" cannot be imported: {type(error).__name__}: {" ".join(str(error).split())}'
            hint = "mend the module"
        raise UsageError(what[:400], where="judge", code="E303", next=hint) from error
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)  # for what it imports when called; last, so that it hides nothing
    made = getattr(found, function, None)
    if not callable(made):
        near = get_close_matches(function, [key for key in vars(found) if callable(getattr(found, key))], n=1)
        hint = f"did you mean {module}:{near[0]}" if near else "name a function of the module"
        raise UsageError(f'"{module}" has no function "{function}"', where="judge", code="E303", next=hint)
    return made


def _signature(function: Callable, name: str) -> tuple[int, bool]:
    """How many arguments must be given, 2 or 3, and whether it also takes `finished`."""
    wanted = "(prompt, completion) -> number, or (prompt, first, second) -> number"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        parameters = []
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "finished"]
    needed = [p for p in places if p.default is p.empty]
    others = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name != "finished"]
    if len(needed) not in (2, 3) or others:
        shown = ", ".join(str(p) for p in parameters)
        raise UsageError(f"judge {name} takes ({shown})", where="judge", code="E308", next=f"write {wanted}")
    return len(needed), any(p.name == "finished" and p.kind is not p.POSITIONAL_ONLY for p in parameters)


def _start(prompt: Text) -> str:
    """The beginning of a prompt, for a message."""
    text = prompt if isinstance(prompt, str) else prompt[-1].content if prompt else ""
    return f"prompt {text[:60]!r}"


def _number(value: Any, name: str) -> float:
    if hasattr(value, "item") and not isinstance(value, numbers.Real):  # a tensor of one element
        value = value.item()
    if not isinstance(value, numbers.Real):
        what = f"judge {name} gave {type(value).__name__} {str(value)[:60]!r}, no number"
        raise DataError(what, code="E601", next="return a number")
    return float(value)


def _finite(values: Sequence[float], name: str) -> list[float]:
    values = [float(value) for value in values]
    if bad := [value for value in values if not math.isfinite(value)]:
        what = f"judge {name} gave {len(bad)} numbers that are not finite, such as {bad[0]}"
        raise DataError(what, code="E601", next="mend the judge, or take another")
    return values
