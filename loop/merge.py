"""A plain model from base and adapter: `python -m loop.merge RUN --output DIR`, for engines that take no adapter."""

import argparse
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from loop.config import CommandParser, underscored
from loop.errors import ConfigError, EnvironmentFault
from loop.launch import run_command
from loop.model import causal_lm_of, load_base, load_tokenizer
from loop.source import Source, find_source, load_adapter, logits

SHARD = "5GB"
"""Of the written model; what engines and the Hub's own tools expect."""


def merge(source: Source, output: Path) -> float:
    """Write base and adapter as one model; return the largest difference of its logits from those unmerged.

    The base is loaded unquantised, whatever it was trained in. Raises: ConfigError if `output` is there already;
    EnvironmentFault if the disk refuses, and then nothing is left of it."""
    assert source.adapter is not None
    if output.exists():
        raise ConfigError(f"--output: {output} is there already; give a new folder")
    config = replace(source.config, load_in_4bit=False, load_in_8bit=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_adapter(load_base(config, device).eval(), source.adapter)
    unmerged = logits(causal_lm_of(model))
    merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    with suppress(OSError):  # a base without one has its defaults; its absence is no fault
        merged.generation_config = GenerationConfig.from_pretrained(
            config.model_name_or_path, revision=config.model_revision or "main", token=False
        )
    temporary = output.with_name(f".tmp-{output.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        merged.save_pretrained(temporary, max_shard_size=SHARD)
        load_tokenizer(config).save_pretrained(temporary)
        again = load_base(replace(config, model_name_or_path=str(temporary), model_revision=None), device).eval()
        difference = float((logits(again) - unmerged).abs().max())
        temporary.rename(output)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise EnvironmentFault(f"--output: {output}: {error.strerror or error}; nothing was written") from error
    return difference


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Raises: ConfigError; SystemExit(0) after `--help`."""
    about = "Merge an adapter into its base, unquantised, as sharded safetensors with the tokenizer."
    parser = CommandParser(prog="loop.merge", description=about, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run, or RUN/checkpoints/step-N")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="of the base and of what is written (default: the run's)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args([underscored(word) for word in argv])


def main(argv: list[str]) -> None:
    """`python -m loop.merge`."""
    options = parse_options(argv)
    disable_progress_bar()
    source = find_source(options.run, base_only=False)
    if source.adapter is None:
        raise ConfigError(f"{options.run}: found a model and no run; expected RUN or RUN/checkpoints/step-N")
    source = replace(source, config=replace(source.config, dtype=options.dtype or source.config.dtype))
    difference = merge(source, options.output)
    print(f"merged     {source.config.model_name_or_path} and {source.adapter}, {source.config.dtype}")
    print(f"logits     differ from those unmerged by at most {difference:.3g}")
    print(f"written    {options.output}")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:]), debug="--debug" in sys.argv))
