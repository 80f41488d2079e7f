"""`python -m loop` lists the commands; each is a console script too, `loop-train` and so on."""

from functools import partial

from loop.process.command import COMMANDS, start

train, generate, publish, merge = (partial(start, name) for name in COMMANDS)


def main() -> None:
    """A line for each command."""
    print("usage: python -m loop.COMMAND --help\n")
    for name, command in COMMANDS.items():
        print(f"  python -m loop.{name:9} {command.about}")
    print("\ntraining on several processes, GPUs or machines goes through the launcher:\n")
    print("  accelerate launch --config_file launch_configs/cpu_2.yaml -m loop.train --config demo")


if __name__ == "__main__":
    main()
