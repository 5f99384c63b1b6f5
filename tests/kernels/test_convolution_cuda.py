"""The short convolution's kernels on a GPU: against the float64 form at sizes of released models, beyond 2^31 numbers, captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from statex.kernels.pointwise import short_convolution
from tests.kernels.graphs import captured
from tests.kernels.inputs import distance, in_float64

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RELEASED: dict[str, dict[str, Any]] = {
    "mamba2": {"shape": (1, 20_000, 5120), "wider": 4160},
    "mamba2, packed": {"shape": (1, 4096, 5120), "wider": 4160, "starts": (0, 5, 256, 1000, 1001, 4095)},
    "gla, a batch": {"shape": (4, 2048, 1024), "bias": False},
    "odd channels": {"shape": (3, 700, 331)},
    "odd channels, all taps": {"shape": (2, 300, 330), "width": 8},
    "not activated": {"shape": (2, 1000, 1536), "width": 2, "activation": None},
    "fewer tokens than taps": {"shape": (5, 2, 2048)},
}
"""Layers of Mamba2-1.3B (channels of wider rows) and GLA-1.3B, then what fills no tile and needs no activation."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-3}
"""All is computed in float32, so in bfloat16 only results are rounded, to 2^-9."""


def convolution_inputs(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    width: int = 4,
    wider: int = 0,
    bias: bool = True,
    starts: tuple[int, ...] | None = None,
    activation: str | None = "silu",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    batch, tokens, channels = shape
    inputs = {
        "x": torch.randn(batch, tokens, wider + channels, dtype=dtype, device="cuda")[..., wider:],
        "taps": torch.randn(channels, width, device="cuda"),
    }
    if bias:
        inputs["bias"] = torch.randn(channels, device="cuda")
    since = None
    if starts is not None:
        borders = torch.tensor(starts)
        positions = torch.arange(tokens)
        since = (positions - borders[torch.bucketize(positions, borders, right=True) - 1]).cuda()
    return inputs, {"since_start": since, "activation": activation}


def results(inputs: dict[str, Tensor], options: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of all inputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = short_convolution(**({"bias": None} | leaves), **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), dy.to(out))
    return {"result": out.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("form", RELEASED)
def test_the_kernels_keep_their_accuracy_at_the_sizes_of_released_models(form: str, dtype: torch.dtype) -> None:
    inputs, options = convolution_inputs(dtype=dtype, **RELEASED[form])
    dy = torch.randn_like(inputs["x"])
    expected = results(in_float64(inputs), options, dy)
    errors = {name: distance(x, expected[name]) for name, x in results(inputs, options, dy).items()}
    # Gradients of taps and bias are float32, whatever x is.
    bounds = {name: TOLERANCES[dtype if name in ("result", "x") else torch.float32] for name in errors}
    assert not {name: error for name, error in errors.items() if not error < bounds[name]}


def test_rows_of_more_than_2_to_the_31_numbers_end_as_short_ones_do() -> None:
    inputs, options = convolution_inputs((1, 520_000, 4160), torch.bfloat16)
    assert inputs["x"].numel() > 1 << 31
    dy = torch.zeros_like(inputs["x"])
    dy[:, -100:] = torch.randn_like(dy[:, -100:])
    last = inputs | {"x": inputs["x"][:, -103:].clone()}
    expected = results(last, options, dy[:, -103:])
    for name, x in results(inputs, options, dy).items():
        if name in ("result", "x"):
            assert torch.equal(x[:, -100:], expected[name][:, -100:]), name
        else:
            assert distance(x, expected[name]) < TOLERANCES[torch.float32], name


def test_forward_and_backward_are_captured_and_replay_with_new_inputs() -> None:
    inputs, options = convolution_inputs((2, 300, 256), torch.bfloat16, starts=(0, 70))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def step() -> None:
        for x in leaves.values():
            x.grad = None
        short_convolution(**leaves, **options).float().square().sum().backward()

    graph, _ = captured(step)
    with torch.no_grad():
        for x in leaves.values():
            x.copy_(torch.randn_like(x))
    graph.replay()
    got = {name: x.grad.clone() for name, x in leaves.items()}
    step()
    for name, x in leaves.items():
        assert torch.equal(got[name], x.grad), name
