"""A checkpoint: step, adapter and the optimizer's moments, with a manifest that proves them."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from loop.errors import CheckpointError, NonFiniteError
from loop.state.files import (
    canonical_json,
    commit_folder,
    read_canonical_json,
    read_regular_file,
    remove_folder,
    sha256,
)
from loop.state.ledger import LedgerPosition

FORMAT_VERSION = 1
FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json")
_MANIFEST_LIMIT = 1 << 20
_NAME = re.compile(r"step-(\d{6,12})")


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` updates; all else is a function of the identity and the step."""

    step: int
    identity: dict[str, Any]
    ledger: LedgerPosition
    adapter_config: bytes
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    environment: dict[str, Any] = field(default_factory=dict)
    """What the bits depend on beside the identity: a resume under another one says so."""

    def adapter_files(self) -> dict[str, bytes]:
        """The two files that PEFT loads."""
        weights = serialize(self.adapter, {"format": "pt"})
        return {"adapter_config.json": self.adapter_config, "adapter_model.safetensors": weights}


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-NNNNNN`: its files, then the manifest, each flushed; then one rename.

    Killed at any moment it leaves nothing or the whole checkpoint, and the older ones untouched.
    Raises: NonFiniteError before anything is written; EnvironmentFault with nothing left behind."""
    for name, tensor in [*checkpoint.adapter.items(), *checkpoint.optimizer.items()]:
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"step {checkpoint.step}: {name} is not finite; this state was not saved"
            )
    state = {"environment": checkpoint.environment, "format_version": FORMAT_VERSION}
    state |= {"identity": checkpoint.identity, "step": checkpoint.step}
    files = checkpoint.adapter_files()
    files["optimizer.safetensors"] = serialize(checkpoint.optimizer)
    files["state.json"] = canonical_json(state)
    manifest = {
        "files": {
            name: {"bytes": len(content), "sha256": sha256(content)}
            for name, content in files.items()
        },
        "format_version": FORMAT_VERSION,
        "identity_sha256": sha256(canonical_json(checkpoint.identity)),
        "ledger": asdict(checkpoint.ledger),
        "step": checkpoint.step,
    }
    manifest["manifest_sha256"] = sha256(canonical_json(manifest))
    files["manifest.json"] = canonical_json(manifest)
    path = folder / f"step-{checkpoint.step:06d}"
    commit_folder(path, files)
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify: only what the manifest proves is believed, and nothing is executed.

    Raises: CheckpointError that names the file. The caller's model has not been touched."""
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path}: found no folder, expected a checkpoint")
    manifest = _read_manifest(path)
    unexpected = {entry.name for entry in path.iterdir()} ^ {*FILES, "manifest.json"}
    if unexpected:
        raise CheckpointError(f"{path}: missing or unexpected: {', '.join(sorted(unexpected))}")
    contents = {name: _read_proven(path / name, manifest["files"][name]) for name in FILES}
    state = read_canonical_json(contents["state.json"], path / "state.json")
    identity, environment = state.get("identity"), state.get("environment")
    proven = {"format_version": FORMAT_VERSION, "step": manifest["step"]}
    proven |= {"identity": identity, "environment": environment}
    same = canonical_json(proven) == contents["state.json"]
    same &= isinstance(identity, dict) and isinstance(environment, dict)
    if not same or sha256(canonical_json(identity)) != manifest["identity_sha256"]:
        raise CheckpointError(
            f"{path / 'state.json'}: belongs to another checkpoint than the manifest"
        )
    weights, moments = "adapter_model.safetensors", "optimizer.safetensors"
    return Checkpoint(
        step=state["step"],
        identity=state["identity"],
        ledger=LedgerPosition(**manifest["ledger"]),
        adapter_config=contents["adapter_config.json"],
        adapter=_deserialize(contents[weights], path / weights),
        optimizer=_deserialize(contents[moments], path / moments),
        environment=state["environment"],
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders named like checkpoints, oldest first by number; anything else there is ignored."""
    folders = [
        path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def prune_checkpoints(folder: Path, newest: Path, keep: int) -> None:
    """Remove the oldest, up to `newest`, until `keep` are left."""
    older = [
        path
        for path in list_checkpoints(folder)
        if (len(path.name), path.name) <= (len(newest.name), newest.name)
    ]
    for path in older[:-keep]:
        remove_folder(path)


def serialize(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """safetensors bytes: a function of names and values only, so equal states are equal bytes."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save_safetensors(on_cpu, metadata)


def _deserialize(content: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return load_safetensors(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not safetensors: {error}") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, if it is whole, of this format, and of the folder it lies in."""
    name = path / "manifest.json"
    manifest = read_canonical_json(read_regular_file(name, _MANIFEST_LIMIT), name)
    version = manifest.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(f"{name}: format {version!r}, this program reads {FORMAT_VERSION}")
    if manifest.pop("manifest_sha256", None) != sha256(canonical_json(manifest)):
        raise CheckpointError(
            f"{name}: its own sha256 does not match; it was changed after it was written"
        )
    try:
        counts = [manifest["step"], manifest["ledger"]["lines"], manifest["ledger"]["bytes"]]
        counts += [file["bytes"] for file in manifest["files"].values()]
        whole = all(type(count) is int and count >= 0 for count in counts)
        whole &= sorted(manifest["files"]) == sorted(FILES)
        whole &= sorted(manifest["ledger"]) == ["bytes", "head", "lines"]
        whole &= all(sorted(file) == ["bytes", "sha256"] for file in manifest["files"].values())
        whole &= all(type(file["sha256"]) is str for file in manifest["files"].values())
        whole &= path.name == f"step-{manifest['step']:06d}"
    except (KeyError, TypeError, AttributeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{name}: not the manifest of {path.name} in format {FORMAT_VERSION}")
    return manifest


def _read_proven(path: Path, expected: dict[str, Any]) -> bytes:
    """A file's content, if it has the size and the hash that the manifest states."""
    content = read_regular_file(path, expected["bytes"])
    if sha256(content) != expected["sha256"]:
        actual = f"{sha256(content)[:12]} of {len(content)} bytes"
        raise CheckpointError(
            f"{path}: sha256 {actual}, the manifest says {expected['sha256'][:12]}"
        )
    return content
