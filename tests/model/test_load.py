"""Loading and saving: what a name stands for, what is refused before transformers sees it, what comes back."""

import copy
import json
import os
import pickle
import shutil
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from palate.errors import MachineError, ModelError, NotThereError, UsageError
from palate.model.adapters import add_lora, reference_mode
from palate.model.load import (
    check_safetensors,
    check_same_tokenizer,
    context,
    load,
    quiet,
    same_tokenizer,
    save,
    tokenizer_difference,
    train_tokenizer,
    with_tokenizer,
)

TEXTS = ["The cat sat on the mat.", "A dog ran after the cat; the cat ran up a tree.", "Yes, no, maybe: 1, 2, 3.\n"] * 4
IDS = torch.tensor([[5, 9, 2, 11, 60, 3, 3, 8]])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def config(kind="llama", **changes):
    if kind == "gpt2":
        return GPT2Config(**{"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **changes})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(
        **{"vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": 64, **sizes, **changes}
    )


def fresh(kind="llama", **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(kind, **changes)).eval()


@pytest.fixture(scope="module")
def _saved(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "llama"
    fresh().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(_saved, tmp_path):
    """A sound model folder of this test's own."""
    return Path(shutil.copytree(_saved, tmp_path / "m"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def refused(name, code, *parts, **how):
    with pytest.raises(ModelError) as caught:
        load(name, **how)
    text = str(caught.value)
    assert caught.value.code == code, text
    assert caught.value.exit_code == 3 and "\n" not in text
    assert caught.value.next, "an error says what to do"
    for part in parts:
        assert str(part) in text, text


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_folder(folder):
    loaded = load(folder)
    assert loaded.path == folder and loaded.name == str(folder)
    assert not loaded.model.training and {w.dtype for w in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(logits(loaded.model), logits(fresh()))
    assert loaded.tokenizer.decode(loaded.tokenizer("The cat")["input_ids"], skip_special_tokens=True) == "The cat"
    assert len(loaded.fingerprint) == 64


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64"])
def test_dtype(folder, dtype):
    weights = load(folder, dtype=dtype).model.state_dict().values()
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert {w.dtype for w in weights} == {expected}


def test_device_auto_takes_what_is_there(folder):
    assert load(folder, device="auto").model.device.type in ("cpu", "cuda", "mps")


def test_unknown_dtype_and_device_are_usage_errors(folder):
    with pytest.raises(UsageError, match="bfloat16"):
        load(folder, dtype="float8")
    with pytest.raises(UsageError, match="auto"):
        load(folder, device="tpu9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(folder):
    with pytest.raises(MachineError, match="cuda"):
        load(folder, device="cuda")


def test_a_run_folder_stands_for_its_model(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    refused(tmp_path / "run", "E401", "no model yet")
    folder.rename(tmp_path / "run" / "model")
    loaded = load(tmp_path / "run")
    assert loaded.path == tmp_path / "run" / "model" and loaded.name == str(tmp_path / "run")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "a/b/c", "nowhere/model.gguf", "~/no-such-model-here"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(NotThereError, match="there is no model") as caught:
        load(name)
    assert caught.value.exit_code == 3 and isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(
    "name, hint", [("builtin:tin", "did you mean builtin:tiny"), ("builtin:", "builtin:base, builtin:tiny")]
)
def test_builtin_names_are_listed(name, hint):
    with pytest.raises(NotThereError, match=hint):
        load(name)


def test_a_hub_id_that_cannot_be_fetched_is_one_clear_line(monkeypatch, tmp_path):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("Cannot reach the server\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(NotThereError, match="Cannot reach the server") as caught:
        load("someone/some-model")
    assert "long story" not in str(caught.value) and "local folder" in str(caught.value)


def test_a_hub_id_is_checked_like_any_folder_and_fetches_no_pickle(monkeypatch, folder):
    import fnmatch

    import huggingface_hub

    asked = {}

    def snapshot(name, **how):
        asked.update(how, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load("someone/some-model", revision="v1").name == "someone/some-model"
    assert asked["name"] == "someone/some-model" and asked["revision"] == "v1"

    def fetched(name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"])

    assert fetched("model-00001-of-00002.safetensors") and fetched("tokenizer.json") and fetched("chat_template.jinja")
    assert not any(fetched(name) for name in ("pytorch_model.bin", "modeling_x.py", "training_args.bin", "rng.pth"))
    (folder / "model.safetensors").unlink()
    refused("someone/some-model", "E401", "model.safetensors")


# --- new: ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "new" / "tiny.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config().to_diff_dict()))
    return path


def test_new_weights_follow_the_seed_alone(recipe):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one, two, other = load(f"new:{recipe}", seed=1), load(f"new:{recipe}", seed=1), load(f"new:{recipe}", seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert one.tokenizer is None and one.path is None and not one.model.training
    half = load(f"new:{recipe}", seed=1, dtype="bfloat16").model
    assert torch.equal(half.lm_head.weight, one.model.lm_head.weight.bfloat16())
    assert torch.equal(half.model.rotary_emb.inv_freq, one.model.model.rotary_emb.inv_freq)
    assert half.config.dtype == torch.bfloat16


def test_new_takes_the_tokenizer_beside_the_config(recipe, tokenizer):
    tokenizer.save_pretrained(recipe.parent)
    loaded = load(f"new:{recipe}")
    assert same_tokenizer(loaded.tokenizer, tokenizer)
    assert with_tokenizer(loaded, TEXTS) is loaded


def test_new_trains_a_tokenizer_where_there_is_none(recipe, tmp_path):
    loaded = with_tokenizer(load(f"new:{recipe}"), TEXTS)
    assert 259 <= len(loaded.tokenizer) <= 300 and "tokenizer" in loaded.notes[-1]
    assert loaded.model.config.eos_token_id == loaded.tokenizer.eos_token_id
    save(loaded.model, loaded.tokenizer, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.fingerprint == loaded.fingerprint and same_tokenizer(again.tokenizer, loaded.tokenizer)


@pytest.mark.parametrize(
    "content, part",
    [
        ("{", "not JSON"),
        ("[1]", "no JSON object"),
        ("{}", "model_type"),
        ('{"model_type": "no-such-family"}', "no-such-family"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot be read"),
    ],
)
def test_new_refuses_what_is_no_config(tmp_path, content, part):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ModelError, match=part):
        load(f"new:{tmp_path / 'c.json'}")
    with pytest.raises(NotThereError):
        load(f"new:{tmp_path / 'nowhere.json'}")


def test_new_runs_no_code_of_the_config(recipe):
    content = json.loads(recipe.read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}
    recipe.write_text(json.dumps(content))
    refused(f"new:{recipe}", "E403", "evil.Config")


# --- the tokenizer we train ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " ", "The cat", " The  cat\n\n", "Ünï 你好 \U0001f642\x00\x7f", "a\u0301 \t\r\n"])
def test_any_text_decodes_to_itself(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_training_a_tokenizer_repeats(tokenizer):
    assert train_tokenizer(TEXTS, 300).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(ModelError, match="at least 259"):
        train_tokenizer(TEXTS, 258)


def test_same_tokenizer(tokenizer, folder):
    assert same_tokenizer(tokenizer, load(folder).tokenizer)
    other = train_tokenizer(["entirely different words here"] * 5, 300)
    assert "token" in tokenizer_difference(tokenizer, other)
    with pytest.raises(ModelError, match="reference's tokenizer") as caught:
        check_same_tokenizer(tokenizer, other)
    assert caught.value.code == "E410"
    ends = copy.deepcopy(tokenizer)
    ends.eos_token = "<pad>"
    assert "eos_token_id" in tokenizer_difference(tokenizer, ends)
    check_same_tokenizer(tokenizer, copy.deepcopy(tokenizer))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_without_a_part_lists_what_it_has(folder, missing):
    (folder / missing).unlink()
    there = next(name for name in ("config.json", "model.safetensors") if name != missing)
    refused(folder, "E401", missing, there)


def test_an_empty_folder(tmp_path):
    refused(tmp_path, "E401", "nothing")


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "[" * 100_000])
def test_a_config_that_is_not_json(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert caught.value.code == "E401"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_tokenizer_that_cannot_be_read(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert caught.value.code == "E401"


class _Trap:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return (open, (self.canary, "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", "model.ckpt"])
def test_pickles_are_refused_unopened(folder, tmp_path, name):
    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Trap(canary)))
    refused(folder, "E402", name, "save_pretrained")
    assert not canary.exists()


def test_pickles_beside_safetensors_are_left_alone(folder, tmp_path):
    canary = tmp_path / "canary"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(_Trap(canary)))
    load(folder)
    assert not canary.exists()


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_of_the_model_is_not_run(folder, tmp_path, where):
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass M: pass\n")
    content = json.loads((folder / where).read_text())
    content["auto_map"] = {"AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.M", None]}
    (folder / where).write_text(json.dumps(content))
    refused(folder, "E403", "evil.M", where)
    assert not canary.exists()


@pytest.mark.parametrize("revision", [None, "main", "abc123", "g" * 40, "A" * 40])
def test_the_flag_needs_a_commit(folder, revision):
    with pytest.raises(UsageError, match="commit"):
        load(folder, trust_remote_code=True, revision=revision)
    assert load(folder, trust_remote_code=True, revision="0123456789" * 4).model is not None


def header_of(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


NORM = "model.norm.weight"


def _shift(by):
    def change(header):
        begin, end = header[NORM]["data_offsets"]
        header[NORM]["data_offsets"] = [begin + by, end + by]

    return change


def _set(key, value):
    return lambda header: header[NORM].__setitem__(key, value)


@pytest.mark.parametrize(
    "change, part",
    [
        (_shift(-4), "overlap"),
        (_shift(4), "hole"),
        (_set("shape", [31]), "124 bytes"),
        (_set("shape", [2**40, 2**40]), "bytes"),
        (_set("shape", [-32]), "shape"),
        (_set("shape", "wide"), "shape"),
        (_set("shape", [True]), "shape"),
        (_set("dtype", "F64"), "256 bytes"),
        (_set("dtype", "F33"), "F33"),
        (_set("dtype", ["F32"]), "dtype"),
        (_set("data_offsets", [0]), "data_offsets"),
        (_set("data_offsets", None), "data_offsets"),
        (lambda header: header.__setitem__(NORM, 3), "dtype"),
        (lambda header: header.pop(NORM), "the tensors take|hole"),
    ],
    ids=lambda value: value if isinstance(value, str) else "change",
)
def test_a_damaged_header_is_refused_by_tensor(folder, change, part):
    path = folder / "model.safetensors"
    header, data = header_of(path)
    change(header)
    write_raw(path, header, data)
    with pytest.raises(ModelError, match=part) as caught:
        load(folder)
    assert caught.value.code == "E404" and "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "raw, part",
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        (struct.pack("<Q", 200_000_000) + b"{}", "limit"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "limit"),
        (struct.pack("<Q", 3) + b"{}", "has 2"),
        (struct.pack("<Q", 2) + b"[]", "object"),
        (struct.pack("<Q", 2) + b"{\xff", "JSON"),
        (struct.pack("<Q", 4) + b"nope", "JSON"),
        (struct.pack("<Q", 2) + b"{}" + b"xx", "holds 2"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "JSON"),
    ],
)
def test_a_file_that_is_no_safetensors(folder, raw, part):
    (folder / "model.safetensors").write_bytes(raw)
    refused(folder, "E404", part)


def test_a_tensor_that_stands_twice(folder):
    path = folder / "model.safetensors"
    header, data = header_of(path)
    text = json.dumps(header)
    write_raw(path, (text[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}').encode(), data)
    refused(folder, "E404", "twice")


def test_every_dtype_that_safetensors_writes_is_accepted(tmp_path):
    kinds = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
    kinds += [kind for kind in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64", "complex64")]
    tensors = {kind: torch.zeros(3, dtype=getattr(torch, kind)) for kind in kinds}
    save_file(tensors | {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 3)}, tmp_path / "x.safetensors")
    assert set(check_safetensors(tmp_path / "x.safetensors")) == {*kinds, "scalar", "empty"}


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_file_cut_short(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    refused(folder, "E404", "bytes")


def test_a_weight_that_is_missing_is_never_drawn_at_random(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[NORM]
    save_file(tensors, path, metadata={"format": "pt"})
    refused(folder, "E404", NORM)


def test_a_weight_of_another_shape(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[NORM] = torch.ones(16)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert caught.value.code == "E404"


@pytest.fixture
def sharded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_shards_load(sharded):
    assert torch.equal(logits(load(sharded).model), logits(fresh()))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors", "C:\\x.safetensors", "C:x"]
    + ["", "x\0.safetensors", None, 3, ["x"], "config.json", "a/..", "~/../../x.safetensors", "//host/x.safetensors"],
)
def test_a_shard_stays_in_its_folder(sharded, name):
    shutil.copy(next(sharded.glob("model-*.safetensors")), sharded.parent / "x.safetensors")
    edit_index(sharded, lambda names: names.__setitem__(NORM, name))
    refused(sharded, "E405", NORM, "do not trust")


def test_a_shard_that_links_out_of_the_folder(sharded):
    shard = next(sharded.glob("model-*.safetensors"))
    shard.rename(sharded.parent / "outside.safetensors")
    shard.symlink_to(sharded.parent / "outside.safetensors")
    refused(sharded, "E405", shard.name)


def test_the_links_of_a_hub_cache_are_fine(sharded, tmp_path):
    home = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = home.parent.parent / "blobs"
    home.mkdir(parents=True)
    blobs.mkdir()
    for at, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, blobs / str(at))
        (home / path.name).symlink_to(os.path.relpath(blobs / str(at), home))
    assert torch.equal(logits(load(home).model), logits(fresh()))


def test_a_shard_missing_extra_or_without_its_tensor(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    extra = sharded / "model-00099-of-00099.safetensors"
    shutil.copy(shards[0], extra)
    refused(sharded, "E405", extra.name)
    extra.unlink()
    kept = shards[0].read_bytes()
    shards[0].unlink()
    refused(sharded, "E405", shards[0].name, "missing")
    shards[0].write_bytes(kept)
    edit_index(sharded, lambda names: names.__setitem__("no.such.tensor", shards[0].name))
    refused(sharded, "E405", "no.such.tensor")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        load(sharded)
    assert caught.value.code == "E405"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder, value):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[NORM][3] = value
    tensors[NORM][5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    refused(folder, "E406", NORM, "2 values")


def test_a_vocabulary_larger_than_the_embedding(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    have = len(tokenizer)
    tokenizer.add_tokens([f"<new{i}>" for i in range(301 - have)])
    tokenizer.save_pretrained(folder)
    refused(folder, "E407", "301", "300", "<new")


def test_an_idle_control_token_beyond_the_embedding_is_said_aloud(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    have = len(tokenizer)
    tokenizer.add_tokens([f"<new{i}>" for i in range(300 - have)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    assert "<image>" in load(folder).notes[-1]
    tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(folder)
    refused(folder, "E407", "301", "300")


@pytest.mark.parametrize(
    "template", ["{% for", "{{ ''.__class__.__mro__ }}", "{% for x in range(10**9) %}x{% endfor %}"]
)
def test_a_bad_template_does_not_hinder_loading(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    assert load(folder).tokenizer.chat_template == template


def test_a_family_that_is_no_causal_model(folder):
    content = json.loads((folder / "config.json").read_text())
    for kind in ("t5", "no-such-family", None):
        content["model_type"] = kind
        content["architectures"] = ["NoSuch"]
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(ModelError):
            load(folder)


def test_an_encoder_is_refused(tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    content = {"model_type": "bert", "intermediate_size": 48, "max_position_embeddings": 64, **sizes}
    (tmp_path / "bert.json").write_text(json.dumps(content))
    refused(f"new:{tmp_path / 'bert.json'}", "E411", "looks ahead")
    (tmp_path / "bert.json").write_text(json.dumps(content | {"is_decoder": True}))
    load(f"new:{tmp_path / 'bert.json'}")


def test_loading_spends_no_randomness(folder):
    torch.manual_seed(9)
    np.random.seed(9)
    state, theirs = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    load(folder)
    assert torch.equal(torch.random.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], theirs)


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_reads_back_bit_for_bit(tmp_path, tokenizer, kind, tied, dtype):
    fresh(kind, tie_word_embeddings=tied).save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=dtype).eval()
    before = copy.deepcopy(model.config.to_dict())
    save(model, tokenizer, tmp_path / "out", card="# mine\n")
    assert model.config.to_dict() == before
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert torch.equal(logits(again), logits(model))
    assert same_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "out"), tokenizer)
    assert (tmp_path / "out" / "README.md").read_text() == "# mine\n"
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert len({name for name in held if "lm_head" in name or "wte" in name or "embed" in name}) == (1 if tied else 2)
    expected = sum(w.numel() * w.element_size() for w in model.parameters())
    assert sum(w.numel() * w.element_size() for w in held.values()) == expected
    loaded = load(tmp_path / "out", dtype=dtype)
    assert torch.equal(logits(loaded.model), logits(model))


def test_the_template_and_generation_config_are_kept(tmp_path, tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = fresh()
    model.generation_config.eos_token_id = [1, 2]
    model.generation_config.temperature = 0.3  # without do_sample: transformers refuses to write this
    save(model, chatty, tmp_path / "out")
    assert load(tmp_path / "out").tokenizer.chat_template == chatty.chat_template
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == [1, 2] and kept["temperature"] == 0.3
    assert not model.generation_config.do_sample


def test_a_model_whose_rotary_frequencies_were_rounded_is_not_passed_off_as_saved(tmp_path, tokenizer):
    with pytest.raises(ModelError, match="rotary"):
        save(fresh().to(torch.bfloat16), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_which_attention_ran_is_not_written(tmp_path, tokenizer):
    model = fresh()
    model.config._attn_implementation = "eager"
    save(model, tokenizer, tmp_path / "out")
    assert "attn_implementation" not in (tmp_path / "out" / "config.json").read_text()


def test_a_tokenizer_without_padding_stays_without(tmp_path, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.pad_token = None
    model = fresh()
    save(model, plain, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.tokenizer.pad_token is None and loaded.model.config.pad_token_id is None
    assert loaded.model.get_input_embeddings().weight.shape[0] == 300


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_is_saved_merged_and_alone(tmp_path, tokenizer, kind):
    save(fresh(kind), tokenizer, tmp_path / "base")
    start = load(tmp_path / "base")
    adapted = add_lora(start.model, 4)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    expected = logits(adapted)
    save(adapted, tokenizer, tmp_path / "run" / "model")
    assert torch.equal(logits(adapted), expected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    again = load(tmp_path / "run" / "adapter")
    assert torch.equal(logits(again.model), logits(merged)) and not hasattr(again.model, "peft_config")
    assert all(weight.requires_grad for weight in again.model.parameters())
    assert same_tokenizer(again.tokenizer, tokenizer)
    with reference_mode(adapted):
        assert torch.equal(logits(adapted), logits(load(tmp_path / "base").model))
    facts = json.loads((tmp_path / "run" / "adapter" / "palate.json").read_text())
    assert facts["base_fingerprint"] == load(tmp_path / "base").fingerprint == load(tmp_path / "base").fingerprint


def test_an_adapter_on_an_adapter_names_the_sum_as_its_base(tmp_path, tokenizer, monkeypatch):
    save(fresh(), tokenizer, tmp_path / "0" / "model")
    monkeypatch.chdir(tmp_path)
    name, expected = "0/model", None  # relative on purpose
    for stage in "12":
        start = load(name)
        if expected is not None:
            assert torch.allclose(logits(start.model), expected, atol=1e-5)
        adapted = add_lora(start.model, 2, seed=int(stage))
        with torch.no_grad():
            for key, weight in adapted.named_parameters():
                if "lora_B" in key:
                    weight.normal_(std=0.05)
        expected = logits(adapted)
        save(adapted, tokenizer, tmp_path / stage / "model")
        name = f"{stage}/adapter"
    monkeypatch.chdir("/")
    assert torch.allclose(logits(load(tmp_path / "2" / "adapter").model), expected, atol=1e-5)


def test_saving_again_what_is_there_is_nothing_and_something_else_is_refused(tmp_path, tokenizer):
    adapted = add_lora(fresh(), 2)
    save(adapted, tokenizer, tmp_path / "model")
    shutil.rmtree(tmp_path / "model")  # as if killed between the adapter and the model
    save(adapted, tokenizer, tmp_path / "model")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    save(adapted, tokenizer, tmp_path / "model")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for other in (fresh(num_hidden_layers=1), adapted):
        with pytest.raises(UsageError) as caught:
            save(other, None, tmp_path / "model")
        assert caught.value.code == "E313"


def test_a_full_disk_is_said_as_one(tmp_path, tokenizer, monkeypatch):
    import errno

    model = fresh()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(MachineError, match="disk is full"):
        save(model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def adapter(tmp_path, tokenizer):
    save(fresh(), tokenizer, tmp_path / "base")
    adapted = add_lora(load(tmp_path / "base").model, 4)
    save(adapted, tokenizer, tmp_path / "run" / "model")
    return tmp_path / "run" / "adapter"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_of_another_base(adapter, tmp_path, tokenizer):
    other = fresh()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    save(other, tokenizer, tmp_path / "other")
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "other"))
    refused(adapter, "E409", "other")
    (adapter / "palate.json").unlink()
    load(adapter)  # without it nothing tells the two apart
    for at, changes in enumerate([{"hidden_size": 64}, {"num_hidden_layers": 1}]):
        save(fresh(**changes), tokenizer, tmp_path / f"wrong{at}")
        edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / f"wrong{at}"))
        refused(adapter, "E409")
    save(fresh("gpt2"), tokenizer, tmp_path / "wrong")
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "wrong"))
    refused(adapter, "E409")


def test_an_adapter_whose_base_is_gone(adapter, tmp_path):
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(NotThereError, match="base"):
        load(adapter)


@pytest.mark.parametrize(
    "changes", [{"peft_type": "IA3"}, {"megatron_config": {"a": 1}}, {"base_model_name_or_path": None}]
)
def test_an_adapter_that_is_no_plain_lora(adapter, changes):
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(ModelError) as caught:
        load(adapter)
    assert caught.value.code == "E409"


def test_a_pickled_adapter(adapter, tmp_path):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(_Trap(tmp_path / "canary")))
    refused(adapter, "E402", "adapter_model.bin")
    assert not (tmp_path / "canary").exists()


def test_a_damaged_adapter(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    refused(adapter, "E404")


def test_a_save_that_does_not_read_back_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    import palate.model.load as module

    probe = module._probe
    calls = []

    def drifting(model):
        calls.append(model)
        return probe(model) + len(calls)

    monkeypatch.setattr(module, "_probe", drifting)
    with pytest.raises(ModelError, match="other logits"):
        save(fresh(), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- GGUF, context, silence ------------------------------------------------------------------------------------------


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGML0000")
    refused(tmp_path / "x.gguf", "E404", "no GGUF")
    (tmp_path / "y.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError):
        load(tmp_path / "y.gguf")


def test_context():
    assert context(fresh()) == 64 and context(fresh("gpt2")) == 64


def test_loading_says_nothing(folder, capfd):
    with quiet():
        pass
    load(folder)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    data = os.environ.get("PALATE_TEST_DATA")
    if not data:
        pytest.skip("PALATE_TEST_DATA is not set: the real 260k model is not tested")
    return Path(data) / "tiny-llama-260k"


def test_the_260k_model_has_its_published_log_probs_and_survives_a_round_trip(real, tmp_path):
    loaded = load(real)
    rows = json.loads((real / "expected.json").read_text())["logps"]["rows"]
    save(loaded.model, loaded.tokenizer, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.fingerprint == loaded.fingerprint and same_tokenizer(again.tokenizer, loaded.tokenizer)
    assert len(rows) > 0
    a, b = loaded.model.state_dict(), again.model.state_dict()
    assert all(np.array_equal(a[name].numpy(), b[name].numpy()) for name in a)
