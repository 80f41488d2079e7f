"""Rows of a dataset -> tokenised examples on disk, each with its length and its number of targets.

Nothing here is shuffled, padded or shifted. Rows keep their place: index i is row i of the dataset as loaded."""

import codecs
import errno
import hashlib
import json
import string
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, Value, load_dataset_builder
from datasets import List as ListOf
from transformers import PreTrainedTokenizerBase

from loop.batch import Example
from loop.config import Config
from loop.errors import DataError, EnvironmentFault, HubError
from loop.files import canonical_json, sha256

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else each load reports itself to the library's makers
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
KEPT, TRUNCATED, TOO_LONG = 0, 1, 2
_NUMBERS = {"target_start": "int32", "length": "int32", "num_targets": "int32", "fate": "int8", "digest": "int64"}
_COLUMNS = Features(input_ids=ListOf(Value("int32")), **{name: Value(dtype) for name, dtype in _NUMBERS.items()})
_SPLIT_STREAM = 2**32 - 1
"""Held-out rows are drawn from RandomState([seed, this]), epoch e from RandomState([seed, e])."""


@dataclass(frozen=True)
class Examples:
    """Some rows of a tokenised dataset. Tokens stay on disk, memory-mapped; 16 bytes a row are in memory.

    Shapes: rows (N,) int64, indices into the dataset as loaded, ascending; lengths and num_targets (N,) int32."""

    dataset: Dataset
    rows: np.ndarray
    lengths: np.ndarray
    num_targets: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, positions: np.ndarray) -> list[Example]:
        """The examples at these positions (of `rows`, not of the dataset)."""
        found = self.dataset[self.rows[positions].tolist()]
        return [Example(*pair) for pair in zip(found["input_ids"], found["target_start"])]


@dataclass(frozen=True)
class Data:
    """What a run trains on and what it holds out."""

    train: Examples
    heldout: Examples
    counts: dict[str, int]
    fingerprint: str  # sha256 over every token id, length and target start, and over which rows are in which part
    templates: list[str]  # [text], or [prompt, completion]
    commit: str | None  # of the dataset, where it came from the Hub
    largest_token_id: int

    @property
    def longest(self) -> int:
        """Tokens of the longest row, held out or not."""
        return max(int(part.lengths.max(initial=0)) for part in (self.train, self.heldout))


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Load, tokenise (once: a second call reads the cache), drop rows without a target, split, fingerprint.

    Raises: DataError, HubError. Nothing is written but the library's cache."""
    source, commit = _load(config, config.dataset_train_split)
    templates = resolve_templates(config, source.column_names)  # once: a test split is read as the train split is
    whole = _tokenise(source, templates, config, tokenizer)
    usable = np.flatnonzero(_column(whole, "num_targets"))
    if config.dataset_test_split is None:
        count = max(1, round(config.eval_fraction * len(usable))) if config.eval_fraction > 0 else 0
        chosen = np.random.RandomState([config.seed, _SPLIT_STREAM]).permutation(usable)[:count]
        train, heldout = _examples(whole, np.setdiff1d(usable, chosen)), _examples(whole, np.sort(chosen))
    else:
        pinned = replace(config, dataset_revision=commit or config.dataset_revision)
        test = _tokenise(_load(pinned, config.dataset_test_split)[0], templates, config, tokenizer)
        train, heldout = _examples(whole, usable), _examples(test, np.flatnonzero(_column(test, "num_targets")))
    counts = _count(whole, train, heldout)
    if len(train) == 0:
        lost = "{dropped_without_target} of {rows} have no text, {dropped_too_long} of {rows} are".format(**counts)
        ways = f"longer than max_length {config.max_length}; raise it, or choose truncation: truncate"
        raise DataError(f"{config.dataset_name}: no rows are left to train on: {lost} {ways}")
    if config.dataset_test_split is not None and len(heldout) == 0:
        raise DataError(f"dataset_test_split: no row of {config.dataset_test_split} has text to predict")
    fingerprint, largest_token_id = _fingerprint(train, heldout)
    return Data(train, heldout, counts, fingerprint, templates, commit, largest_token_id)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what makes it another tokenizer: vocabulary, rules, special tokens, chat template; not of how it is stored."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    rules |= {"truncation": None, "padding": None}  # each call sets these
    return sha256(canonical_json([rules, tokenizer.special_tokens_map, tokenizer.chat_template]))


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
            ways = f"the columns are {', '.join(sorted(row))}; name one in dataset_text_field or text_template"
            raise DataError(f"column {column!r} is missing; {ways}")
        value = row[column]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = ", ".join(value)
        if not isinstance(value, str):
            found = f"row {index}, column {column!r}: found {value!r:.60}"
            raise DataError(f"{found}, expected text; correct or remove the row")
        parts.append(format(string.Formatter().convert_field(value, conversion), spec or ""))
    return "".join(parts)


