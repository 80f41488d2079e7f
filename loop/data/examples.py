"""What a run trains on and what it holds out: tokenized rows, split, counted and fingerprinted."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from loop.config.knobs import Config
from loop.data.batch import Example
from loop.data.encode import TOO_LONG, TRUNCATED, column, resolve_templates, tokenize_rows
from loop.data.rows import load_rows
from loop.errors import DataError

_SPLIT_STREAM = 2**32 - 1
"""Held-out rows are drawn from RandomState([seed, this]), epoch e from RandomState([seed, e])."""


@dataclass(frozen=True)
class Examples:
    """Rows of a tokenized dataset: tokens memory-mapped from disk, 16 bytes a row in memory.

    Shapes: all (N,); rows int64, ascending indices into the dataset as loaded; the others int32."""

    dataset: Dataset
    rows: np.ndarray
    lengths: np.ndarray
    num_targets: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, positions: np.ndarray) -> list[Example]:
        """The examples at these positions (of `rows`, not of the dataset)."""
        columns = self.dataset[self.rows[positions].tolist()]
        return [Example(*pair) for pair in zip(columns["input_ids"], columns["target_start"])]


@dataclass(frozen=True)
class Data:
    """What a run trains on and what it holds out."""

    train: Examples
    heldout: Examples
    counts: dict[str, int]
    fingerprint: str
    """sha256 over token ids, lengths, target starts, and which rows are in which part."""
    templates: list[str]  # [text], or [prompt, completion]
    commit: str | None  # of the dataset, where it came from the Hub
    largest_token_id: int

    @property
    def longest(self) -> int:
        """Tokens of the longest row, held out or not."""
        return max(int(part.lengths.max(initial=0)) for part in (self.train, self.heldout))


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Load, tokenize (cached on disk), drop rows without a target, split, and fingerprint.

    Raises: DataError, HubError. Nothing is written but the library's cache."""
    rows, commit = load_rows(config, config.dataset_train_split)
    templates = resolve_templates(config, rows.column_names)  # once: a test split is read alike
    whole = tokenize_rows(rows, templates, config, tokenizer)
    usable = np.flatnonzero(column(whole, "num_targets"))
    if config.dataset_test_split is None:
        count = max(1, round(config.eval_fraction * len(usable))) if config.eval_fraction > 0 else 0
        chosen = np.random.RandomState([config.seed, _SPLIT_STREAM]).permutation(usable)[:count]
        train = _examples(whole, np.setdiff1d(usable, chosen))
        heldout = _examples(whole, np.sort(chosen))
    else:
        pinned = replace(config, dataset_revision=commit or config.dataset_revision)
        test_rows, _ = load_rows(pinned, config.dataset_test_split)
        test = tokenize_rows(test_rows, templates, config, tokenizer)
        train = _examples(whole, usable)
        heldout = _examples(test, np.flatnonzero(column(test, "num_targets")))
    counts = _count(whole, train, heldout)
    if len(train) == 0 and len(heldout) > 0 and config.dataset_test_split is None:
        share = f"{config.eval_fraction:g} holds out {len(heldout)} of {len(usable)} rows with text"
        raise DataError(f"eval_fraction: {share}, all that there are; lower it, or add rows")
    if len(train) == 0:
        lost = "{dropped_without_target} of {rows} have no text, {dropped_too_long} of {rows} are"
        lost = f"{lost.format(**counts)} longer than max_length {config.max_length}"
        hint = "raise it, or choose truncation: truncate"
        raise DataError(f"{config.dataset_name}: no rows are left to train on: {lost}; {hint}")
    if config.dataset_test_split is not None and len(heldout) == 0:
        raise DataError(
            f"dataset_test_split: no row of {config.dataset_test_split} has text to predict"
        )
    fingerprint, largest_token_id = _fingerprint(train, heldout)
    return Data(train, heldout, counts, fingerprint, templates, commit, largest_token_id)


def _examples(dataset: Dataset, rows: np.ndarray) -> Examples:
    return Examples(
        dataset, rows, column(dataset, "length")[rows], column(dataset, "num_targets")[rows]
    )


def _count(whole: Dataset, train: Examples, heldout: Examples) -> dict[str, int]:
    """What became of the rows; equal rows are recognized by 64 bits of a hash of their tokens."""
    usable, fate = column(whole, "num_targets") > 0, column(whole, "fate")
    digests, heldout_digests = (
        column(part.dataset, "digest")[part.rows] for part in (train, heldout)
    )
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
    """The hash of all tokens as they lie on disk, and the largest id, in one pass over the map."""
    digest, largest = hashlib.sha256(), 0
    for part in (train, heldout):
        digest.update(len(part).to_bytes(8, "little") + part.rows.astype("<i8").tobytes())
        for name in ("length", "target_start"):
            digest.update(column(part.dataset, name).astype("<i4", copy=False).tobytes())
        for chunk in part.dataset.data.column("input_ids").chunks:
            tokens = chunk.flatten().to_numpy()
            largest = max(largest, int(tokens.max(initial=0)))
            digest.update(tokens.astype("<i4", copy=False).tobytes())
    return digest.hexdigest(), largest
