"""The kernels of the selective scan: every number of the state decays at its own rate, so they walk over tokens, with no products.

A program is one warp, and waits at no barrier. It holds a tile of the state, NL * NR numbers of DL * DR channels, as
`[NL, DL, NR, DR]`: NL * DL = 32 lanes, each with NR numbers of DR channels in its registers, so that sums over numbers and over
channels are made within lanes for the most part. Rows are loaded and stored with the lanes that share them spelled out: then
Triton lays all tensors out alike, a lane's channels, or numbers, as one vector. Rows are loaded STEPS tokens at a time, as tuples.
Padded tokens have a step of 0, which leaves the state as it is.
"""

# Kernels have no lists; their tuples grow, which mypy takes for another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import math

import triton
import triton.language as tl

from .blocks import constant

LN2 = constant(math.log(2))

VARYING = ["tokens", "batch_stretches", "first_stretch"]
"""Sizes that kernels are not compiled anew for."""


@triton.jit
def numbers_of(block, NL: tl.constexpr, DL: tl.constexpr, NR: tl.constexpr):
    """State numbers of a tile, `[NL, DL, NR, 1]`."""
    ns = block * (NL * NR) + tl.arange(0, NL)[:, None, None, None] * NR + tl.arange(0, NR)[None, None, :, None]
    return tl.broadcast_to(ns, [NL, DL, NR, 1])


@triton.jit
def channels_of(block, NL: tl.constexpr, DL: tl.constexpr, DR: tl.constexpr):
    """Channels of a tile, `[NL, DL, 1, DR]`."""
    ds = block * (DL * DR) + tl.arange(0, DL)[None, :, None, None] * DR + tl.arange(0, DR)[None, None, None, :]
    return tl.broadcast_to(ds, [NL, DL, 1, DR])


@triton.jit
def both(inside, condition):
    """A mask and a single condition. The interpreter spreads the latter as numbers, which are no mask before they are compared."""
    return (inside & condition) != 0


@triton.jit
def channel_rows(X, ds, t, way, x_t, tokens, inside, STEPS):
    """STEPS tokens' channels in float32, 0 beyond the last token, from t on; `way` is 1, or -1 for backward in time."""
    rows = ()
    for j in tl.static_range(STEPS):
        row = tl.load(X + (t + way * j) * x_t + ds, mask=both(inside, t + way * j < tokens), other=0.0)
        rows += (row.to(tl.float32),)
    return rows


@triton.jit
def number_rows(X, ns, t, way, numbers, STEPS):
    """STEPS tokens' keys or queries."""
    rows = ()
    for j in tl.static_range(STEPS):
        rows += (tl.load(X + (t + way * j) * numbers + ns),)
    return rows


@triton.jit
def keep_rows(KEEP, t, way, tokens, PACKED, STEPS):
    """For each of STEPS tokens 0 if it is a packed sequence's first, else 1."""
    rows = ()
    for j in tl.static_range(STEPS):
        if PACKED:
            rows += (tl.load(KEEP + t + way * j, mask=t + way * j < tokens, other=1.0),)
        else:
            rows += (1.0,)
    return rows


@triton.jit
def decay_of(base, reach, keep, SIGNED: tl.constexpr, PACKED: tl.constexpr):
    """What the state is multiplied by; `base` is exp(dt A)."""
    decay = base
    if SIGNED:
        decay = base + reach * (base - 1.0)
    if PACKED:
        decay = decay * keep
    return decay


@triton.jit
def states_after(state, xs, dts, keys, keeps, rates, reach, SIGNED, PACKED, STEPS):
    """The state itself and after each of STEPS tokens."""
    states = (state,)
    for j in tl.static_range(STEPS):
        decay = decay_of(tl.exp2(dts[j] * rates), reach, keeps[j], SIGNED, PACKED)
        states += (states[j] * decay + keys[j] * (xs[j] * dts[j]),)
    return states


@triton.jit
def state_numbers(END, TOTAL, first, way, size, inside, stretches, STEPS):
    """Numbers of STEPS stretches' states and decays, 0 beyond the last stretch."""
    ends = ()
    totals = ()
    for j in tl.static_range(STEPS):
        s = first + way * j
        there = both(both(inside, s >= 0), s < stretches)
        ends += (tl.load(END + s * size, mask=there, other=0.0),)
        totals += (tl.load(TOTAL + s * size, mask=there, other=0.0),)
    return ends, totals


@triton.jit
def sum_numbers(tile):
    """Over the state numbers, `[1, DL, 1, DR]`."""
    return tl.sum(tl.sum(tile, 2, keep_dims=True), 0, keep_dims=True)


