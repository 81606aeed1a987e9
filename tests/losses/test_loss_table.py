"""What must hold of every registered loss."""

import itertools
import math
import random
import re
from dataclasses import fields, replace

import pytest
import torch

from loss_cases import PAIRWISE, TRAINED, draw, draw_options, frozen_columns, tensors
from palate.losses import (
    LOSSES,
    DemonstrationLogps,
    FeedbackLogps,
    PairLogps,
    PairRewards,
    RankedLogps,
    check_options,
    info,
    is_normalised,
    reward_scale,
    start_values,
)

EVERY = sorted(LOSSES)
NUMBERS = [(name, option) for name in EVERY for option in info(name).ranges]


def close(mine: float, exact, scale: float = 1.0) -> bool:
    return abs(mine - float(exact)) <= 1e-10 * max(scale, abs(float(exact)))


def test_the_losses_and_their_options():
    expected = {
        "dpo": {"beta": 0.1, "label_smoothing": 0},
        "robust_dpo": {"beta": 0.1, "label_smoothing": 0.1},
        "ipo": {"tau": 0.1, "average": True},
        "hinge": {"beta": 0.1},
        "orpo": {"lam": 0.1},
        "simpo": {"beta": 2, "gamma": 1},
        "cpo": {"beta": 0.1, "alpha": 1},
        "dpop": {"beta": 0.3, "lam": 50},
        "dpo_nll": {"beta": 0.1, "alpha": 1},
        "ln_dpo": {"beta": 5},
        "r_dpo": {"beta": 0.1, "alpha": 0.05},
        "unlikelihood": {"alpha": 0.5},
        "plackett_luce": {"beta": 0.1},
        "kto": {"beta": 0.1, "desirable_weight": 1, "undesirable_weight": 1},
        "completion_nll": {},
        "bradley_terry": {"margin": 0, "centring": 0},
    }
    assert {name: info(name).options for name in expected} == expected
    assert set(EVERY) >= set(expected)


