"""Gated norms, gated products and time steps in one pass over memory each.

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

from .layout import ceil_div, on_own_device, power_of_2, unit_stride

LONGEST_ROW = 1 << 14
"""Channels of a normed group: a row lies in the registers of one program."""

TILE = 4096
"""Numbers in a tile of a norm, unless one row has more; twice as many, and warps, for gradients of wide gated rows."""
PROGRAMS = 1024
"""Programs that share the rows of a backward pass and leave sums for weights, each its own."""
FLAT_ROWS, FLAT_CHANNELS = 4, 1024
"""Tile of a gated product."""
STEP_ROWS, STEP_CHANNELS = 16, 64
"""Tile of time steps, which have a channel a head."""


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
    X, UPDATE, GATE, WEIGHT, SUM, OUT, update_r, x_r, gate_r, weight_g, rows, channels, eps,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, GATE_FIRST: tl.constexpr, WEIGHTED: tl.constexpr, UPDATED: tl.constexpr,
    ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """OUT = norm(x) · weight · act(gate), or norm(x · act(gate)) · weight; where UPDATED, x + update, left in SUM, takes x's place.

    Grid: (rows / ROWS, groups).
    """
    g = tl.program_id(1)
    width = tl.num_programs(1) * channels
    rs = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cs = tl.arange(0, BC)
    inside = (rs < rows)[:, None] & (cs < channels)[None, :]
    places = g * channels + cs
    x = tl.load(X + rs[:, None] * x_r + places[None, :], mask=inside, other=0.0).to(tl.float32)
    if UPDATED:
        x += tl.load(UPDATE + rs[:, None] * update_r + places[None, :], mask=inside, other=0.0).to(tl.float32)
        stored = x.to(SUM.dtype.element_ty)
        tl.store(SUM + rs[:, None] * width + places[None, :], stored, mask=inside)
        x = stored.to(tl.float32)
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
    tl.store(OUT + rs[:, None] * width + places[None, :], y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def norm_gradients(
    X, GATE, WEIGHT, DOUT, DSUM, DX, DUPDATE, DGATE, DWEIGHT, x_r, gate_r, weight_g, rows, channels, eps,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, GATE_FIRST: tl.constexpr, WEIGHTED: tl.constexpr, PASSED_ON: tl.constexpr,
    UPDATED: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """All gradients of `norm_rows`, whose sum is X here; where it was PASSED_ON, DSUM is the gradient that comes back.

    That of the weight as a sum over this program's rows, DWEIGHT `[programs, groups * channels]`. Grid: (programs, groups).
    """
    g = tl.program_id(1)
    width = tl.num_programs(1) * channels
    cs = tl.arange(0, BC)
    places = g * channels + cs
    weight = tl.full([BC], 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(WEIGHT + g * weight_g + cs, mask=cs < channels, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BC], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        rs = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rs < rows)[:, None] & (cs < channels)[None, :]
        out = rs[:, None] * width + places[None, :]
        x = tl.load(X + rs[:, None] * x_r + places[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DOUT + out, mask=inside, other=0.0).to(tl.float32)
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
            tl.store(DGATE + out, dgate.to(DGATE.dtype.element_ty), mask=inside)
            direct *= factor
            dn *= factor
        total += direct
        dx = root * (dn - normed * (tl.sum(dn * normed, 1) / channels)[:, None])
        if GATED and GATE_FIRST:
            tl.store(DGATE + out, (dx * x * slope).to(DGATE.dtype.element_ty), mask=inside)
            dx *= factor
        if PASSED_ON:
            dx += tl.load(DSUM + out, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + out, dx.to(DX.dtype.element_ty), mask=inside)
        if UPDATED:
            tl.store(DUPDATE + out, dx.to(DUPDATE.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(DWEIGHT + tl.program_id(0).to(tl.int64) * width + places, tl.sum(total, 0), mask=cs < channels)


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
    gates = None if gate is None else unit_stride(gate.reshape(-1, x.shape[-1]))
    weight = None if weight is None else weight.contiguous()
    _, normed = _Norm.apply(
        unit_stride(x.reshape(-1, x.shape[-1])), None, weight, gates, (groups, eps, activation, gate_first), dtype
    )
    return normed.view(x.shape)


@on_own_device
def residual_norm(x: Tensor, update: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `statex.kernels.pointwise.residual_norm`."""
    rows, updates = (None if each is None else unit_stride(each.reshape(-1, x.shape[-1])) for each in (x, update))
    total, normed = _Norm.apply(rows, updates, weight.contiguous(), None, (1, eps, "identity", False), dtype)
    return total.view(x.shape), normed.view(x.shape)


