"""First mistakes, in one table: what a newcomer does, the exit code, and the sentence that ends
what they see.

The sentence says what was found and what to do about it, and stands in the last line; nothing is
lost by it, nothing is left half written, and nobody is shown a traceback."""

import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch

from loop.process.command import run_command
from loop.state.files import lock_folder
from tests.loopback_hub import HUB_URL, Hub, serving
from tests.process.test_launcher import launch_words, user_environment
from tests.processes import run, start

pytestmark = pytest.mark.runs
ROOT = Path(__file__).parent.parent
CANARY = "hf_canary0123456789abcdefghijklmnop"
WAYS_OUT = (
    "is of another run: to go on, give the values it was started with; for another run, another"
    " output_dir"
)
LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 14138162687\n"
)
ERROR_PAGE = "<!DOCTYPE html>\n<html><body>504 Gateway Time-out</body></html>\n"
GOES_ON = {f"run/{name}" for name in ("config.yaml", "ledger.jsonl", "metrics.jsonl", "run.json")}
"""What a run has written on before its disk was full: a resume cuts it back to the last
checkpoint."""
PEER = "error: another process ended; its own message says why"

USUAL = (
    "--model_name_or_path $bloom --dataset_name $ragged --output_dir $here/run --max_length 128 "
    "--micro_batch_tokens 256 --global_batch_size 8 --max_steps 6 --lora_target_modules all-linear"
)
"""A run that works. What a row of the table adds comes behind it, and the last of two flags
wins."""


@dataclass(frozen=True)
class Mistake:
    """One row. $here is a folder of its own, $bloom, $other_bloom, $gpt2 and $ragged are those of
    conftest.py."""

    name: str
    typed: str  # behind USUAL, as in a shell
    code: int
    says: str  # stands in the last line
    also: tuple[str, ...] = ()  # stand in the lines above
    recipe: str = ""  # goes to --config
    files: dict[str, str | bytes] = field(default_factory=dict)  # made in $here
    base: dict[str, str | None] = field(
        default_factory=dict
    )  # $here/model: $bloom with these files; None removes one
    folder: str = "new"  # output_dir: new, used (2 of 6 steps), finished, or locked by another run
    limit: int = 0  # bytes that a file may have, as if the disk were full
    usual: str = USUAL
    launch: str = "cpu.yaml"  # of launch_configs/
    launch_flags: str = ""
    launch_sets: dict[str, str] = field(
        default_factory=dict
    )  # what these two set, where there is no launcher
    environment: dict[str, str] = field(default_factory=dict)
    alone: bool = False  # not to be forked: it depends on its folder, or on what the libraries read when imported
    skip: str = ""


A_GPU = "there is a GPU" if torch.cuda.is_available() else ""
NO_LIMIT = "" if hasattr(resource, "prlimit") else "only Linux limits the files of another process"
HUB = {"HF_ENDPOINT": "$hub", "HF_HUB_OFFLINE": "0", "HF_TOKEN": CANARY}
ROWS = '{"text": "A good tool improves the hand."}\n'

