"""The arithmetic of the benchmark. That it is fast is no test: see the README's table and the command beside it."""

import pytest

from tests.benchmark.__main__ import speed, table
from tests.benchmark.peers import PEERS, Clock
from tests.benchmark.work import ROWS_PER_STEP, minimal_flops


def found(targets: int, seconds: float, memory: int) -> dict[str, object]:
    """Three steps of `targets` targets and `seconds` seconds each, behind a first one that took 10 s."""
    ends = [10.0 + seconds * step for step in range(3)]
    counts = {"targets": [targets] * 3, "tokens": [targets] * 3, "padded": [2 * targets] * 3}
    return {"ends": ends, **counts, "peak_memory_bytes": memory}


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
        "trainer": [found(100, 1.0, 4_000_000_000), found(100, 2.0, 4_000_000_000), found(100, 1.0, 4_000_000_000)],
        "this loop": [found(250, 1.0, 1_000_000_000)],
    }
    last = table("R", {"trainer": 4, "this loop": 1024}, results, rate=264_241_152 * 1000).splitlines()[-1]
    assert last == "| this loop | 1,024 tokens | 250 | 2.50 | 1.00 GB | 0.25 | 10.0 s | 50% | 25% |"


def test_clock_counts_each_step_by_its_own_forwards() -> None:
    clock = Clock()
    clock.saw(5, 6, 8)
    clock.saw(1, 2, 8)
    clock.step()
    clock.saw(7, 8, 9)
    clock.step()
    assert (clock.targets, clock.tokens, clock.padded) == ([6, 7], [8, 8], [16, 9])


def test_steps_of_every_padded_peer_are_of_as_many_rows_and_what_leaks_is_labelled() -> None:
    assert all(ROWS_PER_STEP % micro == 0 for name in ("trainer", "trl", "plain") for micro in PEERS[name].micro)
    assert [name for name, peer in PEERS.items() if peer.other_update] == [
        "trl, padding-free",
        "trl, packed",
        "plain, blocks",
    ]
