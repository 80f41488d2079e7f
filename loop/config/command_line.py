"""Default < file < flag: a command line and its recipe become one `Config` or a list of errors."""

import argparse
import dataclasses
import itertools
import os
import re
import typing
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from loop.config.knobs import FIELDS, TYPES, Config, knob_values
from loop.config.other_trainers import LAUNCH_FILE_KEYS, answer_unknown_keys
from loop.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What a command line asks for, and who set each value: default, file or flag."""

    config: Config
    set_by: dict[str, str]
    print_config: bool


def parse_command_line(argv: list[str], num_processes: int = 1) -> CommandLine:
    """Resolve default < file < flag.

    Raises: ConfigError that lists everything wrong at once; SystemExit(0) after `--help`."""
    options, flags, errors = _parse_flags(argv)
    values: dict[str, Any] = {}
    set_by = dict.fromkeys(FIELDS, "default")
    foreign: dict[str, Any] = {}
    recipe = _read_recipe(options.config) if options.config else {}
    for setter, given in (("file", recipe), ("flag", flags)):
        foreign |= {key: value for key, value in given.items() if key not in FIELDS}
        for name in given.keys() - foreign.keys():
            values[name], set_by[name] = given[name], setter
    names = [*FIELDS, "config", "print_config", "debug"]
    errors += answer_unknown_keys(foreign, num_processes, names)
    if values:
        try:
            config = Config(**values)
        except ValidationError as error:
            by_knob = itertools.groupby(error.errors(), key=lambda detail: detail["loc"][:1])
            errors += [_explain(list(details), set_by) for _, details in by_knob]
    elif not any("write --config" in error for error in errors):
        required = ", ".join(f"--{name}" for name, field in FIELDS.items() if field.is_required())
        hint = f"give --config demo, another recipe or YAML file, or {required}"
        errors.append(f"nothing says what to train: {hint}")
    if errors:
        raise ConfigError("\n".join(errors))
    return CommandLine(config, set_by, options.print_config)


def config_yaml(config: Config, set_by: dict[str, str]) -> str:
    """The resolved config as YAML that `--config` reads back, each line with who set it."""
    lines = []
    for name, value in knob_values(config).items():
        plain = str(value).isprintable()  # else escaped: YAML folds line ends that are text here
        listed = yaml.safe_dump([value], allow_unicode=plain, width=10**6, default_flow_style=True)
        text = listed.strip()[1:-1]
        lines.append(f"{name + ': ' + text:<60}  # {set_by.get(name, 'python')}\n")
    return "".join(lines)


def find_recipe(name: str) -> Path:
    """A path as given, else the packaged recipe of that name.

    Raises: ConfigError that lists those there are."""
    path, recipes = Path(name), _recipes()
    if path.is_file():
        return path
    if name in recipes:
        return recipes[name]
    if path.is_dir():
        raise ConfigError(f"--config: {name} is a folder; name a YAML file in it")
    known = ", ".join(recipes)
    raise ConfigError(f"--config: no file and no recipe is named {name!r}; the recipes are {known}")


def _recipes() -> dict[str, Path]:
    """Those that come with the package, by name."""
    folder = Path(str(resources.files("loop"))) / "recipes"
    paths = sorted(folder.glob("*.yaml"), key=lambda path: path.stem)
    return {path.stem: path for path in paths}


class CommandParser(argparse.ArgumentParser):
    """argparse whose complaint is a ConfigError, and so one line and exit code 2."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}; --help lists the flags")


_GROUPS = {
    "model_name_or_path": "what is trained",
    "dataset_name": "what it is trained on",
    "seed": "how it is trained",
    "output_dir": "what is written, and when",
}
"""The knob with which a group begins in `--help` -> its title."""
_EXAMPLES = """
Each knob is a key of the YAML file too; default < file < flag. Flags take - or _. Precision and
processes are the launch config's, which goes in front:

  accelerate launch --quiet --config_file launch_configs/cpu.yaml -m loop.train --config demo
  accelerate launch --quiet --config_file launch_configs/one_gpu.yaml -m loop.train \\
      --model_name_or_path bigscience/bloom-560m --dataset_name rows.jsonl --output_dir runs/rows
  python -m loop.train --config demo --learning_rate 1e-4 --print_config    # check, and stop
"""


