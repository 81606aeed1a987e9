"""Defaults, YAML, environment, flags: what wins, what is refused and in which words."""

import contextlib
import dataclasses
import math
import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from palate.config import MAX_BYTES, fill, leaves, locate, read_yaml, scalar
from palate.errors import UsageError


class Train(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    warmup_steps: int = Field(0, ge=0, description="Steps")
    clip_norm: float = Field(10.0, gt=0, description="Norm; inf for never")


class Stand(BaseModel):
    """A recipe's config in small."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: str
    lr: Annotated[Literal["auto"] | Annotated[float, Field(gt=0, lt=math.inf)], Field(description="Rate")] = "auto"
    beta: Annotated[float | None, Field(gt=0)] = None
    batch: Annotated[int, Field(gt=0)] = 64
    epochs: Annotated[int, Field(gt=0, le=1000)] = 1
    resume: bool = False
    bad_rows: Literal["stop", "skip"] = "stop"
    reference: str | None = None
    columns: dict[str, str] = {}
    loss_options: dict[str, float | bool | int] = {}
    layers: list[int] = []
    train: Train = Train()

    @model_validator(mode="after")
    def agree(self):
        if self.reference == "none" and self.beta is not None:
            raise UsageError(
                "beta pulls towards a reference, there is none", where="beta,reference", code="E308", next="drop one"
            )
        return self


@pytest.fixture
def filled(tmp_path):
    """Fills Stand from YAML text, flags and variables; --data is given."""

    def run(text: str | bytes = "", flags=None, environ=None):
        path = tmp_path / "x.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return fill(Stand, {"data": "d.jsonl"} | (flags or {}), path, environ or {})

    return run


def refused(filled, *args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        filled(*args, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_later_layer_wins_and_its_place_is_kept(filled):
    text = "lr: 1e-5\nbatch: 8\nepochs: 2\n"
    config, origins = filled(text, {"epochs": "4"}, {"PALATE_BATCH": "16", "PALATE_EPOCHS": "3"})
    assert (config.lr, config.batch, config.epochs, config.resume) == (1e-5, 16, 4, False)
    assert {key: origins[key].kind for key in ("lr", "batch", "epochs", "resume")} == {
        "lr": "yaml",
        "batch": "environment",
        "epochs": "flag",
        "resume": "default",
    }
    assert origins["lr"].where.endswith('x.yaml:1: key "lr"')


def test_groups_and_open_tables_from_every_layer(filled):
    text = "train:\n  warmup_steps: 5\nloss_options: {tau: 0.1, average: false}\ncolumns:\n  chosen: good\n"
    config, origins = filled(
        text,
        {"columns": "rejected=bad,prompt=012", "loss_options.tau": "2e-1"},
        {"PALATE_TRAIN__WARMUP_STEPS": "7", "PALATE_LOSS_OPTIONS__GAMMA": "3"},
    )
    assert config.train.warmup_steps == 7
    assert config.loss_options == {"tau": 0.2, "average": False, "gamma": 3}
    assert config.loss_options["average"] is False
    assert config.columns == {"chosen": "good", "rejected": "bad", "prompt": "012"}
    assert origins["loss_options.tau"].where == "--loss-options.tau"
    assert origins["columns.chosen"].where.endswith(':5: key "columns.chosen"')


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7), ("1e-5", 1e-5), (".5", 0.5), ("1.", 1.0), ("-3", -3), ("+4", 4), ("0", 0), ("1E3", 1000.0),
        ("true", True), ("FALSE", False), ("~", None), ("null", None), ("", None), (".inf", math.inf),
        ("-.inf", -math.inf), ("off", "off"), ("on", "on"), ("yes", "yes"), ("no", "no"), ("y", "y"),
        ("012", "012"),
        ("12:30:45", "12:30:45"), ("1_000", "1_000"), ("0x1F", "0x1F"),
        ("2001-01-01", "2001-01-01"), ("9" * 5000, "9" * 5000), ("tRue", "tRue"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = scalar(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lrr: 3\n", [':1: unknown key "lrr" [E301]', 'did you mean "lr"']),
        ("train:\n  warmup_step: 3\n", [':2: unknown key "train.warmup_step" [E301]', '"train.warmup_steps"']),
        ("warmup_steps: 3\n", ["[E301]", 'did you mean "train.warmup_steps"']),
        ("zzz: 3\n", ["[E301]", 'use one of "bad_rows", "batch"']),
        ("lr: 1\nbatch: 2\nlr: 2\n", [':3: key "lr" stands on line 1 and again on line 3 [E302]', "keep one"]),
        ("train: {warmup_steps: 1, warmup_steps: 1}\n", ["[E302]"]),
        ("resume: off\n", [':1: key "resume": wants true or false, found "off" [E303]', "true"]),
        ("batch: 012\n", ['wants a whole number, found "012" [E303]', "for example 20"]),
        ("lr: 012\n", ['wants a number or "auto", found "012" [E303]']),
        ("lr: 12:30:45\n", ['found "12:30:45" [E303]']),
        ("lr: aut\n", ["[E303]", 'did you mean "auto"']),
        ('batch: "12"\n', ["[E303]"]),
        ("batch: true\n", ["wants a whole number, found true [E303]"]),
        ("batch: 2.5\n", ["wants a whole number, found 2.5 [E303]"]),
        ("batch: [1]\n", ["found a list [E303]"]),
        ("lr: {a: 1}\n", ["found a mapping [E303]"]),
        ("train: 3\n", ["a group of keys, not a value [E303]", "train.warmup_steps"]),
        ("a:\n\tb: 1\n", [":2:1: not YAML: a tab", "[E304]"]),
        ("batch: 1\nlayers: [1, 2\nlr: 3\n", [":2:9: not YAML: the bracket opened here is not closed", "[E304]"]),
        ("a: b: c\n", [":1:5: not YAML", "[E304]"]),
        ("[1, 2]\n", ["not a mapping", "[E304]"]),
        ("just text\n", ["not a mapping", "[E304]"]),
        ("? [a]\n: 1\n", ["a key must be one plain word [E304]"]),
        ("lr: 1\n---\nlr: 2\n", [":2: a second document", "[E304]"]),
        ("lr: \x01\n", [":1: control character U+0001", "[E304]"]),
        ("lr: *a\n", ["has no anchor", "[E304]"]),
        ("data: &a [*a]\n", ["[E304]"]),
        (b"lr: 1\ndata: \xff\n", [":2: byte 12 is not UTF-8 [E304]"]),
        ("lr: !!python/object/apply:os.system [ls]\n", [':1: tag "tag:yaml.org,2002:py', "[E305]", "remove"]),
        ("lr: !!float 1\n", ["[E305]"]),
        ("lr: !env X\n", ["[E305]"]),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(8)), ["[E306]"]),
        ("lr: 0\n", ["0 is out of range, allowed: > 0", "[E307]"]),
        ("lr: -1\n", [':1: key "lr": -1 is out of range, allowed: > 0 or "auto" [E307]']),
        ("lr: .nan\n", ["nan is not finite [E307]"]),
        ("lr: .inf\n", ["[E307]"]),
        ("beta: 0\n", ["allowed: > 0 [E307]"]),
        ("beta: .inf\n", ["[E307]"]),
        ("loss_options: {tau: .nan}\n", ['key "loss_options.tau": nan is not finite [E307]']),
        ("batch: 0\n", ["[E307]"]),
        ("batch: -3\n", ["[E307]"]),
        ("epochs: 1001\n", ["allowed: > 0 and <= 1000 [E307]"]),
        ("train: {clip_norm: .nan}\n", ["[E307]"]),
        ("bad_rows: stopp\n", ['allowed: "stop", "skip" [E307]', 'did you mean "stop"']),
        ("reference: none\nbeta: 0.1\n", ['x.yaml:2: key "beta"', 'x.yaml:1: key "reference"', "[E308]"]),
        ("reference: None\n", [':1: key "reference": "None" is no value [E309]', "leave the key out"]),
        ('reference: "null"\n', ["[E309]"]),
        ("batch: null\n", ["[E309]"]),
        ("reference: ${NOT_SET}/a\n", ["${NOT_SET} is not set [E310]", "set NOT_SET"]),
        ("data: " + "[" * 100_000, ["nested deeper than 64 [E312]"]),
        ("{a: " * 3000, ["[E312]"]),
        ("layers: [" + "1," * 30_000 + "]\n", ["more than 10,000 values [E312]"]),
        ("#" * (MAX_BYTES + 1), ["larger than 1 MiB", "[E312]"]),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, str | bytes) else "",
)  # fmt: skip
def test_what_a_file_is_refused_for(filled, text, says):
    message = refused(filled, text)
    for part in says:
        assert part in message, message
    assert "x.yaml" in message
    assert "Next: " in message
    assert len(message) < 600


def test_what_flags_and_variables_are_refused_for(filled):
    cases = [
        ({"lr": "-1"}, {}, "--lr: -1 is out of range, allowed: > 0", "E307"),
        ({"lr": "nan"}, {}, "--lr: nan is not finite", "E307"),
        ({"train.warmup_steps": "x"}, {}, '--train.warmup-steps: wants a whole number, found "x"', "E303"),
        ({"batch": "None"}, {}, '--batch: "None" is no value', "E309"),
        ({"batchh": "3"}, {}, "--batchh: no such option", "E301"),
        ({"columns": "good"}, {}, '--columns: "good" is no NAME=VALUE', "E303"),
        ({"resume": "yes"}, {}, '--resume: wants true or false, found "yes"', "E303"),
        ({"data": "d", "batch": 0}, {}, "--batch: 0 is out of range", "E307"),
        ({}, {"PALATE_LR": "0"}, "environment variable PALATE_LR: 0 is out of range", "E307"),
        ({}, {"PALATE_TRAIN__WARMUP_STEP": "4"}, "did you mean PALATE_TRAIN__WARMUP_STEPS", "E301"),
    ]
    for flags, environ, says, code in cases:
        message = refused(filled, "", flags, environ)
        assert says in message, message
        assert f"[{code}]" in message


def test_several_wrong_keys_are_counted(filled):
    message = refused(filled, "batch: 0\nepochs: 0\n")
    assert "(and 1 more: epochs)" in message


def test_a_key_that_must_be_given():
    with pytest.raises(UsageError, match="--data is needed") as caught:
        fill(Stand, {})
    assert caught.value.code == "E317"


def test_values_that_are_taken(filled):
    assert filled("reference: null\nlr: auto\n")[0].reference is None
    assert filled("layers: [1, 2]\n")[0].layers == [1, 2]
    assert filled("", {"layers": "3,4"})[0].layers == [3, 4]
    assert filled("reference: 2024\n")[0].reference == "2024"  # a name made of digits
    assert filled("reference: 012\n")[0].reference == "012"
    assert filled("reference: off\n")[0].reference == "off"
    assert filled("data: ${HOME_DIR}/d\nreference: $5\n", environ={"HOME_DIR": "/h"})[0].reference == "$5"
    assert filled("train: {clip_norm: .inf}\n")[0].train.clip_norm == math.inf
    assert filled("", {"train.clip_norm": "inf"})[0].train.clip_norm == math.inf
    assert filled("train:\n")[0].train == Train()
    assert filled(b"\xef\xbb\xbflr: 2\r\nbatch: 3\r\n")[0].batch == 3
    assert filled("a: &x 3\n".replace("a", "batch") + "epochs: *x\n")[0].epochs == 3
    assert filled("", environ={"PALATE_CACHE": "/c", "PALATE_JUDGE": "x", "PALATE_LR": "2"})[0].lr == 2.0


def test_no_such_config_file(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(UsageError, match=r"did you mean run\.yaml"):
        read_yaml(tmp_path / "runn.yaml")
    with pytest.raises(UsageError, match="a folder"):
        read_yaml(tmp_path)


def test_errors_of_later_are_located():
    _, origins = fill(Stand, {"data": "d", "loss_options.tau": "3"})
    error = locate(UsageError("there is no tau", where="loss_options.tau", code="E301"), origins)
    assert str(error) == "--loss-options.tau: there is no tau [E301]."
    kept = locate(UsageError("broken", where="data.jsonl:3"), origins)
    assert kept.where == "data.jsonl:3"


def test_every_key_has_a_flag():
    assert [leaf.flag for leaf in leaves(Stand).values()][-3:] == [
        "--layers",
        "--train.warmup-steps",
        "--train.clip-norm",
    ]


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda text: text not in {"None", "null", "Null", "NULL"} and "${" not in text and "\ufeff" not in text
)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)


@settings(max_examples=150, deadline=None)
@given(
    data=WORDS
    | st.sampled_from(["1e-5", "012", "off", "~", "0o17", "12:30", "true", "a: b", "# x", ".inf", "=", "<<"]),
    lr=POSITIVE | st.just("auto"),
    beta=st.none() | POSITIVE,
    columns=st.dictionaries(WORDS, WORDS, max_size=3),
    options=st.dictionaries(WORDS, st.booleans() | st.integers(-9, 9) | st.floats(-1e30, 1e30), max_size=3),
    clip=POSITIVE | st.just(math.inf),
)
def test_a_resolved_config_reads_back_equal(tmp_path_factory, data, lr, beta, columns, options, clip):
    config = Stand(data=data, lr=lr, beta=beta, columns=columns, loss_options=options, train=Train(clip_norm=clip))
    path = tmp_path_factory.mktemp("c") / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    assert fill(Stand, {}, path)[0] == config


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet="ab:-[]{}&*!|>'\"#,?%@`~ \n\t0.e", max_size=60))
def test_no_text_is_answered_with_anything_but_a_config_or_a_usage_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("c") / "x.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UsageError):
        fill(Stand, {"data": "d"}, path)


def _recipe_types():
    from palate.cli import VERBS

    there = {name: verb for name, verb in VERBS.items() if verb.exists}
    inner = {f"{name} {word}": verb.load(word)[0] for name, verb in there.items() for word in verb.of}
    return {name: verb.load()[0] for name, verb in there.items()} | inner


def test_every_option_of_every_verb_says_what_it_means():
    for verb, config_type in _recipe_types().items():
        for path, leaf in leaves(config_type).items():
            assert leaf.field.description, f"palate {verb} {leaf.flag} has no help text ({path})"
        assert config_type.model_config.get("extra") == "forbid", verb


def test_every_verb_reads_back_its_own_defaults(tmp_path):
    for verb, config_type in _recipe_types().items():
        known = leaves(config_type).items()
        needed = {path: "lr=1e-5,0.1" if leaf.open else "x" for path, leaf in known if leaf.field.is_required()}
        needed |= {path: "x,y" for path, leaf in known if leaf.field.annotation == list[str]}
        config, _ = fill(config_type, needed)
        (tmp_path / f"{verb}.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        assert fill(config_type, {}, tmp_path / f"{verb}.yaml")[0] == config


def test_filling_needs_no_torch():
    code = "import sys, palate.config, palate.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_leaf_is_a_value():
    leaf = leaves(Stand)["lr"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        leaf.path = "x"
    assert Any not in leaf.wants
