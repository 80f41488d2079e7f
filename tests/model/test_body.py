"""The two layouts of a batch give the same hidden states, or the model is found out."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3Config,
)

from loop.data.batch import Batch, Example
from loop.data.collate import collate
from loop.model.attention import ROWS
from loop.model.body import check_padding_free, hidden_states

LENGTHS = [40, 39, 12, 9, 1]
SMALL: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}


def batches(lengths: list[int] = LENGTHS) -> tuple[Batch, Batch]:
    """The same rows padded, and end to end."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        Example(torch.randint(4, 384, (length,), generator=generator).tolist(), 0)
        for length in lengths
    ]
    return collate(rows, padding_free=False), collate(rows, padding_free=True)


def made(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


@pytest.fixture(params=["bloom", "gpt2", "llama", "mistral", "qwen3", "neox"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    configs: dict[str, Callable[[], Any]] = {
        "mistral": lambda: MistralConfig(**GROUPED, sliding_window=64),  # wider than any row
        "qwen3": lambda: Qwen3Config(**GROUPED),
        "neox": lambda: GPTNeoXConfig(**SMALL),
    }
    if request.param in configs:
        return made(configs[request.param]())
    return AutoModelForCausalLM.from_pretrained(
        request.getfixturevalue(request.param), dtype=torch.float32
    )


def test_rows_end_to_end_have_the_hidden_states_and_gradients_of_padded_rows(
    model: PreTrainedModel,
) -> None:
    padded, free = batches()
    assert check_padding_free(model, padded, free, tolerance=1e-5) < 1e-5
    gradients, pulled = [], torch.randn(101, 32, generator=torch.Generator().manual_seed(1))
    for batch, padding_free in ((padded, False), (free, True)):
        model.zero_grad()
        hidden = hidden_states(model, batch, padding_free)
        assert hidden.shape == (101, 32)
        (hidden * pulled).sum().backward()
        gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        difference = torch.linalg.vector_norm(gradients[1][name] - expected)
        assert difference <= 2e-4 * torch.linalg.vector_norm(expected) + 1e-5, name


def test_no_row_sees_another_and_places_begin_anew(model: PreTrainedModel) -> None:
    padded, free = batches()
    check_padding_free(model, padded, free, tolerance=1e-5)
    alone = free._replace(input_ids=free.input_ids.index_fill(0, torch.arange(40, 79), 5))
    with torch.no_grad():
        before, after = hidden_states(model, free, True), hidden_states(model, alone, True)
    assert before[:40].equal(after[:40])
    assert before[79:].equal(after[79:])
    assert not before[40:79].equal(after[40:79])


def test_a_sample_is_generated_as_before(model: PreTrainedModel) -> None:
    prompt = torch.tensor([[17, 300, 41]])

    def sample() -> list[int]:
        tokens: list[int] = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            do_sample=False,
        )[0].tolist()
        return tokens

    before = sample()
    check_padding_free(model, *batches(), tolerance=1e-5)
    assert sample() == before


NOT_SO: dict[str, Callable[[], Any]] = {
    "a window narrower than a row": lambda: MistralConfig(**GROUPED, sliding_window=8),
    "another attention than softmax of scores": lambda: Gemma2Config(
        **GROUPED, attn_logit_softcapping=0.5
    ),
    "no attention": lambda: MambaConfig(vocab_size=384, hidden_size=32, num_hidden_layers=2),
}


@pytest.mark.parametrize("why", NOT_SO)
def test_a_model_that_cannot_do_without_padding_is_found_and_left_as_it_was(why: str) -> None:
    model, (padded, free) = made(NOT_SO[why]()), batches()
    before = model.config._attn_implementation
    with torch.no_grad():
        own = hidden_states(model, padded, padding_free=False)
    assert check_padding_free(model, padded, free, tolerance=1e-4) > 1e-3
    assert model.config._attn_implementation == before != ROWS
    with torch.no_grad():
        assert hidden_states(model, padded, padding_free=False).equal(own)


def test_a_window_that_a_model_keeps_in_its_mask_alone_is_found_where_a_row_is_one_token_wider() -> (
    None
):
    model = made(
        Qwen2MoeConfig(**GROUPED, use_sliding_window=True, sliding_window=39, max_window_layers=0)
    )
    assert check_padding_free(model, *batches([40]), tolerance=5e-2) == math.inf
    assert check_padding_free(model, *batches([39]), tolerance=5e-2) < 1e-5


def test_what_leaks_into_a_short_row_behind_a_long_one_is_found_at_the_tolerance_of_bf16() -> None:
    """LFM2's convolution goes on from one row into the next; a row without one before it is as it
    was."""
    model = made(
        Lfm2Config(
            **{**GROUPED, "max_position_embeddings": 1024}, layer_types=["conv", "full_attention"]
        )
    )
    assert (
        0.5 < check_padding_free(model, *batches([600, 2]), tolerance=5e-2) < 10
    )  # of the short row, not of both
    assert check_padding_free(model, *batches([600]), tolerance=5e-2) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_layouts_are_compared_with_the_models_own_float32(
    bloom: Path, dtype: torch.dtype
) -> None:
    """Of a base in 16 bits too, without a change to it that stays."""
    padded, free = batches()
    model = AutoModelForCausalLM.from_pretrained(bloom, dtype=dtype).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        ours = hidden_states(model, free, padding_free=True)
        wide = AutoModelForCausalLM.from_pretrained(bloom, dtype=dtype).eval().float()
        own = hidden_states(wide, padded, padding_free=False)
    expected = max(
        float((a - b).norm() / b.norm())
        for a, b in zip(ours.float().split(LENGTHS), own.split(LENGTHS))
    )
    assert check_padding_free(model, padded, free, 1.0) == pytest.approx(expected, rel=1e-5)
    assert all(
        tensor.dtype == dtype and tensor.equal(before[name])
        for name, tensor in model.state_dict().items()
    )