@pytest.mark.parametrize("name", EVERY)
def test_values_and_gradients_equal_the_papers(name):
    rng = random.Random(name)
    rows = 0
    while rows < 200:
        case = draw(name, rng, rows=10)
        values = LOSSES[name](case.logps, **case.options)
        assert values.shape == (10,)
        for mine, exact in zip(values.tolist(), case.values, strict=True):
            assert close(mine, exact), (case.options, mine, exact)
        values.sum().backward()
        for column, exact_slopes in case.slopes.items():
            mine = getattr(case.logps, column).grad
            flat = itertools.chain.from_iterable(row if isinstance(row, list) else [row] for row in exact_slopes)
            for got, exact in zip(mine.flatten().tolist(), flat, strict=True):
                assert close(got, exact, scale=1e-3), (case.options, column, got, exact)
        rows += 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_rows_keep_shape_dtype_and_independence_and_the_reference_gets_no_gradient(name, dtype):
    rng = random.Random(name)
    for rows in (1, 2, 7):
        case = draw(name, rng, rows)
        logps = _as(case.logps, dtype)
        values = LOSSES[name](logps, **case.options)
        assert values.shape == (rows,) and values.dtype == dtype
        values.sum().backward()
        for column in TRAINED[info(name).kind]:
            gradient = getattr(logps, column).grad
            assert gradient.shape == getattr(logps, column).shape
        assert all(column.grad is None for column in frozen_columns(logps))
        parts = [LOSSES[name](_slice(logps, slice(i, i + 1)), **case.options) for i in range(rows)]
        torch.testing.assert_close(torch.cat(parts), values, rtol=1e-6, atol=0)  # nothing is averaged over rows
        order = torch.randperm(rows)
        torch.testing.assert_close(LOSSES[name](_slice(logps, order), **case.options), values[order], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_finite_at_log_ratios_of_ten_thousand(name, dtype):
    rng = random.Random(name)
    grid = [0.0, -1e-30, -1e-12, -1e-7, -1.0, -1e4, -2e4]
    kind = info(name).kind
    for options in [{}, draw_options(name, rng), draw_options(name, rng)]:
        if kind == "pairwise":
            rows = [(*four, *two) for four in itertools.product(grid, repeat=4) for two in [(1, 1), (7, 3)]]
            logps = tensors(PairLogps, rows, dtype)
        elif kind == "ranked":
            rows = [
                ([*a, 0.0], [*b, -1e4], [3, 5, 1])
                for a, b in itertools.product(itertools.product(grid, repeat=2), repeat=2)
            ]
            logps = tensors(RankedLogps, rows, dtype)
        elif kind == "feedback":
            rows = [(*two, label, 3) for two in itertools.product(grid, repeat=2) for label in (True, False)]
            own = tensors(FeedbackLogps, rows, dtype)
            far = torch.tensor([0.0, 0.0], dtype=dtype)
            logps = replace(own, mismatched=far, reference_mismatched=far - 1e4)
        elif kind == "reward":
            logps = tensors(PairRewards, [(a, b, 1.0) for a, b in itertools.product(grid, repeat=2)], dtype)
        else:
            logps = tensors(DemonstrationLogps, [(value, 3) for value in grid], dtype)
        values = LOSSES[name](logps, **options)
        assert values.isfinite().all(), options
        values.sum().backward()
        for column in TRAINED[kind]:
            assert getattr(logps, column).grad.isfinite().all(), (options, column)


@pytest.mark.parametrize("name", [name for name in EVERY if info(name).reference])
def test_value_at_the_start_is_the_closed_form(name):
    """Where policy equals reference the loss is its table entry, margins are 0 and nobody is accurate."""
    table = {
        "dpo": lambda o: math.log(2),
        "robust_dpo": lambda o: math.log(2),
        "ipo": lambda o: 1 / (4 * o["tau"] ** 2),
        "hinge": lambda o: 1,
        "dpop": lambda o: math.log(2),
        "ln_dpo": lambda o: math.log(2),
        "kto": lambda o: o["desirable_weight"] / 2 if o["desirable_weight"] == o["undesirable_weight"] else None,
    }
    rng = random.Random(name)
    for _ in range(20):
        case = draw(name, rng, rows=5)
        for options in ({}, case.options):
            started = start_values(name, case.logps, **options)
            full = check_options(name, options)
            at_start = info(name).at_start
            promised = None if at_start is None else at_start(full)
            wanted = table[name](full) if name in table else None
            assert promised == (None if wanted is None else pytest.approx(wanted, rel=1e-12))
            if promised is not None:
                assert started.tolist() == pytest.approx([promised] * 5, rel=1e-12)
    pairs = draw("dpo", rng, rows=5).logps
    same = replace(pairs, chosen=pairs.reference_chosen, rejected=pairs.reference_rejected)
    assert (same.log_ratio == 0).all() and not (same.log_ratio > 0).any()
    assert (same.mean_log_ratio == 0).all()


def test_start_values_that_depend_on_rows():
    pairs = _pairs([-3.0, -5.0], [-4.0, -1.0], [-6.0, -2.0], [-2.5, -9.0], [2, 4], [5, 4])
    assert start_values("r_dpo", pairs, alpha=0.2).tolist() == pytest.approx([math.log1p(math.exp(0.6)), math.log(2)])
    nll = [math.log(2) + 6 / 2, math.log(2) + 2 / 4]
    assert start_values("dpo_nll", pairs).tolist() == pytest.approx(nll)
    for places in (2, 3, 5):
        lists = RankedLogps(torch.randn(3, places), torch.randn(3, places), torch.ones(3, places))
        expected = [math.log(math.factorial(places))] * 3
        assert start_values("plackett_luce", lists).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="no reference"):
        start_values("simpo", pairs)


