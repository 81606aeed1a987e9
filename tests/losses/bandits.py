"""A bandit of a few arms, and the exact minimum of a loss over its policies."""

import itertools

import torch

from palate.losses import PairLogps

K = 6


def world(seed: int):
    """A bandit of K arms: reference log-probs, rewards, lengths, all ordered pairs and their weights."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(K, generator=generator, dtype=torch.float64).log_softmax(0)
    reward = torch.randn(K, generator=generator, dtype=torch.float64)
    length = torch.randint(1, 9, (K,), generator=generator)
    pairs = torch.tensor(list(itertools.permutations(range(K), 2)))
    weight = torch.rand(len(pairs), generator=generator, dtype=torch.float64) + 0.1
    return reference, reward, length, pairs, weight / weight.sum()


def minimise(objective, start):
    """Log-probs at the minimum of a smooth convex function of them, and the least value: LBFGS in float64."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        tolerance_grad=1e-13,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = objective(logits.log_softmax(0))
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    return logits.detach().log_softmax(0), objective(logits.detach().log_softmax(0)).item()


def pair_objective(loss, reference, length, pairs, weight, win):
    """Expected loss over ordered pairs (a, b) drawn by weight, where a wins with probability `win`."""
    a, b = pairs.T

    def objective(logps):
        kept = PairLogps(logps[a], logps[b], reference[a], reference[b], length[a], length[b])
        flipped = PairLogps(logps[b], logps[a], reference[b], reference[a], length[b], length[a])
        return (weight * (win * loss(kept) + (1 - win) * loss(flipped))).sum()

    return objective