def _load(config: Config, split: str) -> tuple[Dataset, str | None]:
    """One split, and the commit it resolved to where it came from the Hub. No token is passed."""
    name, path = config.dataset_name, Path(config.dataset_name)
    datasets.disable_progress_bars()
    try:
        if path.suffix in FILE_FORMATS:
            form = FILE_FORMATS[path.suffix]
            # A byte order mark is no text; the other readers drop it themselves.
            encoding = {"encoding": "utf-8-sig"} if form == "text" else {}
            builder = load_dataset_builder(form, data_files=str(_by_content(path)), token=False, **encoding)
        elif path.is_file():
            raise DataError(f"dataset_name: found a {path.suffix} file, expected {', '.join(FILE_FORMATS)}; convert it")
        else:
            revision = config.dataset_revision
            builder = load_dataset_builder(name, name=config.dataset_config, revision=revision, token=False)
        builder.download_and_prepare()
        base = str(builder.base_path)
        commit = base.split("@")[1].split("/")[0] if base.startswith("hf://") and "@" in base else None
        return builder.as_dataset(split=split), commit
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        ways = f"no token is used: hf download {name} --repo-type dataset --local-dir DIR, then write DIR in its place"
        raise HubError(f"dataset_name: {name}: {_first_line(error)}; {ways}") from error
    except StopIteration as error:
        raise DataError(f"dataset_name: {name}: holds no rows") from error
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            ways = "free some space, or set HF_HOME to a folder on another disk"
            raise EnvironmentFault(f"the cache of datasets: {cause.strerror}; {ways}") from error
        found = _first_line(cause)
        words = "holds no rows" if "corresponds to no data" in found else found
        kind = HubError if isinstance(error, OSError) and not path.exists() else DataError
        raise kind(f"dataset_name: {name}: {words}") from error


def _by_content(path: Path) -> Path:
    """A link to `path` that is named by its content, which the library's cache then knows it by.

    The library itself goes by modification times and takes a name for a pattern. Text that is not UTF-8 is refused
    here with its offset, which the readers underneath do not tell."""
    if not path.is_file():
        hint = f"write ./{path.name} for a file beside the recipe"
        raise DataError(f"dataset_name: found no file {path.absolute()}; {hint}")
    digest, decoder, offset, chunk = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0, b" "
    with path.open("rb") as file:
        while chunk:
            chunk, pending = file.read(1 << 20), len(decoder.getstate()[0])
            digest.update(chunk)
            try:
                if path.suffix != ".parquet":
                    decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise DataError(f"{path}: not UTF-8 at byte {at}; convert the file") from error
            offset += len(chunk)
    link = Path(datasets.config.HF_DATASETS_CACHE) / "by-content" / digest.hexdigest() / f"rows{path.suffix}"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists() or link.resolve() != path.resolve():
        link.unlink(missing_ok=True)
        with suppress(FileExistsError):  # another run was faster
            link.symlink_to(path.resolve())
    return link


