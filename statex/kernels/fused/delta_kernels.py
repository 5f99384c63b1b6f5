"""The kernels of the (gated) delta rule, forward: what chunks make by themselves, states from chunk to chunk, outputs.

Time is cut into chunks of BLOCK tokens. With decays D_ij from token j to i >= j, and since the start of the chunk r_i, a chunk that
starts from the state S writes U = T (beta ∘ (v - r ∘ k S)), where T = (I + A)⁻¹ and A_ij = beta_i D_ij k_i·k_j for i > j; it reads
scale · r ∘ (q S) + P U, where P_ij = scale · D_ij q_i·k_j for i >= j. With w_j, the decay to the end of the chunk, it ends in
r_last S + (w ∘ k)ᵀ U.

All that is not the caller's lies head by head, z = batch · heads + head: `[B, H, tokens, ...]`, states `[B, H, chunks, K, V]`. Rows
are padded by the caller, so that nothing needs a mask. Keys are shared by `writers` heads, queries by `readers`. Without GATED all
decays are 1, and the tensors that would hold them are not read.
"""

# Kernels have no lists; their tuples grow, which mypy takes for another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import BLOCK, dot


@triton.jit
def factors(X, places, GATED: tl.constexpr):
    """A factor for each token of a chunk."""
    result = tl.full([BLOCK], 1.0, tl.float32)
    if GATED:
        result = tl.load(X + places)
    return result


@triton.jit
def pair_decays(HI, LO, places, GATED: tl.constexpr):
    """Decays from the column's token to the row's; above the diagonal 1. Differences of HI + LO lose no digits."""
    decays = tl.full([BLOCK, BLOCK], 1.0, tl.float32)
    if GATED:
        hi = tl.load(HI + places)
        lo = tl.load(LO + places)
        exponent = (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :])
        decays = tl.exp2(tl.minimum(exponent, 0.0))
    return decays


