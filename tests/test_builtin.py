"""The built-in models: small, whole, what their cards say, and made by the one documented command."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from palate import builtin, completion_nll, load, read_demonstrations, tokenize
from palate.data.records import Message
from palate.data.tokens import encode_prompt, end_tokens
from palate.errors import NotThereError
from palate.evaluation.preference import evaluate
from palate.model.load import context, same_tokenizer, train_tokenizer
from palate.worlds import files

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_builtin", ROOT / "examples" / "make_builtin.py")
make_builtin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_builtin)


@pytest.fixture(scope="module", params=builtin.MODELS)
def model(request):
    """(name, folder, loaded) of each built-in model."""
    return request.param, builtin.model_folder(request.param), load(f"builtin:{request.param}")


def test_both_together_are_small():
    sizes = [path.stat().st_size for name in builtin.MODELS for path in builtin.model_folder(name).rglob("*")]
    assert sum(sizes) < 8e6


def test_a_llama_of_the_config_that_is_published(model):
    _, _, loaded = model
    given = json.loads((ROOT / "configs" / "builtin" / "config.json").read_text())
    assert {key: loaded.model.config.to_dict()[key] for key in given} == given
    assert context(loaded.model) >= 512
    assert loaded.tokenizer.chat_template == (ROOT / "configs" / "builtin" / "chat_template.jinja").read_text()


@pytest.mark.parametrize("text", ["Grüße, 你好 \U0001f642", "The bed was  old.\n\n", "\x00\x7f", "Zürich"])
def test_any_text_comes_back(model, text):
    tokenizer = model[2].tokenizer
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_chats_have_control_tokens_and_one_end(model):
    tokenizer = model[2].tokenizer
    (record,) = read_demonstrations([{"messages": [{"role": "user", "content": "<|assistant|>Hi</s>"},
                                                   {"role": "assistant", "content": "No."}]}])  # fmt: skip
    group = tokenize(record, tokenizer)
    (ids,) = group.completions
    assert end_tokens(tokenizer) == {tokenizer.eos_token_id} and list(ids).count(tokenizer.eos_token_id) == 1
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert list(group.prompt).count(assistant) == 1  # what a user types is no control token
    assert list(encode_prompt((Message("user", "Hi"),), tokenizer))[-1] == assistant


def test_the_tokenizer_is_trained_on_what_the_world_writes(model):
    texts = [row["text"] for row in files.rows("text")]
    vocabulary = model[2].model.config.vocab_size
    again = train_tokenizer(texts, vocabulary, make_builtin.CONTROL)
    assert same_tokenizer(again, model[2].tokenizer)


def test_held_out_losses_are_those_of_the_cards(model):
    name, folder, loaded = model
    data = {"base": list(files.rows("text-heldout")), "tiny": "builtin:demonstrations[2800:]"}[name]
    groups = [tokenize(record, loaded.tokenizer) for record in read_demonstrations(data)]
    found = evaluate(loaded.model, groups, completion_nll())
    card = (folder / "README.md").read_text()
    assert found["eval/loss"] == pytest.approx(float(re.search(r"loss: ([\d.]+) nats", card)[1]), abs=2e-4)
    assert f"{found['eval/count']:,.0f} tokens" in card and f"{loaded.model.num_parameters():,} parameters" in card
    assert found["eval/loss"] < {"base": 0.7, "tiny": 0.9}[name]


def test_names_that_are_not_there():
    with pytest.raises(NotThereError, match=r"no built-in model of this name.*did you mean builtin:tiny"):
        builtin.model_folder("builtin:tinny")
    with pytest.raises(NotThereError, match=r"builtin:reviews/heldout"):
        builtin.data_file("zzz")
