"""Default < file < flag: a command line and its recipe become one `Config`, or one list of what is
wrong with them."""

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
    for setter, given in (
        ("file", _read_recipe(options.config) if options.config else {}),
        ("flag", flags),
    ):
        foreign |= {key: value for key, value in given.items() if key not in FIELDS}
        for name in given.keys() - foreign.keys():
            values[name], set_by[name] = given[name], setter
    errors += answer_unknown_keys(
        foreign, num_processes, [*FIELDS, "config", "print_config", "debug"]
    )
    try:
        config = Config(**values)
    except ValidationError as error:
        by_knob = itertools.groupby(error.errors(), key=lambda detail: detail["loc"][:1])
        errors += [_explain(list(details), set_by) for _, details in by_knob]
    if errors:
        raise ConfigError("\n".join(errors))
    return CommandLine(config, set_by, options.print_config)


def config_yaml(config: Config, set_by: dict[str, str]) -> str:
    """The resolved config as YAML that `--config` reads back, each line with who set it."""
    lines = []
    for name, value in knob_values(config).items():
        plain = str(
            value
        ).isprintable()  # else escaped: YAML folds some line ends that are text here
        text = yaml.safe_dump(
            [value], allow_unicode=plain, width=10**6, default_flow_style=True
        ).strip()[1:-1]
        lines.append(f"{name + ': ' + text:<60}  # {set_by.get(name, 'python')}\n")
    return "".join(lines)


def find_recipe(name: str) -> Path:
    """A path as given, else the packaged recipe of that name. Raises: ConfigError that lists those
    there are."""
    folder = Path(str(resources.files("loop"))) / "recipes"
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ConfigError(f"--config: no file and no recipe is named {name!r}; the recipes are {known}")


class CommandParser(argparse.ArgumentParser):
    """argparse whose complaint is a ConfigError, and so one line and exit code 2."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}; --help lists the flags")


def _parse_flags(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any], list[str]]:
    parser = CommandParser(
        prog="loop.train", description="LoRA for a causal LM.", allow_abbrev=False
    )
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file, or the name of a recipe")
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved config and stop"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for name, field in FIELDS.items():
        default = "required" if field.is_required() else f"default {field.default}"
        text = f"{field.description} ({default})".replace("%", "%%")
        optional: dict[str, Any] = {"nargs": "?", "const": "true"} if TYPES[name] is bool else {}
        parser.add_argument(
            f"--{name}", default=argparse.SUPPRESS, metavar="VALUE", help=text, **optional
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
            errors.append(f"{word!r}: unexpected word; every value follows a --flag")
    return known, flags, errors


def underscored(word: str) -> str:
    """`--learning-rate=1e-4` as `--learning_rate=1e-4`; values are left alone."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys and without aliases, which no config needs and a bomb is made
    of."""

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
    """The recipe's values; a path that starts with ./ or ../ is relative to the recipe's own
    folder."""
    path = find_recipe(name)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader) or {}
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not a YAML file of knobs: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: found a {type(values).__name__}, expected lines of 'knob: value'"
        )
    if LAUNCH_FILE_KEYS & values.keys():
        launch = f"accelerate launch --config_file {path} -m loop.train --config RECIPE"
        raise ConfigError(f"--config: {path} is a launch file: {launch}")
    for knob_name in ("model_name_or_path", "dataset_name"):
        if str(values.get(knob_name)).startswith(("./", "../")):
            values[knob_name] = os.path.normpath(path.resolve().parent / values[knob_name])
    return {str(key): value for key, value in values.items()}


def _explain(details: list[Any], set_by: dict[str, str]) -> str:
    """pydantic's errors of one knob as one line (a contradiction between knobs may bring
    several)."""
    messages = [
        str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input ")
        for detail in details
    ]
    if not details[0]["loc"]:
        return messages[0]
    name = str(details[0]["loc"][0])
    if details[0]["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{name}: missing; give --{name}, or a recipe with --config"
    return f"{name}: found {details[0]['input']!r}, {', or '.join(messages)} ({set_by[name]})"
