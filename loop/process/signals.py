"""Signals: noted when they come, acted on between two steps, so that a stop is a checkpoint."""

import os
import signal
import stat
import sys
import threading
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loop.errors import Stopped

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""All but SIGUSR1, which saves and goes on, end the run; a launcher that is gone is a SIGHUP."""


_GRACE = 5.0
"""Seconds that the main thread has to end a run before step 0; the launcher would kill after 30."""


class Request(NamedTuple):
    """What somebody outside wants of the run, now that a step is done."""

    stop: int  # the signal that ends the run, or 0
    save: bool  # a checkpoint now


class Signals:
    """Within `with Signals():` the four are caught; before `defer` they end the run at once."""

    def __init__(self) -> None:
        self._heard: set[int] = set()
        self._deferred = False
        self._left = threading.Event()
        self._previous: dict[int, Any] = {}
        self._watcher: threading.Thread | None = None
        # accelerate launch always sets this variable, and nobody else does.
        self._launcher = os.getppid() if "ACCELERATE_DYNAMO_BACKEND" in os.environ else None

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._previous[number] = signal.signal(number, self._catch)
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._watcher is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writer)  # the end of what the watcher reads
            self._watcher.join()
            os.close(self._reader)

    def defer(self) -> None:
        """From now on a signal waits for the end of the step. A second SIGINT does not."""
        self._deferred = True

    def flags(self, device: torch.device) -> Tensor:
        """1 for each of SIGNALS that came, to be summed: processes may hear in different steps."""
        orphaned = {signal.SIGHUP} if self._launcher not in (None, os.getppid()) else set()
        heard = self._heard | orphaned
        flags = torch.tensor([float(number in heard) for number in SIGNALS])
        return flags.to(device, non_blocking=True)

    def take(self, counts: list[float]) -> Request:
        """What the summed flags ask for; a save that is granted here is not asked for again."""
        stops = [number for number, count in zip(SIGNALS[:-1], counts) if count > 0]
        if counts[-1] > 0:  # one that came after the flags were read waits for the next step
            self._heard.discard(signal.SIGUSR1)
        return Request(stop=max(stops, default=0), save=counts[-1] > 0)

    def _watch(self) -> None:
        """End the process where a signal before step 0 finds the main thread inside a library.

        No Python handler runs there, and NCCL waits for a process that has refused to start until
        the launcher kills it. The byte of a signal comes through the pipe at once."""
        while byte := os.read(self._reader, 1):
            number = byte[0]
            if number not in SIGNALS[:-1] or self._deferred or self._left.wait(_GRACE):
                continue
            if not self._deferred:
                name = signal.Signals(number).name
                reason = "before the first step, inside a library: nothing was trained or saved"
                _write_to_terminal(f"error: {name} {reason}\n")
                os._exit(128 + number)

    def _catch(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._heard:
            if hasattr(sys, "ps1"):  # a notebook: its kernel lives on
                raise KeyboardInterrupt
            os.write(2, b"error: interrupted twice, left at once; the last checkpoint is intact\n")
            os._exit(128 + number)
        self._heard.add(number)
        name = signal.Signals(number).name
        if number != signal.SIGUSR1 and not self._deferred:
            reason = "before the first step of this session: it trained and saved nothing"
            raise Stopped(number, f"{name} {reason}")
        what = "saving" if number == signal.SIGUSR1 else "stopping"
        line = f"\n{name}: {what} after this step\n"
        _write_to_terminal(line if os.environ.get("RANK", "0") == "0" else "")


def _write_to_terminal(text: str) -> None:
    """Write to the terminal; if that is gone, no later line shall fail because of it."""
    try:
        os.write(2, text.encode())
    except OSError:
        for output in (1, 2):
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)
