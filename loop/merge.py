"""A plain model from base and adapter: `python -m loop.merge RUN --output DIR`.

For engines that take no adapter."""

if __name__ == "__main__":  # the imports below take seconds; `start` imports this file by its name
    from loop.process.command import start

    start("merge")

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from loop.config.flags import merge_flags
from loop.data.tokenizer import load_tokenizer
from loop.errors import ConfigError, EnvironmentFault
from loop.finished.named_model import (
    NamedModel,
    find_named_model,
    load_adapter,
    load_for_inference,
    logits,
)
from loop.model.lora import causal_lm_of
from loop.process.anonymous import anonymous

SHARD = "5GB"
"""Of the written model; what engines and the Hub's own tools expect."""


class Comparison(NamedTuple):
    """Logits of the merged model beside those of base and adapter."""

    largest_difference: float
    largest_logit: float
    same_choice: int  # positions of `positions` where the likeliest token is the same
    positions: int


def merge(named: NamedModel, output: Path) -> Comparison:
    """Write base and adapter as one model, read it again, and compare.

    The base is loaded unquantized, whatever it was trained in. Raises: ConfigError if `output` is
    there already; EnvironmentFault if the disk refuses, and then nothing is left of it."""
    assert named.adapter is not None
    if output.exists():
        raise ConfigError(f"--output: {output} is there already; give a new folder")
    config = replace(named.config, load_in_4bit=False, load_in_8bit=False)
    model = load_adapter(load_for_inference(config), named.adapter)
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
        for path in temporary.glob("*.safetensors"):  # which the library lets the owner alone read
            shutil.copymode(temporary / "config.json", path)
        written = replace(config, model_name_or_path=str(temporary), model_revision=None)
        merged_logits = logits(load_for_inference(written))
        temporary.rename(output)
    except (OSError, SafetensorError) as error:
        words = error.strerror if isinstance(error, OSError) else str(error)
        raise EnvironmentFault(f"--output: {output}: {words}; nothing was written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    same = int((merged_logits.argmax(-1) == unmerged.argmax(-1)).sum())
    difference, largest = (merged_logits - unmerged).abs().max(), unmerged.abs().max()
    return Comparison(float(difference), float(largest), same, len(merged_logits))


@anonymous()
def main(argv: list[str]) -> None:
    """`python -m loop.merge`."""
    options = merge_flags(argv)
    disable_progress_bar()
    named = find_named_model(options.run, base_only=False)
    if named.adapter is None:
        raise ConfigError(
            f"{options.run}: found a model and no run; expected RUN or RUN/checkpoints/step-N"
        )
    named = replace(named, config=replace(named.config, dtype=options.dtype or named.config.dtype))
    compared = merge(named, options.output)
    print(f"merged     {named.config.model_name_or_path} and {named.adapter}, {named.config.dtype}")
    largest = f"{compared.largest_difference:.3g}, where they reach {compared.largest_logit:.3g}"
    same = f"the same at {compared.same_choice} of {compared.positions} places"
    choice = f"the likeliest token is {same}"
    print(f"logits     differ from those unmerged by at most {largest}; {choice}")
    print(f"written    {options.output}")
