import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.errors import CheckpointError
from loop.state.ledger import Ledger, LedgerPosition, read_ledger

START = hashlib.sha256(b"an identity").hexdigest()
ENTRIES: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 6.5, "eval_target_tokens": 760},
    {"step": 0, "epoch": 0, "rows": [27, 5], "loss": 6.9, "learning_rate": 0.01},
    {"step": 1, "epoch": 0, "rows": [30, 24], "loss": 6.8, "learning_rate": 1e-05},
    {"step": 2, "epoch": 1, "rows": [], "loss": 0.1 + 0.2, "learning_rate": 0.0},
]


def lines_of(entries: list[dict[str, Any]], previous: str = START) -> list[bytes]:
    """The specification once more, in other words: hash the line without `hash`, then put it in."""
    lines = []
    for entry in entries:
        fields = ",".join(
            f'"{key}":{json.dumps(value, separators=(",", ":"))}' for key, value in entry.items()
        )
        unsealed = f'{{{fields},"prev":"{previous}"}}'
        previous = hashlib.sha256(unsealed.encode("ascii")).hexdigest()
        lines.append(f'{unsealed[:-1]},"hash":"{previous}"}}\n'.encode("ascii"))
    return lines


def position_after(lines: list[bytes]) -> LedgerPosition:
    head = json.loads(lines[-1])["hash"] if lines else START
    return LedgerPosition(len(lines), sum(len(line) for line in lines), head)


def write(
    path: Path, entries: list[dict[str, Any]], start: LedgerPosition | None = None
) -> LedgerPosition:
    ledger = Ledger(path, start or LedgerPosition(0, 0, START))
    for entry in entries:
        ledger.append(entry)
    position = ledger.sync()
    ledger.close()
    return position


LINES = lines_of(ENTRIES)
END = position_after(LINES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(LINES))
    return tmp_path / "ledger.jsonl"


def test_a_line_is_these_bytes(tmp_path: Path) -> None:
    write(
        tmp_path / "ledger.jsonl",
        [{"step": 0, "rows": [3, 1], "loss": 0.5}],
        LedgerPosition(0, 0, "00ff"),
    )
    # sha256 of {"step":0,"rows":[3,1],"loss":0.5,"prev":"00ff"}, by the command line's sha256sum
    head = "bb0d8a1df6847cb7984bdcde617abad7d42dcbb526658dd22735df3bac2ee86f"
    line = f'{{"step":0,"rows":[3,1],"loss":0.5,"prev":"00ff","hash":"{head}"}}\n'
    assert (tmp_path / "ledger.jsonl").read_text() == line


def test_the_lines_are_chained_from_the_identity_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert write(path, ENTRIES) == END
    assert path.read_bytes() == b"".join(LINES)
    assert json.loads(LINES[0])["prev"] == START
    assert json.loads(LINES[2])["prev"] == json.loads(LINES[1])["hash"]


def test_a_line_is_with_the_operating_system_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", LedgerPosition(0, 0, START))
    for number, entry in enumerate(ENTRIES, start=1):
        ledger.append(entry)
        assert (tmp_path / "ledger.jsonl").read_bytes() == b"".join(LINES[:number])
        assert ledger.position == position_after(LINES[:number])
    ledger.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_line(tmp_path: Path, value: float) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", LedgerPosition(0, 0, START))
    with pytest.raises(ValueError, match="not JSON compliant"):
        ledger.append({"step": 0, "loss": value})
    ledger.close()
    assert (tmp_path / "ledger.jsonl").read_bytes() == b""


@pytest.mark.parametrize("number", range(5))
def test_a_verified_ledger_gives_its_entries_up_to_the_position(path: Path, number: int) -> None:
    entries = read_ledger(path, START, position_after(LINES[:number]))
    assert [
        {key: entry[key] for key in entry if key not in ("prev", "hash")} for entry in entries
    ] == ENTRIES[:number]


