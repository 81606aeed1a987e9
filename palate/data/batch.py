"""Groups to batches: one stream of tokens, each prompt once, no padding; and what is scored, as index pairs.

The first token of every completion is predicted by the prompt's last token, so a prompt row may predict several
targets. Completions are pairs or lists by explicit indices, never by their place in the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from palate.data.records import Source
from palate.data.tokens import TokenGroup
from palate.layout import Layout


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """One stream of T tokens with N scored ones in S completions.

    tokens, positions: (T,) int64.
    predictors, targets: (N,) the stream row that predicts, and the token id that it should predict.
    sequence: (N,) the completion, 0..S-1, that a scored token belongs to.
    length: (S,) int64, scored tokens of each completion, the end token included.
    sources: (S,) where each completion was read.
    """

    tokens: Tensor
    positions: Tensor
    layout: Layout
    predictors: Tensor
    targets: Tensor
    sequence: Tensor
    length: Tensor
    sources: tuple[Source | None, ...] = ()

    @property
    def units(self) -> int:
        """What a demonstration loss is divided by: scored tokens."""
        return len(self.targets)

    def to(self, device) -> "TokenBatch":
        """The same batch with its tensors on `device`."""
        return _to(self, device)


@dataclass(frozen=True, eq=False)
class PairBatch:
    """P pairs as indices into a TokenBatch's completions. reference: (S,) nats, float64, where annotated."""

    batch: TokenBatch
    chosen: Tensor
    rejected: Tensor
    reference: Tensor | None = None

    @property
    def units(self) -> int:
        """Pairs."""
        return len(self.chosen)

    def to(self, device) -> "PairBatch":
        """The same batch with its tensors on `device`."""
        return _to(self, device)


@dataclass(frozen=True, eq=False)
class RankedBatch:
    """Ranked lists. orders: for each list length K an index tensor (L, K) of completions, best first."""

    batch: TokenBatch
    orders: tuple[Tensor, ...]
    reference: Tensor | None = None

    @property
    def units(self) -> int:
        """Lists."""
        return sum(len(order) for order in self.orders)

    def to(self, device) -> "RankedBatch":
        """The same batch with its tensors on `device`."""
        return _to(self, device)


@dataclass(frozen=True, eq=False)
class FeedbackBatch:
    """B single judgements. label: (B,) bool; wanted, unwanted: indices of those that are True, and False.

    mismatched: the same prompts with another row's completion.
    """

    batch: TokenBatch
    label: Tensor
    wanted: Tensor
    unwanted: Tensor
    mismatched: TokenBatch
    reference: Tensor | None = None
    reference_mismatched: Tensor | None = None

    @property
    def units(self) -> int:
        """Judgements."""
        return len(self.label)

    def to(self, device) -> "FeedbackBatch":
        """The same batch with its tensors on `device`."""
        return _to(self, device)


@dataclass(frozen=True, eq=False)
class RewardBatch:
    """P pairs of completions to be rewarded, each prompt's pairs counting as one unit together.

    batch: its branches hold every completion whole, and `predictors` (S,) are the rows of their last tokens, where a
        reward is read; `targets` say nothing. length: (S,) scored tokens of each completion.
    chosen, rejected: (P,) indices of completions. weight: (P,) one over the pairs of the same prompt.
    margin: (P,) float64, how much better the chosen one is, where every pair says so. units: prompts.
    """

    batch: TokenBatch
    length: Tensor
    chosen: Tensor
    rejected: Tensor
    weight: Tensor
    margin: Tensor | None
    units: int

    def to(self, device) -> "RewardBatch":
        """The same batch with its tensors on `device`."""
        return _to(self, device)


