"""How a run ends early: one exception per exit code, with a sentence for the user; never a bug."""

import errno

DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""A disk, a quota, or the size that a file may have."""


class LoopError(Exception):
    """Its text says what is there, what was expected, and what to do."""

    exit_code = 1


class ConfigError(LoopError):
    exit_code = 2  # usage or configuration: nothing was trained


class DataError(LoopError):
    exit_code = 3  # the dataset cannot be trained on: nothing was trained


class CheckpointError(LoopError):
    exit_code = 4  # it does not verify, or belongs to another run: it was left as it was


class EnvironmentFault(LoopError):
    exit_code = 5  # disk, permission or memory: the checkpoints already written are intact


class HubError(LoopError):
    exit_code = 6  # the Hub or the network did not give what was asked for


class NonFiniteError(LoopError):
    exit_code = 7  # a NaN or infinite loss, gradient or weight: nothing of it was saved


class TrainingStateError(LoopError):
    exit_code = 7  # a trained tensor without gradient, a frozen one that changed: silently wrong


class Stopped(KeyboardInterrupt):
    """A signal ended the run early.

    Like an interruption, no `except Exception` of a library swallows it."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # what a shell reports: 129 SIGHUP, 130 SIGINT, 143 SIGTERM
