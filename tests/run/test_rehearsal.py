"""Before step 0: the largest micro-batch once forward and backward, and `auto` in memory that is
limited for real."""

import ctypes
import functools
import json
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from loop.config.command_line import config_yaml, parse_command_line
from loop.config.knobs import Config
from loop.data.batch import Batch
from loop.data.examples import Examples
from loop.data.order import num_steps
from loop.data.steps import Steps
from loop.errors import TrainingStateError
from loop.model.lora import causal_lm_of
from loop.process.launch import make_accelerator
from loop.process.signals import Signals
from loop.run.prepare import Run, prepare_run
from loop.run.rehearsal import forward_and_backward, largest_batches, rehearse
from loop.train import optimizer_step
from tests.conftest import QUOTES, flags
from tests.model.test_loss import AtOnce
from tests.processes import Launched, run, start_altered
from tests.state.test_resume import outcome, sessions
from tests.test_train import step_lines

Configs = Callable[..., Config]
Settings = Callable[..., dict[str, Any]]

MIB = 2**20


# The largest micro-batch


def examples_of(lengths: list[int]) -> Examples:
    """Rows of these lengths, of the token 5."""
    rows = {"input_ids": [[5] * length for length in lengths], "target_start": [0] * len(lengths)}
    places = np.arange(len(lengths))
    return Examples(
        Dataset.from_dict(rows),
        places,
        np.array(lengths, np.int32),
        np.array(lengths, np.int32) - 1,
    )


def steps_of(
    lengths: list[int],
    batch_size: int,
    budget: int,
    epochs: int = 1,
    process: int = 0,
    of: int = 1,
    padding_free: bool = False,
) -> Steps:
    return Steps(
        examples_of(lengths),
        epochs * len(lengths),
        batch_size,
        budget,
        42,
        padding_free,
        process,
        of,
    )


def largest(
    lengths: list[int], batch_size: int, budget: int, epochs: int = 1
) -> list[tuple[int, int]]:
    """Rows and width of each padded batch that is rehearsed."""
    batches = largest_batches(
        examples_of(lengths), budget, steps_of(lengths, batch_size, budget, epochs)
    )
    return [(grid.rows, grid.width) for batch in batches for grid in batch.grids]


def largest_free(
    lengths: list[int], batch_size: int, budget: int, epochs: int = 1, of: int = 1
) -> Batch:
    """The one batch without padding that is rehearsed."""
    steps = steps_of(lengths, batch_size, budget, epochs, of=of, padding_free=True)
    (batch,) = largest_batches(examples_of(lengths), budget, steps)
    return batch


def row_lengths(batch: Batch) -> list[int]:
    starts = [place for place, position in enumerate(batch.position_ids.tolist()) if position == 0]
    return np.diff([*starts, len(batch.input_ids)]).tolist()


def test_tokens_of_prompts_are_rehearsed_as_targets_for_a_step_may_have_rows_with_short_ones() -> (
    None
):
    rows = {"input_ids": [[5] * 10, [5] * 10], "target_start": [9, 1]}
    lengths = np.array([10, 10], np.int32)
    examples = Examples(Dataset.from_dict(rows), np.arange(2), lengths, np.array([1, 9], np.int32))
    for padding_free in (True, False):
        steps = Steps(examples, 2, 1, 10, 42, padding_free, 0, 1)
        (batch,) = largest_batches(examples, 10, steps)
        assert len(batch.targets) == 9


@pytest.mark.parametrize(
    ("lengths", "budget", "batch_size", "of", "rows"),
    [
        # by hand: the longest, then two thirds of it as often as the budget holds them, the last
        # what is left
        ([12, 9, 9, 9, 9], 30, 8, 1, [12, 8, 8, 2]),
        ([9, 9, 12, 9, 9], 12, 8, 1, [12]),
        ([12, 9, 9, 9, 9], 1000, 5, 1, [12, 9, 9, 9, 9]),  # the step is 48 tokens: 36 on four rows
        (
            [12, 12, 12, 12],
            1000,
            4,
            1,
            [12, 11, 11, 11, 3],
        ),  # all of a step is 48, but rows of one length need no copy
        (
            [12, 12, 12, 12],
            1000,
            4,
            3,
            [12, 8, 8],
        ),  # three processes: none has more than 12 + 48 / 3 tokens
        ([2, 9, 12, 9], 1000, 2, 1, [12, 9]),  # a step has two rows
        ([7], 100, 1, 1, [7]),
    ],
)
def test_without_padding_the_longest_row_and_pieces_that_attention_has_to_pad_fill_the_budget(
    lengths: list[int], budget: int, batch_size: int, of: int, rows: list[int]
) -> None:
    assert row_lengths(largest_free(lengths, batch_size, budget, of=of)) == rows


