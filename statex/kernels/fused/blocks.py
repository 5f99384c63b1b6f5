"""The matrix products that GLA and SSD share: carrying states over chunks, reading them, scores of token pairs, gradients.

Time is cut into chunks of CHUNK tokens, chunks into blocks of BLOCK. A *reader* is one (query, value block) pair of a head: GLA has
`GROUP` queries to a head and, under a mixing matrix, `PARTS` blocks of its values, each read with a query of its own. States and
row workspaces are padded by the caller, so that no product needs a mask. Tensors of the caller come with their strides. What SSD
has per token and head lies head by head, `[B, H, tokens]`, with strides w_b, w_h (a group) and w_n (a head), to be loaded in runs.
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs the kernels on a CPU, for tests."""


def constant(value: Any) -> Any:
    """A global that kernels read: compiled ones insist on `constexpr`, with which the interpreter's integers do not compute."""
    return value if INTERPRETED else tl.constexpr(value)


BLOCK = constant(64)
"""Tokens in a block: the unit of scores, and of local decays."""

UPCAST = constant(INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. PRECISION says how float32 operands are multiplied; bfloat16 ones are not affected."""
    if UPCAST:  # its bfloat16 product multiplies bit patterns (triton#11584)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def carry_states(
    X, Y, W, DECAY, START, STATES, END, OTHER, ENERGY,
    x_b, x_h, x_g, x_p, x_t, y_b, y_h, y_g, y_t, w_b, w_h, w_n,
    heads, chunks, K, V, part_width, head_dim,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, BY_ROW: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """STATES[c] = the state in front of chunk c; S <- decay_c ∘ S + X_cᵀ Y_c. Backward in time: the gradient behind chunk c.

    A program keeps one tile of the state in registers over all tokens, so a state is written once a chunk and never read. Decays go
    by row (GLA: X and Y come ready) or by head (SSD: Y is weighted by W on the way, and a tile lies within one head). Going
    backward, ENERGY gets, per chunk and row (column), the sum over the tile of the state OTHER in front of the chunk times its
    gradient by way of the state behind the chunk: the gradient of the log-decay of the whole chunk.

    Grid: (V / BV, K / BK, B * heads).
    """
    k0 = tl.program_id(1) * BK
    v0 = tl.program_id(0) * BV
    z = tl.program_id(2).to(tl.int64)
    b = z // heads
    h = z % heads
    ks = k0 + tl.arange(0, BK)
    vs = v0 + tl.arange(0, BV)
    ts = tl.arange(0, BLOCK)
    tile = ks[:, None] * V + vs[None, :]
    size = K.to(tl.int64) * V
    X += b * x_b + h * x_h + (v0 // part_width) * x_p + ks[:, None]
    Y += b * y_b + h * y_h + vs[None, :]
    head = v0 // head_dim
    W += b * w_b + h * w_h + head * w_n
    STATES += z * (chunks + 1) * size + tile
    OTHER += z * (chunks + 1) * size + tile
    acc = tl.load(START + z * size + tile)
    steps = GROUP * (CHUNK // BLOCK)
    for i in range(0, chunks * steps):
        c = i // steps
        if BACKWARD:
            c = chunks - 1 - c
        part = i % steps
        if part == 0:
            tl.store(STATES + c * size, acc.to(STATES.dtype.element_ty))
            if BY_ROW:
                acc *= tl.exp2(tl.load(DECAY + (z * chunks + c) * K + ks))[:, None]
            else:
                acc *= tl.exp2(tl.load(DECAY + (z * chunks + c) * (V // head_dim) + head))
            if BACKWARD:
                product = acc * tl.load(OTHER + c * size).to(tl.float32)
                if BY_ROW:
                    row = (tl.program_id(0) * tl.num_programs(2) + z) * chunks + c
                    tl.store(ENERGY + row * K + ks, tl.sum(product, 1))
                else:
                    row = (tl.program_id(1) * tl.num_programs(2) + z) * chunks + c
                    tl.store(ENERGY + row * V + vs, tl.sum(product, 0))
        g = part // (CHUNK // BLOCK)
        t = c * CHUNK + (part % (CHUNK // BLOCK)) * BLOCK + ts
        x = tl.load(X + g * x_g + t[None, :] * x_t)
        y = tl.load(Y + g * y_g + t[:, None] * y_t)
        if not BY_ROW:
            y = (y * tl.load(W + t)[:, None]).to(y.dtype)
        acc = dot(x, y, acc, PRECISION)
    tl.store(STATES + chunks * size, acc.to(STATES.dtype.element_ty))
    tl.store(END + z * size + tile, acc)


@triton.jit
def add_triangle(
    acc, A, Y, HI, LO, DT, y_t, first,
    CHUNK: tl.constexpr, BM: tl.constexpr, TRANSPOSED: tl.constexpr, DECAYED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + A[first : first + BM] @ Y over the tokens of one chunk up to each row's own; with TRANSPOSED, from it on, by Aᵀ.

    A, Y, HI, LO, DT point at the chunk's first token; Y at the columns too. DECAYED (SSD): A_ij is multiplied by
    exp2(b_i - b_j) with b = HI + LO, whose differences so lose no digits, and by DT_j (not when transposed).
    """
    rows = tl.max_contiguous(tl.multiple_of(first + tl.arange(0, BM), BLOCK), BLOCK)
    lowest = 0
    highest = first + BM
    if TRANSPOSED:
        lowest = first
        highest = CHUNK
    for u in range(lowest, highest, BLOCK):
        others = u + tl.arange(0, BLOCK)
        if TRANSPOSED:
            a = tl.load(A + others[None, :] * CHUNK + rows[:, None])
            causal = others[None, :] >= rows[:, None]
        else:
            a = tl.load(A + rows[:, None] * CHUNK + others[None, :])
            causal = others[None, :] <= rows[:, None]
        a = tl.where(causal, a, 0.0)
        y = tl.load(Y + others[:, None] * y_t)
        if DECAYED:
            exponent = tl.load(HI + rows)[:, None] - tl.load(HI + others)[None, :]
            exponent += tl.load(LO + rows)[:, None] - tl.load(LO + others)[None, :]
            if TRANSPOSED:
                exponent = -exponent
            a = a * tl.exp2(tl.minimum(exponent, 0.0))
            if not TRANSPOSED:
                a *= tl.load(DT + others)[None, :]
        acc = dot(a.to(y.dtype), y, acc, PRECISION)
    return acc


@triton.jit
def read_states(
    X, STATES, A, Y, OUT, ROW_SCALE, HI, LO, DT, SKIP, PARTNER, SUMS,
    x_b, x_h, x_g, x_p, x_t, y_b, y_h, y_g, y_t, o_b, o_h, o_g, o_t, p_b, p_h, p_t, w_b, w_h, w_n,
    heads, tokens, chunks, K, V, part_width, head_dim,
    GROUP: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr, SCALAR: tl.constexpr,
    HAS_SKIP: tl.constexpr, SUMMED: tl.constexpr, WRITTEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """OUT = X S_c + (A causal) Y: outputs from queries and values; with TRANSPOSED, value gradients from keys and output gradients.

    Not transposed, programs run over queries of a group; transposed, one program adds up the group. SCALAR (SSD): ROW_SCALE on
    X S_c, decays inside the chunk from HI + LO, SKIP the factor D of the skip connection. SUMMED: SUMS gets the row sums of X S_c
    times PARTNER, from which decay and step gradients are made; WRITTEN false: nothing else is computed.

    Grid: (V / BN, tokens / BM, B * heads * (1 if TRANSPOSED else GROUP)).
    """
    n0 = tl.program_id(0) * BN
    t0 = tl.program_id(1) * BM
    z = tl.program_id(2).to(tl.int64)
    g = z * 0
    if not TRANSPOSED:
        g = z % GROUP
        z = z // GROUP
    b = z // heads
    h = z % heads
    c = t0 // CHUNK
    part = n0 // part_width
    size = K.to(tl.int64) * V
    rows = t0 + tl.arange(0, BM)
    ns = n0 + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    x = X + b * x_b + h * x_h + rows[:, None] * x_t + ks[None, :]
    if not TRANSPOSED:
        x += g * x_g + part * x_p
    s = STATES + (z * (chunks + 1) + c) * size + ks[:, None] * V + ns[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, K, BK):
        acc = dot(tl.load(x), tl.load(s), acc, PRECISION)
        x += BK
        s += BK * V
    first = t0 % CHUNK
    head = n0 // head_dim
    weights = b * w_b + h * w_h + head * w_n
    if SCALAR:
        acc *= tl.load(ROW_SCALE + weights + rows)[:, None]
    if SUMMED:
        partner = tl.load(PARTNER + b * p_b + h * p_h + rows[:, None] * p_t + ns[None, :]).to(tl.float32)
        slot = (n0 % head_dim) // BN
        slots = slot * (tl.num_programs(2) // heads) * w_b
        tl.store(SUMS + slots + weights + rows, tl.sum(acc * partner, 1))
    if WRITTEN:
        weights += c * CHUNK
        for other in tl.static_range(GROUP if TRANSPOSED else 1):
            reader = g + other
            acc = add_triangle(
                acc,
                A + ((z * GROUP + reader) * PARTS + part) * tokens * CHUNK + c * CHUNK * CHUNK,
                Y + b * y_b + h * y_h + reader * y_g * TRANSPOSED + c * CHUNK * y_t + ns[None, :],
                HI + weights, LO + weights, DT + weights, y_t, first, CHUNK, BM, TRANSPOSED, SCALAR, PRECISION,
            )  # fmt: skip
        if SCALAR:
            if TRANSPOSED:
                acc *= tl.load(DT + weights + first + tl.arange(0, BM))[:, None]
            if HAS_SKIP:
                own = tl.load(Y + b * y_b + h * y_h + rows[:, None] * y_t + ns[None, :]).to(tl.float32)
                acc += tl.load(SKIP + h * (w_h // w_n) + head) * own
        out = OUT + b * o_b + h * o_h + g * o_g + rows[:, None] * o_t + ns[None, :]
        tl.store(out, acc.to(OUT.dtype.element_ty))


@triton.jit
def project(
    X, STATES, A, Y, W, OUT,
    x_b, x_h, x_g, x_t, y_b, y_h, y_t, o_b, o_h, o_r, o_t, w_b, w_h, w_n,
    heads, tokens, chunks, K, V, part_width, head_dim,
    GROUP: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, WEIGHTED: tl.constexpr, TRIANGLE: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """OUT = X S_cᵀ over each part's values: gradients of queries (X the output gradients) or keys (X the values).

    WEIGHTED (SSD): X is multiplied by W per token and head, and BK divides a head's channels. TRIANGLE (SSD): plus (A causal, or
    transposed) Y.

    Grid: (K / BN, tokens / BM, B * heads * GROUP * PARTS); OUT has strides of batch, head, reader and token.
    """
    n0 = tl.program_id(0) * BN
    t0 = tl.program_id(1) * BM
    z = tl.program_id(2).to(tl.int64)
    reader = z % (GROUP * PARTS)
    part = z % PARTS
    g = (z // PARTS) % GROUP
    z = z // (PARTS * GROUP)
    b = z // heads
    h = z % heads
    c = t0 // CHUNK
    rows = t0 + tl.arange(0, BM)
    ns = n0 + tl.arange(0, BN)
    vs = tl.arange(0, BK)
    x = X + b * x_b + h * x_h + g * x_g + part * part_width + rows[:, None] * x_t + vs[None, :]
    s = STATES + (z * (chunks + 1) + c) * K * V + part * part_width + ns[None, :] * V + vs[:, None]
    w = W + b * w_b + h * w_h + rows
    acc = tl.zeros([BM, BN], tl.float32)
    for v0 in range(0, part_width, BK):
        values = tl.load(x)
        if WEIGHTED:
            values = (values * tl.load(w + (v0 // head_dim) * w_n)[:, None]).to(values.dtype)
        acc = dot(values, tl.load(s), acc, PRECISION)
        x += BK
        s += BK
    if TRIANGLE:
        acc = add_triangle(
            acc, A + z * tokens * CHUNK + c * CHUNK * CHUNK, Y + b * y_b + h * y_h + c * CHUNK * y_t + ns[None, :],
            W, W, W, y_t, t0 % CHUNK, CHUNK, BM, TRANSPOSED, False, PRECISION,
        )  # fmt: skip
    out = OUT + b * o_b + h * o_h + reader * o_r + rows[:, None] * o_t + ns[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty))


@triton.jit
def score_pairs(
    X, Y, A, x_b, x_h, x_g, x_t, y_b, y_h, y_t, heads, tokens, width,
    GROUP: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A_ij = X_i · Y_j for all pairs of blocks of a chunk with j's block not after i's, without decays; zero for j > i.

    SSD: C and B. GLA: output gradients and values, per reader over its part of the values (`width` channels).

    Grid: ((CHUNK / BLOCK)², chunks, B * heads * GROUP * PARTS); A is `[B, heads, GROUP * PARTS, tokens, CHUNK]`.
    """
    s = tl.program_id(0) // (CHUNK // BLOCK)
    u = tl.program_id(0) % (CHUNK // BLOCK)
    if u > s:
        return
    z = tl.program_id(2).to(tl.int64)
    A += z * tokens * CHUNK
    part = z % PARTS
    g = (z // PARTS) % GROUP
    z = z // (PARTS * GROUP)
    t0 = tl.program_id(1) * CHUNK
    rows = t0 + s * BLOCK + tl.arange(0, BLOCK)
    others = u * BLOCK + tl.arange(0, BLOCK)
    cs = part * width + tl.arange(0, BK)
    x = X + (z // heads) * x_b + (z % heads) * x_h + g * x_g + rows[:, None] * x_t + cs[None, :]
    y = Y + (z // heads) * y_b + (z % heads) * y_h + (t0 + others)[None, :] * y_t + cs[:, None]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(0, width, BK):
        acc = dot(tl.load(x), tl.load(y), acc, PRECISION)
        x += BK
        y += BK
    acc = tl.where((s * BLOCK + tl.arange(0, BLOCK))[:, None] >= others[None, :], acc, 0.0)
    tl.store(A + rows[:, None] * CHUNK + others[None, :], acc.to(A.dtype.element_ty))
