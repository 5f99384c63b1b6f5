"""What decays per head (SSD): gradients of what pairs of tokens of one chunk exchange, for all heads that share their keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import BLOCK, dot


@triton.jit
def pair_gradients(
    X, DY, SCORES, HI, LO, DT, DSCORES, ROWS, COLUMNS, OWN, INSIDE, SKIP,
    x_b, x_h, x_t, d_b, d_h, d_t, w_b, w_h, w_t, groups, tokens, heads, size,
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
    at_rows = b * w_b + h * w_h + (t0 + s * BLOCK) * w_t
    at_columns = b * w_b + h * w_h + (t0 + u * BLOCK) * w_t
    steps = ts * w_t
    for head in range(0, heads):
        product = tl.zeros([BLOCK, BLOCK], tl.float32)
        for p in tl.static_range(0, HEAD_DIM, BP):
            product = dot(tl.load(dy + head * HEAD_DIM + p), tl.load(x + head * HEAD_DIM + p), product, PRECISION)
        row = at_rows + head
        column = at_columns + head
        exponent = tl.load(HI + row + steps)[:, None] - tl.load(HI + column + steps)[None, :]
        exponent += tl.load(LO + row + steps)[:, None] - tl.load(LO + column + steps)[None, :]
        decayed = product * tl.exp2(tl.minimum(exponent, 0.0))
        if DIAGONAL:
            decayed = tl.where(ts[:, None] >= ts[None, :], decayed, 0.0)
        dt = tl.load(DT + column + steps)[None, :]
        total += decayed * dt
        m = decayed * scores.to(tl.float32)
        if DIAGONAL:
            tl.store(OWN + column + steps, tl.sum(m, 0))
            tl.store(SKIP + row + steps, tl.sum(tl.where(ts[:, None] == ts[None, :], product, 0.0), 1))
            crossing = tl.where(ts[:, None] > ts[None, :], tl.cumsum(m * dt, axis=1), 0.0)
            tl.store(INSIDE + column + w_t + steps, tl.sum(crossing, 0), mask=ts < BLOCK - 1)
        else:
            tl.store(ROWS + u * size + row + steps, tl.sum(m * dt, 1))
            tl.store(COLUMNS + s * size + column + steps, tl.sum(m, 0))
    tl.store(DSCORES + first + places, total.to(DSCORES.dtype.element_ty))
