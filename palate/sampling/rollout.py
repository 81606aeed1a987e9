"""Prompts, a policy and a judge to episodes: own samples with all that a policy-gradient update reads of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from palate.data.batch import RolloutGroup, collate, stream_length
from palate.data.records import Text
from palate.data.stream import pack
from palate.data.tokens import end_tokens
from palate.layout import MICRO_BATCH_TOKENS
from palate.losses.policy import (
    end_scores,
    explained_variance,
    generalised_advantages,
    group_advantages,
    token_rewards,
    whiten,
)
from palate.model.adapters import reference_mode
from palate.sampling.generate import generate, text_of
from palate.sampling.judge import Completion, Judge
from palate.scoring import Numerics, logps_and_values, token_logps


@dataclass(frozen=True)
class Episodes:
    """How episodes are made and credited.

    numerics: of every log-prob; its temperature is the one that is sampled at. max_tokens: of a completion.
    samples: of each prompt. missing_end: the score of a completion without end token; None: the judge's own.
    gamma, lam, whiten_rewards: of advantages with a critic. groups: "rloo" or "grpo", the advantages without one.
    tokens: stream tokens per micro-batch.
    """

    numerics: Numerics
    max_tokens: int
    samples: int = 1
    missing_end: float | None = -1.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    groups: str = "rloo"
    tokens: int = MICRO_BATCH_TOKENS


@dataclass(frozen=True)
class Asked:
    """A prompt as token ids (P,), and as the text that the judge reads."""

    ids: np.ndarray
    text: Text


def collect(
    policy: nn.Module,
    reference: nn.Module | None,
    critic: nn.Module | None,
    tokenizer,
    prompts: Sequence[Asked],
    judge: Judge,
    how: Episodes,
    *,
    coefficient: float,
    seed: int,
    learn: bool = True,
) -> list[RolloutGroup]:
    """One group a prompt: its samples, scored by the judge, with log-probs, KL, values, returns and advantages.

    Log-probs are those of a forward over the finished texts, as the update computes them, not those of generation: so
    before the first update the ratio is 1. reference: None for an adapted policy, whose adapters are then switched off.
    critic: as for `scoring.logps_and_values`; None: advantages within each prompt's samples.
    coefficient: of the KL. learn: False leaves out what only an update needs (advantages, values, returns).
    Raises what generating and judging raise.
    """
    groups, texts = _sampled(policy, tokenizer, prompts, how, seed)
    finished = torch.tensor([text.finished for text in texts])
    asked = [prompt.text for prompt in prompts for _ in range(how.samples)]
    scores = torch.tensor(judge.scores(asked, texts), dtype=torch.float64)
    scores = end_scores(scores, finished, how.missing_end)
    with torch.no_grad():
        old, values, base = _passes(policy, reference, critic if learn else None, groups, how)
    lengths = torch.tensor([len(ids) for group in groups for ids in group.completions])
    ratio = old - base
    kl = torch.segment_reduce(ratio, "sum", lengths=lengths, axis=0)
    columns = {"old_logps": old}
    explained = float("nan")
    if learn and values is not None:
        rewards = token_rewards(scores, ratio, lengths, coefficient)
        rewards = whiten(rewards, shift_mean=False) if how.whiten_rewards else rewards
        advantages, returns = generalised_advantages(rewards, values, lengths, gamma=how.gamma, lam=how.lam)
        explained = explained_variance(values, returns)
        columns |= {"advantages": whiten(advantages), "values": values, "returns": returns}
    elif learn:
        totals = (scores - coefficient * kl).reshape(-1, how.samples)
        each = group_advantages(totals, kind=how.groups).flatten()
        nothing = torch.full_like(old, torch.nan)
        columns |= {"advantages": each.repeat_interleave(lengths), "values": nothing, "returns": nothing}
    same = torch.ones_like(scores)
    spread = float(scores.std(correction=0)) or 1.0
    per_completion = {"scores": scores, "kl": kl, "finished": finished.double()}
    per_completion |= {"explained": same * explained, "coefficient": same * coefficient, "spread": same * spread}
    counts = [sum(len(ids) for ids in group.completions) for group in groups]
    cut = {name: _split(column, counts) for name, column in columns.items()}
    cut |= {name: _split(column, [how.samples] * len(groups)) for name, column in per_completion.items()}
    return [replace(group, **{name: parts[i] for name, parts in cut.items()}) for i, group in enumerate(groups)]


def _split(column: Tensor, counts: list[int]) -> list[np.ndarray]:
    return [part.numpy() for part in column.split(counts)]


def _sampled(policy, tokenizer, prompts, how: Episodes, seed: int) -> tuple[list[RolloutGroup], list[Completion]]:
    """Groups of own samples, and their texts in the same order."""
    ids = [prompt.ids for prompt in prompts]
    made = generate(
        policy,
        tokenizer,
        ids,
        max_tokens=how.max_tokens,
        temperature=how.numerics.temperature,
        samples=how.samples,
        seed=seed,
        end_ids=end_tokens(tokenizer),
    )
    texts = [Completion(text_of(sample, ids[sample.prompt], tokenizer), sample.finished) for sample in made]
    groups = []
    for place, prompt in enumerate(ids):
        mine = made[place * how.samples : (place + 1) * how.samples]
        spans = tuple(((0, len(sample.ids)),) for sample in mine)
        groups.append(RolloutGroup(prompt, tuple(sample.ids for sample in mine), spans))
    return groups, texts


def _passes(policy, reference, critic, groups, how: Episodes) -> tuple[Tensor, Tensor | None, Tensor]:
    """(N,) each, on the CPU: log-probs and values under the policy and the critic, log-probs under the reference."""
    old, values, base = [], [], []
    for batch in _batches(groups, how.tokens):
        batch = batch.to(policy.device)
        logps, found = logps_and_values(policy, critic, batch, numerics=how.numerics)
        old.append(logps.cpu())
        values.append(None if found is None else found.cpu())
        if reference is None:
            with reference_mode(policy):
                base.append(token_logps(policy, batch, numerics=how.numerics).cpu().double())
        else:
            base.append(token_logps(reference, batch, numerics=how.numerics).cpu().double())
    return torch.cat(old), torch.cat(values) if critic is not None else None, torch.cat(base)


def _batches(groups: Sequence[RolloutGroup], tokens: int) -> Iterator:
    for part in pack([stream_length(group) for group in groups], tokens):
        yield collate([groups[i] for i in part])
