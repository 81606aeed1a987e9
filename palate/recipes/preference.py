"""Pairs, ranked lists or single feedback to a policy: the DPO and KTO families.

The reference is scored once and read from then on; at step 0, where it is the starting policy, the log-ratios must be
zero and the loss at its closed form, or nothing is trained.
"""

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from palate.errors import UsageError
from palate.recipes.plan import dry_run
from palate.recipes.retain import read_retained, retention
from palate.recipes.rows import anything, with_order, with_signal
from palate.recipes.training import Quantize, TrainingConfig, Watch, open_folder, prepare, train
from palate.recipes.verbs import every_tenth, fell, number, stderr


class PreferenceConfig(TrainingConfig):
    """Options of `palate dpo`."""

    reference: Annotated[
        str | None, Field(description="Model to stay close to; default: the starting weights, adapters off")
    ] = None
    loss: Annotated[str, Field(description="A loss of the pairwise or ranked family, such as dpo, ipo, simpo")] = "dpo"
    loss_options: Annotated[
        dict[str, float | bool | int], Field(description="Options of the loss, by its own names")
    ] = {}
    beta: Annotated[float | None, Field(description="Short for loss_options.beta")] = None
    quantize: Quantize = None
    retain: Annotated[
        str,
        Field(description="Demonstrations that must stay likely; auto: built-in ones for models made from ours; none"),
    ] = "auto"
    retain_samples: Annotated[
        int, Field(ge=0, description="Held-out prompts whose completions are counted before and after")
    ] = 24


class FeedbackConfig(PreferenceConfig):
    """Options of `palate kto`."""

    loss: Annotated[str, Field(description="A loss on single feedback")] = "kto"


