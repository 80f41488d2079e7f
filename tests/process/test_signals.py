"""Signals to real runs: each ends in a checkpoint or in nothing, and the same command goes on to
the same bytes."""

import contextlib
import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from loop.errors import Stopped
from loop.process.signals import Signals
from tests.conftest import flags
from tests.process.test_launcher import ROOT, launch_words, user_environment
from tests.processes import Launched, no_run_outlives_its_test, run, start, wait_until
from tests.test_train import assert_same_run

__all__ = ["no_run_outlives_its_test"]  # an autouse fixture acts where it is imported

SIGHUP, SIGINT, SIGTERM, SIGUSR1 = signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
CPU = torch.device("cpu")
Straight = Callable[..., Path]


# Signals, in this process


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    """Every test starts from what a terminal gives, also where pytest runs behind & or under
    nohup."""
    given = dict.fromkeys((SIGHUP, SIGTERM, SIGUSR1), signal.SIG_DFL) | {
        SIGINT: signal.default_int_handler
    }
    before = {number: signal.signal(number, handler) for number, handler in given.items()}
    yield
    found = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert found == given


@pytest.mark.parametrize(
    ("number", "exit_code", "message"),
    [
        (SIGHUP, 129, "SIGHUP before the first step of this session: it trained and saved nothing"),
        (SIGINT, 130, "SIGINT before the first step of this session: it trained and saved nothing"),
        (
            SIGTERM,
            143,
            "SIGTERM before the first step of this session: it trained and saved nothing",
        ),
    ],
)
def test_before_the_first_step_a_signal_ends_the_run_at_once(
    number: int, exit_code: int, message: str
) -> None:
    with Signals(), pytest.raises(Stopped) as stopped:
        signal.raise_signal(number)
    assert (stopped.value.exit_code, str(stopped.value)) == (exit_code, message)
    assert not isinstance(stopped.value, Exception)  # which a library might swallow


@pytest.mark.parametrize(
    ("number", "found", "said"),
    [
        (SIGHUP, [1.0, 0.0, 0.0, 0.0], "\nSIGHUP: stopping after this step\n"),
        (SIGINT, [0.0, 1.0, 0.0, 0.0], "\nSIGINT: stopping after this step\n"),
        (SIGTERM, [0.0, 0.0, 1.0, 0.0], "\nSIGTERM: stopping after this step\n"),
        (SIGUSR1, [0.0, 0.0, 0.0, 1.0], "\nSIGUSR1: saving after this step\n"),
    ],
)
def test_in_a_step_a_signal_is_noted_and_said_once(
    number: int,
    found: list[float],
    said: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Signals() as signals:
        signals.defer()
        assert signals.flags(CPU).tolist() == [0.0, 0.0, 0.0, 0.0]
        signal.raise_signal(number)
        assert signals.flags(CPU).tolist() == found
        assert signals.flags(CPU).tolist() == found  # a step of fp16 that is repeated asks again
    with Signals() as signals:
        signals.defer()
        monkeypatch.setenv("RANK", "1")  # of several processes only the first says so
        signal.raise_signal(number)
    assert capfd.readouterr() == ("", said)


def test_sigusr1_before_the_first_step_is_a_checkpoint_after_it() -> None:
    with Signals() as signals:
        signal.raise_signal(SIGUSR1)
        signals.defer()
        assert signals.flags(CPU).tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("heard", "stop_signal", "save_now"),
    [
        ([0.0, 0.0, 0.0, 0.0], 0, False),
        ([1.0, 0.0, 0.0, 0.0], 1, False),
        ([0.0, 2.0, 0.0, 0.0], 2, False),
        ([0.0, 0.0, 4.0, 0.0], 15, False),
        ([0.0, 0.0, 0.0, 1.0], 0, True),
        ([1.0, 1.0, 1.0, 1.0], 15, True),
        ([1.0, 3.0, 0.0, 0.0], 2, False),
    ],
)
def test_what_was_heard_on_any_process_is_asked_of_all(
    heard: list[float], stop_signal: int, save_now: bool
) -> None:
    assert Signals().take(heard) == (stop_signal, save_now)


def test_sigusr1_saves_once_and_a_stop_stays_asked_for() -> None:
    with Signals() as signals:
        signals.defer()
        signal.raise_signal(SIGUSR1)
        assert signals.take(signals.flags(CPU).tolist()) == (0, True)
        assert signals.take(signals.flags(CPU).tolist()) == (0, False)
        signal.raise_signal(SIGTERM)
        assert signals.take(signals.flags(CPU).tolist()) == (15, False)
        assert signals.take(signals.flags(CPU).tolist()) == (15, False)


