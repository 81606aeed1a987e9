"""The command line from outside: exit codes, one message, the JSON line, help, and the time help takes."""

import errno
import json
import os
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from palate import cli
from palate.cli import VERBS, Verb, main
from palate.errors import DataError, Interrupted, NotBetterError, UsageError


class Options(BaseModel):
    """Options of the verb that these tests run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: str = Field(description="A file, slice of one as FILE[:500]")
    out: str | None = Field(None, description="Folder")
    lr: float = Field(0.1, gt=0, description="Rate")
    resume: bool = Field(False, description="Go on")
    columns: dict[str, str] = Field({}, description="Names")
    loss_options: dict[str, float | bool] = Field({}, description="Options")


@pytest.fixture
def verb(monkeypatch):
    """Puts a verb `try` before the command line; its `run` is replaced by the test."""
    module = types.ModuleType("a_recipe")
    module.Options = Options
    module.seen = {}

    def run(config, *, verb, say, panel, argv):
        module.seen.update(config=config, verb=verb, argv=argv)
        say("working")
        return module.work(config)

    module.run, module.work = run, lambda config: {"out": config.out, "summary": ["all well"], "accuracy": 0.5}
    module.__spec__ = types.SimpleNamespace(name="a_recipe")
    monkeypatch.setitem(sys.modules, "a_recipe", module)
    monkeypatch.setitem(VERBS, "try", Verb("Tries.", "a_recipe:Options", ("data",)))
    return module


def test_a_verb_gets_its_config_and_its_result_is_shown(verb, capsys):
    assert main(["try", "d.jsonl", "--lr", "5e-7", "--resume", "--loss-options.tau", "0.1", "--out=o"], {}) == 0
    shown = capsys.readouterr()
    assert shown.out == "all well\n"
    assert shown.err == "working\n"
    config = verb.seen["config"]
    assert (config.data, config.lr, config.resume, config.loss_options) == ("d.jsonl", 5e-7, True, {"tau": 0.1})
    assert verb.seen["verb"] == "try"
    assert verb.seen["argv"][:3] == ["palate", "try", "d.jsonl"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--columns", "chosen=good,rejected=bad"],
        ["--columns=chosen=good,rejected=bad"],
        ["--columns.chosen", "good", "--columns.rejected=bad"],
    ],
)
def test_columns_in_either_spelling(verb, flags):
    assert main(["try", "--data", "d", *flags], {}) == 0
    assert verb.seen["config"].columns == {"chosen": "good", "rejected": "bad"}


def test_layers_through_the_command_line(verb, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: from-file\nlr: 1e-3\nresume: true\n")
    for config_flag in (["-c", str(path)], [f"--config={path}"]):
        assert main(["try", *config_flag, "--no-resume"], {"PALATE_LR": "0.25"}) == 0
        config = verb.seen["config"]
        assert (config.data, config.lr, config.resume) == ("from-file", 0.25, False)


def test_json_is_the_last_line_and_one_object(verb, capsys):
    assert main(["try", "d", "--json", "--out", "o"], {}) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == {
        "verb": "try",
        "status": "done",
        "exit_code": 0,
        "out": "o",
        "accuracy": 0.5,
    }


@pytest.mark.parametrize(
    ("raised", "code", "status", "says"),
    [
        (UsageError("wrong", code="E308"), 2, "usage", "wrong [E308]"),
        (UsageError("no tau", where="loss_options.tau"), 2, "usage", "--loss-options.tau: no tau"),
        (
            DataError("empty", where="d:3", code="E208", next="mend it"),
            3,
            "refused",
            "d:3: empty [E208]. Next: mend it.",
        ),
        (NotBetterError("no better"), 4, "not better", "no better"),
        (OSError(errno.ENOSPC, "x", "runs/a"), 5, "machine", "runs/a: No space left on device"),
        (PermissionError(errno.EACCES, "x", "runs/a"), 5, "machine", "runs/a: Permission denied"),
        (MemoryError(), 5, "machine", "out of memory"),
        (Interrupted("stopped", next="--resume"), 6, "interrupted", "stopped. Next: --resume"),
        (KeyboardInterrupt(), 6, "interrupted", "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_end_has_its_exit_code_and_one_message(verb, capsys, raised, code, status, says):
    def work(config):
        raise raised

    verb.work = work
    assert main(["try", "d", "--json", "--loss-options.tau", "3"], {}) == code
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["verb"], found["status"], found["exit_code"], found["out"]) == ("try", status, code, None)
    lines = [line for line in shown.err.splitlines() if line != "working"]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in shown.err


def test_a_bug_of_ours_shows_where(verb, capsys):
    verb.work = lambda config: 1 / 0
    assert main(["try", "d"], {}) == 1
    shown = capsys.readouterr()
    assert "Traceback" in shown.err
    assert shown.err.splitlines()[-1] == (
        "palate: a bug of ours, ZeroDivisionError; please report it with the lines above"
    )
    assert shown.out == ""


def test_a_result_may_bring_its_exit_code(verb):
    verb.work = lambda config: {"exit_code": 3}
    assert main(["try", "d"], {}) == 3


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["tyr"], 'no verb "tyr" [E301]. Next: did you mean palate try'),
        (["doctr"], "did you mean palate doctor"),
        (["zzzzzz"], "use one of"),
        (["try", "d", "--lrr", "3"], "--lrr: no such option [E301]. Next: did you mean --lr"),
        (["try", "d", "--cofnig", "3"], "did you mean --config"),
        (["try", "d", "--frobnicate"], "see palate try --help"),
        (["try", "d", "--lr"], "requires an argument"),
        (["try", "d", "e"], "[E300]"),
        (["try"], "--data is needed [E317]"),
        (["try", "d", "--lr", "-1"], "--lr: -1 is out of range, allowed: > 0 [E307]"),
        (["try", "d", "--lr", "None"], '--lr: "None" is no value [E309]'),
        (["try", "d", "--columns", "chosen"], '--columns: "chosen" is no NAME=VALUE [E303]'),
        (["try", "d", "-c", "nowhere.yaml"], "nowhere.yaml: no such config file [E101]"),
        (["--nope"], "no such option"),
        (["try", "d", "--loss-option.tau", "1"], "--loss-options"),
    ],
)
def test_usage_errors_end_with_two_and_one_line(verb, capsys, argv, says):
    assert main(argv, {}) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not verb.seen


@pytest.mark.parametrize(
    ("text", "flags", "says"),
    [
        (
            "loss: ipo\nloss_options:\n  tua: 0.1\n",
            [],
            'c.yaml:5: key "loss_options.tua": loss "ipo" has no option "tua"',
        ),
        ("loss: ipoo\n", [], 'c.yaml:3: key "loss": there is no loss "ipoo"'),
        ("loss: ipo\n", ["--beta", "0.1"], '--beta: loss "ipo" has no option "beta"; it takes: tau, average'),
        ("beta: -1\n", [], 'c.yaml:3: key "beta": '),
        ("loss: simpo\n", ["--reference", "x"], '--reference: loss "simpo" has no reference [E308]'),
        ("lora_alpha: 4\n", [], 'c.yaml:3: key "lora_alpha": has no effect without --lora-rank [E316]'),
    ],
)
def test_what_is_wrong_with_a_loss_is_said_where_it_was_given(tmp_path, capsys, text, flags, says):
    path = tmp_path / "c.yaml"
    path.write_text("model: nowhere\ndata: nowhere.jsonl\n" + text)
    assert main(["dpo", "-c", str(path), *flags], {}) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("\n") == 1


def test_help_lists_the_verbs_that_exist_and_only_these(monkeypatch, capsys):
    monkeypatch.setitem(VERBS, "dream", Verb("Not built yet.", "palate.recipes.dream:DreamConfig"))
    assert main(["--help"], {}) == 0
    shown = capsys.readouterr().out
    assert "dream" not in shown
    for name, verb in VERBS.items():
        assert (f" {name} " in shown) == verb.exists
    assert main(["dream"], {}) == 2


def test_help_of_a_verb_shows_meaning_and_default(verb, capsys):
    assert main(["try", "--help"], {}) == 0
    shown = capsys.readouterr().out
    for part in ("--lr", "Rate", "[default: 0.1]", "FILE[:500]", "--json", "--config", "needed"):
        assert part in shown
    assert not verb.seen


@pytest.mark.parametrize("name", [name for name, verb in VERBS.items() if verb.exists])
def test_every_verb_answers_help_and_a_typo(name, capsys):
    assert main([name, "--help"], {}) == 0
    assert main([name, "--definitely-not-an-option"], {}) == 2
    assert "no such option" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"], {}) == 0
    assert capsys.readouterr().out.startswith("palate 0.")


def palate(*argv, **kwargs):
    code = "from palate.cli import entry; entry()"
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60, **kwargs)


def test_help_is_quick_and_needs_no_torch():
    code = (
        "import sys; from palate.cli import main; main(['--help'], {}); main(['runs', '--help'], {});"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'numpy', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
    spent = []
    for _ in range(3):  # processor time of the least of a few: the machine may be busy with other things
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert palate("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5


@pytest.mark.parametrize("argv", [["runs"], ["runs", "--json"], ["--help"], ["dpo", "--help"]])
def test_a_reader_who_leaves_is_no_error(argv):
    code = "from palate.cli import entry; entry()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code, *argv], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.returncode == 0
    assert done.stderr == b""


def test_an_ascii_terminal_shows_any_text():
    done = palate("runs", "show", "\u6771\u4eac", env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 3
    assert "\\u6771" in done.stderr
    assert "Traceback" not in done.stderr


def write_run(root: Path, name: str, loss: float, lr: float):
    from palate.run import Run

    with Run.create(root / name, verb="dpo", config={"lr": lr, "seed": 0}, argv=["palate"]) as run:
        run.log({"step": 1, "loss": 0.7})
        run.log({"step": 2, "loss": loss})
        run.finish({"verdict": "better"})


def test_runs_list_show_and_diff(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs", "a", 0.5, 0.1)
    write_run(tmp_path / "runs", "b", 0.25, 0.2)
    (tmp_path / "runs" / "not-a-run").mkdir()
    assert main(["runs"], {}) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["runs/a", "runs/b"]
    assert main(["runs", "show", "runs/a", "--json"], {}) == 0
    assert json.loads(capsys.readouterr().out)["config"] == {"lr": 0.1, "seed": 0}
    assert main(["runs", "diff", "runs/a", "runs/b", "--json"], {}) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == {"lr": [0.1, 0.2]}
    assert main(["runs", "show", "runs/c"], {}) == 3
    assert main(["runs", "diff", "runs/a"], {}) == 2
    assert main(["runs", "lst"], {}) == 2
    assert 'did you mean "list"' in capsys.readouterr().err


def test_the_panel_is_only_made_when_asked():
    assert "palate.panel" not in cli.__dict__