@pytest.mark.parametrize("name", sorted(PAIRWISE))
def test_slopes_at_the_start_raise_chosen_and_lower_rejected(name):
    rng = random.Random(name)
    for _ in range(20):
        rows = [
            (a, b, a, b, rng.randint(1, 9), rng.randint(1, 9)) for a, b in [(-rng.uniform(1, 20), -rng.uniform(1, 20))]
        ]
        logps = tensors(PairLogps, rows)
        LOSSES[name](logps).sum().backward()
        assert logps.chosen.grad < 0 < logps.rejected.grad
        weaker = LOSSES[name](replace(logps, rejected=logps.rejected - 0.01))
        assert weaker < LOSSES[name](logps)  # a small step the right way lowers the loss


def test_swapped_labels():
    """What changes when chosen and rejected trade places."""
    rng = random.Random(0)
    for _ in range(50):
        logps = draw("dpo", rng, rows=5).logps
        swapped = PairLogps(
            logps.rejected,
            logps.chosen,
            logps.reference_rejected,
            logps.reference_chosen,
            logps.rejected_length,
            logps.chosen_length,
        )
        h, mean_h = logps.log_ratio, logps.mean_log_ratio
        lengths = logps.chosen_tokens - logps.rejected_tokens
        d = logps.chosen_mean - logps.rejected_mean
        beta, e, tau, alpha = rng.uniform(0.1, 2), rng.uniform(0, 0.4), rng.uniform(0.1, 2), rng.random()
        for name, options, difference in [
            ("dpo", {"beta": beta}, -beta * h),
            ("dpo", {"beta": beta, "label_smoothing": e}, -(1 - 2 * e) * beta * h),
            ("robust_dpo", {"beta": beta, "label_smoothing": e}, -beta * h / (1 - 2 * e)),
            ("ipo", {"tau": tau, "average": False}, -2 * h / tau),
            ("ipo", {"tau": tau}, -2 * mean_h / tau),
            ("simpo", {"beta": beta, "gamma": 0}, -beta * d),
            ("ln_dpo", {"beta": beta}, -beta * mean_h),
            ("r_dpo", {"beta": beta, "alpha": alpha}, -beta * h - alpha * lengths),
            ("cpo", {"beta": beta, "alpha": 0}, -beta * (logps.chosen - logps.rejected)),
            ("unlikelihood", {"alpha": alpha}, -(1 + alpha) * (logps.chosen - logps.rejected)),
        ]:
            got = LOSSES[name](logps, **options) - LOSSES[name](swapped, **options)
            torch.testing.assert_close(got, difference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_every_option_changes_the_loss_and_is_checked(name):
    rng = random.Random(name)
    case = draw(name, rng, rows=8)
    defaults = check_options(name, {})
    for option, default in defaults.items():
        changed = (not default) if isinstance(default, bool) else default * 0.5 + 0.01
        before, after = (LOSSES[name](case.logps, **{**defaults, option: value}) for value in (default, changed))
        assert (before != after).any(), option
    with pytest.raises(ValueError, match=re.escape(f'loss "{name}" has no option "betta"')):
        check_options(name, {"betta": 1})
    with pytest.raises(ValueError, match="has no option"):
        LOSSES[name](case.logps, betta=1)


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_a_number_out_of_range_or_of_another_type_is_refused(name, option):
    case = draw(name, random.Random(name), rows=2)
    interval = info(name).ranges[option]
    for bad in [-1, -1e-9, math.nan, math.inf, "0.1", True, None, [0.1]]:
        with pytest.raises(ValueError, match=re.escape(f'loss "{name}", option "{option}"')) as error:
            LOSSES[name](case.logps, **{option: bad})
        assert interval in str(error.value)
    assert check_options(name, {option: 0.25})[option] == 0.25
    if interval[0] == "(":
        with pytest.raises(ValueError):
            check_options(name, {option: 0})
    else:
        assert check_options(name, {option: 0})[option] == 0.0
    if option == "label_smoothing":
        with pytest.raises(ValueError, match=re.escape("[0, 0.5)")):
            check_options(name, {option: 0.5})


def test_messages_are_plain():
    with pytest.raises(ValueError) as error:
        check_options("ipo", {"beta": 0.1})
    assert str(error.value) == 'loss "ipo" has no option "beta". It takes: tau, average'
    with pytest.raises(ValueError) as error:
        check_options("completion_nll", {"beta": 0.1})
    assert str(error.value) == 'loss "completion_nll" has no option "beta". It takes none'
    with pytest.raises(ValueError, match="true or false, not 1"):
        check_options("ipo", {"average": 1})
    with pytest.raises(
        ValueError, match=r'there is no loss "dpoo"\. There are: bradley_terry, completion_nll, cpo, dpo'
    ):
        info("dpoo")


@pytest.mark.parametrize("name", [name for name in EVERY if info(name).kind != "demonstration"])
def test_a_column_that_is_needed_and_missing_is_named(name):
    case = draw(name, random.Random(name), rows=3)
    whole = LOSSES[name](case.logps, **check_options(name, {}))
    optional = [f.name for f in fields(case.logps) if f.name not in TRAINED[info(name).kind]]
    needed = set()
    for column in optional:
        without = replace(case.logps, **{column: None})
        try:
            torch.testing.assert_close(LOSSES[name](without), whole, rtol=0, atol=0)
        except ValueError as error:
            needed.add(column if column in str(error) else f"{column}, which the message does not name")
    assert needed <= set(optional)
    assert any(column.startswith("reference") for column in needed) == info(name).reference
    if info(name).kind == "pairwise":
        lengths = {"chosen_length", "rejected_length"}
        if is_normalised(name) or name == "r_dpo":
            assert lengths <= needed
        else:
            assert needed & lengths == ({"chosen_length"} if name == "dpo_nll" else set())


def test_columns_that_would_broadcast_are_refused():
    one, column = torch.zeros(3), torch.zeros(3, 1)
    for bad in [
        lambda: PairLogps(one, column),
        lambda: PairLogps(column, column),
        lambda: PairLogps(one, one, torch.zeros(1), one),
        lambda: PairLogps(one, one, chosen_length=torch.tensor(3)),
        lambda: RankedLogps(one, one),
        lambda: RankedLogps(column, torch.zeros(1, 3)),
        lambda: FeedbackLogps(one, one, torch.ones(3)),
        lambda: FeedbackLogps(one, one, torch.ones(3, dtype=torch.bool), None, one, torch.zeros(2)),
        lambda: FeedbackLogps(one, one, torch.ones(3, dtype=torch.bool), None, torch.zeros(0), torch.zeros(0)),
        lambda: DemonstrationLogps(one, column),
        lambda: PairRewards(one, column),
        lambda: PairRewards(one, one, torch.zeros(1)),
    ]:
        with pytest.raises(ValueError):
            bad()


def test_facts():
    assert {name for name in EVERY if is_normalised(name)} == {"ipo", "simpo", "ln_dpo", "orpo"}
    assert not is_normalised("ipo", {"average": False})
    assert reward_scale("dpo", {"beta": 0.3}) == 0.3 and reward_scale("dpo") == 0.1
    assert reward_scale("ipo") == reward_scale("unlikelihood") == 1.0
    assert {info(name).kind for name in EVERY} == {"pairwise", "ranked", "feedback", "reward", "demonstration"}
    for name in EVERY:
        facts = info(name)
        assert facts.name == name and facts.paper and "Source:" in LOSSES[name].__doc__
        assert facts.at_start is None or facts.reference


def _pairs(*columns) -> PairLogps:
    return PairLogps(
        *(torch.tensor(c, dtype=torch.float64 if isinstance(c[0], float) else torch.int64) for c in columns)
    )


def _as(logps, dtype):
    columns = {f.name: getattr(logps, f.name) for f in fields(logps)}
    return replace(
        logps,
        **{
            name: column.detach().to(dtype).requires_grad_()
            for name, column in columns.items()
            if column is not None and column.is_floating_point()
        },
    )


def _slice(logps, rows):
    shared = ("mismatched", "reference_mismatched")
    columns = {f.name: getattr(logps, f.name) for f in fields(logps) if f.name not in shared}
    return replace(logps, **{name: column[rows] for name, column in columns.items() if column is not None})
