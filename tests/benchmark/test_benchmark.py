"""The arithmetic of the benchmark. That it is fast is no test: see README.md here and the
command beside it."""

import argparse
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loop.process.memory import peak_memory
from tests.benchmark import __main__ as benchmark
from tests.benchmark.__main__ import panel, speed, table
from tests.benchmark.card import TIMED, WARM, Event, kinds, row
from tests.benchmark.growth import PARTS, curve, plots
from tests.benchmark.growth import table as growth_table
from tests.benchmark.machine import description, in_a_fork, matrix_rate
from tests.benchmark.peers import PEERS, Clock
from tests.benchmark.picture import draw_growth, draw_speed
from tests.benchmark.points import CPU, MEASURE, RAGGED, short_text, text_of
from tests.benchmark.work import DEMO, ROWS_PER_STEP, minimal_flops


def found(
    targets: int, seconds: float, memory: int, rate: float = 264_241_152_000.0
) -> dict[str, object]:
    """Three steps of `targets` targets and `seconds` seconds each, behind a first one that took 10
    s.

    By default a matrix product has the rate of 1,000 of R's targets a second."""
    ends = [10.0 + seconds * step for step in range(3)]
    counts = {"targets": [targets] * 3, "tokens": [targets] * 3, "padded": [2 * targets] * 3}
    return {"ends": ends, **counts, "peak_memory_bytes": memory, "rate": rate}


def test_first_step_is_no_part_of_the_speed() -> None:
    assert speed(found(targets=500, seconds=2.0, memory=0)) == 250


@pytest.mark.parametrize(
    ("proxy", "flops"),
    [
        ("A", 4 * (4 * 12 * 512 * 512 + 512 * 250_880)),
        ("R", 264_241_152),  # 4 x (8 x 12 x 768 x 768 + 768 x 12,288)
        ("L", 4 * (8 * (4 * 768 * 768 + 3 * 768 * 2304) + 768 * 12_288)),
    ],
)
def test_work_of_a_target_is_two_products_with_each_matrix(proxy: str, flops: int) -> None:
    assert minimal_flops(proxy, 1) == flops


def test_table_gives_medians_and_ratios_to_the_trainer_as_it_comes() -> None:
    results = {
        "trainer": [
            found(100, 1.0, 4_000_000_000),
            found(100, 2.0, 4_000_000_000),
            found(100, 1.0, 4_000_000_000),
        ],
        "this loop": [found(250, 1.0, 1_000_000_000)],
    }
    lines = table(
        "R", {"trainer": 4, "this loop": 1024}, results, [found(100, 1.0, 0)]
    ).splitlines()
    assert (
        lines[-3]
        == "| this loop | 1,024 tokens | 250 | 2.50 | 1.00 GB | 0.25 | 10.0 s | 50% | 25% |"
    )
    assert (
        lines[-1]
        == "R with one thread: 100 target tokens/s, 10% of the 264 GFLOP/s that a matrix product"
        " has there."
    )


def test_share_is_of_the_rate_that_was_measured_in_the_same_round() -> None:
    slow_then_fast = [
        found(100, 1.0, 0, 264_241_152 * 200.0),
        found(400, 1.0, 0, 264_241_152 * 800.0),
    ]
    last = table("R", {"this loop": 512}, {"this loop": slow_then_fast}, []).splitlines()[-1]
    assert last.endswith("| 50% | 50% |")  # padding, share


def test_every_other_repeat_goes_backwards_and_each_round_begins_with_its_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def matrix_rate(threads: int) -> float:
        calls.append(f"rate {threads}")
        return float(threads)

    def measure(
        peer: str, proxy: str, folder: Path, steps: int, micro: int, threads: int
    ) -> dict[str, object] | None:
        calls.append(f"{peer} {threads}")
        return None if peer == "trl" else {"steps": steps}

    monkeypatch.setattr(benchmark, "matrix_rate", matrix_rate)
    monkeypatch.setattr(benchmark, "measure", measure)
    sizes = {
        "R": {"trainer": 4, "plain": 0, "trl": 1, "this loop": 512}
    }  # plain failed at every size
    options = argparse.Namespace(repeats=2, threads=2, steps=5)
    results, alone = benchmark.measure_all([*sizes["R"]], {"R": Path()}, sizes, options)
    forwards = ["rate 1", "rate 2", "trainer 2", "trl 2", "this loop 2", "this loop 1"]
    assert calls == [
        *forwards,
        "rate 1",
        "rate 2",
        "this loop 2",
        "trl 2",
        "trainer 2",
        "this loop 1",
    ]
    assert results["R"]["this loop"] == [{"steps": 5, "rate": 2.0}] * 2
    assert results["R"]["trl"] == results["R"]["plain"] == []
    assert alone["R"] == [{"steps": 5, "rate": 1.0}] * 2


def test_clock_counts_each_step_by_its_own_forwards() -> None:
    clock = Clock()
    clock.saw(5, 6, 8)
    clock.saw(1, 2, 8)
    clock.step()
    clock.saw(7, 8, 9)
    clock.step()
    assert (clock.targets, clock.tokens, clock.padded) == ([6, 7], [8, 8], [16, 9])


def test_steps_of_every_padded_peer_are_of_as_many_rows_and_what_leaks_is_labelled() -> None:
    padded = ("trainer", "trainer, grouped", "trl", "plain")
    assert all(ROWS_PER_STEP % micro == 0 for name in padded for micro in PEERS[name].micro)
    leaking = ["trl, padding-free", "trl, packed", "plain, blocks"]
    assert [name for name, peer in PEERS.items() if peer.differs("R")] == leaking
    assert [name for name, peer in PEERS.items() if peer.differs("L")] == leaking[
        2:
    ]  # Llama's mask goes by positions


