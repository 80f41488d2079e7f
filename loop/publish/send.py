"""Plan, one commit, then everything downloaded again and compared before it is called there."""

import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftConfig
from transformers import PreTrainedModel

from loop.errors import HubError, Stopped
from loop.finished.evidence import Evidence
from loop.finished.named_model import load_adapter, load_for_inference, logits
from loop.model.base import without_volatile
from loop.model.lora import causal_lm_of
from loop.publish.card import Target, merge_cards
from loop.publish.hub import (
    Hub,
    Remote,
    Sent,
    check_card,
    commit,
    connect,
    create,
    create_branch,
    fetch,
    look,
    open_pull_request,
    tag_commit,
    tagged,
    with_retries,
)
from loop.publish.plan import Plan, pin
from loop.state.files import canonical_json, sha256


def publish(plan: Plan, evidence: Evidence, verify_logits: bool) -> dict[str, Any]:
    """Send what is planned, verify it, and return what `RUN/published.json` says.

    Raises: HubError; Stopped where a signal ended it."""
    hub = connect()
    target = plan.target
    with tempfile.TemporaryDirectory(prefix="loop-publish-") as name:
        downloads = Path(name)
        base_commit = check_base(hub, evidence, target, downloads)
        remote = look(hub, target.repo_id, target.revision)
        check_remote(hub, target, remote)
        plan = with_card_on_hub(hub, pin(plan, evidence, base_commit), remote, downloads)
        check_card(hub, plan.files["README.md"].decode())
        say_what_changes(plan, target, remote)
        base = load_base_on_hub(plan, evidence) if verify_logits else None  # before it is sent
        sent = send(hub, plan, remote)
        adapter = verify(hub, plan, sent, downloads)
        if base is not None:
            check_logits(base, adapter, evidence)
    if target.tag is not None:
        tag_commit(hub, target.repo_id, target.tag, sent.commit)
    url = f"{hub.api.endpoint}/{target.repo_id}"
    where = {"repo_id": target.repo_id, "url": url, **asdict(sent)}
    where |= {"public": target.public, "revision": target.revision, "tag": target.tag}
    about = {"base_model": target.base, "base_commit": base_commit, "step": plan.step}
    published = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {**where, **about, "files": plan.sizes, "published": published}


def check_base(hub: Hub, evidence: Evidence, target: Target, folder: Path) -> str:
    """The commit of the base on the Hub, if its config.json is the one that was trained on.

    Raises: HubError."""
    remote = look(hub, target.base, target.base_commit)
    if remote is None or remote.head is None:
        base = f"the base {target.base} at {target.base_commit or 'main'}"
        raise HubError(f"{base}: not on the Hub, or not for this token")
    path = fetch(hub, target.base, "config.json", remote.head, folder)
    try:
        values = json.loads(path.read_bytes() if path else b"{}")
        actual = sha256(canonical_json(without_volatile(values)))
    except (ValueError, TypeError, AttributeError, RecursionError):
        actual = "no config"
    if actual != evidence.run["identity"]["base_config_sha256"]:
        reason = "its config.json is not that of the base trained on"
        raise HubError(f"the base {target.base} at {remote.head}: {reason}")
    return remote.head


def check_remote(hub: Hub, target: Target, remote: Remote | None) -> None:
    """Raises: HubError where the repository is not as the flags say; nothing is written to it."""
    if remote is None:
        if target.create_pr or target.revision:
            raise HubError(
                f"{target.repo_id}: not there; --create_pr and --revision need a repository"
            )
        return
    if remote.private and target.public:
        raise HubError(f"{target.repo_id} is private; leave --public out, or change it on its page")
    if not remote.private and not target.public:
        raise HubError(f"{target.repo_id} is public; write --public")
    if target.create_pr and remote.head is None:
        raise HubError(f"--create_pr: {target.repo_id} has no branch {target.revision}")


def with_card_on_hub(hub: Hub, plan: Plan, remote: Remote | None, folder: Path) -> Plan:
    """The plan with the card's hand-written part as it is on the Hub."""
    if remote is None or "README.md" not in remote.oids:
        return plan
    path = fetch(hub, plan.target.repo_id, "README.md", remote.head, folder)
    if path is None:
        return plan
    card = merge_cards(plan.files["README.md"].decode(), path.read_bytes().decode(errors="replace"))
    return replace(plan, files={**plan.files, "README.md": card.encode()})


