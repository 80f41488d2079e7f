"""BLOOM's body on rows end to end, against transformers' own forward of each row alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomForCausalLM, PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomGelu

from loop.data.batch import Example
from loop.data.collate import collate
from loop.model.bloom import bloom_hidden, causal_alibi, is_plain
from tests.conftest import bloom_config

LENGTHS = [40, 39, 12, 9, 1]


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 384, (length,), generator=generator).tolist() for length in LENGTHS]


def ours(model: PreTrainedModel, ids: list[list[int]]) -> Tensor:
    return bloom_hidden(model.transformer, collate([Example(row, 0) for row in ids], True))


def own(model: PreTrainedModel, ids: list[list[int]]) -> Tensor:
    return torch.cat([model.transformer(torch.tensor([row])).last_hidden_state[0] for row in ids])


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 2e-6),
        (torch.float64, 1e-6),
        (torch.bfloat16, 2e-2),
    ],  # transformers' softmax is float32
)
def test_hidden_states_are_the_models_own(
    bloom: Path, dtype: torch.dtype, tolerance: float
) -> None:
    model = load(bloom, dtype)
    expected = own(model, rows())
    found = ours(model, rows())
    assert found.dtype == dtype
    assert torch.linalg.vector_norm(found - expected) <= tolerance * torch.linalg.vector_norm(
        expected
    )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_every_parameter_are_the_models_own(bloom: Path, checkpointed: bool) -> None:
    model = load(bloom).train()
    pulled = torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(1))
    found = {}
    for name, hidden in (("own", own), ("ours", ours)):
        model.zero_grad()
        if name == "ours" and checkpointed:
            model.activation_checkpointing_enable()
        (hidden(model, rows()) * pulled).sum().backward()
        found[name] = {key: p.grad for key, p in model.transformer.named_parameters()}
    assert found["ours"].keys() == found["own"].keys()
    for key, expected in found["own"].items():
        assert torch.linalg.vector_norm(
            found["ours"][key] - expected
        ) <= 2e-5 * torch.linalg.vector_norm(expected), key


def test_no_row_sees_another(bloom: Path) -> None:
    model, before = load(bloom), rows()
    changed = [before[0], [383 - token for token in before[1]], *before[2:]]
    one, other = ours(model, before), ours(model, changed)
    assert one[:40].equal(other[:40])
    assert one[79:].equal(other[79:])
    assert not one[40:79].isclose(other[40:79]).any(dim=1).all()


def test_torchs_gelu_is_blooms() -> None:
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    theirs, torchs = BloomGelu()(x), torch.nn.functional.gelu(x, approximate="tanh")
    (gradient,), (wanted,) = (
        torch.autograd.grad(torchs.sum(), x),
        torch.autograd.grad(theirs.sum(), x),
    )
    torch.testing.assert_close(torchs, theirs, rtol=0, atol=1e-8)  # its constants have eight digits
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-7)


def test_alibi_falls_with_distance_and_hides_the_future() -> None:
    bias = causal_alibi(3, 2, torch.float32, torch.device("cpu"))
    a, b, no = 1 / 16, 1 / 256, -torch.inf  # the slopes of two heads: 2**-4, 2**-8
    assert bias.tolist() == [
        [[[0, no, no], [0, a, no], [0, a, 2 * a]], [[0, no, no], [0, b, no], [0, b, 2 * b]]]
    ]


@pytest.mark.parametrize(
    "knob", ["hidden_dropout", "attention_dropout", "apply_residual_connection_post_layernorm"]
)
def test_a_bloom_with_what_is_not_written_here_is_not_plain(knob: str) -> None:
    config = bloom_config()
    assert is_plain(BloomForCausalLM(config).transformer)
    setattr(config, knob, True if knob.startswith("apply") else 0.1)
    assert not is_plain(BloomForCausalLM(config).transformer)


def test_with_gradient_checkpointing_each_block_is_computed_once_more(bloom: Path) -> None:
    model, calls = load(bloom).train(), []
    model.transformer.h[1].mlp.dense_h_to_4h.register_forward_hook(lambda *_: calls.append(1))
    for checkpointed, times in ((False, 1), (True, 2)):
        if checkpointed:
            model.activation_checkpointing_enable()
        calls.clear()
        ours(model, rows()).sum().backward()
        assert len(calls) == times


def test_under_autocast_all_layers_share_one_bias_of_the_dtype_of_attention(bloom: Path) -> None:
    """Else each layer would keep a copy of its own, as large as the scores that attention does not
    keep."""
    model, kept = load(bloom).train(), set[tuple[int, torch.dtype]]()
    batch = collate([Example(row, 0) for row in rows()], True)
    biases = model.config.n_head * 40 * 40  # numbers in one, for a longest row of 40

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() == biases * tensor.element_size() and tensor.dim() == 4:
            kept.add((storage.data_ptr(), tensor.dtype))
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        bloom_hidden(model.transformer, batch)
    assert [dtype for _, dtype in kept] == [torch.bfloat16]
