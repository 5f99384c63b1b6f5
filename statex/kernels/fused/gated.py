"""What decays per key channel (GLA): decayed operands, scores inside chunks, and their gradients.

Inside a block of BLOCK tokens let b_i be the sum of log2-decays up to and including token i, and e_u the sum over all of block u.
`near` rows carry the decay to a border of their block (queries from its start, keys to its end), `far` rows the decay to a border
of their chunk. A pair of tokens in blocks s > u scores (q_near_i ∘ exp2(e_{u+1} + .. + e_{s-1})) · k_near_j, and a pair in one
block (q_near_i ∘ exp2(-e_s)) · k_near_j, in the channels that decay by no more than MILD over the block; `steep` adds the others.
No other exponent is ever positive. Sums of decays are never subtracted from one another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import BLOCK, constant, dot
from .rows import back, load_moved, moved_back

LOG2E = constant(1.4426950408889634)

MILD = constant(80.0)
"""Log2-decay of a whole block up to which its inverse may be multiplied: bfloat16 and float32 reach 2^127."""

FORGOTTEN = constant(-433.0)
"""Log2-decays are cut off here (-300 nats): exp2 is 0 in float32 long before."""


@triton.jit
def load_decay(G, rows, cs, g_t, key_dim, state_dim, valid):
    """Log2-decays at `rows` and state channels `cs`; the parts of a lifted key share theirs, padded channels do not decay."""
    keep = valid & (cs < state_dim)[None, :]
    g = tl.load(G + rows[:, None] * g_t + (cs % key_dim)[None, :], mask=keep, other=0.0).to(tl.float32)
    return tl.maximum(g * LOG2E, FORGOTTEN)


@triton.jit
def since_start(g):
    """Sums of `g` `[BLOCK, BK]` from the start of the block to each token, itself included."""
    return tl.cumsum(g, axis=0)


@triton.jit
def to_end(G, t0, cs, g_t, key_dim, state_dim):
    """Sums of log2-decays from each token, itself excluded, to the end of its block, `[BLOCK, BK]`."""
    ts = tl.arange(0, BLOCK)
    following = load_decay(G, t0 + ts + 1, cs, g_t, key_dim, state_dim, (ts < BLOCK - 1)[:, None])
    return tl.cumsum(following, axis=0, reverse=True)


@triton.jit
def load_rows(X, ROOT, ts, cs, x_t, root_t, inside, LIFT: tl.constexpr):
    """Rows of x `[BLOCK, BK]`, float32, zero where not `inside`, and 1 / rms(x) `[BLOCK, 1]`, which ROOT holds."""
    x = tl.load(X + ts[:, None] * x_t + cs[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    root = 1.0
    if LIFT > 1:
        root = tl.load(ROOT + ts * root_t)[:, None]
    return x, root


@triton.jit
def lifted(x, root, X, ts, cs, parts, x_t, key_dim, inside, LIFT: tl.constexpr):
    """Channels `cs` of parts `parts` of the lifted rows of x: part 0 is x, part r psi_r(x)."""
    if LIFT > 1:
        rolled = tl.load(X + ts[:, None] * x_t + back(cs, parts, key_dim)[None, :], mask=inside[None, :], other=0.0)
        x *= tl.where((parts == 0)[None, :], 1.0, rolled.to(tl.float32) * root)
    return x


@triton.jit
def query_gains(
    GAMMA, MIXING, h, r, cs, parts, key_dim, inside,
    GROUP: tl.constexpr, PARTS: tl.constexpr, LIFT: tl.constexpr, GATED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """γ ∘ M_j at channels `cs` of parts `parts`, for reader r of head h, `[BK]`."""
    gains = tl.where(inside, 1.0, 0.0)
    if GATED:
        row = h * GROUP + r // PARTS
        gains *= tl.load(GAMMA + (row * (LIFT - 1) + parts - 1) * key_dim + cs, mask=inside & (parts > 0), other=1.0)
    if MIXED:
        gains *= tl.load(MIXING + (h * key_dim + cs) * PARTS + r % PARTS, mask=inside, other=0.0)
    return gains


@triton.jit
def write_parts(
    X, ROOT, GAMMA, MIXING, NEAR, FAR, x, decay, far, h, r, ts, cs, x_t, root_t, out, tile, key_dim, inside,
    GROUP: tl.constexpr, PARTS: tl.constexpr, LIFT: tl.constexpr, GATED: tl.constexpr, MIXED: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """Stores near and far rows of all parts of x, which decays by `decay`."""
    root = 1.0
    rolled = x
    before = x
    if LIFT > 1:
        root = tl.load(ROOT + ts * root_t)[:, None]
        before = load_moved(X, ts, cs, 4, x_t, key_dim, ts >= 0)
    for part in tl.static_range(LIFT):
        row = x.to(tl.float32) * decay
        if part > 0:
            if part % 4 == 0:
                rolled = before
                before = load_moved(X, ts, cs, part + 4, x_t, key_dim, ts >= 0)
            row *= moved_back(rolled, before, part % 4).to(tl.float32) * root
        if GATED or MIXED:
            parts = cs * 0 + part
            gains = query_gains(GAMMA, MIXING, h, r, cs, parts, key_dim, inside, GROUP, PARTS, LIFT, GATED, MIXED)
            row *= gains[None, :]
        places = out + part * key_dim + tile
        tl.store(NEAR + places, row.to(NEAR.dtype.element_ty), mask=inside[None, :])
        if CHUNKED:
            tl.store(FAR + places, (row * far[None, :]).to(FAR.dtype.element_ty), mask=inside[None, :])


@triton.jit
def decay_rows(
    Q, K, G, Q_ROOT, K_ROOT, GAMMA, MIXING, Q_NEAR, Q_FAR, K_NEAR, K_FAR, BLOCK_DECAY, CHUNK_DECAY,
    q_b, q_h, q_g, q_t, k_b, k_h, k_t, g_b, g_h, g_t, heads, tokens, channels, key_dim, state_dim, scale,
    GROUP: tl.constexpr, PARTS: tl.constexpr, LIFT: tl.constexpr, GATED: tl.constexpr, MIXED: tl.constexpr,
    CHUNK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Near and far rows of queries (times `scale`) and keys, and the log2-decays of blocks and chunks.

    A program makes all parts of its BK channels, which decay alike; even ones of keys, odd ones of queries. What lies beyond
    LIFT * key_dim is left as it was.

    Grid: (2 * (key_dim / BK rounded up), chunks, B * heads). Rows are `[B, heads, (readers,) tokens, channels]`.
    """
    z = tl.program_id(2).to(tl.int64)
    b = z // heads
    h = z % heads
    cs = (tl.program_id(0) // 2) * BK + tl.arange(0, BK)
    valid = cs < key_dim
    ts = tl.arange(0, BLOCK)
    tile = ts[:, None] * channels + cs[None, :]
    start = tl.program_id(1) * CHUNK
    G += b * g_b + h * g_h
    blocks: tl.constexpr = CHUNK // BLOCK
    other = tl.zeros([BK], tl.float32)
    if tl.program_id(0) % 2 == 0:
        K += b * k_b + h * k_h
        K_ROOT += b * tokens * heads + h
        for i in range(0, blocks):  # from the last block to the first: `other` is what decays after
            t0 = start + (blocks - 1 - i) * BLOCK
            following = load_decay(G, t0 + ts + 1, cs, g_t, key_dim, key_dim, (ts < BLOCK - 1)[:, None])
            total = load_decay(G, t0 + ts * 0, cs, g_t, key_dim, key_dim, (ts == 0)[:, None])
            x = tl.load(K + (t0 + ts)[:, None] * k_t + cs[None, :], mask=valid[None, :], other=0.0)
            total = tl.sum(following + total, 0)
            decay = tl.exp2(tl.cumsum(following, axis=0, reverse=True))
            write_parts(
                K, K_ROOT, GAMMA, MIXING, K_NEAR, K_FAR, x, decay, tl.exp2(other), h, 0, t0 + ts, cs, k_t, heads,
                (z * tokens + t0) * channels, tile, key_dim, valid, GROUP, PARTS, LIFT, False, False, blocks > 1,
            )  # fmt: skip
            block = z * (tokens // BLOCK) + t0 // BLOCK
            for part in tl.static_range(LIFT):
                tl.store(BLOCK_DECAY + block * channels + part * key_dim + cs, total, mask=valid)
            other += total
        row = z * (tokens // CHUNK) + tl.program_id(1)
        for part in tl.static_range(LIFT):
            tl.store(CHUNK_DECAY + row * channels + part * key_dim + cs, other, mask=valid)
    else:
        Q += b * q_b + h * q_h
        Q_ROOT += (b * tokens * heads + h) * GROUP
        for s in range(0, blocks):  # `other` is what decays before
            t0 = start + s * BLOCK
            g = load_decay(G, t0 + ts, cs, g_t, key_dim, key_dim, (ts >= 0)[:, None])
            decay = tl.exp2(since_start(g)) * scale
            far = tl.exp2(other)
            for r in range(0, GROUP * PARTS):
                query = Q + (r // PARTS) * q_g
                x = tl.load(query + (t0 + ts)[:, None] * q_t + cs[None, :], mask=valid[None, :], other=0.0)
                write_parts(
                    query, Q_ROOT + r // PARTS, GAMMA, MIXING, Q_NEAR, Q_FAR, x, decay, far, h, r, t0 + ts, cs, q_t, heads * GROUP,
                    ((z * (GROUP * PARTS) + r) * tokens + t0) * channels, tile, key_dim, valid,
                    GROUP, PARTS, LIFT, GATED, MIXED, blocks > 1,
                )  # fmt: skip
            other += tl.sum(g, 0)


@triton.jit
def decay_between(BLOCK_DECAY, u, s, channels, BLOCKS: tl.constexpr):
    """Log2-decay from the end of block u to the start of a later block s, or of the same one; without a loop, which would keep the
    loads of a loop around it from overlapping."""
    total = tl.load(BLOCK_DECAY + s * channels) * 0.0
    for m in tl.static_range(1, BLOCKS - 1):
        total += tl.load(BLOCK_DECAY + tl.minimum(u + m, s) * channels) * (u + m < s)
    return total


@triton.jit
def undecayed(total):
    """The inverse of a block's decay `total`; zero in channels that `steep` takes."""
    return tl.where(total >= -MILD, tl.exp2(tl.minimum(-total, MILD)), 0.0)


@triton.jit
def scores(
    Q_NEAR, K_NEAR, BLOCK_DECAY, A, tokens, channels,
    READERS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A_ij = Σ_c q_ic k_jc exp(decay from j to i) for all pairs of blocks of a chunk with j's block not after i's; zero for j > i.

    Grid: ((CHUNK / BLOCK)², chunks, B * heads * READERS).
    """
    s = tl.program_id(0) // (CHUNK // BLOCK)
    u = tl.program_id(0) % (CHUNK // BLOCK)
    if u > s:
        return
    zr = tl.program_id(2).to(tl.int64)
    z = zr // READERS
    ts = tl.arange(0, BLOCK)
    cs = tl.arange(0, BK)
    start = tl.program_id(1) * CHUNK
    rows = start + s * BLOCK + ts
    q = Q_NEAR + (zr * tokens + rows)[:, None] * channels + cs[None, :]
    k = K_NEAR + (z * tokens + start + u * BLOCK + ts)[None, :] * channels + cs[:, None]
    BLOCK_DECAY += (z * (tokens // BLOCK) + start // BLOCK) * channels + cs
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k0 in range(0, channels, BK):
        own = undecayed(tl.load(BLOCK_DECAY + s * channels + k0))
        factor = tl.where(u == s, own, tl.exp2(decay_between(BLOCK_DECAY + k0, u, s, channels, CHUNK // BLOCK)))
        q_near = tl.load(q + k0)
        acc = dot((q_near * factor[None, :]).to(q_near.dtype), tl.load(k + k0), acc, PRECISION)
    if u == s:
        acc = tl.where(ts[:, None] >= ts[None, :], acc, 0.0)
    places = (zr * tokens + rows)[:, None] * CHUNK + (u * BLOCK + ts)[None, :]
    tl.store(A + places, acc.to(A.dtype.element_ty))


@triton.jit
def row_gradients(
    G, Q_NEAR, K_NEAR, BLOCK_DECAY, DA, DQ_FAR, DK_FAR, DQ, DK, DB,
    g_b, g_h, g_t, dq_b, dq_h, dq_r, dq_t, dk_b, dk_h, dk_t, heads, tokens, channels, key_dim, state_dim, scale,
    READERS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and log-decay sums from those of scores (DA) and far rows (DQ_FAR, DK_FAR, float32).

    DB_i is what token i adds to the gradients of all log-decays of the chunk up to its own: what it reads counts up, what it
    writes for later tokens of the chunk counts down, each as the product of the very rounded operands that the forward products
    used, so that what should cancel does: a token's product with itself, too, which decays by nothing. What the far keys write is
    left to `decay_gradients`.

    Grid: (channels / BK, tokens / BLOCK, B * heads).
    """
    z = tl.program_id(2).to(tl.int64)
    b = z // heads
    h = z % heads
    blocks = CHUNK // BLOCK
    s = tl.program_id(1) % blocks
    t0 = tl.program_id(1) * BLOCK
    start = t0 - s * BLOCK
    ts = tl.arange(0, BLOCK)
    cs = tl.program_id(0) * BK + tl.arange(0, BK)
    G += b * g_b + h * g_h
    BLOCK_DECAY += (z * (tokens // BLOCK) + start // BLOCK) * channels + cs
    # One tile of offsets each for rows and scores; all else of an address is the same for all threads.
    tile = ts[:, None] * channels + cs[None, :]
    pairs = ts[:, None] * CHUNK + ts[None, :]
    pairs_t = ts[None, :] * CHUNK + ts[:, None]
    own = (z * tokens + t0) * channels
    dtype = Q_NEAR.dtype.element_ty
    decay = undecayed(tl.load(BLOCK_DECAY + s * channels))
    # Decays between blocks grow with the loops below, as `decay_between` adds them up.
    dk = tl.zeros([BLOCK, BK], tl.float32)
    after = tl.zeros([BK], tl.float32)
    for r in range(0, READERS):
        zr = z * READERS + r
        q = Q_NEAR + (zr * tokens + t0) * channels
        da = DA + (zr * tokens + t0) * CHUNK + s * BLOCK
        after = tl.zeros([BK], tl.float32)
        for i in range(0, blocks - s):  # queries of this block and of later ones
            da_us = tl.load(da + i * BLOCK * CHUNK + pairs_t)
            q_u = tl.load(q + i * BLOCK * channels + tile)
            factor = tl.where(i > 0, tl.exp2(after), decay)
            dk = dot(da_us, (q_u * factor[None, :]).to(dtype), dk, PRECISION)
            after += tl.load(BLOCK_DECAY + (s + i) * channels) * (i > 0)
    k_near = tl.load(K_NEAR + own + tile)
    db = -dk * k_near.to(tl.float32)
    dk += tl.load(DK_FAR + own + tile) * tl.exp2(after)[None, :]
    dk *= tl.exp2(to_end(G, t0, cs, g_t, key_dim, state_dim))
    out = DK + b * dk_b + h * dk_h + t0 * dk_t + ts[:, None] * dk_t + cs[None, :]
    tl.store(out, dk.to(DK.dtype.element_ty))
    for r in range(0, READERS):
        zr = z * READERS + r
        da = DA + (zr * tokens + t0) * CHUNK + s * BLOCK
        q_near = tl.load(Q_NEAR + (zr * tokens + t0) * channels + tile)
        dq = tl.zeros([BLOCK, BK], tl.float32)
        before = tl.zeros([BK], tl.float32)
        for i in range(0, s + 1):  # keys of this block and of earlier ones, the last one first
            da_su = tl.load(da - i * BLOCK + pairs)
            k_u = tl.load(K_NEAR + own - i * BLOCK * channels + tile)
            product = dot(da_su, k_u, tl.zeros([BLOCK, BK], tl.float32), PRECISION)
            factor = tl.where(i > 0, tl.exp2(before), decay)[None, :]
            dq += product * factor
            db += product * (q_near * factor).to(dtype).to(tl.float32)
            before += tl.load(BLOCK_DECAY + (s - i) * channels) * (i > 0)
        far = tl.load(DQ_FAR + (zr * tokens + t0) * channels + tile) * tl.exp2(before)[None, :]
        dq += far
        db += far * q_near.to(tl.float32)
        dq *= tl.exp2(since_start(load_decay(G, t0 + ts, cs, g_t, key_dim, state_dim, (ts >= 0)[:, None]))) * scale
        out = DQ + b * dq_b + h * dq_h + r * dq_r + t0 * dq_t + ts[:, None] * dq_t + cs[None, :]
        tl.store(out, dq.to(DQ.dtype.element_ty))
    tl.store(DB + own + tile, db)


@triton.jit
def decay_gradients(
    DB, DK_FAR, K_FAR, ENERGY, DG, g_b, g_h, g_t, heads, tokens, channels, key_dim, tiles,
    LIFT: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of log-decays: a token's decay touches what tokens before it wrote and tokens from it on read.

    DG_t = Σ_{i >= t} DB_i + Σ_{j < t} K_FAR_j DK_FAR_j + ENERGY over the chunk, and over the parts of a lifted key. The sum over
    writers runs up to t: as all minus those from t on it would leave rounding errors of the whole where strong decays make the
    rest tiny.

    ENERGY is `[tiles, B * heads, chunks, channels]`; DK_FAR is used up. Grid: (key_dim / BK rounded up, chunks, B * heads).
    """
    z = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1)
    ts = tl.arange(0, BLOCK)
    cs = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = (cs < key_dim)[None, :]
    chunks = tokens // CHUNK
    energy = tl.zeros([BK], tl.float32)
    for tile in range(0, tiles):
        for part in range(0, LIFT):
            row = (tile * tl.num_programs(2) + z) * chunks + c
            energy += tl.load(ENERGY + row * channels + part * key_dim + cs, mask=cs < key_dim, other=0.0)
    before = energy
    for s in range(0, CHUNK // BLOCK):
        rows = (z * tokens + c * CHUNK + s * BLOCK + ts)[:, None] * channels + cs[None, :]
        wrote = tl.zeros([BLOCK, BK], tl.float32)
        for part in range(0, LIFT):
            grad = tl.load(DK_FAR + rows + part * key_dim, mask=inside, other=0.0)
            wrote += grad * tl.load(K_FAR + rows + part * key_dim, mask=inside, other=0.0).to(tl.float32)
        sums = tl.cumsum(wrote, axis=0)
        # One token later: a token's own decay does not touch what it writes. The last row goes on in `before`.
        tl.store(DK_FAR + rows + channels, sums + before[None, :], mask=inside & (ts < BLOCK - 1)[:, None])
        tl.store(DK_FAR + rows, before[None, :] + sums * 0.0, mask=inside & (ts == 0)[:, None])
        before += tl.sum(wrote, 0)
    tl.debug_barrier()  # what some threads stored above others load below
    behind = tl.zeros([BK], tl.float32)
    for i in range(0, CHUNK // BLOCK):
        t = c * CHUNK + CHUNK - BLOCK - i * BLOCK + ts
        rows = (z * tokens + t)[:, None] * channels + cs[None, :]
        db = tl.zeros([BLOCK, BK], tl.float32)
        for part in range(0, LIFT):
            db += tl.load(DB + rows + part * key_dim, mask=inside, other=0.0)
        dg = tl.cumsum(db, axis=0, reverse=True) + behind[None, :] + tl.load(DK_FAR + rows, mask=inside, other=0.0)
        tl.store(
            DG + (z // heads) * g_b + (z % heads) * g_h + t[:, None] * g_t + cs[None, :], dg.to(DG.dtype.element_ty), mask=inside
        )
        behind += tl.sum(db, 0)
