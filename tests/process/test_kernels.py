"""Switches of the whole process: set within, and as they were behind, whatever happens between."""

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

from loop.process.kernels import kernels

_FILLING: Any = torch.utils.deterministic


def switches() -> dict[str, bool]:
    return {
        "cuDNN's attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "new tensors are filled": _FILLING.fill_uninitialized_memory,
        "kernels are tried": torch.backends.cudnn.benchmark,
    }


def switch(cudnn: bool, deterministic: bool, filled: bool, tried: bool) -> None:
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.use_deterministic_algorithms(deterministic)
    _FILLING.fill_uninitialized_memory = filled
    torch.backends.cudnn.benchmark = tried


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = switches()
    yield
    switch(*before.values())


@pytest.mark.parametrize("full_determinism", [False, True])
@pytest.mark.parametrize("before", [(True, False, True, True), (False, True, False, False)])
@pytest.mark.parametrize("error", [None, ValueError("in the middle of a step")])
def test_every_switch_is_put_back_even_behind_an_error(
    full_determinism: bool, before: tuple[bool, ...], error: Exception | None
) -> None:
    switch(*before)
    found = switches()
    with suppress(ValueError), kernels(full_determinism):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        if error:
            raise error
    assert switches() == found


def test_full_determinism_asks_for_it_and_fills_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    switch(True, False, True, True)
    with kernels(full_determinism=True):
        assert list(switches().values()) == [False, True, False, False]
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_without_full_determinism_only_cudnns_attention_is_touched() -> None:
    switch(True, False, True, True)
    with kernels(full_determinism=False):
        assert list(switches().values()) == [False, False, True, True]
