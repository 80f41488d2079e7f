"""`python -m loop` lists the commands; each is a console script too, `loop-train` and so on."""

import sys
from functools import partial

from loop.process.command import COMMANDS, start

train, generate, publish, merge = (partial(start, name) for name in COMMANDS)


def main() -> None:
    """A line for each command; `python -m loop train` is `python -m loop.train`."""
    if sys.argv[1:] and sys.argv[1] in COMMANDS:
        start(sys.argv.pop(1))
    print("usage: python -m loop.COMMAND --help\n")
    for name, command in COMMANDS.items():
        print(f"  python -m loop.{name:9} {command.about}")
    print("\ntraining on several processes, GPUs or machines goes through the launcher:\n")
    print("  accelerate launch --config_file launch_configs/cpu_2.yaml -m loop.train --config demo")
    if sys.argv[1:] and sys.argv[1] not in ("-h", "--help"):
        sys.exit(f"error: no command is named {sys.argv[1]!r}; it is one of {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
