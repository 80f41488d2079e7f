"""Prompts continued by a run, a checkpoint or a plain model: `python -m loop.generate RUN|MODEL`.

Runs on the GPU if torch sees one, else on the CPU, without the autocast of training: the base in
the dtype and quantization of the run's config (where it names none, the device's default, which may
change a word), LoRA in the dtype that it was trained in. What comes out is an impression; the
measure of a run is its held-out loss."""

if __name__ == "__main__":  # the imports below take seconds; `start` imports this file by its name
    from loop.process.command import start

    start("generate")

import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from loop.config.flags import generate_flags
from loop.data.tokenizer import load_tokenizer, prompt_tokens
from loop.errors import ConfigError
from loop.finished.named_model import find_named_model, load_model
from loop.process.anonymous import anonymous


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
) -> dict[str, Any]:
    """One continuation: its text, its number of tokens (with the end-of-text), and what stopped it.

    Raises: ConfigError where the model does not have that many positions."""
    given, eos = prompt_tokens(tokenizer, prompt), tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and len(given) + max_new_tokens > context:
        lengths = f"found {len(given)} tokens and --max_new_tokens {max_new_tokens}"
        raise ConfigError(
            f"--prompt: {lengths}, the model takes {context} together; shorten one of them"
        )
    # By default the library would draw from the 50 likeliest.
    drawn = {"temperature": temperature, "top_k": 0} if temperature > 0 else {}
    ends = {"max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": pad}
    generation = GenerationConfig(do_sample=temperature > 0, **drawn, **ends)
    inputs = torch.tensor([given], device=model.device)
    tokens = model.generate(  # type: ignore[operator]
        input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=generation
    )[0].tolist()
    # Cut as text: decoded alone, a continuation loses its first space in some tokenizers.
    as_text = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    whole, before = (str(tokenizer.decode(part, **as_text)) for part in (tokens, given))
    stopped = "end_of_text" if tokens[-1] == eos else "length"
    return {
        "completion": whole[len(before) :],
        "completion_tokens": len(tokens) - len(given),
        "stopped": stopped,
    }


def read_prompts() -> Iterator[str]:
    """One prompt a line from stdin, up to its end or an empty line; a terminal is shown a mark."""
    lines = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="surrogateescape")
    while True:
        if sys.stdin.isatty() and sys.stderr.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = lines.readline().rstrip("\n")
        if not line.strip():
            return
        yield line


@anonymous()
def main(argv: list[str]) -> None:
    """`python -m loop.generate`: nothing but what was asked for goes to stdout."""
    options = generate_flags(argv)
    if not sys.stderr.isatty():
        disable_progress_bar()
    named = find_named_model(options.named, options.base)
    tokenizer = load_tokenizer(named.config)
    if options.prompt is not None:
        prompt_tokens(tokenizer, options.prompt)  # refused now, not after the base has been loaded
    model = load_model(named)
    adapter = named.adapter and str(named.adapter)
    shared = {"model": named.config.model_name_or_path, "adapter": adapter}
    shared |= {"adapter_sha256": named.adapter_sha256, "seed": options.seed}
    numbers = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    for prompt in read_prompts() if options.prompt is None else [options.prompt]:
        torch.manual_seed(options.seed)  # anew, so that no answer depends on those before it
        answer = {"prompt": prompt, **complete(model, tokenizer, prompt, **numbers)}
        answer |= {**shared, **numbers}
        text = prompt + answer["completion"]
        print(json.dumps(answer, ensure_ascii=False) if options.json else text, flush=True)
