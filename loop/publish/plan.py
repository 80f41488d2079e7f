"""What publishing would send, decided offline: files of an allow-list, and reasons against it."""

import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from loop.data.tokenizer import load_tokenizer, tokenizer_sha256
from loop.errors import CheckpointError, ConfigError, HubError, LoopError
from loop.finished.adapter_check import check_adapter, read_adapter_config
from loop.finished.evidence import Evidence
from loop.publish.card import BLOOM_LICENSE, Target, make_card
from loop.publish.scan import findings
from loop.state.files import sha256

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
_VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"}


@dataclass(frozen=True)
class Plan:
    """The bytes that would be sent, by name; what stays here; and any reason not to send them."""

    target: Target
    step: int
    files: dict[str, bytes]
    left_out: list[str]
    blocked: list[LoopError]

    @property
    def card(self) -> str:
        """The card, to be shown; not where something in it must not be."""
        if any(str(error).startswith("README.md:") for error in self.blocked):
            return "(not shown: it holds what must not be published, see BLOCKED)"
        return self.files["README.md"].decode().rstrip()

    @property
    def sizes(self) -> dict[str, dict[str, Any]]:
        """`bytes` and `sha256` of each file."""
        return {
            name: {"bytes": len(content), "sha256": sha256(content)}
            for name, content in self.files.items()
        }

    def as_json(self) -> dict[str, Any]:
        contents = {"step": self.step, "files": self.sizes, "left_out": self.left_out}
        reasons = {"blocked": [str(error) for error in self.blocked]}
        return {**asdict(self.target), **contents, **reasons, "card": self.card}

    def lines(self) -> list[str]:
        """For a person: the card as it would stand on the Hub, then what becomes of each file."""
        target = self.target
        branch = f", branch {target.revision}" if target.revision else ""
        how = "public" if target.public else "private"
        how += ", as a pull request" if target.create_pr else ""
        pinned = target.base_commit or "main, whose commit is looked up before anything is sent"
        hashes = {name: sha256(content) for name, content in self.files.items()}
        if target.base_commit is None:
            hashes |= dict.fromkeys(("adapter_config.json", "README.md"), "depends on that commit")
        return [
            f"----- README.md\n{self.card}\n-----",
            f"to        {target.repo_id}{branch}, {how}",
            f"base      {target.base} at {pinned}",
            *(
                f"send      {name}: {len(self.files[name]):,} bytes, sha256 {known}"
                for name, known in hashes.items()
            ),
            *(f"left out  {name}" for name in self.left_out),
        ]


def make_plan(evidence: Evidence, target: Target) -> Plan:
    """The plan of publishing this state of a run to `target`. Uses no network and leaves no file.

    Raises: CheckpointError if the adapter's config is no JSON."""
    read_adapter_config(evidence.adapter["adapter_config.json"])
    blocked = [*_wrong_target(evidence, target), *_unexpected_entries(evidence.folder / "adapter")]
    try:
        check_adapter(evidence.adapter, evidence.run)
    except CheckpointError as error:
        blocked.append(error)
    tokenizer: dict[str, bytes] = {}
    try:
        tokenizer = _tokenizer_files(evidence)
    except LoopError as error:
        blocked.append(error)
    files = {**_named_files(evidence, target, bool(tokenizer)), **tokenizer}
    if target.evidence:
        files |= {"ledger.jsonl": evidence.ledger, "run.json": evidence.run_json}
    public = [target.repo_id, target.base, evidence.run["data"]["name"]]
    # A path in place of an id is not the card's fault.
    wrong_id = any(isinstance(error, HubError) for error in blocked)
    for name, content in files.items():
        if not (name.endswith(".safetensors") or (wrong_id and name == "README.md")):
            text = content.decode(errors="replace")
            lines = findings(name, text, public, vocabulary=name in _VOCABULARIES)
            blocked += [ConfigError(f"{line}; remove it where it comes from") for line in lines]
    return Plan(target, evidence.step, files, _left_out(evidence, files), blocked)


def pin(plan: Plan, evidence: Evidence, base_commit: str) -> Plan:
    """The plan with the base's commit, once the Hub has said it; no file is read again."""
    target = replace(plan.target, base_commit=base_commit)
    own_tokenizer = any(name in plan.files for name in TOKENIZER_FILES)
    files = {**plan.files, **_named_files(evidence, target, own_tokenizer)}
    return replace(plan, target=target, files=files)


