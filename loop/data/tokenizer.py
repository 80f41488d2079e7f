"""The base's own tokenizer: loaded, named by its sha256, and a prompt as it makes tokens of it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loop.config.knobs import Config
from loop.errors import ConfigError, HubError
from loop.state.files import canonical_json, sha256

_EXPECTED = (
    "expected a folder with config.json, tokenizer.json and *.safetensors"
    " (pytorch_model.bin is never opened)"
)
_HINTS = {
    "deserializing header": (
        "a Git LFS pointer or an error page? download it again: hf download NAME --local-dir DIR"
    ),
    "custom code": "code from a model repository is never run; use a model that transformers has",
}
"""What helps, by words in what transformers and safetensors say."""


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The base's own tokenizer, as it is.

    Raises: ConfigError for a folder, HubError for a Hub id."""
    with clear_errors(config, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            config.model_name_or_path,
            revision=config.model_revision,
            trust_remote_code=False,
            token=False,
        )


@contextmanager
def clear_errors(config: Config, what: str) -> Iterator[None]:
    """What transformers raises while it loads, as one sentence."""
    name = config.model_name_or_path
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        hint = next((hint for words, hint in _HINTS.items() if words in reason), _EXPECTED)
        if Path(name).exists():
            raise ConfigError(
                f"model_name_or_path: no {what} in {name}: {reason}; {hint}"
            ) from error
        download = f"hf download {name}, then HF_HUB_OFFLINE=1"
        expected = f"expected a folder, or a Hub id that is online or downloaded before: {download}"
        raise HubError(
            f"model_name_or_path: {name}: {reason}; {expected if hint == _EXPECTED else hint}"
        ) from error


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of its vocabulary, rules, special tokens and chat template, not of how they are stored."""
    own = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocabulary": tokenizer.get_vocab()} if own is None else json.loads(own.to_str())
    rules |= {"truncation": None, "padding": None}  # each call sets these
    return sha256(canonical_json([rules, tokenizer.special_tokens_map, tokenizer.chat_template]))


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A prompt's tokens, as training makes them. Raises: ConfigError if there are none."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ConfigError(f"--prompt: found {prompt!r:.60}, expected UTF-8")
    tokens: list[int] = tokenizer(prompt, verbose=False)["input_ids"] if prompt else []
    if tokens[-1:] == [tokenizer.eos_token_id]:  # some tokenizers end every text
        tokens = tokens[:-1]
    if not tokens:
        raise ConfigError(
            f"--prompt: found {prompt!r:.60}, which has no tokens; expected some text"
        )
    return tokens
