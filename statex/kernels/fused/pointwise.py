"""Gated norms and gated products in one pass over memory each.

Same calls and results as the PyTorch forms in `statex.kernels.pointwise`. Sums are float32; for the backward pass the inputs are
kept. Rows are tokens, whatever their stride; channels lie side by side.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import on_own_device, unit_stride

LONGEST_ROW = 1 << 14
"""Channels of a normed group: a row lies in the registers of one program."""

TILE = 4096
"""Numbers in a tile of a norm, unless one row has more."""
PROGRAMS = 1024
"""Programs that share the rows of a backward pass and leave sums for weights, each its own."""
FLAT_ROWS, FLAT_CHANNELS = 4, 1024
"""Tile of a gated product."""


@triton.jit
def activated(g, ACTIVATION: tl.constexpr):
    """act(g) and act'(g)."""
    value, slope = g, tl.full(g.shape, 1.0, tl.float32)
    if ACTIVATION != "identity":
        s = tl.sigmoid(g)
        value, slope = s, s * (1 - s)
        if ACTIVATION == "silu":
            value, slope = g * s, s * (1 + g * (1 - s))
    return value, slope


@triton.jit
def norm_rows(
    X, GATE, WEIGHT, OUT, x_r, gate_r, weight_g, rows, channels, eps,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, GATE_FIRST: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """OUT = norm(x) · weight · act(gate), or norm(x · act(gate)) · weight. Grid: (rows / ROWS, groups)."""
    g = tl.program_id(1)
    rs = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cs = tl.arange(0, BC)
    inside = (rs < rows)[:, None] & (cs < channels)[None, :]
    places = g * channels + cs
    x = tl.load(X + rs[:, None] * x_r + places[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.full(x.shape, 1.0, tl.float32)
    if GATED:
        gate = tl.load(GATE + rs[:, None] * gate_r + places[None, :], mask=inside, other=0.0).to(tl.float32)
        factor, _ = activated(gate, ACTIVATION)
        if GATE_FIRST:
            x *= factor
    y = x * tl.rsqrt(tl.sum(x * x, 1) / channels + eps)[:, None]
    if WEIGHTED:
        y *= tl.load(WEIGHT + g * weight_g + cs, mask=cs < channels, other=0.0).to(tl.float32)[None, :]
    if GATED and not GATE_FIRST:
        y *= factor
    tl.store(OUT + rs[:, None] * (tl.num_programs(1) * channels) + places[None, :], y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def norm_gradients(
    X, GATE, WEIGHT, DOUT, DX, DGATE, DWEIGHT, x_r, gate_r, weight_g, rows, channels, eps,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, GATE_FIRST: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """All gradients of `norm_rows`; that of the weight as a sum over this program's rows, DWEIGHT `[programs, groups * channels]`.

    Grid: (programs, groups).
    """
    g = tl.program_id(1)
    width = tl.num_programs(1) * channels
    cs = tl.arange(0, BC)
    places = g * channels + cs
    weight = tl.full([BC], 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(WEIGHT + g * weight_g + cs, mask=cs < channels, other=0.0).to(tl.float32)
    total = tl.zeros([BC], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        rs = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rs < rows)[:, None] & (cs < channels)[None, :]
        x = tl.load(X + rs[:, None] * x_r + places[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DOUT + rs[:, None] * width + places[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = tl.full(x.shape, 1.0, tl.float32)
        slope = factor
        normed = x
        if GATED:
            gate = tl.load(GATE + rs[:, None] * gate_r + places[None, :], mask=inside, other=0.0).to(tl.float32)
            factor, slope = activated(gate, ACTIVATION)
            if GATE_FIRST:
                normed = x * factor
        root = tl.rsqrt(tl.sum(normed * normed, 1) / channels + eps)[:, None]
        normed *= root
        direct = dy * normed  # gradient of weight · gate, whichever of the two stands behind the norm
        dn = dy * weight[None, :]
        if GATED and not GATE_FIRST:
            dgate = direct * weight[None, :] * slope
            tl.store(DGATE + rs[:, None] * width + places[None, :], dgate.to(DGATE.dtype.element_ty), mask=inside)
            direct *= factor
            dn *= factor
        total += tl.sum(direct, 0)
        dx = root * (dn - normed * (tl.sum(dn * normed, 1) / channels)[:, None])
        if GATED and GATE_FIRST:
            tl.store(DGATE + rs[:, None] * width + places[None, :], (dx * x * slope).to(DGATE.dtype.element_ty), mask=inside)
            dx *= factor
        tl.store(DX + rs[:, None] * width + places[None, :], dx.to(DX.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(DWEIGHT + tl.program_id(0).to(tl.int64) * width + places, total, mask=cs < channels)


@on_own_device
def norm(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    *,
    groups: int,
    eps: float,
    activation: str,
    gate_first: bool,
    dtype: torch.dtype,
) -> Tensor:
    """See `statex.kernels.pointwise.norm`."""
    rows = x.reshape(-1, x.shape[-1])
    gates = None if gate is None else unit_stride(gate.reshape(-1, x.shape[-1]))
    weight = None if weight is None else weight.contiguous()
    normed: Tensor = _Norm.apply(unit_stride(rows), weight, gates, (groups, eps, activation, gate_first), dtype)
    return normed.view(x.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, gate: Tensor | None, options: tuple[int, float, str, bool], dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight, gate)
        ctx.options = options
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        if x.numel():
            strides, constants, launch = _norm_launch(x, weight, gate, options)
            grid = (triton.cdiv(x.shape[0], launch["ROWS"]), options[0])
            norm_rows[grid](x, gate, weight, out, *strides, *constants, **launch)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
        dweight = None
        groups = ctx.options[0]
        if x.numel():
            strides, constants, launch = _norm_launch(x, weight, gate, ctx.options)
            programs = min(triton.cdiv(x.shape[0], launch["ROWS"]), max(1, PROGRAMS // groups))
            if weight is not None:
                dweight = torch.empty(programs, x.shape[1], dtype=torch.float32, device=x.device)
            norm_gradients[programs, groups](x, gate, weight, dy.contiguous(), dx, dgate, dweight, *strides, *constants, **launch)
        if weight is not None:
            summed = x.new_zeros(weight.shape) if dweight is None else dweight.view(-1, weight.numel()).sum(0)
            dweight = summed.to(weight.dtype)
        return dx, dweight, dgate, None, None


def _norm_launch(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, options: tuple[int, float, str, bool]
) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Strides, sizes, and what the kernels are specialised for."""
    groups, eps, activation, gate_first = options
    rows, channels = x.shape[0], x.shape[1] // groups
    block = triton.next_power_of_2(channels)
    weight_stride = 0 if weight is None or weight.numel() == channels else channels
    strides = (x.stride(0), 0 if gate is None else gate.stride(0), weight_stride)
    launch = {
        "ACTIVATION": activation, "GATED": gate is not None, "GATE_FIRST": gate_first, "WEIGHTED": weight is not None,
        "ROWS": max(1, TILE // block), "BC": block, "num_warps": 8 if block <= TILE else 16,
    }  # fmt: skip
    return strides, (rows, channels, eps), launch


@triton.jit
def multiply(GATE, UP, OUT, gate_r, up_r, rows, channels, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr):
    """OUT = act(gate) · up. Grid: (rows / ROWS, channels / BC)."""
    rs = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cs = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    inside = (rs < rows) & (cs < channels)
    value, _ = activated(tl.load(GATE + rs * gate_r + cs, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    up = tl.load(UP + rs * up_r + cs, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + rs * channels + cs, (value * up).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def multiply_gradients(
    GATE, UP, DOUT, DGATE, DUP, gate_r, up_r, rows, channels, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Grid: (rows / ROWS, channels / BC)."""
    rs = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cs = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    inside = (rs < rows) & (cs < channels)
    value, slope = activated(tl.load(GATE + rs * gate_r + cs, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    up = tl.load(UP + rs * up_r + cs, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(DOUT + rs * channels + cs, mask=inside, other=0.0).to(tl.float32)
    tl.store(DGATE + rs * channels + cs, (dy * up * slope).to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DUP + rs * channels + cs, (dy * value).to(DUP.dtype.element_ty), mask=inside)


@on_own_device
def gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `statex.kernels.pointwise.gated_product`."""
    channels = up.shape[-1]
    product: Tensor = _Product.apply(unit_stride(gate.reshape(-1, channels)), unit_stride(up.reshape(-1, channels)), activation)
    return product.view(up.shape)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        out = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        if up.numel():
            multiply[_flat_grid(up)](gate, up, out, *_flat(gate, up), activation, FLAT_ROWS, FLAT_CHANNELS, num_warps=8)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        if up.numel():
            multiply_gradients[_flat_grid(up)](
                gate, up, dy.contiguous(), dgate, dup, *_flat(gate, up), ctx.activation, FLAT_ROWS, FLAT_CHANNELS, num_warps=8
            )
        return dgate, dup, None


def _flat_grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], FLAT_ROWS), triton.cdiv(x.shape[1], FLAT_CHANNELS)


def _flat(gate: Tensor, up: Tensor) -> tuple[int, int, int, int]:
    return gate.stride(0), up.stride(0), *up.shape
