"""SPIN: demonstrations alone; the model plays against its own samples until nobody can tell the two apart.

Source: Chen et al. 2024, arXiv:2401.01335, algorithm 1 and equation 4.7 with the logistic loss, which is DPO's with the
demonstration chosen, the sample rejected, and the round's start as the reference.
Departs: a sample that was cut makes no pair, since its end would tell it from a demonstration. Lambda is 1 unless
given, where a round that is solved exactly is at its goal; the paper's 0.1 moves too far at any rate but a small one.
"""

import math
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from palate.errors import DataError
from palate.recipes.rounds import Case, Round, RoundsConfig, Way
from palate.recipes.rounds import run as go
from palate.recipes.verbs import stderr


class SpinConfig(RoundsConfig):
    """Options of `palate spin`."""

    lam: Annotated[
        list[Annotated[float, Field(gt=0, lt=math.inf)]],
        Field(
            min_length=1,
            description="Lambda of each round, the beta of its loss; the last holds on; the paper's: 0.1,0.1,0.1,5",
        ),
    ] = [1.0]
    epochs: Annotated[int, Field(gt=0, description="Passes over the pairs of a round")] = 2


def run(config: SpinConfig, *, verb: str = "spin", argv=(), say=stderr, panel=None) -> dict[str, Any]:
    """Trains --model on the demonstrations of --data against its own samples; the result object of --json."""
    for line in warnings(config):
        say(line)
    way = Way(partial(read, config), pair, beta=lambda number: lam(config, number), keeps_previous=True)
    return go(config, way, verb=verb, argv=argv, say=say, panel=panel)


def lam(config: SpinConfig, number: int) -> float:
    """Lambda of a round, from 1."""
    return config.lam[min(number, len(config.lam)) - 1]


def read(config: SpinConfig):
    """The demonstrations; of a conversation up to its first reply. Raises DataError (E207) for running text."""
    from palate.data.sources import read_demonstrations

    found = read_demonstrations(
        config.data, columns=config.columns or None, format=config.format, bad_rows=config.bad_rows
    )
    if (bare := next((record for record in found if not record.prompt), None)) is not None:
        what = "has no prompt, so there is nothing that the model could answer in its place"
        raise DataError(what, where=str(bare.source), code="E207", next="give demonstrations with prompts")
    return found


def pair(this: Round, cases: list[Case]):
    """Each demonstration against the sample of its prompt."""
    from palate.sampling.pairing import against_demonstration, pairing

    return pairing(against_demonstration(case.record, *case.candidates) for case in cases)


def warnings(config: SpinConfig) -> list[str]:
    """What is known of these lambdas where a round is solved exactly.

    Then it multiplies log(p / p_data) by 1 - 1 / lambda. Source: Chen et al. 2024, theorem 5.4; METHODS 4.
    """
    used = sorted({lam(config, number) for number in range(1, config.rounds + 1)})
    if config.rounds < 2 or used[0] > 0.5:
        return []
    below = ", ".join(f"{value:g}" for value in used if value < 0.5)
    if not below:
        return ["warning: with lambda 1/2 rounds that are solved exactly swing about the data for ever"]
    return [
        f"warning: lambda {below} is below 1/2: rounds that are solved exactly diverge, each multiplying the distance "
        f"from the data, log(p / p_data), by {1 - 1 / used[0]:g}; it works only where training stops far from the end "
        "of its loss, by --steps, --epochs and --lr, so look at the win rate of every round"
    ]