MISTAKES = [
    # Flags.
    Mistake(
        "typo in a flag",
        "--lerning_rate 1e-4",
        2,
        "lerning_rate: unknown; did you mean learning_rate?",
    ),
    Mistake(
        "flag without a value",
        "--seed --lora_r 8",
        2,
        "--seed: expected one argument; --help lists the flags",
    ),
    Mistake("word without a flag", "1", 2, "'1': unexpected word; every value follows a --flag"),
    Mistake("recipe without its flag", "demo", 2, "'demo': unexpected word; write --config demo"),
    Mistake("word of another trainer", "--resume", 2, "resume: the same command goes on from"),
    Mistake("folder as a recipe", "--config $here", 2, "is a folder; name a YAML file in it"),
    Mistake(
        "weights as a model",
        "--model_name_or_path $bloom/model.safetensors",
        2,
        "expected the folder that holds config.json, tokenizer.json and *.safetensors",
    ),
    Mistake(
        "model of another format",
        "--model_name_or_path llama-7b.Q4_K_M.gguf",
        2,
        "model_name_or_path: llama-7b.Q4_K_M.gguf is a file's name; expected the folder",
    ),
    Mistake(
        "nothing left to train on",
        "--dataset_name $here/rows.jsonl --eval_fraction 0.9",
        3,
        "eval_fraction: 0.9 holds out 2 of 2 rows with text, all that there are; lower it",
        files={"rows.jsonl": '{"text": "one row"}\n{"text": "two rows"}\n'},
    ),
    Mistake(
        "misspelled file",
        "--dataset_name $here/row.jsonl",
        3,
        "row.jsonl; did you mean rows.jsonl? in a recipe, ./row.jsonl is the file beside it",
        files={"rows.jsonl": '{"text": "one row"}\n'},
    ),
    Mistake(
        "negative learning rate",
        "--learning_rate -1e-4",
        2,
        "learning_rate: found '-1e-4', should be greater than 0 (flag)",
    ),
    Mistake(
        "percent sign",
        "--eval_fraction 10%",
        2,
        "eval_fraction: found '10%', should be a valid number",
    ),
    Mistake(
        "dtype of another spelling",
        "--dtype bf16",
        2,
        "dtype: found 'bf16', should be 'float32', 'bfloat16', 'float16'",
    ),
    Mistake(
        "optimizer of another trainer",
        "--optim adamw_hf",
        2,
        "optim: found 'adamw_hf', should be 'adamw_torch', 'adamw_bnb_8bit'",
    ),
    Mistake(
        "one checkpoint",
        "--save_total_limit 1",
        2,
        "found '1', should be greater than or equal to 2 (flag)",
    ),
    Mistake(
        "nothing at all",
        "",
        2,
        "nothing says what to train: give --config demo, another recipe or YAML file, or",
        usual="",
    ),
    Mistake(
        "variable of the shell that is not set",
        "--output_dir ''",
        2,
        "output_dir: found ''",
        alone=True,
    ),
    Mistake(
        "home folder that no shell has expanded",
        "--output_dir=~/runs/a",
        2,
        "output_dir: found '~/runs/a'",
        alone=True,
    ),
    # Recipes.
    Mistake(
        "typo in a recipe",
        "",
        2,
        "max_step: unknown; did you mean max_steps?",
        recipe="max_step: 10\n",
    ),
    Mistake(
        "word for a number",
        "",
        2,
        "learning_rate: found 'high', should be a valid number, unable to parse string as a number"
        " (file)",
        recipe="learning_rate: high\n",
    ),
    Mistake(
        "yes for a number",
        "",
        2,
        "lora_r: found True, a true or false of YAML; quote it if it is text (file)",
        recipe="lora_r: yes\n",
    ),
    Mistake(
        "recipe that does not exist",
        "--config dmeo",
        2,
        "no file and no recipe is named 'dmeo'; the recipes are ",
    ),
    Mistake(
        "recipe that is not YAML", "", 2, "my.yaml: not a YAML file of knobs: ", recipe="seed: [1\n"
    ),
    Mistake(
        "recipe with equals signs",
        "",
        2,
        "found a str, expected lines of 'knob: value'",
        recipe="seed = 1\n",
    ),
    Mistake(
        "key given twice",
        "",
        2,
        "not a YAML file of knobs: given twice: seed",
        recipe="seed: 1\nseed: 2\n",
    ),
    Mistake(
        "alias", "", 2, "an alias (*name) is not allowed here", recipe="seed: &a 1\nlora_r: *a\n"
    ),
    Mistake(
        "tab in a recipe",
        "",
        2,
        "found character '\\t' that cannot start any token, line 2, column 1",
        recipe="seed: 1\n\tlora_r: 2\n",
    ),
    Mistake(
        "launch file as a recipe",
        "--config $root/launch_configs/cpu.yaml",
        2,
        "cpu.yaml is a launch file: accelerate launch --config_file",
    ),
    Mistake(
        "launch file behind the program",
        "--config_file $root/launch_configs/cpu.yaml",
        2,
        "config_file: it goes before -m: accelerate launch --config_file FILE -m loop.train"
        " --config RECIPE",
    ),
    # Keys of other trainers.
    Mistake(
        "batch sizes of other trainers",
        "",
        2,
        "= global_batch_size: ",
        also=(
            "per_device_train_batch_size, gradient_accumulation_steps: 4 x 8 x ",
            "one forward holds micro_batch_token",
        ),
        recipe="per_device_train_batch_size: 4\ngradient_accumulation_steps: 8\n",
    ),
    Mistake(
        "trust_remote_code",
        "--trust_remote_code true",
        2,
        "is never run; use a model that transformers has",
    ),
    Mistake(
        "push_to_hub",
        "--push_to_hub true",
        2,
        "training never writes to the Hub; afterwards: python -m loop.publish RUN --repo_id"
        " OWNER/NAME",
    ),
    Mistake(
        "report_to",
        "--report_to wandb",
        2,
        "report_to: RUN/metrics.jsonl and RUN/ledger.jsonl hold every number",
    ),
    Mistake("torch_dtype", "--torch_dtype bfloat16", 2, "torch_dtype: write dtype"),
    Mistake("max_seq_length", "--max_seq_length 512", 2, "max_seq_length: write max_length"),
    Mistake(
        "warmup_ratio",
        "--warmup_ratio 0.03",
        2,
        "write warmup_steps; a value below 1 is the share of the run",
    ),
    Mistake(
        "bf16 as a flag",
        "--bf16 true",
        2,
        "precision is the launch config's: accelerate launch --mixed_precision",
    ),
    Mistake(
        "deepspeed",
        "--deepspeed ds.json",
        2,
        "give a file of launch_configs/ to accelerate launch --config_file",
    ),
    Mistake(
        "fsdp",
        "",
        2,
        "fsdp: machines are the launch config's: give a file of",
        recipe="fsdp: full_shard\n",
    ),
    # Knobs that contradict each other.
    Mistake(
        "both kinds of templates",
        "--text_template {text} --prompt_template {text} --completion_template {text}",
        2,
        "text_template: given together with prompt_template; choose one",
    ),
    Mistake(
        "prompt alone",
        "--prompt_template {text}",
        2,
        "completion_template: one is given, both are needed",
    ),
    Mistake(
        "two ways to hold out",
        "--eval_fraction 0.1 --dataset_test_split test",
        2,
        "eval_fraction: given together with dataset_test_split; choose one",
    ),
    Mistake(
        "4 and 8 bits",
        "--load_in_4bit --load_in_8bit",
        2,
        "load_in_4bit, load_in_8bit: both are given; choose one",
    ),
    Mistake(
        "rows longer than a forward",
        "--max_length 300 --dataset_name $here/rows.jsonl",
        2,
        "micro_batch_tokens: 256 cannot hold the longest row, 300 tokens; raise it, or lower"
        " max_length",
        files={"rows.jsonl": json.dumps({"text": "word " * 400}) + "\n"},
    ),
    Mistake(
        "warm-up without an end",
        "--warmup_steps 100",
        2,
        "warmup_steps: 100 is longer than the run, max_steps 6",
    ),
    Mistake(
        "warm-up longer than the epochs",
        "--warmup_steps 100 --max_steps none --num_train_epochs 1",
        2,
        "warmup_steps: 100 is longer than the run of 5 steps",
    ),
    # The launch config and the machine.
    Mistake(
        "bf16 without a GPU",
        "",
        2,
        "mixed_precision: bf16 is for a GPU and torch sees none; use launch_configs/cpu.yaml",
        launch="one_gpu.yaml",
        launch_sets={"ACCELERATE_MIXED_PRECISION": "bf16"},
        skip=A_GPU,
    ),
    Mistake(
        "fp16 on the CPU",
        "",
        2,
        "mixed_precision: fp16 is for a GPU and torch sees none; use launch_configs/cpu.yaml",
        launch_flags="--mixed_precision fp16",
        launch_sets={"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "true"},
        skip=A_GPU,
    ),
    Mistake(
        "float16 base without fp16",
        "--dtype float16",
        2,
        "dtype: float16 needs mixed_precision: fp16, as in",
    ),
    Mistake(
        "paged optimizer without a GPU",
        "--optim paged_adamw_8bit",
        2,
        "paged_adamw_8bit pages GPU memory, and there is no GPU; write adamw_bnb_8bit",
        skip=A_GPU,
    ),
    # The base.
    Mistake(
        "wrong target module",
        "--lora_target_modules q_proj,v_proj",
        2,
        "q_proj, v_proj is not in this model; it has dense, dense_4h_to_h, dense_h_to_4h, lm_head,"
        " query_key_value",
    ),
    Mistake(
        "folder of a base that is not there",
        "--model_name_or_path ./my-model",
        2,
        "my-model; expected one with safetensors",
        also=("model_name_or_path: found no folder ",),
    ),
    Mistake(
        "text file as a base",
        "--model_name_or_path $here/model.txt",
        2,
        "expected the folder that holds config.json",
        files={"model.txt": "bigscience/bloom-560m\n"},
    ),
    Mistake(
        "base without weights",
        "--model_name_or_path $here/model",
        2,
        "Error no file named model.safetensors found in directory $here/model; expected a folder"
        " with",
        base={"model.safetensors": None},
    ),
    Mistake(
        "base of .bin weights",
        "--model_name_or_path $here/model",
        2,
        "pytorch_model.bin is never opened",
        base={"model.safetensors": None, "pytorch_model.bin": "PK"},
    ),
    Mistake(
        "LFS pointer as weights",
        "--model_name_or_path $here/model",
        2,
        "a Git LFS pointer or an error page? download it again: hf download NAME --local-dir DIR",
        base={"model.safetensors": LFS_POINTER},
    ),
    Mistake(
        "error page as weights",
        "--model_name_or_path $here/model",
        2,
        "a Git LFS pointer or an error page? download it again: hf download NAME --local-dir DIR",
        base={"model.safetensors": ERROR_PAGE},
    ),
    Mistake(
        "base without a tokenizer",
        "--model_name_or_path $here/model",
        2,
        "expected a folder with config.json, tokenizer.json and *.safetensors",
        base={"tokenizer.json": None, "tokenizer_config.json": None},
    ),
    Mistake(
        "adapter as a base",
        "--model_name_or_path $here/model",
        2,
        "expected a folder with config.json, tokenizer.json and *.safetensors",
        files={
            "model/adapter_config.json": '{"peft_type": "LORA"}',
            "model/adapter_model.safetensors": "",
        },
    ),
    Mistake(
        "base with code of its own",
        "--model_name_or_path $here/model",
        2,
        "code from a model repository is never run; use a model that transformers has",
        base={
            "config.json": json.dumps(
                {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
            ),
            "mine.py": "open('$here/it-was-run', 'w')\n",
        },
    ),
    # The dataset.
    Mistake(
        "no such file",
        "--dataset_name $here/rows.jsonl",
        3,
        "dataset_name: found no file $here/rows.jsonl",
    ),
    Mistake(
        "dataset beside its recipe",
        "",
        3,
        "in a recipe, ./rows.jsonl is the file beside it",
        recipe="dataset_name: rows.jsonl\n",
        files={"recipes/rows.jsonl": ROWS},
        usual=USUAL.replace("--dataset_name $ragged ", ""),
    ),
    Mistake(
        "text column of another name",
        "--dataset_text_field quote",
        3,
        "column 'quote' is missing; the columns are text; name one in dataset_text_field or"
        " text_template",
    ),
    Mistake(
        "template with a column that is not there",
        "--text_template '{quote} - {author}'",
        3,
        "column 'quote' is missing; the columns are text; name one in dataset_text_field or"
        " text_template",
    ),
    Mistake(
        "template without a column",
        "--text_template quote",
        2,
        "text_template: found 'quote', expected a column such as {quote}",
    ),
    Mistake(
        "null where text is needed",
        "--dataset_name $here/rows.jsonl",
        3,
        "row 1, column 'text': found None, expected text; correct or remove the row",
        files={"rows.jsonl": ROWS + '{"text": null}\n'},
    ),
    Mistake(
        "number where text is needed",
        "--dataset_name $here/rows.jsonl",
        3,
        "row 0, column 'text': found 7, expected text; correct or remove the row",
        files={"rows.jsonl": '{"text": 7}\n'},
    ),
    Mistake(
        "empty file",
        "--dataset_name $here/a.jsonl",
        3,
        "$here/a.jsonl: holds no rows",
        files={"a.jsonl": ""},
    ),
    Mistake(
        "rows without text",
        "--dataset_name $here/rows.jsonl",
        3,
        "no rows are left to train on: 2 of 2 have no text",
        files={"rows.jsonl": '{"text": ""}\n{"text": " "}\n'},
    ),
    Mistake(
        "nothing left after truncation",
        "--max_length 2 --truncation drop",
        3,
        "40 of 40 are longer than max_length 2; raise it, or choose truncation: truncate",
    ),
    Mistake(
        "spreadsheet",
        "--dataset_name $here/rows.xlsx",
        3,
        "found a .xlsx file, expected .json, .jsonl, .csv, .parquet, .txt; convert it",
        files={"rows.xlsx": "PK"},
    ),
    Mistake(
        "suffix in capitals",
        "--dataset_name $here/ROWS.JSONL",
        3,
        "found a .JSONL file, expected .json, .jsonl, .csv, .parquet, .txt",
        files={"ROWS.JSONL": ROWS},
    ),
    Mistake(
        "folder without data",
        "--dataset_name $here/data",
        3,
        "The directory at $here/data doesn't contain any data files",
        files={"data/README.md": "rows to come\n"},
    ),
    Mistake(
        "bytes that are not UTF-8",
        "--dataset_name $here/rows.csv",
        3,
        "rows.csv: not UTF-8 at byte 8; convert the file",
        files={"rows.csv": b"text\ncaf\xe9\n"},
    ),
    Mistake(
        "table as JSON lines",
        "--dataset_name $here/rows.jsonl",
        3,
        "dataset_name: $here/rows.jsonl: JSON parse error: Invalid value. in row 0",
        files={"rows.jsonl": "text,author\na,b\n"},
    ),
    Mistake(
        "split that is not there",
        "--dataset_train_split training",
        3,
        "Unknown split \"training\". Should be one of ['train']",
    ),
    Mistake(
        "rows longer than the model takes",
        "--model_name_or_path $gpt2 --dataset_name $here/rows.jsonl --max_length 300"
        " --micro_batch_tokens 300",
        2,
        "max_length: a row has 300 tokens, the model takes 256; lower max_length",
        files={"rows.jsonl": json.dumps({"text": "word " * 400}) + "\n"},
    ),
    # The Hub.
    Mistake(
        "base that is not downloaded, offline",
        "--model_name_or_path bigscience/bloom-560m",
        6,
        "or a Hub id that is online or downloaded before: hf download bigscience/bloom-560m",
    ),
    Mistake(
        "dataset that is not downloaded, offline",
        "--dataset_name Abirate/english_quotes",
        6,
        "hf download Abirate/english_quotes --repo-type dataset --local-dir DIR",
    ),
    Mistake(
        "gated base",
        "--model_name_or_path owner/gated_base",
        6,
        "hf download owner/gated_base, then HF_HUB_OFFLINE=1",
        also=("You are trying to access a gated repo",),
        environment=HUB,
        alone=True,
    ),
    Mistake(
        "base that is private or misspelled",
        "--model_name_or_path owner/nothing",
        6,
        "hf download owner/nothing",
        also=("is not a local folder and is not a valid model identifier",),
        environment=HUB,
        alone=True,
    ),
    Mistake(
        "gated dataset",
        "--dataset_name owner/gated_rows",
        6,
        "hf download owner/gated_rows --repo-type dataset --local-dir DIR",
        environment=HUB,
        alone=True,
    ),
    # The run's folder.
    Mistake(
        "another learning rate",
        "--learning_rate 1e-3",
        4,
        WAYS_OUT,
        ("learning_rate was 0.0002, is 0.001",),
        folder="used",
    ),
    Mistake("another seed", "--seed 1", 4, WAYS_OUT, ("seed was 42, is 1",), folder="used"),
    Mistake(
        "more steps for a finished run",
        "--max_steps 12",
        4,
        WAYS_OUT,
        ("max_steps was 6, is 12",),
        folder="finished",
    ),
    Mistake(
        "another dataset",
        "--dataset_name $here/rows.jsonl",
        4,
        WAYS_OUT,
        ("data_fingerprint was '",),
        files={"rows.jsonl": ROWS},
        folder="used",
    ),
    Mistake(
        "another base",
        "--model_name_or_path $other_bloom",
        4,
        WAYS_OUT,
        ("base_checksum was '",),
        folder="used",
    ),
    Mistake(
        "no resume in a used folder",
        "--resume_from_checkpoint none",
        4,
        "$here/run: holds a run already; give another output_dir, or remove it yourself",
        folder="used",
    ),
    Mistake(
        "checkpoint that is not there",
        "--resume_from_checkpoint step-000004",
        4,
        "resume_from_checkpoint: step-000004 is not in $here/run, which holds step-000002",
        folder="used",
    ),
    Mistake(
        "resume_from_checkpoint of another trainer",
        "--resume_from_checkpoint true",
        4,
        "write auto, none or a checkpoint",
        folder="used",
    ),
    Mistake(
        "folder that another run writes to",
        "",
        5,
        "output_dir: $here/run is written to by process ",
        folder="locked",
    ),
    Mistake(
        "file in the way",
        "--output_dir $here/notes/run",
        5,
        "output_dir: $here/notes/run: Not a directory; expected a writable folder",
        files={"notes": "to do\n"},
    ),
    Mistake(
        "folder that cannot be",
        "--output_dir /dev/null/run",
        5,
        "/dev/null/run: Not a directory; expected a writable",
    ),
    Mistake(
        "full disk under the cache of datasets",
        "--dataset_name $here/rows.jsonl",
        5,
        "File too large; free some space, or set HF_HOME to a folder on another disk",
        files={"rows.jsonl": ROWS * 2000},
        limit=20_480,
        skip=NO_LIMIT,
    ),
    Mistake(
        "full disk",
        "--save_steps 1",
        5,
        ": File too large; what was saved before is intact",
        folder="used",
        limit=90_000,
        skip=NO_LIMIT,
    ),
]


LAUNCHER = (  # the ways out of the program that differ: parse, launch, base, data, resume, lock, disk, Hub
    "typo in a flag",
    "fp16 on the CPU",
    "base without weights",
    "no such file",
    "base that is not downloaded, offline",
    "gated base",
    "another learning rate",
    "folder that another run writes to",
    "full disk",
)
"""Each costs 15 seconds of one core, most of them for imports, so all rows would take a quarter of
an hour."""
LAUNCHER_OF_TWO = (  # before the processes meet, and what only the main one meets; test_launcher.py has what each does
    "typo in a flag",
    "no such file",
    "folder that another run writes to",
    "full disk",
)


def rows(names: tuple[str, ...] = (), alone: bool | None = None) -> list[Any]:
    """The table, or some rows of it, for pytest."""
    known = {mistake.name: mistake for mistake in MISTAKES}
    return [
        pytest.param(
            mistake,
            id=mistake.name.replace(" ", "-"),
            marks=pytest.mark.skipif(bool(mistake.skip), reason=mistake.skip),
        )
        for mistake in ([known[name] for name in names] if names else MISTAKES)
        if alone in (None, mistake.alone)
    ]


# The Hub, on loopback.

COMMIT = "a" * 40
"""Of the base that `hf download` has left."""


@pytest.fixture(scope="module")
def hub(bloom: Path) -> Iterator[Hub]:
    """owner/public and gated ones, a copy of `bloom` each: who has no token may list these and not
    open their files."""
    with serving(Hub()) as server:
        server.users[CANARY] = {"name": "owner", "role": "write"}
        server.put_model("owner/public", bloom)
        for name in ("owner/gated", "owner/gated_base"):
            server.put_model(name, bloom, gated=True)
        server.put_dataset("owner/gated_rows", {"rows.jsonl": ROWS.encode()}).gated = True
        yield server


def downloaded(home: Path, base: Path) -> None:
    """What `hf download owner/gated` leaves behind."""
    repository = home / "hub" / "models--owner--gated"
    shutil.copytree(base, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


# How a row is played.


@dataclass(frozen=True)
class Outcome:
    """What is left of a played row: what stood on the terminal, how it ended, and which files are
    not as before."""

    codes: list[int | None]
    text: str
    changed: set[str]
    here: Path

    @property
    def last_line(self) -> str:
        return self.text.rstrip().splitlines()[-1]


class Stage:
    """The places that the table calls by name, and a folder of its own for each row that is
    played."""

    def __init__(self, root: Path, used: dict[str, Path], **places: object) -> None:
        self.root, self.used, self.places = root, used, {"root": ROOT, **places}

    def words(self, text: str, here: Path) -> str:
        return Template(text).safe_substitute(self.places, here=here)

    @contextmanager
    def set_for(self, mistake: Mistake, how: str) -> Iterator[tuple[Path, list[str]]]:
        """A row's folder with what the user has there, and the words that they type."""
        here = self.root / re.sub(r"\W+", "-", f"{mistake.name} {how}")
        here.mkdir()
        files = {**mistake.files, **({"recipes/my.yaml": mistake.recipe} if mistake.recipe else {})}
        if mistake.base:
            shutil.copytree(str(self.places["bloom"]), here / "model")
            for name in [name for name, content in mistake.base.items() if content is None]:
                (here / "model" / name).unlink()
            files |= {
                f"model/{name}": content
                for name, content in mistake.base.items()
                if content is not None
            }
        for name, content in files.items():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes(
                content if isinstance(content, bytes) else self.words(content, here).encode()
            )
        if mistake.folder in self.used:
            shutil.copytree(self.used[mistake.folder], here / "run")
        recipe = " --config $here/recipes/my.yaml" if mistake.recipe else ""
        typed = shlex.split(self.words(f"{mistake.usual} {mistake.typed}{recipe}", here))
        with lock_folder(here / "run") if mistake.folder == "locked" else nullcontext():
            yield here, typed


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its name; an empty lock is what a run leaves that has let go of its folder."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    return {
        name: content
        for name, content in files.items()
        if not (name.endswith("/.lock") and content == b"")
    }


def play(stage: Stage, mistake: Mistake, how: str) -> Outcome:
    """how: forked or forked on two; python, the launcher, or the launcher of two, each in a process
    of its own."""
    with stage.set_for(mistake, how) as (here, typed):
        before = contents(here)
        if how.startswith("forked"):
            launched = start(
                typed, stage.root / f"{here.name}.log", 1 + how.endswith("two"), mistake.launch_sets
            )
            for process in launched.processes if mistake.limit else ():  # they are still loading
                resource.prlimit(
                    process.pid or 0, resource.RLIMIT_FSIZE, (mistake.limit, mistake.limit)
                )
            codes, text = launched.wait(60), launched.text()
        else:
            done = subprocess.run(
                words_of(mistake, how, typed), cwd=here, env=environment_of(stage, mistake, here),
                capture_output=True, text=True, timeout=240,
            )  # fmt: skip
            codes, text = [done.returncode], done.stdout + done.stderr
        after = contents(here)
        changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        return Outcome(codes, text, changed, here)


def words_of(mistake: Mistake, how: str, typed: list[str]) -> list[str]:
    """The whole command line."""
    if how == "python":
        words = [sys.executable, "-m", "loop.train", *typed]
    else:
        words = launch_words(
            "cpu_2.yaml" if how == "the launcher of two" else mistake.launch, typed
        )
        words[words.index("-m") : words.index("-m")] = mistake.launch_flags.split()
    blocks = f'ulimit -f {mistake.limit // 512}; exec "$@"'
    return ["sh", "-c", blocks, "sh", *words] if mistake.limit else words


def environment_of(stage: Stage, mistake: Mistake, here: Path) -> dict[str, str]:
    own = {name: stage.words(value, here) for name, value in mistake.environment.items()}
    return {**user_environment(), **own}


def assert_answered(stage: Stage, mistake: Mistake, outcome: Outcome) -> None:
    """The sentence ends what the user sees, what it speaks of stands above it, and nothing was
    lost."""
    assert stage.words(mistake.says, outcome.here) in outcome.last_line, outcome.text
    assert_nothing_lost(mistake, outcome)
    for words in mistake.also:
        assert words in outcome.text
    assert "Traceback" not in outcome.text


def assert_nothing_lost(mistake: Mistake, outcome: Outcome) -> None:
    assert outcome.changed <= (GOES_ON if mistake.limit else set())
    assert CANARY not in outcome.text


@pytest.fixture(scope="module")
def stage(
    tmp_path_factory: pytest.TempPathFactory,
    bloom: Path,
    other_bloom: Path,
    gpt2: Path,
    ragged: Path,
    hub: Hub,
) -> Stage:
    root = tmp_path_factory.mktemp("first-mistakes")
    places = {
        "bloom": bloom,
        "other_bloom": other_bloom,
        "gpt2": gpt2,
        "ragged": ragged,
        "hub": HUB_URL,
    }
    usual = shlex.split(Template(USUAL).substitute(places, here=root))
    run(usual, root / "finished.log")
    shutil.move(root / "run", root / "finished")
    run([*usual, "--stop_after_steps", "2"], root / "used.log")
    shutil.move(root / "run", root / "used")
    return Stage(root, {name: root / name for name in ("finished", "used")}, **places)


@pytest.fixture(scope="module")
def launched(
    stage: Stage, request: pytest.FixtureRequest
) -> Iterator[Callable[[Mistake, str], Outcome]]:
    """Plays all rows that the chosen tests need in processes of their own, three at a time, while
    the tests go on."""
    here = [item for item in request.session.items if item.path == request.path]
    asked = [item for item in here if "launched" in getattr(item, "fixturenames", ())]
    pool, played = ThreadPoolExecutor(3), dict[tuple[str, str], Future[Outcome]]()
    for item in asked:
        mistake, how = (item.callspec.params[name] for name in ("mistake", "how"))  # type: ignore[attr-defined]
        if (mistake.name, how) not in played:
            played[mistake.name, how] = pool.submit(play, stage, mistake, how)
    yield lambda mistake, how: played[mistake.name, how].result()
    pool.shutdown(cancel_futures=True)


# The table, played.


@pytest.mark.parametrize("mistake", rows(alone=False))
def test_a_first_mistake_is_answered_in_one_last_line(stage: Stage, mistake: Mistake) -> None:
    outcome = play(stage, mistake, "forked")
    assert outcome.codes == [mistake.code], outcome.text
    assert_answered(stage, mistake, outcome)
    assert outcome.last_line.startswith("error: ") or mistake.also


@pytest.mark.parametrize("mistake", rows(alone=False))
def test_on_two_processes_both_end_and_it_is_said_once(stage: Stage, mistake: Mistake) -> None:
    outcome = play(stage, mistake, "forked on two")
    # What only the main process met, it says alone; the other one ends because it has gone.
    assert outcome.codes in ([mistake.code, mistake.code], [mistake.code, 1]), outcome.text
    assert outcome.text.count(stage.words(mistake.says, outcome.here)) == 1, outcome.text
    assert_nothing_lost(mistake, outcome)
    assert "Traceback" not in outcome.text


def test_a_peer_that_has_gone_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> (
        None
    ):  # gloo's words, where the other process ended with something still unread
        raise RuntimeError(
            "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:2216: Connection reset by"
            " peer."
        )

    assert run_command(command) == 1
    assert capsys.readouterr().err == PEER + "\n"


@pytest.mark.parametrize("how", ["python"])
@pytest.mark.parametrize("mistake", rows(alone=True))
def test_a_mistake_that_needs_a_process_of_its_own(
    stage: Stage, hub: Hub, launched: Callable[[Mistake, str], Outcome], mistake: Mistake, how: str
) -> None:
    outcome = launched(mistake, how)
    assert outcome.codes == [mistake.code], outcome.text
    asked = [
        authorization
        for _, path, authorization in hub.requests
        if mistake.typed.split()[-1] in path
    ]
    assert (len(asked) > 0) == (mistake.environment == HUB)
    assert not any(asked), "a token was sent"
    assert_answered(stage, mistake, outcome)


@pytest.mark.parametrize("how", ["the launcher"])
@pytest.mark.parametrize("mistake", rows(LAUNCHER))
def test_through_the_launcher_the_last_line_is_the_same(
    stage: Stage, launched: Callable[[Mistake, str], Outcome], mistake: Mistake, how: str
) -> None:
    outcome = launched(mistake, how)
    assert outcome.codes == [1]  # the launcher's, whatever the program's own
    assert_answered(stage, mistake, outcome)


@pytest.mark.parametrize("how", ["the launcher of two"])
@pytest.mark.parametrize("mistake", rows(LAUNCHER_OF_TWO))
def test_the_launcher_of_two_quotes_the_sentence_in_its_last_block(
    stage: Stage, launched: Callable[[Mistake, str], Outcome], mistake: Mistake, how: str
) -> None:
    outcome = launched(mistake, how)
    assert outcome.codes == [1]
    root_cause = " ".join(outcome.text.split("Root Cause")[-1].split())
    assert stage.words(mistake.says, outcome.here) in root_cause, outcome.text
    assert_nothing_lost(mistake, outcome)


@pytest.mark.parametrize("how", ["the launcher of two"])
@pytest.mark.parametrize("mistake", rows(LAUNCHER_OF_TWO))
def test_the_launcher_of_two_quotes_no_traceback_of_ours(
    launched: Callable[[Mistake, str], Outcome], mistake: Mistake, how: str
) -> None:
    assert not re.search(r'File ".*/loop/\w+\.py"', launched(mistake, how).text)  # its own it shows


def test_there_are_forty_of_them_and_no_two_alike() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES) >= 40


# What the sentence about a gated base says to do.


@pytest.mark.parametrize(("name", "offline"), [("public", "0"), ("gated", "1")])
def test_after_hf_download_the_run_goes_on_and_no_token_leaves_the_machine(
    stage: Stage, hub: Hub, bloom: Path, name: str, offline: str
) -> None:
    home, before = stage.root / f"home-{name}-{offline}", len(hub.requests)
    of_this = re.compile(rf"/owner/{name}\b")
    if name == "gated":
        downloaded(home, bloom)
    environment = {**HUB, "HF_HUB_OFFLINE": offline, "HF_HOME": str(home)}
    typed = f"--model_name_or_path owner/{name} --max_steps 1"
    outcome = play(
        stage, Mistake(f"{name} {offline}", typed, 0, "", environment=environment), "python"
    )
    assert outcome.codes == [0], outcome.text
    asked = [
        (path, authorization)
        for _, path, authorization in hub.requests[before:]
        if of_this.search(path)
    ]
    assert (asked == []) == (offline == "1")
    assert [path for path, authorization in asked if authorization] == []
    assert CANARY not in outcome.text


# What accelerate and Python answer, before a line of this program has run.


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (
            "--config_file $root/loop/recipes/demo.yaml -m loop.train --config demo",
            "`distributed_type` must be specified in the config file",
        ),
        (
            "--config_file launch_configs/gpu.yaml -m loop.train --config demo",
            (
                "The passed configuration file `launch_configs/gpu.yaml` does not exist. Please"
                " pass an existing file"
            ),
        ),
        (
            (
                "--config_file $root/launch_configs/cpu.yaml --learning_rate 1e-4 -m loop.train"
                " --config demo"
            ),
            "error: unrecognized arguments: --learning_rate",
        ),
        (
            "--config_file $root/launch_configs/cpu.yaml loop.train --config demo",
            "can't open file '$here/loop.train'",
        ),
        (
            "--config_file $root/launch_configs/cpu.yaml -m loop.trian --config demo",
            "No module named loop.trian",
        ),
    ],
    ids=[
        "recipe as a launch file",
        "no such launch file",
        "knob before the program",
        "no -m",
        "typo in the program",
    ],
)
def test_a_mistake_before_the_program_is_answered_by_who_met_it(
    tmp_path: Path, typed: str, says: str
) -> None:
    words = shlex.split(Template(typed).substitute(root=ROOT))
    launcher = launch_words("cpu.yaml", [])[:3]
    done = subprocess.run(
        [*launcher, *words],
        cwd=tmp_path,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert Template(says).safe_substitute(here=tmp_path) in done.stderr.rstrip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_without_a_launch_file_it_runs_as_one_process_and_says_so(stage: Stage) -> None:
    with stage.set_for(Mistake("no launch file", "--max_steps 1", 0, ""), "") as (here, typed):
        words = [*launch_words("cpu.yaml", [])[:3], "-m", "loop.train", *typed]
        done = subprocess.run(
            words, cwd=here, env=user_environment(), capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert re.search(r"; cpu, 1 x \d+ threads, precision no$", done.stdout, re.MULTILINE)
    assert (
        "To avoid this warning pass in values for each of the problematic parameters" in done.stderr
    )  # accelerate's
