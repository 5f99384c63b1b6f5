"""What decays per key channel (GLA): decayed operands, scores inside chunks, and their gradients.

Inside a block of BLOCK tokens let b_i be the sum of log2-decays up to and including token i, and e_u the sum over all of block u.
`near` rows carry the decay to a border of their block (queries from its start, keys to its end), `far` rows the decay to a border
of their chunk. A pair of tokens in blocks s > u scores (q_near_i ∘ exp2(e_{u+1} + .. + e_{s-1})) · k_near_j, and a pair in one
block (q_near_i ∘ exp2(-e_s)) · k_near_j, as long as no channel of the block decays by more than MILD in all. Where one does, the
block's pairs are scored level by level: at level h those of neighbouring runs of h tokens, decayed to the border between the
runs, so that no exponent is ever positive. Sums of decays are never subtracted from one another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import BLOCK, constant, dot

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
def run_decays(g, run):
    """Log2-decays from the start of each run of `run` tokens to each token, and from it to its end, by products with 0 and 1."""
    to = tl.arange(0, BLOCK)[:, None]
    of = tl.arange(0, BLOCK)[None, :]
    together = to // run == of // run
    zero = tl.zeros(g.shape, tl.float32)
    reading = tl.dot((together & (of <= to)).to(tl.float32), g, zero, input_precision="tf32x3")
    writing = tl.dot((together & (of > to)).to(tl.float32), g, zero, input_precision="tf32x3")
    return reading, writing


@triton.jit
def decay_rows(
    Q, K, G, Q_NEAR, Q_FAR, K_NEAR, K_FAR, BLOCK_DECAY, CHUNK_DECAY,
    q_b, q_h, q_r, q_t, k_b, k_h, k_t, g_b, g_h, g_t, heads, tokens, channels, key_dim, state_dim, scale,
    READERS: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Near and far rows of queries (times `scale`) and keys, and the log2-decays of blocks and chunks.

    Grid: (channels / BK, chunks, B * heads). Rows are `[B, heads, (READERS,) tokens, channels]`.
    """
    z = tl.program_id(2).to(tl.int64)
    b = z // heads
    h = z % heads
    cs = tl.program_id(0) * BK + tl.arange(0, BK)
    ts = tl.arange(0, BLOCK)
    start = tl.program_id(1) * CHUNK
    G += b * g_b + h * g_h
    blocks = CHUNK // BLOCK
    true = (ts >= 0)[:, None]
    after = tl.zeros([BK], tl.float32)
    for back in range(0, blocks):
        s = blocks - 1 - back
        t0 = start + s * BLOCK
        out = (z * tokens + t0 + ts)[:, None] * channels + cs[None, :]
        k = tl.load(K + b * k_b + h * k_h + (t0 + ts)[:, None] * k_t + cs[None, :]).to(tl.float32)
        k *= tl.exp2(to_end(G, t0, cs, g_t, key_dim, state_dim))
        tl.store(K_NEAR + out, k.to(K_NEAR.dtype.element_ty))
        if blocks > 1:
            tl.store(K_FAR + out, (k * tl.exp2(after)[None, :]).to(K_FAR.dtype.element_ty))
        total = tl.sum(load_decay(G, t0 + ts, cs, g_t, key_dim, state_dim, true), 0)
        tl.store(BLOCK_DECAY + (z * (tokens // BLOCK) + t0 // BLOCK) * channels + cs, total)
        after += total
    tl.store(CHUNK_DECAY + (z * (tokens // CHUNK) + tl.program_id(1)) * channels + cs, after)
    before = tl.zeros([BK], tl.float32)
    for s in range(0, blocks):
        t0 = start + s * BLOCK
        g = load_decay(G, t0 + ts, cs, g_t, key_dim, state_dim, true)
        decay = tl.exp2(since_start(g)) * scale
        for r in range(0, READERS):
            q = tl.load(Q + b * q_b + h * q_h + r * q_r + (t0 + ts)[:, None] * q_t + cs[None, :]).to(tl.float32) * decay
            out = ((z * READERS + r) * tokens + t0 + ts)[:, None] * channels + cs[None, :]
            tl.store(Q_NEAR + out, q.to(Q_NEAR.dtype.element_ty))
            if blocks > 1:
                tl.store(Q_FAR + out, (q * tl.exp2(before)[None, :]).to(Q_FAR.dtype.element_ty))
        before += tl.sum(g, 0)


@triton.jit
def decay_between(BLOCK_DECAY, u, s, channels):
    """Log2-decay from the end of block u to the start of block s; minus that of the block itself where u = s."""
    total = tl.load(BLOCK_DECAY + s * channels) * 0.0
    for m in range(u + 1, s):
        total += tl.load(BLOCK_DECAY + m * channels)
    if u == s:
        total = -tl.load(BLOCK_DECAY + s * channels)
    return total


@triton.jit
def level_mask(run, TRANSPOSED: tl.constexpr):
    """Pairs `[BLOCK, BLOCK]` of a query in a second run of `run` tokens and a key in the first run beside it."""
    queries = tl.arange(0, BLOCK)[:, None]
    keys = tl.arange(0, BLOCK)[None, :]
    if TRANSPOSED:
        queries, keys = keys, queries
    return (queries // (2 * run) == keys // (2 * run)) & (queries // run == keys // run + 1)


@triton.jit
def scores(
    Q, K, G, Q_NEAR, K_NEAR, BLOCK_DECAY, A,
    q_b, q_h, q_r, q_t, k_b, k_h, k_t, g_b, g_h, g_t, heads, tokens, channels, key_dim, state_dim, scale,
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
    b = z // heads
    h = z % heads
    ts = tl.arange(0, BLOCK)
    start = tl.program_id(1) * CHUNK
    rows = start + s * BLOCK + ts
    others = start + u * BLOCK + ts
    G += b * g_b + h * g_h
    Q += b * q_b + h * q_h + (zr % READERS) * q_r
    K += b * k_b + h * k_h
    BLOCK_DECAY += (z * (tokens // BLOCK) + start // BLOCK) * channels
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k0 in range(0, channels, BK):
        cs = k0 + tl.arange(0, BK)
        between = decay_between(BLOCK_DECAY + cs, u, s, channels)
        if tl.max(between, 0) <= MILD:
            q_near = tl.load(Q_NEAR + (zr * tokens + rows)[:, None] * channels + cs[None, :])
            k_near = tl.load(K_NEAR + (z * tokens + others)[None, :] * channels + cs[:, None])
            acc = dot((q_near * tl.exp2(between)[None, :]).to(q_near.dtype), k_near, acc, PRECISION)
        else:
            q = tl.load(Q + rows[:, None] * q_t + cs[None, :]).to(tl.float32) * scale
            k = tl.load(K + rows[:, None] * k_t + cs[None, :]).to(tl.float32)
            g = load_decay(G, rows, cs, g_t, key_dim, state_dim, (ts >= 0)[:, None])
            acc += tl.where(ts[:, None] == ts[None, :], tl.sum(q * k, 1)[:, None], 0.0)
            run = BLOCK // 2
            while run > 0:
                reading, writing = run_decays(g, run)
                q_run = (q * tl.exp2(reading)).to(Q_NEAR.dtype.element_ty)
                k_run = (k * tl.exp2(writing)).to(Q_NEAR.dtype.element_ty)
                pairs = dot(q_run, tl.trans(k_run), tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION)
                acc += tl.where(level_mask(run, False), pairs, 0.0)
                run = run // 2
    if u == s:
        acc = tl.where(ts[:, None] >= ts[None, :], acc, 0.0)
    places = (zr * tokens + rows)[:, None] * CHUNK + (u * BLOCK + ts)[None, :]
    tl.store(A + places, acc.to(A.dtype.element_ty))


@triton.jit
def row_gradients(
    Q, K, G, Q_NEAR, Q_FAR, K_NEAR, BLOCK_DECAY, DA, DQ_FAR, DK_FAR, DQ, DK, DB,
    q_b, q_h, q_r, q_t, k_b, k_h, k_t, g_b, g_h, g_t, dq_b, dq_h, dq_r, dq_t, dk_b, dk_h, dk_t,
    heads, tokens, channels, key_dim, state_dim, scale,
    READERS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and log-decay sums from those of scores (DA) and far rows (DQ_FAR, DK_FAR, float32).

    DB_i is what token i adds to the gradients of all log-decays of the chunk up to its own: what it reads counts up, what it
    writes for later tokens of the chunk counts down, each as the product of the very rounded operands that the forward products
    used, so that what should cancel does. A token's product with itself decays by nothing and is kept out; so is what the far
    keys write, see `decay_gradients`.

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
    Q += b * q_b + h * q_h
    K += b * k_b + h * k_h
    BLOCK_DECAY += (z * (tokens // BLOCK) + start // BLOCK) * channels + cs
    own = (z * tokens + t0 + ts)[:, None] * channels + cs[None, :]
    dtype = Q_NEAR.dtype.element_ty
    before = tl.zeros([BK], tl.float32)
    for m in range(0, s):
        before += tl.load(BLOCK_DECAY + m * channels)
    after = tl.zeros([BK], tl.float32)
    for m in range(s + 1, blocks):
        after += tl.load(BLOCK_DECAY + m * channels)
    inverse = -tl.load(BLOCK_DECAY + s * channels)
    mild = tl.max(inverse, 0) <= MILD
    k_near = tl.load(K_NEAR + own)
    dk_near = tl.load(DK_FAR + own) * tl.exp2(after)[None, :]
    db = tl.zeros([BLOCK, BK], tl.float32)
    dk = tl.zeros([BLOCK, BK], tl.float32)
    for r in range(0, READERS):
        zr = z * READERS + r
        own_r = (zr * tokens + t0 + ts)[:, None] * channels + cs[None, :]
        da = DA + (zr * tokens + start) * CHUNK
        for u in range(s + 1, blocks):  # queries of later blocks
            between = tl.exp2(decay_between(BLOCK_DECAY, s, u, channels))[None, :]
            da_us = tl.load(da + (u * BLOCK + ts)[None, :] * CHUNK + (s * BLOCK + ts)[:, None])
            q_u = tl.load(Q_NEAR + (zr * tokens + start + u * BLOCK + ts)[:, None] * channels + cs[None, :])
            product = dot(da_us, (q_u * between).to(dtype), tl.zeros([BLOCK, BK], tl.float32), PRECISION)
            dk_near += product
            db -= product * k_near.to(tl.float32)
        q_near = tl.load(Q_NEAR + own_r)
        dq_far = tl.load(DQ_FAR + own_r)
        db += dq_far * tl.load(Q_FAR + own_r).to(tl.float32)
        dq_near = dq_far * tl.exp2(before)[None, :]
        for u in range(0, s):  # keys of earlier blocks
            between = tl.exp2(decay_between(BLOCK_DECAY, u, s, channels))[None, :]
            da_su = tl.load(da + (s * BLOCK + ts)[:, None] * CHUNK + (u * BLOCK + ts)[None, :])
            k_u = tl.load(K_NEAR + (z * tokens + start + u * BLOCK + ts)[:, None] * channels + cs[None, :])
            product = dot(da_su, k_u, tl.zeros([BLOCK, BK], tl.float32), PRECISION)
            dq_near += product * between
            db += product * (q_near * between).to(dtype).to(tl.float32)
        own_block = da + (s * BLOCK + ts)[:, None] * CHUNK + (s * BLOCK + ts)[None, :]
        own_block_t = da + (s * BLOCK + ts)[None, :] * CHUNK + (s * BLOCK + ts)[:, None]
        if mild:
            decay = tl.exp2(inverse)[None, :]
            q_decayed = (q_near * decay).to(dtype)
            da_ss = tl.where(ts[:, None] > ts[None, :], tl.load(own_block), 0.0).to(dtype)
            product = dot(da_ss, k_near, tl.zeros([BLOCK, BK], tl.float32), PRECISION)
            dq_near += product * decay
            db += product * q_decayed.to(tl.float32)
            da_ss = tl.where(ts[:, None] < ts[None, :], tl.load(own_block_t), 0.0).to(dtype)
            product = dot(da_ss, q_decayed, tl.zeros([BLOCK, BK], tl.float32), PRECISION)
            dk_near += product
            db -= product * k_near.to(tl.float32)
        g = load_decay(G, t0 + ts, cs, g_t, key_dim, state_dim, (ts >= 0)[:, None])
        k = tl.load(K + (t0 + ts)[:, None] * k_t + cs[None, :]).to(tl.float32)
        q = tl.load(Q + r * q_r + (t0 + ts)[:, None] * q_t + cs[None, :]).to(tl.float32) * scale
        itself = tl.sum(tl.where(ts[:, None] == ts[None, :], tl.load(own_block).to(tl.float32), 0.0), 1)[:, None]
        dq = itself * k + dq_near * tl.exp2(since_start(g))
        dk += itself * q
        if not mild:
            run = BLOCK // 2
            while run > 0:
                reading, writing = run_decays(g, run)
                reading = tl.exp2(reading)
                writing = tl.exp2(writing)
                q_run = (q * reading).to(dtype)
                k_run = (k * writing).to(dtype)
                da_run = tl.where(level_mask(run, False), tl.load(own_block), 0.0).to(dtype)
                product = dot(da_run, k_run, tl.zeros([BLOCK, BK], tl.float32), PRECISION)
                dq += product * reading
                db += product * q_run.to(tl.float32)
                da_run = tl.where(level_mask(run, True), tl.load(own_block_t), 0.0).to(dtype)
                product = dot(da_run, q_run, tl.zeros([BLOCK, BK], tl.float32), PRECISION)
                dk += product * writing
                db -= product * k_run.to(tl.float32)
                run = run // 2
        out = DQ + b * dq_b + h * dq_h + r * dq_r + (t0 + ts)[:, None] * dq_t + cs[None, :]
        tl.store(out, (dq * scale).to(DQ.dtype.element_ty))
    dk += dk_near * tl.exp2(to_end(G, t0, cs, g_t, key_dim, state_dim))
    tl.store(DK + b * dk_b + h * dk_h + (t0 + ts)[:, None] * dk_t + cs[None, :], dk.to(DK.dtype.element_ty))
    tl.store(DB + own, db)


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
    for back in range(0, CHUNK // BLOCK):
        t = c * CHUNK + CHUNK - BLOCK - back * BLOCK + ts
        rows = (z * tokens + t)[:, None] * channels + cs[None, :]
        db = tl.zeros([BLOCK, BK], tl.float32)
        for part in range(0, LIFT):
            db += tl.load(DB + rows + part * key_dim, mask=inside, other=0.0)
        dg = tl.cumsum(db, axis=0, reverse=True) + behind[None, :] + tl.load(DK_FAR + rows, mask=inside, other=0.0)
        tl.store(
            DG + (z // heads) * g_b + (z % heads) * g_h + t[:, None] * g_t + cs[None, :], dg.to(DG.dtype.element_ty), mask=inside
        )
        behind += tl.sum(db, 0)
