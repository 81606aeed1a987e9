"""Losses of preference pairs, each a function of summed log-probs: (P,) in, (P,) out, nothing reduced.

Throughout: h is the chosen log-ratio minus the rejected one, sigma the logistic function, |y| a completion's tokens.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from palate.losses.registry import pairwise_loss

POSITIVE = "(0, inf)"
NOT_NEGATIVE = "[0, inf)"


@dataclass(frozen=True)
class PairLogps:
    """What a pairwise loss may read of P pairs; every column has shape (P,).

    chosen, rejected: log-probs under the policy, summed over completion tokens, nats.
    reference_chosen, reference_rejected: the same under the reference; gradients never enter them.
    chosen_length, rejected_length: completion tokens, at least 1, the end token counted; integers will do.
    A loss that needs a column which is None raises ValueError, and so do columns of unequal shape.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    chosen_length: Tensor | None = None
    rejected_length: Tensor | None = None

    def __post_init__(self):
        check_columns(self, self.chosen.shape, dim=1)

    @property
    def chosen_log_ratio(self) -> Tensor:
        """Log-prob of the chosen completion, policy minus reference: (P,), nats."""
        return self.chosen - constant(self, "reference_chosen", self.chosen.dtype)

    @property
    def rejected_log_ratio(self) -> Tensor:
        """Log-prob of the rejected completion, policy minus reference: (P,), nats."""
        return self.rejected - constant(self, "reference_rejected", self.rejected.dtype)

    @property
    def log_ratio(self) -> Tensor:
        """h, the chosen log-ratio minus the rejected one: (P,), nats."""
        return self.chosen_log_ratio - self.rejected_log_ratio

    @property
    def chosen_tokens(self) -> Tensor:
        """Length of the chosen completion in the dtype of its log-probs: (P,), tokens."""
        return constant(self, "chosen_length", self.chosen.dtype)

    @property
    def rejected_tokens(self) -> Tensor:
        """Length of the rejected completion in the dtype of its log-probs: (P,), tokens."""
        return constant(self, "rejected_length", self.rejected.dtype)

    @property
    def chosen_mean(self) -> Tensor:
        """Mean log-prob per token of the chosen completion: (P,), nats per token."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> Tensor:
        """Mean log-prob per token of the rejected completion: (P,), nats per token."""
        return self.rejected / self.rejected_tokens

    @property
    def mean_log_ratio(self) -> Tensor:
        """The log-ratios' difference after dividing each by its own length: (P,), nats per token."""
        return self.chosen_log_ratio / self.chosen_tokens - self.rejected_log_ratio / self.rejected_tokens