@pytest.mark.parametrize(
    ("lengths", "budget", "batch_size", "shapes"),
    [
        # by hand: rows x the longest of them; as many as the budget and the batch allow
        ([10, 9, 9, 2], 30, 8, [(3, 10)]),  # 30 of 30
        ([10, 9, 9, 2], 27, 8, [(2, 10), (3, 9)]),  # two of 10 are 20, but 9, 9 and 2 are 27
        (
            [100, 99, 99, *[1] * 199],
            199,
            202,
            [(1, 100), (2, 99), (199, 1)],
        ),  # attention: 2 x 99 x 99 is most
        ([2, 9, 10, 9], 27, 8, [(2, 10), (3, 9)]),  # wherever they lie
        ([10, 9, 9, 2], 27, 2, [(2, 10)]),  # the batch has two rows
        ([10, 9, 9, 2], 10, 8, [(1, 10)]),
        ([10, 9, 9, 2], 1000, 4, [(4, 10)]),
        ([10, 1, 1, 1, 1], 12, 5, [(1, 10)]),
        ([7], 100, 1, [(1, 7)]),
    ],
)
def test_the_widest_the_fullest_and_the_micro_batch_with_the_largest_attention_are_rehearsed(
    lengths: list[int], budget: int, batch_size: int, shapes: list[tuple[int, int]]
) -> None:
    assert largest(lengths, batch_size, budget) == shapes


def batches_of_run(
    lengths: list[int], batch_size: int, budget: int, epochs: int, of: int, padding_free: bool
) -> Iterator[Batch]:
    """Every micro-batch of a run, on all processes."""
    for process in range(of):
        steps = steps_of(lengths, batch_size, budget, epochs, process, of, padding_free)
        for step in range(num_steps(steps.positions, batch_size)):
            yield from (batch for _, batch in steps[step].micro_batches)


any_run = given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=12),
    more=st.integers(0, 40),
    batch_size=st.integers(1, 16),
    epochs=st.integers(1, 4),
    processes=st.integers(1, 3),
)


def most(shapes: list[tuple[int, int]], power: int = 1) -> int:
    """Padded tokens of the largest; with power 2 what its attention is as large as."""
    return max(rows * width**power for rows, width in shapes)


@any_run
@examples(derandomize=True, deadline=None, max_examples=60)
@example(lengths=[11, 10, 2, 2], more=9, batch_size=3, epochs=1, processes=1)
@example(
    lengths=[9, 9, 9, 9], more=191, batch_size=16, epochs=4, processes=1
)  # a step of four epochs
@example(
    lengths=[11, 11, 10], more=9, batch_size=2, epochs=40, processes=1
)  # steps with the row of 10 twice
def test_no_micro_batch_is_fuller_or_wider_or_of_larger_attention_than_the_rehearsed_nor_those_above_the_budget(
    lengths: list[int], more: int, batch_size: int, epochs: int, processes: int
) -> None:
    budget = max(lengths) + more
    rehearsed = largest(lengths, batch_size, budget, epochs)
    batches = batches_of_run(lengths, batch_size, budget, epochs, processes, padding_free=False)
    met = [(grid.rows, grid.width) for batch in batches for grid in batch.grids]
    assert most(met) <= most(rehearsed) <= budget
    assert most(met, power=2) <= most(rehearsed, power=2)
    assert rehearsed[0][1] == max(lengths) == max(width for _, width in met)
    assert max(rows for rows, width in met if width == max(lengths)) <= rehearsed[0][0]


