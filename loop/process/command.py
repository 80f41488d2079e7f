"""How a command starts and how it ends: its exit code and its last words. Nothing heavy is imported
here."""

import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from loop.errors import LoopError, Stopped

_PEER_ENDED = "another process ended; its own message says why"


def launched_processes() -> int:
    """How many processes the launcher started, known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(module: str) -> NoReturn:
    """Import a command's module, run its `main` on the command line, and exit.

    The import takes seconds, in which nothing is at stake: Ctrl-C just ends them, without a
    word."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # not where nohup or a parent has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # at its import it recommends a package for inference
    main: Callable[[list[str]], None] = importlib.import_module(module).main
    signal.signal(signal.SIGINT, usual)
    sys.exit(run_command(lambda: main(sys.argv[1:]), debug="--debug" in sys.argv))


def run_command(command: Callable[[], None], debug: bool = False) -> int:
    """Run a command to its exit code. The last line on stderr is one sentence; a bug also shows its
    traceback."""
    try:
        command()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, code = _last_words(error)
        if debug or (code == 1 and message != _PEER_ENDED):
            traceback.print_exception(error)
        elif isinstance(error, (LoopError, Stopped)) or message == _PEER_ENDED:
            error.__traceback__ = error.__cause__ = (
                None  # expected: the launcher shall quote the sentence only
            )
        if launched_processes() > 1:  # the launcher has the last word, and quotes this
            importlib.import_module(_ELASTIC_ERRORS).get_error_handler().record_exception(error)
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, (LoopError, Stopped)):
            print(f"error: {message}", file=sys.stderr, flush=True)
        return code


_ELASTIC_ERRORS = "torch.distributed.elastic.multiprocessing.errors"


def _last_words(error: BaseException) -> tuple[str, int]:
    """One sentence and the exit code."""
    torch: Any = sys.modules.get(
        "torch"
    )  # a command that ended before it was imported did not fail by it
    if isinstance(error, (LoopError, Stopped)):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was saved before is intact", 130
    if torch is not None:
        memory = importlib.import_module("loop.process.memory")
        if memory.is_out_of_memory(error):
            peak = (
                memory.peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
                / 2**30
            )
            knobs = "micro_batch_tokens (auto finds it) or max_length"
            hint = f"lower {knobs}, or set gradient_checkpointing or load_in_4bit: true"
            return f"out of memory after a peak of {peak:.1f} GiB; {hint}", 5
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"{error.filename or 'output_dir'}: {error.strerror}; what was saved before is intact",
            5,
        )
    if (torch is not None and isinstance(error, torch.distributed.DistError)) or "by peer" in str(
        error
    ):
        return _PEER_ENDED, 1
    return f"a bug of this program: {type(error).__name__}: {error}", 1
