"""Groups to streams: who predicts whom, which completions a pair compares, and what is left out."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.data.batch import (
    best_first,
    collate,
    collate_feedback,
    collate_pairs,
    collate_rankings,
    scored_length,
    scored_spans,
    stream_length,
)
from palate.data.tokens import TokenGroup


def group(prompt, *completions, spans=None, **fields):
    arrays = tuple(np.array(c, dtype=np.int32) for c in completions)
    spans = spans or tuple(((0, len(c)),) for c in completions)
    return TokenGroup(np.array(prompt, dtype=np.int32), arrays, spans, **fields)


def test_a_pair_written_out():
    batch = collate([group([10, 11, 12], [20, 21], [30, 31, 32])])
    assert batch.tokens.tolist() == [10, 11, 12, 20, 30, 31]  # the last token of a completion predicts nothing
    assert batch.positions.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.targets.tolist() == [20, 21, 30, 31, 32]
    assert batch.predictors.tolist() == [2, 3, 2, 4, 5]  # both first tokens hang on the prompt's last
    assert batch.sequence.tolist() == [0, 0, 1, 1, 1]
    assert batch.length.tolist() == [2, 3]
    assert batch.units == 5
    assert batch.layout.prompts == (3,)
    assert batch.layout.branches == ((1, 2),)


def test_spans_alone_decide_what_is_scored():
    """Ids never do: the completion is full of the id of padding and of the end."""
    one = group([7], [2, 2, 2, 0, 1, 1], spans=(((1, 3), (5, 6)),))
    batch = collate([one])
    assert batch.targets.tolist() == [2, 2, 1]
    assert batch.predictors.tolist() == [1, 2, 5]
    assert batch.length.tolist() == [3] == [scored_length(one, 0)]


def test_an_empty_prompt_predicts_no_first_token():
    one = group([], [5, 6, 7])
    assert scored_spans(one, 0) == ((1, 3),)
    batch = collate([one])
    assert batch.tokens.tolist() == [5, 6]
    assert batch.targets.tolist() == [6, 7]
    assert batch.predictors.tolist() == [0, 1]
    lone = group([], [5])
    assert scored_length(lone, 0) == 0
    assert collate([lone]).units == 0


shape = st.tuples(st.integers(0, 6), st.lists(st.integers(1, 6), min_size=1, max_size=4))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(shape, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_every_scored_token_is_predicted_by_the_token_before_it(shapes, random):
    """Against a list of (context's last token, position, target) made without any stream."""
    groups, expected = [], []
    for prompt, completions in shapes:
        ids = [[random.randrange(100) for _ in range(n)] for n in (prompt, *completions)]
        spans = []
        for completion in ids[1:]:
            start = random.randrange(len(completion))
            spans.append(((start, random.randrange(start, len(completion)) + 1),))
        groups.append(group(*ids, spans=tuple(spans)))
        for completion, ((start, stop),) in zip(ids[1:], spans, strict=True):
            row = ids[0] + completion
            expected += [
                (row[prompt + i - 1], prompt + i - 1, row[prompt + i]) for i in range(start, stop) if prompt + i
            ]
    batch = collate(groups)
    got = [
        (int(batch.tokens[p]), int(batch.positions[p]), int(t))
        for p, t in zip(batch.predictors, batch.targets, strict=True)
    ]
    assert got == expected
    assert len(batch.tokens) == sum(stream_length(g) for g in groups)
    assert batch.length.tolist() == torch.bincount(batch.sequence, minlength=len(batch.length)).tolist()
    assert sum(batch.layout.prompts) + sum(map(sum, batch.layout.branches)) == len(batch.tokens)


def test_pairs_are_named_by_index_never_by_place():
    ranked = group([1], [2], [3, 3], [4], preferences=((2, 0), (2, 1), (0, 1)))
    turned = group([5], [6], [7], preferences=((1, 0),))
    pairs = collate_pairs([turned, ranked])
    assert pairs.chosen.tolist() == [1, 4, 4, 2]
    assert pairs.rejected.tolist() == [0, 2, 3, 3]
    assert pairs.units == 4
    assert pairs.chosen.dtype == torch.int64


def test_a_batch_without_any_pair_is_empty_and_can_index():
    pairs = collate_pairs([group([1], [2], [3])])
    assert pairs.units == 0
    assert pairs.chosen.dtype == torch.int64
    assert torch.arange(5)[pairs.chosen].shape == (0,)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_strict_order_is_one_list_and_a_tie_is_none(count):
    places = np.random.default_rng(count).permutation(count)
    preferences = tuple((int(places[a]), int(places[b])) for a, b in combinations(range(count), 2))
    one = group([1], *([k] for k in range(count)), preferences=preferences[::-1])
    assert best_first(one) == tuple(places)
    assert best_first(replace(one, preferences=preferences[1:])) is None  # a tie
    if count > 2:
        cycle = tuple((k, (k + 1) % count) for k in range(count))
        assert best_first(replace(one, preferences=cycle)) is None
    assert best_first(replace(one, preferences=(*preferences, preferences[0][::-1]))) is None  # both ways


def test_rankings_stand_by_length_best_first():
    three = group([1], [2], [3], [4], preferences=((2, 0), (2, 1), (0, 1)))
    two = group([5], [6], [7], preferences=((1, 0),))
    ranked = collate_rankings([three, two, three])
    assert [order.tolist() for order in ranked.orders] == [[[4, 3]], [[2, 0, 1], [7, 5, 6]]]
    assert ranked.units == 3
    with pytest.raises(ValueError, match="ties"):
        collate_rankings([replace(three, preferences=((2, 0), (2, 1)))])


def test_the_reference_stands_by_completion():
    a = group([1], [2], [3], preferences=((0, 1),), reference=(-1.0, -2.0))
    b = group([1], [2], [3], preferences=((1, 0),), reference=(-3.0, -4.0))
    pairs = collate_pairs([a, b])
    assert pairs.reference.dtype == torch.float64
    assert pairs.reference[pairs.chosen].tolist() == [-1.0, -4.0]
    assert pairs.reference[pairs.rejected].tolist() == [-2.0, -3.0]
    assert collate_pairs([a, replace(b, reference=None)]).reference is None


def test_feedback_keeps_own_and_mismatched_apart():
    a = group([1, 1], [2, 2], [3], label=True, reference=(-1.0, -2.0))
    b = group([4], [3], [2, 2], label=False, reference=(-3.0, -4.0))
    batch = collate_feedback([a, b])
    assert batch.label.tolist() == [True, False]
    assert batch.batch.targets.tolist() == [2, 2, 3]
    assert batch.mismatched.targets.tolist() == [3, 2, 2]
    assert batch.mismatched.tokens.tolist() == [1, 1, 4, 2]
    assert batch.reference.tolist() == [-1.0, -3.0]
    assert batch.reference_mismatched.tolist() == [-2.0, -4.0]
    assert batch.units == 2


def test_moving_keeps_everything():
    a = group([1], [2], [3], preferences=((0, 1),), reference=(-1.0, -2.0))
    for batch in (collate_pairs([a]), collate_rankings([a]), collate([a])):
        moved = batch.to("cpu")
        assert type(moved) is type(batch)
        assert moved.units == batch.units
    meta = collate_rankings([a]).to("meta")
    assert meta.orders[0].device.type == meta.batch.tokens.device.type == meta.reference.device.type == "meta"
