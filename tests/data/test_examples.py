"""Rows of a file -> examples: their text, their tokens, what is dropped, what is held out."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import loop.data.encode
from loop.config.knobs import Config
from loop.data.encode import render
from loop.data.examples import Data, Examples, load_data
from loop.data.tokenizer import tokenizer_sha256
from loop.errors import DataError, HubError
from loop.process.command import run_command
from loop.train import main
from tests.conftest import flags
from tests.processes import run

EOS = 2
REPOSITORY = Path(__file__).parents[2]

Load = Callable[..., Data]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Load:
    """load_data of a file with these rows (each a text, or a whole row), bytes, or of a path."""

    def of(
        content: Any, name: str = "rows.jsonl", tokenizer: Any = tokenizer, **knobs: Any
    ) -> Data:
        path = content if isinstance(content, Path) else tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, list):
            write_rows(path, content)
        config = Config(
            model_name_or_path="unused", output_dir="unused", dataset_name=str(path), **knobs
        )
        return load_data(config, tokenizer)

    return of


def write_rows(path: Path, rows: list[Any]) -> None:
    objects = [row if isinstance(row, dict) else {"text": row} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in objects), encoding="utf-8")


def texts(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the tokens say, without the end-of-text."""
    return [
        str(tokenizer.decode(tokens[: -1 if tokens[-1] == EOS else None]))
        for tokens, _ in read(examples)
    ]


def read(examples: Examples) -> list[tuple[list[int], int]]:
    return [
        (example.input_ids, example.target_start)
        for example in examples.read(np.arange(len(examples)))
    ]


def count(data: Data, *names: str) -> list[int]:
    return [data.counts[name] for name in names]


# The text of a row.


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{quote}", "To be"),
        ("“{quote}” – {author}\n", "“To be” – W. S.\n"),
        ("{tags}", "life, death"),
        ("{none}", ""),
        ("{quote}{quote}", "To beTo be"),
        ("{{{quote}}}", "{To be}"),
        ("constant", "constant"),
        ("{two words}", "2"),
    ],
)
def test_a_template_is_filled_with_the_columns_of_a_row(template: str, text: str) -> None:
    row = {
        "quote": "To be",
        "author": "W. S.",
        "tags": ["life", "death"],
        "none": [],
        "two words": "2",
        "year": 1601,
    }
    assert render(template, row, 0) == text


def test_braces_in_a_rows_text_are_text() -> None:
    assert render("<{text}>", {"text": "{author} {0} %s {"}, 0) == "<{author} {0} %s {>"


def test_the_text_of_every_row_is_exact_and_in_the_order_of_the_file(
    load: Load, tokenizer: Any, ragged: Path
) -> None:
    data = load(ragged)
    rows = [json.loads(line)["text"] for line in ragged.read_text(encoding="utf-8").splitlines()]
    assert data.train.rows.tolist() == list(range(40))
    assert texts(data.train, tokenizer) == rows


def test_spaces_and_line_breaks_of_a_text_stay(load: Load, tokenizer: Any) -> None:
    rows = ["  two  spaces  ", "\n\nlines\r\n", "\ttab", "a\u00a0b", " \u200b"]
    assert texts(load(rows).train, tokenizer) == rows


@pytest.mark.parametrize(
    "text",
    [
        "naïve 🙂 👩‍👩‍👧",
        "שלום, עולם",
        "مرحبا \u202eabc\u202c",
        "漢字",
        "e\u0301 is not \u00e9",
        "a\u0000b",
        "\ufffd",
        "a\u2028b",
    ],
)
def test_any_unicode_text_comes_back_as_it_was(load: Load, tokenizer: Any, text: str) -> None:
    assert texts(load([text]).train, tokenizer) == [text]


# Tokens and targets.


def test_end_of_text_is_appended_once(load: Load, tokenizer: Any) -> None:
    data = load(["A good tool", "x"])
    expected = [tokenizer("A good tool")["input_ids"] + [EOS], tokenizer("x")["input_ids"] + [EOS]]
    assert [tokens for tokens, _ in read(data.train)] == expected
    assert data.train.lengths.tolist() == [len(tokens) for tokens in expected]
    assert data.train.num_targets.tolist() == [len(tokens) - 1 for tokens in expected]