def check_columns(logps, shape: torch.Size, dim: int, skip: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless every column that is given has `shape`, of `dim` dimensions: (P,) against (P, 1) would
    broadcast into a wrong loss without a word."""
    if len(shape) != dim:
        raise ValueError(f"{type(logps).__name__} takes columns of {dim} dimension(s), not of shape {tuple(shape)}")
    for field in fields(logps):
        column = None if field.name in skip else getattr(logps, field.name)
        if column is not None and column.shape != shape:
            raise ValueError(
                f"{type(logps).__name__}.{field.name} has shape {tuple(column.shape)}, the others {tuple(shape)}"
            )


def constant(logps, name: str, dtype: torch.dtype) -> Tensor:
    """The column `name` without gradient, in `dtype`; ValueError where it is None."""
    column = getattr(logps, name)
    if column is None:
        raise ValueError(f"this loss needs {name}, which {type(logps).__name__} was built without")
    return column.detach().to(dtype)


def log_odds(mean: Tensor) -> Tensor:
    """Log-odds of the geometric mean token probability: log(p / (1 - p)) from log p, in nats.

    Above 1 - eps a dtype cannot tell p from 1, where the odds are infinite; log p is held at -eps there, and its
    gradient stops, so that value and gradient stay finite.
    """
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return mean - torch.log(-torch.expm1(mean))


def _log_two(options) -> float:
    return math.log(2)


@pairwise_loss(
    "dpo",
    reference=True,
    paper="arXiv:2305.18290, eq. 7",
    at_start=_log_two,
    ranges={"beta": POSITIVE, "label_smoothing": "[0, 0.5)"},
)
def dpo(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO loss of each pair: shape (P,), nats. Logistic in the margin of implicit rewards.

    beta: pull towards the reference, > 0; larger keeps the policy closer.
    label_smoothing: probability in [0, 0.5) that a label is flipped (conservative DPO): the loss is then least at the
        margin log((1 - e) / e) instead of at infinity.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing: Mitchell 2023, cDPO note, eq. 3.
    Departs: sums over completion tokens only, the end token included.
    """
    margin = beta * logps.log_ratio
    loss = -(1 - label_smoothing) * logsigmoid(margin)
    return loss - label_smoothing * logsigmoid(-margin) if label_smoothing else loss


@pairwise_loss(
    "robust_dpo",
    reference=True,
    paper="arXiv:2403.00409, section 3 (robust loss)",
    at_start=_log_two,
    ranges={"beta": POSITIVE, "label_smoothing": "[0, 0.5)"},
)
def robust_dpo(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO loss of each pair: shape (P,), nats. Its mean over flipped labels is the DPO loss of the true ones.

    beta: pull towards the reference, > 0. label_smoothing: flip rate e of the labels, [0, 0.5).
    Unbounded below: its slope in h tends to -beta e / (1 - 2e), so a run needs a stop.
    Source: Chowdhury, Kini and Natarajan 2024, arXiv:2403.00409, section 3, the robust loss.
    """
    margin = beta * logps.log_ratio
    kept, flipped = -logsigmoid(margin), -logsigmoid(-margin)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@pairwise_loss(
    "ipo",
    reference=True,
    paper="arXiv:2310.12036, eq. 17",
    normalised=True,
    at_start=lambda options: 1 / (4 * options["tau"] ** 2),
    ranges={"tau": POSITIVE},
)
def ipo(logps: PairLogps, *, tau: float = 0.1, average: bool = True) -> Tensor:
    """IPO loss of each pair: shape (P,), squared nats. The squared distance of h from 1 / (2 tau).

    tau: pull towards the reference, > 0. average: h of log-ratios per token (needs lengths), else of sums.
    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17.
    Departs: the paper does not speak of lengths; its authors' results use the mean per token, hence the default.
    """
    log_ratio = logps.mean_log_ratio if average else logps.log_ratio
    return (log_ratio - 1 / (2 * tau)) ** 2


@pairwise_loss(
    "hinge",
    reference=True,
    paper="arXiv:2309.06657, section 3.3 (hinge-norm)",
    at_start=lambda options: 1.0,
    ranges={"beta": POSITIVE},
)
def hinge(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """Hinge loss of each pair: shape (P,), in rewards. Zero, with zero gradient, once the margin reaches 1.

    beta: slope in h, > 0 (the paper's gamma).
    Source: Liu et al. 2023 (RSO), arXiv:2309.06657, the hinge loss on normalised likelihoods.
    """
    return relu(1 - beta * logps.log_ratio)


@pairwise_loss(
    "orpo", reference=False, paper="arXiv:2403.07691, eq. 6 and 7", normalised=True, ranges={"lam": NOT_NEGATIVE}
)
def orpo(logps: PairLogps, *, lam: float = 0.1) -> Tensor:
    """ORPO loss of each pair: shape (P,), nats. Mean NLL of the chosen completion plus an odds-ratio term.

    lam: weight of the odds-ratio term, >= 0. Odds are of the geometric mean token probability, so lengths are needed.
    Source: Hong, Lee and Thorne 2024, arXiv:2403.07691, eq. 6 and 7.
    Departs: the NLL is over the completion alone, not prompt and completion.
    """
    odds_ratio = log_odds(logps.chosen_mean) - log_odds(logps.rejected_mean)
    return -logps.chosen_mean - lam * logsigmoid(odds_ratio)


@pairwise_loss(
    "simpo",
    reference=False,
    paper="arXiv:2405.14734, eq. 6",
    normalised=True,
    ranges={"beta": POSITIVE, "gamma": NOT_NEGATIVE},
)
def simpo(logps: PairLogps, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO loss of each pair: shape (P,), nats. Logistic in the difference of mean log-probs, less a target margin.

    beta: reward per nat per token, > 0. gamma: the target margin, >= 0, in units of reward (beta times nats per token).
    Source: Meng, Xia and Chen 2024, arXiv:2405.14734, eq. 6.
    """
    return -logsigmoid(beta * (logps.chosen_mean - logps.rejected_mean) - gamma)


@pairwise_loss(
    "cpo", reference=False, paper="arXiv:2401.08417, eq. 3 and 5", ranges={"beta": POSITIVE, "alpha": NOT_NEGATIVE}
)
def cpo(logps: PairLogps, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """CPO loss of each pair: shape (P,), nats. DPO with a uniform reference, plus the summed NLL of the chosen side.

    beta: scale of the margin, > 0. alpha: weight of the NLL, >= 0.
    Source: Xu et al. 2024, arXiv:2401.08417, eq. 3 and 5.
    """
    return -logsigmoid(beta * (logps.chosen - logps.rejected)) - alpha * logps.chosen


@pairwise_loss(
    "dpop",
    reference=True,
    paper="arXiv:2402.13228, eq. 3",
    at_start=_log_two,
    ranges={"beta": POSITIVE, "lam": NOT_NEGATIVE},
)
def dpop(logps: PairLogps, *, beta: float = 0.3, lam: float = 50.0) -> Tensor:
    """DPO-positive loss of each pair: shape (P,), nats. DPO that also charges for a falling chosen log-prob.

    beta: pull towards the reference, > 0. lam: weight of the charge, >= 0; felt where the chosen log-ratio is below 0.
    Source: Pal et al. 2024 (Smaug), arXiv:2402.13228, eq. 3.
    """
    fall = relu(-logps.chosen_log_ratio)  # not clamp: at the start the gradient is DPO's
    return -logsigmoid(beta * (logps.log_ratio - lam * fall))


@pairwise_loss(
    "dpo_nll", reference=True, paper="arXiv:2404.19733, eq. 1", ranges={"beta": POSITIVE, "alpha": NOT_NEGATIVE}
)
def dpo_nll(logps: PairLogps, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """DPO loss of each pair plus the mean NLL of its chosen completion: shape (P,), nats. Needs chosen_length.

    beta: pull towards the reference, > 0. alpha: weight of the NLL per token, >= 0.
    Source: Pang et al. 2024 (iterative RPO), arXiv:2404.19733, eq. 1.
    Departs: alpha weighs the NLL, there it weighs the DPO term; the NLL is over the completion.
    """
    return -logsigmoid(beta * logps.log_ratio) - alpha * logps.chosen_mean


@pairwise_loss(
    "ln_dpo",
    reference=True,
    paper="arXiv:2411.15124, section 5.1 (length-normalised DPO)",
    normalised=True,
    at_start=_log_two,
    ranges={"beta": POSITIVE},
)
def ln_dpo(logps: PairLogps, *, beta: float = 5.0) -> Tensor:
    """Length-normalised DPO loss of each pair: shape (P,), nats. DPO on log-ratios per token; needs lengths.

    beta: pull towards the reference, > 0; per token, hence tens of times larger than DPO's.
    Source: Lambert et al. 2024 (Tulu 3), arXiv:2411.15124, section 5.1, length-normalised DPO.
    """
    return -logsigmoid(beta * logps.mean_log_ratio)


@pairwise_loss(
    "r_dpo",
    reference=True,
    paper="arXiv:2403.19159, section 3 (length-regularised objective)",
    ranges={"beta": POSITIVE, "alpha": NOT_NEGATIVE},
)
def r_dpo(logps: PairLogps, *, beta: float = 0.1, alpha: float = 0.05) -> Tensor:
    """Length-regularised DPO loss of each pair: shape (P,), nats. A token costs alpha in reward; needs lengths.

    beta: pull towards the reference, > 0. alpha: reward per token taken off, >= 0.
    Source: Park et al. 2024, arXiv:2403.19159, section 3.
    Trap: the length difference is added inside the sigmoid. A long chosen side is thereby explained by its length and
    earns less; with a minus sign, as sometimes published, length is driven up.
    """
    return -logsigmoid(beta * logps.log_ratio + alpha * (logps.chosen_tokens - logps.rejected_tokens))


@pairwise_loss(
    "unlikelihood", reference=False, paper="arXiv:2305.18290, section 6 (baseline)", ranges={"alpha": "[0, 1]"}
)
def unlikelihood(logps: PairLogps, *, alpha: float = 0.5) -> Tensor:
    """Unlikelihood baseline of each pair: shape (P,), nats. NLL of chosen plus alpha times log-prob of rejected.

    alpha: weight of the rejected side, [0, 1]. Unbounded below, and known to degenerate: a baseline, not advice.
    Source: Rafailov et al. 2023, arXiv:2305.18290, section 6, after Welleck et al. 2019, arXiv:1908.04319.
    Departs: Welleck et al. lower log(1 - p) token by token; here log p of the whole completion, as the baseline does.
    """
    return -logps.chosen + alpha * logps.rejected