def test_sigusr1_after_the_flags_of_its_step_were_taken_is_heard_in_the_next() -> None:
    with Signals() as signals:
        signals.defer()
        taken = signals.flags(CPU).tolist()
        signal.raise_signal(
            SIGUSR1
        )  # while the gradients cross processes and the adapter is updated
        assert signals.take(taken) == (0, False)
        assert signals.take(signals.flags(CPU).tolist()) == (0, True)


def test_a_second_sigint_in_a_notebook_ends_the_cell_and_not_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)  # what an interactive Python has
    with Signals() as signals:
        signals.defer()
        signal.raise_signal(SIGINT)
        with pytest.raises(KeyboardInterrupt) as interrupted:
            signal.raise_signal(SIGINT)
    assert not isinstance(interrupted.value, Stopped)


@pytest.mark.parametrize("launched", [True, False])
def test_a_launcher_that_is_gone_counts_as_a_hangup(
    launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # anybody may set it
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # only the launcher does, and always
    with Signals() as signals:
        signals.defer()
        assert signals.flags(CPU).tolist() == [0.0, 0.0, 0.0, 0.0]
        monkeypatch.setattr(os, "getppid", lambda: 1)  # whom the kernel gives an orphan to
        assert signals.flags(CPU).tolist() == [1.0 if launched else 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("number", [SIGHUP, SIGINT, SIGTERM, SIGUSR1])
def test_a_signal_that_was_ignored_on_entry_stays_ignored(number: int) -> None:
    before = signal.signal(
        number, signal.SIG_IGN
    )  # nohup does it to SIGHUP, a shell to SIGINT of what runs behind &
    try:
        with Signals() as signals:
            signal.raise_signal(number)
            assert signal.getsignal(number) == signal.SIG_IGN
            assert signals.flags(CPU).tolist() == [0.0, 0.0, 0.0, 0.0]
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_thread_that_is_not_the_main_one_installs_nothing_and_runs() -> None:
    before = [signal.getsignal(number) for number in (SIGHUP, SIGINT, SIGTERM, SIGUSR1)]
    found: list[Any] = []

    def inside() -> None:
        with Signals() as signals:
            signals.defer()
            found.append(
                [signal.getsignal(number) for number in (SIGHUP, SIGINT, SIGTERM, SIGUSR1)]
            )
            found.append(signals.take(signals.flags(CPU).tolist()))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [before, (0, False)]


# Signals to real runs


@pytest.fixture(scope="module")
def knobs(bloom: Path, ragged: Path) -> dict[str, Any]:
    """Enough steps that no run ends before its signal; nothing is saved on the way but at a
    signal."""
    return {
        "model_name_or_path": bloom, "dataset_name": ragged, "max_length": 128, "micro_batch_tokens": 256,
        "global_batch_size": 8, "max_steps": 40, "learning_rate": 0.01, "lora_r": 4, "lora_dropout": 0.1,
        "lora_target_modules": "all-linear", "eval_fraction": 0.1, "eval_steps": 7, "save_steps": 1000,
    }  # fmt: skip


@pytest.fixture(scope="module")
def straight(knobs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """The uninterrupted run with these knobs on so many processes; each is made once."""
    made: dict[str, Path] = {}

    def of(num_processes: int = 1, **changed: Any) -> Path:
        key = f"{num_processes} {sorted(changed.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("straight")
            run(
                flags({**knobs, **changed, "output_dir": folder / "run"}),
                folder / "log",
                num_processes,
            )
            made[key] = folder / "run"
        return made[key]

    return of


def kinds(folder: Path) -> list[str]:
    """Of each whole line of the ledger: step or evaluation."""
    path = folder / "ledger.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return ["step" if b'"target_tokens"' in line else "evaluation" for line in lines]


def steps_done(folder: Path) -> int:
    return kinds(folder).count("step")


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def newest(folder: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((int(name.removeprefix("step-")) for name in checkpoints(folder)), default=0)


def send(launched: Launched, number: int, process: int = 0) -> None:
    os.kill(launched.processes[process].pid or 0, number)


def goes_on(folder: Path, launched: Launched) -> bool:
    """Wait for two steps more than there are."""
    before = steps_done(folder)
    return wait_until(lambda: steps_done(folder) >= before + 2, launched)


def assert_resumes_to(
    expected: Path, folder: Path, argv: list[str], num_processes: int = 1
) -> None:
    """The same command again ends as the run that nobody interrupted, and leaves nothing half
    written."""
    run(argv, folder.parent / "log-resumed", num_processes)
    assert_same_run(folder, expected)
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]


@pytest.mark.runs
@pytest.mark.parametrize(("num_processes", "to"), [(1, 0), (2, 0), (2, 1), (4, 2)])
def test_a_signal_to_one_process_ends_all_in_a_checkpoint_and_the_same_command_goes_on(
    num_processes: int, to: int, knobs: dict[str, Any], straight: Straight, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = flags({**knobs, "output_dir": folder})
    for number, name, code in (
        (SIGTERM, "SIGTERM", 143),
        (SIGINT, "SIGINT", 130),
        (SIGHUP, "SIGHUP", 129),
    ):
        launched = start(argv, tmp_path / name, num_processes)
        assert goes_on(folder, launched), launched.text()
        send(launched, number, to)
        at = steps_done(folder)
        assert launched.wait(60) == [code] * num_processes, launched.text()
        done = steps_done(folder)
        # One more step, and another where it came after this step's flags were taken.
        assert at <= done <= at + 2
        assert newest(folder) == done
        last = f"error: {name}: saved after step {done} of 40; the same command goes on from there"
        assert launched.text().splitlines()[-1] == last
        assert "Traceback" not in launched.text()
        assert (folder / ".lock").read_bytes() == b""
    assert_resumes_to(straight(num_processes), folder, argv, num_processes)


@pytest.mark.runs
@pytest.mark.parametrize(("num_processes", "to"), [(1, 0), (2, 1)])
def test_a_signal_in_an_evaluation_lets_it_end_and_then_one_step(
    num_processes: int,
    to: int,
    knobs: dict[str, Any],
    straight: Straight,
    ragged: Path,
    tmp_path: Path,
) -> None:
    rows = [json.loads(line)["text"] for line in ragged.read_text(encoding="utf-8").splitlines()]
    many = (
        tmp_path / "many.jsonl"
    )  # an evaluation takes some tenths of a second, a step some thousandths
    many.write_text(
        "".join(json.dumps({"text": f"{i} {row}"}) + "\n" for i in range(5) for row in rows)
    )
    changed = {"dataset_name": many, "eval_fraction": 0.9, "eval_steps": 1, "max_steps": 3}
    folder = tmp_path / "run"
    argv = flags({**knobs, **changed, "output_dir": folder})
    launched = start(argv, tmp_path / "log", num_processes)
    # The ledger ends in a step: its evaluation goes on.
    assert wait_until(lambda: kinds(folder)[-1:] == ["step"], launched), launched.text()
    send(launched, SIGTERM, to)
    assert kinds(folder) == ["evaluation", "step"]
    assert launched.wait(60) == [143] * num_processes, launched.text()
    assert kinds(folder) == ["evaluation", "step", "evaluation", "step", "evaluation"]
    assert checkpoints(folder) == ["step-000002"]
    assert_resumes_to(straight(num_processes, **changed), folder, argv, num_processes)


@pytest.mark.runs
@pytest.mark.parametrize(("num_processes", "to"), [(1, 0), (2, 1)])
def test_each_sigusr1_is_one_checkpoint_and_the_run_goes_on_to_the_same_bytes(
    num_processes: int, to: int, knobs: dict[str, Any], straight: Straight, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    launched = start(
        flags({**knobs, "save_total_limit": 100, "output_dir": folder}),
        tmp_path / "log",
        num_processes,
    )
    for count in range(1, 6):
        assert goes_on(folder, launched), launched.text()
        send(launched, SIGUSR1, to)
        at = steps_done(folder)
        assert wait_until(lambda: len(checkpoints(folder)) == count, launched), launched.text()  # noqa: B023
        assert newest(folder) <= at + 2
    assert launched.wait() == [0] * num_processes, launched.text()
    assert len(checkpoints(folder)) == 6
    assert checkpoints(folder)[-1] == "step-000040"
    assert launched.text().count("SIGUSR1: saving after this step") == (5 if to == 0 else 0)
    assert_same_run(folder, straight(num_processes))


@pytest.mark.runs
def test_a_second_sigint_ends_the_run_in_the_middle_of_a_step(
    knobs: dict[str, Any], straight: Straight, tmp_path: Path
) -> None:
    slow = {"global_batch_size": 120, "micro_batch_tokens": 128, "max_steps": 2, "save_steps": 1}
    folder = tmp_path / "run"
    argv = flags({**knobs, **slow, "output_dir": folder})
    launched = start(argv, tmp_path / "log")
    assert wait_until(lambda: checkpoints(folder) == ["step-000001"], launched), launched.text()
    send(launched, SIGINT)
    assert wait_until(lambda: "SIGINT: stopping after this step" in launched.text(), launched), (
        launched.text()
    )
    send(launched, SIGINT)
    assert launched.wait(60) == [130]
    last = "error: interrupted twice, left at once; the last checkpoint is intact"
    assert launched.text().splitlines()[-1] == last
    assert (steps_done(folder), checkpoints(folder)) == (1, ["step-000001"])
    assert_resumes_to(straight(**slow), folder, argv)


@pytest.mark.runs
def test_two_sigints_while_a_checkpoint_is_written_leave_the_older_one_whole(
    knobs: dict[str, Any], straight: Straight, tmp_path: Path
) -> None:
    large = {"lora_r": 64, "max_steps": 14, "save_steps": 1}
    folder = tmp_path / "run"
    argv = flags({**knobs, **large, "output_dir": folder})
    torn = 0
    for session in range(4):
        before = steps_done(folder)
        launched = start(argv, tmp_path / f"log-{session}")
        half_written = (folder / "checkpoints").glob
        happened = wait_until(
            lambda: steps_done(folder) > before and bool(list(half_written(".tmp-*"))),  # noqa: B023
            launched,
        )
        assert happened, launched.text()
        send(launched, SIGINT)
        time.sleep(0.001)  # two at once are one
        if launched.alive():
            send(launched, SIGINT)
        assert launched.wait(60) == [130], launched.text()
        assert "Traceback" not in launched.text()
        assert "passed over" not in launched.text()
        assert newest(folder) >= steps_done(folder) - 1
        torn += bool(list(half_written(".tmp-*")))
    assert torn > 0, "no run was interrupted while it wrote"
    assert_resumes_to(straight(**large), folder, argv)


@pytest.mark.runs
def test_a_terminal_that_is_closed_ends_the_run_in_a_checkpoint_though_nobody_reads_its_words(
    knobs: dict[str, Any], straight: Straight, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = flags({**knobs, "output_dir": folder})
    terminal, inside = os.openpty()
    os.set_blocking(terminal, False)
    launched = subprocess.Popen(
        [sys.executable, "-m", "loop.train", *argv], cwd=ROOT, stdin=inside, stdout=inside, stderr=inside,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(inside)
    said = b""
    while steps_done(folder) < 2 and launched.poll() is None:
        time.sleep(0.01)
        with contextlib.suppress(BlockingIOError):
            said += os.read(terminal, 4096)  # or the run would wait for its reader
    os.close(terminal)
    assert launched.wait(60) == 129, said
    assert newest(folder) == steps_done(folder)
    assert_resumes_to(straight(), folder, argv)


# While a run is loading, and when it is done


@pytest.mark.runs
@pytest.mark.parametrize(
    ("num_processes", "to", "number", "name", "code"),
    [
        (1, 0, SIGTERM, "SIGTERM", 143),
        (1, 0, SIGINT, "SIGINT", 130),
        (2, 0, SIGHUP, "SIGHUP", 129),
        (2, 1, SIGTERM, "SIGTERM", 143),
    ],
)
def test_a_signal_while_loading_ends_the_run_within_seconds_and_leaves_nothing_half_written(
    num_processes: int, to: int, number: int, name: str, code: int,
    knobs: dict[str, Any], straight: Straight, tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    argv = flags({**knobs, "output_dir": folder})
    waits = random.Random(to)
    for session, (file, longest) in enumerate(
        [(".lock", 0.0), (".lock", 0.2), ("run.json", 0.0), ("run.json", 0.03)]
    ):
        before, saved = content(folder / file), checkpoints(folder)
        launched = start(argv, tmp_path / f"log-{session}", num_processes)
        assert wait_until(lambda: content(folder / file) != before, launched), launched.text()  # noqa: B023
        time.sleep(
            waits.uniform(0, longest)
        )  # the model, the data, the rehearsal; any moment has its outcome below
        send(launched, number, to)
        sent = time.monotonic()
        codes, text = launched.wait(20), launched.text()
        assert time.monotonic() - sent < 5, text
        # The lock is the main process's: another may not have come to its `Signals` yet, and the
        # kernel ends it.
        early = {-number} if to > 0 and file == ".lock" else set()
        assert codes[to] in {code} | early, text
        assert "Traceback" not in text
        if checkpoints(folder) != saved:  # the steps had begun: a stop like any other
            done = steps_done(folder)
            assert codes == [code] * num_processes
            assert newest(folder) == done
            assert (
                f"error: {name}: saved after step {done} of 40; the same command goes on from there"
                in text
            )
        else:  # before the first step the others do not hear of it; they see that one is gone
            assert set(codes) <= {code, 1} | early
            said = (
                f"error: {name} before the first step of this session: it trained and saved nothing"
            )
            assert to > 0 or said in text.splitlines()
            assert not (folder / "adapter").exists()
        assert content(folder / ".lock") == b""
    assert_resumes_to(straight(num_processes), folder, argv, num_processes)


def content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


@pytest.mark.runs
@pytest.mark.parametrize(("number", "codes"), [(SIGTERM, {143, -15}), (SIGHUP, {129, -1})])
def test_a_signal_before_anything_is_loaded_leaves_nothing_to_clean_up(
    number: int, codes: set[int], knobs: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    launched = start(flags({**knobs, "output_dir": folder}), tmp_path / "log")
    assert wait_until(launched.log.exists, launched)
    send(launched, number)  # before `Signals` the kernel ends the process, without a word
    assert set(launched.wait(20)) <= codes
    # The next start sweeps what proves that the folder can be written.
    assert {path.name for path in folder.rglob("*")} <= {
        ".lock",
        "checkpoints",
        ".probe",
        ".tmp-.probe",
    }


ENDS: dict[str, Callable[[Path], bool]] = {
    "last step": lambda folder: steps_done(folder) >= 18,
    "last evaluation": lambda folder: steps_done(folder) == 20,
    "last checkpoint": lambda folder: "step-000020" in checkpoints(folder),
    "adapter": lambda folder: (folder / "adapter").exists(),
}


@pytest.mark.runs
@pytest.mark.parametrize(
    ("num_processes", "at"),
    [
        (1, "last step"),
        (1, "last evaluation"),
        (1, "adapter"),
        (2, "last step"),
        (2, "last checkpoint"),
    ],
)
def test_a_signal_at_the_very_end_loses_nothing(
    num_processes: int, at: str, knobs: dict[str, Any], straight: Straight, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = flags({**knobs, "max_steps": 20, "output_dir": folder})
    launched = start(argv, tmp_path / "log", num_processes)
    if wait_until(lambda: ENDS[at](folder), launched):
        for process in range(num_processes):
            if launched.processes[process].is_alive():
                send(launched, SIGTERM, process)
    codes = set(launched.wait(60))
    # After the last step there is nothing to stop. -15: all was done, and Python was on its way
    # out.
    assert codes <= {0, -15} or (codes, at) == ({143}, "last step"), launched.text()
    assert checkpoints(folder) == [f"step-{steps_done(folder):06d}"]
    assert_resumes_to(straight(num_processes, max_steps=20), folder, argv, num_processes)


# One process of several is lost


@pytest.mark.runs
@pytest.mark.parametrize("lost", [0, 1])
def test_one_process_killed_ends_the_other_with_one_sentence_and_no_torn_checkpoint_is_chosen(
    lost: int, knobs: dict[str, Any], straight: Straight, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = flags({**knobs, "save_steps": 2, "output_dir": folder})
    moments = random.Random(lost)
    for session in range(3):
        launched = start(argv, tmp_path / f"log-{session}", 2)
        assert goes_on(folder, launched), launched.text()
        time.sleep(moments.uniform(0, 0.05))
        send(launched, signal.SIGKILL, lost)
        codes = launched.wait(60)
        assert codes == ([-9, 1] if lost == 0 else [1, -9])
        assert (
            launched.text().splitlines()[-1]
            == "error: another process ended; its own message says why"
        )
        assert "Traceback" not in launched.text()
        assert "passed over" not in launched.text()
        assert newest(folder) >= steps_done(folder) - 2
    assert "passed over" not in run(argv, tmp_path / "resumed", 2).text()
    assert_same_run(folder, straight(2))


@pytest.mark.runs
@pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="only Linux limits the files of another process"
)
def test_a_full_disk_of_one_process_ends_both_and_is_what_the_user_reads(
    knobs: dict[str, Any], straight: Straight, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = flags({**knobs, "save_steps": 5, "output_dir": folder})
    launched = start(argv, tmp_path / "log", 2)
    assert wait_until(lambda: checkpoints(folder) != [], launched), launched.text()
    limit = (folder / "checkpoints" / "step-000005" / "optimizer.safetensors").stat().st_size - 1
    resource.prlimit(launched.processes[0].pid or 0, resource.RLIMIT_FSIZE, (limit, limit))
    assert launched.wait(60) == [5, 1], launched.text()
    said = [line for line in launched.text().splitlines() if line.startswith("error: ")]
    assert "File too large; what was saved before is intact" in said[0]
    assert said[1:] == ["error: another process ended; its own message says why"]
    assert "Traceback" not in launched.text()
    assert_resumes_to(straight(2), folder, argv, 2)


# Through the launcher


@pytest.mark.runs
@pytest.mark.parametrize(
    ("launch_config", "processes", "ends"),
    [
        # accelerate starts one process in its own session and process group, and waits for it.
        ("cpu.yaml", 1, {"SIGTERM": "SIGHUP", "Ctrl-C": "SIGINT", "SIGKILL": "SIGHUP"}),
        # torch starts each in a session of its own, and passes SIGTERM and SIGINT on.
        ("cpu_2.yaml", 2, {"SIGTERM": "SIGTERM", "Ctrl-C": "SIGINT", "SIGKILL": "SIGHUP"}),
    ],
)
def test_a_signal_to_the_launcher_ends_its_processes_in_a_checkpoint(
    launch_config: str,
    processes: int,
    ends: dict[str, str],
    knobs: dict[str, Any],
    straight: Straight,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    argv = flags({**knobs, "max_steps": 200, "output_dir": folder})
    words = launch_words(launch_config, argv)
    words[words.index("-m") : words.index("-m")] = ["--num_cpu_threads_per_process", "1"]
    environment = {**user_environment(), "OMP_NUM_THREADS": "1"}
    for sent, heard in ends.items():
        before = steps_done(folder)
        with (tmp_path / sent).open("wb") as log:
            launcher = subprocess.Popen(
                words, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        while steps_done(folder) < before + 2 and launcher.poll() is None:
            time.sleep(0.01)
        assert launcher.poll() is None, (tmp_path / sent).read_text()
        workers = psutil.Process(launcher.pid).children(recursive=True)
        assert len(workers) == processes
        if sent == "Ctrl-C":  # a terminal sends it to all in the foreground
            os.killpg(launcher.pid, SIGINT)
        else:
            launcher.send_signal(signal.Signals[sent])
        _, alive = psutil.wait_procs(workers, timeout=20)
        for worker in alive:
            worker.kill()
        text = (tmp_path / sent).read_text()
        assert not alive, f"{sent}: still there after 20 s\n{text}"
        assert launcher.wait(60) != 0
        done = steps_done(folder)
        assert newest(folder) == done
        said = (
            f"error: {heard}: saved after step {done} of 200; the same command goes on from there"
        )
        assert said in text.splitlines(), sent
        assert done < 200, "the run ended before its last signal"
    assert_resumes_to(straight(processes, max_steps=200), folder, argv, processes)


STUCK = """
import ctypes, sys, threading
import loop.process.signals
from loop.process.signals import Signals

assert 2 <= loop.process.signals._GRACE < 30  # the launcher kills after 30
loop.process.signals._GRACE = 1.0

mutex = ctypes.create_string_buffer(64)
with Signals() as signals:
    if sys.argv[1] == "deferred":
        signals.defer()
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    threading.Timer(1.0, print, ["stuck"], {"flush": True}).start()
    lock(mutex)  # waits for ever, and no signal wakes it
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of glibc is 40 bytes of zeros")
def test_a_process_that_is_stuck_inside_a_library_before_step_0_ends_by_itself() -> None:
    words = [sys.executable, "-c", STUCK, "before"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143
    assert errors.endswith(
        "SIGTERM before the first step, inside a library: nothing was trained or saved\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of glibc is 40 bytes of zeros")
def test_from_step_0_on_it_is_left_to_finish_its_step() -> None:
    words = [sys.executable, "-c", STUCK, "deferred"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)  # longer than the grace, which is 1 second here
    process.kill()
    process.communicate()
