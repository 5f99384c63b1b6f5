"""What decays per head (SSD): sums of decays, which the delta rule takes too, gradients of what pairs of tokens of one chunk
exchange, and of decays and steps."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import BLOCK, dot
from .gated import FORGOTTEN, LOG2E

HEADS = 16
"""Heads whose decays and steps a program takes at once: a run of 64 bytes of `[B, T, H]`."""


@triton.jit
def step_sums(
    G, DT, HI, LO, READING, TO_END, WRITING, STEPS, CHUNK_DECAY,
    g_b, g_t, d_b, d_t, chunks, heads, group,
    CHUNK: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Sums of log2-decays from the start of each chunk to each token, itself included, and what is made of them and of the steps.

    Sums are float64, stored as HI + LO. READING and TO_END: decays since the start of and to the end of the chunk; WRITING: TO_END
    times the step. Inputs are `[B, tokens, heads]`, results `[B, heads, tokens]` float32, but CHUNK_DECAY `[B, groups, chunks,
    group]`, with `group` heads to a group.

    Grid: (heads / BH rounded up, chunks, B).
    """
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1)
    hs = tl.program_id(0) * BH + tl.arange(0, BH)
    ts = c * CHUNK + tl.arange(0, CHUNK)
    valid = hs < heads
    inside = valid[:, None] & (ts >= 0)[None, :]
    g = tl.load(G + b * g_b + ts[None, :] * g_t + hs[:, None], mask=inside, other=0.0).to(tl.float64) * LOG2E
    dt = tl.load(DT + b * d_b + ts[None, :] * d_t + hs[:, None], mask=inside, other=0.0)
    g = tl.where(g < FORGOTTEN, FORGOTTEN, g)
    sums = tl.cumsum(g, axis=1)
    total = tl.sum(g, 1)
    hi = sums.to(tl.float32)
    places = (b * heads + hs[:, None]) * (chunks * CHUNK) + ts[None, :]
    tl.store(HI + places, hi, mask=inside)
    tl.store(LO + places, (sums - hi.to(tl.float64)).to(tl.float32), mask=inside)
    tl.store(READING + places, tl.exp2(sums).to(tl.float32), mask=inside)
    to_end = tl.exp2(total[:, None] - sums).to(tl.float32)
    tl.store(TO_END + places, to_end, mask=inside)
    tl.store(WRITING + places, to_end * dt, mask=inside)
    tl.store(STEPS + places, dt, mask=inside)
    row = (b * (heads // group) + hs // group) * chunks + c
    tl.store(CHUNK_DECAY + row * group + hs % group, total.to(tl.float32), mask=valid)


@triton.jit
def pair_gradients(
    X, DY, SCORES, HI, LO, DT, DSCORES, ROWS, COLUMNS, OWN, INSIDE, SKIP,
    x_b, x_h, x_t, d_b, d_h, d_t, w_b, w_h, w_n, groups, tokens, heads, size,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Gradients of what pairs of tokens j <= i of one chunk exchange, in all heads of a group.

    Let m_ij = (dy_i · x_j) exp2(b_i - b_j) C_i·B_j in a head. DSCORES_ij gets Σ over heads of m_ij dt_j / (C_i·B_j). Per head,
    blocks s > u: ROWS_i = Σ_j m_ij dt_j in a slot for u and COLUMNS_j = Σ_i m_ij in a slot for s, slots `size` elements apart.
    One block: OWN_j = Σ_{i >= j} m_ij, INSIDE_t = Σ_{i >= t > j} m_ij dt_j, which is the gradient of t's log-decay, and SKIP_i =
    dy_i · x_i. DIAGONAL: pairs within one block; otherwise of blocks s > u. Two launches, since a kernel for both spills registers.

    Grid: (CHUNK / BLOCK, squared where not DIAGONAL, chunks, B * groups).
    """
    s = tl.program_id(0)
    u = s
    if not DIAGONAL:
        u = s % (CHUNK // BLOCK)
        s = s // (CHUNK // BLOCK)
        if u >= s:
            return
    z = tl.program_id(2).to(tl.int64)
    b = z // groups
    h = z % groups
    ts = tl.arange(0, BLOCK)
    t0 = tl.program_id(1) * CHUNK
    # Pointers are scalars plus small offsets: 64-bit offsets per element would take the registers.
    first = ((z * tokens + t0 + s * BLOCK) * CHUNK + u * BLOCK).to(tl.int64)
    places = ts[:, None] * CHUNK + ts[None, :]
    scores = tl.load(SCORES + first + places)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    ps = tl.arange(0, BP)
    dy = DY + b * d_b + h * d_h + (t0 + s * BLOCK) * d_t + (ts[:, None] * d_t + ps[None, :])
    x = X + b * x_b + h * x_h + (t0 + u * BLOCK) * x_t + (ts[None, :] * x_t + ps[:, None])
    at_rows = b * w_b + h * w_h + t0 + s * BLOCK
    at_columns = b * w_b + h * w_h + t0 + u * BLOCK
    for head in range(0, heads):
        product = tl.zeros([BLOCK, BLOCK], tl.float32)
        for p in tl.static_range(0, HEAD_DIM, BP):
            product = dot(tl.load(dy + head * HEAD_DIM + p), tl.load(x + head * HEAD_DIM + p), product, PRECISION)
        row = at_rows + head * w_n
        column = at_columns + head * w_n
        exponent = tl.load(HI + row + ts)[:, None] - tl.load(HI + column + ts)[None, :]
        exponent += tl.load(LO + row + ts)[:, None] - tl.load(LO + column + ts)[None, :]
        decayed = product * tl.exp2(tl.minimum(exponent, 0.0))
        if DIAGONAL:
            decayed = tl.where(ts[:, None] >= ts[None, :], decayed, 0.0)
        dt = tl.load(DT + column + ts)[None, :]
        total += decayed * dt
        m = decayed * scores.to(tl.float32)
        if DIAGONAL:
            tl.store(OWN + column + ts, tl.sum(m, 0))
            tl.store(SKIP + row + ts, tl.sum(tl.where(ts[:, None] == ts[None, :], product, 0.0), 1))
            crossing = tl.where(ts[:, None] > ts[None, :], tl.cumsum(m * dt, axis=1), 0.0)
            tl.store(INSIDE + column + 1 + ts, tl.sum(crossing, 0), mask=ts < BLOCK - 1)
        else:
            tl.store(ROWS + u * size + row + ts, tl.sum(m * dt, 1))
            tl.store(COLUMNS + s * size + column + ts, tl.sum(m, 0))
    tl.store(DSCORES + first + places, total.to(DSCORES.dtype.element_ty))


@triton.jit
def writers(WRITTEN, COLUMNS, STEPS, places, mask, first, last, size):
    """What tokens at `places` write: for tokens behind the chunk, and for those in its blocks from `first` to `last`; and steps."""
    written = tl.load(WRITTEN + places, mask=mask, other=0.0)
    for s in range(first, last):
        written += tl.load(COLUMNS + s * size + places, mask=mask, other=0.0)
    return written, tl.load(STEPS + places, mask=mask, other=0.0)


@triton.jit
def readers(READ, ROWS, places, mask, last, size):
    """What tokens at `places` read: of the state in front of the chunk, and of its blocks before `last`."""
    read = tl.load(READ + places, mask=mask, other=0.0)
    for u in range(0, last):
        read += tl.load(ROWS + u * size + places, mask=mask, other=0.0)
    return read


@triton.jit
def step_gradients(
    G, STEPS, READ, WRITTEN, ROWS, COLUMNS, OWN, INSIDE, CROSSING, DDT, DG,
    g_b, g_t, o_b, o_t, chunks, heads, group, size,
    CHUNK: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Gradients of steps and log-decays: a token's decay touches what tokens before it wrote and tokens from it on read.

    Every sum runs over such pairs alone. As a difference of sums over all pairs it would leave their rounding errors where strong
    decays make the rest tiny. READ and WRITTEN: what tokens read of the state in front of the chunk, and write, but for the step,
    to that behind it; ROWS to INSIDE: see `pair_gradients`; CROSSING `[B, groups, chunks, group]`: what crosses whole chunks.
    Inputs are `[B, heads, tokens]`; log-decays G and the gradients `[B, tokens, heads]`.

    Grid: (heads / BH rounded up, tokens / BLOCK, B).
    """
    b = tl.program_id(2).to(tl.int64)
    blocks = CHUNK // BLOCK
    c = tl.program_id(1) // blocks
    s = tl.program_id(1) % blocks
    hs = tl.program_id(0) * BH + tl.arange(0, BH)
    ts = tl.arange(0, BLOCK)
    valid = hs < heads
    inside = valid[:, None] & (ts >= 0)[None, :]
    chunk = (b * heads + hs[:, None]) * (chunks * CHUNK) + c * CHUNK + ts[None, :]
    own = chunk + s * BLOCK
    written, _ = writers(WRITTEN, COLUMNS, STEPS, own, inside, s + 1, blocks, size)
    token = (tl.program_id(1) * BLOCK + ts)[None, :]
    out = b * o_b + token * o_t + hs[:, None]
    tl.store(DDT + out, written + tl.load(OWN + own, mask=inside, other=0.0), mask=inside)
    following = inside & (ts > 0)[None, :]
    written, step = writers(WRITTEN, COLUMNS, STEPS, own - 1, following, s + 1, blocks, size)
    dg = tl.cumsum(written * step, axis=1) + tl.load(INSIDE + own, mask=following, other=0.0)
    dg += tl.cumsum(readers(READ, ROWS, own, inside, s, size), axis=1, reverse=True)
    row = (b * (heads // group) + hs // group) * chunks + c
    others = tl.load(CROSSING + row * group + hs % group, mask=valid, other=0.0)
    for u in range(0, s):
        written, step = writers(WRITTEN, COLUMNS, STEPS, chunk + u * BLOCK, inside, 0, 0, size)
        others += tl.sum(written * step, 1)
    for later in range(s + 1, blocks):
        others += tl.sum(readers(READ, ROWS, chunk + later * BLOCK, inside, s, size), 1)
    g = tl.load(G + b * g_b + token * g_t + hs[:, None], mask=inside, other=0.0)
    tl.store(DG + out, tl.where(g * LOG2E < FORGOTTEN, 0.0, dg + others[:, None]), mask=inside)
