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
from .rows import back

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
def decay_rows(
    Q, K, G, Q_ROOT, K_ROOT, GAMMA, MIXING, Q_NEAR, Q_FAR, K_NEAR, K_FAR, BLOCK_DECAY, CHUNK_DECAY,
    q_b, q_h, q_g, q_t, k_b, k_h, k_t, g_b, g_h, g_t, heads, tokens, channels, key_dim, state_dim, scale,
    GROUP: tl.constexpr, PARTS: tl.constexpr, LIFT: tl.constexpr, GATED: tl.constexpr, MIXED: tl.constexpr,
    CHUNK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Near and far rows of queries (times `scale`) and keys, and the log2-decays of blocks and chunks.

    A program makes all parts of its BK channels, which decay alike. What lies beyond LIFT * key_dim is left as it was.

    Grid: (key_dim / BK rounded up, chunks, B * heads). Rows are `[B, heads, (readers,) tokens, channels]`.
    """
    z = tl.program_id(2).to(tl.int64)
    b = z // heads
    h = z % heads
    cs = tl.program_id(0) * BK + tl.arange(0, BK)
    valid = cs < key_dim
    inside = valid[None, :]
    ts = tl.arange(0, BLOCK)
    tile = ts[:, None] * channels + cs[None, :]
    start = tl.program_id(1) * CHUNK
    G += b * g_b + h * g_h
    K += b * k_b + h * k_h
    K_ROOT += b * tokens * heads + h
    Q += b * q_b + h * q_h
    Q_ROOT += (b * tokens * heads + h) * GROUP
    blocks = CHUNK // BLOCK
    true = (ts >= 0)[:, None]
    after = tl.zeros([BK], tl.float32)
    for i in range(0, blocks):
        t0 = start + (blocks - 1 - i) * BLOCK
        decay = tl.exp2(to_end(G, t0, cs, g_t, key_dim, key_dim))
        total = tl.sum(load_decay(G, t0 + ts, cs, g_t, key_dim, key_dim, true), 0)
        far = tl.exp2(after)[None, :]
        x, root = load_rows(K, K_ROOT, t0 + ts, cs, k_t, heads, valid, LIFT)
        x *= decay
        for part in range(0, LIFT):
            k = lifted(x, root, K, t0 + ts, cs, cs * 0 + part, k_t, key_dim, valid, LIFT)
            out = (z * tokens + t0) * channels + part * key_dim
            tl.store(K_NEAR + out + tile, k.to(K_NEAR.dtype.element_ty), mask=inside)
            if blocks > 1:
                tl.store(K_FAR + out + tile, (k * far).to(K_FAR.dtype.element_ty), mask=inside)
            block = z * (tokens // BLOCK) + t0 // BLOCK
            tl.store(BLOCK_DECAY + block * channels + part * key_dim + cs, total, mask=valid)
        after += total
    for part in range(0, LIFT):
        row = z * (tokens // CHUNK) + tl.program_id(1)
        tl.store(CHUNK_DECAY + row * channels + part * key_dim + cs, after, mask=valid)
    before = tl.zeros([BK], tl.float32)
    for s in range(0, blocks):
        t0 = start + s * BLOCK
        g = load_decay(G, t0 + ts, cs, g_t, key_dim, key_dim, true)
        decay = tl.exp2(since_start(g)) * scale
        far = tl.exp2(before)[None, :]
        for r in range(0, GROUP * PARTS):
            query = Q + (r // PARTS) * q_g
            x, root = load_rows(query, Q_ROOT + r // PARTS, t0 + ts, cs, q_t, heads * GROUP, valid, LIFT)
            x *= decay
            for part in range(0, LIFT):
                parts = cs * 0 + part
                gains = query_gains(GAMMA, MIXING, h, r, cs, parts, key_dim, valid, GROUP, PARTS, LIFT, GATED, MIXED)
                q = lifted(x, root, query, t0 + ts, cs, parts, q_t, key_dim, valid, LIFT) * gains[None, :]
                out = ((z * (GROUP * PARTS) + r) * tokens + t0) * channels + part * key_dim
                tl.store(Q_NEAR + out + tile, q.to(Q_NEAR.dtype.element_ty), mask=inside)
                if blocks > 1:
                    tl.store(Q_FAR + out + tile, (q * far).to(Q_FAR.dtype.element_ty), mask=inside)
        before += tl.sum(g, 0)


@triton.jit
def decay_between(BLOCK_DECAY, u, s, channels):
    """Log2-decay from the end of block u to the start of a later block s."""
    total = tl.load(BLOCK_DECAY + s * channels) * 0.0
    for m in range(u + 1, s):
        total += tl.load(BLOCK_DECAY + m * channels)
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
        if u == s:
            factor = undecayed(tl.load(BLOCK_DECAY + s * channels + k0))
        else:
            factor = tl.exp2(decay_between(BLOCK_DECAY + k0, u, s, channels))
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
    before = tl.zeros([BK], tl.float32)
    for m in range(0, s):
        before += tl.load(BLOCK_DECAY + m * channels)
    after = tl.zeros([BK], tl.float32)
    for m in range(s + 1, blocks):
        after += tl.load(BLOCK_DECAY + m * channels)
    decay = undecayed(tl.load(BLOCK_DECAY + s * channels))[None, :]
    dk = tl.zeros([BLOCK, BK], tl.float32)
    for r in range(0, READERS):
        zr = z * READERS + r
        q = Q_NEAR + (zr * tokens + t0) * channels
        da = DA + (zr * tokens + t0) * CHUNK + s * BLOCK
        for u in range(1, blocks - s):  # queries of later blocks
            between = tl.exp2(decay_between(BLOCK_DECAY, s, s + u, channels))[None, :]
            da_us = tl.load(da + u * BLOCK * CHUNK + pairs_t)
            q_u = tl.load(q + u * BLOCK * channels + tile)
            dk = dot(da_us, (q_u * between).to(dtype), dk, PRECISION)
        da_ss = tl.where(ts[:, None] <= ts[None, :], tl.load(da + pairs_t), 0.0).to(dtype)
        dk = dot(da_ss, (tl.load(q + tile) * decay).to(dtype), dk, PRECISION)
    k_near = tl.load(K_NEAR + own + tile)
    db = -dk * k_near.to(tl.float32)
    dk += tl.load(DK_FAR + own + tile) * tl.exp2(after)[None, :]
    dk *= tl.exp2(to_end(G, t0, cs, g_t, key_dim, state_dim))
    out = DK + b * dk_b + h * dk_h + t0 * dk_t + ts[:, None] * dk_t + cs[None, :]
    tl.store(out, dk.to(DK.dtype.element_ty))
    for r in range(0, READERS):
        zr = z * READERS + r
        da = DA + (zr * tokens + t0) * CHUNK
        q_near = tl.load(Q_NEAR + (zr * tokens + t0) * channels + tile)
        dq = tl.load(DQ_FAR + (zr * tokens + t0) * channels + tile) * tl.exp2(before)[None, :]
        db += dq * q_near.to(tl.float32)
        for u in range(0, s):  # keys of earlier blocks
            between = tl.exp2(decay_between(BLOCK_DECAY, u, s, channels))[None, :]
            k_u = tl.load(K_NEAR + (z * tokens + start + u * BLOCK) * channels + tile)
            product = dot(tl.load(da + u * BLOCK + pairs), k_u, tl.zeros([BLOCK, BK], tl.float32), PRECISION)
            dq += product * between
            db += product * (q_near * between).to(dtype).to(tl.float32)
        da_ss = tl.where(ts[:, None] >= ts[None, :], tl.load(da + s * BLOCK + pairs), 0.0).to(dtype)
        product = dot(da_ss, tl.load(K_NEAR + own + tile), tl.zeros([BLOCK, BK], tl.float32), PRECISION)
        dq += product * decay
        db += product * (q_near * decay).to(dtype).to(tl.float32)
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
