"""One token of generation on a GPU: the state is read and written once, in place, by one launch.

A program owns all key channels of a slice of the values, so no sum is shared between programs. Lifted and mixed keys and queries
are made on the way, from the few numbers that they depend on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..lift import FLOOR, channel_mixing
from .blocks import INTERPRETED, constant
from .layout import ceil_div, on_own_device, power_of_2, require_grid
from .rows import back

PROGRAMS = 200
"""Programs that keep a large GPU busy: slices of the values are made as wide as leaves so many, up to 64."""

_FLOOR = constant(FLOOR)


@dataclass(frozen=True)
class Tile:
    """How programs go through a state."""

    channels: int
    """Rows of the state that a program loads at once."""
    values: int
    warps: int
    fetched: bool = False
    """What a program loads first is called into the L2 cache before it looks at anything else."""
    early: bool = False
    """Programs start while the kernel before theirs ends, and then wait for its results. Compute capability 9.0 and later."""


@triton.jit
def inverse_rms(X, K: tl.constexpr, BC: tl.constexpr):
    """1 / rms of a row of K channels, as in `lift`."""
    cs = tl.arange(0, BC)
    x = tl.load(X + cs, mask=cs < K, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 0) / K + _FLOOR)


@triton.jit
def lifted_channels(X, ss, root, inside, K: tl.constexpr, LIFT: tl.constexpr):
    """Channels ss of a lifted row: x in part 0, x ∘ roll(x, r) / rms(x) in part r."""
    x = tl.load(X + ss % K, mask=inside, other=0.0).to(tl.float32)
    if LIFT > 1:
        rolled = tl.load(X + back(ss % K, ss // K, K), mask=inside, other=0.0).to(tl.float32)
        x *= tl.where(ss < K, 1.0, rolled * root)
    return x


@triton.jit
def fetch(STATE, ss, v0, s_k, LAST: tl.constexpr, WIDTH: tl.constexpr, BV: tl.constexpr):
    """Calls rows ss of the state, from value v0 on, into the L2 cache; this changes nothing that a program could see."""
    sector: tl.constexpr = 256 // STATE.dtype.element_ty.primitive_bitwidth
    count: tl.constexpr = BV // sector if sector < BV else 1
    columns = tl.minimum(v0 + tl.arange(0, count) * sector, WIDTH - 1)
    places = STATE + tl.minimum(ss, LAST).to(tl.int64)[:, None] * s_k + columns[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def step(
    Q, K_, V_, DECAY, WEIGHT, SKIP, GAMMA, MIXING, STATE, OUT, s_b, s_h, s_k, scale,
    K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr, LIFT: tl.constexpr,
    SCALAR: tl.constexpr, RATE: tl.constexpr, HAS_SKIP: tl.constexpr, GATED: tl.constexpr, MIXED: tl.constexpr,
    LOGARITHM: tl.constexpr, FETCHED: tl.constexpr, EARLY: tl.constexpr,
    BC: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """S <- decay ∘ S + kᵀ (weight v); OUT = scale q S (+ SKIP v), for GROUP queries that read the state.

    GLA: DECAY holds decays of key channels. SSD (SCALAR): of a head, or with RATE what is multiplied by the weight; WEIGHT is dt,
    and SHARED heads have one key and query. With LOGARITHM decays are given as logarithms.

    Grid: (PARTS * (V / PARTS / BV rounded up), heads, B); a program stays within one of the value blocks that M reads apart.
    """
    h = tl.program_id(1)
    b = tl.program_id(2)
    z = b * tl.num_programs(1) + h
    rows: tl.constexpr = LIFT * K
    width: tl.constexpr = V // PARTS
    part = tl.program_id(0) % PARTS
    inner = (tl.program_id(0) // PARTS) * BV + tl.arange(0, BV)
    cols = inner < width
    vs = part * width + inner
    ss = tl.arange(0, BK)
    STATE += b.to(tl.int64) * s_b + h.to(tl.int64) * s_h
    if FETCHED:
        fetch(STATE, ss, part * width + (tl.program_id(0) // PARTS) * BV, s_k, rows - 1, V, BV)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    key = (z // SHARED) * K  # SHARED divides the heads, so z // SHARED counts keys over the batch
    z = z.to(tl.int64)
    v = tl.load(V_ + z * V + vs, mask=cols, other=0.0).to(tl.float32)
    written = v
    decay = tl.zeros([BK], tl.float32)
    if SCALAR:
        weight = tl.load(WEIGHT + z)
        written = v * weight
        if RATE:
            decay += tl.load(DECAY + h).to(tl.float32) * weight
        else:
            decay += tl.load(DECAY + z).to(tl.float32)
        if LOGARITHM:
            decay = tl.exp(decay)
    k_root = 1.0
    if LIFT > 1:
        k_root = inverse_rms(K_ + key, K, BC)
    for g in tl.static_range(GROUP):
        query = key * GROUP + g * K
        q_root = 1.0
        if LIFT > 1:
            q_root = inverse_rms(Q + query, K, BC)
        acc = tl.zeros([ROWS, BV], tl.float32)
        for s0 in range(0, rows, BK):
            ss = s0 + tl.arange(0, BK)
            inside = ss < rows
            place = STATE + ss.to(tl.int64)[:, None] * s_k + vs[None, :]
            keep = inside[:, None] & cols[None, :]
            state = tl.load(place, mask=keep, other=0.0).to(tl.float32)
            # Asked for before anything waits for the state.
            q = lifted_channels(Q + query, ss, q_root, inside, K, LIFT)
            if GATED:
                row = (h // SHARED) * GROUP + g
                q *= tl.load(GAMMA + row * (LIFT - 1) * K + ss - K, mask=inside & (ss >= K), other=1.0)
            if MIXED:
                q *= tl.load(MIXING + (h * K + ss % K) * PARTS + part, mask=inside, other=0.0)
            if g == 0:
                if not SCALAR:
                    decay = tl.load(DECAY + z * K + ss % K, mask=inside, other=0.0).to(tl.float32)
                    if LOGARITHM:
                        decay = tl.exp(decay)
                k = lifted_channels(K_ + key, ss, k_root, inside, K, LIFT)
                state = state * decay[:, None] + k[:, None] * written[None, :]
                tl.store(place, state.to(STATE.dtype.element_ty), mask=keep)
            # Rows that one thread holds: nothing is exchanged before the end.
            acc += tl.sum(tl.reshape(q[:, None] * state, [BK // ROWS, ROWS, BV]), 0)
        out = tl.sum(acc, 0) * scale
        if HAS_SKIP:
            out += tl.load(SKIP + h) * v
        tl.store(OUT + (z * GROUP + g) * V + vs, out.to(OUT.dtype.element_ty), mask=cols)


@torch.no_grad()
@on_own_device
def gla_step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, *, logarithm: bool, scale: float, mixing: Tensor | None,
    lift_gamma: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `statex.kernels.gla_step`; `decay` is a logarithm or not."""
    if mixing is not None:
        mixing = channel_mixing(mixing.float(), 1, k.shape[-1]).contiguous()
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
    _launch(q, k, v, decay, logarithm, None, None, lift_gamma, mixing, state, out, q.shape[1] // k.shape[1], 1, scale)
    return out


@torch.no_grad()
@on_own_device
def ssd_step(
    x: Tensor, dt: Tensor, decay: Tensor, B: Tensor, C: Tensor, state: Tensor, *, logarithm: bool, D: Tensor | None,
    lift_gamma: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `statex.kernels.ssd_step`; `decay` `[B, H]` is that of the step, a logarithm or not; or it is A `[H]`, for A dt."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    steps = dt.float().contiguous()
    skip = None if D is None else D.float().contiguous()
    _launch(C, B, x, decay, logarithm, steps, skip, lift_gamma, None, state, out, 1, x.shape[1] // B.shape[1], 1.0)
    return out


def tile_of(states: int, rows: int, value_dim: int, *, lifted: bool = False) -> Tile:
    """What was measured best. Where programs are few, each must have much under way."""
    values = 16
    while values < min(64, value_dim) and states * ceil_div(value_dim, 2 * values) >= PROGRAMS:
        values *= 2
    whole = power_of_2(rows)
    if values == 16:
        # Large states come from memory for long enough to hide a start; fetched ahead they would only wait in another queue.
        return Tile(min(1024, whole), 16, 8 if lifted else 4, fetched=lifted or states * rows * value_dim <= 1 << 20, early=True)
    if values == 32:
        return Tile(min(512, whole), 32, 8, fetched=True, early=True)
    if value_dim > values and whole <= 256:
        return Tile(whole, 32, 4, early=True)
    if value_dim <= values and whole != 256:  # all values of a row: what a program loads lies in one piece
        return Tile(min(512, whole), values, 16, fetched=True, early=True)
    return Tile(min(256, whole), values, 8, fetched=True, early=True)


@cache
def can_start_early(device: torch.device) -> bool:
    """Whether programs can start while the kernel before theirs ends."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, logarithm: bool, weight: Tensor | None, skip: Tensor | None,
    gamma: Tensor | None, mixing: Tensor | None, state: Tensor, out: Tensor, group: int, shared: int, scale: float,
) -> None:  # fmt: skip
    q, k, v, decay = (x.contiguous() for x in (q, k, v, decay))
    gamma = None if gamma is None else gamma.float().contiguous()
    batch, heads, rows, value_dim = state.shape
    require_grid(batch)
    key_dim, parts = k.shape[-1], 1 if mixing is None else mixing.shape[-1]
    tile = tile_of(parts * batch * heads, rows, value_dim // parts, lifted=rows > key_dim)
    early = tile.early and can_start_early(state.device)
    step[(parts * ceil_div(value_dim // parts, tile.values), heads, batch)](
        q, k, v, decay, *(q if x is None else x for x in (weight, skip, gamma, mixing)), state, out, *state.stride()[:3], scale,
        K=key_dim, V=value_dim, GROUP=group, SHARED=shared, PARTS=parts, LIFT=rows // key_dim, SCALAR=weight is not None,
        RATE=decay.dim() == 1, HAS_SKIP=skip is not None, GATED=gamma is not None, MIXED=mixing is not None, LOGARITHM=logarithm,
        FETCHED=tile.fetched and not INTERPRETED, EARLY=early,
        BC=power_of_2(key_dim), ROWS=min(tile.channels, tile.warps * 128 // tile.values), BK=tile.channels,
        BV=tile.values, num_warps=tile.warps,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