@triton.jit
def sum_channels(tile, NL: tl.constexpr, DL: tl.constexpr, NR: tl.constexpr):
    """Over the channels, `[NL, DL, NR, 1]`, the same in all DL lanes."""
    return tl.broadcast_to(tl.sum(tl.sum(tile, 3, keep_dims=True), 1, keep_dims=True), [NL, DL, NR, 1])


@triton.jit(do_not_specialize=["tokens"])
def walk_stretch(
    X, DT, RATES, KEYS, KEEP, REACH, END, TOTAL,
    x_b, x_t, dt_b, dt_t, tokens, padded_tokens, channels, numbers, length,
    BACKWARD: tl.constexpr, SIGNED: tl.constexpr, PACKED: tl.constexpr, STEPS: tl.constexpr,
    NL: tl.constexpr, DL: tl.constexpr, NR: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    """END = the state after a stretch of `length` tokens that starts from zero, TOTAL = the product of its decays.

    BACKWARD: X holds gradients of outputs and KEYS the queries, and END is the gradient of the state in front of the stretch.

    Grid: (channel blocks, number blocks, B * stretches).
    """
    ds = channels_of(tl.program_id(0), NL, DL, DR)
    ns = numbers_of(tl.program_id(1), NL, DL, NR)
    stretches = padded_tokens // length
    z = tl.program_id(2).to(tl.int64)
    b = z // stretches
    first = z % stretches * length
    tokens = (tokens - first).to(tl.int32)
    inside = ds < channels
    X += b * x_b + first * x_t
    DT += b * dt_b + first * dt_t
    KEYS += (b * padded_tokens + first) * numbers
    KEEP += first
    rates = tl.load(RATES + ns * channels + ds, mask=inside, other=0.0)
    reach = 0.0
    if SIGNED:
        reach = tl.load(REACH + ds, mask=inside, other=0.0)
    state = tl.zeros([NL, DL, NR, DR], tl.float32)
    total = tl.full([NL, DL, NR, DR], 1.0, tl.float32)
    WAY: tl.constexpr = -1 if BACKWARD else 1
    for i in range(0, length, STEPS):
        t = i
        if BACKWARD:
            t = length - 1 - i
        xs = channel_rows(X, ds, t, WAY, x_t, tokens, inside, STEPS)
        dts = channel_rows(DT, ds, t, WAY, dt_t, tokens, inside, STEPS)
        keys = number_rows(KEYS, ns, t, WAY, numbers, STEPS)
        keeps = keep_rows(KEEP, t, WAY, tokens, PACKED, STEPS)
        for j in tl.static_range(STEPS):
            decay = decay_of(tl.exp2(dts[j] * rates), reach, keeps[j], SIGNED, PACKED)
            if BACKWARD:  # noqa: SIM108
                state = (state + keys[j] * xs[j]) * decay
            else:
                state = state * decay + keys[j] * (xs[j] * dts[j])
            total *= decay
    where = z * numbers * channels + ns * channels + ds
    tl.store(END + where, state, mask=inside)
    tl.store(TOTAL + where, total, mask=inside)


@triton.jit
def join_stretches(END, TOTAL, START, size, stretches, BACKWARD: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """END[s] <- the state in front of stretch s, from START in front of the first; BACKWARD from the last stretch to the first.

    Grid: (numbers of a state / BLOCK, B).
    """
    es = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    inside = es < size
    state = tl.load(START + b * size + es, mask=inside)
    END += b * stretches * size + es
    TOTAL += b * stretches * size + es
    WAY: tl.constexpr = -1 if BACKWARD else 1
    for i in range(0, stretches, STEPS):
        first = b * 0 + i
        if BACKWARD:
            first = stretches - 1 - first
        ends, totals = state_numbers(END, TOTAL, first, WAY, size, inside, stretches, STEPS)
        for j in tl.static_range(STEPS):
            tl.store(END + (first + WAY * j) * size, state, mask=both(inside, i + j < stretches))
            state = state * totals[j] + ends[j]


@triton.jit(do_not_specialize=VARYING)
def read_stretch(
    X, DT, RATES, KEYS, QUERIES, SKIP, KEEP, REACH, STARTS, OUT, FINAL,
    x_b, x_t, dt_b, dt_t, o_n, o_b, o_t, tokens, padded_tokens, channels, numbers, length, batch_stretches, first_stretch,
    HAS_SKIP: tl.constexpr, SIGNED: tl.constexpr, PACKED: tl.constexpr, STEPS: tl.constexpr,
    NL: tl.constexpr, DL: tl.constexpr, NR: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    """Outputs of a stretch from the state in front of it, and FINAL after the last; each number block writes its share of OUT.

    Grid: (channel blocks, number blocks, B * stretches of this launch, from `first_stretch` on).
    """
    ds = channels_of(tl.program_id(0), NL, DL, DR)
    ns = numbers_of(tl.program_id(1), NL, DL, NR)
    stretches = padded_tokens // length
    z = tl.program_id(2).to(tl.int64)
    b = z // batch_stretches
    s = first_stretch + z % batch_stretches
    first = s * length
    tokens = (tokens - first).to(tl.int32)
    inside = ds < channels
    X += b * x_b + first * x_t
    DT += b * dt_b + first * dt_t
    OUT += tl.program_id(1).to(tl.int64) * o_n + b * o_b + z % batch_stretches * length * o_t
    KEYS += (b * padded_tokens + first) * numbers
    QUERIES += (b * padded_tokens + first) * numbers
    KEEP += first
    rates = tl.load(RATES + ns * channels + ds, mask=inside, other=0.0)
    reach = 0.0
    if SIGNED:
        reach = tl.load(REACH + ds, mask=inside, other=0.0)
    skip = 0.0
    if HAS_SKIP:
        skip = tl.load(SKIP + ds, mask=both(inside, tl.program_id(1) == 0), other=0.0)
    one_number = inside & (tl.arange(0, NL)[:, None, None, None] == 0)
    size = channels * numbers
    tile = ns * channels + ds
    state = tl.load(STARTS + (b * stretches + s) * size + tile, mask=inside, other=0.0)
    for i in range(0, length, STEPS):
        xs = channel_rows(X, ds, i, 1, x_t, tokens, inside, STEPS)
        dts = channel_rows(DT, ds, i, 1, dt_t, tokens, inside, STEPS)
        keys = number_rows(KEYS, ns, i, 1, numbers, STEPS)
        queries = number_rows(QUERIES, ns, i, 1, numbers, STEPS)
        keeps = keep_rows(KEEP, i, 1, tokens, PACKED, STEPS)
        states = states_after(state, xs, dts, keys, keeps, rates, reach, SIGNED, PACKED, STEPS)
        for j in tl.static_range(STEPS):
            y = sum_numbers(states[j + 1] * queries[j]) + skip * xs[j]
            tl.store(OUT + (i + j) * o_t + ds, y.to(OUT.dtype.element_ty), mask=both(one_number, i + j < tokens))
        state = states[STEPS]
    if s == stretches - 1:
        tl.store(FINAL + b * size + tile, state, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def stretch_gradients(
    X, DT, RATES, KEYS, QUERIES, SKIP, KEEP, REACH, STARTS, DY, DENDS, STATES,
    DX, DDT, DRATES, DKEYS, DQUERIES, DSKIP, DREACH, DSTART,
    x_b, x_t, dt_b, dt_t, dy_b, dy_t, o_n, o_b, o_t,
    tokens, padded_tokens, channels, numbers, length, batch_stretches, first_stretch,
    HAS_SKIP: tl.constexpr, SIGNED: tl.constexpr, PACKED: tl.constexpr, STEPS: tl.constexpr,
    NL: tl.constexpr, DL: tl.constexpr, NR: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    """All gradients of a stretch, from the state in front of it and the gradient DENDS of the state behind it.

    The program walks forward once and leaves the state in front of every STEPS tokens in STATES, then goes through these groups
    from the last to the first, with the states of one group in registers. Sums over channels go to DKEYS and DQUERIES, one share
    for each channel block; sums over numbers to DX and DDT, one share for each number block; sums over tokens to DRATES, DSKIP
    and DREACH, one share for each stretch. DRATES are of A, not of A log2 e.

    Grid: as in `read_stretch`.
    """
    ds = channels_of(tl.program_id(0), NL, DL, DR)
    ns = numbers_of(tl.program_id(1), NL, DL, NR)
    stretches = padded_tokens // length
    z = tl.program_id(2).to(tl.int64)
    b = z // batch_stretches
    s = first_stretch + z % batch_stretches
    first = s * length
    tokens = (tokens - first).to(tl.int32)
    inside = ds < channels
    X += b * x_b + first * x_t
    DT += b * dt_b + first * dt_t
    DY += b * dy_b + first * dy_t
    KEYS += (b * padded_tokens + first) * numbers
    QUERIES += (b * padded_tokens + first) * numbers
    KEEP += first
    out = tl.program_id(1).to(tl.int64) * o_n + b * o_b + z % batch_stretches * length * o_t
    DX += out
    DDT += out
    share = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + z) * length * numbers
    DKEYS += share
    DQUERIES += share
    rates = tl.load(RATES + ns * channels + ds, mask=inside, other=0.0)
    reach = 0.0
    if SIGNED:
        reach = tl.load(REACH + ds, mask=inside, other=0.0)
    skip = 0.0
    if HAS_SKIP:
        skip = tl.load(SKIP + ds, mask=both(inside, tl.program_id(1) == 0), other=0.0)
    # Lanes that share a sum leave it to the first of them.
    one_number = inside & (tl.arange(0, NL)[:, None, None, None] == 0)
    one_channel = tl.broadcast_to(tl.arange(0, DL)[None, :, None, None] == 0, [NL, DL, NR, 1])
    size = channels * numbers
    tile = ns * channels + ds
    at = (b * stretches + s) * size + tile
    state = tl.load(STARTS + at, mask=inside, other=0.0)
    program = (z * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    own = numbers_of(0, NL, DL, NR) * (DR * DL) + channels_of(0, NL, DL, DR)
    STATES += program * (length // STEPS) * (NL * DL * NR * DR) + own
    for i in range(0, length, STEPS):
        tl.store(STATES + i // STEPS * (NL * DL * NR * DR), state)
        xs = channel_rows(X, ds, i, 1, x_t, tokens, inside, STEPS)
        dts = channel_rows(DT, ds, i, 1, dt_t, tokens, inside, STEPS)
        keys = number_rows(KEYS, ns, i, 1, numbers, STEPS)
        keeps = keep_rows(KEEP, i, 1, tokens, PACKED, STEPS)
        state = states_after(state, xs, dts, keys, keeps, rates, reach, SIGNED, PACKED, STEPS)[STEPS]
    tl.debug_barrier()  # lanes may read what others wrote
    behind = tl.load(DENDS + at, mask=inside, other=0.0)
    drates = tl.zeros([NL, DL, NR, DR], tl.float32)
    dreach = tl.zeros([NL, DL, 1, DR], tl.float32)
    dskip = tl.zeros([NL, DL, 1, DR], tl.float32)
    for i in range(0, length, STEPS):
        t0 = length - STEPS - i
        xs = channel_rows(X, ds, t0, 1, x_t, tokens, inside, STEPS)
        dts = channel_rows(DT, ds, t0, 1, dt_t, tokens, inside, STEPS)
        dys = channel_rows(DY, ds, t0, 1, dy_t, tokens, inside, STEPS)
        keys = number_rows(KEYS, ns, t0, 1, numbers, STEPS)
        queries = number_rows(QUERIES, ns, t0, 1, numbers, STEPS)
        keeps = keep_rows(KEEP, t0, 1, tokens, PACKED, STEPS)
        state = tl.load(STATES + t0 // STEPS * (NL * DL * NR * DR))
        states = states_after(state, xs, dts, keys, keeps, rates, reach, SIGNED, PACKED, STEPS)
        for j in tl.static_range(STEPS - 1, -1, -1):
            t = t0 + j
            x = xs[j]
            dt = dts[j]
            dy = dys[j]
            base = tl.exp2(dt * rates)
            grad = behind + queries[j] * dy
            tl.store(DQUERIES + t * numbers + ns, sum_channels(states[j + 1] * dy, NL, DL, NR), mask=one_channel)
            tl.store(DKEYS + t * numbers + ns, sum_channels(grad * (x * dt), NL, DL, NR), mask=one_channel)
            behind = grad * decay_of(base, reach, keeps[j], SIGNED, PACKED)
            energy = behind * states[j]
            if SIGNED:
                ddecay = grad * states[j]
                if PACKED:
                    ddecay *= keeps[j]
                dreach += tl.sum(ddecay * (base - 1.0), 2, keep_dims=True)
                energy = ddecay * base * (1.0 + reach)
            drates += dt * energy
            written = sum_numbers(grad * keys[j])
            dx = dt * written
            ddt = LN2 * sum_numbers(energy * rates) + x * written
            if HAS_SKIP:
                dx += skip * dy
                dskip += x * dy
            there = both(one_number, t < tokens)
            tl.store(DX + t * o_t + ds, dx.to(DX.dtype.element_ty), mask=there)
            tl.store(DDT + t * o_t + ds, ddt.to(DDT.dtype.element_ty), mask=there)
    tl.store(DRATES + at, drates, mask=inside)
    row = (b * stretches + s) * channels + ds
    if HAS_SKIP:
        tl.store(DSKIP + row, dskip, mask=both(one_number, tl.program_id(1) == 0))
    if SIGNED:
        row += tl.program_id(1).to(tl.int64) * (tl.num_programs(2) // batch_stretches) * stretches * channels
        tl.store(DREACH + row, tl.broadcast_to(tl.sum(dreach, 0, keep_dims=True), [NL, DL, 1, DR]), mask=one_number)
    if s == 0:
        tl.store(DSTART + b * size + tile, behind, mask=inside)
