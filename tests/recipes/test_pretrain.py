"""`palate pretrain`: every token of every document once, a known chain's entropy as the floor, real text onward."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import transformers
from models import truth
from runs_kit import Command, lines, metrics, tree, write_rows

import palate
from palate.data.records import Demonstration
from palate.data.sources import read_texts
from palate.data.tokens import tokenize, tokenize_text
from palate.errors import DataError
from palate.recipes import pretrain
from palate.recipes.training import Paused

SHAPE = {
    "model_type": "llama",
    "vocab_size": 259,  # bytes and the special tokens: a tokenizer of this size joins nothing
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@pytest.fixture
def new(tmp_path):
    """`new:CONFIG.json` of a very small model."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return f"new:{tmp_path / 'config.json'}"


@pytest.fixture
def command(capsys):
    return Command(capsys)


def texts(path, documents):
    return write_rows(path, [{"text": text} for text in documents])


# pieces


@pytest.mark.parametrize("limit", [2, 3, 7, 50, 200, None])
def test_pieces_hold_every_token_once(tiny_tokenizer, limit):
    document = Demonstration("", "Once upon a time there was a little girl. " * 5)
    whole = tokenize(document, tiny_tokenizer)
    pieces = tokenize_text(document, tiny_tokenizer, max_length=limit)
    assert np.concatenate([p.completions[0] for p in pieces]).tolist() == whole.completions[0].tolist()
    assert all(p.spans == (((0, len(p.completions[0])),),) and not any(p.cut) for p in pieces)
    before = whole.prompt
    for piece in pieces:
        assert limit is None or len(piece.prompt) + len(piece.completions[0]) <= limit
        assert piece.prompt.tolist() == before[-1:].tolist()
        before = piece.completions[0]
    everything = len(whole.prompt) + len(whole.completions[0])
    assert len(pieces) == (1 if limit is None else max(1, math.ceil((everything - 1) / (limit - 1))))


