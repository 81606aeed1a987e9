"""For each registered loss: its oracle, random options, and random rows as tensors and as decimals."""

import random
from dataclasses import dataclass, fields
from decimal import Decimal

import torch

from oracles import bradley_terry as bradley_terry_oracle
from oracles import (
    cdpo,
    cpo,
    dpo,
    ipo,
    irpo,
    kto,
    length_dpo,
    maximum_likelihood,
    orpo,
    rdpo,
    rso,
    simpo,
    smaug,
    tulu3,
)
from oracles.numbers import Pair, slope
from palate.losses import DemonstrationLogps, FeedbackLogps, PairLogps, PairRewards, RankedLogps, info

PAIRWISE = {
    "dpo": cdpo.loss,
    "robust_dpo": rdpo.loss,
    "ipo": ipo.loss,
    "hinge": rso.hinge,
    "orpo": orpo.loss,
    "simpo": simpo.loss,
    "cpo": cpo.loss,
    "dpop": smaug.loss,
    "dpo_nll": irpo.loss,
    "ln_dpo": tulu3.loss,
    "r_dpo": length_dpo.loss,
    "unlikelihood": dpo.unlikelihood,
}
TRAINED = {
    "pairwise": ("chosen", "rejected"),
    "ranked": ("total",),
    "feedback": ("completion",),
    "demonstration": ("total",),
    "reward": ("chosen", "rejected"),
}
OPTIONS = {  # how to draw each option
    "beta": lambda rng: 10 ** rng.uniform(-2, 0.7),
    "tau": lambda rng: 10 ** rng.uniform(-2, 0.7),
    "label_smoothing": lambda rng: rng.choice([0.0, rng.uniform(0, 0.45)]),
    "average": lambda rng: rng.random() < 0.5,
    "lam": lambda rng: 10 ** rng.uniform(-1, 2),
    "alpha": lambda rng: rng.choice([0.0, 1.0, rng.random()]),
    "gamma": lambda rng: rng.choice([0.0, rng.uniform(0, 4)]),
    "desirable_weight": lambda rng: rng.uniform(0, 2),
    "undesirable_weight": lambda rng: rng.uniform(0, 2),
    "margin": lambda rng: rng.choice([0.0, rng.uniform(0, 2)]),
    "centring": lambda rng: rng.choice([0.0, rng.uniform(0, 0.1)]),
}


@dataclass(frozen=True)
class Case:
    """Rows for one loss with the options it is called with, and what its oracle says of values and gradients."""

    logps: object
    options: dict
    values: list[Decimal]
    slopes: dict[str, list]  # by trained column, of the sum of the values


def draw_options(name: str, rng: random.Random) -> dict:
    return {option: OPTIONS[option](rng) for option in info(name).options}


def draw_logp(rng: random.Random, near: float | None = None) -> float:
    """A summed log-prob below 0: of any size, or some nats from another one."""
    return -(10 ** rng.uniform(-3, 2)) if near is None else min(-1e-3, near + rng.gauss(0, 3))