@any_run
@examples(derandomize=True, deadline=None, max_examples=60)
def test_no_micro_batch_without_padding_has_more_tokens_a_wider_row_or_larger_copies_than_the_rehearsed(
    lengths: list[int], more: int, batch_size: int, epochs: int, processes: int
) -> None:
    budget = max(lengths) + more
    rehearsed = largest_free(lengths, batch_size, budget, epochs, processes)
    assert len(rehearsed.input_ids) <= budget
    for batch in batches_of_run(lengths, batch_size, budget, epochs, processes, padding_free=True):
        assert len(batch.input_ids) <= len(rehearsed.input_ids)
        assert max(row_lengths(batch)) <= max(row_lengths(rehearsed))
        assert copied(batch) <= copied(rehearsed) + 2 * max(
            lengths
        )  # of the first row and of what is left at the end


def copied(batch: Batch) -> int:
    """Places of the rectangles that rows are copied into; those whose rows are of one length are
    not copied."""
    return sum(
        grid.rows * grid.width
        for grid in batch.grids
        if len(grid.positions) < grid.rows * grid.width
    )


# What a rehearsal leaves, and what it finds


def prepared(config: Config) -> Run:
    return prepare_run(config, make_accelerator(config))


@pytest.mark.parametrize("tokens", [256, "auto"])
def test_a_rehearsal_leaves_the_run_as_it_was(config: Configs, tokens: int | str) -> None:
    before = prepared(config(micro_batch_tokens=tokens, lora_dropout=0.1))
    weights = {name: tensor.clone() for name, tensor in before.model.state_dict().items()}
    after = rehearse(before, None)
    assert after.loss.training
    assert not after.loss.own_logits
    assert all(parameter.grad is None for parameter in after.parameters.values())
    assert not after.optimizer.state
    now = after.model.state_dict()
    assert all(torch.equal(now[name], weights[name]) for name in weights)
    assert (
        after.steps.micro_batch_tokens
        == after.config.micro_batch_tokens
        == (1024 if tokens == "auto" else 256)
    )
    assert after.environment["micro_batch_tokens"] == after.config.micro_batch_tokens
    assert after.identity == before.identity


@pytest.mark.parametrize("tokens", [256, "auto"])
def test_a_tensor_that_gets_no_gradient_is_found_before_step_0_by_its_name(
    config: Configs, tokens: int | str
) -> None:
    used = prepared(config(micro_batch_tokens=tokens))
    cut_off = causal_lm_of(used.model).transformer.h[1].mlp.dense_h_to_4h.lora_B["default"]
    cut_off.register_forward_hook(lambda *arguments: arguments[-1].detach())
    named = (
        r"^base_model\.model\.transformer\.h\.1\.mlp\.dense_h_to_4h\.lora_A\.weight: is trained but"
        r" got no gradient"
    )
    with pytest.raises(TrainingStateError, match=named):
        rehearse(used, None)


def test_auto_may_find_less_than_max_length_where_rows_are_shorter_and_its_config_is_read_back(
    config: Configs, tmp_path: Path
) -> None:
    rows = tmp_path / "short.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "a b c", "a b")))
    after = rehearse(
        prepared(config(dataset_name=str(rows), micro_batch_tokens="auto", global_batch_size=2)),
        None,
    )
    assert (
        after.config.micro_batch_tokens == 2 * after.data.longest < after.config.max_length == 128
    )
    (tmp_path / "config.yaml").write_text(config_yaml(after.config, {}))
    assert parse_command_line([f"--config={tmp_path / 'config.yaml'}"]).config == after.config


@pytest.mark.parametrize(
    ("steps", "copies"), [(0, 4), (1, 2)]
)  # before a step there are no moments
def test_room_is_kept_for_the_moments_until_there_are_some(
    config: Configs, steps: int, copies: int
) -> None:
    used = prepared(config())
    with Signals() as signals:
        for number in range(steps):
            optimizer_step(used, used.steps[number], 1e-3, signals)
    trained = sum(parameter.numel() for parameter in used.parameters.values())
    with AtOnce(copies * trained) as seen, AtOnce((6 - copies) * trained) as others:
        forward_and_backward(used, 32)
    assert (seen.most, others.most) == (1, 0)


