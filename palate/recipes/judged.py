"""What rounds share whose samples are judged: whom --judge names, the best against the worst, how well was judged."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from palate.data.records import Text
from palate.errors import DataError
from palate.recipes.rounds import Band, Case, Round, RoundsConfig, Scorer, by

JUDGING = 2**30  # added to the seed of what judges write
POLICY, MODEL = "policy", "policy:"


class JudgedConfig(RoundsConfig):
    """Options of every verb that has its samples judged."""

    judge: Annotated[
        str,
        Field(description="Who judges: policy (the round's start), policy:MODEL, rule, random, implicit:RUN, a reward "
              "model's folder, people:VOTES.jsonl, module:function"),
    ] = POLICY  # fmt: skip
    candidates: Annotated[int, Field(ge=2, description="Samples of each prompt, of which the best and worst pair")] = 4
    judgements: Annotated[int, Field(gt=0, description="How often a policy judges each sample; the mean counts")] = 3
    judge_template: Annotated[
        str | None,
        Field(description="What a policy is asked: additive, reviews, or a file with {prompt} and {completion}; "
              "default: reviews for models made from built-in ones, else additive"),
    ] = None  # fmt: skip
    judge_temperature: Annotated[float, Field(ge=0, lt=math.inf, description="Of a policy's judgements")] = 0.7
    judge_tokens: Annotated[int, Field(gt=0, description="New tokens of a judgement at most")] = 256
    length_control: Band = None
    beta: Annotated[float, Field(gt=0, lt=math.inf, description="Of the DPO loss of every round")] = 0.1


def rubric(config: JudgedConfig):
    """What a policy is asked."""
    from palate.sampling.rubric import default_rubric, load_rubric

    return default_rubric(config.model) if config.judge_template is None else load_rubric(config.judge_template)


def template_source(config: JudgedConfig) -> list[dict[str, Any]]:
    """The judge's template as a source of data that may not change, where it is a file."""
    from palate.files import sha256_file
    from palate.sampling.rubric import BUILTIN

    name = config.judge_template
    if name is None or name in BUILTIN:
        return []
    return [{"path": name, "sha256": sha256_file(Path(name).expanduser()), "rows": 1}]


def check_judge(config: JudgedConfig) -> None:
    """Nothing, where --judge names one; else what opening it raises."""
    rubric(config)
    if not is_asked(config):
        _opened(config)


def is_asked(config: JudgedConfig) -> bool:
    """Whether a language model judges, by a template."""
    return config.judge == POLICY or config.judge.startswith(MODEL)


def scores_alone(config: JudgedConfig) -> bool:
    """Whether the judge gives a reply points by itself, rather than comparing two."""
    return is_asked(config) or _opened(config).scores_alone


def judge_of(this: Round, form: Text | None = None) -> tuple[str, Scorer]:
    """The name and the scorer of a round's judge, which is its start where that judges itself.

    form: a judge's prompt that the start has learnt from; its own are asked in the same form.
    """
    config = this.config
    if config.judge == POLICY:
        return "its own model", asked(this, this.loaded, form)
    if config.judge.startswith(MODEL):
        return config.judge, asked(this, this.load(config.judge.removeprefix(MODEL)))
    return config.judge, by(_opened(config), config.candidates)


def _opened(config: JudgedConfig):
    from palate.sampling.judge import open_judge

    return open_judge(config.judge, device=config.device, seed=config.seed)


def asked(this: Round, loaded, form: Text | None = None) -> Scorer:
    """The scorer that a language model is: the mean of its readable scores, with all that it said.

    form: whether it is asked in a conversation, and after which turns; else by the chat template, where there is one.
    """
    from palate.sampling.judge import places
    from palate.sampling.rubric import Judged, ModelJudge

    config = this.config
    judge = ModelJudge(
        loaded,
        rubric(config),
        judgements=config.judgements,
        temperature=config.judge_temperature,
        max_tokens=config.judge_tokens,
        seed=this.seed + JUDGING,
        chat=None if form is None else not isinstance(form, str),
        before=() if form is None or isinstance(form, str) else form[:-1],
    )

    def score(prompts: Sequence, completions: Sequence, first: int) -> Iterable[dict[str, Any]]:
        there = places(completions)  # what can be no side of a pair is not asked about
        mine = [prompts[place] for place in there], [completions[place].text for place in there]
        known = dict(zip(there, judge.judge(*mine, [first + place for place in there]), strict=True))
        for place in range(len(completions)):
            found = known.get(place, Judged(()))
            points = [one.score for one in found.judgements]
            yield {"score": found.score, "points": points, "said": [one.text for one in found.judgements]}

    return score


def pair(this: Round, cases: Sequence[Case]):
    """Of every prompt the sample with the highest score against that with the lowest."""
    from palate.sampling.pairing import best_and_worst, pairing

    band = this.config.length_control
    return pairing(best_and_worst(one.record.prompt, one.candidates, band, one.record.source) for one in cases)


def measured(this: Round, cases: Sequence[Case], _: Any) -> dict[str, Any]:
    """Columns of the row: who judged, what became of the judgements, and how well the own samples were judged.

    judge_truth: what the accuracy is measured against; null where nobody knows the truth of these samples.
    """
    from palate.evaluation.judging import agreement, histogram
    from palate.sampling.chunks import Chunks
    from palate.sampling.rubric import MOST

    rows = Chunks.there(this.folder / "judged").rows()
    told_of = [row for row, one in zip(rows, _candidates(cases), strict=True) if one.unfit is None]
    points = [one for row in told_of for one in row.get("points", [row["score"]])]
    row: dict[str, Any] = {
        "judge": this.config.judge,
        "unparsed_share": points.count(None) / len(points) if points else None,
        "histogram": histogram(points, MOST) if rows and "points" in rows[0] else None,
    }
    ended = [(number, one) for number, case in enumerate(cases) for one in case.candidates if one.finished]
    if (known := truth(this, cases)) is None or not ended:
        return row
    there = [value for value, one in zip(known, _candidates(cases), strict=True) if one.finished]
    found = agreement([one.score for _, one in ended], there, [number for number, _ in ended])
    return row | told("judge", found) | {"judge_truth": "rule"}


def told(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """An agreement with the truth as columns of a row, under a name."""
    keys = {"accuracy": "pairwise", "low": "low", "high": "high", "exact": "exact", "spearman": "spearman"}
    return {f"{name}_{key}": found[value] for key, value in keys.items()}


def truth(this: Round, cases: Sequence[Case]) -> list[float] | None:
    """The world's rule on every sample, where it is who compares and knows every prompt."""
    from palate.sampling.judge import Completion, open_judge

    if this.config.compared_by != "rule":
        return None
    prompts = [case.record.prompt for case in cases for _ in case.candidates]
    try:
        return open_judge("rule").scores(prompts, [Completion(one.text, one.finished) for one in _candidates(cases)])
    except DataError:
        return None


def _candidates(cases: Sequence[Case]) -> list:
    return [one for case in cases for one in case.candidates]
