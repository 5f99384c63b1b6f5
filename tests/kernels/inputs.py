"""Random inputs of both recurrences, and how far two results are apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DECAYS = ("none", "mild", "strong", "violent", "mixed")
"""Nats a step, per channel: 0; up to 0.1; up to 3; 30 everywhere; anything from 0 to 30 side by side."""


def log_decays(kind: str, *shape: int) -> Tensor:
    uniform = torch.rand(*shape)
    strongly = torch.rand(*shape) < 0.5
    return {
        "none": torch.zeros(*shape),
        "mild": -0.1 * uniform,
        "strong": -3 * uniform,
        "violent": torch.full(shape, -30.0),
        "mixed": torch.where(strongly, -30 * uniform, -0.01 * uniform),
    }[kind]


def gla_inputs(
    tokens: int,
    decay: str = "mild",
    *,
    batch: int = 2,
    heads: int = 2,
    group: int = 1,
    key_dim: int = 6,
    value_dim: int = 10,
    mixing: str | None = None,
    blocks: int = 2,
    lift: int = 1,
    states: int | None = None,
) -> dict[str, Any]:
    """Arguments of `gla` in float32; `states` is the number of initial states (the batch, unless sequences are packed).

    `mixing`: one number for each pair of `blocks`, or one for each channel and block.
    """
    inputs = {
        "q": torch.randn(batch, tokens, heads * group, key_dim),
        "k": torch.randn(batch, tokens, heads, key_dim),
        "v": torch.randn(batch, tokens, heads, value_dim),
        "log_decay": log_decays(decay, batch, tokens, heads, key_dim),
        "initial_state": torch.randn(states or batch, heads, lift * key_dim, value_dim),
    }
    if mixing is not None:
        inputs["mixing"] = torch.randn(heads, blocks if mixing == "scalar" else key_dim, blocks)
    if lift > 1:
        inputs["lift_gamma"] = torch.randn(heads * group, (lift - 1) * key_dim)
    return inputs


def ssd_inputs(
    tokens: int,
    decay: str = "mild",
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    d_state: int = 6,
    head_dim: int = 10,
    lift: int = 1,
    states: int | None = None,
) -> dict[str, Any]:
    """Arguments of `ssd` in float32. A step's decay is dt · A, so dt carries its strength."""
    inputs = {
        "x": torch.randn(batch, tokens, heads, head_dim),
        "dt": -log_decays(decay, batch, tokens, heads),
        "A": -0.5 - 0.5 * torch.rand(heads),
        "B": torch.randn(batch, tokens, groups, d_state),
        "C": torch.randn(batch, tokens, groups, d_state),
        "D": torch.randn(heads),
        "initial_state": torch.randn(states or batch, heads, lift * d_state, head_dim),
    }
    if lift > 1:
        inputs["lift_gamma"] = torch.randn(groups, (lift - 1) * d_state)
    return inputs


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() for name, x in inputs.items()}


def distance(x: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference. NaN anywhere gives NaN, which no bound admits."""
    return float((x.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30))


def results(kernel: Callable[..., Any], inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The output, the final state, and the gradients of one random linear function of both with respect to every input.

    Its weights are exact in bfloat16, so that outputs of every dtype have the same.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    output, state = kernel(**leaves, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (output, state)]
    ((output * weights[0]).sum() + (state * weights[1]).sum()).backward()
    return {"output": output.detach(), "state": state.detach()} | {name: x.grad for name, x in leaves.items()}


def gradients(kernel: Callable[..., Any], inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Those of `results` alone, which say nothing of the output itself."""
    found = results(kernel, inputs, **options)
    return {name: found[name] for name in inputs}