def _named_files(evidence: Evidence, target: Target, own_tokenizer: bool) -> dict[str, bytes]:
    """The adapter under its base's public name, and the card."""
    config = json.loads(evidence.adapter["adapter_config.json"])
    named = {**config, "base_model_name_or_path": target.base, "revision": target.base_commit}
    adapter = {
        "adapter_config.json": (json.dumps(named, indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": evidence.adapter["adapter_model.safetensors"],
    }
    return {**adapter, "README.md": make_card(evidence, target, adapter, own_tokenizer).encode()}


def _wrong_target(evidence: Evidence, target: Target) -> list[LoopError]:
    """What the flags ask for and cannot be had."""
    errors, trained = _wrong_id("--repo_id", target.repo_id), evidence.run["base"]
    if trained["commit"] is not None:
        if (target.base, target.base_commit) != (trained["name"], trained["commit"]):
            hint = f"trained on {trained['name']} at {trained['commit']}; leave it out"
            errors.append(ConfigError(f"--base_model: found {target.base}, the run was {hint}"))
    elif target.base == trained["name"]:
        upload = f"hf upload OWNER/BASE {evidence.config.model_name_or_path}"
        hint = f"name it with --base_model OWNER/BASE; if it is not on the Hub yet: {upload}"
        errors.append(ConfigError(f"the base is a local folder ({trained['name']}), {hint}"))
    else:
        errors += _wrong_id("--base_model", target.base)
    if target.is_bloom and target.license not in (None, BLOOM_LICENSE):
        both = f"found {target.license}; {target.base} is under {BLOOM_LICENSE}"
        hint = "which binds what is derived from it; leave it out"
        errors.append(ConfigError(f"--license: {both}, {hint}"))
    if not target.is_bloom and target.license is None:
        hint = "write --license ID, as the base's card and the data allow"
        errors.append(ConfigError(f"no licence is recorded: {hint}"))
    for flag, value, pattern, expected in (
        ("--license", target.license, r"[a-z0-9][a-z0-9.-]*", "an id such as apache-2.0"),
        ("--revision", target.revision, r"(?!.*\.\.)\w[\w./-]*", "the name of a branch"),
        ("--tag", target.tag, r"\w[\w.-]*", "letters, digits, dots and dashes"),
        ("--language", target.language, r"[a-z]{2,3}|code|multilingual", "a code such as en"),
    ):
        if value is not None and not re.fullmatch(pattern, value):
            errors.append(ConfigError(f"{flag}: found {value!r}, expected {expected}"))
    return errors


def _wrong_id(flag: str, name: str) -> list[LoopError]:
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("the owner is missing")
        return []
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
        return [HubError(f"{flag}: found {name!r:.120}, expected OWNER/NAME: {reason:.120}")]


def _unexpected_entries(folder: Path) -> list[LoopError]:
    """Links, special files and names that may be taken for another, in the published folder."""
    reasons = []
    if folder.is_symlink():
        reasons.append("adapter/ is a link to another folder; put the folder itself there")
    entries = list(os.scandir(folder)) if folder.is_dir() else []
    for entry in sorted(entries, key=lambda entry: entry.name):
        links = entry.stat(follow_symlinks=False).st_nlink
        plain = entry.is_file(follow_symlinks=False) and links == 1
        if not plain and not entry.is_dir(follow_symlinks=False):
            reasons.append(f"{entry.name!a} in adapter/: a link or a special file; remove it")
        elif not entry.name.isascii() or not entry.name.isprintable():
            reasons.append(f"{entry.name!a} in adapter/: a name that looks like another; remove it")
    return [CheckpointError(reason) for reason in reasons]


def _tokenizer_files(evidence: Evidence) -> dict[str, bytes]:
    """The tokenizer that training used, if it came from a folder: the base's id may have another.

    Written anew by the library, so that nothing else of that folder is sent.
    Raises: LoopError if it is gone."""
    folder = Path(evidence.config.model_name_or_path)
    if evidence.run["base"]["commit"] is not None:
        return {}
    if not folder.is_dir():
        source = f"{folder.name}, the folder that the run read it from"
        raise ConfigError(f"the tokenizer: {source}, is not there any more")
    try:
        tokenizer = load_tokenizer(evidence.config)
    except (AttributeError, TypeError) as error:  # the library's, for JSON of another kind
        raise ConfigError(f"the tokenizer in {folder.name} cannot be read: {error}") from error
    if tokenizer_sha256(tokenizer) != evidence.run["base"]["tokenizer_sha256"]:
        raise ConfigError(
            f"the tokenizer in {folder.name} is not the one that the run used; restore it"
        )
    with tempfile.TemporaryDirectory(prefix="loop-publish-") as name:
        tokenizer.save_pretrained(name)
        return {
            path.name: path.read_bytes()
            for path in sorted(Path(name).iterdir())
            if path.name in TOKENIZER_FILES
        }


def _left_out(evidence: Evidence, files: dict[str, bytes]) -> list[str]:
    """What else lies in the run's folder; a folder counts as one entry, links are not followed."""
    sent = {f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")}
    sent |= {name for name in ("ledger.jsonl", "run.json") if name in files}
    lines = []
    for entry in sorted(evidence.folder.iterdir()):
        is_open = entry.name == "adapter" and not entry.is_symlink()
        for path in sorted(entry.iterdir()) if is_open else [entry]:
            name = str(path.relative_to(evidence.folder))
            if name not in sent:
                kind = " (a link)" if path.is_symlink() else ""
                if path.is_dir() and not path.is_symlink():
                    kind = f"/ ({sum(len(names) for _, _, names in os.walk(path))} files)"
                lines.append(ascii(name)[1:-1] + kind)
    return lines
