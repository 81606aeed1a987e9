"""The whole library without YAML or command line."""

import json

import pytest


@pytest.fixture
def pairs_jsonl(tmp_path, monkeypatch):
    rows = [{"prompt": f"Say {n}:", "chosen": f" yes {n}", "rejected": " no"} for n in range(70)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)


def test_the_lines_of_the_readme(pairs_jsonl, tiny_llama, tiny_tokenizer, capsys):
    from palate import (
        OptimConfig,
        Ranks,
        TrainState,
        annotate,
        collate_pairs,
        pairwise,
        read_pairs,
        steps,
        stream,
        tokenize_pair,
    )

    policy, reference, tokenizer = tiny_llama(0), tiny_llama(0), tiny_tokenizer

    pairs = annotate([tokenize_pair(p, tokenizer) for p in read_pairs("pairs.jsonl")], reference)
    batches = stream(pairs, collate_pairs, batch=64, tokens=2048, seed=0, epochs=1)
    for step in steps(TrainState.fresh(policy, OptimConfig()), batches, pairwise("dpo", beta=0.1), Ranks.single()):
        print(step.number, step.loss, step.metrics["rewards/margins"])

    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["1", "0.6931471805599453"]
    assert second.split()[0] == "2"
    assert float(second.split()[1]) < 0.6931471805599453