@pytest.fixture
def ending_tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer that ends every text by itself, as T5's and some of Llama's do."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    return tokenizer


def test_end_of_text_is_not_doubled_where_the_tokenizer_adds_it(
    load: Load, ending_tokenizer: Any
) -> None:
    ((tokens, _),) = read(load(["A good tool"], tokenizer=ending_tokenizer).train)
    assert tokens.count(EOS) == 1
    assert tokens == ending_tokenizer("A good tool")["input_ids"]


def test_end_of_text_does_not_stand_between_prompt_and_completion(
    load: Load, ending_tokenizer: Any
) -> None:
    rows = [{"prompt": "A good", "completion": " tool"}]
    ((tokens, start),) = read(load(rows, tokenizer=ending_tokenizer).train)
    assert tokens.index(EOS) == len(tokens) - 1
    assert tokens[:start] == ending_tokenizer("A good")["input_ids"][:-1]


def test_end_of_text_is_appended_where_it_is_also_the_pad_token(
    load: Load, tokenizer_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.pad_token = tokenizer.eos_token
    ((tokens, _),) = read(load(["A good tool"], tokenizer=tokenizer).train)
    assert tokens == tokenizer("A good tool")["input_ids"] + [EOS]


def test_a_beginning_that_the_tokenizer_adds_stays(load: Load, tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    ((tokens, _),) = read(load(["tool"], tokenizer=tokenizer).train)
    assert (tokens[0], tokens.count(1), tokens[-1]) == (1, 1, EOS)
    rows = [{"prompt": "A good", "completion": " tool"}]
    ((tokens, _),) = read(load(rows, tokenizer=tokenizer).train)
    assert (tokens[0], tokens.count(1), tokens[-1]) == (1, 1, EOS)


def test_without_an_end_of_text_token_a_text_is_its_tokens_alone(
    load: Load, tokenizer_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, eos_token=None)
    assert tokenizer.eos_token_id is None
    data = load(["A good tool", "x"], tokenizer=tokenizer)
    assert [tokens for tokens, _ in read(data.train)] == [tokenizer("A good tool")["input_ids"]]
    assert count(data, "dropped_without_target") == [1]  # a text of one token predicts nothing


def test_prompt_and_completion_columns_are_recognized(load: Load, tokenizer: Any) -> None:
    ((tokens, start),) = read(load([{"prompt": "A good", "completion": " tool"}]).train)
    prompt, completion = tokenizer("A good")["input_ids"], tokenizer(" tool")["input_ids"]
    assert tokens == [*prompt, *completion, EOS]
    assert start == len(prompt)


def test_prompt_and_completion_templates_name_other_columns(load: Load, tokenizer: Any) -> None:
    templates = {"prompt_template": "Q: {q}\nA:", "completion_template": " {a}"}
    data = load([{"q": "What?", "a": "That."}], **templates)
    ((tokens, start),) = read(data.train)
    assert tokenizer.decode(tokens[:start]) == "Q: What?\nA:"
    assert tokenizer.decode(tokens[start:]) == " That.</s>"
    assert data.train.num_targets.tolist() == [len(tokens) - start]


@pytest.mark.parametrize("knobs", [{"dataset_text_field": "prompt"}, {"text_template": "{prompt}"}])
def test_a_text_that_is_asked_for_wins_over_prompt_and_completion_columns(
    load: Load, tokenizer: Any, knobs: dict[str, str]
) -> None:
    data = load([{"prompt": "A good", "completion": " tool"}], **knobs)
    assert texts(data.train, tokenizer) == ["A good"]
    assert read(data.train)[0][1] == 0


def test_columns_named_as_ours_do_not_disturb(load: Load, tokenizer: Any) -> None:
    rows = [
        {"text": "A good tool", "input_ids": "x", "length": 7, "num_targets": "none", "fate": None}
    ]
    assert texts(load(rows).train, tokenizer) == ["A good tool"]


# Rows that are too long, or empty.


def test_a_truncated_row_keeps_its_first_tokens_and_has_no_end_of_text(
    load: Load, tokenizer: Any
) -> None:
    long = "A good tool improves the hand that holds it"
    data = load([long, "x"], max_length=4)
    assert [tokens for tokens, _ in read(data.train)] == [
        tokenizer(long)["input_ids"][:4],
        tokenizer("x")["input_ids"] + [EOS],
    ]
    assert data.train.num_targets.tolist() == [3, 1]
    assert count(data, "rows", "train_rows", "truncated", "dropped_too_long") == [2, 2, 1, 0]


def test_a_long_row_is_dropped_if_asked(load: Load, tokenizer: Any) -> None:
    data = load(
        ["A good tool improves the hand that holds it", "x"], max_length=4, truncation="drop"
    )
    assert texts(data.train, tokenizer) == ["x"]
    assert data.train.rows.tolist() == [1]
    assert count(
        data, "rows", "train_rows", "truncated", "dropped_too_long", "dropped_without_target"
    ) == [2, 1, 0, 1, 0]


def test_a_long_row_is_an_error_if_asked(load: Load, tokenizer: Any) -> None:
    long = "A good tool improves the hand that holds it"
    tokens = len(tokenizer(long)["input_ids"]) + 1
    with pytest.raises(
        DataError,
        match=f"row 1 has {tokens} tokens, max_length is 4; raise it, or choose truncation",
    ):
        load(["x", long], max_length=4, truncation="error")


@pytest.mark.parametrize("truncation", ["truncate", "drop", "error"])
def test_a_row_of_exactly_max_length_is_whole(load: Load, tokenizer: Any, truncation: str) -> None:
    length = len(tokenizer("A good tool")["input_ids"]) + 1
    data = load(["A good tool"], max_length=length, truncation=truncation)
    assert read(data.train)[0][0][-1] == EOS
    assert count(data, "truncated", "dropped_too_long") == [0, 0]


def test_rows_without_a_target_are_dropped_and_counted(load: Load, tokenizer: Any) -> None:
    data = load(["", "a", "  \n\t", "b", "\u3000"])
    assert texts(data.train, tokenizer) == ["a", "b"]
    assert data.train.rows.tolist() == [1, 3]
    assert count(data, "rows", "train_rows", "dropped_without_target") == [5, 2, 3]


def test_a_prompt_that_leaves_no_room_for_its_completion_is_dropped(load: Load) -> None:
    rows = [
        {"prompt": "A good tool improves the hand", "completion": " that"},
        {"prompt": "", "completion": "x"},
    ]
    data = load(rows, max_length=4)
    assert data.train.rows.tolist() == [1]
    assert count(data, "dropped_without_target", "truncated") == [1, 0]


def test_an_empty_completion_is_dropped_and_an_empty_prompt_is_not(load: Load) -> None:
    data = load([{"prompt": "A", "completion": " "}, {"prompt": "", "completion": "B"}])
    assert data.train.rows.tolist() == [1]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [{"quote": "x", "author": "y"}],
            "column 'text' is missing; the columns are author, quote",
        ),
        (["x", None], "row 1, column 'text': found None, expected text"),
        ([{"text": 7}], "row 0, column 'text': found 7, expected text"),
        ([{"text": True}], "row 0, column 'text': found True, expected text"),
        ([{"text": {"en": "x"}}], "row 0, column 'text': found {'en': 'x'}, expected text"),
        ([{"text": ["a", None]}], "row 0, column 'text': found ['a', None], expected text"),
        ([{"text": [1, 2]}], "row 0, column 'text': found [1, 2], expected text"),
        (["", " "], "no rows are left"),
    ],
)
def test_a_row_that_is_no_text_is_refused_by_its_number(
    load: Load, rows: list[Any], says: str
) -> None:
    with pytest.raises(DataError) as caught:
        load(rows)
    assert says in str(caught.value)
    assert "rows.jsonl" in str(caught.value)


