"""A table of tokens gives back what was written, row by row and as columns; what it needs of all rows is exact."""

import mmap
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palate.data import table as module
from palate.data.batch import stream_length
from palate.data.records import Source
from palate.data.table import Lengths, TableWriter, TokenTable, distinct, joined, pick, row_keys
from palate.data.tokens import TokenGroup

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(lambda ids: np.array(ids, np.int32))
spans = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3).map(tuple)


@st.composite
def groups_of(draw):
    count = draw(st.integers(0, 3))
    several = lambda one: tuple(draw(one) for _ in range(count))  # noqa: E731
    return TokenGroup(
        prompt=draw(tokens),
        completions=several(tokens),
        spans=several(spans),
        preferences=tuple((a, b) for a in range(count) for b in range(a) if draw(st.booleans())),
        label=draw(st.sampled_from([None, False, True])),
        cut=several(st.booleans()) if draw(st.booleans()) else (),
        prompt_cut=draw(st.integers(0, 2**31 - 1)),
        source=draw(st.none() | st.builds(Source, st.sampled_from(["a", "é.jsonl", "c"]), st.integers(0, 2**40))),
        margin=draw(st.none() | st.floats(0, 1e9)),
    )


lists = st.lists(groups_of(), max_size=9)


def meaning(group):
    """All of a group, comparable, with the types of its arrays."""
    ids = [(a.dtype, a.tolist()) for a in (group.prompt, *group.completions)]
    facts = (group.spans, group.preferences, group.label, group.cut, group.prompt_cut, group.source, group.margin)
    return ids, facts, group.reference


def same(one, two):
    assert [meaning(group) for group in one] == [meaning(group) for group in two]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several batches, and pages that are given back at once."""
    monkeypatch.setattr(module, "BATCH", 3)
    monkeypatch.setattr(module, "HELD", 1)


@QUICK
@given(lists, st.data())
def test_a_table_is_the_list_it_was_written_from(tmp_path, groups, data):
    path = tmp_path / "tokens.arrow"
    marks = [bytes([number]) * 16 for number in range(len(groups))]
    with TableWriter(path) as writer:
        for group, mark in zip(groups, marks, strict=True):
            writer.append(group, mark)
    for table in (TokenTable.open(path), TokenTable.of(groups)):
        assert len(table) == len(groups)
        same(table, groups)
        same(reversed(table), groups[::-1])
        assert row_keys(table).tolist() == row_keys(groups).tolist()
        for name in ("prompt", "completion", "first"):
            assert getattr(table.lengths, name).tolist() == getattr(Lengths.of(groups), name).tolist()
        assert table.lengths.stream.tolist() == [stream_length(group) for group in groups]
        part = data.draw(st.slices(len(groups)))
        same(table[part], groups[part])
        for index in (len(groups), -len(groups) - 1):
            with pytest.raises(IndexError):
                table[index]
    assert TokenTable.open(path).marks.tobytes() == b"".join(marks)


@QUICK
@given(lists, lists, st.data())
def test_picks_and_joins_carry_lengths_keys_and_references(one, two, data):
    places = np.array(data.draw(st.lists(st.sampled_from(range(len(one))), max_size=8) if one else st.just([])), int)
    values = np.arange(sum(len(group.completions) for group in one)) / 3
    first = np.cumsum([0, *(len(group.completions) for group in one)])
    annotated = [tuple(values[a:b].tolist()) for a, b in pairwise(first)]
    table = TokenTable.of(one).with_reference(values)
    assert [group.reference for group in table] == annotated
    assert [group.reference for group in table.pick(places)] == [annotated[at] for at in places]
    assert [group.reference for group in joined(table[1:], table[:1])] == annotated[1:] + annotated[:1]
    halves = [table[:1], TokenTable.with_reference(table[1:], -values[first[1] if one else 0 :])]
    flipped = [tuple(-value for value in group) for group in annotated[1:]]
    assert [group.reference for group in joined(*halves)] == annotated[:1] + flipped
    bare = TokenTable.of(one)
    same(pick(bare, places), pick(one, places))
    for mixed in (joined(bare, two), joined(bare.pick(places), two), joined(two, bare[::-1])):
        assert isinstance(mixed, TokenTable)
        assert row_keys(mixed).tolist() == row_keys(list(mixed)).tolist()
        assert mixed.lengths.first.tolist() == Lengths.of(list(mixed)).first.tolist()
    same(joined(bare, two), [*one, *two])
    same(joined(two, bare[::-1]), [*two, *one[::-1]])
    assert joined(one, two) == [*one, *two]


@QUICK
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2**64 - 1])), max_size=12))
def test_distinct_is_in_the_order_of_first_appearance(keys):
    places, number = distinct(np.array(keys, np.uint64).reshape(-1, 2))
    known = list(dict.fromkeys(keys))
    assert [keys[at] for at in places] == known
    assert places.tolist() == [keys.index(key) for key in known]
    assert number.tolist() == [known.index(key) for key in keys]


def test_completions_are_found_in_their_groups():
    lengths = Lengths(np.array([5, 5, 5]), np.array([1, 2, 3]), np.array([0, 2, 2, 3]))
    assert lengths.within(np.array([0, 1, 2])) == [(0, 0), (0, 1), (2, 0)]


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system takes no advice")
def test_a_row_outlives_the_pages_it_was_made_from(tmp_path):
    """Rows are copies: giving pages back, or the file's end, takes nothing from them."""
    made = TokenGroup(np.arange(2000, dtype=np.int32), (np.arange(7, dtype=np.int32),), (((0, 7),),))
    with TableWriter(tmp_path / "t.arrow") as writer:
        writer.append(made)
    table = TokenTable.open(tmp_path / "t.arrow")
    row = table[0]
    del table
    (tmp_path / "t.arrow").unlink()
    assert row.prompt.tolist() == list(range(2000))
    row.prompt[0] = 5  # its own
