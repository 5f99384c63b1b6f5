"""What decays per head (SSD): gradients of what pairs of tokens of one chunk exchange, for all heads that share their keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import BLOCK, dot


@triton.jit
def pair_gradients(
    X, DY, SCORES, HI, LO, DT, DSCORES, ROWS, COLUMNS, OWN, INSIDE, SKIP,
    x_b, x_h, x_t, d_b, d_h, d_t, w_b, w_h, w_t, groups, tokens, heads, head_dim, size,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Gradients of what pairs of tokens j <= i of one chunk exchange, in all heads of a group.

    Let m_ij = (dy_i · x_j) exp2(b_i - b_j) C_i·B_j in a head. DSCORES_ij gets Σ over heads of m_ij dt_j / (C_i·B_j). Per head,
    blocks s > u: ROWS_i = Σ_j m_ij dt_j in a slot for u and COLUMNS_j = Σ_i m_ij in a slot for s, slots `size` elements apart.
    One block: OWN_j = Σ_{i >= j} m_ij, INSIDE_t = Σ_{i >= t > j} m_ij dt_j, which is the gradient of t's log-decay, and SKIP_i =
    dy_i · x_i.

    Grid: ((CHUNK / BLOCK)², chunks, B * groups).
    """
    s = tl.program_id(0) // (CHUNK // BLOCK)
    u = tl.program_id(0) % (CHUNK // BLOCK)
    if u > s:
        return
    z = tl.program_id(2).to(tl.int64)
    b = z // groups
    h = z % groups
    ts = tl.arange(0, BLOCK)
    t0 = tl.program_id(1) * CHUNK
    rows = t0 + s * BLOCK + ts
    columns = t0 + u * BLOCK + ts
    places = (z * tokens + rows)[:, None] * CHUNK + (u * BLOCK + ts)[None, :]
    scores = tl.load(SCORES + places).to(tl.float32)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    causal = rows[:, None] >= columns[None, :]
    ps = tl.arange(0, BP)
    dy = DY + b * d_b + h * d_h + rows[:, None] * d_t + ps[None, :]
    x = X + b * x_b + h * x_h + columns[None, :] * x_t + ps[:, None]
    weights = b * w_b + h * w_h
    for head in range(0, heads):
        product = tl.zeros([BLOCK, BLOCK], tl.float32)
        for p in range(0, head_dim, BP):
            product = dot(tl.load(dy + head * head_dim + p), tl.load(x + head * head_dim + p), product, PRECISION)
        at_rows = weights + head + rows * w_t
        at_columns = weights + head + columns * w_t
        exponent = tl.load(HI + at_rows)[:, None] - tl.load(HI + at_columns)[None, :]
        exponent += tl.load(LO + at_rows)[:, None] - tl.load(LO + at_columns)[None, :]
        dt = tl.load(DT + at_columns)[None, :]
        decayed = tl.where(causal, product * tl.exp2(tl.minimum(exponent, 0.0)), 0.0)
        total += decayed * dt
        m = decayed * scores
        if s == u:
            tl.store(OWN + at_columns, tl.sum(m, 0))
            tl.store(SKIP + at_rows, tl.sum(tl.where(rows[:, None] == columns[None, :], product, 0.0), 1))
            crossing = tl.where(rows[:, None] > columns[None, :], tl.cumsum(m * dt, axis=1), 0.0)
            tl.store(INSIDE + at_columns + w_t, tl.sum(crossing, 0), mask=ts < BLOCK - 1)
        else:
            tl.store(ROWS + u * size + at_rows, tl.sum(m * dt, 1))
            tl.store(COLUMNS + s * size + at_columns, tl.sum(m, 0))
    tl.store(DSCORES + places, total.to(DSCORES.dtype.element_ty))