def say_what_changes(plan: Plan, target: Target, remote: Remote | None) -> None:
    """What the plan could not know before it had asked the Hub."""
    lines = []
    if remote is None:
        lines.append(f"Hub       no {target.repo_id} yet: it is made now")
    elif remote.head is None:
        state = f"{target.repo_id} has no branch {target.revision} yet"
        lines.append(f"Hub       {state}: it is made now, from main")
    else:
        others = sorted(remote.oids.keys() - plan.files.keys())
        left = f"; left as they are: {', '.join(others)}" if others else ""
        lines.append(f"Hub       {target.repo_id} at {remote.head}{left}")
    if target.base_commit is None:
        lines.append(f"base      {target.base} at {plan.target.base_commit}")
    if remote is None or not remote.holds(plan.files):
        pinned = ["adapter_config.json"] if target.base_commit is None else []
        for name in [*pinned, "README.md"]:
            content = plan.files[name]
            lines.append(f"send      {name}: {len(content):,} bytes, sha256 {sha256(content)}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def send(hub: Hub, plan: Plan, remote: Remote | None) -> Sent:
    """The commit that holds the plan's files: one that is there already, or a new one.

    Raises: HubError."""
    target = plan.target
    if remote is None:
        create(hub, target.repo_id, target.public)
        remote = look(hub, target.repo_id, None)
        if remote is not None and not remote.oids.keys() <= {".gitattributes"}:
            raise HubError(
                f"{target.repo_id} was made by somebody else meanwhile, and has files; run it again"
            )
    elif target.revision is not None and remote.head is None:
        create_branch(hub, target.repo_id, target.revision)
        remote = look(hub, target.repo_id, target.revision)
    if remote is None or remote.head is None or remote.private == target.public:
        raise HubError(f"{target.repo_id}: made, but not as asked; look at its page")
    there = Sent(remote.head) if remote.holds(plan.files) else None
    if there is None and target.create_pr:
        there = open_pull_request(hub, target.repo_id, plan.files)
    named = tagged(hub, target.repo_id, target.tag) if target.tag is not None else None
    if named not in (None, there and there.commit):
        reason = f"{target.tag} is another commit already; choose another name"
        raise HubError(f"--tag: {reason}; nothing was committed")
    if there is not None:
        state = f"all of it is there already, at {there.commit}"
        print(f"Hub       {state}: nothing was sent", file=sys.stderr, flush=True)
        return there
    message = f"LoRA adapter after {plan.step} steps"
    return commit(
        hub, target.repo_id, plan.files, remote, target.revision, target.create_pr, message
    )


def verify(hub: Hub, plan: Plan, sent: Sent, folder: Path) -> Path:
    """Download everything at the commit and compare it; returns the folder that holds it.

    Raises: HubError."""
    target, here = plan.target, f"{plan.target.repo_id} at {sent.commit}"
    there = folder
    for name, content in plan.files.items():
        path = fetch(hub, target.repo_id, name, sent.commit, folder)
        downloaded = path.read_bytes() if path else None
        there = path.parent if path else there
        if downloaded != content:
            served = "no such file" if downloaded is None else f"sha256 {sha256(downloaded)}"
            both = f"{name} is served as {served}, expected {sha256(content)}"
            raise HubError(f"{here}: {both}; do not use this commit")
    config = with_retries(
        hub,
        f"load {target.repo_id}",
        lambda: PeftConfig.from_pretrained(
            target.repo_id, revision=sent.commit, token=hub.token, cache_dir=folder
        ),
    )
    if (config.base_model_name_or_path, config.revision) != (target.base, target.base_commit):
        raise HubError(f"{here}: PEFT reads the base {config.base_model_name_or_path} from it")
    now = look(hub, target.repo_id, target.revision)
    held = now is not None and (sent.pull_request or now.holds(plan.files))
    if now is None or now.private == target.public or not held:
        reason = "the repository was changed while it was verified"
        raise HubError(f"{here}: {reason}; look at its page")
    return there


def load_base_on_hub(plan: Plan, evidence: Evidence) -> PreTrainedModel:
    """The base by its Hub id, as the run loaded its own; without a token, like a card's reader.

    Raises: HubError."""
    name, revision = plan.target.base, plan.target.base_commit
    config = replace(evidence.config, model_name_or_path=name, model_revision=revision)
    return load_for_inference(config)


def check_logits(base_on_hub: PreTrainedModel, adapter_on_hub: Path, evidence: Evidence) -> None:
    """Base and adapter from the Hub give the logits that they give here. Raises: HubError."""
    there = logits(causal_lm_of(load_adapter(base_on_hub, adapter_on_hub)))
    with tempfile.TemporaryDirectory(prefix="loop-publish-") as name:
        for file, content in evidence.adapter.items():
            (Path(name) / file).write_bytes(content)
        here = logits(causal_lm_of(load_adapter(load_for_inference(evidence.config), Path(name))))
    if not torch.equal(here, there):
        largest = f"{(here - there).abs().max():.3g}"
        reason = f"logits from the Hub differ from the run's by up to {largest}"
        raise HubError(f"{reason}: it is another base; do not use it")
    same = "base and adapter from the Hub give the same as here, bit for bit"
    print(f"logits    {same}", file=sys.stderr, flush=True)


@contextmanager
def interruptions(repo_id: str) -> Iterator[None]:
    """Signals end a publication with a word on what may be on the Hub, and leave no downloads."""

    def stop(number: int, _frame: object) -> NoReturn:
        state = f"{repo_id} may hold the commit, unverified"
        raise Stopped(
            number, f"interrupted: {state}; run the same command again: it looks before it sends"
        )

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
