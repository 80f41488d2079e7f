"""The dataset of steps: what each process trains on, and the counts that all of them agree on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from loop.config.knobs import Config
from loop.data.batch import Batch
from loop.data.examples import Data, load_data
from loop.data.order import num_positions, num_steps
from loop.data.steps import Step, Steps


@pytest.fixture(scope="module")
def data(ragged: Path, tokenizer_folder: Path) -> Data:
    """40 rows of 2 to 128 tokens, four held out, so that places and rows of the dataset differ."""
    config = Config(
        model_name_or_path="unused",
        dataset_name=str(ragged),
        output_dir="unused",
        max_length=128,
        eval_fraction=0.1,
    )
    return load_data(config, AutoTokenizer.from_pretrained(tokenizer_folder))


def steps_of(
    data: Data,
    process_index: int = 0,
    num_processes: int = 1,
    batch: int = 7,
    epochs: float = 2,
    padding_free: bool = True,
) -> Steps:
    return Steps(
        examples=data.train,
        positions=num_positions(len(data.train), epochs, None, batch),
        global_batch_size=batch,
        micro_batch_tokens=256,
        seed=42,
        padding_free=padding_free,
        process_index=process_index,
        num_processes=num_processes,
    )


def all_steps(steps: Steps) -> list[Step]:
    return [steps[k] for k in range(num_steps(steps.positions, steps.global_batch_size))]


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    """The rows that a batch holds, by where their positions start again; none for the token that
    stands for none."""
    if batch.input_ids.tolist() == [0]:
        return []
    starts = [place for place, position in enumerate(batch.position_ids.tolist()) if position == 0]
    ends = [*starts[1:], len(batch.input_ids)]
    return [tuple(batch.input_ids[start:end].tolist()) for start, end in zip(starts, ends)]


def tokens_of(step: Step) -> list[tuple[int, ...]]:
    return [row for _, batch in step.micro_batches for row in rows_of(batch)]


def computed(batch: Batch, padding_free: bool) -> int:
    """Tokens of one forward."""
    return (
        len(batch.input_ids)
        if padding_free
        else sum(grid.rows * grid.width for grid in batch.grids)
    )


def texts(ragged: Path, tokenizer_folder: Path, rows: list[int]) -> list[tuple[int, ...]]:
    """Rows of the file, tokenized by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    lines = ragged.read_text(encoding="utf-8").splitlines()
    return [
        tuple((tokenizer(json.loads(lines[row])["text"])["input_ids"] + [2])[:128]) for row in rows
    ]


def equal(one: Step, other: Step) -> bool:
    same_batches = all(
        k == j
        and all(field.equal(again) for field, again in zip(batch[:3], batch_again[:3]))
        and str(batch.grids) == str(batch_again.grids)
        for (k, batch), (j, batch_again) in zip(one.micro_batches, other.micro_batches, strict=True)
    )
    return same_batches and one._replace(micro_batches=[]) == other._replace(micro_batches=[])


def test_step_k_is_the_same_whenever_it_is_asked_for(data: Data) -> None:
    forwards = all_steps(steps_of(data))
    backwards = [steps_of(data)[k] for k in reversed(range(len(forwards)))][::-1]
    assert all(map(equal, forwards, backwards))
    assert not equal(forwards[0], forwards[1])