def test_a_ledger_of_another_identity_is_refused_at_its_first_line(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl: line 1 does not follow"):
        read_ledger(path, hashlib.sha256(b"another identity").hexdigest(), END)


@pytest.mark.parametrize(
    ("tamper", "number"),
    [
        (lambda lines: [lines[0], lines[1].replace(b"6.9", b"5.9"), *lines[2:]], 2),
        (lambda lines: [lines[0].replace(b"760", b"761"), *lines[1:]], 1),
        (lambda lines: [lines[0], *lines[2:]], 2),  # removed
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], 2),  # swapped
        (lambda lines: [lines[0], lines[0], *lines[1:]], 2),  # repeated
        (lambda lines: [*lines[:2], b"\n", *lines[2:]], 3),
        (lambda lines: [*lines[:3], b"[1]\n"], 4),
        (lambda lines: [*lines[:3], b"\xff\n"], 4),
        (lambda lines: [*lines[:3], b"[" * 90_000 + b"\n"], 4),
        (lambda lines: [*lines[:3], lines[3].replace(b"\n", b"\r\n")], 4),
        (lambda lines: [*lines[:2], lines[2].replace(b'"epoch"', b' "epoch"'), lines[3]], 3),
        (lambda lines: [*lines[:2], lines[2].replace(b'"loss"', b'"loss":1.0,"loss"'), lines[3]], 3),  # a key twice
        (lambda lines: [*lines[:3], lines[3][:-1]], 4),  # the end of line is missing
        (lambda lines: [*lines[:3], lines[3][:40]], 4),  # torn
        # An edited line that was sealed again breaks the chain at the next one.
        (lambda lines: [lines[0], *lines_of([{"step": 0}], json.loads(lines[0])["hash"]), *lines[2:]], 3),
    ],
)  # fmt: skip
def test_a_line_that_does_not_follow_is_refused_with_its_number(
    path: Path, tamper: Callable[[list[bytes]], list[bytes]], number: int
) -> None:
    content = b"".join(tamper(LINES))
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"ledger\.jsonl: line {number} does not follow from the line before"
    ):
        read_ledger(path, START, LedgerPosition(4, len(content), END.head))


@given(offset=st.integers(0, END.bytes - 1), bits=st.integers(1, 255))
@settings(derandomize=True, max_examples=150)
def test_any_changed_byte_is_refused(
    tmp_path_factory: pytest.TempPathFactory, offset: int, bits: int
) -> None:
    content = bytearray(b"".join(LINES))
    content[offset] ^= bits
    path = tmp_path_factory.getbasetemp() / "changed.jsonl"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"changed\.jsonl: "):
        read_ledger(path, START, END)


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_ledger_shorter_than_the_checkpoint_needs_is_refused_with_both_lengths(
    path: Path, lines: int
) -> None:
    path.write_bytes(b"".join(LINES[:lines]))
    with pytest.raises(
        CheckpointError, match=f"{lines} whole lines, the checkpoint was written after 4$"
    ):
        read_ledger(path, START, END)


def test_a_missing_ledger_is_refused_unless_nothing_is_needed_of_it(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"0 whole lines, the checkpoint was written after 4$"
    ):
        read_ledger(tmp_path / "ledger.jsonl", START, END)
    assert read_ledger(tmp_path / "ledger.jsonl", START, LedgerPosition(0, 0, START)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        LedgerPosition(3, END.bytes, END.head),
        LedgerPosition(4, END.bytes, START),
        LedgerPosition(4, END.bytes + 1, END.head),
        LedgerPosition(4, 2**70, END.head),
    ],
)  # fmt: skip
def test_a_position_that_is_not_that_of_the_chain_is_refused(
    path: Path, wrong: LedgerPosition
) -> None:
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl: "):
        read_ledger(path, START, wrong)


def test_going_on_from_a_position_cuts_what_stands_behind_it_and_chains_on(path: Path) -> None:
    two = position_after(LINES[:2])
    with path.open("ab") as file:
        file.write(b'{"step":3,"los')  # torn by a kill
    assert write(path, ENTRIES[2:], start=two) == END
    assert path.read_bytes() == b"".join(LINES)


def test_what_stands_behind_the_position_need_not_verify(path: Path) -> None:
    path.write_bytes(b"".join(LINES[:2]) + b"garbage without an end")
    assert len(read_ledger(path, START, position_after(LINES[:2]))) == 2
