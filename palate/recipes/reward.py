"""Preference pairs to a reward model: a scalar head on the decoder, trained by Bradley-Terry.

Rewards are normalised before training and after it: on samples of the starting model they have mean 0 and deviation 1,
so that one KL coefficient means the same thing for every reward model (Ziegler et al. 2019, arXiv:1909.08593, 2.2).
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

from pydantic import Field, model_validator

from palate.errors import UsageError
from palate.recipes.normalise import as_groups, draw, moments
from palate.recipes.plan import auto_rate, dry_run
from palate.recipes.rows import with_signal
from palate.recipes.training import Ending, TrainingConfig, open_folder, prepare, train
from palate.recipes.verbs import number, stderr

SAMPLES = "normalise.json"
SMALL, SMALL_RATE = 10e6, 1e-3  # parameters below which a reward model is learnt at this rate


class RewardConfig(TrainingConfig):
    """Options of `palate reward`."""

    margin: Annotated[
        float, Field(ge=0, lt=math.inf, description="Factor on the data's column margin, which rewards must differ by")
    ] = 0.0
    centring: Annotated[
        float,
        Field(ge=0, lt=math.inf, description="Weight of (chosen + rejected reward) squared; holds rewards at zero"),
    ] = 0.0
    normalise: Annotated[
        int, Field(ge=2, description="Samples of the starting model on which rewards get mean 0 and deviation 1")
    ] = 256
    samples: Annotated[int, Field(ge=0, description="Held-out pairs in the result, those it gets most wrong")] = 4
    truth: Annotated[
        str | None,
        Field(description="Judge whose scores are the true rewards of the labels, such as rule: what is lost to it"),
    ] = None

    @model_validator(mode="after")
    def _looked_at(self):
        if self.truth is not None and self.eval == "none":
            what = "has no effect without --eval"
            raise UsageError(what, where="truth", code="E316", next="drop one of the two")
        return self


@dataclass
class Watched:
    """What the page looks at besides the rows.

    policy: what the reward model is built from, for sampling; it shares its weights, and goes once it has sampled.
    samples: groups that rewards are normalised on. truth: the judge of --truth; margins: by it, of the held-out pairs.
    """

    truth: Any = None
    policy: Any = None
    samples: list[Any] = field(default_factory=list)
    margins: list[float] | None = None


def run(
    config: RewardConfig, *, verb: str = "reward", argv=(), say=stderr, panel=None, stop: int | None = None
) -> dict[str, Any]:
    """Trains a reward model from --model on the pairs or ranked lists of --data; returns the result object of --json.

    stop: as for `train`.
    """
    from palate.data.sources import read_pairs
    from palate.data.table import joined
    from palate.sampling.judge import open_judge
    from palate.train.objectives import reward

    out, ended = open_folder(config, verb, say)
    if ended is not None:
        return ended
    watched = Watched()
    if config.truth is not None:
        watched.truth = open_judge(config.truth, device=config.device, seed=config.seed)
        watched.truth.require_scores("truth")
    read = partial(read_pairs, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows)
    prepared = prepare(
        config,
        read,
        lambda numerics: reward("bradley_terry", numerics, margin=config.margin, centring=config.centring),
        usable=with_signal,
        say=say,
        rate_of=learning_rate,
        built=partial(with_head, config, watched),
    )
    check_margins(config, joined(prepared.rows.train, prepared.rows.held))
    if config.dry_run:
        return dry_run(config, prepared, say)
    return train(
        config,
        verb,
        out,
        prepared,
        argv=argv,
        say=say,
        panel=panel,
        annotate=partial(begin, config, prepared, watched, read, say),
        better="-eval/loss",
        verdict=verdict,
        stop=stop,
        ending=Ending(
            evaluate=partial(evaluate, watched),
            sample=lambda *_: [],
            save=partial(finish, config, prepared, watched, say),
            next="palate compare A B --data PROMPTS --judge {run}",
        ),
    )


def learning_rate(config: RewardConfig, parameters: int) -> tuple[float, str]:
    """As elsewhere, but for small models: their head and what it reads are learnt anew, which a low rate never does.

    On 4,800 pairs of the built-in world 1e-3 leaves 15 points to the truth, 2e-4 leaves 25 and 3e-3 leaves 17.
    """
    if config.lr == "auto" and parameters < SMALL and not config.lora_rank:
        return SMALL_RATE, "a reward model under 10 M parameters"
    return auto_rate(config, parameters)


def with_head(config: RewardConfig, watched: Watched, loaded):
    """The loaded model with a head of one number in place of its own; the old one, of the same weights, is kept."""
    from palate.data.tokens import end_tokens
    from palate.model.heads import set_pad, with_scalar_head

    watched.policy = loaded.model
    model = with_scalar_head(loaded.model, seed=config.seed)
    set_pad(model, loaded.tokenizer, end_tokens(loaded.tokenizer))
    return replace(loaded, model=model)


def check_margins(config: RewardConfig, groups) -> None:
    """Nothing, where --margin has margins to count, one of every pair; else UsageError (E316)."""
    if config.margin and (without := sum(group.margin is None for group in groups)):
        what = f"has no effect on the {without} of {len(groups)} rows that have no number in a column margin"
        raise UsageError(
            what, where="margin", code="E316", next="drop it, or name the column with --columns margin=NAME"
        )


def begin(config: RewardConfig, prepared, watched: Watched, read, say, run, train, held):
    """The samples that rewards are normalised on, drawn once and kept in the run; the head brought to their scale."""
    from palate.data.records import Records
    from palate.data.table import joined
    from palate.evaluation.truth import true_margins
    from palate.files import read_json, write_json
    from palate.model.heads import scale_head

    if watched.truth is not None:
        wanted = {str(group.source) for group in held}
        data, role = (config.data, "train") if config.eval == "auto" else (config.eval, "eval")
        sources = [source for source in prepared.rows.reading.sources if source["role"] == role]
        records = read(data, known=Records(sources=sources))  # raises where it is not what was read before
        texts = {where: record for record in records if (where := str(record.source)) in wanted}
        watched.margins = true_margins(watched.truth, texts, held)
    path = run.path / SAMPLES
    if not path.exists():
        write_json(path, draw(config, prepared.loaded.tokenizer, watched.policy, joined(train, held)))
    watched.policy = None
    watched.samples = as_groups(read_json(path))
    model = prepared.loaded.model
    mean, deviation = moments(config, prepared, watched.samples)
    scale_head(model, 1 / deviation)
    model.config.reward_bias = -mean / deviation
    count = len(watched.samples)
    say(f"normalise: on {count} samples of {prepared.loaded.name} rewards begin with mean 0 and deviation 1")
    return train, held, {}, None


def evaluate(watched: Watched, model, held, objective, *, tokens: int) -> dict[str, Any]:
    """The numbers of every evaluation, and how sure the model may be: accuracy by margin, slope, and error.

    `eval/calibration`: parts of equal size by margin; `eval/by_margin`: by the data's margin, where there is one;
    `eval/truth/...`: see `evaluation.truth.against_truth`, where --truth names it.
    """
    import torch

    from palate.evaluation import calibration
    from palate.evaluation.preference import evaluate
    from palate.evaluation.truth import against_truth

    outcomes: list[Any] = []
    found = evaluate(model, held, objective, tokens=tokens, seen=outcomes.append)
    margins = torch.cat([outcome.margins for outcome in outcomes]).tolist()
    curve = calibration.calibration(margins)
    found |= {
        "eval/calibration": curve,
        "eval/calibration_error": calibration.calibration_error(curve),
        "eval/calibration_slope": calibration.calibration_slope(margins),
    }
    if watched.margins is not None:
        found |= {f"eval/truth/{name}": value for name, value in against_truth(margins, watched.margins).items()}
    said = [group.margin for group in held for _ in group.preferences]
    return found if None in said else found | {"eval/by_margin": calibration.accuracy_by(margins, said)}


def finish(config: RewardConfig, prepared, watched: Watched, say, run, model, tokenizer, held) -> dict[str, Any]:
    """Writes `model/`, its rewards normalised again, and gives the facts of the result."""
    from palate.model.reward import save_reward

    mean, deviation = moments(config, prepared, watched.samples)
    gain, bias = 1 / deviation, -mean / deviation
    save_reward(model, tokenizer, run.path / "model", gain=gain, bias=bias)
    say(f"normalise: rewards of these samples had mean {mean:.3g}, deviation {deviation:.3g}, are saved with 0 and 1")
    facts = {"reward_scale": deviation, "reward_bias": bias, "normalised_on": len(watched.samples)}
    return facts | {"examples": examples(config, prepared, held, gain, bias)}


def examples(config: RewardConfig, prepared, held, gain: float, bias: float) -> list[dict[str, Any]]:
    """The held-out pairs that the model gets most wrong, the worst first, with their rewards as `model/` gives them."""
    from palate.data.tokens import decode_completion
    from palate.scoring import reward_bias, rewards

    model, tokenizer = prepared.loaded.model, prepared.loaded.tokenizer
    values = iter(rewards(model, held, numerics=prepared.objective.numerics, tokens=config.train.tokens))
    shift, rows = reward_bias(model), []
    for group in held:
        found = [gain * (next(values) - shift) + bias for _ in group.completions]
        rows += [(found[better] - found[worse], found, group, (better, worse)) for better, worse in group.preferences]
    rows.sort(key=lambda row: row[0])
    return [
        {"prompt": tokenizer.decode(group.prompt.tolist())}
        | {
            side: decode_completion(tokenizer, group.prompt, group.completions[k])
            for side, k in zip(("chosen", "rejected"), pair, strict=True)
        }
        | {"rewards": [found[k] for k in pair]}
        for _, found, group, pair in rows[: config.samples]
    ]


def verdict(before: dict, after: dict) -> tuple[bool, str]:
    """Better: the interval of held-out accuracy lies above one half, which chance reaches."""
    key = "eval/rewards/accuracies"
    if after.get(key) is None:
        return False, "no held-out pairs, so nothing is shown"
    low, high = after[f"{key}_low"], after[f"{key}_high"]
    best, lost = after.get("eval/truth/accuracy"), after.get("eval/truth/lost")
    known = (
        "" if best is None else f"; of the {best:.1%} that the truth itself reaches, {100 * lost:.1f} points are lost"
    )
    word = "better" if low > 0.5 else "worse" if high < 0.5 else "not shown to be better"
    return low > 0.5, (
        f"{word}: the chosen completion has the larger reward in {after[key]:.1%} [{low:.1%}, {high:.1%}] "
        f"of the held-out pairs{known}; loss {number(before['eval/loss'])} to {number(after['eval/loss'])}, "
        f"calibration slope {number(after['eval/calibration_slope'], '.2f')} (1: as sure as it may be)"
    )
