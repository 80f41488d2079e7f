"""What every peer is given: a small model with the proportions of a large one, the demo's rows,
LoRA, rows per step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, LlamaConfig

DEMO = Path(__file__).parents[2] / "loop" / "demo"
ROWS_PER_STEP = 32
MAX_LENGTH = 384
SEED = 42
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Proxy:
    """A model of random weights: what is measured does not depend on their values."""

    about: str
    config: Any
    target_modules: tuple[str, ...]


_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
_BLOOM = {"hidden_dropout": 0.0, "attention_dropout": 0.0, **_TOKENS}
PROXIES = {
    "A": Proxy(
        "BLOOM, hidden 512, 4 layers, vocabulary 250,880: most of the work is in the head",
        BloomConfig(vocab_size=250_880, hidden_size=512, n_layer=4, n_head=8, **_BLOOM),
        ("query_key_value",),
    ),
    "R": Proxy(
        "BLOOM, hidden 768, 8 layers, vocabulary 12,288: body to head as in bloom-7b1",
        BloomConfig(vocab_size=12_288, hidden_size=768, n_layer=8, n_head=12, **_BLOOM),
        ("query_key_value",),
    ),
    "L": Proxy(
        "Llama, hidden 768, 8 layers, vocabulary 12,288",
        LlamaConfig(
            vocab_size=12_288, hidden_size=768, intermediate_size=2304, num_hidden_layers=8, num_attention_heads=12,
            **_TOKENS,
        ),
        ("q_proj", "v_proj"),
    ),
}  # fmt: skip


def write_model(name: str, folder: Path) -> None:
    """The proxy's weights and the demo's tokenizer, whose ids every proxy has."""
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(PROXIES[name].config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(folder)


def minimal_flops(name: str, targets: int) -> float:
    """What the products of the forward and of the gradients that LoRA needs cost, for the real
    targets alone.

    2 for the forward and 2 for the gradient of the activations, for each weight of a matrix and
    each target; the frozen weights have no gradient. Left out: the adapter and attention's own
    products, each a hundredth or two of it, and that nobody needs the gradient below the first
    adapter, which is as much the other way."""
    model = PROXIES[name].config
    if name == "L":
        layer = 4 * model.hidden_size**2 + 3 * model.hidden_size * model.intermediate_size
        layers = model.num_hidden_layers
    else:
        layer, layers = 12 * model.hidden_size**2, model.n_layer
    return 4.0 * targets * (layers * layer + model.hidden_size * model.vocab_size)