def test_a_loader_that_starts_at_step_k_goes_on_as_the_run_would_have(data: Data) -> None:
    steps = steps_of(data)
    for workers in (0, 1):
        loader = DataLoader(steps, sampler=range(5, 9), batch_size=None, num_workers=workers)
        assert all(map(equal, loader, [steps[5], steps[6], steps[7], steps[8]]))


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_the_processes_together_hold_each_row_of_the_step_once(
    data: Data, ragged: Path, tokenizer_folder: Path, num_processes: int
) -> None:
    shares = [all_steps(steps_of(data, process, num_processes)) for process in range(num_processes)]
    for parts in zip(*shares):
        held = [row for part in parts for row in tokens_of(part)]
        assert sorted(held) == sorted(texts(ragged, tokenizer_folder, parts[0].rows))


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_the_counts_of_a_step_are_those_of_all_processes_batches(
    data: Data, num_processes: int, padding_free: bool
) -> None:
    shares = [
        all_steps(steps_of(data, process, num_processes, padding_free=padding_free))
        for process in range(num_processes)
    ]
    for parts in zip(*shares):
        batches = [batch for part in parts for _, batch in part.micro_batches]
        for part in parts:
            assert part.target_tokens == sum(len(batch.targets) for batch in batches)
            assert part.padded_tokens == sum(computed(batch, padding_free) for batch in batches)
            assert part.tokens == sum(len(row) for batch in batches for row in rows_of(batch))
            assert part.num_micro_batches == len(batches)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_all_processes_agree_on_everything_but_their_micro_batches(
    data: Data, num_processes: int
) -> None:
    shares = [all_steps(steps_of(data, process, num_processes)) for process in range(num_processes)]
    for parts in zip(*shares):
        assert len({str(part._replace(micro_batches=[])) for part in parts}) == 1
        assert len({len(part.micro_batches) for part in parts}) == 1, (
            "unequal counts would hang the collectives"
        )
        numbers = sorted(k for part in parts for k, _ in part.micro_batches)
        assert numbers == list(range(parts[0].num_micro_batches))


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_micro_batch_k_is_for_process_k_mod_n(data: Data, num_processes: int) -> None:
    for process in range(num_processes):
        for step in all_steps(steps_of(data, process, num_processes)):
            assert {k % num_processes for k, _ in step.micro_batches} == {process}


@pytest.mark.parametrize("padding_free", [True, False])
def test_no_micro_batch_is_above_the_budget(data: Data, padding_free: bool) -> None:
    steps = all_steps(steps_of(data, padding_free=padding_free))
    sizes = [computed(batch, padding_free) for step in steps for _, batch in step.micro_batches]
    assert 128 < max(sizes) <= 256


def test_the_rows_and_the_divisor_do_not_depend_on_the_number_of_processes(data: Data) -> None:
    one, three = all_steps(steps_of(data)), all_steps(steps_of(data, 2, 3))
    assert [(s.rows, s.epoch, s.target_tokens, s.tokens) for s in one] == [
        (s.rows, s.epoch, s.target_tokens, s.tokens) for s in three
    ]


def test_rows_are_numbered_as_in_the_dataset_as_it_was_loaded(data: Data) -> None:
    drawn = [row for step in all_steps(steps_of(data)) for row in step.rows]
    held_out = set(data.heldout.rows.tolist())
    assert len(held_out) == 4
    assert sorted(drawn) == sorted(2 * [row for row in range(40) if row not in held_out])


def test_every_micro_batch_is_sorted_longest_first(data: Data) -> None:
    for step in all_steps(steps_of(data)):
        assert (np.diff([len(row) for row in tokens_of(step)]) <= 0).all()


def test_processes_without_rows_get_one_token_without_a_target(data: Data) -> None:
    batch_of_two = [steps_of(data, process, 4, batch=2)[0] for process in range(4)]
    assert [len(tokens_of(step)) for step in batch_of_two] == [1, 1, 0, 0]
    for idle in batch_of_two[2:]:
        ((_, batch),) = idle.micro_batches
        assert batch.input_ids.tolist() == [0]
        assert batch.targets.tolist() == []


def test_the_last_step_of_a_run_is_short_and_keeps_its_own_divisor(data: Data) -> None:
    # 36 rows, 1.5 epochs: 54 positions, 7 steps of 7 and one of 5.
    steps = all_steps(steps_of(data, epochs=1.5))
    assert [len(step.rows) for step in steps] == [7, 7, 7, 7, 7, 7, 7, 5]
    real = sum(len(batch.targets) for _, batch in steps[-1].micro_batches)
    assert steps[-1].target_tokens == real > 0


def test_another_seed_gives_other_rows_and_padding_other_cuts_of_the_same_rows(data: Data) -> None:
    steps = steps_of(data)
    assert dataclasses.replace(steps, seed=43)[0].rows != steps[0].rows
    padded = dataclasses.replace(steps, padding_free=False)[0]
    assert (padded.rows, padded.target_tokens, padded.tokens) == (steps[0].rows, *steps[0][3:5])
    assert padded.padded_tokens > padded.tokens == steps[0].padded_tokens
    assert sorted(tokens_of(padded)) == sorted(tokens_of(steps[0]))
