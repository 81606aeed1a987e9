"""The picture of who may import whom, read from the source: a room imports only from lines below its own."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "palate"

# Top to bottom. Rooms on one line are neighbours who never import each other.
LINES = [
    ["cli"],
    ["recipes"],
    ["train", "evaluation", "report"],
    ["sampling"],
    ["reference"],
    ["scoring", "worlds"],
    ["data", "model", "losses"],
    ["track"],
    ["store", "layout", "run"],
    ["files", "builtin"],
    ["errors", "tally", "distributed"],
]
BESIDE_CLI = {"config", "panel"}  # only cli sees them
LEVEL = {room: len(LINES) - i for i, line in enumerate(LINES) for room in line}
CONFIG_TYPES = ["cli.py", "config.py", "panel.py", "errors.py", "train/optim.py"]
HEAVY = {"torch", "transformers", "peft", "datasets", "safetensors", "scipy", "tokenizers", "numpy"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, top_only: bool = False):
    """(line, dotted name) of everything a module imports; relative names are made absolute."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["palate", *path.relative_to(PACKAGE).parts[:-1]]
    for node in _statements(tree, top_only):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))
            yield node.lineno, base
            for name in node.names:
                yield node.lineno, f"{base}.{name.name}"


def _statements(tree, top_only: bool):
    if not top_only:
        yield from ast.walk(tree)
        return
    queue = list(tree.body)
    while queue:
        node = queue.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            queue += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def room_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "palate" and len(parts) > 1 else None


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_from_lines_below(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return  # the list of public names, imported lazily
    wrong = []
    for line, dotted in imports(path):
        room = room_of(dotted)
        if room is None or room == own or room == "__version__":
            continue
        if room in BESIDE_CLI:
            fine = own == "cli"
        elif own in BESIDE_CLI:
            fine = room == "errors"
        else:
            assert room in LEVEL, f"{path}:{line} imports palate.{room}, which has no line in this test's picture"
            fine = LEVEL[own] > LEVEL[room]
        if not fine:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {dotted}")
    assert not wrong, "\n".join(wrong)


def test_the_picture_holds_every_room():
    rooms = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in modules()} - {"__init__"}
    assert rooms <= set(LEVEL) | BESIDE_CLI


def test_the_report_sees_run_folders_alone():
    for path in (PACKAGE / "report").glob("*.py"):
        for line, dotted in imports(path):
            assert room_of(dotted) in {None, "report", "run", "files", "errors"}, f"{path.name}:{line} imports {dotted}"


def test_losses_import_torch_alone():
    standard = {"collections", "dataclasses", "functools", "inspect", "math", "numbers", "typing", "types"}
    for path in (PACKAGE / "losses").glob("*.py"):
        for line, dotted in imports(path):
            ours = dotted.startswith("palate.losses")
            assert ours or dotted.split(".")[0] in standard | {"torch"}, f"{path.name}:{line} imports {dotted}"


def test_torch_distributed_is_named_in_two_files():
    named = set()
    for path in modules():
        dotted = any(name.startswith("torch.distributed") for _, name in imports(path))
        written = re.search(r"\btorch\.distributed\b|\bdist\.(all_|init_|get_rank|barrier)", path.read_text("utf-8"))
        if dotted or written:
            named.add(str(path.relative_to(PACKAGE)))
    assert named <= {"distributed.py", "train/checkpoint.py"}


def test_config_types_import_nothing_heavy():
    paths = [PACKAGE / name for name in CONFIG_TYPES] + sorted((PACKAGE / "recipes").glob("*.py"))
    for path in paths:
        for line, dotted in imports(path, top_only=True):
            assert dotted.split(".")[0] not in HEAVY, f"{path.relative_to(ROOT)}:{line} imports {dotted} at the top"


def test_data_imports_torch_only_to_batch():
    for path in (PACKAGE / "data").glob("*.py"):
        if path.name not in {"batch.py"}:
            for line, dotted in imports(path, top_only=True):
                assert dotted.split(".")[0] != "torch", f"{path.name}:{line}"


def test_the_package_never_imports_its_peer():
    assert not [(p, n) for p in modules() for _, n in imports(p) if n.split(".")[0] == "trl"]


FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen", "eval", "exec"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_code_comes_from_data(path):
    """No pickle, no shell, no eval: what a file says can never become code."""
    wrong = [f"{line}: imports {name}" for line, name in imports(path) if name.split(".")[0] in FORBIDDEN_IMPORTS]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in FORBIDDEN_CALLS:
            wrong.append(f"{node.lineno}: calls {name}")
        for keyword in node.keywords:
            on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            if keyword.arg in {"shell", "allow_pickle"} and on:
                wrong.append(f"{node.lineno}: {keyword.arg}=True")
    assert not wrong, "\n".join(wrong)


def test_ids_are_never_tested_for_truth():
    """Token id 0 is a token: `if token_id` and `token_id or` take it for an absent one."""
    name = re.compile(r"(^|_|\.)(token_id|eos_id|bos_id|pad_id|eos_token_id|bos_token_id|pad_token_id)$")
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            tested = []
            if isinstance(node, ast.If | ast.IfExp | ast.While):
                tested = [node.test]
            elif isinstance(node, ast.BoolOp):
                tested = node.values[:-1] if isinstance(node.op, ast.Or) else []
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
                tested = [node.operand]
            for part in tested:
                if isinstance(part, ast.Name | ast.Attribute):
                    assert not name.search(ast.unparse(part)), f"{path.relative_to(ROOT)}:{part.lineno}"