def _tokenise(source: Dataset, templates: list[str], config: Config, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Every row tokenised, in its place, through the library's cache on disk.

    The cache is named by all that decides its bytes, the source of this file included."""
    if len(source) == 0:
        raise DataError(f"{config.dataset_name}: the split holds no rows")
    decisive = [source._fingerprint, templates, config.max_length, config.truncation, tokenizer_sha256(tokenizer)]
    decisive += [type(tokenizer).__name__, Path(__file__).read_text(encoding="utf-8")]
    try:
        return source.map(
            _encode,
            batched=True,
            with_indices=True,
            fn_kwargs={"templates": templates, "config": config, "tokenizer": tokenizer},
            remove_columns=source.column_names,
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

    A prompt and its completion are tokenised apart, so that the boundary is where a user's own prompt will end."""
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    texts = [[render(template, row, index) for row, index in zip(rows, indices)] for template in templates]
    eos = tokenizer.eos_token_id
    targets = tokenizer(texts[-1], add_special_tokens=len(templates) == 1, verbose=False)["input_ids"]
    prompts = tokenizer(texts[0], verbose=False)["input_ids"] if len(templates) == 2 else [[]] * len(rows)
    encoded: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for index, prompt, target, text in zip(indices, prompts, targets, texts[-1]):
        prompt = prompt[:-1] if prompt and prompt[-1] == eos else prompt  # some tokenizers end every text
        end = [eos] if eos is not None and target[-1:] != [eos] else []
        tokens, fate = _fit([*prompt, *target, *end] if text.strip() else [], config, index)
        num_targets = max(0, len(tokens) - max(1, len(prompt)))
        digest = hashlib.blake2b(np.asarray([len(prompt), *tokens], np.int32).tobytes(), digest_size=8).digest()
        values = (tokens, len(prompt), len(tokens), num_targets, fate, int.from_bytes(digest, "little", signed=True))
        for name, value in zip(_COLUMNS, values):
            encoded[name].append(value)
    return encoded


def _fit(tokens: list[int], config: Config, index: int) -> tuple[list[int], int]:
    """Apply `truncation`. A truncated row ends where it was cut: its text did not end there, so no end-of-text."""
    if len(tokens) <= config.max_length:
        return tokens, KEPT
    if config.truncation == "error":
        found = f"row {index} has {len(tokens)} tokens, max_length is {config.max_length}"
        raise DataError(f"{found}; raise it, or choose truncation: truncate or drop")
    return ([], TOO_LONG) if config.truncation == "drop" else (tokens[: config.max_length], TRUNCATED)


def _examples(dataset: Dataset, rows: np.ndarray) -> Examples:
    return Examples(dataset, rows, _column(dataset, "length")[rows], _column(dataset, "num_targets")[rows])


def _column(dataset: Dataset, name: str) -> np.ndarray:
    values: np.ndarray = dataset.data.column(name).to_numpy()
    return values


def _count(whole: Dataset, train: Examples, heldout: Examples) -> dict[str, int]:
    """What became of the rows; equal rows are recognised by 64 bits of a hash of their tokens."""
    usable, fate = _column(whole, "num_targets") > 0, _column(whole, "fate")
    digests, heldout_digests = (_column(part.dataset, "digest")[part.rows] for part in (train, heldout))
    return {
        "rows": len(whole),
        "dropped_without_target": int((~usable & (fate != TOO_LONG)).sum()),
        "dropped_too_long": int((fate == TOO_LONG).sum()),
        "truncated": int((usable & (fate == TRUNCATED)).sum()),
        "train_rows": len(train),
        "train_target_tokens": int(train.num_targets.sum()),
        "heldout_rows": len(heldout),
        "heldout_target_tokens": int(heldout.num_targets.sum()),
        "duplicate_train_rows": len(digests) - len(np.unique(digests)),
        "heldout_rows_also_in_train": int(np.isin(heldout_digests, digests).sum()),
    }


def _fingerprint(train: Examples, heldout: Examples) -> tuple[str, int]:
    """Hash every token as it lies on disk, in one pass over the memory map; also find the largest id."""
    digest, largest = hashlib.sha256(), 0
    for part in (train, heldout):
        digest.update(len(part).to_bytes(8, "little") + part.rows.astype("<i8").tobytes())
        for name in ("length", "target_start"):
            digest.update(_column(part.dataset, name).astype("<i4", copy=False).tobytes())
        for chunk in part.dataset.data.column("input_ids").chunks:
            tokens = chunk.flatten().to_numpy()
            largest = max(largest, int(tokens.max(initial=0)))
            digest.update(tokens.astype("<i4", copy=False).tobytes())
    return digest.hexdigest(), largest


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
