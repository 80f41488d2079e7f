"""The adapter of a run on the Hub: `python -m loop.publish RUN --repo_id OWNER/NAME`.

The only command that reads a token or writes to the network.
`--dry_run` ends after the plan and needs neither."""

if __name__ == "__main__":  # the imports below take seconds; `start` imports this file by its name
    from loop.process.command import start

    start("publish")

import argparse
import io
import json
import os
import sys

from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers.utils.logging import disable_progress_bar

from loop.config.flags import publish_flags
from loop.errors import EnvironmentFault
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
    options = publish_flags(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A card has typographic quotes, a terminal may not.
        sys.stdout.reconfigure(errors="backslashreplace")
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
        answer = {**plan.as_json(), "published": published}
        print(json.dumps(answer, ensure_ascii=False), flush=True)
    elif published is not None:
        where = published["pull_request"] or published["url"]
        print(f"published and verified: {where}, commit {published['commit']}")
    if published is not None:
        content = json.dumps(published, indent=2, sort_keys=True) + "\n"
        replace_file(evidence.folder / "published.json", content.encode())
    if not options.dry_run:
        refuse_if_blocked(plan)
    elif not options.json:
        print("".join(f"BLOCKED: {error}\n" for error in plan.blocked), end="")
        print(
            "dry run: nothing was sent;"
            " the token, the base and the repository are looked at when it is"
        )
