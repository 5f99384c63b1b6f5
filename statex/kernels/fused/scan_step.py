"""One token of Mamba's scan on a GPU: the state is read and written once, in place, by one launch.

A program owns all numbers of some channels. Lifted keys and queries are made on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .layout import ceil_div, on_own_device, power_of_2, require_grid
from .step import can_start_early, inverse_rms, lifted_channels

PROGRAMS = 1000
"""Programs that keep a large GPU busy: they take as many channels as leaves so many, from 32 to 128."""

HELD = 1 << 12
"""Numbers of the state that a program loads at once."""


@triton.jit
def selective_step(
    X, DT, RATES, KEYS, QUERIES, SKIP, GAMMA, REACH, STATE, OUT, s_b, s_n, channels,
    N: tl.constexpr, LIFT: tl.constexpr, HAS_SKIP: tl.constexpr, SIGNED: tl.constexpr, EARLY: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """S <- exp(dt A) ∘ S + Bᵀ (dt x), OUT = C S + SKIP x; SIGNED decays a become a + REACH (a - 1). Grid: (channels / BD, B)."""
    b = tl.program_id(1).to(tl.int64)
    ds = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = ds < channels
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    STATE += b * s_b
    KEYS += b * N
    QUERIES += b * N
    at = b * channels + ds
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    dt = tl.load(DT + at, mask=inside, other=0.0).to(tl.float32)
    reach = tl.zeros([BD], tl.float32)
    if SIGNED:
        reach = tl.load(REACH + ds, mask=inside, other=0.0).to(tl.float32)
    k_root = 1.0
    q_root = 1.0
    if LIFT > 1:
        k_root = inverse_rms(KEYS, N, BC)
        q_root = inverse_rms(QUERIES, N, BC)
    out = tl.zeros([BD], tl.float32)
    for n0 in tl.static_range(0, LIFT * N, BN):
        ns = n0 + tl.arange(0, BN)
        numbers = ns < LIFT * N
        keep = numbers[:, None] & inside[None, :]
        place = STATE + ns.to(tl.int64)[:, None] * s_n + ds[None, :]
        state = tl.load(place, mask=keep, other=0.0).to(tl.float32)
        rates = tl.load(RATES + ds[None, :] * N + (ns % N)[:, None], mask=keep, other=0.0).to(tl.float32)
        k = lifted_channels(KEYS, ns, k_root, numbers, N, LIFT)
        q = lifted_channels(QUERIES, ns, q_root, numbers, N, LIFT)
        if LIFT > 1:
            q *= tl.load(GAMMA + ns - N, mask=numbers & (ns >= N), other=1.0)
        decay = tl.exp(dt[None, :] * rates)
        if SIGNED:
            decay += reach[None, :] * (decay - 1.0)
        state = state * decay + k[:, None] * (dt * x)[None, :]
        tl.store(place, state.to(STATE.dtype.element_ty), mask=keep)
        out += tl.sum(q[:, None] * state, 0)
    if HAS_SKIP:
        out += tl.load(SKIP + ds, mask=inside, other=0.0).to(tl.float32) * x
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=inside)


@torch.no_grad()
@on_own_device
def scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, *, D: Tensor | None, lift_gamma: Tensor | None,
    spectrum: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `statex.kernels.selective_scan_step`."""
    require_grid(x.shape[0])
    x, dt, A, B, C = (each.contiguous() for each in (x, dt, A, B, C))
    D, spectrum = (None if each is None else each.contiguous() for each in (D, spectrum))
    gamma = None if lift_gamma is None else lift_gamma.float().contiguous()
    out = torch.empty_like(x)
    batch, channels = x.shape
    d_state, numbers = A.shape[1], state.shape[2]
    BD, BN, warps = tile_of(batch, channels, numbers)
    early = can_start_early(state.device)
    selective_step[(ceil_div(channels, BD), batch)](
        x, dt, A, B, C, *(x if each is None else each for each in (D, gamma, spectrum)), state, out, state.stride(0),
        state.stride(2), channels, N=d_state, LIFT=numbers // d_state, HAS_SKIP=D is not None, SIGNED=spectrum is not None,
        EARLY=early, BC=power_of_2(d_state), BN=BN, BD=BD, num_warps=warps, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def tile_of(batch: int, channels: int, numbers: int) -> tuple[int, int, int]:
    """Channels and numbers of a tile, and warps."""
    width = 32
    while width < 128 and batch * ceil_div(channels, 2 * width) >= PROGRAMS:
        width *= 2
    rows = min(power_of_2(numbers), HELD // width)
    return width, rows, max(1, min(8, rows * width // 512))
