from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cohere2Config, CohereConfig, Gemma2Config, GraniteConfig, PreTrainedModel

import loop.loss
from loop.batch import IGNORE_INDEX, Batch, Example
from loop.collate import collate
from loop.loss import SummedLoss, check_head

LENGTHS = [23, 2, 40, 1, 9, 17]
TARGETS = sum(LENGTHS) - len(LENGTHS)  # every token of a row but its first: 86


def batch_of(lengths: list[int], vocabulary: int = 384, prompt: int = 0) -> Batch:
    torch.manual_seed(len(lengths))
    rows = [torch.randint(4, vocabulary, (length,)).tolist() for length in lengths]
    return collate([Example(row, prompt) for row in rows], pad_token_id=3)


def transformers_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The sum that transformers' own loss takes the mean of: labels as inputs, unshifted, padding ignored."""
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORE_INDEX)
    mean: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    return mean * int((labels[:, 1:] != IGNORE_INDEX).sum())


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(params=["bloom", "gpt2", "llama"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_the_loss_and_its_gradients_are_transformers_own_in_any_number_of_chunks(
    folder: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.loss, "CHUNK_TARGETS", chunk)
    model, batch = load(folder), batch_of(LENGTHS)
    ours, theirs = SummedLoss(model, model)(batch), transformers_loss(model, batch)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    found, expected = gradients(model, ours), gradients(model, theirs)
    for name, gradient in expected.items():
        assert torch.linalg.vector_norm(found[name] - gradient) <= 2e-5 * torch.linalg.vector_norm(gradient), name


def test_the_loss_of_a_float64_model_is_float64_and_exact(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.loss, "CHUNK_TARGETS", 7)
    model, batch = load(folder, torch.float64), batch_of(LENGTHS)
    ours = SummedLoss(model, model)(batch)
    log_p = model(batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    by_hand = -sum(
        log_p[row, place, batch.input_ids[row, place + 1]]
        for row, length in enumerate(LENGTHS)
        for place in range(length - 1)
    )
    assert ours.dtype == torch.float64
    assert ours.item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_a_prompt_is_read_but_never_a_target(bloom: Path) -> None:
    model = load(bloom, torch.float64)
    batch = batch_of([12, 8], prompt=5)
    log_p = model(batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    by_hand = -sum(
        log_p[row, token - 1, batch.input_ids[row, token]]
        for row, length in enumerate([12, 8])
        for token in range(5, length)
    )
    assert SummedLoss(model, model)(batch).item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_what_stands_at_padding_does_not_matter(folder: Path) -> None:
    model, batch = load(folder), batch_of(LENGTHS)
    other = Batch(batch.input_ids.masked_fill(batch.attention_mask == 0, 77), batch.attention_mask, batch.targets)
    assert SummedLoss(model, model)(other).item() == pytest.approx(SummedLoss(model, model)(batch).item(), rel=1e-6)


@pytest.mark.parametrize("whole_model", [False, True])
def test_under_bf16_autocast_the_sum_over_targets_and_chunks_is_float32(
    bloom: Path, monkeypatch: pytest.MonkeyPatch, whole_model: bool
) -> None:
    monkeypatch.setattr(loop.loss, "CHUNK_TARGETS", 1)  # one addition a target: in bfloat16 it would drift by percents
    model, batch = load(bloom), batch_of([256] * 8)
    loss = SummedLoss(model, model)
    loss.whole_model = whole_model
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss(batch)
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert logits.dtype == torch.bfloat16
    log_p = logits.double().log_softmax(-1)[:, :-1]
    exact = -log_p.gather(-1, batch.input_ids[:, 1:, None]).sum()
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("whole_model", [False, True])
def test_the_loss_of_a_bfloat16_model_is_summed_in_float32(folder: Path, whole_model: bool) -> None:
    model, batch = load(folder, torch.bfloat16), batch_of([128] * 4)
    loss = SummedLoss(model, model)
    loss.whole_model = whole_model
    log_p = model(batch.input_ids, attention_mask=batch.attention_mask).logits.double().log_softmax(-1)[:, :-1]
    exact = -log_p.gather(-1, batch.input_ids[:, 1:, None]).sum()
    assert loss(batch).dtype == torch.float32
    assert loss(batch).item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("whole_model", [False, True])
@pytest.mark.parametrize("lengths", [[], [1], [1, 1, 1]])
def test_a_batch_without_targets_gives_exactly_zero_and_zero_gradients(
    folder: Path, lengths: list[int], whole_model: bool
) -> None:
    model = load(folder)
    loss = SummedLoss(model, model)
    loss.whole_model = whole_model
    nothing = loss(batch_of(lengths))
    assert nothing.item() == 0.0
    nothing.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert not parameter.grad.any(), name
    learned = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert any(".weight" in name and "lm_head" not in name for name in learned)


def test_the_logits_of_no_more_targets_than_a_chunk_are_ever_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.loss, "CHUNK_TARGETS", 16)
    model, rows = load(folder), []
    model.get_output_embeddings().register_forward_hook(lambda head, given, logits: rows.append(logits.shape[0]))
    loss = SummedLoss(model, model)(batch_of(LENGTHS))
    assert rows == [16, 16, 16, 16, 16, 6]
    assert sum(rows) == TARGETS
    loss.backward()
    assert sorted(rows) == sorted([16, 16, 16, 16, 16, 6] * 2)  # computed again in backward rather than kept


def test_the_model_is_registered_once_and_owns_all_parameters(bloom: Path) -> None:
    model = load(bloom)
    names = [name for name, _ in SummedLoss(model, model).named_parameters(remove_duplicate=False)]
    assert sorted({name.split(".")[0] for name in names}) == ["model"]


# Models whose logits are not head(hidden)


def test_a_plain_head_is_kept(folder: Path) -> None:
    model = load(folder)
    loss = SummedLoss(model, model)
    assert check_head(loss, batch_of(LENGTHS), tolerance=1e-4) < 1e-5
    assert not loss.whole_model


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
        parameter.data.mul_(10)  # random logits are near 0, where scaling and capping would not show
    loss, batch = SummedLoss(model, model), batch_of(LENGTHS)
    theirs = transformers_loss(model, batch).item()
    assert loss(batch).item() != pytest.approx(theirs, rel=0.01)  # silently wrong without the check
    assert check_head(loss, batch, tolerance=1e-4) > 0.01
    assert loss.whole_model
    assert loss(batch).item() == pytest.approx(theirs, rel=1e-6)


def test_a_head_that_gives_nan_is_not_trusted(bloom: Path) -> None:
    model = load(bloom)
    loss = SummedLoss(model, model)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    check_head(loss, batch_of(LENGTHS), tolerance=1e-4)
    assert loss.whole_model