@triton.jit
def unit_lower_inverse(lower):
    """(I + L)⁻¹ of a strictly lower L, from halves to wholes: the inverse of [[A, 0], [X, B]] is [[A⁻¹, 0], [-B⁻¹ X A⁻¹, B⁻¹]].

    Blocks of one size are inverted at once, as products of whole matrices with zeros elsewhere. A loop, since kernels with one
    product after another take long to compile.
    """
    rows = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inverse = tl.where(rows == columns, 1.0, 0.0) - tl.where(rows // 2 == columns // 2, lower, 0.0)
    for level in range(1, 6):
        corners = (rows >> level != columns >> level) & (rows >> (level + 1) == columns >> (level + 1))
        product = dot(tl.where(corners, lower, 0.0), inverse, tl.zeros([BLOCK, BLOCK], tl.float32), "tf32x3")
        inverse = dot(inverse, -product, inverse, "tf32x3")
    return inverse


@triton.jit
def prepare_chunks(
    Q, K, BETA, HI, LO, INVERSE, SCORES,
    q_b, q_t, q_h, k_b, k_t, k_h, heads, readers, writers, tokens, key_dim, scale,
    GATED: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """INVERSE = T and SCORES = P of every chunk, `[B, H, tokens, BLOCK]`.

    Grid: (chunks, B * heads).
    """
    z = tl.program_id(1).to(tl.int64)
    first = z * 0 + tl.program_id(0) * BLOCK
    ts = tl.arange(0, BLOCK)
    ks = tl.arange(0, BK)
    q = Q + (z // heads) * q_b + (z % heads // readers) * q_h + first * q_t + (ts[:, None] * q_t + ks[None, :])
    k = K + (z // heads) * k_b + (z % heads // writers) * k_h + first * k_t + (ts[:, None] * k_t + ks[None, :])
    overlaps = tl.zeros([BLOCK, BLOCK], tl.float32)
    scores = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(0, key_dim, BK):
        keys = tl.load(k)
        overlaps = dot(keys, tl.trans(keys), overlaps, PRECISION)
        scores = dot(tl.load(q), tl.trans(keys), scores, PRECISION)
        q += BK
        k += BK
    at = z * tokens + first
    decays = pair_decays(HI, LO, at + ts, GATED)
    places = at * BLOCK + (ts[:, None] * BLOCK + ts[None, :])
    scores = tl.where(ts[:, None] >= ts[None, :], scale * scores * decays, 0.0)
    tl.store(SCORES + places, scores.to(SCORES.dtype.element_ty))
    beta = tl.load(BETA + at + ts)
    lower = tl.where(ts[:, None] > ts[None, :], beta[:, None] * overlaps * decays, 0.0)
    tl.store(INVERSE + places, unit_lower_inverse(lower).to(INVERSE.dtype.element_ty))


@triton.jit
def key_rows(X, x_t, n: tl.constexpr, BK: tl.constexpr):
    """Channels of a chunk's rows, the n-th BK of them."""
    return tl.load(X + n * BK + (tl.arange(0, BLOCK)[:, None] * x_t + tl.arange(0, BK)[None, :]))


@triton.jit
def key_blocks(X, x_t, BLOCKS: tl.constexpr, HELD: tl.constexpr, BK: tl.constexpr):
    """A chunk's rows, BK channels at a time; nothing if they are not held."""
    blocks = ()
    for n in tl.static_range(BLOCKS if HELD else 0):
        blocks += (key_rows(X, x_t, n, BK),)
    return blocks


@triton.jit
def key_block(blocks, X, x_t, n: tl.constexpr, HELD: tl.constexpr, BK: tl.constexpr):
    """One of `key_blocks`."""
    return blocks[n] if HELD else key_rows(X, x_t, n, BK)


@triton.jit
def columns_of(X, x_t, BV: tl.constexpr):
    """BV columns of a chunk's rows, as `[BV, BLOCK]`."""
    return tl.load(X + (tl.arange(0, BLOCK)[None, :] * x_t + tl.arange(0, BV)[:, None]))


@triton.jit
def store_columns(X, x_t, columns, BV: tl.constexpr):
    """`columns_of`, back."""
    places = tl.arange(0, BLOCK)[None, :] * x_t + tl.arange(0, BV)[:, None]
    tl.store(X + places, columns.to(X.dtype.element_ty))


@triton.jit
def read_blocks(
    state, blocks, X, x_t, STATES, v_t, PRECISION,
    BLOCKS: tl.constexpr, HELD: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The state times a chunk's rows, `[BV, BLOCK]`; the state is stored on the way."""
    places = tl.arange(0, BK)[None, :] * v_t + tl.arange(0, BV)[:, None]
    acc = tl.zeros([BV, BLOCK], tl.float32)
    for n in tl.static_range(BLOCKS):
        narrow = state[n].to(STATES.dtype.element_ty)
        tl.store(STATES + n * BK * v_t + places, narrow)
        acc = dot(narrow, tl.trans(key_block(blocks, X, x_t, n, HELD, BK)), acc, PRECISION)
    return acc


@triton.jit
def write_blocks(state, blocks, X, x_t, writes, PRECISION, BLOCKS: tl.constexpr, HELD: tl.constexpr, BK: tl.constexpr):
    """The state plus writes times a chunk's rows."""
    result = ()
    for n in tl.static_range(BLOCKS):
        result += (dot(writes, key_block(blocks, X, x_t, n, HELD, BK), state[n], PRECISION),)
    return result


@triton.jit
def scaled_blocks(state, factor, BLOCKS: tl.constexpr):
    result = ()
    for n in tl.static_range(BLOCKS):
        result += (state[n] * factor,)
    return result


@triton.jit
def load_blocks(X, v_t, BLOCKS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """BV columns of a state, BK of its rows at a time, as `[BV, BK]`."""
    blocks = ()
    for n in tl.static_range(BLOCKS):
        blocks += (tl.load(X + ((n * BK + tl.arange(0, BK))[None, :] * v_t + tl.arange(0, BV)[:, None])),)
    return blocks


@triton.jit
def store_blocks(X, state, v_t, BLOCKS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """`load_blocks`, back."""
    for n in tl.static_range(BLOCKS):
        tl.store(X + ((n * BK + tl.arange(0, BK))[None, :] * v_t + tl.arange(0, BV)[:, None]), state[n])


@triton.jit
def carry_states(
    K, V, INVERSE, BETA, READING, TO_END, PASSING, START, STATES, WRITES, END,
    k_b, k_t, k_h, v_b, v_t, v_h, heads, writers, tokens, value_dim,
    GATED: tl.constexpr, PRECISION: tl.constexpr, BLOCKS: tl.constexpr, HELD: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """STATES in front of every chunk, WRITES = U of every token, END = the state after the last, from the state START.

    A program keeps BV columns of one state in registers, as BLOCKS blocks `[BV, BK]`. HELD: a chunk's keys are loaded once. Columns
    come first, and are fewer than 64, since Triton makes products of fewer than 64 rows with synchronous instructions. With
    asynchronous ones several launches ended in wrong gradients or illegal accesses on an H100 (Triton 3.6; see triton#10486).

    Grid: (V / BV, B * heads).
    """
    z = tl.program_id(1).to(tl.int64)
    v0 = tl.program_id(0) * BV
    zero = z * 0
    ts = tl.arange(0, BLOCK)
    size = BLOCKS * BK * value_dim
    K += (z // heads) * k_b + (z % heads // writers) * k_h
    V += (z // heads) * v_b + (z % heads) * v_h + v0
    chunks = tokens // BLOCK
    state = load_blocks(START + z * size + v0, value_dim, BLOCKS, BK, BV)
    for c in range(0, chunks):
        first = zero + c * BLOCK
        at = z * tokens + first
        keys = K + first * k_t
        blocks = key_blocks(keys, k_t, BLOCKS, HELD, BK)
        inverse = tl.load(INVERSE + at * BLOCK + (ts[:, None] * BLOCK + ts[None, :]))
        values = columns_of(V + first * v_t, v_t, BV)
        beta = tl.load(BETA + at + ts)
        before = STATES + (z * chunks + c) * size + v0
        held = read_blocks(state, blocks, keys, k_t, before, value_dim, PRECISION, BLOCKS, HELD, BK, BV)
        if GATED:
            held *= tl.load(READING + at + ts)[None, :]
            state = scaled_blocks(state, tl.exp2(tl.load(PASSING + z * chunks + c)), BLOCKS)
        news = (beta[None, :] * (values.to(tl.float32) - held)).to(inverse.dtype)
        writes = dot(news, tl.trans(inverse), tl.zeros([BV, BLOCK], tl.float32), PRECISION)
        store_columns(WRITES + at * value_dim + v0, value_dim, writes, BV)
        writes *= factors(TO_END, at + ts, GATED)[None, :]
        state = write_blocks(state, blocks, keys, k_t, writes.to(inverse.dtype), PRECISION, BLOCKS, HELD, BK)
    store_blocks(END + z * size + v0, state, value_dim, BLOCKS, BK, BV)


@triton.jit
def read_states(
    Q, STATES, SCORES, WRITES, READING, OUT,
    q_b, q_t, q_h, o_b, o_t, o_h, heads, readers, tokens, key_dim, value_dim, scale,
    GATED: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """OUT = scale · r ∘ (q S) + P U.

    Grid: (V / BV, chunks, B * heads).
    """
    z = tl.program_id(2).to(tl.int64)
    v0 = tl.program_id(0) * BV
    c = tl.program_id(1)
    first = z * 0 + c * BLOCK
    at = z * tokens + first
    ts = tl.arange(0, BLOCK)
    ks = tl.arange(0, BK)
    vs = v0 + tl.arange(0, BV)
    q = Q + (z // heads) * q_b + (z % heads // readers) * q_h + first * q_t + (ts[:, None] * q_t + ks[None, :])
    s = STATES + (z * (tokens // BLOCK) + c) * key_dim * value_dim + (ks[:, None] * value_dim + vs[None, :])
    acc = tl.zeros([BLOCK, BV], tl.float32)
    for _ in range(0, key_dim, BK):
        acc = dot(tl.load(q), tl.load(s), acc, PRECISION)
        q += BK
        s += BK * value_dim
    acc *= scale * factors(READING, at + ts, GATED)[:, None]
    scores = tl.load(SCORES + at * BLOCK + (ts[:, None] * BLOCK + ts[None, :]))
    writes = tl.load(WRITES + at * value_dim + (ts[:, None] * value_dim + vs[None, :]))
    acc = dot(scores, writes, acc, PRECISION)
    out = OUT + (z // heads) * o_b + (z % heads) * o_h + first * o_t + (ts[:, None] * o_t + vs[None, :])
    tl.store(out, acc.to(OUT.dtype.element_ty))