class _Norm(torch.autograd.Function):
    """x + update, or x itself where there is no update, and its norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        update: Tensor | None,
        weight: Tensor | None,
        gate: Tensor | None,
        options: tuple[int, float, str, bool],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        total = x if update is None else torch.empty(x.shape, dtype=torch.promote_types(x.dtype, update.dtype), device=x.device)
        if x.numel():
            strides, constants, launch = _norm_launch(x, weight, gate, options)
            grid = (ceil_div(x.shape[0], launch["ROWS"]), options[0])
            update_r = 0 if update is None else update.stride(0)
            norm_rows[grid](
                x, update, gate, weight, total, out, update_r, *strides, *constants, UPDATED=update is not None, **launch
            )  # fmt: skip
        ctx.save_for_backward(total, weight, gate)
        ctx.options, ctx.dtypes = options, (x.dtype, None if update is None else update.dtype)
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, gate = ctx.saved_tensors
        own, others = ctx.dtypes
        if dy is None:
            dx, dupdate = (None if dtotal is None or dtype is None else dtotal.to(dtype) for dtype in (own, others))
            return dx, dupdate, None, None, None, None
        dx = torch.empty(total.shape, dtype=own, device=total.device)
        dupdate = dx if others == own else None if others is None else torch.empty_like(dx, dtype=others)
        dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=total.device)
        dweight = None
        groups = ctx.options[0]
        if total.numel():
            strides, constants, launch = _norm_launch(total, weight, gate, ctx.options, backward=True)
            programs = min(ceil_div(total.shape[0], launch["ROWS"]), max(1, PROGRAMS // groups))
            if weight is not None:
                dweight = torch.empty(programs, total.shape[1], dtype=torch.float32, device=total.device)
            norm_gradients[programs, groups](
                total, gate, weight, dy.contiguous(), None if dtotal is None else dtotal.contiguous(), dx, dupdate, dgate, dweight,
                *strides, *constants, PASSED_ON=dtotal is not None, UPDATED=others not in (None, own), **launch,
            )  # fmt: skip
        if weight is not None:
            summed = total.new_zeros(weight.shape) if dweight is None else dweight.view(-1, weight.numel()).sum(0)
            dweight = summed.to(weight.dtype)
        return dx, dupdate, dweight, dgate, None, None


def _norm_launch(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, options: tuple[int, float, str, bool], *, backward: bool = False
) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Strides, sizes, and what the kernels are specialised for."""
    groups, eps, activation, gate_first = options
    rows, channels = x.shape[0], x.shape[1] // groups
    block = power_of_2(channels)
    weight_stride = 0 if weight is None or weight.numel() == channels else channels
    strides = (x.stride(0), 0 if gate is None else gate.stride(0), weight_stride)
    wide = block > TILE or (backward and gate is not None and 2 * block >= TILE)
    tile, warps = (2 * TILE, 16) if wide else (TILE, 8)
    launch = {
        "ACTIVATION": activation, "GATED": gate is not None, "GATE_FIRST": gate_first, "WEIGHTED": weight is not None,
        "ROWS": max(1, tile // block), "BC": block, "num_warps": warps,
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
    return ceil_div(x.shape[0], FLAT_ROWS), ceil_div(x.shape[1], FLAT_CHANNELS)


def _flat(gate: Tensor, up: Tensor) -> tuple[int, int, int, int]:
    return gate.stride(0), up.stride(0), *up.shape


@triton.jit
def step_rows(X, BIAS, x_r, rs, cs, rows, channels, low, high):
    """softplus(x + bias) within [low, high], its slope, and which places are inside."""
    inside = (rs < rows)[:, None] & (cs < channels)[None, :]
    x = tl.load(X + rs[:, None] * x_r + cs[None, :], mask=inside, other=0.0).to(tl.float32)
    x += tl.load(BIAS + cs, mask=cs < channels, other=0.0).to(tl.float32)[None, :]
    # log(1 + u) with all digits of a small u, the steps of most tokens.
    u = tl.exp(-tl.abs(x))
    w = 1 + u
    value = tl.maximum(x, 0.0) + tl.where(w == 1, u, tl.log(w) * (u / tl.where(w == 1, 1.0, w - 1)))
    slope = tl.where((value >= low) & (value <= high), tl.sigmoid(x), 0.0)
    return tl.minimum(tl.maximum(value, low), high), slope, inside


@triton.jit
def make_steps(X, BIAS, OUT, x_r, rows, channels, low, high, ROWS: tl.constexpr, BC: tl.constexpr):
    """OUT = softplus(x + bias) within [low, high]. Grid: (rows / ROWS, channels / BC)."""
    rs = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cs = tl.program_id(1) * BC + tl.arange(0, BC)
    value, _, inside = step_rows(X, BIAS, x_r, rs, cs, rows, channels, low, high)
    tl.store(OUT + rs[:, None] * channels + cs[None, :], value, mask=inside)


@triton.jit
def make_step_gradients(X, BIAS, DOUT, DX, DBIAS, x_r, rows, channels, low, high, ROWS: tl.constexpr, BC: tl.constexpr):
    """Gradients of `make_steps`; that of the bias as sums over this program's rows, `[programs, channels]`.

    Grid: (programs, channels / BC).
    """
    cs = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros([ROWS, BC], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        rs = (start + tl.arange(0, ROWS)).to(tl.int64)
        _, slope, inside = step_rows(X, BIAS, x_r, rs, cs, rows, channels, low, high)
        places = rs[:, None] * channels + cs[None, :]
        dx = tl.load(DOUT + places, mask=inside, other=0.0) * slope
        tl.store(DX + places, dx.to(DX.dtype.element_ty), mask=inside)
        total += dx
    tl.store(DBIAS + tl.program_id(0).to(tl.int64) * channels + cs, tl.sum(total, 0), mask=cs < channels)


@on_own_device
def time_steps(x: Tensor, bias: Tensor, low: float, high: float) -> Tensor:
    """See `statex.kernels.pointwise.time_steps`."""
    steps: Tensor = _Steps.apply(unit_stride(x.reshape(-1, x.shape[-1])), bias.contiguous(), low, high)
    return steps.view(x.shape)


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.limits = low, high
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        if x.numel():
            grid = ceil_div(x.shape[0], STEP_ROWS), ceil_div(x.shape[1], STEP_CHANNELS)
            make_steps[grid](x, bias, out, x.stride(0), *x.shape, low, high, STEP_ROWS, STEP_CHANNELS, num_warps=4)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if not x.numel():
            return dx, torch.zeros_like(bias), None, None
        programs = min(ceil_div(x.shape[0], STEP_ROWS), PROGRAMS)
        dbias = torch.empty(programs, x.shape[1], dtype=torch.float32, device=x.device)
        make_step_gradients[programs, ceil_div(x.shape[1], STEP_CHANNELS)](
            x, bias, dy.contiguous(), dx, dbias, x.stride(0), *x.shape, *ctx.limits, STEP_ROWS, STEP_CHANNELS, num_warps=4
        )
        return dx, dbias.sum(0).to(bias.dtype), None, None
