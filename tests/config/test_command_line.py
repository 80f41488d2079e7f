"""Knobs: who sets them, what is refused, and what is said about it."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from loop.config.command_line import config_yaml, find_recipe, parse_command_line
from loop.config.knobs import FIELDS, Config
from loop.errors import ConfigError
from loop.process.command import run_command
from loop.train import main
from tests.conftest import flags

REPOSITORY = Path(__file__).parents[2]
REQUIRED: dict[str, Any] = {
    "model_name_or_path": "a-model",
    "dataset_name": "a-dataset",
    "output_dir": "a-folder",
}
REQUIRED_FLAGS = [f"--{name}={value}" for name, value in REQUIRED.items()]

Recipe = Callable[[str], list[str]]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """The flags that read a recipe of this text, with the knobs that have no default."""

    def of(text: str) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return [f"--config={path}", *REQUIRED_FLAGS]

    return of


def refusal(argv: list[str], num_processes: int = 1) -> list[str]:
    """The lines of the one ConfigError."""
    with pytest.raises(ConfigError) as caught:
        parse_command_line(argv, num_processes)
    return str(caught.value).splitlines()


# Who sets a value.


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(recipe: Recipe) -> None:
    command = parse_command_line([*recipe("seed: 1\nlora_r: 4\n"), "--seed=2"])
    assert (command.config.seed, command.config.lora_r, command.config.lora_alpha) == (2, 4, 32)
    sources = {
        name: command.set_by[name] for name in ("seed", "lora_r", "lora_alpha", "output_dir")
    }
    assert sources == {
        "seed": "flag",
        "lora_r": "file",
        "lora_alpha": "default",
        "output_dir": "flag",
    }


@pytest.mark.parametrize(
    "words",
    [
        "--learning-rate=1e-4",
        "--learning_rate=1e-4",
        "--learning-rate 1e-4",
        "--learning_rate 0.0001",
    ],
)
def test_a_flag_takes_a_hyphen_or_an_underscore_and_an_equals_sign_or_a_space(words: str) -> None:
    assert parse_command_line([*words.split(), *REQUIRED_FLAGS]).config.learning_rate == 0.0001


def test_hyphens_in_a_value_stay() -> None:
    command = parse_command_line(
        [*REQUIRED_FLAGS, "--output-dir=my-runs/a-b", "--sample_prompt", "well-known"]
    )
    assert (command.config.output_dir, command.config.sample_prompt) == (
        "my-runs/a-b",
        "well-known",
    )


def test_1e_4_is_text_in_yaml_and_becomes_the_number(recipe: Recipe) -> None:
    assert yaml.safe_load("1e-4") == "1e-4"
    assert parse_command_line(recipe("learning_rate: 1e-4\n")).config.learning_rate == 0.0001


@pytest.mark.parametrize(
    "words", [["--use_dora"], ["--use-dora=true"], ["--use_dora", "yes"], ["--use_dora=1"]]
)
def test_a_switch_may_stand_alone(words: list[str]) -> None:
    assert parse_command_line([*words, *REQUIRED_FLAGS]).config.use_dora is True


@pytest.mark.parametrize("words", [["--use_dora=false"], ["--use_dora", "no"], []])
def test_a_switch_may_be_off(words: list[str]) -> None:
    assert parse_command_line([*words, *REQUIRED_FLAGS]).config.use_dora is False


@pytest.mark.parametrize("text", ["b,a", "[a, b]", "[b, a, b]", "'a , b'"])
def test_target_modules_are_a_sorted_list_however_they_are_written(
    recipe: Recipe, text: str
) -> None:
    assert parse_command_line(
        recipe(f"lora_target_modules: {text}\n")
    ).config.lora_target_modules == ("a", "b")


@pytest.mark.parametrize("text", ["none", "None", "null", "~", ""])
def test_none_is_no_value(recipe: Recipe, text: str) -> None:
    assert parse_command_line(recipe(f"max_steps: {text}\n")).config.max_steps is None


def test_none_as_a_flag_takes_back_what_the_file_gives(recipe: Recipe) -> None:
    command = parse_command_line([*recipe("max_steps: 5\n"), "--max_steps=none"])
    assert command.config.max_steps is None
    assert command.set_by["max_steps"] == "flag"


# What is refused, and in which words.


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("learning_rate: 0", "learning_rate: found 0, should be greater than 0 (file)"),
        ("learning_rate: -1e-4", "learning_rate: found '-1e-4', should be greater than 0 (file)"),
        ("learning_rate: .nan", "learning_rate: found nan, should be a finite number (file)"),
        ("learning_rate: .inf", "learning_rate: found inf, should be a finite number (file)"),
        ("learning_rate: 1e400", "learning_rate: found '1e400', should be a finite number (file)"),
        ("learning_rate: true", "learning_rate: found True, a true or false of YAML"),
        ("learning_rate: none", "learning_rate: found 'none', should be a valid number"),
        ("learning_rate: [1]", "learning_rate: found [1], should be a valid number"),
        ("learning_rate:", "learning_rate: found None, should be a valid number"),
        ("weight_decay: .nan", "weight_decay: found nan"),
        ("max_grad_norm: .inf", "max_grad_norm: found inf"),
        ("warmup_steps: -1", "warmup_steps: found -1, should be greater than or equal to 0"),
        ("lora_r: 0", "lora_r: found 0, should be greater than or equal to 1"),
        ("lora_r: 1.5", "lora_r: found 1.5, should be a valid integer"),
        ("lora_r: yes", "lora_r: found True, a true or false of YAML"),
        ("lora_dropout: 1", "lora_dropout: found 1, should be less than 1"),
        ("global_batch_size: 0", "global_batch_size: found 0"),
        ("global_batch_size: -4", "global_batch_size: found -4"),
        ("micro_batch_tokens: 0", "micro_batch_tokens: found 0"),
        ("max_steps: 0", "max_steps: found 0"),
        ("max_steps: -1", "max_steps: found -1"),
        ("num_train_epochs: 0", "num_train_epochs: found 0"),
        ("seed: -1", "seed: found -1"),
        ("seed: 4294967296", "seed: found 4294967296, should be less than 4294967296"),
        ("eval_fraction: 1", "eval_fraction: found 1, should be less than 1"),
        ("adam_beta1: 1", "adam_beta1: found 1"),
        ("adam_epsilon: 0", "adam_epsilon: found 0"),
        ("max_length: 1", "max_length: found 1"),
        ("save_total_limit: 1", "save_total_limit: found 1, should be greater than or equal to 2"),
        (
            "dtype: fp16",
            "dtype: found 'fp16', should be 'float32', 'bfloat16', 'float16' or 'float64'",
        ),
        ("truncation: cut", "truncation: found 'cut', should be 'truncate', 'drop' or 'error'"),
        ("lr_scheduler_type: polynomial", "lr_scheduler_type: found 'polynomial'"),
        ("use_dora: maybe", "use_dora: found 'maybe', should be a valid boolean"),
        (
            "dataset_text_field: no",
            "dataset_text_field: found False, a true or false of YAML; quote it",
        ),
        ("dataset_text_field: 7", "dataset_text_field: found 7, should be a valid string"),
        ("lerning_rate: 1", "lerning_rate: unknown; did you mean learning_rate?"),
        (
            "warmup_ratio: 0.1",
            "warmup_ratio: write warmup_steps; a value below 1 is the share of the run",
        ),
        ("1: 2", "1: unknown"),
        ("max_steps: 5\nwarmup_steps: 6", "warmup_steps: 6 is longer than the run, max_steps 5"),
        (
            "prompt_template: '{a}'",
            "prompt_template, completion_template: one is given, both are needed",
        ),
        (
            "prompt_template: '{a}'\ncompletion_template: '{b}'\ntext_template: '{c}'",
            "text_template: given together with prompt_template; choose one",
        ),
        (
            "dataset_test_split: test\neval_fraction: 0.1",
            "eval_fraction: given together with dataset_test_split; choose one",
        ),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_in_one_line(
    recipe: Recipe, line: str, says: str
) -> None:
    (answer,) = refusal(recipe(line + "\n"))
    assert answer.startswith(says)


@pytest.mark.parametrize(
    "template",
    ["{a.b}", "{a.upper}", "{0}", "{}", "{", "}", "{a", "{a!z}", "{a:d}", "{a[0]}", "{a:{b}}"],
)
@pytest.mark.parametrize("knob", ["text_template", "prompt_template"])
def test_a_template_of_more_than_columns_is_refused(knob: str, template: str) -> None:
    given = {**REQUIRED, knob: template}
    if knob == "prompt_template":
        given["completion_template"] = "{b}"
    (answer,) = refusal([f"--{name}={value}" for name, value in given.items()])
    assert answer.startswith(f"{knob}: found {template!r}")
    assert "expected plain columns such as {quote}" in answer


@pytest.mark.parametrize(
    "template", ["{quote}", "“{quote}” – {author}\n", "{{literal}} {a}", "{two words}", "{a:>8}"]
)
def test_a_template_of_columns_is_taken(template: str) -> None:
    assert Config(**REQUIRED, text_template=template).text_template == template


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nlora_r: 2\nseed: 3\n", "given twice: seed"),
        ("seed: &anchor 1\nlora_r: *anchor\n", "an alias (*name) is not allowed here"),
        ("\tseed: 1\n", "line 1, column 1"),
        ("seed: [1\n", "line 2, column 1"),
        ("seed: 1\n lora_r: 2\n", "line 2"),
        (
            "output_dir: !!python/object/apply:builtins.print [owned]\n",
            "could not determine a constructor",
        ),
        ("output_dir: !!python/name:os.system\n", "could not determine a constructor"),
        ("seed: 1\n--- \nseed: 2\n", "expected a single document"),
        (
            "output_dir: 2024-13-45\n",
            "not a YAML file of knobs",
        ),  # a date of YAML 1.1, of no calendar
        ("seed: !!int seven\n", "not a YAML file of knobs"),
        ("use_dora: !!bool maybe\n", "not a YAML file of knobs"),
        ("[" * 3000, "not a YAML file of knobs"),
        ("seed\n", "found a str, expected lines of 'knob: value'"),
        ("- seed\n", "found a list, expected lines of 'knob: value'"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(recipe: Recipe, text: str, says: str) -> None:
    (answer,) = refusal(recipe(text))
    assert "recipe.yaml: " in answer
    assert says in answer


def test_undecodable_bytes_in_a_recipe_are_refused_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("output_dir: caf\u00e9\n".encode("latin-1"))
    (answer,) = refusal([f"--config={tmp_path / 'latin.yaml'}"])
    assert "latin.yaml" in answer
    assert "position 15" in answer


def test_everything_that_is_wrong_is_said_at_once(recipe: Recipe) -> None:
    argv = [
        *recipe("seed: -1\nmax_seq_length: 9\nlerning_rate: 1\n"),
        "--lora_r=0",
        "--packing=true",
        "stray",
    ]
    assert sorted(refusal(argv)) == [
        "'stray': unexpected word; every value follows a --flag",
        "lerning_rate: unknown; did you mean learning_rate?",
        "lora_r: found '0', should be greater than or equal to 1 (flag)",
        "max_seq_length: write max_length",
        (
            "packing: padding_free: true, the default, pads nothing and lets no row see another;"
            " set micro_batch_tokens"
        ),
        "seed: found -1, should be greater than or equal to 0 (file)",
    ]


def test_knobs_that_contradict_each_other_are_said_at_once() -> None:
    argv = [
        "--load_in_4bit",
        "--load_in_8bit",
        "--max_steps=1",
        "--warmup_steps=2",
        "--prompt_template={a}",
    ]
    assert [line.split(":")[0] for line in refusal([*argv, *REQUIRED_FLAGS])] == [
        "warmup_steps",
        "prompt_template, completion_template",
        "load_in_4bit, load_in_8bit",
    ]


def test_a_bad_template_is_said_together_with_a_value_out_of_range() -> None:
    answers = refusal(["--seed=-1", "--text_template={", *REQUIRED_FLAGS])
    assert sorted(answer.split(":")[0] for answer in answers) == ["seed", "text_template"]


def test_what_is_missing_is_said_for_each_knob_without_a_default() -> None:
    assert refusal(["--seed=1"]) == [
        f"{name}: missing; give --{name}, or a recipe with --config" for name in REQUIRED
    ]


def test_where_nothing_is_given_one_line_names_a_recipe_and_all_that_must_be() -> None:
    (answer,) = refusal([])
    assert answer == (
        "nothing says what to train: give --config demo, another recipe or YAML file, or"
        " --model_name_or_path, --dataset_name, --output_dir"
    )


@pytest.mark.parametrize("word", ["demo", "bloom-7b1-quotes", "my.yaml", "configs/run.yml"])
def test_a_recipe_without_its_flag_is_told_the_flag_and_nothing_else(word: str) -> None:
    assert refusal([word]) == [f"{word!r}: unexpected word; write --config {word}"]


def test_a_folder_in_the_place_of_a_recipe_is_named_as_one(tmp_path: Path) -> None:
    assert refusal([f"--config={tmp_path}"]) == [
        f"--config: {tmp_path} is a folder; name a YAML file in it"
    ]


def test_batch_keys_of_other_trainers_are_multiplied_with_the_launched_processes(
    recipe: Recipe,
) -> None:
    (answer,) = refusal(
        recipe("per_device_train_batch_size: 4\ngradient_accumulation_steps: 4\n"), num_processes=2
    )
    assert "4 x 4 x 2 processes = global_batch_size: 32" in answer


@pytest.mark.parametrize("value", ["-1e-4", "-0.1", "-5"])
def test_a_negative_number_after_a_space_is_a_value(value: str) -> None:
    assert refusal(["--learning_rate", value, *REQUIRED_FLAGS]) == [
        f"learning_rate: found {value!r}, should be greater than 0 (flag)"
    ]


def test_a_warm_up_longer_than_the_epochs_is_refused_before_any_step(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 40 rows in steps of 8, once: a run of 5 steps, which is known only after the data.
    argv = flags(settings(max_steps="none", num_train_epochs=1, warmup_steps=6))
    assert run_command(lambda: main(argv)) == 2
    assert "warmup_steps: 6 is longer than the run" in capsys.readouterr().err
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


# Exit codes and what is printed.


@pytest.mark.parametrize("words", ["--seed=-1", "--bf16", "--config=no-such-recipe", "stray"])
def test_a_config_error_ends_with_code_2_and_no_traceback(
    words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(lambda: main([*REQUIRED_FLAGS, words])) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert "Traceback" not in output.err
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_knob_and_ends_with_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["--seed", "1", "-h"]):
        with pytest.raises(SystemExit) as ended:
            parse_command_line(words)
        assert ended.value.code == 0
        told = capsys.readouterr().out
        assert [name for name in FIELDS if f"--{name} " not in told] == []


def test_help_says_which_knobs_have_no_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    told = capsys.readouterr().out
    assert "PydanticUndefined" not in told
    assert told.count("required") == len(REQUIRED)


def test_a_launch_file_given_as_a_recipe_is_answered_with_the_right_command() -> None:
    for path in sorted((REPOSITORY / "launch_configs").glob("*.yaml")):
        (answer,) = refusal([f"--config={path}"])
        assert (
            f"{path} is a launch file: accelerate launch --config_file {path} -m loop.train"
            in answer
        )


def test_print_config_prints_what_reads_back_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "demo", "--learning-rate=3e-3"]
    assert run_command(lambda: main([*argv, "--print_config"])) == 0
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "again.yaml").write_text(printed, encoding="utf-8")
    assert parse_command_line(["--config", "again.yaml"]).config == parse_command_line(argv).config


# The resolved config as a file.


def test_the_resolved_config_names_each_knob_and_who_set_it(recipe: Recipe) -> None:
    command = parse_command_line([*recipe("seed: 1\n"), "--lora_r=4"])
    lines = config_yaml(command.config, command.set_by).splitlines()
    assert [line.split(":")[0] for line in lines] == list(FIELDS)
    told = {line.split(":")[0]: line.split() for line in lines}
    assert told["seed"] == ["seed:", "1", "#", "file"]
    assert told["lora_r"] == ["lora_r:", "4", "#", "flag"]
    assert told["learning_rate"] == ["learning_rate:", "0.0002", "#", "default"]
    assert told["max_steps"] == ["max_steps:", "null", "#", "default"]


texts = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(
    [
        "a\nb",
        " a ",
        "# a",
        "a: b",
        "yes",
        "1e-4",
        "~",
        "'",
        '"',
        "{a}",
        "\\n",
        "[",
        "\t",
        "\u2028x",
        "\x85",
        "\ufeff",
    ]
)
numbers = st.floats(min_value=0, max_value=1e6, exclude_min=True, allow_nan=False)


@hypothesis_settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture
    ],  # one file, overwritten by each example
)
@given(
    prompt=texts,
    field=texts,
    rate=numbers,
    epsilon=numbers,
    modules=st.lists(st.sampled_from("abc"), min_size=1),
)
def test_the_resolved_config_reads_back_to_an_equal_config(
    tmp_path: Path, prompt: str, field: str, rate: float, epsilon: float, modules: list[str]
) -> None:
    config = Config(
        **REQUIRED,
        sample_prompt=prompt,
        dataset_text_field=field,
        learning_rate=rate,
        adam_epsilon=epsilon,
        lora_target_modules=tuple(modules),
    )
    (tmp_path / "config.yaml").write_bytes(config_yaml(config, {}).encode())
    assert parse_command_line([f"--config={tmp_path / 'config.yaml'}"]).config == config


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(**REQUIRED).seed = 1  # type: ignore[misc]


def test_an_unknown_or_unusable_knob_is_a_value_error_in_python_too() -> None:
    for changed in ({"sede": 1}, {"seed": -1}, {"prompt_template": "{a}"}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            Config(**{**REQUIRED, **changed})


# The knobs there are.


def test_the_knobs_carry_the_names_that_users_of_trl_peft_and_transformers_type() -> None:
    names = """
    model_name_or_path model_revision dtype dataset_name dataset_config dataset_train_split dataset_test_split
    dataset_text_field max_length learning_rate num_train_epochs max_steps warmup_steps lr_scheduler_type weight_decay
    adam_beta1 adam_beta2 adam_epsilon max_grad_norm lora_r lora_alpha lora_dropout lora_target_modules use_rslora
    use_dora gradient_checkpointing seed full_determinism output_dir save_steps save_total_limit eval_steps
    logging_steps resume_from_checkpoint
    """
    assert set(names.split()) <= FIELDS.keys()


def test_every_knob_has_a_help_text_and_one_meaning_for_a_resume() -> None:
    config = Config(**REQUIRED)
    roles = {role: config.knobs(role) for role in ("identity", "resolved", "announced", "free")}
    assert sorted(name for knobs in roles.values() for name in knobs) == sorted(FIELDS)
    assert config.knobs("identity", "resolved", "announced", "free") == dataclasses.asdict(config)
    assert all(len(field.description) > 10 for field in FIELDS.values())


def test_what_may_change_in_a_resume_is_this_and_no_more() -> None:
    config = Config(**REQUIRED)
    assert sorted(config.knobs("announced")) == [
        "full_determinism",
        "fused_loss",
        "gradient_checkpointing",
        "micro_batch_tokens",
    ]
    assert sorted(config.knobs("free")) == [
        "logging_steps",
        "output_dir",
        "resume_from_checkpoint",
        "sample_prompt",
        "save_steps",
        "save_total_limit",
        "stop_after_steps",
    ]
    assert sorted(config.knobs("resolved")) == [
        "dataset_config",
        "dataset_name",
        "dataset_revision",
        "dataset_test_split",
        "dataset_train_split",
        "dtype",
        "model_name_or_path",
        "model_revision",
        "padding_free",
    ]


# Recipes.


@pytest.mark.parametrize(
    "name", ["demo", "bloom-7b1-quotes", "bloom-7b1-quotes-4bit", "bloom-7b1-quotes-t4"]
)
def test_a_recipe_is_found_by_name_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == REPOSITORY / "loop" / "recipes" / f"{name}.yaml"


def test_a_file_is_preferred_to_a_recipe_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("seed: 1\n")
    assert find_recipe("demo") == Path("demo")


def test_an_unknown_recipe_is_answered_with_those_there_are() -> None:
    (answer,) = refusal(["--config=dmeo"])
    assert "'dmeo'" in answer
    assert answer.endswith(
        "the recipes are bloom-7b1-quotes, bloom-7b1-quotes-40gb, bloom-7b1-quotes-4bit,"
        " bloom-7b1-quotes-80gb, bloom-7b1-quotes-t4, demo"
    )


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "loop" / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_can_be_run_by_the_command_in_its_header(path: Path) -> None:
    header = [
        line[1:].strip()
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("#")
    ]
    (command,) = [line for line in header if line.startswith("accelerate launch")]
    words = shlex.split(command)
    assert (REPOSITORY / words[words.index("--config_file") + 1]).is_file()
    assert words[words.index("-m") + 1] == "loop.train"
    config = parse_command_line(words[words.index("loop.train") + 1 :]).config
    assert config == parse_command_line([f"--config={path}"]).config


def test_the_demo_finds_its_model_and_its_quotes_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_command_line(["--config=demo"]).config
    assert config.model_name_or_path == str(REPOSITORY / "loop" / "demo" / "model")
    assert config.dataset_name == str(REPOSITORY / "loop" / "demo" / "quotes.jsonl")


def test_a_relative_path_in_a_recipe_is_relative_to_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    text = "model_name_or_path: ../base\ndataset_name: ./rows.jsonl\noutput_dir: ./run\n"
    (tmp_path / "recipes" / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = parse_command_line(["--config=../recipes/mine.yaml"]).config
    assert config.model_name_or_path == str(tmp_path / "base")
    assert config.dataset_name == str(tmp_path / "recipes" / "rows.jsonl")
    assert config.output_dir == "./run", "what is written goes where the command is typed"


def test_a_hub_id_in_a_recipe_stays_as_it_is(recipe: Recipe) -> None:
    argv = recipe("model_name_or_path: bigscience/bloom-7b1\n")[:1]
    argv += ["--dataset_name=org/quotes", "--output_dir=run"]
    assert parse_command_line(argv).config.model_name_or_path == "bigscience/bloom-7b1"


def test_the_documented_run_is_pinned() -> None:
    wanted: dict[str, Any] = {
        "model_name_or_path": "bigscience/bloom-7b1",
        "model_revision": "6232703e399354503377bf59dfbb8397fd569e4a",
        "dtype": "bfloat16",
        "dataset_name": "Abirate/english_quotes",
        "dataset_train_split": "train",
        "dataset_text_field": "quote",
        "lora_target_modules": ("query_key_value",),
        "learning_rate": 2e-4,
    }
    command = parse_command_line(["--config=bloom-7b1-quotes"])
    assert {name: getattr(command.config, name) for name in wanted} == wanted
    assert {command.set_by[name] for name in wanted} == {"file"}


def test_a_path_that_begins_with_a_dot_is_read_back_from_the_run_as_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    command = parse_command_line(
        ["--model_name_or_path=./m", "--dataset_name=../rows.csv", "--output_dir=run"]
    )
    (tmp_path / "run" / "config.yaml").write_text(config_yaml(command.config, command.set_by))
    config = parse_command_line(["--config=run/config.yaml"]).config
    assert config.model_name_or_path == f"{tmp_path}/m"
    assert config.dataset_name == f"{tmp_path.parent}/rows.csv"
