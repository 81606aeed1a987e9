"""Chunks: made once, whole, by whoever is free; killed anywhere, the same bytes; other work is refused."""

import numpy as np
import pytest
from faults import Crash, disk
from runs_kit import tree

from palate.data.tokens import encode_prompt
from palate.errors import CheckpointError
from palate.sampling.chunks import Chunks, Draw, sample, samples
from palate.sampling.generate import generate


def squares(start, stop):
    return ({"item": item, "square": item * item} for item in range(start, stop))


def test_chunks_are_made_once_and_read_in_order(tmp_path):
    chunks = Chunks(tmp_path / "c", 10, 4, {"what": "squares"})
    told, asked = [], []

    def work(start, stop):
        asked.append((start, stop))
        return squares(start, stop)

    with pytest.raises(CheckpointError, match="3 of 3 chunks are missing"):
        chunks.rows()
    chunks.make(work, part=(2, 2), tell=lambda *numbers: told.append(numbers))
    assert (asked, told) == ([(4, 8)], [(4, 4)])
    assert chunks.missing() == [0, 2]
    chunks.make(work)
    chunks.make(work)
    assert asked == [(4, 8), (0, 4), (8, 10)]
    assert [row["square"] for row in chunks.rows()] == [item * item for item in range(10)]


def test_other_work_is_refused_by_name(tmp_path):
    Chunks(tmp_path, 10, 4, {"seed": 1, "model": "a"}).make(squares)
    with pytest.raises(CheckpointError, match="was begun with other count, model") as refused:
        Chunks(tmp_path, 11, 4, {"seed": 1, "model": "b"}).make(squares)
    assert refused.value.code == "E502"


def test_dead_at_any_operation_the_files_end_in_the_same_bytes(tmp_path):
    Chunks(tmp_path / "alone", 10, 4, {"what": 1}).make(squares)
    with disk() as counted:
        Chunks(tmp_path / "counted", 10, 4, {"what": 1}).make(squares)
    for at in range(1, counted.count + 1):
        chunks = Chunks(tmp_path / f"dead-{at}", 10, 4, {"what": 1})
        with disk(at), pytest.raises(Crash):
            chunks.make(squares)
        chunks.make(squares)
        left = {name: data for name, data in tree(chunks.folder).items() if not name.startswith(".plan.json")}
        assert left == tree(tmp_path / "alone")


def test_samples_in_chunks_are_those_of_one_call(tmp_path, tiny_llama, tiny_tokenizer):
    model, how = tiny_llama(0), Draw(max_tokens=9, samples=2, seed=5)
    prompts = [encode_prompt(f"Say {word}", tiny_tokenizer) for word in ("red", "blue and green", "a", "b", "c")]
    chunks = samples(tmp_path, "m", prompts, how, size=2)
    chunks.make(sample(model, tiny_tokenizer, prompts, how))
    whole = generate(model, tiny_tokenizer, prompts, max_tokens=9, samples=2, seed=5)
    rows = chunks.rows()
    assert [(r["prompt"], r["sample"], r["ids"], r["finished"]) for r in rows] == [
        (s.prompt, s.sample, s.ids.tolist(), s.finished) for s in whole
    ]
    assert np.allclose([row["logp"] for row in rows], [one.logp for one in whole], atol=1e-4)
    assert [row["tokens"] for row in rows] == [len(one.ids) for one in whole]
    other = samples(tmp_path, "m", prompts[::-1], how, size=2)
    with pytest.raises(CheckpointError, match="other prompts"):
        other.make(sample(model, tiny_tokenizer, prompts[::-1], how))
