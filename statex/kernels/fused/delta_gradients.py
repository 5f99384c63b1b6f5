"""The kernels of the (gated) delta rule, backward; names as in `delta_kernels`.

The gradient of A is - (Tᵀ dU) Uᵀ, so no gradient of T is ever made. Gradients of log-decays are sums over what crosses a token.
"""

# Kernels have no lists; their tuples grow, which mypy takes for another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import BLOCK, dot
from .delta_kernels import (
    columns_of,
    factors,
    key_blocks,
    load_blocks,
    pair_decays,
    read_blocks,
    scaled_blocks,
    store_blocks,
    store_columns,
    write_blocks,
)
from .gated import FORGOTTEN, LOG2E


@triton.jit
def carry_gradients(
    Q, K, DO, INVERSE, SCORES, BETA, READING, TO_END, PASSING, DEND, DSTATES, DNEWS, DV, DSTART,
    q_b, q_t, q_h, k_b, k_t, k_h, d_b, d_t, d_h, g_b, g_t, g_h, heads, readers, writers, tokens, value_dim, scale,
    GATED: tl.constexpr, PRECISION: tl.constexpr, BLOCKS: tl.constexpr, HELD: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """DSTATES, gradients of the state behind every chunk, backward in time from DEND to DSTART, the gradient of START.

    DNEWS = Tᵀ dU, the gradient of what T is multiplied by, `[B, H, tokens, V]`; and DV, that of the values.

    Grid: (V / BV, B * heads).
    """
    z = tl.program_id(1).to(tl.int64)
    v0 = tl.program_id(0) * BV
    zero = z * 0
    ts = tl.arange(0, BLOCK)
    size = BLOCKS * BK * value_dim
    Q += (z // heads) * q_b + (z % heads // readers) * q_h
    K += (z // heads) * k_b + (z % heads // writers) * k_h
    DO += (z // heads) * d_b + (z % heads) * d_h + v0
    DV += (z // heads) * g_b + (z % heads) * g_h + v0
    chunks = tokens // BLOCK
    pair = ts[:, None] * BLOCK + ts[None, :]
    state = load_blocks(DEND + z * size + v0, value_dim, BLOCKS, BK, BV)
    for i in range(0, chunks):
        c = chunks - 1 - i
        first = zero + c * BLOCK
        at = z * tokens + first
        queries = Q + first * q_t
        keys = K + first * k_t
        blocks = key_blocks(keys, k_t, BLOCKS, HELD, BK)
        asking = key_blocks(queries, q_t, BLOCKS, HELD, BK)
        inverse = tl.load(INVERSE + at * BLOCK + pair)
        scores = tl.load(SCORES + at * BLOCK + pair)
        out = columns_of(DO + first * d_t, d_t, BV)
        beta = tl.load(BETA + at + ts)
        behind = DSTATES + (z * chunks + c) * size + v0
        writes = read_blocks(state, blocks, keys, k_t, behind, value_dim, PRECISION, BLOCKS, HELD, BK, BV)
        if GATED:
            writes *= tl.load(TO_END + at + ts)[None, :]
            state = scaled_blocks(state, tl.exp2(tl.load(PASSING + z * chunks + c)), BLOCKS)
        writes = dot(out, scores, writes, PRECISION).to(inverse.dtype)
        news = dot(writes, inverse, tl.zeros([BV, BLOCK], tl.float32), PRECISION)
        store_columns(DNEWS + at * value_dim + v0, value_dim, news, BV)
        news *= beta[None, :]
        store_columns(DV + first * g_t, g_t, news, BV)
        reading = factors(READING, at + ts, GATED)[None, :]
        asked = (out * (scale * reading)).to(inverse.dtype)
        state = write_blocks(state, asking, queries, q_t, asked, PRECISION, BLOCKS, HELD, BK)
        stale = (news * -reading).to(inverse.dtype)
        state = write_blocks(state, blocks, keys, k_t, stale, PRECISION, BLOCKS, HELD, BK)
    store_blocks(DSTART + z * size + v0, state, value_dim, BLOCKS, BK, BV)


@triton.jit
def pair_gradients(
    K, V, DO, WRITES, DNEWS, SCORES, BETA, HI, LO, DSCORES, DOVERLAPS, INSIDE, DBETA,
    k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, heads, writers, tokens, key_dim, value_dim, scale,
    GATED: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of what pairs of tokens of a chunk exchange.

    DSCORES: of q_i·k_j; DOVERLAPS: of k_i·k_j and k_j·k_i, hence symmetric. DBETA: of beta, but for what is read of the state.
    INSIDE_t: of t's log-decay, from all pairs j < t <= i, each summed by itself: differences of sums over more pairs would leave
    their rounding errors where strong decays make the rest tiny.

    Grid: (chunks, B * heads).
    """
    z = tl.program_id(1).to(tl.int64)
    first = z * 0 + tl.program_id(0) * BLOCK
    at = z * tokens + first
    ts = tl.arange(0, BLOCK)
    vs = tl.arange(0, BV)
    ks = tl.arange(0, BK)
    out = DO + (z // heads) * d_b + (z % heads) * d_h + first * d_t + (ts[:, None] * d_t + vs[None, :])
    v = V + (z // heads) * v_b + (z % heads) * v_h + first * v_t + (ts[:, None] * v_t + vs[None, :])
    written = at * value_dim + (ts[:, None] * value_dim + vs[None, :])
    k = K + (z // heads) * k_b + (z % heads // writers) * k_h + first * k_t + (ts[:, None] * k_t + ks[None, :])
    dscores = tl.zeros([BLOCK, BLOCK], tl.float32)
    lower = tl.zeros([BLOCK, BLOCK], tl.float32)
    dbeta = tl.zeros([BLOCK], tl.float32)
    for v0 in range(0, value_dim, BV):
        writes = tl.trans(tl.load(WRITES + written + v0))
        news = tl.load(DNEWS + written + v0)
        dscores = dot(tl.load(out + v0), writes, dscores, PRECISION)
        lower = dot(news, writes, lower, PRECISION)
        dbeta += tl.sum(news.to(tl.float32) * tl.load(v + v0).to(tl.float32), 1)
    overlaps = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(0, key_dim, BK):
        keys = tl.load(k)
        overlaps = dot(keys, tl.trans(keys), overlaps, PRECISION)
        k += BK
    decays = pair_decays(HI, LO, at + ts, GATED)
    places = at * BLOCK + (ts[:, None] * BLOCK + ts[None, :])
    dscores = tl.where(ts[:, None] >= ts[None, :], dscores, 0.0)
    lower = tl.where(ts[:, None] > ts[None, :], -lower * decays, 0.0)
    tl.store(DSCORES + places, (scale * dscores * decays).to(DSCORES.dtype.element_ty))
    exchanged = lower * overlaps
    tl.store(DBETA + at + ts, dbeta + tl.sum(exchanged, 1))
    beta = tl.load(BETA + at + ts)[:, None]
    lower *= beta
    tl.store(DOVERLAPS + places, (lower + tl.trans(lower)).to(DOVERLAPS.dtype.element_ty))
    if GATED:
        exchanged = beta * exchanged + dscores * tl.load(SCORES + places).to(tl.float32)
        earlier = tl.where(ts[:, None] > ts[None, :], tl.cumsum(exchanged, axis=1), 0.0)
        tl.store(INSIDE + at + 1 + ts, tl.sum(earlier, 0), mask=ts < BLOCK - 1)


@triton.jit
def row_gradients(
    Q, K, DO, STATES, DSTATES, WRITES, DNEWS, DSCORES, DOVERLAPS, BETA, READING, TO_END, PASSING, DQ, DK,
    ASKED, STALE, WRITTEN, ENDING,
    q_b, q_t, q_h, k_b, k_t, k_h, d_b, d_t, d_h, g_b, g_t, g_h, heads, readers, writers, tokens, key_dim, value_dim, scale,
    GATED: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """DQ and DK, gradients of queries and keys per value head; and the parts that decays and betas take in them.

    Per token, summed over a block of channels: ASKED, of what it reads of the state in front of the chunk; STALE, of what it
    replaces of it, but for beta; WRITTEN, of what it leaves in the state behind. ENDING, per chunk: of what passes the whole chunk.

    Grid: (K / BK, chunks, B * heads).
    """
    n = tl.program_id(0)
    c = tl.program_id(1)
    z = tl.program_id(2).to(tl.int64)
    first = z * 0 + c * BLOCK
    at = z * tokens + first
    chunk = z * (tokens // BLOCK) + c
    ts = tl.arange(0, BLOCK)
    vs = tl.arange(0, BV)
    ks = n * BK + tl.arange(0, BK)
    out = DO + (z // heads) * d_b + (z % heads) * d_h + first * d_t + (ts[:, None] * d_t + vs[None, :])
    written = at * value_dim + (ts[:, None] * value_dim + vs[None, :])
    state = chunk * key_dim * value_dim + (ks[:, None] * value_dim + vs[None, :])
    dq = tl.zeros([BLOCK, BK], tl.float32)
    stale = tl.zeros([BLOCK, BK], tl.float32)
    dk = tl.zeros([BLOCK, BK], tl.float32)
    ending = tl.zeros([BK], tl.float32)
    for v0 in range(0, value_dim, BV):
        before = tl.load(STATES + state + v0)
        behind = tl.load(DSTATES + state + v0)
        if GATED:
            ending += tl.sum(before.to(tl.float32) * behind.to(tl.float32), 1)
        dq = dot(tl.load(out + v0), tl.trans(before), dq, PRECISION)
        stale = dot(tl.load(DNEWS + written + v0), tl.trans(before), stale, PRECISION)
        dk = dot(tl.load(WRITES + written + v0), tl.trans(behind), dk, PRECISION)
    reading = factors(READING, at + ts, GATED)[:, None]
    dq *= scale * reading
    stale *= reading
    dk *= factors(TO_END, at + ts, GATED)[:, None]
    q = tl.load(Q + (z // heads) * q_b + (z % heads // readers) * q_h + first * q_t + (ts[:, None] * q_t + ks[None, :]))
    k = tl.load(K + (z // heads) * k_b + (z % heads // writers) * k_h + first * k_t + (ts[:, None] * k_t + ks[None, :]))
    slot = n * (tl.num_programs(2).to(tl.int64) * tokens) + at
    tl.store(STALE + slot + ts, tl.sum(stale * k.to(tl.float32), 1))
    if GATED:
        tl.store(ASKED + slot + ts, tl.sum(dq * q.to(tl.float32), 1))
        tl.store(WRITTEN + slot + ts, tl.sum(dk * k.to(tl.float32), 1))
        total = tl.sum(ending, 0) * tl.exp2(tl.load(PASSING + chunk))
        tl.store(ENDING + slot // BLOCK, total)
    dk -= tl.load(BETA + at + ts)[:, None] * stale
    places = at * BLOCK + (ts[:, None] * BLOCK + ts[None, :])
    dscores = tl.load(DSCORES + places)
    dq = dot(dscores, k, dq, PRECISION)
    dk = dot(tl.trans(dscores), q, dk, PRECISION)
    dk = dot(tl.load(DOVERLAPS + places), k, dk, PRECISION)
    grads = (z // heads) * g_b + (z % heads) * g_h + first * g_t + (ts[:, None] * g_t + ks[None, :])
    tl.store(DQ + grads, dq.to(DQ.dtype.element_ty))
    tl.store(DK + grads, dk.to(DK.dtype.element_ty))


@triton.jit
def gate_gradients(
    G, BETA, DIRECT, INSIDE, ASKED, STALE, WRITTEN, ENDING, DBETA, DG,
    g_b, g_t, o_b, o_t, heads, tokens, slots,
    GATED: tl.constexpr,
):  # fmt: skip
    """Gradients of betas and log-decays, `[B, tokens, heads]`, from what `pair_gradients` (DIRECT, INSIDE) and, in `slots` slots,
    `row_gradients` make.

    Grid: (chunks, B * heads).
    """
    z = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0)
    size = tl.num_programs(1).to(tl.int64) * tokens
    ts = tl.arange(0, BLOCK)
    at = z * tokens + c * BLOCK
    stale = tl.zeros([BLOCK], tl.float32)
    reads = tl.zeros([BLOCK], tl.float32)
    left = tl.zeros([BLOCK], tl.float32)
    ending = 0.0
    for n in range(0, slots):
        place = n * size + at
        stale += tl.load(STALE + place + ts)
        if GATED:
            reads += tl.load(ASKED + place + ts)
            left += tl.load(WRITTEN + place - 1 + ts, mask=ts > 0, other=0.0)
            ending += tl.load(ENDING + place // BLOCK)
    out = (z // heads) * o_b + z % heads + (at - z * tokens + ts) * o_t
    tl.store(DBETA + out, tl.load(DIRECT + at + ts) - stale)
    if GATED:
        reads -= tl.load(BETA + at + ts) * stale
        dg = tl.cumsum(reads, axis=0, reverse=True) + tl.cumsum(left, axis=0) + ending
        dg += tl.load(INSIDE + at + ts, mask=ts > 0, other=0.0)
        g = tl.load(G + (z // heads) * g_b + z % heads + (at - z * tokens + ts) * g_t)
        tl.store(DG + out, tl.where(g * LOG2E < FORGOTTEN, 0.0, dg))