def test_without_a_begin_token_the_first_token_alone_is_not_scored(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = None
    document = Demonstration("", "Yes. No. Perhaps? I do not know; ask someone else.")
    first, *others = tokenize_text(document, tokenizer, max_length=8)
    assert len(first.prompt) == 0 and first.spans == (((1, 8),),) and others
    assert all(p.spans[0][0][0] == 0 and len(p.prompt) == 1 for p in others)


def test_a_pieces_loss_is_that_of_its_rows_one_by_one(tmp_path, command, new):
    """Packed beside others, from nothing: held-out nats a token by transformers' own forward over each piece."""
    rows = [f"The {word} house stood by the {word} sea, and nobody came." * 2 for word in ("red", "old", "new")]
    held = [f"A {word} dog ran." * n for n, word in enumerate(("small", "large", "loud"), start=1)]
    data, other = texts(tmp_path / "a.jsonl", rows), texts(tmp_path / "b.jsonl", held)
    result = command.ok(
        "pretrain", model=new, data=data, eval=other, steps=2, batch=4, max_length=20, out=tmp_path / "r"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "r/model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "r/model")
    groups = [g for text in held for g in tokenize_text(Demonstration("", text), tokenizer, max_length=20)]
    logps = [logp for group in groups for logp in truth(model, group, 0)]
    assert result["after"]["eval/count"] == len(logps) == sum(len(text) + 1 for text in held)
    assert result["after"]["eval/loss"] == pytest.approx(-sum(logps) / len(logps), abs=1e-5)
    assert result["after"]["eval/perplexity"] == pytest.approx(math.exp(-sum(logps) / len(logps)), rel=1e-4)
    assert f"(perplexity {result['before']['eval/perplexity']:.4g} to" in result["verdict"]
    count = [math.ceil((len(text) + 1) / 19) for text in (*rows, *held)]
    assert result["data"]["longer than --max-length"] == sum(n > 1 for n in count)
    assert result["data"]["pieces of these"] == sum(n for n in count if n > 1)
    assert result["data"]["rows with a cut completion"] == 0


# text files


def test_a_text_file_has_a_document_between_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\nFirst line,\nsecond.\n \t\r\nAnother.\r\n\n\n\nThe last\n  of all")
    read = read_texts(path)
    assert [(row.prompt, row.completion, row.source.line) for row in read] == [
        ("", "First line,\nsecond.", 3),
        ("", "Another.", 6),
        ("", "The last\n  of all", 10),
    ]
    assert [row.completion for row in read_texts(f"{path}[1:2]")] == ["Another."]
    assert [row.completion for row in palate.read_demonstrations(path)] == [row.completion for row in read]
    (tmp_path / "b.data").write_bytes(path.read_bytes())
    assert len(read_texts(tmp_path / "b.data", format="text")) == 3


def test_text_files_that_are_something_else_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"rows of JSON stand there \[E113\]. Next: give --format jsonl"):
        read_texts(path)
    assert [row.completion for row in read_texts(path, format="jsonl")] == ["a", "b"]
    assert len(read_texts(path, format="text")) == 1
    path.write_bytes(b"good\n\nb\xffd\n\ngood again\n")
    with pytest.raises(DataError, match=r"a.txt:3.*byte 0xff at offset 7 of the file is not UTF-8"):
        read_texts(path)
    assert [row.completion for row in read_texts(path, bad_rows="skip")] == ["good", "good again"]
    path.write_bytes(b"\n \n")
    with pytest.raises(DataError, match="E104"):
        read_texts(path)


def test_pairs_are_no_running_text(tmp_path, command):
    data = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    command("pretrain", data=data, out=tmp_path / "r")
    assert command.code == 3 and "text" in command.said and not (tmp_path / "r").exists()


# sizes


def test_sizes_hold_what_their_names_say():
    from palate.model.sizes import SIZES

    for name, config in SIZES.items():
        embedding = config["vocab_size"] * config["hidden_size"]
        width, inner = config["hidden_size"], config["intermediate_size"]
        kv = width * config["num_key_value_heads"] // config["num_attention_heads"]
        layer = 2 * width * width + 2 * width * kv + 3 * width * inner + 2 * width
        total = embedding + config["num_hidden_layers"] * layer + width
        assert total == pytest.approx(float(name[:-1]) * 1e6, rel=0.05)
    assert palate.load("new:1m").model.num_parameters() == pytest.approx(1e6, rel=0.05)


def test_an_unknown_size_names_those_there_are(tmp_path, command):
    data = texts(tmp_path / "a.jsonl", ["some text"])
    command("pretrain", model="new:7m", data=data, out=tmp_path / "r")
    assert command.code == 3 and "new:1m, new:5m, new:20m" in command.said


def test_one_command_from_text_to_a_model(tmp_path, command):
    """No model, no tokenizer named: both are made, and what is saved reads back."""
    words = ["sun", "moon", "star", "lake", "tree", "hill", "bird", "fish"]
    draw = np.random.default_rng(0)
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(" ".join(draw.choice(words, 12)) + "." for _ in range(80)))
    command.ok("pretrain", data=path, dry_run=True, out=tmp_path / "r")
    assert not (tmp_path / "r").exists() and "80 rows, 4 held out" in " ".join(command.result["plan"])
    result = command.ok("pretrain", data=path, steps=12, batch=8, report=True, out=tmp_path / "r")
    assert result["better"] and result["after"]["eval/loss"] < result["before"]["eval/loss"] - 0.5
    assert "new, under 10 M parameters" in command.said and "tokens was trained on the data" in command.said
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "r/model")
    assert tokenizer.decode(tokenizer("the sun")["input_ids"][1:]) == "the sun"
    assert (tmp_path / "r" / "report.html").exists()
    assert len(lines(tmp_path / "r" / "samples.jsonl")) == 8


