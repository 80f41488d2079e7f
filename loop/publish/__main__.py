"""The adapter of a run on the Hub: `python -m loop.publish RUN --repo_id OWNER/NAME`.

The only command that reads a token or writes to the network. `--dry_run` ends after the plan and
needs neither."""

if (
    __name__ == "__main__"
):  # what is imported below takes seconds; `start` imports this file by its name
    from loop.process.command import start

    start("loop.publish.__main__")

import argparse
import io
import json
import os
import sys
from pathlib import Path

from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers.utils.logging import disable_progress_bar

from loop.config.command_line import CommandParser, underscored
from loop.errors import ConfigError, EnvironmentFault
from loop.finished.evidence import Evidence, read_evidence
from loop.process.anonymous import anonymous
from loop.publish.card import Target
from loop.publish.plan import Plan, make_plan
from loop.publish.send import interruptions, publish
from loop.state.files import replace_file


def refuse_if_blocked(plan: Plan) -> None:
    """Raises: the kind of the first reason, with all reasons; nothing has left the machine."""
    if plan.blocked:
        reasons = "\n".join(f"BLOCKED: {error}" for error in plan.blocked)
        raise type(plan.blocked[0])(f"nothing was sent, because of {len(plan.blocked)}:\n{reasons}")


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Raises: ConfigError; SystemExit(0) after `--help`."""
    about = (
        "Publish the adapter of a finished run, or of a checkpoint. Private unless --public; one"
        " commit; verified."
    )
    parser = CommandParser(prog="loop.publish", description=about, allow_abbrev=False)
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="a finished run, or RUN/checkpoints/step-000200"
    )
    parser.add_argument(
        "--repo_id",
        required=True,
        metavar="OWNER/NAME",
        help="the repository; made if it is not there",
    )
    parser.add_argument(
        "--public", action="store_true", help="for everybody to see (default: private)"
    )
    parser.add_argument("--create_pr", action="store_true", help="as a pull request")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="the branch; made if it is not there (default: main)"
    )
    parser.add_argument("--tag", metavar="TAG", help="a name for the commit")
    parser.add_argument(
        "--dry_run", action="store_true", help="end after the plan, with 0: no token, no network"
    )
    parser.add_argument(
        "--base_model",
        metavar="OWNER/BASE[@COMMIT]",
        help="the base on the Hub, if the run read it from a folder",
    )
    parser.add_argument("--license", metavar="ID", help="of the adapter; BLOOM's is inherited")
    parser.add_argument("--language", metavar="CODE", help="of the text, such as en")
    parser.add_argument(
        "--evidence", action="store_true", help="publish ledger.jsonl and run.json too"
    )
    parser.add_argument(
        "--verify_logits",
        action="store_true",
        help="load base and adapter from the Hub and compare",
    )
    parser.add_argument(
        "--json", action="store_true", help="the plan and what came of it as one JSON object"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if any("\ud800" <= character <= "\udfff" for word in argv for character in word):
        raise ConfigError("a flag that is not UTF-8")
    return parser.parse_args([underscored(word) for word in argv])


def make_target(options: argparse.Namespace, evidence: Evidence) -> Target:
    """Where the flags say that it goes; the base is the run's own unless a folder's was named."""
    base, _, base_commit = (options.base_model or "").partition("@")
    trained = evidence.run["base"]
    return Target(
        repo_id=options.repo_id,
        base=base or trained["name"],
        base_commit=base_commit or (trained["commit"] if base in ("", trained["name"]) else None),
        public=options.public,
        revision=options.revision,
        create_pr=options.create_pr,
        tag=options.tag,
        license=options.license,
        language=options.language,
        evidence=options.evidence,
    )


@anonymous()
def main(argv: list[str]) -> None:
    """`python -m loop.publish`: the plan, and unless it is a dry run what came of it."""
    options = parse_options(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a card has typographic quotes, a terminal may not
    disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    evidence = read_evidence(options.run)
    plan = make_plan(evidence, make_target(options, evidence))
    published = None
    if not options.dry_run and not os.access(evidence.folder, os.W_OK):
        raise EnvironmentFault(
            f"{evidence.folder}: published.json cannot be written there; nothing was sent"
        )
    if not options.json:
        print("\n".join(plan.lines()), flush=True)
    if not options.dry_run and not plan.blocked:
        with interruptions(options.repo_id):
            published = publish(plan, evidence, options.verify_logits)
    if options.json:
        print(
            json.dumps({**plan.as_json(), "published": published}, ensure_ascii=False), flush=True
        )
    elif published is not None:
        print(
            f"published and verified: {published['pull_request'] or published['url']}, commit"
            f" {published['commit']}"
        )
    if published is not None:
        content = json.dumps(published, indent=2, sort_keys=True) + "\n"
        replace_file(evidence.folder / "published.json", content.encode())
    if not options.dry_run:
        refuse_if_blocked(plan)
    elif not options.json:
        print("".join(f"BLOCKED: {error}\n" for error in plan.blocked), end="")
        print(
            "dry run: nothing was sent; the token, the base and the repository are looked at when"
            " it is"
        )
