"""Rows -> tokens on disk, each row in its place, with its length and its number of targets."""

import hashlib
import string
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import List as ListOf
from transformers import PreTrainedTokenizerBase

from loop.config.knobs import Config
from loop.data.tokenizer import tokenizer_sha256
from loop.errors import DataError
from loop.state.files import canonical_json, sha256

KEPT, TRUNCATED, TOO_LONG = 0, 1, 2
_DECISIVE_CODE = [Path(__file__), Path(__file__).with_name("tokenizer.py")]
_NUMBERS = dict.fromkeys(("target_start", "length", "num_targets"), "int32")
_NUMBERS |= {"fate": "int8", "digest": "int64"}
_COLUMNS = Features(
    input_ids=ListOf(Value("int32")), **{name: Value(dtype) for name, dtype in _NUMBERS.items()}
)


def resolve_templates(config: Config, columns: list[str]) -> list[str]:
    """[text], or [prompt, completion] where they are given or the columns have those names."""
    if config.prompt_template is not None and config.completion_template is not None:
        return [config.prompt_template, config.completion_template]
    has_text = config.text_template is not None or config.dataset_text_field in columns
    if not has_text and {"prompt", "completion"} <= {*columns}:
        return ["{prompt}", "{completion}"]
    return [config.text_template or "{" + config.dataset_text_field + "}"]


def render(template: str, row: dict[str, Any], index: int) -> str:
    """The text of one row; a list of strings is joined by ", ".

    Raises: DataError with the row's index where a column is missing or is not text."""
    parts = []
    for literal, column, spec, conversion in string.Formatter().parse(template):
        parts.append(literal)
        if column is None:
            continue
        if column not in row:
            known = ", ".join(sorted(row))
            hint = f"the columns are {known}; name one in dataset_text_field or text_template"
            raise DataError(f"column {column!r} is missing; {hint}")
        value = row[column]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = ", ".join(value)
        if not isinstance(value, str):
            cell = f"row {index}, column {column!r}: found {value!r:.60}"
            raise DataError(f"{cell}, expected text; correct or remove the row")
        parts.append(format(string.Formatter().convert_field(value, conversion), spec or ""))
    return "".join(parts)


def tokenize_rows(
    rows: Dataset, templates: list[str], config: Config, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Every row tokenized, in its place, through the library's cache on disk.

    The cache is named by all that decides its bytes, `_DECISIVE_CODE` included."""
    if len(rows) == 0:
        raise DataError(f"{config.dataset_name}: the split holds no rows")
    decisive = [rows._fingerprint, templates, config.max_length, config.truncation]
    decisive += [tokenizer_sha256(tokenizer), type(tokenizer).__name__]
    decisive += [path.read_text(encoding="utf-8") for path in _DECISIVE_CODE]
    try:
        return rows.map(
            _encode,
            batched=True,
            with_indices=True,
            fn_kwargs={"templates": templates, "config": config, "tokenizer": tokenizer},
            remove_columns=rows.column_names,
            features=_COLUMNS,
            new_fingerprint=sha256(canonical_json(decisive))[:16],
        )
    except DataError as error:
        raise DataError(f"{config.dataset_name}: {error}") from None


def _encode(
    batch: dict[str, list[Any]],
    indices: list[int],
    templates: list[str],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, list[Any]]:
    """A batch of rows as `_COLUMNS`; a row that is dropped keeps its place, with no tokens.

    A prompt and its completion are tokenized apart, so that the boundary is where a user's own
    prompt will end."""
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    texts = [
        [render(template, row, index) for row, index in zip(rows, indices)]
        for template in templates
    ]
    eos = tokenizer.eos_token_id
    prompted = len(templates) == 2
    targets = tokenizer(texts[-1], add_special_tokens=not prompted, verbose=False)["input_ids"]
    prompts = tokenizer(texts[0], verbose=False)["input_ids"] if prompted else [[]] * len(rows)
    encoded: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for index, prompt, target, text in zip(indices, prompts, targets, texts[-1]):
        if prompt and prompt[-1] == eos:  # some tokenizers end every text
            prompt = prompt[:-1]
        end = [eos] if eos is not None and target[-1:] != [eos] else []
        tokens, fate = _fit([*prompt, *target, *end] if text.strip() else [], config, index)
        num_targets = max(0, len(tokens) - max(1, len(prompt)))
        content = np.asarray([len(prompt), *tokens], np.int32).tobytes()
        hashed = hashlib.blake2b(content, digest_size=8).digest()
        digest = int.from_bytes(hashed, "little", signed=True)
        values = (tokens, len(prompt), len(tokens), num_targets, fate, digest)
        for name, value in zip(_COLUMNS, values):
            encoded[name].append(value)
    return encoded


def _fit(tokens: list[int], config: Config, index: int) -> tuple[list[int], int]:
    """Apply `truncation`. A truncated row gets no end-of-text: its text did not end there."""
    if len(tokens) <= config.max_length:
        return tokens, KEPT
    if config.truncation == "error":
        excess = f"row {index} has {len(tokens)} tokens, max_length is {config.max_length}"
        raise DataError(f"{excess}; raise it, or choose truncation: truncate or drop")
    if config.truncation == "drop":
        return [], TOO_LONG
    return tokens[: config.max_length], TRUNCATED


def column(dataset: Dataset, name: str) -> np.ndarray:
    values: np.ndarray = dataset.data.column(name).to_numpy()
    return values
