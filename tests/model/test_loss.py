import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PreTrainedModel,
)

import loop.model.loss
from loop.data.batch import Batch, Example
from loop.data.collate import collate
from loop.model.body import padded_inputs
from loop.model.loss import SummedLoss, check_head, fused_loss

LENGTHS = [23, 2, 40, 1, 9, 17]
TARGETS = sum(LENGTHS) - len(LENGTHS)  # every token of a row but its first: 86


def batch_of(lengths: list[int], vocabulary: int = 384, prompt: int = 0) -> Batch:
    torch.manual_seed(len(lengths))
    rows = [torch.randint(4, vocabulary, (length,)).tolist() for length in lengths]
    return collate([Example(row, prompt) for row in rows], padding_free=False)


def transformers_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The sum that transformers' own loss takes the mean of: labels as inputs, unshifted, padding
    ignored."""
    inputs = padded_inputs(batch)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    mean: Tensor = model(**inputs, labels=labels).loss
    return mean * int((labels[:, 1:] != -100).sum())


def log_p_of_targets(model: PreTrainedModel, batch: Batch) -> Tensor:
    """From the model's own logits, in float64."""
    logits = batch.grids[0].unpad(model(**padded_inputs(batch)).logits)
    log_p = logits.double().log_softmax(-1)
    return torch.stack(
        [log_p[place, token] for place, token in zip(batch.target_positions, batch.targets)]
    )


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def freeze_head(model: PreTrainedModel) -> PreTrainedModel:
    """As LoRA leaves it. Of BLOOM and GPT-2 it is also the embedding."""
    model.get_output_embeddings().weight.requires_grad = False
    return model