def test_a_row_is_numbered_over_all_batches_of_the_tokenizer(load: Load) -> None:
    with pytest.raises(DataError, match="row 2345, column 'text': found None"):
        load(["x"] * 2345 + [None] + ["x"] * 10)


# Files.


ROWS = ['say "hi",\nthere', "a,b;c\td", "naïve 🙂", " leading", "007"]


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "n"], *([row, "1"] for row in ROWS)])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", lambda path: write_rows(path, ROWS)),
        (
            "rows.json",
            lambda path: path.write_text(json.dumps([{"text": row} for row in ROWS], indent=1)),
        ),
        ("rows.csv", write_csv),
        (
            "rows.parquet",
            lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": ROWS}), path),
        ),
    ],
)
def test_a_file_of_each_kind_gives_the_same_rows(
    load: Load, tokenizer: Any, tmp_path: Path, name: str, write: Callable[[Path], Any]
) -> None:
    write(tmp_path / name)
    assert texts(load(tmp_path / name).train, tokenizer) == ROWS


def test_a_line_of_a_txt_file_is_a_row(load: Load, tokenizer: Any) -> None:
    data = load("one\r\n\r\ntwo\u2028still two\n three".encode(), name="rows.txt")
    assert texts(data.train, tokenizer) == ["one", "two\u2028still two", " three"]
    assert data.train.rows.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b'{"text": "one"}\n'),
        ("rows.json", b'[{"text": "one"}]'),
        ("rows.csv", b"text,n\none,1\n"),
        ("rows.txt", b"one\n"),
    ],
)
def test_a_byte_order_mark_is_no_text(
    load: Load, tokenizer: Any, name: str, content: bytes
) -> None:
    assert texts(load(b"\xef\xbb\xbf" + content, name=name).train, tokenizer) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "offset"),
    [
        ("rows.txt", b"abc\xffdef\n", 3),
        ("rows.csv", b"text\ncaf\xe9\n", 8),
        ("rows.jsonl", b'{"text": "\xed\xa0\x80"}\n', 10),  # a lone surrogate, encoded
        ("rows.txt", b"a" * (2**20 - 1) + b"\xe2\x82zzz\n", 2**20 - 1),  # across two reads
        ("rows.txt", b"abc\xe2\x82", 3),  # a character cut off by the end of the file
    ],
)
def test_a_byte_that_is_not_utf_8_is_refused_with_its_offset(
    load: Load, name: str, content: bytes, offset: int
) -> None:
    with pytest.raises(DataError, match=rf"{name}: not UTF-8 \w+ byte {offset};"):
        load(content, name=name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b""),
        ("rows.jsonl", b"\n"),
        ("rows.json", b"[]"),
        ("rows.json", b""),
        ("rows.csv", b"text\n"),
        ("rows.csv", b""),
        ("rows.txt", b""),
        ("rows.parquet", b""),
        ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("rows.jsonl", b'{"text": "\\ud800"}\n'),
    ],
)
def test_a_file_without_rows_or_of_another_kind_is_refused_by_name(
    load: Load, name: str, content: bytes
) -> None:
    with pytest.raises(DataError, match=name):
        load(content, name=name)


