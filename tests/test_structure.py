"""What a reader may rely on before reading: order of the folders, sizes, owners of packages, a true
audit map."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOOP = ROOT / "loop"
ORDER = [
    "errors",
    "config",
    "state",
    "data",
    "model",
    "update",
    "process",
    "run",
    "train",
    "finished",
    "publish",
    "generate",
    "merge",
    "guide_table",
    "__main__",
]
"""Folders and files of loop/, lowest first: each imports only what stands before it."""
COMMANDS = {"finished", "publish", "generate", "merge", "guide_table", "__main__"}
"""What training never reaches."""
OWNERS = {  # outside package -> the only files that may import it
    "peft": (
        {
            "model/lora",
            "run/prepare",
            "run/sample",
            "finished/named_model",
            "finished/adapter_check",
        }
        | {"publish/send", "guide_table", "model/checksum"}
    ),  # prepare, sample, checksum: the name of a type
    "bitsandbytes": {"model/quantize", "update/optim"},
    "datasets": {"data/rows", "data/encode", "data/examples"},
    "pydantic": {"config/knobs", "config/command_line", "state/run_json"},
    "typing_extensions": {"state/run_json"},
    "yaml": {"config/command_line", "config/other_trainers", "publish/card"},
    "huggingface_hub": {
        "process/anonymous",
        "publish/hub",
        "publish/card",
        "publish/plan",
        "publish/__main__",
    },
    "httpx2": {"publish/hub"},
    "tqdm": {"run/progress"},
}
LIMITS = {"optimizer_step": 45, "train.py": 300, "any function": 60, "reached from train.py": 3500}


def modules() -> list[str]:
    """Every file of code, such as `train` and `data/order`; recipes and the demo hold none that
    training imports."""
    paths = [
        path
        for path in LOOP.rglob("*.py")
        if path.name != "__init__.py" and "demo" not in path.parts
    ]
    return sorted(path.relative_to(LOOP).with_suffix("").as_posix() for path in paths)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((LOOP / f"{module}.py").read_text(encoding="utf-8"))


def imported(module: str) -> set[str]:
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    return {
        name.removeprefix("loop.").replace(".", "/")
        for name in imported(module)
        if name.startswith("loop")
    }


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


def folder(module: str) -> str:
    return module.partition("/")[0]


def test_every_folder_and_file_stands_in_the_order() -> None:
    assert sorted(ORDER) == sorted({folder(module) for module in modules()})


@pytest.mark.parametrize("module", modules())
def test_module_imports_only_what_stands_above_it_in_the_order(module: str) -> None:
    allowed = ORDER[: ORDER.index(folder(module))] + [folder(module)] * ("/" in module)
    light = {
        "process/command"
    }  # without torch: a command starts there, before anything else is imported
    starts = (
        light if module.rpartition("/")[2] in ("train", "generate", "merge", "__main__") else set()
    )
    assert {folder(name) for name in own_imports(module) - starts} <= {*allowed}
    assert own_imports(module) <= {*modules()}, (
        "an import names the module that defines what is imported"
    )


@pytest.mark.parametrize("module", modules())
def test_no_module_reaches_itself(module: str) -> None:
    assert not any(module in reached(name) for name in own_imports(module))


@pytest.mark.parametrize("package", OWNERS)
def test_outside_package_is_imported_only_by_its_owner(package: str) -> None:
    users = {
        module
        for module in modules()
        if any(name.split(".")[0] == package for name in imported(module))
    }
    assert users == OWNERS[package]


def test_training_reaches_no_command_and_nothing_of_a_finished_run() -> None:
    assert {folder(module) for module in reached("publish/__main__")} >= {"publish", "finished"}
    assert not {folder(module) for module in reached("train")} & COMMANDS


@pytest.mark.parametrize("command", ["generate", "merge", "publish/__main__"])
def test_a_command_on_a_finished_run_loads_no_data_library(command: str) -> None:
    module = f"loop.{command.replace('/', '.')}"
    code = f"import sys, {module}; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_folder_says_in_one_sentence_what_it_knows() -> None:
    for path in LOOP.rglob("__init__.py"):
        if path.parent != LOOP:
            assert len(ast.parse(path.read_text(encoding="utf-8")).body) == 1, path
            assert re.fullmatch(r'"""[^\n]+\."""\n', path.read_text(encoding="utf-8")), path


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


def lines_of_code(source: str) -> int:
    """Lines that hold a statement or a part of one: blank lines, comments and docstrings aside."""
    words = {
        node.lineno + number
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for number in range((node.end_lineno or 0) - node.lineno + 1)
    }
    empty = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in empty
    ]
    return len(
        {line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - words
    )


def test_lines_of_code_are_counted_without_words() -> None:
    source = (
        '"""Words."""\n\nimport os\n\n# why\nX = (\n    1,  # one\n)\n"""About X."""\nprint(os,'
        " X)\n"
    )
    assert lines_of_code(source) == 5


def test_what_train_imports_can_be_read_in_an_evening() -> None:
    assert len((LOOP / "train.py").read_text(encoding="utf-8").splitlines()) <= LIMITS["train.py"]
    sources = [(LOOP / f"{module}.py").read_text(encoding="utf-8") for module in reached("train")]
    assert sum(map(lines_of_code, sources)) <= LIMITS["reached from train.py"]


def test_nothing_is_unpickled() -> None:
    for path in LOOP.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "pickle" not in source
        assert "torch.load" not in source


def test_audit_map_answers_twelve_questions() -> None:
    text = (LOOP / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+)\. .*\|$", text, flags=re.MULTILINE)
    assert rows == [str(number) for number in range(1, 13)]
    for line in (line for line in text.splitlines() if re.match(r"\| \d+\. ", line)):
        assert re.search(r"`tests/[\w/]+\.py::test_\w+`", line), line


def test_reading_order_names_every_file_once_and_lower_folders_first() -> None:
    text = (LOOP / "README.md").read_text(encoding="utf-8").partition("## Words")[0]
    rows = re.findall(r"^\|[^|]*\| `([\w/]+)\.py`", text, flags=re.MULTILINE)
    assert sorted(rows) == modules()
    assert [folder(row) for row in rows] == sorted((folder(row) for row in rows), key=ORDER.index)
    for place, row in enumerate(rows):
        assert {name for name in own_imports(row) if folder(name) == folder(row)} <= {
            *rows[:place]
        }, row