@pytest.fixture(params=["bloom", "gpt2", "llama"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def assert_transformers_own(model: PreTrainedModel) -> None:
    """Loss and gradients of a model are those of transformers' own loss."""
    batch = batch_of(LENGTHS)
    ours, theirs = SummedLoss(model, model)(batch), transformers_loss(model, batch)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    found, expected = gradients(model, ours), gradients(model, theirs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = torch.linalg.vector_norm(found[name] - gradient)
        assert difference <= 2e-5 * torch.linalg.vector_norm(gradient), name


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_the_loss_and_its_gradients_are_transformers_own_in_any_number_of_chunks(
    folder: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.model.loss, "CHUNK_TARGETS", chunk)
    assert_transformers_own(load(folder))


@pytest.mark.parametrize("block", [1, 100, 384, 4096])
def test_the_fused_loss_and_its_gradients_are_transformers_own_in_blocks_of_any_size(
    folder: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.model.loss, "VOCABULARY_BLOCK", block)
    monkeypatch.setattr(loop.model.loss, "_nll", None)  # not by the other way
    assert_transformers_own(freeze_head(load(folder)))


def head_of(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias of a head, targets, the first and last token among them."""
    torch.manual_seed(1)
    hidden, weight, bias = torch.randn(9, 16), torch.randn(301, 16) * scale, torch.randn(301)
    targets = torch.tensor([0, 300, 7, 99, 100, 101, 199, 200, 7])
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), bias.to(dtype), targets


def exact_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The same numbers in float64: hidden states that get a gradient, and the summed loss."""
    hidden = hidden.detach().double().requires_grad_()
    logits = hidden @ weight.double().T + bias.double()
    return hidden, torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize(
    "scale", [0.0, 1.0, 1000.0]
)  # uniform, usual, and exp of it would overflow
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_fused_loss_of_float64_is_exact(
    scale: float, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.model.loss, "VOCABULARY_BLOCK", 100)
    hidden, weight, bias, targets = head_of(torch.float64, scale)
    logits = hidden @ weight.T + (bias if with_bias else 0)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    loss = fused_loss(hidden, weight, bias if with_bias else None, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    (wanted,) = torch.autograd.grad(3 * expected, hidden)
    assert torch.linalg.vector_norm(gradient - wanted) <= 1e-13 * max(
        1, torch.linalg.vector_norm(wanted)
    )


def test_gradient_of_the_fused_loss_is_that_of_its_values() -> None:
    hidden, weight, bias, targets = head_of(torch.float64)
    assert torch.autograd.gradcheck(lambda h: fused_loss(h, weight, bias, targets), [hidden])


def test_the_fused_loss_of_bfloat16_is_near_to_the_exact_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop.model.loss, "VOCABULARY_BLOCK", 100)
    hidden, weight, bias, targets = head_of(torch.bfloat16)
    exact_hidden, exact = exact_loss(hidden, weight, bias, targets)
    loss = fused_loss(hidden, weight, bias, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    (gradient,) = torch.autograd.grad(loss, hidden)
    (wanted,) = torch.autograd.grad(exact, exact_hidden)
    assert gradient.dtype == torch.bfloat16
    assert torch.linalg.vector_norm(gradient - wanted) <= 1e-2 * torch.linalg.vector_norm(wanted)


@pytest.mark.parametrize(
    ("logit", "most"), [(6, 1.0), (9, 0.1), (12, 0.01)]
)  # of the target; nats that it costs
def test_the_fused_loss_of_bfloat16_is_as_near_to_the_exact_one_as_transformers_where_targets_are_likely(
    logit: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.model.loss, "VOCABULARY_BLOCK", 100)
    targets = head_of(torch.bfloat16)[-1]
    weight, bias = (torch.randn(301, 256) / 16).bfloat16(), torch.zeros(301, dtype=torch.bfloat16)
    hidden = (weight[targets] * logit).requires_grad_()
    exact_hidden, exact = exact_loss(hidden, weight, bias, targets)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    theirs = torch.nn.functional.cross_entropy(
        logits.float(), targets, reduction="sum"
    )  # as transformers computes it
    ours = fused_loss(hidden, weight, bias, targets)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert exact.item() < most * len(targets)
    (wanted,) = torch.autograd.grad(exact, exact_hidden)
    found = [torch.autograd.grad(loss, hidden)[0] for loss in (ours, theirs)]
    assert found[0].dtype == torch.bfloat16
    off = [float(torch.linalg.vector_norm(gradient - wanted)) for gradient in found]
    assert off[0] <= 1.1 * off[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_fused_loss_of_what_is_not_finite_is_not_finite(bad: float) -> None:
    hidden, weight, bias, targets = head_of(torch.float32)
    assert not fused_loss(hidden * bad, weight, bias, targets).isfinite()
    assert not fused_loss(
        hidden, weight.index_fill(0, torch.tensor([5]), bad), bias, targets
    ).isfinite()


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [
            tensor for tensor in torch.utils._pytree.tree_leaves(out) if isinstance(tensor, Tensor)
        ]
        self.elements = max([self.elements, *(tensor.numel() for tensor in made)])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(
    dtype: torch.dtype, with_gradient: bool
) -> None:
    hidden, weight = (
        torch.randn(64, 8, dtype=dtype, requires_grad=True),
        torch.randn(20_000, 8, dtype=dtype),
    )
    targets = torch.randint(0, 20_000, (64,))
    with LargestTensor() as seen, torch.set_grad_enabled(with_gradient):
        loss = fused_loss(hidden, weight, None, targets)
        if with_gradient:
            loss.backward()
    assert seen.elements == 64 * 4096  # one block; all would be 64 x 20,000
    with LargestTensor() as seen:
        torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    assert seen.elements == 64 * 20_000


class AtOnce(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts how many tensors of so many elements are alive at once, at most."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.most, self._made = elements, 0, list[weakref.ref[Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == self.elements:
            self._made.append(weakref.ref(out))
        alive = [made for made in (reference() for reference in self._made) if made is not None]
        self.most = max(self.most, len({made.data_ptr() for made in alive}))
        return out


def test_the_logits_of_one_block_only_are_alive_at_once() -> None:
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(3 * 4096, 8)
    with AtOnce(64 * 4096) as seen:
        fused_loss(hidden, weight, None, torch.randint(0, 3 * 4096, (64,)))
    assert seen.most == 1


def test_without_gradients_the_fused_loss_computes_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, bias, targets = head_of(torch.float32)
    products: list[str] = []
    usual = Tensor.__matmul__
    monkeypatch.setattr(
        Tensor, "__matmul__", lambda a, b: products.append("product") or usual(a, b)
    )
    with torch.no_grad():
        evaluated = fused_loss(hidden, weight, bias, targets)
    assert products == []
    assert fused_loss(hidden, weight, bias, targets).item() == evaluated.item()
    assert products == ["product"]


def test_a_head_that_is_trained_or_not_plain_keeps_its_gradient(bloom: Path) -> None:
    model, batch = load(bloom), batch_of(LENGTHS)
    assert "lm_head.weight" in dict(model.named_parameters(remove_duplicate=False))
    found = gradients(model, SummedLoss(model, model)(batch))["transformer.word_embeddings.weight"]
    expected = gradients(model, transformers_loss(model, batch))[
        "transformer.word_embeddings.weight"
    ]
    assert torch.linalg.vector_norm(found - expected) <= 2e-5 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("fused", [True, False])
def test_the_loss_of_a_float64_model_is_float64_and_exact(
    folder: Path, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.model.loss, "CHUNK_TARGETS", 7)
    monkeypatch.setattr(loop.model.loss, "VOCABULARY_BLOCK", 100)
    model, batch = freeze_head(load(folder, torch.float64)), batch_of(LENGTHS)
    loss = SummedLoss(model, model)
    loss.fused = fused
    ours, inputs = loss(batch), padded_inputs(batch)
    log_p = model(**inputs).logits.log_softmax(-1)
    by_hand = -sum(
        log_p[row, place, inputs["input_ids"][row, place + 1]]
        for row, length in enumerate(LENGTHS)
        for place in range(length - 1)
    )
    assert ours.dtype == torch.float64
    assert ours.item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_a_prompt_is_read_but_never_a_target(bloom: Path) -> None:
    model = freeze_head(load(bloom, torch.float64))
    batch = batch_of([12, 8], prompt=5)
    inputs = padded_inputs(batch)
    log_p = model(**inputs).logits.log_softmax(-1)
    by_hand = -sum(
        log_p[row, token - 1, inputs["input_ids"][row, token]]
        for row, length in enumerate([12, 8])
        for token in range(5, length)
    )
    assert SummedLoss(model, model)(batch).item() == pytest.approx(by_hand.item(), rel=1e-12)


WAYS = ["fused", "chunks", "own_logits"]


def loss_by(way: str, model: PreTrainedModel) -> SummedLoss:
    loss = SummedLoss(freeze_head(model), model)
    loss.fused, loss.own_logits = way == "fused", way == "own_logits"
    return loss


@pytest.mark.parametrize("way", WAYS)
def test_under_bf16_autocast_the_sum_over_targets_chunks_and_blocks_is_float32(
    bloom: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(
        loop.model.loss, "CHUNK_TARGETS", 1
    )  # one addition a target: in bfloat16 it would drift by percents
    monkeypatch.setattr(loop.model.loss, "VOCABULARY_BLOCK", 2)
    model, batch = load(bloom), batch_of([256] * 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_by(way, model)(batch)
        logits = model(**padded_inputs(batch)).logits
        exact = -log_p_of_targets(model, batch).sum()
    assert logits.dtype == torch.bfloat16
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_of_a_bfloat16_model_is_summed_in_float32(folder: Path, way: str) -> None:
    model, batch = load(folder, torch.bfloat16), batch_of([128] * 4)
    ours = loss_by(way, model)(batch)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(-log_p_of_targets(model, batch).sum().item(), rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [[], [1], [1, 1, 1]])
def test_a_batch_without_targets_gives_exactly_zero_and_zero_gradients(
    folder: Path, lengths: list[int], way: str
) -> None:
    model = load(folder)
    nothing = loss_by(way, model)(batch_of(lengths))
    assert nothing.item() == 0.0
    nothing.backward()
    learned = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert any(".weight" in name and "lm_head" not in name for name in learned)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert not parameter.grad.any(), name


def test_in_chunks_the_logits_of_no_more_targets_than_a_chunk_are_ever_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.model.loss, "CHUNK_TARGETS", 16)
    model, rows = load(folder), []
    model.get_output_embeddings().register_forward_hook(
        lambda head, given, logits: rows.append(logits.shape[0])
    )
    loss = loss_by("chunks", model)(batch_of(LENGTHS))
    assert rows == [16, 16, 16, 16, 16, 6]
    assert sum(rows) == TARGETS
    loss.backward()
    assert sorted(rows) == sorted(
        [16, 16, 16, 16, 16, 6] * 2
    )  # computed again in backward rather than kept


def test_the_model_is_registered_once_and_owns_all_parameters(bloom: Path) -> None:
    model = load(bloom)
    names = [name for name, _ in SummedLoss(model, model).named_parameters(remove_duplicate=False)]
    assert sorted({name.split(".")[0] for name in names}) == ["model"]


# Models whose logits are not head(hidden)


def test_a_plain_head_is_kept(folder: Path) -> None:
    model = load(folder)
    loss = SummedLoss(model, model)
    assert check_head(loss, batch_of(LENGTHS), tolerance=1e-4) < 1e-5
    assert not loss.own_logits


SMALL: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 3,
}  # fmt: skip
SCALED: dict[str, Callable[[], Any]] = {
    "Granite": lambda: GraniteConfig(**SMALL, logits_scaling=4.0),
    "Cohere": lambda: CohereConfig(**SMALL, logit_scale=0.25),
    "Cohere2": lambda: Cohere2Config(**SMALL, logit_scale=0.25),
    "Gemma2": lambda: Gemma2Config(**SMALL, final_logit_softcapping=2.0),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_or_capped_logits_are_found_and_the_models_own_loss_used(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SCALED[name]()).eval()
    for parameter in model.parameters():
        parameter.data.mul_(
            10
        )  # random logits are near 0, where scaling and capping would not show
    loss, batch = SummedLoss(model, model), batch_of(LENGTHS)
    theirs = transformers_loss(model, batch).item()
    assert loss(batch).item() != pytest.approx(theirs, rel=0.01)  # silently wrong without the check
    assert check_head(loss, batch, tolerance=1e-4) > 0.01
    assert loss.own_logits
    assert loss(batch).item() == pytest.approx(theirs, rel=1e-6)


def test_a_head_that_gives_nan_is_not_trusted(bloom: Path) -> None:
    model = load(bloom)
    loss = SummedLoss(model, model)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    check_head(loss, batch_of(LENGTHS), tolerance=1e-4)
    assert loss.own_logits
