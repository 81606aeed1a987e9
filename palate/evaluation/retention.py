"""What training may have broken: numbers over completions and log-probs, before and after, and the flags they raise.

Pure functions over token ids and log-probs; `recipes.retain` brings the model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

# A flag is raised where the change from before to after is larger than this. Set on pilot runs of the built-in model,
# then checked on other seeds, twenty healthy runs and twenty over-trained ones: the largest change of the healthy and
# the smallest of the over-trained stand behind each. The three likelihoods catch every over-trained run; the others,
# which some of these leave as they were, say what it looks like. docs/results.md; examples/overtrained.py.
LOSS_RISE = 0.5  # nats a token of the demonstrations: pilot 0.21 and 1.36, check 0.11 and 1.05
DRIFT = 0.5  # nats a token by which the start's own completions became less likely: 0.18 and 1.33, 0.11 and 1.08
CHOSEN_RISE = 0.5  # nats a token of the held-out chosen, most of them less likely: 0.19 and 1.31, 0.13 and 1.12
DISTINCT_FALL = 0.5  # share of distinct-2 that is gone: check 0.10, five of the over-trained beyond
REPETITION_RISE = 0.1  # of the share of 4-grams that repeat: 0.01, five beyond
FINISHED_FALL = 0.25  # of the share of completions that end within the limit: 0.00, fourteen beyond
LENGTH_FACTOR = 2.0  # of the mean length, up or down: 1.1, thirteen beyond


def distinct(completions: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams divided by all n-grams of the completions together, in (0, 1]; None where there is no n-gram.

    completions: token ids, without the token that ends them.
    Source: Li et al. 2016, arXiv:1510.03055, section 5.2 (distinct-1, distinct-2).
    Departs: they divide by the number of tokens; with n-grams 1 means "no n-gram twice" for every n.
    """
    grams = [gram for ids in completions for gram in _grams(ids, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(completions: Sequence[Sequence[int]], n: int = 4) -> float | None:
    """Share of a completion's n-grams that stood in it before, mean over completions, in [0, 1); None without any.

    A completion shorter than n repeats nothing.
    Source: Welleck et al. 2020, arXiv:1908.04319, section 6.1 (seq-rep-n).
    """
    shares = []
    for ids in completions:
        grams = _grams(ids, n)
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares) if shares else None


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    ids = [int(i) for i in ids]
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def nats_per_token(totals: Sequence[float], lengths: Sequence[int]) -> float | None:
    """Negative log-likelihood over all tokens together, nats a token; None where there is no token."""
    return -sum(totals) / sum(lengths) if sum(lengths) else None


def displaced(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Share of completions whose log-prob fell, in [0, 1]; None of none."""
    pairs = list(zip(before, after, strict=True))
    return sum(last < first for first, last in pairs) / len(pairs) if pairs else None


def completion_numbers(completions: Sequence[Sequence[int]], finished: Sequence[bool]) -> dict[str, float | None]:
    """distinct-1 to -3, repetition, mean length in tokens without the end token, share that ended; {} of none."""
    if not completions:
        return {}
    return {f"distinct-{n}": distinct(completions, n) for n in (1, 2, 3)} | {
        "repetition": repetition(completions),
        "length": sum(map(len, completions)) / len(completions),
        "finished": sum(finished) / len(finished),
    }


def flags(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What a reader should worry about, one plain sentence each; [] where nothing is beyond its threshold.

    before, after: numbers by name, as `completion_numbers` and `recipes.retain` give them (loss, chosen, drift in nats
    a token; displaced, a share). Names that stand in one of them alone are not looked at; None after a number before
    is worth a flag: it was not finite. (A distinct-n of None means completions too short to have one.)
    """
    said = []
    shared = [name for name in before if name in after and before[name] is not None]
    if lost := [name for name in shared if after[name] is None and not name.startswith("distinct")]:
        said.append(f"Not finite any more: {', '.join(lost)}.")
    here = {name: (float(before[name]), float(after[name])) for name in shared if after[name] is not None}

    def beyond(name: str, rule) -> bool:
        return name in here and rule(*here[name])

    if beyond("loss", lambda a, b: b - a > LOSS_RISE):
        said.append("The demonstrations became less likely: {:.2f} to {:.2f} nats a token.".format(*here["loss"]))
    if beyond("drift", lambda a, b: b - a > DRIFT):
        _, drift = here["drift"]
        said.append(f"What the model wrote before became less likely, by {drift:.2f} nats a token.")
    most = here.get("displaced", (0.0, 0.0))[1]
    if most > 0.5 and beyond("chosen", lambda a, b: b - a > CHOSEN_RISE):
        a, b = here["chosen"]
        said.append(f"{most:.0%} of the chosen completions lost likelihood, {b - a:.2f} nats a token over all of them.")
    if beyond("distinct-2", lambda a, b: b < a * (1 - DISTINCT_FALL)):
        said.append("Completions became alike: distinct-2 went from {:.2f} to {:.2f}.".format(*here["distinct-2"]))
    if beyond("repetition", lambda a, b: b - a > REPETITION_RISE):
        said.append("Completions repeat themselves: {:.0%} of 4-grams before, {:.0%} now.".format(*here["repetition"]))
    if beyond("finished", lambda a, b: a - b > FINISHED_FALL):
        said.append("Fewer completions come to an end: {:.0%} before, {:.0%} now.".format(*here["finished"]))
    if beyond("length", lambda a, b: b > a * LENGTH_FACTOR or b * LENGTH_FACTOR < a):
        a, b = here["length"]
        said.append(f"Completions became {'longer' if b > a else 'shorter'}: {a:.0f} to {b:.0f} tokens in the mean.")
    return said