def run(
    config: PreferenceConfig,
    *,
    verb: str = "dpo",
    argv=(),
    say=stderr,
    panel=None,
    stop: int | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Trains --model on the preferences of --data; returns the result object of --json.

    stop, watch: as for `train`.
    Raises UsageError for a loss or option that does not fit, DataError, ModelError, and Interrupted when stopped.
    """
    from palate import losses
    from palate.data.sources import read_feedback, read_pairs
    from palate.train.objectives import objective

    options = check_loss(config, verb)
    kind = losses.info(config.loss).kind
    out, ended = open_folder(config, verb, say)
    if ended is not None:
        return ended

    read = partial(
        read_feedback if kind == "feedback" else read_pairs,
        columns=config.columns or None,
        format=config.format,
        bad_rows=config.bad_rows,
    )
    records = read_retained(config, say)
    usable = {"ranked": with_order, "pairwise": with_signal}.get(kind, anything)
    prepared = prepare(
        config, read, lambda numerics: objective(config.loss, numerics, **options), usable=usable, say=say
    )
    if config.plan.processes:  # no weights, and so no reference either
        return dry_run(config, prepared, say)
    watched = retention(config, prepared, records)
    waiting = [load_reference(config, prepared)]  # before a folder is made; taken out once, so that it can be freed
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
        annotate=partial(pin_reference, config, prepared, waiting, say) if prepared.objective.reference else None,
        facts={"reference_scored": 0, "reference_reused": 0},
        better="eval/rewards/accuracies" if kind != "feedback" else "-eval/loss",
        verdict=feedback_verdict if kind == "feedback" else pair_verdict,
        retention=watched,
        stop=stop,
        watch=watch,
    )


def check_loss(config: PreferenceConfig, verb: str) -> dict[str, Any]:
    """Every option of the loss. Raises UsageError where it is none of this verb's, or does not take what is given."""
    from palate import losses

    options = loss_options(config)
    kind = losses.info(config.loss).kind
    if (kind == "feedback") != (verb == "kto") or kind == "reward":
        other = {"feedback": "kto", "reward": "reward"}.get(kind, "dpo")
        raise UsageError(
            f'loss "{config.loss}" is not one of palate {verb}', where="loss", code="E308", next=f"use palate {other}"
        )
    return options


def loss_options(config: PreferenceConfig) -> dict[str, Any]:
    """Every option of the loss, --beta folded in. Raises UsageError naming the loss and what it takes."""
    from palate import losses

    written = {name.replace("-", "_"): name for name in config.loss_options}  # flags have hyphens
    given = {name: config.loss_options[key] for name, key in written.items()}
    if config.loss not in losses.LOSSES:
        raise UsageError(
            f'there is no loss "{config.loss}"',
            where="loss",
            code="E303",
            next=f"use one of {', '.join(sorted(losses.LOSSES))}",
        )
    if config.reference is not None and not losses.info(config.loss).reference:
        raise UsageError(
            f'loss "{config.loss}" has no reference', where="reference", code="E308", next="leave --reference out"
        )
    takes = losses.info(config.loss).options
    if config.beta is not None:
        if "beta" in given:
            what = "are two values for one option"
            raise UsageError(what, where="beta, loss_options.beta", code="E308", next="keep one")
        if "beta" not in takes:
            raise UsageError(
                f'loss "{config.loss}" has no option "beta"; it takes: {", ".join(takes)}',
                where="beta",
                code="E301",
                next=f"use --loss-options.{next(iter(takes))}" if takes else "leave --beta out",
            )
        given["beta"] = config.beta
    try:
        return losses.check_options(config.loss, given)
    except (ValueError, TypeError) as error:
        named = next((key for key in given if f'option "{key}"' in str(error)), None)
        inside = f"loss_options.{written.get(named)}"
        where = "beta" if named == "beta" and config.beta is not None else inside if named else "loss"
        raise UsageError(str(error), where=where, code="E307", next="see docs/losses.md") from None


def load_reference(config: PreferenceConfig, prepared):
    """The model that --reference names; None without one, and where the run to resume has its scores already.

    Raises ModelError (E410) where its tokenizer is not the policy's.
    """
    from palate.model.load import check_same_tokenizer, load

    pinned = config.resume and config.out is not None and (Path(config.out) / "reference.safetensors").exists()
    if config.reference is None or pinned:
        return None
    other = load(
        config.reference,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision if config.reference == config.model else None,  # a commit of one repository
    )
    check_same_tokenizer(prepared.loaded.tokenizer, other.tokenizer)
    return other.model


def pin_reference(config: PreferenceConfig, prepared, waiting: list, say, run, groups, held):
    """Groups with their reference column, from the run folder, the store or a pass over the reference.

    The column is pinned in the run folder, which is read alone from then on. waiting: holds what `load_reference` gave.
    """
    import torch

    from palate.data.batch import collate
    from palate.data.table import joined
    from palate.reference import ReferenceColumn, reference_column, reference_identity, with_reference
    from palate.scoring import logps
    from palate.store import reference_store
    from palate.train.selfcheck import check_start, start_report

    objective, model = prepared.objective, prepared.loaded.model
    everything = joined(groups, held)
    column, began = ReferenceColumn.read(run.reference_path, everything, prepared.rows.keys), time.perf_counter()
    if column is None:
        other = waiting.pop()
        reference = model if other is None else other
        store = reference_store(reference_identity(reference, prepared.precision))
        column = reference_column(
            everything,
            reference,
            numerics=objective.numerics,
            tokens=config.train.tokens,
            store=store,
            folder=run.path / "scoring",
            progress=every_tenth(lambda done, todo: say(f"reference: {done} of {todo} completions scored")),
            keys=prepared.rows.keys,
        )
        column.write(run.reference_path)
        for note in store.notes:
            say(f"reference: {note}")
    seconds = round(time.perf_counter() - began, 3)
    run.forget("scoring")
    say(f"reference: {column.scored} completions scored, {column.reused} reused")
    annotated, identity = with_reference(everything, column), column.identity
    own_tag = objective.numerics.tag(model)
    if foreign := [tag for tag in column.tags if tag != own_tag]:
        say(f"reference: scored under other numerics ({foreign[0]}): margins at the start are tiny, not zero")

    def suspects() -> str:
        if reference_identity(model, prepared.precision) != identity:
            return "weights or config of the policy"
        if foreign:
            return f"dtype or kernels ({foreign[0]} against {own_tag})"
        batch = collate([everything[0]]).to(model.device)
        with torch.no_grad():
            one, two = (logps(model, batch, numerics=objective.numerics).total for _ in range(2))
        if not torch.equal(one, two):
            return "dropout or another source of chance: two passes over one row differ"
        return "tokens (template) or the stored values"

    def inspect(number, outcomes) -> None:
        if number != 1:
            return
        if config.reference is None or identity == prepared.identity:
            say(str(check_start(outcomes, objective, suspects)))
        else:
            say(f"{start_report(outcomes, objective)}; the reference is not the start")

    facts = {"reference_scored": column.scored, "reference_reused": column.reused, "reference_seconds": seconds}
    return annotated[: len(groups)], annotated[len(groups) :], facts, inspect


def pair_verdict(before: dict, after: dict) -> tuple[bool, str]:
    """Better: the interval of held-out accuracy lies above where it began, which is one half where all were ties."""
    key = "eval/rewards/accuracies"
    if after.get(key) is None:
        return False, "no held-out pairs, so nothing is shown"
    began = before[key] + before["eval/rewards/ties"] / 2
    low, high = after[f"{key}_low"], after[f"{key}_high"]
    word = "better" if low > began else "worse" if high < began else "not shown to be better"
    return low > began, (
        f"{word}: on {after['eval/count']:.0f} held-out pairs the chosen completion has the larger implicit "
        f"reward in {after[key]:.1%} [{low:.1%}, {high:.1%}], {began:.1%} at the start with ties as half; loss "
        f"{number(before['eval/loss'])} to {number(after['eval/loss'])}"
    )


def feedback_verdict(before: dict, after: dict) -> tuple[bool, str]:
    """Better: held-out loss fell."""
    if "eval/loss" not in after:
        return False, "no held-out feedback, so nothing is shown"
    wanted, unwanted = (number(after[f"eval/rewards/{side}"]) for side in ("chosen", "rejected"))
    return fell(before, after), (
        f"held-out loss {number(before['eval/loss'])} to {number(after['eval/loss'])}, reward of wanted completions "
        f"{wanted}, of unwanted {unwanted}"
    )
