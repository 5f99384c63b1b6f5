"""The parts that both chunked forms share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from statex.kernels import chunking, gla, ssd
from statex.kernels.chunked_ssd import segment_sums
from tests.kernels.inputs import distance, gla_inputs, ssd_inputs


@pytest.mark.parametrize("chunks", [1, 2, 32, 33, 40, 1100])
def test_carrying_in_two_levels_equals_a_loop(chunks: int) -> None:
    updates, initial = torch.randn(2, 3, chunks, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    log_decay = -torch.rand(2, 3, chunks, 4, 1).double()
    log_decay[:, :, chunks // 2] = -torch.inf
    before, final = chunking.carry(updates, log_decay, initial)
    state = initial
    for c in range(chunks):
        assert torch.allclose(before[:, :, c], state, atol=1e-12), c
        state = log_decay[:, :, c].exp() * state + updates[:, :, c]
    assert torch.allclose(final, state, atol=1e-12)


def test_segment_sums_lose_no_digits_behind_strong_decays() -> None:
    log_decay = torch.tensor([-3000.0] * 32 + [-1e-3] * 32)
    sums = segment_sums(log_decay)
    assert sums[63, 31] == pytest.approx(-32e-3, rel=1e-6)
    assert sums[31, 31] == 0
    assert sums[10, 9] == -3000
    assert sums[9, 10] == -torch.inf


def test_fold_and_unfold_are_inverse() -> None:
    x = torch.randn(2, 70, 3, 5)
    folded = chunking.fold(x, 32, torch.float32)
    assert folded.shape == (2, 3, 3, 32, 5)
    assert torch.equal(chunking.unfold(folded, 70), x)


def saved_elements(kernel: Callable[..., Any], inputs: dict[str, Any]) -> int:
    """Elements that autograd keeps between forward and backward, views of one storage counted once."""
    storages: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        kernel(**leaves)
    return sum(storages.values())


@pytest.mark.parametrize(
    ("kernel", "make"), [(functools.partial(gla, scale=1.0), gla_inputs), (ssd, functools.partial(ssd_inputs, groups=1))]
)
def test_memory_kept_for_the_backward_is_linear_in_time(
    kernel: Callable[..., Any], make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunking.SEGMENT_ELEMENTS, "cpu", 1)
    short, long = (saved_elements(kernel, make(tokens, batch=1)) for tokens in (512, 2048))
    row = sum(x.numel() for x in make(2048, batch=1).values())
    assert long < 4.5 * short
    assert long < 3 * row  # the inputs, a state for every segment, and little else


def test_gradients_of_long_rows_are_not_filled_once_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that fills a row-long gradient for every segment costs time quadratic in T."""
    monkeypatch.setitem(chunking.SEGMENT_ELEMENTS, "cpu", 1)
    filled = []
    for tokens in (512, 1024):
        leaves = {name: x.requires_grad_() for name, x in ssd_inputs(tokens, batch=1).items()}
        y, _ = ssd(**leaves)
        with torch.profiler.profile(record_shapes=True) as profile:
            y.sum().backward()
        zeros = [event for event in profile.events() if event.name == "aten::fill_"]
        filled.append(sum(functools.reduce(int.__mul__, event.input_shapes[0], 1) for event in zeros))
    assert filled[1] < 2.5 * filled[0]


def test_mild_blocks_are_as_long_as_half_a_block_allows() -> None:
    log_decay = torch.full((1, 64, 3), -0.5)
    assert chunking.mild_block(log_decay) == 64
    log_decay[0, 5, 1] = -16
    assert chunking.mild_block(log_decay) == 16
    log_decay[0, 5, 1] = -torch.inf
    assert chunking.mild_block(log_decay) == 1


def test_two_dimensional_distance_notices_nan() -> None:
    assert not distance(torch.tensor([1.0, torch.nan]), torch.ones(2)) < 1e9
