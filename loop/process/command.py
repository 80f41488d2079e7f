"""How a command starts and ends: its exit code and last words. Nothing heavy is imported here."""

import errno
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from loop.config.command_line import parse_command_line
from loop.config.flags import generate_flags, merge_flags, publish_flags
from loop.errors import DISK_IS_FULL, LoopError, Stopped

_PEER_ENDED = "another process ended; its own message says why"
_ELASTIC_ERRORS = "torch.distributed.elastic.multiprocessing.errors"
_DISK = DISK_IS_FULL | {errno.EIO, errno.EROFS}


def launched_processes() -> int:
    """How many processes the launcher started, known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Command(NamedTuple):
    """What `python -m loop` says of it, and what is done before its module is imported."""

    module: str  # its `main` takes the words behind the command
    about: str
    check: Callable[[list[str]], object]  # without torch: refuses a typo, and answers `--help`
    if_memory_ends: str = "take a smaller model, or a machine with more memory"


def _training(words: list[str]) -> object:
    return parse_command_line(words, launched_processes())


_TRAINING_IN_LESS = (
    "lower micro_batch_tokens (auto finds it) or max_length, or set gradient_checkpointing or"
    " load_in_4bit: true"
)
COMMANDS = {
    "train": Command(
        "loop.train", "fine-tune an adapter, or go on with it", _training, _TRAINING_IN_LESS
    ),
    "generate": Command("loop.generate", "continue prompts with a run or a model", generate_flags),
    "publish": Command("loop.publish.__main__", "send an adapter to the Hub", publish_flags),
    "merge": Command("loop.merge", "write base and adapter as one model", merge_flags),
}


def start(name: str) -> NoReturn:
    """Run a command on this process's command line, and exit.

    Its module is imported only where the words can be read: that takes seconds, in which nothing
    is at stake, so Ctrl-C just ends them, without a word."""
    command, words = COMMANDS[name], sys.argv[1:]

    def run() -> None:
        command.check(words)
        is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # nohup ignores it
        if is_usual:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        # At its import it recommends a package for inference.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        main = importlib.import_module(command.module).main
        if is_usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main(words)

    sys.exit(run_command(run, "--debug" in words, command.if_memory_ends))


def run_command(
    command: Callable[[], None], debug: bool = False, if_memory_ends: str = _TRAINING_IN_LESS
) -> int:
    """Run a command to its exit code.

    What went wrong stands last on stderr, a line for each thing, said by one process of several; a
    bug also shows its traceback."""
    try:
        command()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, code = _last_words(error, if_memory_ends)
        if debug or (code == 1 and message != _PEER_ENDED):
            traceback.print_exception(error)
        elif isinstance(error, (LoopError, Stopped)) or message == _PEER_ENDED:
            # Expected: the launcher shall quote the sentence only.
            error.__traceback__ = error.__cause__ = None
        if launched_processes() > 1:  # the launcher has the last word, and quotes this
            importlib.import_module(_ELASTIC_ERRORS).get_error_handler().record_exception(error)
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, (LoopError, Stopped)):
            print(f"error: {message}", file=sys.stderr, flush=True)
        return code


def _last_words(error: BaseException, if_memory_ends: str) -> tuple[str, int]:
    """One sentence and the exit code."""
    # A command that ended before torch was imported did not fail by it.
    torch: Any = sys.modules.get("torch")
    if isinstance(error, (LoopError, Stopped)):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was saved before is intact", 130
    if torch is not None:
        memory = importlib.import_module("loop.process.memory")
        if memory.is_out_of_memory(error):
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            peak = memory.peak_memory(device) / 2**30
            return f"out of memory after a peak of {peak:.1f} GiB; {if_memory_ends}", 5
    if isinstance(error, OSError) and error.errno is not None:
        nameless = "output_dir: " if error.errno in _DISK else ""
        file = f"{error.filename}: " if error.filename else nameless
        return f"{file}{error.strerror}; what was saved before is intact", 5
    is_torn = torch is not None and isinstance(error, torch.distributed.DistError)
    if is_torn or "by peer" in str(error):
        return _PEER_ENDED, 1
    return f"a bug of this program: {type(error).__name__}: {error}", 1