@dataclass(frozen=True, slots=True, eq=False)
class RolloutGroup(TokenGroup):
    """Own samples of one prompt, and what was found of them: float64, of each scored token or of each completion.

    old_logps, advantages: (n,) log-prob when sampled, at the sampling temperature; how much better than expected.
    values, returns: (n,) what the critic expected then, and what came; nan without a critic.
    scores, kl: (K,) the judge's, the penalty for a missing end included; log-ratio to the reference, nats.
    finished: (K,) 1 where there is an end token.
    explained, coefficient, spread: (K,) of the whole rollout: variance explained by the critic (nan without), KL
    coefficient, standard deviation of the scores (1 where they are all one).
    """

    old_logps: np.ndarray = field(default_factory=lambda: np.empty(0))
    advantages: np.ndarray = field(default_factory=lambda: np.empty(0))
    values: np.ndarray = field(default_factory=lambda: np.empty(0))
    returns: np.ndarray = field(default_factory=lambda: np.empty(0))
    scores: np.ndarray = field(default_factory=lambda: np.empty(0))
    kl: np.ndarray = field(default_factory=lambda: np.empty(0))
    finished: np.ndarray = field(default_factory=lambda: np.empty(0))
    explained: np.ndarray = field(default_factory=lambda: np.empty(0))
    coefficient: np.ndarray = field(default_factory=lambda: np.empty(0))
    spread: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """Own samples in one stream, with the columns of `RolloutGroup`: (N,) of tokens, (S,) of completions."""

    batch: TokenBatch
    old_logps: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor
    scores: Tensor
    kl: Tensor
    finished: Tensor
    explained: Tensor
    coefficient: Tensor
    spread: Tensor

    @property
    def units(self) -> int:
        """Scored tokens."""
        return self.batch.units

    def to(self, device) -> "RolloutBatch":
        """The same batch with its tensors on `device`."""
        return _to(self, device)


AnyBatch = TypeVar("AnyBatch", TokenBatch, PairBatch, RankedBatch, FeedbackBatch, RewardBatch, RolloutBatch)


def float64_device(device) -> torch.device:
    """Where sums of log-probs live: `device`, or the CPU for one that has no float64 (MPS)."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def _to(batch: AnyBatch, device) -> AnyBatch:
    # what indexes sums, or is one, goes where the sums are
    own = device if isinstance(batch, TokenBatch) else float64_device(device)

    def move(value):
        if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            return tuple(move(item) for item in value)
        if isinstance(value, TokenBatch):
            return value.to(device)
        return value.to(own) if isinstance(value, Tensor) else value

    return replace(batch, **{part.name: move(getattr(batch, part.name)) for part in fields(batch)})


def stream_length(group: TokenGroup) -> int:
    """Tokens that a group takes in a stream: its prompt once, each completion without its last token."""
    return len(group.prompt) + sum(max(len(ids) - 1, 0) for ids in group.completions)


def scored_spans(group: TokenGroup, k: int) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of completion k's tokens that are scored; with no prompt at all nothing predicts token 0."""
    spans = group.spans[k]
    if len(group.prompt):
        return spans
    return tuple((max(start, 1), stop) for start, stop in spans if stop > max(start, 1))


def scored_length(group: TokenGroup, k: int) -> int:
    """Scored tokens of completion k, the end token included."""
    return sum(stop - start for start, stop in scored_spans(group, k))


def collate(groups: Sequence[TokenGroup]) -> TokenBatch:
    """The stream of all completions of all groups, in order; completions are numbered group by group."""
    tokens, positions, predictors, targets, sequence, lengths, sources = [], [], [], [], [], [], []
    row = number = 0
    for group in groups:
        prompt = len(group.prompt)
        tokens.append(group.prompt)
        positions.append(np.arange(prompt))
        last_of_prompt = row + prompt - 1
        row += prompt
        for k, ids in enumerate(group.completions):
            tokens.append(ids[:-1])
            positions.append(np.arange(prompt, prompt + max(len(ids) - 1, 0)))
            scored = [np.arange(start, stop) for start, stop in scored_spans(group, k)]
            scored = np.concatenate(scored) if scored else np.empty(0, np.int64)
            predictors.append(np.where(scored == 0, last_of_prompt, row + scored - 1))
            targets.append(ids[scored])
            sequence.append(np.full(len(scored), number))
            lengths.append(len(scored))
            sources.append(group.source)
            row += max(len(ids) - 1, 0)
            number += 1
    layout = Layout(
        prompts=tuple(len(group.prompt) for group in groups),
        branches=tuple(tuple(max(len(ids) - 1, 0) for ids in group.completions) for group in groups),
    )
    return TokenBatch(
        tokens=_tensor(tokens),
        positions=_tensor(positions),
        layout=layout,
        predictors=_tensor(predictors),
        targets=_tensor(targets),
        sequence=_tensor(sequence),
        length=torch.tensor(lengths, dtype=torch.int64),
        sources=tuple(sources),
    )


