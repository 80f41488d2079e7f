"""The flags of the commands on a finished run; those of training are the knobs."""

import argparse
from pathlib import Path

from loop.config.command_line import CommandParser, underscored
from loop.errors import ConfigError

_RUN = "a finished run, or RUN/checkpoints/step-000200"


def generate_flags(argv: list[str]) -> argparse.Namespace:
    """Raises: ConfigError that lists every number out of range; SystemExit(0) after `--help`."""
    about = "Continue --prompt, or each line of stdin up to its end or an empty line."
    note = "Nothing is done against repetition: what repeats itself is the model."
    parser = _parser("generate", about, note)
    add = parser.add_argument
    named = "a run, RUN/checkpoints/step-N, a model's folder or Hub id"
    add("named", metavar="RUN|MODEL", help=named)
    add("--prompt", metavar="TEXT", help="the text to continue (default: lines of stdin)")
    tokens = "at most so many tokens behind the prompt (default 40)"
    add("--max_new_tokens", type=int, default=40, metavar="N", help=tokens)
    greedy = "0 takes the likeliest token, above 0 draws from all of them (default 0)"
    add("--temperature", type=float, default=0.0, metavar="T", help=greedy)
    seed = "of the draws, anew each prompt (default 42)"
    add("--seed", type=int, default=42, metavar="N", help=seed)
    add("--base", action="store_true", help="without the adapter: what the run started from")
    add("--json", action="store_true", help="one JSON object a line instead of text")
    options = parser.parse_args([underscored(word) for word in argv])
    wrong = [
        f"--{name}: found {value}, expected {least} or more, and less than 2**32"
        for name, least in (("max_new_tokens", 1), ("temperature", 0), ("seed", 0))
        if not least <= (value := getattr(options, name)) < 2**32
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return options


def merge_flags(argv: list[str]) -> argparse.Namespace:
    """Raises: ConfigError; SystemExit(0) after `--help`."""
    about = (
        "Merge an adapter into its base, unquantized, as sharded safetensors with the tokenizer."
    )
    parser = _parser("merge", about)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run, or RUN/checkpoints/step-N")
    add("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    dtype = "of the base and of what is written (default: the run's)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=dtype)
    return parser.parse_args([underscored(word) for word in argv])


def publish_flags(argv: list[str]) -> argparse.Namespace:
    """Raises: ConfigError; SystemExit(0) after `--help`."""
    about = "Publish an adapter, private unless --public: one commit, then verified."
    parser = _parser("publish", about)
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help=_RUN)
    repo_id = "the repository; made if it is not there"
    add("--repo_id", required=True, metavar="OWNER/NAME", help=repo_id)
    add("--public", action="store_true", help="for everybody to see (default: private)")
    add("--create_pr", action="store_true", help="as a pull request")
    add("--revision", metavar="BRANCH", help="made if it is not there (default: main)")
    add("--tag", metavar="TAG", help="a name for the commit")
    dry_run = "end after the plan, with 0: no token, no network"
    add("--dry_run", action="store_true", help=dry_run)
    base = "the base on the Hub, if the run read it from a folder"
    add("--base_model", metavar="OWNER/BASE[@COMMIT]", help=base)
    add("--license", metavar="ID", help="of the adapter; BLOOM's is inherited")
    add("--language", metavar="CODE", help="of the text, such as en")
    add("--evidence", action="store_true", help="publish ledger.jsonl and run.json too")
    logits = "load base and adapter from the Hub and compare"
    add("--verify_logits", action="store_true", help=logits)
    add("--json", action="store_true", help="plan and outcome as one JSON object")
    if any("\ud800" <= character <= "\udfff" for word in argv for character in word):
        raise ConfigError("found a flag that is not UTF-8")
    return parser.parse_args([underscored(word) for word in argv])


def _parser(command: str, about: str, note: str | None = None) -> CommandParser:
    name = f"loop.{command}"
    parser = CommandParser(prog=name, description=about, epilog=note, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