def test_an_error_that_is_not_about_memory_does_not_halve_anything(config: Configs) -> None:
    used = prepared(config(micro_batch_tokens="auto"))
    forwards = []

    def fail_in_training(module: torch.nn.Module, *_: Any) -> None:
        forwards.append(1)
        if module.training:
            torch.ones(2) @ torch.ones(3)

    used.loss.register_forward_pre_hook(fail_in_training)
    with pytest.raises(RuntimeError, match=r"inconsistent tensor size"):
        rehearse(used, None)
    assert len(forwards) == 1


# auto, in ample memory


def used_tokens(folder: Path) -> int:
    """The number in `config.yaml`, which says that it was found, not given; `run.json` has the
    same."""
    (found,) = re.findall(
        r"(?m)^micro_batch_tokens: (\d+) +# found$", (folder / "config.yaml").read_text()
    )
    assert sessions(folder)[-1]["micro_batch_tokens"] == int(found)
    return int(found)


@pytest.mark.runs
@pytest.mark.parametrize(("num_processes", "tokens"), [(1, 1024), (2, 512)])
def test_auto_takes_the_whole_step_where_it_fits_and_is_the_run_that_is_given_this_number(
    settings: Settings, tmp_path: Path, num_processes: int, tokens: int
) -> None:
    knobs = {"lora_dropout": 0.1, "max_steps": 3}
    for name, asked in (("auto", "auto"), ("given", tokens)):
        used = settings(**knobs, micro_batch_tokens=asked, output_dir=str(tmp_path / name))
        run(flags(used), tmp_path / f"{name}.log", num_processes)
    assert (
        used_tokens(tmp_path / "auto") == tokens
    )  # eight rows of at most 128 tokens, or four on each of two
    assert outcome(tmp_path / "auto") == outcome(tmp_path / "given")
    assert {line["micro_batches"] for line in step_lines(tmp_path / "auto")} == {num_processes}
    found = [json.loads((tmp_path / name / "run.json").read_bytes()) for name in ("auto", "given")]
    assert found[0]["identity"] == found[1]["identity"]
    assert found[0]["sessions"][0]["micro_batch_tokens"] == tokens


# In memory that is limited for real

limits_memory = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux limits and tells a process's memory"
)