def collate_pairs(groups: Sequence[TokenGroup]) -> PairBatch:
    """Every preference of every group as one pair; a ranking gives all its strict pairs over one shared prompt."""
    chosen, rejected, first = [], [], 0
    for group in groups:
        chosen += [first + better for better, _ in group.preferences]
        rejected += [first + worse for _, worse in group.preferences]
        first += len(group.completions)
    chosen, rejected = (torch.tensor(side, dtype=torch.int64) for side in (chosen, rejected))
    return PairBatch(collate(groups), chosen, rejected, _reference(groups))


def best_first(group: TokenGroup) -> tuple[int, ...] | None:
    """The completions' order, best first; None unless the preferences are one strict total order."""
    count = len(group.completions)
    wins = [sum(better == k for better, _ in group.preferences) for k in range(count)]
    total = len(set(group.preferences)) == count * (count - 1) // 2 and sorted(wins) == list(range(count))
    return tuple(sorted(range(count), key=lambda k: -wins[k])) if total else None


def collate_rankings(groups: Sequence[TokenGroup]) -> RankedBatch:
    """Every totally ordered group as one list; lists of equal length stand in one tensor.

    Raises ValueError for a group with ties: leave those out before (`best_first` is None for them).
    """
    orders: dict[int, list[list[int]]] = {}
    first = 0
    for group in groups:
        order = best_first(group)
        if order is None:
            raise ValueError(f"{group.source}: a ranking with ties has no single order")
        orders.setdefault(len(order), []).append([first + k for k in order])
        first += len(group.completions)
    return RankedBatch(collate(groups), tuple(torch.tensor(orders[k]) for k in sorted(orders)), _reference(groups))


def collate_feedback(groups: Sequence[TokenGroup]) -> FeedbackBatch:
    """Labelled completions, and beside them the mismatched ones that KTO's reference point is estimated on."""
    reference, label = _reference(groups), torch.tensor([bool(group.label) for group in groups])
    return FeedbackBatch(
        batch=collate([_only(group, 0) for group in groups]),
        label=label,
        wanted=label.nonzero()[:, 0],
        unwanted=(~label).nonzero()[:, 0],
        mismatched=collate([_only(group, 1) for group in groups]),
        reference=None if reference is None else reference[0::2],
        reference_mismatched=None if reference is None else reference[1::2],
    )


def collate_ends(groups: Sequence[TokenGroup]) -> TokenBatch:
    """The stream of all completions, whole, whose `predictors` are the rows of their last tokens: (S,), one each.

    For heads that read a text at its end; a stream for log-probs leaves the last token of each completion out. An empty
    completion is read at its prompt's last token.
    """

    def read_at_end(group: TokenGroup) -> TokenGroup:
        longer = tuple(np.append(ids, np.int32(0)) for ids in group.completions)  # the last one is only ever a target
        return replace(group, completions=longer, spans=tuple(((len(ids) - 1, len(ids)),) for ids in longer))

    return collate([read_at_end(group) for group in groups])


def collate_rewards(groups: Sequence[TokenGroup]) -> RewardBatch:
    """Every preference of every group as one pair, all those of one prompt over one stream, and one unit together."""
    pairs = collate_pairs(groups)
    weight = [1 / len(group.preferences) for group in groups for _ in group.preferences]
    margins = [group.margin for group in groups for _ in group.preferences]
    known = None if None in margins else torch.tensor(margins, dtype=torch.float64)
    return RewardBatch(
        batch=collate_ends(groups),
        length=pairs.batch.length,
        chosen=pairs.chosen,
        rejected=pairs.rejected,
        weight=torch.tensor(weight, dtype=torch.float64),
        margin=known,
        units=len(groups),
    )


def collate_rollouts(groups: Sequence[RolloutGroup]) -> RolloutBatch:
    """The stream of all samples of all groups, and their columns in the same order."""
    columns = [name.name for name in fields(RolloutBatch) if name.name != "batch"]
    joined = {
        name: torch.from_numpy(np.concatenate([np.asarray(getattr(group, name), np.float64) for group in groups]))
        for name in columns
    }
    return RolloutBatch(collate(groups), **joined)


def _only(group: TokenGroup, k: int) -> TokenGroup:
    return replace(group, completions=(group.completions[k],), spans=(group.spans[k],), preferences=(), reference=None)


def _reference(groups: Sequence[TokenGroup]) -> Tensor | None:
    if not groups or any(group.reference is None for group in groups):
        return None
    return torch.tensor([value for group in groups for value in group.reference], dtype=torch.float64)


def _tensor(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.empty(0, dtype=torch.int64)