def test_stopped_and_resumed_is_the_same_run(tmp_path, new):
    data = texts(tmp_path / "a.jsonl", [f"Number {n} is a number, and so is {n + 1}." for n in range(30)])
    whole, parts = (
        pretrain.PretrainConfig(
            data=str(data),
            model=new,
            out=str(tmp_path / name),
            steps=4,
            batch=5,
            max_length=16,
            save_every=2,
            report=False,
        )
        for name in ("whole", "parts")
    )
    pretrain.run(whole)
    with pytest.raises(Paused):
        pretrain.run(parts, stop=2)
    pretrain.run(parts.model_copy(update={"resume": True}))
    assert metrics(whole.out) == metrics(parts.out)
    one, two = (tree(Path(config.out) / "model") for config in (whole, parts))
    assert one == two


# the floor


def chain(count, seed):
    """Texts of a Markov chain over four letters that may end after any, and the nats that the chain gives each."""
    draw, law = np.random.default_rng(seed), np.random.default_rng(99).dirichlet(np.full(5, 0.7), size=5)
    law[4, 4] = 0
    law[:4, 4] = 0.06
    law[:, :4] /= law[:, :4].sum(1, keepdims=True) / (1 - law[:, 4:])
    found = []
    while len(found) < count:
        state, text, nats = 4, "", 0.0
        while len(text) < 100:
            after = int(draw.choice(5, p=law[state]))
            nats -= math.log(law[state, after])
            if after == 4:
                found.append((text, nats))
                break
            state, text = after, text + "abcd"[after]
    return found, law


def test_held_out_loss_approaches_the_entropy_of_a_known_chain(tmp_path, command, new):
    """METHODS oracle 20: below the letters' own entropy, near the chain's, and never below it beyond noise."""
    train, _ = chain(1500, 0)
    held, _ = chain(300, 1)
    seen = {text for text, _ in train}
    held = [(text, nats) for text, nats in held if text not in seen]
    data = texts(tmp_path / "a.jsonl", [text for text, _ in train])
    other = texts(tmp_path / "b.jsonl", [text for text, _ in held])
    result = command.ok(
        "pretrain", model=new, data=data, eval=other, out=tmp_path / "r", steps=150, batch=32, lr=1e-2, eval_every=30
    )
    tokens = sum(len(text) + 1 for text, _ in held)
    assert result["after"]["eval/count"] == tokens
    floor = sum(nats for _, nats in held) / tokens
    counts = np.array([sum(text.count(c) for text, _ in held) for c in "abcd"] + [len(held)]) / tokens
    letters = -(counts * np.log(counts)).sum()
    curve = [line["eval/loss"] for line in lines(tmp_path / "r/metrics.jsonl") if "eval/loss" in line]
    assert curve[0] > 5 and letters > floor + 0.15
    assert floor - 0.005 < curve[-1] < floor + 0.05 < letters
    assert min(curve) > floor - 0.005


def second_order():
    """A chain over four letters whose next depends on the last two: p(next | before, last); 4 is begin and end."""
    draw = np.random.default_rng(7)
    scores = np.array([1.2, 0.2, -0.4, -1.0]) + draw.normal(size=(5, 4)) + 2.5 * draw.normal(size=(5, 5, 4))
    letters = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    law = np.concatenate([0.94 * letters, np.full((5, 5, 1), 0.06)], axis=-1)
    law[4, 4] = [*letters[4, 4], 0]  # no text is empty
    return law


def shares(law):
    """(5, 5, 5): which share of all tokens is each (before, last, next), from the expected visits of each state."""
    moves = np.zeros((5, 5, 5, 5))
    for last in range(5):
        moves[:, last, last, :4] = law[:, last, :4]
    begin = np.eye(25)[24]
    visits = np.linalg.solve(np.eye(25) - moves.reshape(25, 25).T, begin).reshape(5, 5, 1)
    found = visits * law
    return found / found.sum()


def sampled(law, count, seed):
    """Texts of the chain, as the numbers of their tokens, the end included."""
    draw, found = np.random.default_rng(seed), []
    while len(found) < count:
        text = [4, 4]
        while len(text) < 112 and (len(text) == 2 or text[-1] != 4):
            text.append(int(draw.choice(5, p=law[text[-2], text[-1]])))
        if text[-1] == 4:
            found.append(text[2:])
    return found


