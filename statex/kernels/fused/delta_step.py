"""One token of the delta rule on a GPU: the state is read and written once, in place, by one launch.

A program owns all key channels of a slice of the values. What the new state is read with follows from what the old one is read
with, q S' = a q S + (q kᵀ) w, so both sums over the key channels are made at once, and nothing waits for the write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .blocks import INTERPRETED
from .layout import ceil_div, on_own_device, power_of_2, require_grid
from .step import PROGRAMS, can_start_early, fetch

HELD = 1 << 15
"""Numbers of the state that a program holds, at most; longer columns are read twice, the second time from the L2 cache."""

LANE = 32
"""Numbers of them in a lane, if there are warps enough."""


@triton.jit
def delta_rule_step(
    Q, K_, V_, BETA, DECAY, STATE, OUT, s_b, s_h, s_k, scale,
    K: tl.constexpr, V: tl.constexpr, KEY_SHARED: tl.constexpr, QUERY_SHARED: tl.constexpr, GATED: tl.constexpr,
    FETCHED: tl.constexpr, EARLY: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """S <- a S + kᵀ w with w = beta (v - a k S); OUT = scale q S. KEY_SHARED heads have one key, QUERY_SHARED one query.

    Grid: (V / BV, heads, B).
    """
    h = tl.program_id(1)
    b = tl.program_id(2)
    z = b * tl.num_programs(1) + h
    vs = tl.program_id(0) * BV + tl.arange(0, BV)
    cols = vs < V
    STATE += b.to(tl.int64) * s_b + h.to(tl.int64) * s_h
    if FETCHED:
        fetch(STATE, tl.arange(0, BK), tl.program_id(0) * BV, s_k, K - 1, V, BV)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    KEY = K_ + (z // KEY_SHARED).to(tl.int64) * K  # what is shared divides the heads, so this counts keys over the batch
    QUERY = Q + (z // QUERY_SHARED).to(tl.int64) * K
    decay = 1.0
    if GATED:
        decay = tl.exp(tl.load(DECAY + z).to(tl.float32))
    # Asked for before anything waits for the state.
    at = z.to(tl.int64) * V + vs
    v = tl.load(V_ + at, mask=cols, other=0.0).to(tl.float32)
    beta = tl.load(BETA + z).to(tl.float32)
    read_k = tl.zeros([BV], tl.float32)
    read_q = tl.zeros([BV], tl.float32)
    overlap = 0.0
    for k0 in tl.static_range(0, K, BK):
        ks = k0 + tl.arange(0, BK)
        inside = (ks < K)[:, None] & cols[None, :]
        place = STATE + ks.to(tl.int64)[:, None] * s_k + vs[None, :]
        state = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(KEY + ks, mask=ks < K, other=0.0).to(tl.float32)
        q = tl.load(QUERY + ks, mask=ks < K, other=0.0).to(tl.float32)
        read_k += tl.sum(k[:, None] * state, 0)
        read_q += tl.sum(q[:, None] * state, 0)
        overlap += tl.sum(q * k, 0)
    written = beta * (v - decay * read_k)
    tl.store(OUT + at, (scale * (decay * read_q + overlap * written)).to(OUT.dtype.element_ty), mask=cols)
    for k0 in tl.static_range(0, K, BK):
        if K > BK:
            ks = k0 + tl.arange(0, BK)
            inside = (ks < K)[:, None] & cols[None, :]
            place = STATE + ks.to(tl.int64)[:, None] * s_k + vs[None, :]
            state = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            k = tl.load(KEY + ks, mask=ks < K, other=0.0).to(tl.float32)
        tl.store(place, (decay * state + k[:, None] * written[None, :]).to(STATE.dtype.element_ty), mask=inside)


@torch.no_grad()
@on_own_device
def delta_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, *, scale: float) -> Tensor:
    """See `statex.kernels.delta_rule_step`."""
    require_grid(v.shape[0])
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    decay = beta if log_decay is None else log_decay.contiguous()
    out = torch.empty_like(v)
    batch, heads, key_dim, value_dim = state.shape
    rows, columns, warps = tile_of(batch * heads, key_dim, value_dim)
    early = can_start_early(state.device)
    delta_rule_step[(ceil_div(value_dim, columns), heads, batch)](
        q, k, v, beta, decay, state, out, *state.stride()[:3], scale, K=key_dim, V=value_dim, KEY_SHARED=heads // k.shape[1],
        QUERY_SHARED=heads // q.shape[1], GATED=log_decay is not None, FETCHED=not INTERPRETED, EARLY=early, BK=rows, BV=columns,
        num_warps=warps, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def tile_of(states: int, key_dim: int, value_dim: int) -> tuple[int, int, int]:
    """Key channels and values of a tile, and warps: slices of the values as wide as leaves enough programs and fits."""
    whole, columns = power_of_2(key_dim), 16
    while columns < min(64, value_dim) and 4 * columns * whole <= HELD and states * ceil_div(value_dim, 2 * columns) >= PROGRAMS:
        columns *= 2
    rows = min(whole, HELD // columns)
    return rows, columns, min(16, max(2, rows * columns // (32 * LANE)))
