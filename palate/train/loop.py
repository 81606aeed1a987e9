"""The only loop: steps() turns batches into optimizer updates, one Step at a time; a callback is a line of your body.

fit() in `palate.train.fit` adds logging, evaluation, checkpoints and signals on top of it.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from palate.data.batch import float64_device
from palate.data.stream import StepBatch
from palate.distributed import Ranks
from palate.errors import NotFiniteError
from palate.tally import Tally, means
from palate.train.objectives import Objective, Outcome
from palate.train.optim import OptimConfig, build_optimizer, learning_rate


@dataclass
class TrainState:
    """All that a resumed run needs; what is not here is not resumed. Training spends no random state.

    step: updates done. cursor: where the data stands after them, with controllers that follow it. total_steps: the
    schedule's length, if known.
    """

    models: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    optim: OptimConfig
    total_steps: int | None = None
    step: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] | None = None

    @classmethod
    def fresh(
        cls,
        policy: nn.Module,
        optim: OptimConfig | None = None,
        total_steps: int | None = None,
        critic: nn.Module | None = None,
    ) -> "TrainState":
        """A state at step 0. The policy is put in evaluation mode: dropout would tell policy and reference apart.

        critic: trained beside it, by an optimizer of its own.
        """
        optim = optim or OptimConfig()
        models = {"policy": policy} if critic is None else {"policy": policy, "critic": critic}
        optimizers = {name: build_optimizer(model.eval(), optim) for name, model in models.items()}
        return cls(models, optimizers, optim, total_steps)

    @property
    def model(self) -> nn.Module:
        """The policy."""
        return self.models["policy"]


@dataclass(frozen=True)
class Step:
    """One optimizer update. loss is the whole batch's, before the update; grad_norm is before clipping."""

    number: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    metrics: dict[str, float]
    rows: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        return {
            "step": self.number,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            **self.metrics,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
        }


def steps(
    state: TrainState,
    batches: Iterable[StepBatch],
    objective: Objective,
    ranks: Ranks | None = None,
    *,
    inspect: Callable[[int, list[Outcome]], None] | None = None,
) -> Iterator[Step]:
    """One Step per element of `batches`: forward and backward of every micro-batch, clip, update.

    Each micro-batch's loss is divided by the whole step's units, known before the first forward.
    inspect: called with (step number, outcomes) before the update; it may raise.
    Raises NotFiniteError, before the update, naming the step's rows.
    """
    ranks = ranks or Ranks.single()
    model, optimizers = state.model, state.optimizers.values()
    trained = {name: [p for p in one.parameters() if p.requires_grad] for name, one in state.models.items()}
    for batch in batches:
        started = time.perf_counter()
        number = state.step + 1
        for optimizer in optimizers:
            optimizer.zero_grad()  # of a step that was broken off
        micro = [part.to(model.device) for part in batch]
        context = objective.prepare(model, micro, ranks)
        outcomes = [_backward(objective(model, part, context), batch.units) for part in micro]
        norms = {}
        for name, weights in trained.items():
            ranks.sum_gradients(weights)
            norms[name] = nn.utils.clip_grad_norm_(weights, state.optim.clip_norm)
        loss, metrics, norms, finite = _reduce(outcomes, norms, ranks)
        sound = finite and all(map(math.isfinite, (loss, *norms.values())))
        norm = norms.pop("policy")
        metrics |= {f"grad_norm/{name}": value for name, value in norms.items()}
        if not sound:
            for optimizer in optimizers:
                optimizer.zero_grad()
            raise _not_finite(number, outcomes, loss, norm)
        if inspect is not None:
            inspect(number, outcomes)
        rate = learning_rate(state.optim, number, state.total_steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        state.step, state.cursor = number, dict(batch.cursor)
        tokens = sum(ranks.gather(sum(_tokens(part) for part in micro)))
        seconds = batch.seconds + time.perf_counter() - started
        yield Step(number, loss, norm, rate, tokens, seconds, metrics | batch.metrics, batch.rows)


def _backward(outcome: Outcome, units: float) -> Outcome:
    """The outcome without its graph: the nodes would lie between the activations of the next one, and split the heap."""
    (outcome.loss.total / units).backward()
    return replace(outcome, loss=Tally(outcome.loss.total.detach(), outcome.loss.count))


def _reduce(
    outcomes: list[Outcome], norms: dict[str, Tensor], ranks: Ranks
) -> tuple[float, dict[str, float], dict[str, float], bool]:
    """The whole step's loss and metrics, summed over micro-batches and ranks, the norms, and whether all its rows are
    finite: read from the device in one go, as each read alone would wait for it again."""
    loss, metrics, finite = Tally(), {}, True
    for outcome in outcomes:
        loss = loss + outcome.loss
        finite = finite & torch.isfinite(outcome.row_losses).all()
        for name, tally in outcome.metrics.items():
            metrics[name] = metrics.get(name, Tally()) + tally
    found = iter(_read([*(tally.total for tally in metrics.values()), *norms.values(), loss.total, finite]))
    totals = {name: (next(found), tally.count) for name, tally in metrics.items()}
    read_norms = {name: next(found) for name in norms}
    shares = ranks.gather((totals, (next(found), loss.count), bool(next(found))))
    metrics = {}
    for share, _, _ in shares:
        for name, tally in share.items():
            metrics[name] = metrics.get(name, Tally()) + Tally(*tally)
    loss = sum((Tally(*share) for _, share, _ in shares), Tally())
    return loss.mean, means(metrics), read_norms, all(share for _, _, share in shares)


def _read(numbers: list) -> list[float]:
    """Scalars on the device, or none, as numbers."""
    on_device = [number for number in numbers if isinstance(number, Tensor)]
    device = float64_device(on_device[0].device) if on_device else None
    read = iter(torch.stack([x.detach().to(device).double() for x in on_device]).tolist() if on_device else ())
    return [next(read) if isinstance(number, Tensor) else float(number) for number in numbers]


def _not_finite(number: int, outcomes: list[Outcome], loss: float, norm: float) -> NotFiniteError:
    bad = [
        str(outcome.sources[i]) if i < len(outcome.sources) and outcome.sources[i] is not None else f"unit {i}"
        for outcome in outcomes
        for i in torch.nonzero(~torch.isfinite(outcome.row_losses)).flatten().tolist()
    ]
    rows = [str(source) for outcome in outcomes for source in outcome.sources]
    named = bad or rows
    where = "the rows whose loss is not finite: " if bad else "the step's rows: "
    return NotFiniteError(
        f"step {number}: loss {loss}, gradient norm {norm}; nothing was updated. {where}"
        f"{', '.join(named[:10])}{f' and {len(named) - 10} more' if len(named) > 10 else ''}",
        code="E603",
        next="look at these rows, lower --lr, or train in --precision float32",
    )


def _tokens(part: Any) -> int:
    """Stream tokens that a micro-batch runs through the model."""
    batches = [part] if hasattr(part, "tokens") else [part.batch, getattr(part, "mismatched", None)]
    return sum(len(batch.tokens) for batch in batches if batch is not None)
