"""Templates: rendered as transformers does, refused in their own words, tried in a child before they meet data."""

import pytest

import zoo
from palate.data.records import Message
from palate.data.template import check_template, load_template, render, turn_tail
from palate.errors import DataError, ModelError, NotThereError

CHAT = (Message("user", "hello"), Message("assistant", "yes"), Message("user", "why"))
DICTS = [{"role": message.role, "content": message.content} for message in CHAT]


@pytest.mark.parametrize("name", zoo.TEMPLATES)
def test_renders_as_transformers_does(name):
    tokenizer = zoo.chat_tokenizer(name)
    for prompt in (True, False):
        expected = tokenizer.apply_chat_template(DICTS, tokenize=False, add_generation_prompt=prompt)
        assert render(CHAT, tokenizer, prompt=prompt) == expected


@pytest.mark.parametrize(
    "name, tail",
    [("chatml", "<|im_end|>\n"), ("llama2", " </s>"), ("phi3", "<|end|>\n<|endoftext|>"), ("plain-words", "\n\n")],
)
def test_what_stands_behind_a_reply_is_found(name, tail):
    assert turn_tail(zoo.chat_tokenizer(name)) == tail


def test_a_refusal_is_in_the_templates_words_and_names_the_row():
    tokenizer = zoo.chat_tokenizer("gemma")
    with pytest.raises(DataError) as caught:
        render((Message("system", "be kind"), *CHAT), tokenizer, prompt=True, where="pairs.jsonl:7")
    assert caught.value.code == "E216" and caught.value.where == "pairs.jsonl:7"
    assert "System role not supported" in str(caught.value)


def test_without_a_template():
    with pytest.raises(ModelError) as caught:
        render(CHAT, zoo.tokenizer(), prompt=True, where="a.jsonl:1")
    assert caught.value.code == "E408" and "--chat-template FILE" in str(caught.value)


BROKEN = [
    ("{% for m in messages %}\n{{ m.content ", "line 2"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "2 seconds"),
    ("{{ ''.__class__.__mro__ }}", "__class__"),
    ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
    ("{{ range(10 ** 9) | list }}", "Range too big"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ messages.append(1) }}", "append"),
]


@pytest.mark.parametrize("template, words", BROKEN)
def test_broken_and_hostile_templates_are_refused(template, words):
    tokenizer = zoo.tokenizer()
    with pytest.raises(ModelError, match=words) as caught:
        load_template(template, tokenizer)
    assert caught.value.code == "E408" and tokenizer.chat_template is None


def test_a_hostile_template_of_the_model_does_not_run_either():
    with pytest.raises(ModelError, match="2 seconds"):
        render(CHAT, zoo.tokenizer(template=BROKEN[1][0]), prompt=True)


def test_a_template_from_a_file(tmp_path):
    tokenizer = zoo.tokenizer()
    file = tmp_path / "chat.jinja"
    file.write_text(zoo.TEMPLATES["chatml"], encoding="utf-8")
    assert load_template(file, tokenizer) == tokenizer.chat_template == zoo.TEMPLATES["chatml"]
    assert load_template(str(file), zoo.tokenizer()) == zoo.TEMPLATES["chatml"]
    with pytest.raises(NotThereError):
        load_template(str(tmp_path / "absent.jinja"), tokenizer)
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with pytest.raises(ModelError, match=r"bad\.jinja: line 1"):
        load_template(tmp_path / "bad.jinja", tokenizer)


def test_a_template_may_refuse_the_trial_in_words():
    check_template("{{ raise_exception('only tools') }}", zoo.tokenizer())
