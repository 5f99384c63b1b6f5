"""Calls without a sequence or without a token: empty results, states as they were, gradients of zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from statex.kernels import triton_backend
from tests.kernels.inputs import results
from tests.kernels.test_bad_inputs import CALLS, RECURRENCES

ROWS = ("q", "k", "v", "beta", "log_decay", "x", "dt", "B", "C")
STATES = ("state", "initial_state")
INTERPRETED = pytest.mark.skipif(not triton_backend.INTERPRETED, reason="needs Triton's interpreter")
every_backend = pytest.mark.parametrize("backend", ["chunked", "reference", pytest.param("triton", marks=INTERPRETED)])


def without_sequences(name: str) -> dict[str, Any]:
    inputs = CALLS[name][1]()
    batched = (*ROWS, *STATES, "update", "gate", "up")
    return {key: x[:0] if key in batched and isinstance(x, Tensor) else x for key, x in inputs.items()}


def without_tokens(name: str) -> dict[str, Any]:
    return {key: x[:, :0] if key in ROWS else x for key, x in CALLS[name][1]().items()}


def results_of(name: str, inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    call, scale = CALLS[name][0], inputs.pop("scale", None)
    return results(call, inputs, backend=backend, **({} if scale is None else {"scale": scale}))


@every_backend
@pytest.mark.parametrize("make", [without_sequences, without_tokens])
@pytest.mark.parametrize("name", RECURRENCES)
def test_a_recurrence_over_nothing_gives_every_input_a_gradient(name: str, make: Any, backend: str) -> None:
    inputs = make(name)
    for key, gradient in results_of(name, dict(inputs), backend).items():
        if key in inputs:
            assert gradient.shape == inputs[key].shape, key
            assert key == "initial_state" or not gradient.any(), key
    leaves = {key: x.requires_grad_() if isinstance(x, Tensor) else x for key, x in make(name).items()}
    output, _ = CALLS[name][0](**leaves, backend=backend)
    output.sum().backward()
    assert all(x.grad is not None for x in leaves.values() if isinstance(x, Tensor))


@every_backend
@pytest.mark.parametrize("name", RECURRENCES)
def test_an_empty_batch_has_an_empty_output_and_no_states(name: str, backend: str) -> None:
    output, state = CALLS[name][0](**without_sequences(name), output_final_state=True, backend=backend)
    expected, final = CALLS[name][0](**CALLS[name][1](), output_final_state=True)
    assert output.shape == (0, *expected.shape[1:])
    assert state.shape == (0, *final.shape[1:])
    assert (output.dtype, state.dtype) == (expected.dtype, final.dtype)


@every_backend
@pytest.mark.parametrize("name", RECURRENCES)
def test_no_tokens_leave_the_state_as_it_was(name: str, backend: str) -> None:
    call, inputs = CALLS[name][0], without_tokens(name)
    output, state = call(**inputs, output_final_state=True, backend=backend)
    assert (len(output), output.shape[1]) == (2, 0)
    assert torch.equal(state, inputs["initial_state"])
    assert state.data_ptr() != inputs["initial_state"].data_ptr()
    del inputs["initial_state"]
    assert torch.equal(call(**inputs, output_final_state=True, backend=backend)[1], torch.zeros_like(state))
    assert call(**inputs, backend=backend)[1] is None


@pytest.mark.parametrize("name", RECURRENCES)
def test_packed_sequences_may_all_be_empty(name: str) -> None:
    inputs = {key: x[:1] if key in ROWS and isinstance(x, Tensor) and x.dim() > 2 else x for key, x in without_tokens(name).items()}
    output, states = CALLS[name][0](**inputs, cu_seqlens=torch.tensor([0, 0, 0]), output_final_state=True)
    assert output.shape[:2] == (1, 0)
    assert torch.equal(states, inputs["initial_state"])


@pytest.mark.parametrize("name", [name for name in CALLS if name not in RECURRENCES])
def test_steps_and_what_surrounds_them_take_an_empty_batch(name: str) -> None:
    result = CALLS[name][0](**without_sequences(name))
    for x in result if isinstance(result, tuple) else (result,):
        assert len(x) == 0
