"""Policy gradients on sampled completions: rewards, advantages, clipped losses, KL estimates, the KL controller.

Tokens of all completions stand in one flat column (N,), completion after completion; `lengths` (S,) says how many
belong to each. Nothing is padded, so no completion can reach into its neighbour.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_TINY = 1e-8


def token_rewards(scores: Tensor, log_ratio: Tensor, lengths: Tensor, coefficient: float) -> Tensor:
    """Reward of each token: (N,). Minus the KL coefficient times its log-ratio; the score at the completion's last one.

    scores: (S,). log_ratio: (N,) log-prob under the sampling policy minus under the reference, nats.
    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2, token by token.
    """
    rewards = -coefficient * log_ratio
    rewards[lengths.cumsum(0) - 1] += scores.to(rewards.dtype)
    return rewards


def end_scores(scores: Tensor, finished: Tensor, penalty: float | None) -> Tensor:
    """The scores (S,), replaced by `penalty` where the completion has no end token; as they are where that is None.

    Without it nothing ever teaches the policy to stop. Source: Huang et al. 2024, arXiv:2403.17031, detail 21.
    """
    return scores if penalty is None else torch.where(finished, scores, torch.full_like(scores, penalty))


def generalised_advantages(
    rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of each token, (N,) both; returns are advantages plus values.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}; after a completion's end both are 0.
    values: (N,) of the state in which the token was chosen.
    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 11 and 16.
    """
    last = lengths.cumsum(0) - 1
    ends = torch.zeros(len(rewards), dtype=torch.bool, device=rewards.device)
    ends[last] = True
    following = torch.where(ends, 0, torch.cat([values[1:], values.new_zeros(1)]))
    delta = rewards + gamma * following - values
    advantages, carried = delta.clone(), delta.new_zeros(len(lengths))
    for back in range(int(lengths.max()) if len(lengths) else 0):  # from the last token of every completion
        rows = (back < lengths).nonzero()[:, 0]
        at = last[rows] - back
        carried[rows] = delta[at] + gamma * lam * carried[rows]
        advantages[at] = carried[rows]
    return advantages, advantages + values


def group_advantages(totals: Tensor, *, kind: str = "rloo") -> Tensor:
    """Advantage of each completion against the others of its prompt: (P, K), K >= 2.

    totals: (P, K) score minus KL coefficient times the sequence's log-ratio.
    kind: "rloo", minus the mean of the others; "grpo", standardised within the group (population deviation).
    Source: Ahmadian et al. 2024, arXiv:2402.14740, eq. 8; Shao et al. 2024, arXiv:2402.03300, section 4.1.2.
    Departs: in both the KL stands in the reward; GRPO's own stands in its loss.
    """
    if totals.shape[1] < 2:
        raise ValueError("a group has at least two completions")
    centred = totals - totals.mean(1, keepdim=True)
    if kind == "rloo":
        return centred * (totals.shape[1] / (totals.shape[1] - 1))
    if kind == "grpo":
        return centred / (totals.std(1, correction=0, keepdim=True) + _TINY)
    raise ValueError(f'there are no "{kind}" advantages: rloo or grpo')


def whiten(values: Tensor, *, shift_mean: bool = True) -> Tensor:
    """The values at variance 1 (population, plus 1e-8), and mean 0 unless `shift_mean` is False: then at their mean.

    Source: openai/lm-human-preferences, whiten.
    """
    mean = values.mean()
    white = (values - mean) * torch.rsqrt(values.var(correction=0) + _TINY)
    return white if shift_mean else white + mean


def clipped_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip: float = 0.2) -> Tensor:
    """PPO's loss of each token: (N,). The worse of -A ratio and -A ratio clipped to [1 - clip, 1 + clip].

    Gradients enter `logps` alone. Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7.
    """
    ratio = (logps - old_logps.detach()).exp()
    advantages = advantages.detach()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """Half the larger squared error of each token's value, as it is and held within `clip` of the old one: (N,).

    Gradients enter `values` alone. Source: openai/lm-human-preferences, PPOTrainer.loss.
    """
    old_values, returns = old_values.detach(), returns.detach()
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)


def k1(log_ratio: Tensor) -> Tensor:
    """KL(policy || reference) estimated from log(policy / reference) of the policy's samples: unbiased, any sign."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Half the square of the log-ratio: biased, little spread. Source: Schulman 2020, joschu.net/blog/kl-approx."""
    return 0.5 * log_ratio**2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-log_ratio) - 1 + log_ratio: unbiased, never below 0, heavy-tailed far away. Source: as `k2`."""
    return torch.expm1(-log_ratio) + log_ratio


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns), at most 1, below 0 worse than a constant; 0 where no return varies."""
    spread = float(returns.var(correction=0))
    return 1 - float((returns - values).var(correction=0)) / spread if spread > 0 else 0.0


@dataclass(frozen=True)
class KlController:
    """The KL coefficient, and how it follows the KL that is seen. target: nats a sequence; None: it stays as it is.

    horizon: episodes in which a relative error of 1 would double it, were errors not held to 0.2.
    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    coefficient: float
    target: float | None = None
    horizon: float = 10_000

    def after(self, kl: float, episodes: int) -> "KlController":
        """The controller once `episodes` were seen to have a mean sequence KL of `kl` nats."""
        if self.target is None:
            return self
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, coefficient=self.coefficient * (1 + error * episodes / self.horizon))