def test_a_parquet_file_without_rows_is_refused(load: Load, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "rows.parquet"
    )
    with pytest.raises(DataError, match=r"rows\.parquet"):
        load(tmp_path / "rows.parquet")


def test_a_missing_file_is_refused_by_its_path(load: Load, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"found no file {tmp_path / 'none.jsonl'}"):
        load(tmp_path / "none.jsonl")


def test_a_dataset_of_the_hub_that_cannot_be_reached_is_an_error_of_the_hub(tokenizer: Any) -> None:
    config = Config(
        model_name_or_path="unused", output_dir="unused", dataset_name="nobody/nothing-at-all"
    )
    with pytest.raises(HubError, match="nobody/nothing-at-all"):
        load_data(config, tokenizer)


@pytest.mark.parametrize(
    "name", ["rows[1].jsonl", "rows*.jsonl", "rows?.jsonl", "r o%20w#s.jsonl", "rows{1,2}.jsonl"]
)
def test_a_file_is_read_by_its_name_not_by_a_pattern(
    load: Load, tokenizer: Any, tmp_path: Path, name: str
) -> None:
    write_rows(tmp_path / "rows1.jsonl", ["another file"])
    assert texts(load(["this file"], name=name).train, tokenizer) == ["this file"]


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train", ["a", "b", "c", "d"]),
        ("train[1:3]", ["b", "c"]),
        ("train[:50%]", ["a", "b"]),
        ("train[-1:]", ["d"]),
    ],
)
def test_a_split_may_be_a_slice(load: Load, tokenizer: Any, split: str, rows: list[str]) -> None:
    data = load(["a", "b", "c", "d"], dataset_train_split=split)
    assert texts(data.train, tokenizer) == rows
    assert data.train.rows.tolist() == list(range(len(rows)))


