"""What a reader may rely on before reading: floors, sizes, who owns which package, and that the audit map is true."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOOP = ROOT / "loop"
FLOORS = [
    {"errors", "batch", "foreign_keys", "memory", "quantise", "scan"},
    {"config", "files", "signals", "loss_scale", "adapter", "hub", "manifest", "attention"},
    {"data", "order", "collate", "bloom", "model", "optim", "ledger", "sample", "launch"},
    {"checkpoint", "steps", "body"},
    {"resume", "record", "loss"},
    {"heldout", "run", "source"},
    {"result", "rehearsal", "evidence"},
    {"train", "generate", "merge", "migration", "card"},
    {"plan"},
    {"publish"},
]
OWNERS = {  # outside package -> the only files that may import it
    "peft": {"model", "run", "sample", "source", "adapter", "publish", "migration"},  # run, sample: the name of a type
    "bitsandbytes": {"quantise", "optim"},
    "datasets": {"data"},
    "pydantic": {"config", "manifest"},
    "typing_extensions": {"manifest"},
    "yaml": {"config", "foreign_keys", "card"},
    "huggingface_hub": {"hub", "card", "plan", "publish"},
    "httpx2": {"hub"},
    "tqdm": {"record"},
}
LIMITS = {"optimizer_step": 45, "train.py": 300, "any function": 60, "reached from train.py": 2300}
"""220 lines of the last are what makes it fast (attention, bloom, body, the fused loss); a knob switches each off."""


def tree(module: str) -> ast.Module:
    return ast.parse((LOOP / f"{module}.py").read_text(encoding="utf-8"))


def modules() -> list[str]:
    return sorted(path.stem for path in LOOP.glob("*.py") if path.stem != "__init__")


def imported(module: str) -> set[str]:
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    return {name.removeprefix("loop.") for name in imported(module) if name.startswith("loop.")}


def reached(module: str) -> set[str]:
    found, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += own_imports(name)
    return found


def functions(module: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef)]


def test_every_module_stands_on_a_floor() -> None:
    assert sorted(set().union(*FLOORS)) == modules()


@pytest.mark.parametrize("module", modules())
def test_module_imports_only_lower_floors(module: str) -> None:
    floor = next(number for number, names in enumerate(FLOORS) if module in names)
    allowed = set().union(*FLOORS[:floor])
    assert own_imports(module) <= allowed


@pytest.mark.parametrize("package", OWNERS)
def test_outside_package_is_imported_only_by_its_owner(package: str) -> None:
    users = {module for module in modules() if any(name.split(".")[0] == package for name in imported(module))}
    assert users <= OWNERS[package]


def test_training_imports_no_command_that_talks_to_the_hub() -> None:
    publishing = {"scan", "adapter", "manifest", "hub", "source", "evidence", "card", "plan", "publish"}
    assert reached("publish") >= publishing
    assert not reached("train") & {*publishing, "merge", "generate"}
    assert "token=False" in (LOOP / "model.py").read_text(encoding="utf-8")


def test_update_fits_on_one_screen() -> None:
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions("train")}
    assert lengths["optimizer_step"] <= LIMITS["optimizer_step"]


def test_no_function_is_longer_than_sixty_lines() -> None:
    long = {
        f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module in modules()
        for node in functions(module)
        if (node.end_lineno or 0) - node.lineno + 1 > LIMITS["any function"]
    }
    assert long == {}


def lines_of_code(module: str) -> int:
    """Lines that hold a statement or a part of one: blank lines, comments and docstrings aside."""
    source = (LOOP / f"{module}.py").read_text(encoding="utf-8")
    words = {
        node.lineno + number
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for number in range((node.end_lineno or 0) - node.lineno + 1)
    }
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in empty]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - words)


def test_lines_of_code_are_counted_without_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_structure.LOOP", tmp_path)
    (tmp_path / "five.py").write_text(
        '"""Words."""\n\nimport os\n\n# why\nX = (\n    1,  # one\n)\n"""About X."""\nprint(os, X)\n'
    )
    assert lines_of_code("five") == 5


def test_what_train_imports_can_be_read_in_an_evening() -> None:
    assert len((LOOP / "train.py").read_text(encoding="utf-8").splitlines()) <= LIMITS["train.py"]
    assert sum(lines_of_code(module) for module in reached("train")) <= LIMITS["reached from train.py"]


def test_nothing_is_unpickled() -> None:
    for path in LOOP.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "pickle" not in source
        assert "torch.load" not in source


def audit_map() -> list[tuple[str, str]]:
    """(file, function) of every `file.py::name` in the READMEs."""
    found = []
    for readme in (ROOT / "README.md", LOOP / "README.md"):
        found += re.findall(r"`((?:tests/|loop/)?[\w/]+\.py)::([\w.]+)`", readme.read_text(encoding="utf-8"))
    return found


def test_audit_map_answers_twelve_questions() -> None:
    text = (LOOP / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+)\. .*\|$", text, flags=re.MULTILINE)
    assert rows == [str(number) for number in range(1, 13)]
    for line in (line for line in text.splitlines() if re.match(r"\| \d+\. ", line)):
        assert re.search(r"`tests/\w+\.py::test_\w+`", line), line


@pytest.mark.parametrize(("file", "name"), audit_map())
def test_entry_of_the_audit_map_exists(file: str, name: str) -> None:
    path = ROOT / file if file.startswith(("tests/", "loop/")) else LOOP / file
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    assert name.split(".")[-1] in names
