"""What the documents say is so: links, anchors, names, commands, the first page, and the files for
who carries on."""

import ast
import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from loop.config.command_line import parse_command_line
from loop.config.flags import generate_flags, merge_flags, publish_flags
from tests.test_structure import LOOP, ROOT, functions, modules, reached

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.rglob("*.md")
    if path.name != "card.md"  # a template
    and not {"runs", "build", "node_modules"} & {*path.relative_to(ROOT).parts}
    and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
ANY_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS)
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([\w-]+))?\)")
_COMMANDS = r"-m loop\.(?:train|generate|merge|publish) [^\n`#|]+"
COMMAND = re.compile(rf"(?:accelerate launch[^\n`#|]* |python ){_COMMANDS}")
SECTIONS = [
    "Not for you if",
    "Four steps",
    "One update",
    "Two commands",
    "Your own data",
    "The documented run",
    "The card you have",
    "Stop and resume",
    "Use it, publish it",
    "What was proven, and what was not",
    "Files",
    "Where to go on",
]


@cache
def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def prose(document: str) -> str:
    """All of it but the fenced blocks: tables, headings and links stay."""
    return re.sub(r"^```.*?^```$", "", text_of(document), flags=re.DOTALL | re.MULTILINE)


def anchors(document: str) -> set[str]:
    """What GitHub makes of its headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def names_of(path: Path) -> set[str]:
    """Functions, classes, `Class.method` and constants of a file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (name for target in targets for name in ast.walk(target)):
                names |= {name.id} if isinstance(name, ast.Name) else set()
        if isinstance(node, ast.ClassDef):
            methods = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


def code_file(name: str) -> Path:
    """A file of code as documents name it: from the top, or from loop/."""
    return next((path for path in (ROOT / name, LOOP / name) if path.is_file()), ROOT / name)


@ANY_DOCUMENT
def test_link_leads_to_a_file_and_its_anchor_to_a_heading(document: str) -> None:
    for target, anchor in LINK.findall(prose(document)):
        path = ((ROOT / document).parent / target).resolve() if target else ROOT / document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.relative_to(ROOT).as_posix()), f"{target}#{anchor}"


@ANY_DOCUMENT
def test_name_is_in_the_file_that_the_document_says(document: str) -> None:
    for file, name in re.findall(r"`([\w/]+\.py)::([^`]+)`", prose(document)):
        assert name in names_of(code_file(file)), f"{file}::{name}"
    for file in re.findall(r"`([\w/]+/\w+\.py)`", prose(document)):
        assert code_file(file).is_file(), file
    for file in re.findall(r"launch_configs/\w+\.yaml", text_of(document)):
        assert (ROOT / file).is_file(), file


@ANY_DOCUMENT
def test_command_of_a_document_is_one(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine,) = re.findall(r"```yaml\n(# my\.yaml.*?)```", text_of("README.md"), flags=re.DOTALL)
    (tmp_path / "my.yaml").write_text(mine)
    (tmp_path / "questions.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    parse = {"generate": generate_flags, "merge": merge_flags, "publish": publish_flags}
    for command in COMMAND.findall(text_of(document)):
        words = shlex.split(command)
        module = words[words.index("-m") + 1].removeprefix("loop.")
        given = words[words.index("-m") + 2 :]
        if words[0] == "accelerate":
            file = words[words.index("--config_file") + 1]
            assert file == "FILE" or (ROOT / file).is_file(), command
        if module == "train":
            parse_command_line(["demo" if word == "RECIPE" else word for word in given])
        else:
            parse[module](given)


@ANY_DOCUMENT
def test_line_of_prose_ends_at_100_columns(document: str) -> None:
    for line in prose(document).splitlines():
        is_free = line.startswith("|") or re.search(r"\]\(\S+\)", line)
        assert len(line) <= 100 or is_free, line


def test_each_document_is_linked_by_another() -> None:
    linked = {
        os.path.normpath((Path(document).parent / target).as_posix())
        for document in DOCUMENTS
        for target, _ in LINK.findall(prose(document))
    }
    assert {*DOCUMENTS} <= linked


# The first page


def test_first_page_has_its_sections_in_this_order_and_1200_words_at_most() -> None:
    assert re.findall(r"^## (.+)$", prose("README.md"), flags=re.MULTILINE) == SECTIONS
    assert len(prose("README.md").split()) <= 1200  # table cells included


def test_paragraph_of_the_first_page_has_four_lines_at_most() -> None:
    lines = prose("README.md").splitlines()
    starts = ("|", "#", "-")
    marks = "".join("x" if line and not line.startswith(starts) else "." for line in lines)
    assert max(map(len, re.findall("x+", marks))) <= 4


def test_first_page_shows_the_update_as_it_runs() -> None:
    source = (LOOP / "train.py").read_text(encoding="utf-8")
    (step,) = [node for node in functions("train") if node.name == "optimizer_step"]
    assert f"```python\n{ast.get_source_segment(source, step)}\n```\n" in text_of("README.md")


def test_first_page_says_of_each_claim_where_it_was_run_and_by_which_test() -> None:
    table = text_of("README.md").partition("| claim | run on | test |\n|---|---|---|\n")[2]
    rows = [row.strip("| ").split(" | ") for row in table.partition("\n\n")[0].splitlines()]
    assert 12 <= len(rows) <= 15
    for _, where, *test in rows:
        assert where.startswith(("CPU", "H200", "not yet"))
        assert where.startswith("not yet") or LINK.search(test[0])


# The audit map's longest answers


def answer(number: int) -> set[tuple[str, str]]:
    (row,) = re.findall(rf"^\| {number}\. .*$", text_of("loop/README.md"), flags=re.MULTILINE)
    named = re.findall(r"`([\w/]+)\.py::([\w.]+)`", row)
    return {(file, name.split(".")[-1]) for file, name in named}


def places(pattern: str, among: list[str]) -> set[tuple[str, str]]:
    """(module, function) of each outer function whose code matches."""
    found = set()
    for module in among:
        path = LOOP / f"{module}.py"
        classes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)]
        for body in [ast.parse(path.read_text()).body, *(node.body for node in classes)]:
            for node in (node for node in body if isinstance(node, ast.FunctionDef)):
                if ast.get_docstring(node):
                    node.body = node.body[1:]
                if re.search(pattern, ast.unparse(node)):
                    found.add((module, node.name))
    return found


