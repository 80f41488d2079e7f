"""What publishing would send, decided on this machine alone: files by an allow-list, and what
speaks against it."""

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
    """The bytes that would be sent, by name; what stays here; and why it cannot be sent, if it
    cannot."""

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
        reasons = {"left_out": self.left_out, "blocked": [str(error) for error in self.blocked]}
        return {
            **asdict(self.target),
            "step": self.step,
            "files": self.sizes,
            **reasons,
            "card": self.card,
        }

    def lines(self) -> list[str]:
        """For a person: the card as it would stand on the Hub, then what becomes of each file."""
        target = self.target
        branch = f", branch {target.revision}" if target.revision else ""
        how = ("public" if target.public else "private") + (
            ", as a pull request" if target.create_pr else ""
        )
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
    proofs = (
        {"ledger.jsonl": evidence.ledger, "run.json": evidence.run_json} if target.evidence else {}
    )
    files = {**_named_files(evidence, target, bool(tokenizer)), **tokenizer, **proofs}
    public = [target.repo_id, target.base, evidence.run["data"]["name"]]
    wrong_id = any(
        isinstance(error, HubError) for error in blocked
    )  # a path in its place is not the card's fault
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
    return replace(
        plan, target=target, files={**plan.files, **_named_files(evidence, target, own_tokenizer)}
    )


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
        hint = "name it with --base_model OWNER/BASE"
        hint += (
            "; if it is not on the Hub yet: hf upload OWNER/BASE"
            f" {evidence.config.model_name_or_path}"
        )
        errors.append(ConfigError(f"the base is a local folder ({trained['name']}), {hint}"))
    else:
        errors += _wrong_id("--base_model", target.base)
    if target.is_bloom and target.license not in (None, BLOOM_LICENSE):
        reason = (
            f"--license: found {target.license}; {target.base} is under {BLOOM_LICENSE}, which"
            " binds what is derived"
        )
        errors.append(ConfigError(f"{reason} from it; leave it out"))
    if not target.is_bloom and target.license is None:
        errors.append(
            ConfigError(
                "no licence is recorded: write --license ID, as the base's card and the data allow"
            )
        )
    if target.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", target.license):
        errors.append(
            ConfigError(f"--license: found {target.license!r}, expected an id such as apache-2.0")
        )
    if target.revision is not None and (
        ".." in target.revision or not re.fullmatch(r"\w[\w./-]*", target.revision)
    ):
        errors.append(
            ConfigError(f"--revision: found {target.revision!r}, expected the name of a branch")
        )
    if target.tag is not None and not re.fullmatch(r"\w[\w.-]*", target.tag):
        errors.append(
            ConfigError(f"--tag: found {target.tag!r}, expected letters, digits, dots and dashes")
        )
    if target.language is not None and not re.fullmatch(
        r"[a-z]{2,3}|code|multilingual", target.language
    ):
        errors.append(
            ConfigError(f"--language: found {target.language!r}, expected a code such as en")
        )
    return errors


def _wrong_id(flag: str, name: str) -> list[LoopError]:
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("the owner is missing")
        return []
    except HFValidationError as error:
        return [
            HubError(
                f"{flag}: found {name!r:.120}, expected OWNER/NAME:"
                f" {str(error).splitlines()[0]:.120}"
            )
        ]


def _unexpected_entries(folder: Path) -> list[LoopError]:
    """Links, special files and names that may be taken for another, in the folder that is
    published."""
    unexpected = [
        CheckpointError("adapter/ is a link to another folder; put the folder itself there")
    ] * folder.is_symlink()
    for entry in (
        sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() else []
    ):
        plain = (
            entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_nlink == 1
        )
        if not plain and not entry.is_dir(follow_symlinks=False):
            unexpected.append(
                CheckpointError(f"{entry.name!a} in adapter/: a link or a special file; remove it")
            )
        elif not entry.name.isascii() or not entry.name.isprintable():
            unexpected.append(
                CheckpointError(
                    f"{entry.name!a} in adapter/: a name that looks like another; remove it"
                )
            )
    return list(unexpected)


def _tokenizer_files(evidence: Evidence) -> dict[str, bytes]:
    """The tokenizer that training used, where it came from a folder: nothing says that the base's
    id has the same.

    Written anew by the library, so that nothing else of that folder is sent. Raises: LoopError if
    it is gone."""
    folder = Path(evidence.config.model_name_or_path)
    if evidence.run["base"]["commit"] is not None:
        return {}
    if not folder.is_dir():
        raise ConfigError(
            f"the tokenizer: {folder.name}, the folder that the run read it from, is not there any"
            " more"
        )
    try:
        tokenizer = load_tokenizer(evidence.config)
    except (
        AttributeError,
        TypeError,
    ) as error:  # the library's, of a file that holds JSON of another kind
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
        inside = (
            sorted(entry.iterdir())
            if entry.name == "adapter" and not entry.is_symlink()
            else [entry]
        )
        for path in inside:
            name = str(path.relative_to(evidence.folder))
            if name not in sent:
                folder = path.is_dir() and not path.is_symlink()
                files_in = (
                    f"/ ({sum(len(names) for _, _, names in os.walk(path))} files)"
                    if folder
                    else ""
                )
                lines.append(ascii(name)[1:-1] + (" (a link)" if path.is_symlink() else files_in))
    return lines
