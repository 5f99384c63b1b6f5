"""One token of generation on a GPU: the state is read and written once, in place, by one launch.

A program owns all key channels of a slice of the values, so no sum is shared between programs. Lifted and mixed keys and queries
are made on the way, from the few numbers that they depend on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lift import FLOOR, channel_mixing, lift_factor
from .blocks import constant
from .rows import back

PROGRAMS = 200
"""Programs that keep a large GPU busy: slices of the values are made as wide as leaves so many, up to 64."""

_FLOOR = constant(FLOOR)


@triton.jit
def inverse_rms(X, K, BC: tl.constexpr):
    """1 / rms of a row of K channels, as in `lift`."""
    cs = tl.arange(0, BC)
    x = tl.load(X + cs, mask=cs < K, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 0) / K + _FLOOR)


@triton.jit
def lifted_channels(X, cs, r, K, root, inside):
    """Part r of a lifted row at channels cs: x, or x ∘ roll(x, r) / rms(x)."""
    x = tl.load(X + cs, mask=inside, other=0.0).to(tl.float32)
    if r > 0:
        x *= tl.load(X + back(cs, r, K), mask=inside, other=0.0).to(tl.float32) * root
    return x


@triton.jit
def step(
    Q, K_, V_, DECAY, WEIGHT, SKIP, GAMMA, MIXING, STATE, OUT,
    s_b, s_h, s_k, heads, K, V, parts_width, scale,
    GROUP: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr, LIFT: tl.constexpr, SCALAR: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    GATED: tl.constexpr, MIXED: tl.constexpr, LOGARITHM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """S <- decay ∘ S + kᵀ (weight v); OUT = scale q S (+ SKIP v), for GROUP queries that read the state.

    GLA: DECAY holds decays of key channels. SSD (SCALAR): of a head; WEIGHT is dt, and SHARED heads have one key and query. With
    LOGARITHM decays are given as logarithms.

    Grid: (PARTS * (parts_width / BV rounded up), B * heads); a program stays within one of the value blocks that M reads apart.
    """
    z = tl.program_id(1).to(tl.int64)
    h = z % heads
    key = (z // SHARED) * K  # SHARED divides the heads, so z // SHARED counts keys over the batch
    slices = tl.num_programs(0) // PARTS
    part = tl.program_id(0) // slices
    inner = (tl.program_id(0) % slices) * BV + tl.arange(0, BV)
    cols = inner < parts_width
    vs = part * parts_width + inner
    v = tl.load(V_ + z * V + vs, mask=cols, other=0.0).to(tl.float32)
    written = v
    if SCALAR:
        written = v * tl.load(WEIGHT + z)
    k_root = 1.0
    if LIFT > 1:
        k_root = inverse_rms(K_ + key, K, BC)
    STATE += (z // heads) * s_b + h * s_h
    for g in tl.static_range(GROUP):
        query = key * GROUP + g * K
        q_root = 1.0
        if LIFT > 1:
            q_root = inverse_rms(Q + query, K, BC)
        acc = tl.zeros([BV], tl.float32)
        for r in tl.static_range(LIFT):
            for k0 in range(0, K, BK):
                cs = k0 + tl.arange(0, BK)
                inside = cs < K
                place = STATE + (r * K + cs).to(tl.int64)[:, None] * s_k + vs[None, :]
                keep = inside[:, None] & cols[None, :]
                state = tl.load(place, mask=keep, other=0.0).to(tl.float32)
                if g == 0:
                    k = lifted_channels(K_ + key, cs, r, K, k_root, inside)
                    if SCALAR:
                        decay = tl.load(DECAY + z + cs * 0).to(tl.float32)
                    else:
                        decay = tl.load(DECAY + z * K + cs, mask=inside, other=0.0).to(tl.float32)
                    if LOGARITHM:
                        decay = tl.exp(decay)
                    state *= decay[:, None]
                    state += k[:, None] * written[None, :]
                    tl.store(place, state.to(STATE.dtype.element_ty), mask=keep)
                q = lifted_channels(Q + query, cs, r, K, q_root, inside)
                if GATED and r > 0:
                    row = (h // SHARED) * GROUP + g
                    q *= tl.load(GAMMA + (row * (LIFT - 1) + r - 1) * K + cs, mask=inside, other=0.0)
                if MIXED:
                    q *= tl.load(MIXING + (h * K + cs) * PARTS + part, mask=inside, other=0.0)
                acc += tl.sum(q[:, None] * state, 0)
        acc *= scale
        if HAS_SKIP:
            acc += tl.load(SKIP + h) * v
        tl.store(OUT + (z * GROUP + g) * V + vs, acc.to(OUT.dtype.element_ty), mask=cols)


@torch.no_grad()
def gla_step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, *, logarithm: bool, scale: float, mixing: Tensor | None,
    lift_gamma: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `statex.kernels.gla_step`; `decay` is a logarithm or not."""
    batch, heads, key_dim = k.shape
    if mixing is not None:
        mixing = channel_mixing(mixing.float(), 1, key_dim).contiguous()
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
    _launch(q, k, v, decay, logarithm, None, None, lift_gamma, mixing, state, out, batch * heads, q.shape[1] // heads, 1, scale)
    return out


@torch.no_grad()
def ssd_step(
    x: Tensor, dt: Tensor, decay: Tensor, B: Tensor, C: Tensor, state: Tensor, *, logarithm: bool, D: Tensor | None,
    lift_gamma: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `statex.kernels.ssd_step`; `decay` `[B, H]` is that of the step, a logarithm or not."""
    batch, heads, _ = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    steps = dt.float().contiguous()
    skip = None if D is None else D.float().contiguous()
    _launch(C, B, x, decay, logarithm, steps, skip, lift_gamma, None, state, out, batch * heads, 1, heads // B.shape[1], 1.0)
    return out


def tile_of(states: int, key_dim: int, value_dim: int) -> tuple[int, int, int]:
    """Channels and values that a program loads at once, and its warps. Where programs are few, each must have much under way."""
    bv = 16
    while bv < min(64, value_dim) and states * triton.cdiv(value_dim, 2 * bv) >= PROGRAMS:
        bv *= 2
    bk = min(1024 if bv == 16 else 128, triton.next_power_of_2(key_dim))
    return bk, bv, 8 if bk > 256 else 4


def _launch(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, logarithm: bool, weight: Tensor | None, skip: Tensor | None,
    gamma: Tensor | None, mixing: Tensor | None, state: Tensor, out: Tensor, states: int, group: int, shared: int, scale: float,
) -> None:  # fmt: skip
    q, k, v, decay = (x.contiguous() for x in (q, k, v, decay))
    gamma = None if gamma is None else gamma.float().contiguous()
    key_dim, value_dim = k.shape[-1], v.shape[-1]
    parts = 1 if mixing is None else mixing.shape[-1]
    width = value_dim // parts
    bk, bv, warps = tile_of(parts * states, key_dim, width)
    step[(parts * triton.cdiv(width, bv), states)](
        q, k, v, decay, *(q if x is None else x for x in (weight, skip, gamma, mixing)), state, out,
        *state.stride()[:3], state.shape[1], key_dim, value_dim, width, scale,
        GROUP=group, SHARED=shared, PARTS=parts, LIFT=lift_factor(gamma, key_dim), SCALAR=weight is not None,
        HAS_SKIP=skip is not None, GATED=gamma is not None, MIXED=mixing is not None, LOGARITHM=logarithm,
        BC=triton.next_power_of_2(key_dim), BK=bk, BV=bv, num_warps=warps,
    )  # fmt: skip