def test_answer_6_names_every_function_that_sets_a_dtype() -> None:
    pattern = r"autocast\(|autocast_|promote_types|\.double\(|compute_dtype|\bbase_dtype\(|\.float\(\)|torch\.b?float\d*"
    setting = places(pattern, sorted(reached("train")))
    assert len(setting) >= 14
    assert setting <= answer(6)


def test_answer_12_names_every_function_that_may_reach_the_network() -> None:
    calls = r"from_pretrained\(|cached_file\(|get_config_dict\(|load_dataset_builder\(|Accelerator\(|hf_hub_download\(|hub\.api\.[a-z_]+\(|api\.whoami\(|\.validate\(\)"
    asking = places(calls, modules())
    assert len(asking) >= 18
    assert asking <= answer(12)


# For who carries on


def test_workflow_runs_the_very_ci_run_on_each_python_with_pinned_and_newest_versions() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"] == {
        "python": ["3.11", "3.12", "3.13"],
        "versions": ["pinned", "newest"],
    }
    assert job["steps"][-1] == {"run": ".ci/run", "env": {"CI_VERSIONS": "${{ matrix.versions }}"}}
    assert job["continue-on-error"] == "${{ matrix.versions == 'newest' }}"


@pytest.mark.parametrize("versions", ["pinned", "newest", None])
def test_ci_run_leaves_out_the_pinned_versions_only_where_the_newest_are_wanted(
    versions: str | None, tmp_path: Path
) -> None:
    """With programs that write down how they were called in place of Python's and pip's."""
    log, tool, python = tmp_path / "log", tmp_path / "tool", tmp_path / "python"
    tool.write_text(f'#!/bin/sh\necho "$(basename "$0") $*" >> {log}\n')
    names = "pip ruff mypy pytest"
    python.write_text(
        f'#!/bin/sh\nmkdir -p "$3/bin"; echo "PATH=$3/bin:\\$PATH" > "$3/bin/activate"\n'
        f'for name in {names}; do cp {tool} "$3/bin/$name"; chmod +x "$3/bin/$name"; done\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    environment.pop("CI_VERSIONS", None)
    environment |= {} if versions is None else {"CI_VERSIONS": versions}
    subprocess.run([ROOT / ".ci/run"], env=environment, check=True)
    pinned = "" if versions == "newest" else " -c constraints.txt"
    install, *checks = log.read_text().splitlines()
    assert install == f"pip install --quiet -e .[test]{pinned}"
    assert checks == ["ruff check .", "ruff format --check .", "mypy ", "pytest "]


def test_citation_is_complete_and_names_nobody_who_is_not() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["authors"] == [{"name": "The contributors"}]
    assert citation["license"] == "Apache-2.0"
    assert f'"{citation["version"]}"' in (LOOP / "__init__.py").read_text()


def test_issue_template_wants_the_run_manifest() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    (wanted,) = [field for field in form["body"] if field["id"] == "run_json"]
    assert wanted["validations"]["required"]


def test_changelog_is_sorted_by_kind() -> None:
    kinds = re.findall(r"^### (.+)$", text_of("CHANGELOG.md"), flags=re.MULTILINE)
    assert kinds == ["Added", "Changed", "Fixed", "Numerics"]


def test_contributing_has_a_row_for_each_kind_of_change() -> None:
    rows = re.findall(r"^\| ([^|]+) \| .* \|$", text_of("CONTRIBUTING.md"), flags=re.MULTILINE)
    kinds = "knob schedule optimizer format architecture quantization tracker config"
    for kind in kinds.split():
        assert any(kind in row for row in rows), kind
