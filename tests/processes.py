"""Real runs of `loop.train` in processes of their own, forked from a server that has imported the
libraries.

What a process runs is what `python -m loop.train` runs: `run_command` around `main`. Only the
import is spared.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from loop.run.prepare import Run

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.conftest", "loop.train", "tests.preload"])


@dataclass
class Launched:
    """The processes of one run, and the file that all of them write to."""

    processes: list[BaseProcess]
    log: Path

    def wait(self, timeout: float = 240) -> list[int | None]:
        """Exit codes; processes that are still there at the end of `timeout` are killed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL to all of them at once."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def start(
    argv: list[str],
    log: Path,
    num_processes: int = 1,
    environment: dict[str, str] | None = None,
    alter: Callable[[Run], Run] | None = None,
) -> Launched:
    """Start a run on `num_processes` processes; gloo where there are several."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log.parent.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(num_processes):
        places = dict(environment or {})
        if num_processes > 1:
            places |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
            places |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "LOCAL_WORLD_SIZE": str(num_processes),
            }
        process = SERVER.Process(target=_run, args=(argv, places, str(log), alter))
        process.start()
        processes.append(process)
    return Launched(processes, log)


def start_altered(
    alter: Callable[[Run], Run], argv: list[str], log: Path, num_processes: int = 1
) -> Launched:
    """Like `start`, with one thing done to the run on every process, between preparing and training
    it."""
    return start(argv, log, num_processes, alter=alter)


def run(
    argv: list[str], log: Path, num_processes: int = 1, environment: dict[str, str] | None = None
) -> Launched:
    """Run to the end. Raises: AssertionError with the output unless every process exits with 0."""
    launched = start(argv, log, num_processes, environment)
    codes = launched.wait()
    assert codes == [0] * num_processes, f"{codes}\n{launched.text()}"
    return launched


@pytest.fixture(autouse=True)
def no_run_outlives_its_test() -> Iterator[None]:
    """A test that fails leaves a run behind; pytest would wait for it at the end."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def wait_until(happens: Callable[[], bool], launched: Launched, timeout: float = 60) -> bool:
    """Poll without pause until `happens`; False if the run ended before."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if happens():
            return True
        if not launched.alive():
            return False
    raise AssertionError(f"nothing happened in {timeout} s\n{launched.text()}")


def _run(
    argv: list[str],
    environment: dict[str, str],
    log: str,
    alter: Callable[[Run], Run] | None = None,
) -> None:
    os.setsid()
    for number in (
        signal.SIGHUP,
        signal.SIGTERM,
        signal.SIGUSR1,
    ):  # as a terminal gives them, nohup or not
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from loop.process.command import run_command
    from loop.train import main

    if alter:
        module = sys.modules["loop.train"]
        prepare = module.prepare_run
        module.prepare_run = lambda *arguments: alter(prepare(*arguments))
    code = run_command(lambda: main(argv))
    sys.exit(code)


def run_without_network(main: Callable[[list[str]], None] | None = None) -> None:
    """A command, `loop.train` unless given, with the words behind -c; any use of the network ends
    it with 99.

    An audit hook cannot be taken off, by us or by a library that swallows exceptions.
    """

    def refuse(event: str, _arguments: object) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            os.write(2, f"used the network: {event}\n".encode())
            os._exit(99)

    sys.addaudithook(refuse)
    from loop.process.command import run_command
    from loop.train import main as train

    sys.exit(run_command(lambda: (main or train)(sys.argv[1:])))
