"""Channels that decay by more than MILD within one block (GLA): their pairs of tokens of that block, which `gated` leaves out.

They are scored level by level: at level h the pairs of neighbouring runs of h tokens, decayed to the border between the runs, so
that no exponent is ever positive. This takes many registers, hence kernels of its own; a program without such channels ends at
once. Nothing waits for the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import BLOCK, dot
from .gated import MILD, lifted, load_decay, load_rows, query_gains


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
def level_mask(run, TRANSPOSED: tl.constexpr):
    """Pairs `[BLOCK, BLOCK]` of a query in a second run of `run` tokens and a key in the first run beside it."""
    queries = tl.arange(0, BLOCK)[:, None]
    keys = tl.arange(0, BLOCK)[None, :]
    if TRANSPOSED:
        queries, keys = keys, queries
    return (queries // (2 * run) == keys // (2 * run)) & (queries // run == keys // run + 1)


@triton.jit
def load_keys(K, ROOT, b, h, ts, cs, steep, k_b, k_h, k_t, heads, tokens, key_dim, LIFT: tl.constexpr):
    """Lifted keys of head h at channels `cs` of the state, zero where not `steep`, `[BLOCK, BK]` float32."""
    K += b * k_b + h * k_h
    x, root = load_rows(K, ROOT + b * tokens * heads + h, ts, cs % key_dim, k_t, heads, steep, LIFT)
    return lifted(x, root, K, ts, cs % key_dim, cs // key_dim, k_t, key_dim, steep, LIFT)


@triton.jit
def load_queries(
    Q, ROOT, GAMMA, MIXING, b, h, r, ts, cs, steep, q_b, q_h, q_g, q_t, heads, tokens, key_dim,
    GROUP: tl.constexpr, PARTS: tl.constexpr, LIFT: tl.constexpr, GATED: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Queries of reader r of head h, lifted, gated and mixed, likewise."""
    c, parts, row = cs % key_dim, cs // key_dim, h * GROUP + r // PARTS
    Q += b * q_b + h * q_h + (r // PARTS) * q_g
    x, root = load_rows(Q, ROOT + b * tokens * heads * GROUP + row, ts, c, q_t, heads * GROUP, steep, LIFT)
    x = lifted(x, root, Q, ts, c, parts, q_t, key_dim, steep, LIFT)
    return x * query_gains(GAMMA, MIXING, h, r, c, parts, key_dim, steep, GROUP, PARTS, LIFT, GATED, MIXED)[None, :]


@triton.jit
def add_scores(
    Q, K, G, Q_ROOT, K_ROOT, GAMMA, MIXING, BLOCK_DECAY, A,
    q_b, q_h, q_g, q_t, k_b, k_h, k_t, g_b, g_h, g_t, heads, tokens, channels, key_dim, state_dim, scale,
    GROUP: tl.constexpr, PARTS: tl.constexpr, LIFT: tl.constexpr, GATED: tl.constexpr, MIXED: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds the steep channels' part to the blocks on the diagonal of `gated.scores`. WIDTH is at least `channels`.

    Grid: (tokens / BLOCK, B * heads * GROUP * PARTS).
    """
    zr = tl.program_id(1).to(tl.int64)
    z = zr // (GROUP * PARTS)
    BLOCK_DECAY += (z * (tokens // BLOCK) + tl.program_id(0)) * channels
    every = tl.arange(0, WIDTH)
    if tl.min(tl.load(BLOCK_DECAY + every, mask=every < channels, other=0.0), 0) >= -MILD:
        return
    b = z // heads
    h = z % heads
    ts = tl.arange(0, BLOCK)
    rows = tl.program_id(0) * BLOCK + ts
    G += b * g_b + h * g_h
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k0 in range(0, channels, BK):
        cs = k0 + tl.arange(0, BK)
        steep = tl.load(BLOCK_DECAY + cs) < -MILD
        if tl.max(steep.to(tl.int32), 0) > 0:
            q = load_queries(
                Q, Q_ROOT, GAMMA, MIXING, b, h, zr % (GROUP * PARTS), rows, cs, steep, q_b, q_h, q_g, q_t, heads, tokens, key_dim,
                GROUP, PARTS, LIFT, GATED, MIXED,
            ) * scale  # fmt: skip
            k = load_keys(K, K_ROOT, b, h, rows, cs, steep, k_b, k_h, k_t, heads, tokens, key_dim, LIFT)
            g = load_decay(G, rows, cs, g_t, key_dim, state_dim, (ts >= 0)[:, None])
            acc += tl.where(ts[:, None] == ts[None, :], tl.sum(q * k, 1)[:, None], 0.0)
            run = BLOCK // 2
            while run > 0:
                reading, writing = run_decays(g, run)
                q_run = (q * tl.exp2(reading)).to(A.dtype.element_ty)
                k_run = (k * tl.exp2(writing)).to(A.dtype.element_ty)
                pairs = dot(q_run, tl.trans(k_run), tl.zeros([BLOCK, BLOCK], tl.float32), PRECISION)
                acc += tl.where(level_mask(run, False), pairs, 0.0)
                run = run // 2
    columns = (tl.program_id(0) % (CHUNK // BLOCK)) * BLOCK + ts
    places = A + (zr * tokens + rows)[:, None] * CHUNK + columns[None, :]
    tl.store(places, (tl.load(places) + acc).to(A.dtype.element_ty))


@triton.jit
def add_gradients(
    Q, K, G, Q_ROOT, K_ROOT, GAMMA, MIXING, BLOCK_DECAY, DA, DQ, DK, DB,
    q_b, q_h, q_g, q_t, k_b, k_h, k_t, g_b, g_h, g_t, heads, tokens, channels, key_dim, state_dim, scale,
    dq_b, dq_h, dq_r, dq_t, dk_b, dk_h, dk_t,
    GROUP: tl.constexpr, PARTS: tl.constexpr, LIFT: tl.constexpr, GATED: tl.constexpr, MIXED: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Adds the steep channels' part to what `gated.row_gradients` wrote. A token's product with itself decays by nothing and is
    kept out of DB.

    Grid: (channels / SPAN rounded up, tokens / BLOCK, B * heads).
    """
    z = tl.program_id(2).to(tl.int64)
    BLOCK_DECAY += (z * (tokens // BLOCK) + tl.program_id(1)) * channels
    first = tl.program_id(0) * SPAN
    every = first + tl.arange(0, SPAN)
    if tl.min(tl.load(BLOCK_DECAY + every, mask=every < channels, other=0.0), 0) >= -MILD:
        return
    b = z // heads
    h = z % heads
    t0 = tl.program_id(1) * BLOCK
    ts = tl.arange(0, BLOCK)
    rows = t0 + ts
    dtype = DA.dtype.element_ty
    for k0 in range(first, tl.minimum(first + SPAN, channels), BK):
        cs = k0 + tl.arange(0, BK)
        steep = tl.load(BLOCK_DECAY + cs) < -MILD
        if tl.max(steep.to(tl.int32), 0) > 0:
            g = load_decay(G + b * g_b + h * g_h, rows, cs, g_t, key_dim, state_dim, (ts >= 0)[:, None])
            k = load_keys(K, K_ROOT, b, h, rows, cs, steep, k_b, k_h, k_t, heads, tokens, key_dim, LIFT)
            dk = tl.zeros([BLOCK, BK], tl.float32)
            db = tl.zeros([BLOCK, BK], tl.float32)
            for r in range(0, GROUP * PARTS):
                q = load_queries(
                    Q, Q_ROOT, GAMMA, MIXING, b, h, r, rows, cs, steep, q_b, q_h, q_g, q_t, heads, tokens, key_dim,
                    GROUP, PARTS, LIFT, GATED, MIXED,
                ) * scale  # fmt: skip
                da = DA + ((z * (GROUP * PARTS) + r) * tokens + t0) * CHUNK + t0 % CHUNK
                itself = tl.load(da + ts * (CHUNK + 1)).to(tl.float32)[:, None]
                dq = itself * k
                dk += itself * q
                run = BLOCK // 2
                while run > 0:
                    reading, writing = run_decays(g, run)
                    reading = tl.exp2(reading)
                    writing = tl.exp2(writing)
                    q_run = (q * reading).to(dtype)
                    k_run = (k * writing).to(dtype)
                    pairs = tl.where(level_mask(run, False), tl.load(da + ts[:, None] * CHUNK + ts[None, :]), 0.0).to(dtype)
                    product = dot(pairs, k_run, tl.zeros([BLOCK, BK], tl.float32), PRECISION)
                    dq += product * reading
                    db += product * q_run.to(tl.float32)
                    pairs = tl.where(level_mask(run, True), tl.load(da + ts[None, :] * CHUNK + ts[:, None]), 0.0).to(dtype)
                    product = dot(pairs, q_run, tl.zeros([BLOCK, BK], tl.float32), PRECISION)
                    dk += product * writing
                    db -= product * k_run.to(tl.float32)
                    run = run // 2
                out = DQ + b * dq_b + h * dq_h + r * dq_r + rows[:, None] * dq_t + cs[None, :]
                tl.store(out, (tl.load(out) + dq * scale).to(DQ.dtype.element_ty))
            out = DK + b * dk_b + h * dk_h + rows[:, None] * dk_t + cs[None, :]
            tl.store(out, (tl.load(out) + dk).to(DK.dtype.element_ty))
            out = DB + (z * tokens + rows)[:, None] * channels + cs[None, :]
            tl.store(out, tl.load(out) + db)
