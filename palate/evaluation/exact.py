"""A model in a world that can be listed: its table, and with it exact KL, reward, win rate and optimality gap."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from palate.scoring import evaluation_mode
from palate.worlds import enumerable
from palate.worlds.enumerable import World


def table_of(model: nn.Module, world: World) -> np.ndarray:
    """(P, K) log-probs of every completion under the model, nats, float64. See `completion_logps`."""
    with torch.no_grad(), evaluation_mode(model):
        return completion_logps(model, world).cpu().numpy()


def completion_logps(model: nn.Module, world: World) -> Tensor:
    """(P, K) log-probs of every completion, nats, float64, differentiable.

    The stock forward over the beginnings that leave one symbol to write, rows of one length: their logits are those
    of all shorter beginnings too. Raises ValueError for a model whose vocabulary is not the world's symbols (see
    `World.llama`): then every row is a law.
    """
    embedding = model.get_input_embeddings().weight
    if len(embedding) != world.symbols:
        raise ValueError(f"the model writes {len(embedding)} symbols, the world has {world.symbols}")
    beginnings = world.completion_ids[:: world.symbols, :-1]
    rows = []
    for prompt in world.prompt_ids:
        ids = np.concatenate([np.broadcast_to(prompt, (len(beginnings), len(prompt))), beginnings], 1)
        logits = model(input_ids=torch.from_numpy(ids).to(embedding.device), use_cache=False).logits
        steps = logits[:, len(prompt) - 1 :].double().log_softmax(-1)  # (V**(T-1), T, V)
        row = steps.new_zeros(1)
        for done in range(world.length):
            step = steps[:: world.symbols ** (world.length - 1 - done), done]
            row = (row[:, None] + step).flatten()
        rows.append(row)
    return torch.stack(rows)


def measure(policy: np.ndarray, reference: np.ndarray, reward: np.ndarray, beta: float) -> dict[str, float]:
    """Exact numbers of a table, averaged over prompts, under their public names.

    exact/reward; exact/kl to the reference, nats; exact/win_rate against it, ties half; exact/gap = beta log Z - J and
    exact/tv, the distance to the optimum at beta; exact/best_reward, the most that any policy gets at this KL.
    """
    kl = float(enumerable.sequence_kl(policy, reference).mean())
    best = enumerable.optimum(reference, reward, beta)
    return {
        "exact/reward": float(enumerable.expected_reward(policy, reward).mean()),
        "exact/kl": kl,
        "exact/win_rate": float(enumerable.win_rate(policy, reference, reward).mean()),
        "exact/gap": float(enumerable.optimality_gap(policy, reference, reward, beta).mean()),
        "exact/tv": float(enumerable.total_variation(policy, best).mean()),
        "exact/best_reward": enumerable.best_reward(reference, reward, kl),
    }


def evaluator(world: World, reference: np.ndarray, reward: np.ndarray, beta: float) -> Callable[[nn.Module], dict]:
    """(model) -> `measure` of its table: an evaluation for the loop."""
    return lambda model: measure(table_of(model, world), reference, reward, beta)
