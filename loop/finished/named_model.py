"""What a name on a command line stands for, verified and loaded: a run, a checkpoint, a model."""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from loop.config.command_line import parse_command_line
from loop.config.knobs import Config
from loop.errors import CheckpointError, ConfigError
from loop.model.base import load_base
from loop.model.lora import causal_lm_of
from loop.state.checkpoint import list_checkpoints, read_checkpoint
from loop.state.files import sha256
from loop.state.run_json import read_run_json


@dataclass(frozen=True)
class NamedModel:
    """A base, and the folder of the adapter on it; without one, the base alone."""

    config: Config
    adapter: Path | None = None
    adapter_sha256: str | None = None


def find_run(folder: Path) -> Path | None:
    """The run that a folder is, or that its `adapter` or one of its checkpoints is."""
    path = folder.resolve()
    runs = [folder]
    runs += [path.parent] if path.name == "adapter" else []
    runs += [path.parents[1]] if path.parent.name == "checkpoints" else []
    return next((run for run in runs if (run / "config.yaml").is_file()), None)


def find_named_model(name: str, base_only: bool) -> NamedModel:
    """What the command's first argument stands for.

    Raises: ConfigError; CheckpointError if no adapter verifies."""
    folder = Path(name)
    run = find_run(folder)
    if run is not None:
        config = parse_command_line(["--config", str(run / "config.yaml")]).config
        return NamedModel(config) if base_only else NamedModel(config, *find_adapter(run, folder))
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{name}: found an adapter without its run; expected RUN or RUN/checkpoints/step-N"
        )
    beside_runs = len(folder.parts) == 2 and any(folder.parent.glob("*/config.yaml"))
    no_hub_id = beside_runs or len(folder.parts) > 2 or name[:1] in ".~"
    if no_hub_id and not folder.exists():  # a slip
        raise ConfigError(
            f"{name}: found no such folder; expected a run, a checkpoint in it, or a model"
        )
    return NamedModel(Config(model_name_or_path=name, dataset_name="none", output_dir="none"))


def find_adapter(run: Path, requested: Path) -> tuple[Path, str]:
    """The named checkpoint, else the finished adapter, else the newest checkpoint; with its sha256.

    Raises: CheckpointError unless its manifest, or `run.json` for the finished one, states it."""
    result = read_run_json(run / "run.json").get("result")
    checkpoints = list_checkpoints(run / "checkpoints")
    if requested.resolve().parent == run.resolve() / "checkpoints":
        folder = requested
    elif result is not None:
        path = run / "adapter" / "adapter_model.safetensors"
        content = path.read_bytes() if path.is_file() else None
        return path.parent, check_sha256(path, content, dict(result).get("adapter_sha256"))
    elif checkpoints:
        folder = checkpoints[-1]
        notice = f"not finished; this is its newest checkpoint, {folder.name}"
        print(f"{run}: {notice}", file=sys.stderr, flush=True)
    else:
        raise CheckpointError(
            f"{run}: found no finished adapter and no checkpoint; train it on, or give --base"
        )
    return folder, sha256(read_checkpoint(folder).adapter_files()["adapter_model.safetensors"])


def check_sha256(path: Path, content: bytes | None, stated: str | None) -> str:
    """The sha256 of the finished adapter's content.

    Raises: CheckpointError unless it is the one that `run.json` states."""
    actual = "no file" if content is None else sha256(content)
    if actual != stated:
        hint = f"run.json states sha256 {stated}; its training command restores it"
        raise CheckpointError(f"{path}: found {actual}, {hint}")
    return actual


def load_model(named: NamedModel) -> PreTrainedModel:
    """The base, with the adapter in it, for inference.

    Raises: CheckpointError if they do not fit together."""
    base = load_for_inference(named.config)
    return base if named.adapter is None else causal_lm_of(load_adapter(base, named.adapter))


def load_for_inference(config: Config) -> PreTrainedModel:
    """The base alone, on the GPU if torch sees one. Raises: ConfigError, HubError."""
    model = load_base(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model.eval()
    return model


def load_adapter(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """An adapter put into its base, for inference.

    Raises: CheckpointError if they do not fit together."""
    with warnings.catch_warnings():
        # PEFT 0.21 uses a name that transformers 5.23 has deprecated.
        deprecated = ".*is_gradient_checkpointing.*"
        warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
        # It only warns of a missing tensor.
        warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
        try:
            return PeftModel.from_pretrained(base, adapter).eval()
        except (ValueError, RuntimeError, UserWarning) as error:
            reason = f"does not fit {base.name_or_path}: {str(error).splitlines()[0]}"
            raise CheckpointError(
                f"{adapter}: {reason}; expected the base that it was trained on"
            ) from error


def logits(model: PreTrainedModel) -> Tensor:
    """What a model makes of 32 tokens spread over its vocabulary.

    Shapes: (32, vocabulary), float32 on the CPU."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    tokens = torch.arange(32, device=model.device) * embeddings.num_embeddings // 32
    with torch.no_grad():
        values: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
    return values.float().cpu()