PLATEAUS = {  # which law: shape, options, how far from it in nats a token and in the mean of log-probs
    "unigram": (
        {"rms_norm_eps": 0.01},
        dict(steps=84, lr=2e-3, train__schedule="constant", train__warmup_steps=10),
        0.03,
        0.1,
    ),
    "bigram": ({"num_hidden_layers": 0}, dict(steps=100, lr=1e-2), 0.01, 0.1),
    "chain": ({}, dict(steps=140, lr=1e-2), 0.06, 0.2),
}


@pytest.mark.parametrize("name", PLATEAUS)
def test_a_plateau_has_its_known_height(name, tmp_path, command):
    """METHODS oracle 20, of a chain that looks two letters back. Weights that begin from near nothing first learn the
    law of single letters, and stay there; a model without a layer sees one letter and ends at the law of pairs; a
    whole one passes both and approaches the chain. None beats its law, and each says what it says, token by token.
    """
    law = second_order()
    joint = shares(law)
    laws = {"unigram": joint.sum((0, 1)), "bigram": joint.sum(0), "chain": joint}
    train = sampled(law, 3000, 0)
    held = [text for text in sampled(law, 300, 1) if text not in train]
    data, other = (
        texts(tmp_path / file, ["".join("abcd"[k] for k in text[:-1]) for text in rows])
        for file, rows in (("a.jsonl", train), ("b.jsonl", held))
    )
    triples = [t for text in held for t in zip([4, 4, *text], [4, *text], text, strict=False)]
    before, last, after = np.array(triples).T
    seen = {"unigram": (after,), "bigram": (last, after), "chain": (before, last, after)}
    logs = {key: np.log(laws[key][at] / laws[key].sum(-1)[at[:-1]]) for key, at in seen.items()}
    heights = {key: -found.mean() for key, found in logs.items()}
    assert heights["unigram"] - 0.15 > heights["bigram"] > heights["chain"] + 0.3

    shape, options, near, apart = PLATEAUS[name]
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | shape))
    options |= {"model": f"new:{tmp_path / 'config.json'}", "data": data, "eval": other, "batch": 32, "max_length": 112}
    command.ok("pretrain", out=tmp_path / "r", eval_every=12, samples=0, **options)
    curve = [line["eval/loss"] for line in metrics(tmp_path / "r") if "eval/loss" in line]
    assert all(-0.005 < loss - heights[name] < near for loss in curve[-2:]), (heights, curve)
    assert min(curve) > heights[name] - 0.005
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "r/model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "r/model")
    rows = [Demonstration("", "".join("abcd"[k] for k in text[:-1])) for text in held]
    said = [logp for row in rows for group in tokenize_text(row, tokenizer) for logp in truth(model, group, 0)]
    distance = {key: np.abs(np.array(said) - found).mean() for key, found in logs.items()}
    assert distance.pop(name) < min(apart, *distance.values()), distance


# real text


@pytest.mark.parametrize("name", ["tinystories", "tinyshakespeare_speeches"])
def test_a_real_model_goes_on(tmp_path, command, data_dir, name):
    """The 260k model, some steps onward: what it knew it keeps, what it did not know it learns."""
    result = command.ok(
        "pretrain",
        model=data_dir / "tiny-llama-260k",
        data=f"{data_dir / name}.jsonl[:40]",
        eval=f"{data_dir / name}.jsonl[40:48]",
        out=tmp_path / "r",
        steps=8,
        batch=8,
        max_length=64,
        samples=0,
        eval_every=8,
        report=False,
    )
    before, after = result["before"]["eval/loss"], result["after"]["eval/loss"]
    if name == "tinystories":
        assert 1.0 < before < 2.0 and after < before + 0.03
    else:
        assert before > 2.5 and after < before - 0.1
    assert result["after"]["eval/perplexity"] == pytest.approx(math.exp(after))