@pytest.mark.parametrize("split", ["validation", "train[", "train[9:]"])
def test_a_split_that_is_not_there_is_refused(load: Load, split: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        load(["a"], dataset_train_split=split)


# What is held out.


HUNDRED = [f"row {i}" for i in range(100)]


def test_held_out_rows_and_training_rows_are_disjoint_and_complete(
    load: Load, tokenizer: Any
) -> None:
    data = load(HUNDRED, eval_fraction=0.13)
    assert count(data, "train_rows", "heldout_rows") == [87, 13]
    assert sorted([*data.train.rows, *data.heldout.rows]) == list(range(100))
    assert texts(data.heldout, tokenizer) == [f"row {i}" for i in data.heldout.rows]
    assert texts(data.train, tokenizer) == [f"row {i}" for i in data.train.rows]


def test_held_out_rows_are_drawn_by_the_seed(load: Load) -> None:
    drawn = [
        load(HUNDRED, eval_fraction=0.1, seed=seed).heldout.rows.tolist() for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    reference = np.random.RandomState([1, 4294967295]).permutation(100)[:10]
    assert drawn[0] == sorted(reference.tolist())


def test_rows_without_a_target_are_neither_trained_on_nor_held_out(load: Load) -> None:
    data = load(["", "a", "b", "", "c", "d"], eval_fraction=0.5)
    assert sorted([*data.train.rows, *data.heldout.rows]) == [1, 2, 4, 5]
    assert count(data, "train_rows", "heldout_rows", "dropped_without_target") == [2, 2, 2]


@pytest.mark.parametrize(
    ("fraction", "held_out"), [(0.0, 0), (0.001, 1), (0.1, 1), (0.5, 5), (0.99, None)]
)
def test_a_share_above_zero_holds_out_a_row_at_least_and_never_all(
    load: Load, fraction: float, held_out: int | None
) -> None:
    if held_out is None:
        told = "eval_fraction: 0.99 holds out 10 of 10 rows with text, all that there are"
        with pytest.raises(DataError, match=told):
            load(HUNDRED[:10], eval_fraction=fraction)
    else:
        assert count(load(HUNDRED[:10], eval_fraction=fraction), "heldout_rows") == [held_out]


def test_a_test_split_is_held_out_whole(load: Load, tokenizer: Any) -> None:
    data = load(
        ["a", "b", "c", "", "d"], dataset_train_split="train[:3]", dataset_test_split="train[3:]"
    )
    assert texts(data.train, tokenizer) == ["a", "b", "c"]
    assert texts(data.heldout, tokenizer) == ["d"]
    assert data.heldout.rows.tolist() == [1]


def test_a_test_split_without_a_target_is_refused(load: Load) -> None:
    with pytest.raises(DataError, match="dataset_test_split: no row of"):
        load(["a", ""], dataset_train_split="train[:1]", dataset_test_split="train[1:]")


def test_duplicates_and_held_out_rows_seen_in_training_are_counted(load: Load) -> None:
    rows = ["a", "b", "a", "a", "c", "b", "e"]
    assert count(load(rows), "duplicate_train_rows", "heldout_rows_also_in_train") == [3, 0]
    data = load(rows, dataset_train_split="train[:4]", dataset_test_split="train[4:]")
    assert count(data, "duplicate_train_rows", "heldout_rows_also_in_train") == [2, 1]


def test_the_counts_of_tokens_are_those_of_the_examples(load: Load, ragged: Path) -> None:
    data = load(ragged, eval_fraction=0.2)
    for name, part in (("train", data.train), ("heldout", data.heldout)):
        targets = sum(len(tokens) - max(1, start) for tokens, start in read(part))
        assert count(data, f"{name}_target_tokens") == [targets]
    assert data.largest_token_id == max(
        max(tokens) for part in (data.train, data.heldout) for tokens, _ in read(part)
    )


# The fingerprint, and the cache.


def test_the_fingerprint_is_that_of_the_content_not_of_the_file(load: Load, tmp_path: Path) -> None:
    one = load(HUNDRED, name="one.jsonl").fingerprint
    pyarrow.parquet.write_table(pyarrow.table({"text": HUNDRED}), tmp_path / "two.parquet")
    assert load(tmp_path / "two.parquet").fingerprint == one
    assert len(one) == 64


@pytest.mark.parametrize(
    ("rows", "knobs"),
    [
        ([*HUNDRED[:50], "row 50.", *HUNDRED[51:]], {}),  # one character
        ([HUNDRED[1], HUNDRED[0], *HUNDRED[2:]], {}),
        (HUNDRED[:99], {}),
        ([*HUNDRED, ""], {}),
        (HUNDRED, {"max_length": 3}),
        (HUNDRED, {"seed": 43}),
        (HUNDRED, {"eval_fraction": 0.2}),
        (HUNDRED, {"text_template": "{text}."}),
        (HUNDRED, {"prompt_template": "row", "completion_template": "{text}"}),
    ],
)
def test_the_fingerprint_changes_with_what_is_trained_on(
    load: Load, rows: list[str], knobs: dict[str, Any]
) -> None:
    usual = load(HUNDRED, eval_fraction=0.1).fingerprint
    assert load(rows, name="other.jsonl", **{"eval_fraction": 0.1, **knobs}).fingerprint != usual


def test_where_the_targets_begin_changes_the_fingerprint(load: Load) -> None:
    """The same tokens, with another boundary between prompt and completion."""
    rows = (
        [{"prompt": "row", "completion": " row row"}],
        [{"prompt": "row row", "completion": " row"}],
    )
    one, other = (load(row, name=f"{i}.jsonl") for i, row in enumerate(rows))
    assert read(one.train)[0][0] == read(other.train)[0][0]
    assert one.fingerprint != other.fingerprint


def cache_files(data: Data) -> dict[str, int]:
    names = [file["filename"] for file in data.train.dataset.cache_files]
    return {name: Path(name).stat().st_mtime_ns for name in names}


def test_a_second_load_reads_the_cache(load: Load, tmp_path: Path) -> None:
    first = load(HUNDRED)
    written = cache_files(first)
    again = load(tmp_path / "rows.jsonl")
    assert cache_files(again) == written != {}
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "knobs", [{"max_length": 3}, {"truncation": "drop"}, {"text_template": "{text}!"}]
)
def test_what_decides_the_tokens_decides_the_cache(
    load: Load, tmp_path: Path, knobs: dict[str, Any]
) -> None:
    assert (
        cache_files(load(HUNDRED))
        .keys()
        .isdisjoint(cache_files(load(tmp_path / "rows.jsonl", **knobs)))
    )


@pytest.mark.parametrize("changed", [0, 1])
def test_an_edit_of_the_encoder_or_of_the_tokenizer_s_code_decides_the_cache(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: int
) -> None:
    decisive = list(loop.data.encode._DECISIVE_CODE)
    assert [path.name for path in decisive] == ["encode.py", "tokenizer.py"]
    before = cache_files(load(HUNDRED))
    edited = tmp_path / decisive[changed].name
    edited.write_text(
        decisive[changed].read_text(encoding="utf-8") + "# edited\n", encoding="utf-8"
    )
    decisive[changed] = edited
    monkeypatch.setattr(loop.data.encode, "_DECISIVE_CODE", decisive)
    assert before.keys().isdisjoint(cache_files(load(tmp_path / "rows.jsonl")))


def test_another_tokenizer_does_not_read_the_first_ones_cache(
    load: Load, ending_tokenizer: Any, tmp_path: Path
) -> None:
    load(["A good tool"])
    ending_tokenizer.add_tokens(["good"])
    ((tokens, _),) = read(load(tmp_path / "rows.jsonl", tokenizer=ending_tokenizer).train)
    assert tokens == ending_tokenizer("A good tool")["input_ids"]


def test_a_file_that_changed_is_read_again_even_if_its_times_did_not(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    load(["aaa"])
    before = path.stat()
    write_rows(path, ["aab"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and cp -p do
    assert texts(load(path).train, tokenizer) == ["aab"]


# Exit codes.


@pytest.mark.parametrize(
    ("rows", "changed"),
    [
        (["", " "], {}),
        ([{"quote": "x"}], {}),
        (["x", None], {}),
        (["a long text that is cut"], {"max_length": 4, "truncation": "error"}),
        (["x"], {"dataset_train_split": "validation"}),
        ([], {}),
    ],
)
def test_data_that_cannot_be_trained_on_ends_with_code_3(
    settings: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[Any],
    changed: dict[str, Any],
) -> None:
    write_rows(tmp_path / "bad.jsonl", rows)
    argv = flags(settings(dataset_name=tmp_path / "bad.jsonl", **changed))
    assert run_command(lambda: main(argv)) == 3
    error = capsys.readouterr().err
    assert "bad.jsonl" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_fewer_rows_than_processes_are_trained_on(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    write_rows(tmp_path / "two.jsonl", ["A good tool", "improves the hand"])
    run(
        flags(settings(dataset_name=tmp_path / "two.jsonl", max_steps=2)),
        tmp_path / "log",
        num_processes=3,
    )
    steps = [
        json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    ]
    assert [sorted(step["rows"]) for step in steps] == [[0] * 4 + [1] * 4] * 2


def test_one_row_is_enough_for_a_run(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    write_rows(tmp_path / "one.jsonl", ["A good tool"])
    given = {
        **settings(dataset_name=tmp_path / "one.jsonl", num_train_epochs=1),
        "max_steps": "none",
    }
    run(flags(given), tmp_path / "log", num_processes=2)
    (step,) = [
        json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    ]
    assert (step["rows"], step["micro_batches"]) == ([0], 2)


# A large dataset.

MEASURE = """
import re, sys, threading, time
from transformers import AutoTokenizer
from loop.config.knobs import Config
from loop.data.examples import load_data
from loop.data.steps import Steps

def anonymous_kib():
    return int(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1])

def watch():
    while True:
        sizes.append(anonymous_kib())
        time.sleep(0.01)

sizes = [anonymous_kib()]
threading.Thread(target=watch, daemon=True).start()
path, tokenizer = sys.argv[1:]
config = Config(model_name_or_path="unused", output_dir="unused", dataset_name=path, eval_fraction=0.01)
data = load_data(config, AutoTokenizer.from_pretrained(tokenizer))
steps = Steps(data.train, 10 * len(data.train), 32, 2048, 42, 3)
assert len(steps[3].rows) == 32
print(data.counts["rows"], max([*sizes, anonymous_kib()]))
"""


@pytest.mark.runs
@pytest.mark.skipif(
    sys.platform != "linux", reason="reads the kernel's count of pages that belong to no file"
)
def test_a_million_rows_take_no_more_memory_than_a_thousand(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    peak = {}
    for rows in (1_000, 1_000_000):
        path = tmp_path / f"{rows}.parquet"
        pyarrow.parquet.write_table(
            pyarrow.table({"text": [f"{row % 997}" for row in range(rows)]}), path
        )
        found = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path), str(tokenizer_folder)],
            cwd=REPOSITORY,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        read_rows, peak_kib = map(int, found.stdout.split())
        assert read_rows == rows
        peak[rows] = (
            peak_kib / 1024
        )  # without the mapped pages of the cache, which the kernel may take back
    assert peak[1_000_000] - peak[1_000] < 300, f"MiB: {peak}"


def test_tokenizer_is_named_by_what_it_does_and_not_by_how_it_was_called(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    before = tokenizer_sha256(tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_sha256(tokenizer) == before
    tokenizer.chat_template = "{{ messages }}"
    with_template = tokenizer_sha256(tokenizer)
    tokenizer.pad_token = "</s>"
    assert len({before, with_template, tokenizer_sha256(tokenizer)}) == 3
