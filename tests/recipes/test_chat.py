"""chat: what each side reads and says, what is forgotten, and how it ends."""

import io
import json
from pathlib import Path

import pytest
import transformers
from runs_kit import TEMPLATE, pairs, save_model, write_rows


@pytest.fixture
def talk(palate, monkeypatch):
    """`palate chat` with these lines on stdin: the result object, all of stdout, what was said on stderr."""
    from palate.cli import main

    def call(text: str | io.StringIO, *operands, **options):
        from runs_kit import flags

        monkeypatch.setattr("sys.stdin", io.StringIO(text) if isinstance(text, str) else text)
        palate.capsys.readouterr()
        code = main(["chat", *map(str, operands), *flags(**({"device": "cpu"} | options)), "--json"], {})
        out, said = palate.capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]), out, said

    return call


def greedy(folder, text: str, max_tokens: int, bos: bool) -> str:
    """What transformers' own greedy search adds to a text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=bos)["input_ids"]
    made = model.generate(ids, do_sample=False, max_new_tokens=max_tokens)[0, ids.shape[1] :].tolist()
    return tokenizer.decode([token for token in made if token != tokenizer.eos_token_id])


@pytest.fixture
def run_folder(palate, chatty, tmp_path):
    """A finished run that began from the chatty model."""
    turn = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    rows = [{"prompt": [{"role": "user", "content": r["prompt"]}], "chosen": turn(r["chosen"]), "rejected": turn(r["rejected"])} for r in pairs(4)]  # fmt: skip  # noqa: E501
    data = write_rows(tmp_path / "d.jsonl", rows)
    palate.ok(
        "dpo", model=chatty, data=data, out="run", steps=2, batch=4, samples=0, device="cpu", eval="none", lr=0.01
    )
    return Path("run")


def test_a_conversation_is_read_through_the_template(talk, chatty):
    code, result, out, said = talk("Hello?\n\nAnd now?\n", chatty, temperature=0, max_tokens=5)
    first = greedy(chatty, "user: Hello?\nReply: ", 5, bos=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatty)
    second = greedy(chatty, f"user: Hello?\nReply: {first}{tokenizer.eos_token}user: And now?\nReply: ", 5, bos=False)
    assert code == 0
    assert [(turn["prompt"], turn["model"]) for turn in result["conversation"]] == [
        ("Hello?", first), ("And now?", second)]  # fmt: skip
    assert out.count("you    ") == 2
    assert "/reset forgets" in said


def test_reset_forgets_and_exit_leaves(talk, chatty):
    options = {"temperature": 0, "max_tokens": 5}
    (fresh,) = talk("And now?", chatty, **options)[1]["conversation"]
    code, result, _, said = talk("Hello?\n/reset\nAnd now?\n/what\n/exit\nmore\n", chatty, **options)
    assert code == 0
    assert [turn["prompt"] for turn in result["conversation"]] == ["Hello?", "And now?"]
    assert result["conversation"][1] == fresh
    assert "forgotten" in said


def test_without_a_template_every_line_is_a_prompt(talk, tiny):
    code, result, _, said = talk("Say 1:\nSay 2:\n", tiny, temperature=0, max_tokens=5)
    assert code == 0
    assert [turn["model"] for turn in result["conversation"]] == [
        greedy(tiny, f"Say {n}:", 5, bos=True) for n in (1, 2)
    ]
    assert "no chat template" in said


def test_the_result_stands_beside_its_parent(talk, run_folder, chatty, tmp_path):
    options = {"temperature": 0, "max_tokens": 6}
    code, result, out, said = talk("Say 1:\n", run_folder, **options)
    (turn,) = result["conversation"]
    assert code == 0
    assert turn["base"] == greedy(chatty, "user: Say 1:\nReply: ", 6, bos=False)
    assert turn["tuned"] == greedy(run_folder / "model", "user: Say 1:\nReply: ", 6, bos=False)
    assert turn["base"] != turn["tuned"]
    assert out.splitlines()[1].startswith("base   ")
    assert f"base {chatty}" in said
    (alone,) = talk("Say 1:\n", run_folder, **{"with": "none"}, **options)[1]["conversation"]
    assert alone == {"prompt": "Say 1:", "model": turn["tuned"]}
    (named,) = talk("Say 1:\n", run_folder / "model", **{"with": chatty}, **options)[1]["conversation"]
    assert named == turn


def test_a_parent_that_is_gone_is_said(talk, run_folder):
    record = json.loads((run_folder / "run.json").read_text())
    record["parents"][0]["model"] = "./gone"
    (run_folder / "run.json").write_text(json.dumps(record))
    code, result, _, said = talk("Say 1:\n", run_folder, max_tokens=3)
    assert code == 0
    assert {*result["conversation"][0]} == {"prompt", "model"}
    assert "./gone" in said
    code, result, _, said = talk("Say 1:\n", run_folder, max_tokens=3, **{"with": "./gone"})
    assert code == 3


def test_draws_depend_on_the_seed_and_the_turn(talk, tiny):
    said = [
        talk("Say:\nSay:\n", tiny, seed=seed, temperature=1, max_tokens=12)[1]["conversation"] for seed in (0, 0, 1)
    ]
    assert said[0] == said[1] != said[2]
    assert said[0][0]["model"] != said[0][1]["model"]


def test_the_oldest_turns_leave_when_the_context_is_full(talk, tmp_path, tiny_llama, tiny_tokenizer):
    small = save_model(
        tmp_path / "small", tiny_llama(0, max_position_embeddings=64), tiny_tokenizer, TEMPLATE
    )  # fmt: skip
    many = "".join(f"Say the number {n}!\n" for n in range(6))
    code, result, _, said = talk(many, small, temperature=0, max_tokens=8)
    assert code == 0
    assert len(result["conversation"]) == 6
    assert "not fit into 64 tokens any more" in said
    code, result, _, said = talk("word " * 90 + "\nSay 1!\n", small, temperature=0, max_tokens=8)
    assert code == 0
    assert [turn["prompt"] for turn in result["conversation"]] == ["Say 1!"]
    assert "say it shorter" in said


class Interrupting(io.StringIO):
    def __next__(self):
        raise KeyboardInterrupt


def test_control_c_and_the_end_of_input_leave_politely(talk, tiny):
    for stdin in ("", Interrupting("")):
        code, result, _, said = talk(stdin, tiny)
        assert (code, result["conversation"]) == (0, [])
        assert "Traceback" not in said


def test_nothing_that_is_said_steers_the_terminal(talk, tiny, capsys):
    from palate.recipes.chat import plain

    _, _, out, _ = talk("a\x1b[31mb\n", tiny, max_tokens=2)
    plain({"tuned": "x\x1b[2Jy\nz"})
    assert "\x1b" not in out + capsys.readouterr().out


def test_side_by_side_on_a_terminal():
    from rich.console import Console

    from palate.recipes.chat import columns

    screen = io.StringIO()
    show = columns(Console(file=screen, width=60, force_terminal=True, color_system=None))
    show({"base": "left [bold]words", "tuned": "right words\x1b[2J"})
    head, _, row = screen.getvalue().splitlines()[:3]
    assert head.split()[0] == "base"
    assert head.split()[-1] == "tuned"
    assert "left [bold]words" in row
    assert "right words\\x1b[2J" in row


@pytest.mark.parametrize(
    "operands, options, code, words",
    [
        ((), {}, 2, ("--run is needed",)),
        (("./nothing",), {}, 3, ("./nothing", "E401")),
        (("TINY",), {"temperature": -1}, 2, ("out of range",)),
        (("TINY",), {"wiht": "none"}, 2, ("did you mean --with",)),
        (("TINY",), {"chat_template": "no.jinja"}, 3, ("no.jinja",)),
    ],
)
def test_bad_input(talk, tiny, operands, options, code, words):
    found, _, _, said = talk("Hi\n", *(str(tiny) if word == "TINY" else word for word in operands), **options)
    assert found == code
    for word in words:
        assert word in said
    assert "Traceback" not in said