def _parse_flags(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any], list[str]]:
    parser = CommandParser(
        prog="loop.train",
        usage="loop.train [--config RECIPE] [--KNOB VALUE ...]",
        description="Fine-tune a causal language model with LoRA; the same command goes on.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file, or the name of a recipe")
    stop = "print each knob, and who set it, and stop"
    parser.add_argument("--print_config", action="store_true", help=stop)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group = parser.add_argument_group()
    for name, field in FIELDS.items():
        if name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[name])
        text = f"{field.description}{_default(field)}".replace("%", "%%")
        optional: dict[str, Any] = {"nargs": "?", "const": "true"} if TYPES[name] is bool else {}
        metavar = _metavar(TYPES[name])
        group.add_argument(
            f"--{name}", default=argparse.SUPPRESS, metavar=metavar, help=text, **optional
        )
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own takes -1e-4 for a flag
    known, rest = parser.parse_known_args([underscored(word) for word in argv])
    flags = {name: value for name, value in vars(known).items() if name in FIELDS}
    errors, unknown = [], iter(rest)
    for word in unknown:
        name, equals, value = word[2:].partition("=")
        if word.startswith("--"):
            flags[name] = value if equals else next(unknown, "")
        else:
            is_recipe = word in _recipes() or Path(word).suffix in (".yaml", ".yml")
            hint = f"write --config {word}" if is_recipe else "every value follows a --flag"
            errors.append(f"{word!r}: unexpected word; {hint}")
    return known, flags, errors


def _default(field: Any) -> str:
    """What `--help` shows behind a knob's description; nothing where none is the default."""
    if field.is_required():
        return " (required)"
    return "" if field.default is None else f" (default {str(field.default).lower()})"


def _metavar(expected: Any) -> str:
    """What `--help` shows behind a flag: the choices, or the kind of value."""
    words = _choices(expected)
    return words[0] if len(words) == 1 else "{" + ",".join(words) + "}"


def _choices(expected: Any) -> list[str]:
    """The words of a type: those of a Literal as they are, one for any other kind of value."""
    kinds = [(bool, "true|false"), (int, "N"), (float, "X"), (str, "TEXT")]
    kinds += [(tuple[str, ...], "NAME,NAME")]
    known = [word for kind, word in kinds if kind == expected]
    known += [expected] if isinstance(expected, str) else []
    return known or [word for part in typing.get_args(expected) for word in _choices(part)]


def underscored(word: str) -> str:
    """`--learning-rate=1e-4` as `--learning_rate=1e-4`; values are left alone."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys, and without aliases: no config needs one, a bomb needs many."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not allowed here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = [
            f"{key.value} in line {key.start_mark.line + 1}"
            for key, _ in node.value
            if keys.count(key.value) > 1
        ]
        if twice:
            raise yaml.YAMLError(f"given twice: {', '.join(twice)}")
        return super().construct_mapping(node, deep)


def _read_recipe(name: str) -> dict[str, Any]:
    """The recipe's values; a path that starts with ./ or ../ is relative to its own folder."""
    path = find_recipe(name)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader) or {}
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split()).replace(' in "<unicode string>"', "")
        raise ConfigError(f"{path}: not a YAML file of knobs: {reason}") from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ConfigError(f"{path}: found a {kind}, expected lines of 'knob: value'")
    if LAUNCH_FILE_KEYS & values.keys():
        launch = f"accelerate launch --config_file {path} -m loop.train --config RECIPE"
        raise ConfigError(f"--config: {path} is a launch file: {launch}")
    for knob_name in ("model_name_or_path", "dataset_name"):
        if str(values.get(knob_name)).startswith(("./", "../")):
            values[knob_name] = os.path.normpath(path.resolve().parent / values[knob_name])
    return {str(key): value for key, value in values.items()}


def _explain(details: list[Any], set_by: dict[str, str]) -> str:
    """pydantic's errors of one knob as one line; a contradiction between knobs may bring more."""
    texts = [str(detail["msg"]) for detail in details]
    messages = [text.removeprefix("Value error, ").removeprefix("Input ") for text in texts]
    if not details[0]["loc"]:
        return messages[0]
    name = str(details[0]["loc"][0])
    if details[0]["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{name}: missing; give --{name}, or a recipe with --config"
    return f"{name}: found {details[0]['input']!r}, {', or '.join(messages)} ({set_by[name]})"
