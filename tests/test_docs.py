"""What the documents show is true: code blocks run, commands run, tables are current, files named exist."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import palate
from palate.cli import VERBS, main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page that name this language ("" for none)."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if name == language]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the examples in it, as a reader of the README has."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_from_its_command_to_its_library_lines(clone, capsys):
    commands = [line for block in blocks("README.md", "") for line in block.splitlines() if "palate dpo" in line]
    argv = shlex.split(commands[0])[1:]
    for option, fewer in (("--data", "builtin:reviews[:100]"), ("--eval", "builtin:reviews/heldout[:20]")):
        argv[argv.index(option) + 1] = fewer
    quick = ["--steps", "3", "--save-every", "3", "--eval-every", "3", "--retain-samples", "2"]
    assert main([*argv, "--json", *quick], {}) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["verb"], result["status"], result["out"]) == ("dpo", "done", "runs/first")
    assert result["reference_scored"] > 0
    (library,) = blocks("README.md", "python")
    assert len(library.strip().splitlines()) <= 10
    exec(compile(library, "README.md", "exec"), {})  # noqa: S102, our own page
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in printed] == ["1", "2", "3", "4"]
    assert float(printed[0][1]) == pytest.approx(0.693147, abs=1e-5)
    assert float(printed[0][2]) == 0.0


def test_every_command_of_the_readme_is_understood(clone, capsys):
    for block in blocks("README.md", ""):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["palate"]:
                assert words[1] in VERBS
                capsys.readouterr()
                code = main([*words[1:], "--definitely-not-an-option"], {})
                said = capsys.readouterr().err
                assert (code, "--definitely-not-an-option: no such option" in said) == (2, True), said


@pytest.mark.parametrize("number", range(len(blocks("CONTRIBUTING.md", "python"))))
def test_the_blocks_of_contributing_run(number, clone):
    """In a process of their own: they register a loss."""
    code = blocks("CONTRIBUTING.md", "python")[number]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["losses.md", "options.md"])
def test_the_tables_are_current(page):
    import tables

    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == tables.PAGES[page](), "run `make docs`"


def test_the_comparison_of_the_readme_lies_where_the_report_looks():
    lines = [line.partition("#")[0].split() for block in blocks("README.md", "") for line in block.splitlines()]
    (run,) = [line[2] for line in lines if line[:2] == ["palate", "report"]]
    (compared,) = [line for line in lines if line[:3] == ["palate", "compare", run]]
    assert compared[compared.index("--out") + 1] == f"{run}/compare"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_paths_named_in_the_pages_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:palate|tests|examples|docs|benchmarks|\.ci)/[\w./-]*)`", text)
    named += re.findall(r"\]\(([\w./-]+\.md)\)", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    assert named
    assert not missing


def test_the_tree_is_the_package():
    tree = next(block for block in blocks("README.md", "") if "START HERE" in block)
    shown, folders = set(), []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
        else:
            shown.add("/".join([*folders, name]))
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "palate").rglob("*.py")}
    there -= {name for name in there if name.endswith("__init__.py") and name != "palate/__init__.py"}
    assert shown == there


def test_public_names_are_found_and_documented():
    for name in palate.__all__:
        found = getattr(palate, name)
        assert isinstance(found, str | dict) or (found.__doc__ or "").strip(), name
    assert set(palate.__all__) <= set(dir(palate))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        palate.nonsense  # noqa: B018


def test_importing_palate_imports_no_torch():
    code = "import sys, palate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_example_pairs_are_what_the_grammar_writes():
    namespace: dict = {"__name__": "examples"}
    path = ROOT / "examples" / "make_pairs.py"
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)  # noqa: S102
    for name, advice, seed in (("pairs", "ADVICE", 0), ("heldout", "HELD_OUT", 1)):
        written = (ROOT / "examples" / f"{name}.jsonl").read_text(encoding="utf-8")
        assert written == namespace["text"](namespace[advice], seed)


def test_one_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", palate.__version__)
    assert "version" in re.search(r"dynamic = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
