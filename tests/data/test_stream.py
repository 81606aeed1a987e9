"""Order and packing: pure functions of (seed, epoch, index), every row once, any suffix, any share."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_group

from palate.data.batch import collate, collate_pairs, stream_length
from palate.data.stream import count_steps, count_tokens, order, pack, stream

sizes = st.integers(1, 60)
seeds = st.integers(0, 2**63)
PINNED = (
    [2, 6, 5, 3, 0, 4, 7, 1, 8, 9],
    [4, 2, 0, 7, 3, 1, 5, 6, 9, 8],
    [7, 8, 9, 1, 0, 3, 5, 6, 4, 2],
    [7, 9, 1, 4, 8, 6, 5, 3, 0, 2],
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(sizes, seeds, st.integers(0, 1000))
def test_order_is_a_permutation(count, seed, epoch):
    assert sorted(order(count, seed, epoch).tolist()) == list(range(count))


def test_order_is_pinned():
    """The same on every machine and for ever: a resumed run of an older palate goes on with these rows."""
    assert order(10, 0, 0).tolist() == PINNED[0]
    assert order(10, 0, 1).tolist() == PINNED[1]
    assert order(10, 1, 0).tolist() == PINNED[2]
    assert order(10, 2**64 - 1, 7).tolist() == PINNED[3]


def test_order_spends_no_random_state_and_reads_none():
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = order(100, 3, 4).tolist()
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    np.random.seed(9)
    assert order(100, 3, 4).tolist() == first


def test_orders_of_epochs_and_seeds_differ_and_mix_well():
    drawn = [tuple(order(50, seed, epoch)) for seed in range(20) for epoch in range(20)]
    assert len(set(drawn)) == 400
    mean = np.mean([order(50, seed, 0) for seed in range(400)], axis=0)  # each place sees every row alike
    assert abs(mean - 24.5).max() < 4


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), max_size=40), st.integers(1, 60))
def test_packs_cut_in_order_within_bounds(lengths, tokens):
    packs = pack(lengths, tokens)
    assert [i for part in packs for i in part] == list(range(len(lengths)))
    for part in packs:
        assert part
        assert len(part) == 1 or sum(lengths[i] for i in part) <= tokens
    for one, two in pairwise(packs):  # greedy: the next did not fit
        assert sum(lengths[i] for i in one) + lengths[two[0]] > tokens


def groups_of(count, seed=0):
    generator = np.random.default_rng(seed)
    return [random_group(generator, *(int(n) for n in generator.integers(1, 9, 3))) for _ in range(count)]


def facts(step):
    """A step batch as plain values."""
    return step.rows, step.units, step.cursor, [b.tokens.tolist() for b in step.micro]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3), st.integers(1, 80), st.integers(0, 9))
def test_every_row_once_an_epoch_and_any_suffix_is_the_rest(count, batch, epochs, tokens, seed):
    groups = groups_of(count)
    settings_ = dict(batch=batch, tokens=tokens, seed=seed, epochs=epochs)
    whole = [facts(s) for s in stream(groups, collate, **settings_)]
    assert len(whole) == count_steps(count, batch, epochs)
    rows = [row for step in whole for row in step[0]]
    for epoch in range(epochs):
        assert rows[epoch * count : (epoch + 1) * count] == order(count, seed, epoch).tolist()
    for k in range(len(whole) + 1):
        assert [facts(s) for s in stream(groups, collate, start=k, **settings_)] == whole[k:]


def test_the_cut_moves_no_row():
    groups = groups_of(9)
    one, other = ([(s.rows, s.units) for s in stream(groups, collate, batch=4, tokens=t)] for t in (1, 10**6))
    assert one == other


def test_steps_win_over_epochs_and_go_round():
    groups = groups_of(5)
    taken = [s.rows for s in stream(groups, collate, batch=2, steps=7, epochs=1)]
    assert [len(rows) for rows in taken] == [2, 2, 1, 2, 2, 1, 2]
    assert sorted(sum(taken[3:6], ())) == list(range(5))
    assert count_steps(5, 2, 1, 7) == 7
    assert [s.cursor for s in stream(groups, collate, batch=2, steps=4)][3] == {"step": 4, "epoch": 1, "row": 2}


@pytest.mark.parametrize("steps", [None, 1, 3, 4, 11])
def test_the_tokens_of_a_run_are_counted_before_it(steps):
    groups = groups_of(13)
    run = stream(groups, collate, batch=4, tokens=64, seed=5, epochs=2, steps=steps)
    lengths = [stream_length(group) for group in groups]
    seen = sum(len(micro.tokens) for step in run for micro in step)
    assert count_tokens(lengths, 4, 2, steps, seed=5) == seen
    assert count_tokens([], 4, 2) == 0


def test_no_rows_no_steps():
    assert list(stream([], collate, steps=3)) == []


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 11), st.integers(1, 6), st.integers(1, 4), st.integers(1, 60))
def test_ranks_partition_each_step_and_know_its_units(count, batch, size, tokens):
    groups = groups_of(count)
    alone = list(stream(groups, collate_pairs, batch=batch, tokens=tokens, epochs=2))
    shares = [
        list(stream(groups, collate_pairs, batch=batch, tokens=tokens, epochs=2, rank=r, size=size))
        for r in range(size)
    ]
    for number, whole in enumerate(alone):
        mine = [share[number] for share in shares]
        assert {s.units for s in mine} == {whole.units}  # the whole step's, on every rank
        assert {s.rows for s in mine} == {whole.rows}
        assert sum(b.units for s in mine for b in s.micro) == whole.units
        lengths = sorted(stream_length(groups[row]) for row in whole.rows)
        assert sum(len(b.batch.tokens) for s in mine for b in s.micro) == sum(lengths)


def test_units_are_scored_tokens_for_demonstrations_and_pairs_for_pairs():
    groups = groups_of(3)
    (step,) = stream(groups, collate_pairs, batch=8)
    assert step.units == 3
    (step,) = stream(groups, collate, batch=8)
    assert step.units == sum(len(c) for g in groups for c in g.completions)


def test_iterating_a_step_gives_its_micro_batches():
    (step,) = stream(groups_of(4), collate, batch=8, tokens=1)
    assert len(list(step)) == 4 == len(step.micro)


@pytest.mark.parametrize("start", [6, 7, 100])
def test_starting_at_or_beyond_the_end_gives_nothing(start):
    assert list(stream(groups_of(5), collate, batch=2, epochs=2, start=start)) == []