def limited(run: Run, mebibytes: int, processes: tuple[int, ...] = (0,)) -> Run:
    """Let this process, if it is one of these, have only so much more memory than after a first
    small forward."""
    if run.accelerator.process_index in processes:
        ctypes.CDLL(None).mallopt(
            -3, MIB
        )  # M_MMAP_THRESHOLD: what is larger than that is really given back
        forward_and_backward(run, 32)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + mebibytes * MIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return run


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short row and 40 of at least 2,048 tokens."""
    words = " ".join(
        json.loads(line)["quote"] for line in QUOTES.read_text(encoding="utf-8").splitlines()
    ).split()
    rows = ["Be brief.", *(" ".join(words[100 * i : 100 * i + 2000]) for i in range(40))]
    path = tmp_path_factory.mktemp("long") / "long.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def start_limited(
    settings: Settings, long_rows: Path, tmp_path: Path
) -> Callable[..., tuple[Path, Launched]]:
    """The real program on long rows with 100 MiB to spare. Padded, so that attention keeps its
    scores, 4 heads x width squared numbers a row: eight rows of 512 tokens, 4,096 in all, need some
    200 MB for them."""

    def of(
        name: str,
        mebibytes: int | None = 100,
        num_processes: int = 1,
        processes: tuple[int, ...] = (0,),
        **changed: Any,
    ) -> tuple[Path, Launched]:
        usual = {
            "dataset_name": str(long_rows),
            "max_length": 512,
            "micro_batch_tokens": "auto",
            "max_steps": 2,
        }
        usual |= {"padding_free": "false"}
        used = settings(
            **{**usual, "output_dir": str(tmp_path / name), "learning_rate": 1e-3, **changed}
        )
        alter = functools.partial(
            limited, mebibytes=mebibytes or 0, processes=processes if mebibytes else ()
        )
        log = tmp_path / f"{name}-{len(list(tmp_path.glob('*.log')))}.log"
        return tmp_path / name, start_altered(alter, flags(used), log, num_processes)

    return of


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@limits_memory
@pytest.mark.runs
def test_auto_halves_until_it_fits_trains_and_a_resume_keeps_the_number(
    start_limited: Callable[..., tuple[Path, Launched]],
) -> None:
    folder, launched = start_limited("limited", stop_after_steps=1)
    assert launched.wait() == [0], launched.text()
    tokens = used_tokens(folder)
    assert tokens in (2048, 1024)  # not 8 x 512
    _, launched = start_limited("limited", mebibytes=None)
    assert launched.wait() == [0], launched.text()
    assert "not bit-exact" not in launched.text()
    assert used_tokens(folder) == tokens
    assert [session["first_step"] for session in sessions(folder)] == [0, 1]
    given, launched = start_limited("given", mebibytes=None, micro_batch_tokens=tokens)
    assert launched.wait() == [0], launched.text()
    assert outcome(folder) == outcome(given)
    assert {line["micro_batches"] for line in step_lines(folder)} == {4096 // tokens}


@limits_memory
@pytest.mark.runs
def test_a_resume_with_auto_in_less_memory_halves_the_checkpoints_number_and_says_so(
    start_limited: Callable[..., tuple[Path, Launched]],
) -> None:
    folder, launched = start_limited("run", mebibytes=None, stop_after_steps=1)
    assert launched.wait() == [0], launched.text()
    assert used_tokens(folder) == 4096
    _, launched = start_limited("run")
    assert launched.wait() == [0], launched.text()
    tokens = used_tokens(folder)
    assert tokens in (2048, 1024)
    said = f"micro_batch_tokens was 4096, is {tokens}"
    assert f"not bit-exact from step 1: {said}\n" in launched.text()
    assert [session["not_bit_exact"] for session in sessions(folder)] == [[], [said]]


@limits_memory
@pytest.mark.runs
def test_two_processes_of_which_one_has_less_memory_agree_on_one_number(
    start_limited: Callable[..., tuple[Path, Launched]],
) -> None:
    folder, launched = start_limited("run", num_processes=2, processes=(1,), global_batch_size=16)
    assert launched.wait() == [0, 0], launched.text()
    tokens = used_tokens(folder)
    assert tokens in (2048, 1024)  # not 8 x 512 on each
    assert {line["micro_batches"] for line in step_lines(folder)} == {2 * 4096 // tokens}


@limits_memory
@pytest.mark.runs
@pytest.mark.parametrize("num_processes", [1, 2])
def test_where_not_even_the_longest_row_fits_auto_ends_with_5_and_one_sentence(
    start_limited: Callable[..., tuple[Path, Launched]], num_processes: int
) -> None:
    # One row's attention alone is 4 heads x 2,048 x 2,048 numbers, several times 67 MB.
    folder, launched = start_limited(
        "run", num_processes=num_processes, max_length=2048, global_batch_size=2
    )
    assert launched.wait() == [5] * num_processes, launched.text()
    said = (
        "error: micro_batch_tokens: auto: not even the longest row, 2048 tokens, fits; lower"
        " max_length\n"
    )
    assert launched.text() == said
    assert left_in(folder) == [".lock"]


@limits_memory
@pytest.mark.runs
def test_a_number_that_does_not_fit_ends_with_5_before_anything_is_written(
    start_limited: Callable[..., tuple[Path, Launched]],
) -> None:
    folder, launched = start_limited("run", micro_batch_tokens=4096)
    assert launched.wait() == [5], launched.text()
    found = re.fullmatch(
        r"error: out of memory after a peak of (\d+\.\d) GiB; lower (.*)\n", launched.text()
    )
    assert found, launched.text()
    assert 0.1 < float(found[1]) < 4
    assert all(
        knob in found[2]
        for knob in ("micro_batch_tokens", "max_length", "gradient_checkpointing", "load_in_4bit")
    )
    assert left_in(folder) == [".lock"]
    _, launched = start_limited("run", mebibytes=None, micro_batch_tokens=2048)
    assert launched.wait() == [0], launched.text()  # the same folder with another number
