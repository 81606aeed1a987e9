"""Worlds whose every completion can be listed, so that optimum, KL, reward, win rate and frontier are numbers.

A completion is exactly `length` symbols, and there its end is forced; there is no end token. Length 1 is the tabular
bandit. What is known of a policy is its table: (P, K) log-probs, nats, float64, of all K completions of all P
prompts, the completions in the order of their symbols. Everything here is NumPy on such tables; `evaluation.exact`
makes the table of a model.

Notation: ref the reference, r a reward of shape (P, K), beta the weight of KL(policy || ref), pi* the optimum.
"""

import json
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from palate.data.records import Demonstration, PreferencePair, Prompt
from palate.errors import UsageError

ALPHABET = string.ascii_letters
MOST = 100_000  # completions of a prompt


@dataclass(frozen=True)
class World:
    """V symbols, completions of T of them, P prompts. The default is METHODS world B; length 1 is world A.

    symbols: V, 2 to 50. length: T, at least 1; V**T is at most 100,000. prompts: P, at least 1.
    Raises UsageError beyond these.
    """

    symbols: int = 6
    length: int = 5
    prompts: int = 4

    def __post_init__(self):
        if not (2 <= self.symbols <= 50 and self.length >= 1 and self.prompts >= 1 and self.size <= MOST):
            what = (
                f"a world of {self.symbols} symbols, length {self.length} and {self.prompts} prompts cannot be listed"
            )
            raise UsageError(what, next=f"take 2 to 50 symbols, at most {MOST} completions, a prompt or more")

    @property
    def size(self) -> int:
        """K, completions of each prompt: V**T."""
        return self.symbols**self.length

    @property
    def alphabet(self) -> str:
        """The symbols, one character each; the place of each is its token id."""
        return ALPHABET[: self.symbols]

    @cached_property
    def prompt_ids(self) -> np.ndarray:
        """(P, width) symbols of each prompt: T symbols in turn, then the number of the prompt.

        Longer than any completion, so that none can begin with its prompt, which a reader of data files would take
        for a mistake; and of several symbols, since attention cannot count what follows a prompt of one.
        """
        width = next(n for n in range(1, 64) if self.symbols**n >= self.prompts)
        turns = np.arange(self.length, dtype=np.int64) % self.symbols
        return np.concatenate([np.tile(turns, (self.prompts, 1)), self._digits(self.prompts, width)], 1)

    @cached_property
    def completion_ids(self) -> np.ndarray:
        """(K, T) symbols of each completion, first symbol slowest."""
        return self._digits(self.size, self.length)

    def _digits(self, count: int, width: int) -> np.ndarray:
        numbers = np.arange(count, dtype=np.int64)[:, None]
        return numbers // self.symbols ** np.arange(width - 1, -1, -1, dtype=np.int64) % self.symbols

    def prompt(self, index: int) -> str:
        """The text of a prompt."""
        return "".join(self.alphabet[i] for i in self.prompt_ids[index])

    def completion(self, index: int) -> str:
        """The text of a completion."""
        return "".join(self.alphabet[i] for i in self.completion_ids[index])

    def place(self, prompt: str, completion: str) -> tuple[int, int]:
        """(prompt, completion) as indices into a table. Raises UsageError for texts that are not of this world."""
        try:
            row = self._prompt_places[prompt]
            column = int(np.ravel_multi_index([self.alphabet.index(c) for c in completion], self._shape))
        except (KeyError, ValueError):
            what = "is no prompt and completion of this world"
            raise UsageError(what, where=repr((prompt, completion))[:80]) from None
        return row, column

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.symbols,) * self.length

    @cached_property
    def _prompt_places(self) -> dict[str, int]:
        return {self.prompt(p): p for p in range(self.prompts)}

    def reward(self, seed: int) -> np.ndarray:
        """(P, K) drawn rewards: of each symbol at each place of each prompt, and of each two neighbours.

        Scaled to mean 0 and variance 1 over the completions of each prompt. In a world of length 1 every completion
        has a number of its own.
        """
        draw = np.random.default_rng([seed, 1])
        places = draw.normal(size=(self.prompts, self.length, self.symbols))
        neighbours = draw.normal(size=(self.symbols, self.symbols))
        ids = self.completion_ids
        found = sum(places[:, t, ids[:, t]] for t in range(self.length))
        found = found + neighbours[ids[:, :-1], ids[:, 1:]].sum(1)
        return (found - found.mean(1, keepdims=True)) / found.std(1, keepdims=True)

    def language(self, seed: int) -> np.ndarray:
        """The table of a drawn Markov chain that goes on from the prompt's last symbol: what a reference may learn.

        Each symbol's followers have probabilities in proportion to exp of a normal number.
        """
        scores = np.random.default_rng([seed, 2]).normal(size=(self.symbols, self.symbols))
        steps = scores - _logsumexp(scores)[:, None]
        last = np.concatenate([np.repeat(self.prompt_ids[:, -1:], self.size, 1)[..., None], self._tiled()], -1)
        return steps[last[..., :-1], last[..., 1:]].sum(-1)

    def _tiled(self) -> np.ndarray:
        return np.broadcast_to(self.completion_ids, (self.prompts, *self.completion_ids.shape))

    # --- tables and the steps they are made of

    def tabulate(self, policy: Callable[[str, str], Sequence[float]]) -> np.ndarray:
        """The table of any policy. policy: (prompt, what is written so far) -> (V,) log-probs of the next symbol."""
        steps = []
        for done in range(self.length):
            texts = ["".join(self.alphabet[i] for i in ids) for ids in self._digits(self.symbols**done, done)]
            rows = [[policy(self.prompt(p), text) for text in texts] for p in range(self.prompts)]
            steps.append(np.asarray(rows, dtype=np.float64))
        return self.chain(steps)

    def chain(self, steps: Sequence[np.ndarray]) -> np.ndarray:
        """The table of T arrays of step log-probs, the t-th (P, V**t, V): the next symbol after each beginning."""
        table = np.zeros((self.prompts, 1))
        for step in steps:
            table = (table[..., None] + step).reshape(self.prompts, -1)
        return table

    def prefixes(self, table: np.ndarray) -> list[np.ndarray]:
        """T + 1 arrays: log-prob of every beginning of t symbols, (P, V**t), t from 0 to T."""
        found = [table]
        for _ in range(self.length):
            found.append(_logsumexp(found[-1].reshape(self.prompts, -1, self.symbols)))
        return found[::-1]

    def steps(self, table: np.ndarray) -> list[np.ndarray]:
        """T arrays (P, V**t, V), the inverse of `chain`: log-probs of the next symbol after each beginning."""
        sums = self.prefixes(table)
        return [after.reshape(self.prompts, -1, self.symbols) - before[..., None] for before, after in pairwise(sums)]

    def step_kl(self, policy: np.ndarray, other: np.ndarray) -> np.ndarray:
        """(P, T) nats: at each place the mean over the policy's beginnings of the KL between the next symbols.

        Its sum over places is the sequence KL.
        """
        columns = []
        ours, theirs = self.steps(policy), self.steps(other)
        for prefix, mine, its in zip(self.prefixes(policy)[:-1], ours, theirs, strict=True):
            columns.append((np.exp(prefix) * (np.exp(mine) * (mine - its)).sum(-1)).sum(-1))
        return np.stack(columns, 1)

    def soft_values(self, ref: np.ndarray, reward: np.ndarray, beta: float) -> list[np.ndarray]:
        """T + 1 arrays (P, V**t): beta log Z of every beginning, by the recursion from the leaves, where it is r.

        The first is beta log Z of the prompt. Source: METHODS 8.14.
        """
        values = [reward]
        for step in self.steps(ref)[::-1]:
            after = values[-1].reshape(self.prompts, -1, self.symbols)
            values.append(beta * _logsumexp(step + after / beta))
        return values[::-1]

    # --- what palate trains on

    def demonstrations(self, table: np.ndarray, count: int, seed: int = 0) -> list[Demonstration]:
        """`count` completions drawn from the table, prompts in turn."""
        rows, columns = self._drawn(table, count, np.random.default_rng([seed, 3]))
        return [Demonstration(self.prompt(p), self.completion(k)) for p, k in zip(rows, columns, strict=True)]

    def pairs(
        self,
        table: np.ndarray,
        reward: np.ndarray,
        count: int,
        seed: int = 0,
        *,
        sharpness: float = 1.0,
        distinct: bool = True,
    ) -> list[PreferencePair]:
        """`count` pairs of two completions drawn from the table, labelled after Bradley and Terry; prompts in turn.

        sharpness: k of the labels, P(a over b) = sigma(k (r_a - r_b)); inf for labels without noise, where a tie is
        a coin. distinct: whether two equal completions are drawn again.
        """
        draw = np.random.default_rng([seed, 4])
        rows, first = self._drawn(table, count, draw)
        _, second = self._drawn(table, count, draw)
        while distinct and len(same := np.flatnonzero(first == second)):
            again = [_sample(table[row], 2, draw) for row in rows[same]]
            first[same], second[same] = np.array(again).T
        gap = reward[rows, first] - reward[rows, second]
        wins = draw.random(count) < _sigmoid(np.where(gap == 0, 0.0, gap * sharpness))
        better, worse = np.where(wins, first, second), np.where(wins, second, first)
        return [
            PreferencePair(self.prompt(p), self.completion(b), self.completion(w))
            for p, b, w in zip(rows, better, worse, strict=True)
        ]

    def prompt_records(self) -> list[Prompt]:
        """The prompts."""
        return [Prompt(self.prompt(p)) for p in range(self.prompts)]

    def _drawn(self, table: np.ndarray, count: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(count) % self.prompts
        columns = np.empty(count, dtype=np.int64)
        for row in range(min(self.prompts, count)):
            columns[rows == row] = _sample(table[row], int((rows == row).sum()), draw)
        return rows, columns

    def tokenizer(self):
        """A transformers tokenizer of the V symbols and nothing else: no begin, end or pad token."""
        from tokenizers import Tokenizer, decoders, models
        from transformers import PreTrainedTokenizerFast

        core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(self.alphabet)}, []))
        core.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)

    def write_start(self, folder: Path, *, width: int = 32, layers: int = 2, spread: float = 0.02) -> Path:
        """The folder, holding what `--model new:FOLDER` takes: this tokenizer and the config of a small Llama.

        spread: standard deviation of the weights that will be drawn.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer().save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(self.llama(width, layers, spread), indent=2), encoding="utf-8")
        return folder

    def llama(self, width: int = 32, layers: int = 2, spread: float = 0.02) -> dict:
        """The config of a Llama that writes this world's symbols and nothing else: its table sums to one."""
        return {
            "model_type": "llama",
            "vocab_size": self.symbols,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": spread,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }


# --- what is true of tables: each row is a law, each result one number a prompt ------------------------------------


def expected_reward(policy: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """(P,) mean reward under the policy."""
    return (np.exp(policy) * reward).sum(1)


def sequence_kl(policy: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(P,) KL(policy || other) of whole completions, nats. What the policy never writes (-inf) adds nothing."""
    with np.errstate(invalid="ignore"):
        terms = np.exp(policy) * (policy - other)
    return np.where(policy == -np.inf, 0.0, terms).sum(1)


def total_variation(policy: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(P,) half the summed distance of two laws, in [0, 1]."""
    return 0.5 * np.abs(np.exp(policy) - np.exp(other)).sum(1)


def objective(policy: np.ndarray, ref: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """(P,) J = mean reward - beta KL(policy || ref)."""
    return expected_reward(policy, reward) - beta * sequence_kl(policy, ref)


def log_partition(ref: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """(P,) log Z, Z = sum of ref exp(r / beta). beta log Z is the largest J. Source: arXiv:2305.18290, eq. 4."""
    return _logsumexp(ref + reward / beta)


def optimum(ref: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """(P, K) table of pi* = ref exp(r / beta) / Z. Source: arXiv:2305.18290, eq. 4."""
    return ref + reward / beta - log_partition(ref, reward, beta)[:, None]


def optimality_gap(policy: np.ndarray, ref: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """(P,) beta log Z - J(policy) >= 0, which is beta KL(policy || pi*): how far from the best, in units of reward."""
    return beta * log_partition(ref, reward, beta) - objective(policy, ref, reward, beta)


def win_rate(policy: np.ndarray, other: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """(P,) probability that the policy's completion has the larger reward than the other's; a tie counts half."""
    found = []
    for mine, its, values in zip(np.exp(policy), np.exp(other), reward, strict=True):
        _, level = np.unique(values, return_inverse=True)
        ours, theirs = (np.bincount(level, weights=law) for law in (mine, its))
        below = np.cumsum(theirs) - theirs
        found.append(ours @ (below + theirs / 2))
    return np.array(found)


def frontier(ref: np.ndarray, reward: np.ndarray, betas: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(kl, reward) of pi* at each beta, averaged over prompts: (B,) each. No policy has more reward at its KL.

    Along it dR/dKL = beta. Source: METHODS 8.13.
    """
    tables = [optimum(ref, reward, beta) for beta in betas]
    kl = np.array([sequence_kl(table, ref).mean() for table in tables])
    return kl, np.array([expected_reward(table, reward).mean() for table in tables])


def best_reward(ref: np.ndarray, reward: np.ndarray, kl: float) -> float:
    """The exact frontier's reward at a KL, both averaged over prompts: the most that any policy gets within it.

    Beyond the largest KL of the frontier it is the mean of the prompts' largest rewards.
    """
    from scipy.optimize import brentq

    if kl <= 0:
        return float(expected_reward(ref, reward).mean())
    scale = float(np.ptp(reward, axis=1).max()) or 1.0
    low, high = np.log(scale) - 12.0, np.log(scale) + 12.0  # of log beta

    def excess(log_beta: float) -> float:
        return float(frontier(ref, reward, [np.exp(log_beta)])[0][0] - kl)

    if excess(low) <= 0:
        return float(reward.max(1).mean())
    beta = float(np.exp(high if excess(high) >= 0 else brentq(excess, low, high, xtol=1e-12)))
    # along the tangent at that beta: a rounding of the KL then moves the reward by its square only
    at, value = frontier(ref, reward, [beta])
    return float(value[0] + beta * (kl - at[0]))


def best_of(table: np.ndarray, reward: np.ndarray, n: int) -> np.ndarray:
    """(P, K) table of the best of n draws by reward; of equally good draws each is as likely to be taken.

    With rewards sorted, P = F_i**n - F_(i-1)**n. Source: METHODS 8.16.
    """
    laws = []
    for law, values in zip(np.exp(table), reward, strict=True):
        _, level = np.unique(values, return_inverse=True)
        mass = np.bincount(level, weights=law)
        top = np.minimum(np.cumsum(mass), 1.0)
        below = np.concatenate([[0.0], top[:-1]])
        won = top**n - below**n
        laws.append(law * (won / np.where(mass > 0, mass, 1.0))[level])
    with np.errstate(divide="ignore"):
        return np.log(np.array(laws))


def best_of_kl_bound(n: int) -> float:
    """log n - (n - 1) / n: the best of n draws has no larger KL to the law they were drawn from, nats."""
    return float(np.log(n) - (n - 1) / n)


def preferred(table: np.ndarray, reward: np.ndarray, sharpness: float = 1.0) -> np.ndarray:
    """(P, K) table of the chosen side of pairs: 2 table(y) sum_b table(b) sigma(k (r_y - r_b)).

    What Preferred-FT converges to. Both sides are independent draws, equal ones kept. Source: METHODS 8.32.
    """
    return table + np.log(2 * beating(table, reward, sharpness))


def beating(table: np.ndarray, reward: np.ndarray, sharpness: float = 1.0) -> np.ndarray:
    """(P, K) probability that each completion is preferred to one drawn from the table."""
    found = np.empty_like(reward)
    for p, (law, values) in enumerate(zip(np.exp(table), reward, strict=True)):
        for part in _chunks(len(values)):
            found[p, part] = _sigmoid(sharpness * (values[part, None] - values)) @ law
    return found


def ordered(table: np.ndarray, reward: np.ndarray, learnt: np.ndarray, sharpness: float = 1.0) -> dict[str, np.ndarray]:
    """What a learnt reward is worth on labelled pairs of two different draws from the table: (P,) each, exact.

    accuracy, loss (nats) of the learnt reward; best_accuracy, floor: of the true one, the ceilings E max(p, 1 - p) and
    E H(p). A tie is right by half. learnt: (P, K), log-odds in its differences. Source: METHODS 8.22.
    """
    names = ("accuracy", "best_accuracy", "loss", "floor")
    found = np.zeros((4, len(table)))
    for p, (law, true, ours) in enumerate(zip(np.exp(table), sharpness * reward, learnt, strict=True)):
        for part in _chunks(len(law)):
            gap, mine = true[part, None] - true, ours[part, None] - ours
            chance = _sigmoid(gap)
            right = np.where(mine == 0, 0.5, np.where(mine > 0, chance, 1 - chance))
            costs = [chance * np.logaddexp(0, -x) + (1 - chance) * np.logaddexp(0, x) for x in (mine, gap)]
            values = (right, np.maximum(chance, 1 - chance), *costs)
            pair = law[part, None] * law
            pair[np.arange(len(pair)), np.arange(part.start, part.start + len(pair))] = 0.0
            found[:, p] += [float((pair * value).sum()) for value in values]
        found[:, p] /= 1 - float((law**2).sum())
    return dict(zip(names, found, strict=True))


def ipo_optimum(ref: np.ndarray, opponents: np.ndarray, reward: np.ndarray, tau: float) -> np.ndarray:
    """(P, K) table of IPO's optimum: ref exp(P(y beats opponents) / tau) / Z. Source: arXiv:2310.12036; METHODS 8.5."""
    return optimum(ref, beating(opponents, reward), tau)


def logit_gradient(policy: np.ndarray, ref: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """(P, K) gradient of J in free logits of each prompt: pi (A - E A), A = r - beta log(pi / ref)."""
    law, advantage = np.exp(policy), reward - beta * (policy - ref)
    return law * (advantage - (law * advantage).sum(1, keepdims=True))


def _chunks(count: int, size: int = 512) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _sample(row: np.ndarray, count: int, draw: np.random.Generator) -> np.ndarray:
    sums = np.cumsum(np.exp(row))
    return np.searchsorted(sums, draw.random(count) * sums[-1], side="right").clip(max=len(row) - 1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(x)


def _logsumexp(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    from scipy.special import logsumexp

    return np.asarray(logsumexp(x, axis=-1))
