"""Prompts continued by a run's adapter, a checkpoint's, or a plain model: `python -m loop.generate
RUN|MODEL`.

Runs on the GPU if torch sees one, else on the CPU, without the autocast of training: the base in
the dtype and quantisation of the run's config (where it names none, the device's default, which may
change a word), LoRA in the dtype that it was trained in. What comes out is an impression; the
measure of a run is its held-out loss."""

if (
    __name__ == "__main__"
):  # what is imported below takes seconds; `start` imports this file by its name
    from loop.process.command import start

    start("loop.generate")

import argparse
import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from loop.config.command_line import CommandParser, underscored
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
    given, eos, pad = (
        prompt_tokens(tokenizer, prompt),
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and len(given) + max_new_tokens > context:
        lengths = f"found {len(given)} tokens and --max_new_tokens {max_new_tokens}"
        raise ConfigError(
            f"--prompt: {lengths}, the model takes {context} together; shorten one of them"
        )
    drawn = (
        {"temperature": temperature, "top_k": 0} if temperature > 0 else {}
    )  # the library would draw from 50
    ends = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": eos,
        "pad_token_id": eos if pad is None else pad,
    }
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


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Raises: ConfigError that lists every number out of its range; SystemExit(0) after
    `--help`."""
    about = "Continue --prompt, or each line of stdin up to its end or an empty line."
    plain = "Nothing is done against repetition: what repeats itself is the model."
    parser = CommandParser(
        prog="loop.generate", description=about, epilog=plain, allow_abbrev=False
    )
    parser.add_argument(
        "named",
        metavar="RUN|MODEL",
        help="a run, RUN/checkpoints/step-N, a model's folder or Hub id",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="the text to continue (default: lines of stdin)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=40, metavar="N", help="(default 40)")
    greedy = "0 takes the likeliest token, above 0 draws from all of them (default 0)"
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help=greedy)
    parser.add_argument(
        "--seed",
        type=int,
        default=42,
        metavar="N",
        help="of the draws, anew each prompt (default 42)",
    )
    parser.add_argument(
        "--base", action="store_true", help="without the adapter: what the run started from"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line instead of text"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args([underscored(word) for word in argv])
    wrong = [
        f"--{name}: found {value}, expected {least} or more, and less than 2**32"
        for name, least in (("max_new_tokens", 1), ("temperature", 0), ("seed", 0))
        if not least <= (value := getattr(options, name)) < 2**32
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return options


@anonymous()
def main(argv: list[str]) -> None:
    """`python -m loop.generate`: nothing but what was asked for goes to stdout."""
    options = parse_options(argv)
    if not sys.stderr.isatty():
        disable_progress_bar()
    named = find_named_model(options.named, options.base)
    tokenizer = load_tokenizer(named.config)
    if options.prompt is not None:
        prompt_tokens(tokenizer, options.prompt)  # refused now, not after the base has been loaded
    model = load_model(named)
    shared = {
        "model": named.config.model_name_or_path,
        "adapter": named.adapter and str(named.adapter),
    }
    shared |= {"adapter_sha256": named.adapter_sha256, "seed": options.seed}
    numbers = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    for prompt in read_prompts() if options.prompt is None else [options.prompt]:
        torch.manual_seed(options.seed)  # anew, so that no answer depends on those before it
        answer = {
            "prompt": prompt,
            **complete(model, tokenizer, prompt, **numbers),
            **shared,
            **numbers,
        }
        print(
            (
                json.dumps(answer, ensure_ascii=False)
                if options.json
                else prompt + answer["completion"]
            ),
            flush=True,
        )