def test_picture_of_the_speeds_is_the_same_bytes_twice_and_labels_who_trains_another_update(
    tmp_path: Path,
) -> None:
    results = {
        "trainer": [
            found(100, 1.0, 0),
            found(100, 4.0, 0),
            found(100, 2.0, 0),
        ],  # 100, 25, 50 a second
        "trl, packed": [found(125, 1.0, 0)],
        "this loop": [found(200, 1.0, 0)],
    }
    drawn = panel("R", results)
    assert [(bar.speeds, bar.ratio) for bar in drawn.bars] == [
        ([25, 50, 100], 1),
        ([125, 125, 125], 2.5),
        ([200, 200, 200], 4),
    ]
    assert drawn.limit == 1000
    for name in ("one.svg", "two.svg"):
        draw_speed([drawn], "some machine", tmp_path / name)
    picture = (tmp_path / "one.svg").read_text()
    assert picture == (tmp_path / "two.svg").read_text()
    assert picture.count("rows in one sequence see each other") == 1
    assert "4.00 x" in picture
    assert "some machine" in picture


def test_growth_gives_medians_in_a_table_and_the_spread_in_a_picture(tmp_path: Path) -> None:
    part = PARTS["rank"]
    measured = {
        "a checkpoint": {
            x: [{"seconds": s * x, "mb": 2.0 * x, "trained": 10.0 * x} for s in (0.5, 0.25, 1)]
            for x in (4, 16)
        }
    }
    assert growth_table(part, measured).splitlines()[-2:] == [
        "| 4 | 2 | 8 | 40 |",
        "| 16 | 8 | 32 | 160 |",
    ]
    line = curve("a checkpoint", measured["a checkpoint"], "seconds")
    assert (line.xs, line.ys, line.lows, line.highs) == ([4, 16], [2, 8], [1, 4], [4, 16])
    for name in ("one.svg", "two.svg"):
        draw_growth(plots(part, measured), "some machine", tmp_path / name)
    assert (tmp_path / "one.svg").read_text() == (tmp_path / "two.svg").read_text()
    assert "lora_r" in (tmp_path / "one.svg").read_text()


def test_point_that_failed_is_left_out_of_table_and_picture(tmp_path: Path) -> None:
    part = PARTS["rows"]
    point = {name: 2.0 for name in part.measures}
    measured = {
        "first time": {10: [point], 100: [point], 1000: []},
        "second time": {10: [], 100: [], 1000: []},
    }
    assert growth_table(part, measured).splitlines()[-2:] == [
        "| 100 | 2 |  | 2 |  | 2 |  | 2 |  | 2 |  |",
        "| 1,000 |  |  |  |  |  |  |  |  |  |  |",
    ]
    drawn = plots(part, measured)
    assert [[(line.name, line.xs) for line in plot.curves] for plot in drawn] == [
        [("first time", [10, 100])]
    ] * 3
    nothing = plots(part, {series: {10: []} for series in part.series})
    draw_growth([*drawn, *nothing], "some machine", tmp_path / "growth.svg")


def test_texts_have_the_lengths_that_growth_is_measured_against() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    end_of_text = 1
    for length in (2, 3, 64, 2048):
        assert len(tokenizer(text_of(length))["input_ids"]) + end_of_text == length
    assert sum(RAGGED) == 8192
    assert [short_text(row) for row in range(3)] == ["0", "row 1", "2"]


def test_every_part_of_growth_has_what_it_is_measured_by() -> None:
    assert [*PARTS] == [*MEASURE]


def test_machine_is_described_in_one_line() -> None:
    words = description(threads=1)
    assert ", 1 of " in words
    assert ", torch " in words
    assert "\n" not in words


def test_peak_of_a_process_is_its_own_and_a_failed_one_gives_nothing() -> None:
    assert in_a_fork(lambda: {"pid": True}) == {"pid": True}
    assert in_a_fork(lambda: 1 // 0) is None
    grown = in_a_fork(
        lambda: [peak_memory(CPU), len(bytearray(b"x" * 200_000_000)), peak_memory(CPU)]
    )
    assert 200_000_000 <= grown[2] - grown[0] < 900_000_000


def test_rate_of_a_matrix_product_is_measured_in_operations_a_second() -> None:
    assert 1e8 < matrix_rate(1) < 1e15


def test_kernels_are_told_apart_by_a_word_in_their_name() -> None:
    events = [
        Event("pytorch_flash::flash_fwd_kernel", 1.0),
        Event("nvjet_sm90_tst_128x256", 2.0),
        Event("Memset", 0.5),
    ]
    events += [
        Event("vectorized_elementwise_kernel<GeluCUDAKernelImpl>", 4.0),
        Event("vectorized_layer_norm_kernel", 8.0),
    ]
    assert kinds(events) == {
        "attention": 1.0,
        "products": 2.0,
        "copies": 0.5,
        "elementwise": 4.0,
        "norms": 8.0,
    }


def test_a_cards_speed_is_the_median_of_the_timed_steps() -> None:
    slow, fast = (
        [3.0] * (WARM - 1),
        [0.5] * TIMED,
    )  # what a step took, behind the first, which ended at 20 s
    ends = [20.0 + sum((slow + fast)[:step]) for step in range(len(slow + fast) + 1)]
    measured = {
        "targets": [100] * len(ends),
        "ends": ends,
        "seconds": {"rehearse": 0.31},
        "peak": 26.4e9,
    }
    assert row("bloom", measured).split(" | ")[:4] == ["| bloom", "200", "26.40", "20.0"]