def tensors(kind: type, rows: list[tuple], dtype=torch.float64):
    """Columns from rows; whole numbers become int64, floats `dtype` with gradient, None stays None."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    made = []
    for column in columns:
        first = column[0][0] if isinstance(column[0], list) else column[0]
        if isinstance(first, bool):
            made.append(torch.tensor(column))
        elif isinstance(first, int):
            made.append(torch.tensor(column, dtype=torch.int64))
        else:
            made.append(torch.tensor(column, dtype=dtype, requires_grad=True))
    return kind(*made)


def _exact(options: dict) -> dict:
    return {key: value if isinstance(value, bool) else Decimal(value) for key, value in options.items()}


def draw(name: str, rng: random.Random, rows: int) -> Case:
    """A random case of `rows` rows of the loss's own kind."""
    kind, options = info(name).kind, draw_options(name, rng)
    exact = _exact(options)
    if kind == "pairwise":
        references = [(draw_logp(rng), draw_logp(rng)) for _ in range(rows)]
        pairs = [
            (draw_logp(rng, a), draw_logp(rng, b), a, b, rng.randint(1, 60), rng.randint(1, 60)) for a, b in references
        ]

        def oracle(pair):
            return PAIRWISE[name](pair, **exact)

        given = [Pair.of(*pair) for pair in pairs]
        slopes = {column: [slope(oracle, pair, column) for pair in given] for column in TRAINED[kind]}
        return Case(tensors(PairLogps, pairs), options, [oracle(pair) for pair in given], slopes)
    if kind == "ranked":
        places = rng.randint(2, 5)
        reference = [[draw_logp(rng) for _ in range(places)] for _ in range(rows)]
        total = [[draw_logp(rng, value) for value in row] for row in reference]
        length = [[rng.randint(1, 60) for _ in range(places)] for _ in range(rows)]
        logps = tensors(RankedLogps, list(zip(total, reference, length, strict=True)))
        step, values, slopes = Decimal("1e-30"), [], []
        for row, base in zip(total, reference, strict=True):
            row, base = [Decimal(x) for x in row], [Decimal(x) for x in base]

            def at(place, shift, row=row, base=base):
                moved = [x + shift if i == place else x for i, x in enumerate(row)]
                return dpo.plackett_luce(moved, base, **exact)

            values.append(at(0, 0))
            slopes.append([(at(i, step) - at(i, -step)) / (2 * step) for i in range(places)])
        return Case(logps, options, values, {"total": slopes})
    if kind == "feedback":
        reference = [draw_logp(rng) for _ in range(rows)]
        marked = [(draw_logp(rng, value), value, rng.random() < 0.5, rng.randint(1, 60)) for value in reference]
        apart = [(draw_logp(rng, value), value) for value in (draw_logp(rng) for _ in range(rng.randint(1, 9)))]
        own = tensors(FeedbackLogps, marked)
        mismatched, reference_mismatched = (
            torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in zip(*apart, strict=True)
        )
        logps = FeedbackLogps(own.completion, own.reference, own.label, own.length, mismatched, reference_mismatched)
        z0 = kto.reference_point(*([Decimal(x) for x in column] for column in zip(*apart, strict=True)))

        def oracle(row):
            return kto.loss(row, z0, **exact)

        given = [kto.Marked(Decimal(row[0]), Decimal(row[1]), row[2]) for row in marked]
        slopes = {"completion": [slope(oracle, row, "completion") for row in given]}
        return Case(logps, options, [oracle(row) for row in given], slopes)
    if kind == "reward":
        rows_of = [(rng.gauss(0, 3), rng.gauss(0, 3), rng.uniform(0, 3)) for _ in range(rows)]

        def oracle(row):
            return bradley_terry_oracle.loss(row, **exact)

        given = [bradley_terry_oracle.Rewarded(*map(Decimal, row)) for row in rows_of]
        slopes = {column: [slope(oracle, row, column) for row in given] for column in TRAINED[kind]}
        return Case(tensors(PairRewards, rows_of), options, [oracle(row) for row in given], slopes)
    sequences = [(draw_logp(rng), rng.randint(1, 60)) for _ in range(rows)]
    values = [maximum_likelihood.loss(Decimal(total)) for total, _ in sequences]
    return Case(tensors(DemonstrationLogps, sequences), options, values, {"total": [Decimal(-1)] * rows})


def frozen_columns(logps) -> list[torch.Tensor]:
    """The floating columns into which no gradient may flow."""
    trained = TRAINED[
        {PairLogps: "pairwise", RankedLogps: "ranked", FeedbackLogps: "feedback", PairRewards: "reward"}.get(
            type(logps), "demonstration"
        )
    ]
    columns = [getattr(logps, field.name) for field in fields(logps) if field.name not in trained]
    return [column for column in columns if column is not None and column.is_floating_point()]
