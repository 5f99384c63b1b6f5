"""HGRN's recurrence on a GPU: what `statex.kernels.hgrn` computes, forward and backward, each in one pass over memory.

A program owns some channels of a sequence and walks over its tokens, a tile at a time. A tile is RUNS runs of STEPS tokens: each
run lies in the registers of other threads, which walk it from zero; then the states in front of the runs are made of what all of
them end with, and every run is walked once more, from its own. While a tile is worked on the rows of the next are on their way.
Where channels and batch make too few programs, time is cut into stretches, whose ends are made first, and whose rows are so
read twice. Kept for the backward pass are the decays and the results.
"""

# Kernels have no lists; their tuples grow, which mypy takes for another type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass, replace
from math import e, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocks import constant
from .layout import ceil_div, on_own_device, pad_to, power_of_2, unit_stride
from .scan_kernels import join_stretches


@dataclass(frozen=True)
class Tile:
    """What a program works on at once: so many channels of `runs` runs of `steps` tokens."""

    channels: int
    runs: int
    steps: int
    warps: int

    def shortened(self, tokens: int) -> Tile:
        """For rows of few tokens: with fewer steps."""
        steps = power_of_2(ceil_div(tokens, self.runs))
        return self if steps >= self.steps else replace(self, steps=steps)


TILES = {"walk": Tile(32, 8, 16, 8), "forward": Tile(32, 8, 16, 8), "backward": Tile(32, 8, 8, 8)}

PROGRAMS = 128
"""Programs that keep memory busy; with fewer, time is cut into stretches."""

WANTED = 1056
"""Programs that stretches make."""

SHORTEST = 1024
"""Tokens in the shortest stretch."""

JOIN = 256
"""Channels of a program that joins stretches."""

LOG2E = constant(log2(e))


@triton.jit
def token_rows(ROWS, ts, high, inside, T_STRIDE: tl.constexpr, STEPS: tl.constexpr):
    """STEPS tokens' rows of every run, from tokens ts on, as they lie in memory; 0 from token `high` on."""
    rows = ()
    for j in tl.static_range(STEPS):
        rows += (tl.load(ROWS + j * T_STRIDE, mask=inside & (ts + j < high), other=0.0),)
    return rows


@triton.jit
def earlier_rows(ROWS, ts, high, inside, T_STRIDE: tl.constexpr, STEPS: tl.constexpr):
    """As `token_rows`, ROWS being a token ahead: 0 for the token in front of the first."""
    rows = ()
    for j in tl.static_range(STEPS):
        there = inside & (ts + j < high)
        if j == 0:
            there = there & (ts > 0)
        rows += (tl.load(ROWS + j * T_STRIDE, mask=there, other=0.0),)
    return rows


@triton.jit
def decays_of(logs, BORDERS, ts, high, PACKED: tl.constexpr, STEPS: tl.constexpr):
    """What STEPS tokens multiply the state by; 0 for the first token of a packed sequence."""
    starts = 0
    if PACKED:  # a bit for each step, since rows that all channels share would change the layout of all others
        js = tl.arange(0, STEPS)[None, :]
        starts = tl.sum(tl.load(BORDERS + ts + js, mask=ts + js < high, other=0) << js, 1, keep_dims=True)
    decays = ()
    for j in tl.static_range(STEPS):
        decay = tl.exp2(logs[j].to(tl.float32) * LOG2E)
        if PACKED:
            decay = tl.where(((starts >> j) & 1) == 1, 0.0, decay)
        decays += (decay,)
    return decays


@triton.jit
def follow(total, end, total_before, end_before, total_2, end_2, total_before_2, end_before_2):
    """Two neighbouring groups of runs as one: product of decays and end from zero, of all runs and of all but the last."""
    return total * total_2, end * total_2 + end_2, total * total_before_2, end * total_before_2 + end_before_2


@triton.jit
def in_front(total, end):
    """Product of decays, and the end from zero, of all runs in front of each, from those of every run by itself, `[RUNS, BD]`."""
    nothing = tl.zeros_like(end)
    _, _, total_before, end_before = tl.associative_scan((total, end, nothing + 1.0, nothing), 0, follow)
    return total_before, end_before


@triton.jit
def last_of(rows, RUNS: tl.constexpr):
    """The last run's, `[1, BD]`."""
    return tl.sum(tl.where(tl.arange(0, RUNS)[:, None] == RUNS - 1, rows, 0.0), 0, keep_dims=True)


@triton.jit
def place(tokens, channels, length, BACKWARD: tl.constexpr, RUNS: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr):
    """Where a program works: sequence, stretch and its first token; the first tokens of its first tile's runs, and its channels."""
    blocks = tl.cdiv(channels, BD)
    z = (tl.program_id(0) // blocks).to(tl.int64)
    stretches = tl.cdiv(tokens, length)
    first = (z % stretches).to(tl.int32) * length
    runs = tl.arange(0, RUNS)[:, None]
    ds = tl.program_id(0) % blocks * BD + tl.arange(0, BD)[None, :]
    ts = first + length - (1 + runs) * STEPS if BACKWARD else first + runs * STEPS  # backward the last run first
    return z // stretches, z, first, ts, ds


@triton.jit(do_not_specialize=["tokens", "length"])
def walk_runs(
    X, DECAY, BORDERS, END, TOTAL, x_b, g_b, tokens, length, channels: tl.constexpr, X_T: tl.constexpr, G_T: tl.constexpr,
    BACKWARD: tl.constexpr, PACKED: tl.constexpr, RUNS: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """END = the state after a stretch of `length` tokens that starts from zero, TOTAL = the product of its decays.

    BACKWARD: X holds gradients of outputs, and END is the gradient of the state in front of the stretch.

    Grid: (channel blocks * stretches * B).
    """
    b, z, first, ts, ds = place(tokens, channels, length, BACKWARD, RUNS, STEPS, BD)
    high = tl.minimum(tokens, first + length)
    inside = ds < channels
    WAY: tl.constexpr = -RUNS * STEPS if BACKWARD else RUNS * STEPS
    X += b * x_b + ts.to(tl.int64) * X_T + ds
    DECAY += b * g_b + ts.to(tl.int64) * G_T + ds
    xs = token_rows(X, ts, high, inside, X_T, STEPS)
    logs = token_rows(DECAY, ts, high, inside, G_T, STEPS)
    state = tl.zeros([1, BD], tl.float32)
    product = tl.full([1, BD], 1.0, tl.float32)
    for _ in range(0, length, RUNS * STEPS):
        X += WAY * X_T
        DECAY += WAY * G_T
        further = inside & (ts + WAY >= first)
        next_xs = token_rows(X, ts + WAY, high, further, X_T, STEPS)
        next_logs = token_rows(DECAY, ts + WAY, high, further, G_T, STEPS)
        decays = decays_of(logs, BORDERS, ts, high, PACKED, STEPS)
        end = tl.zeros([RUNS, BD], tl.float32)
        total = tl.full([RUNS, BD], 1.0, tl.float32)
        for i in tl.static_range(STEPS):
            if BACKWARD:
                end = (end + xs[STEPS - 1 - i].to(tl.float32)) * decays[STEPS - 1 - i]
            else:
                end = end * decays[i] + xs[i].to(tl.float32)
            total *= decays[i]
        total_before, end_before = in_front(total, end)
        state = last_of((state * total_before + end_before) * total + end, RUNS)
        product *= last_of(total_before * total, RUNS)
        ts += WAY
        xs = next_xs
        logs = next_logs
    tl.store(END + z * channels + ds, state, mask=inside)
    tl.store(TOTAL + z * channels + ds, product, mask=inside)


@triton.jit(do_not_specialize=["tokens", "length"])
def scan_runs(
    X, DECAY, BORDERS, STARTS, OUT, FINAL, x_b, g_b, tokens, length, channels: tl.constexpr, X_T: tl.constexpr, G_T: tl.constexpr,
    PACKED: tl.constexpr, RUNS: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """OUT = the states after all tokens of a stretch, from the one in front of it, and FINAL after the last. Grid: as above."""
    b, z, first, ts, ds = place(tokens, channels, length, False, RUNS, STEPS, BD)
    high = tl.minimum(tokens, first + length)
    inside = ds < channels
    TILE: tl.constexpr = RUNS * STEPS
    X += b * x_b + ts.to(tl.int64) * X_T + ds
    DECAY += b * g_b + ts.to(tl.int64) * G_T + ds
    OUT += (b * tokens + ts) * channels + ds
    xs = token_rows(X, ts, high, inside, X_T, STEPS)
    logs = token_rows(DECAY, ts, high, inside, G_T, STEPS)
    state = tl.load(STARTS + z * channels + ds, mask=inside, other=0.0)
    for _ in range(0, length, TILE):
        X += TILE * X_T
        DECAY += TILE * G_T
        next_xs = token_rows(X, ts + TILE, high, inside, X_T, STEPS)
        next_logs = token_rows(DECAY, ts + TILE, high, inside, G_T, STEPS)
        decays = decays_of(logs, BORDERS, ts, high, PACKED, STEPS)
        end = tl.zeros([RUNS, BD], tl.float32)
        total = tl.full([RUNS, BD], 1.0, tl.float32)
        for j in tl.static_range(STEPS):
            end = end * decays[j] + xs[j].to(tl.float32)
            total *= decays[j]
        total_before, end_before = in_front(total, end)
        h = state * total_before + end_before
        for j in tl.static_range(STEPS):
            h = h * decays[j] + xs[j].to(tl.float32)
            tl.store(OUT + j * channels, h.to(OUT.dtype.element_ty), mask=inside & (ts + j < high))
        state = last_of(h, RUNS)
        OUT += TILE * channels
        ts += TILE
        xs = next_xs
        logs = next_logs
    if high == tokens:
        tl.store(FINAL + b * channels + ds, state, mask=inside)


@triton.jit(do_not_specialize=["tokens", "length"])
def run_gradients(
    DY, DECAY, BORDERS, H, STATE, ENDS, DX, DDECAY, DSTATE, dy_b, g_b, tokens, length,
    channels: tl.constexpr, DY_T: tl.constexpr, G_T: tl.constexpr, OF_DECAYS: tl.constexpr, PACKED: tl.constexpr,
    RUNS: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients DX and, OF_DECAYS, DDECAY of a stretch, from that of the state behind it in ENDS; DSTATE is the initial STATE's.

    Grid: as above.
    """
    b, z, first, ts, ds = place(tokens, channels, length, True, RUNS, STEPS, BD)
    high = tl.minimum(tokens, first + length)
    inside = ds < channels
    TILE: tl.constexpr = RUNS * STEPS
    DY += b * dy_b + ts.to(tl.int64) * DY_T + ds
    DECAY += b * g_b + ts.to(tl.int64) * G_T + ds
    at = (b * tokens + ts) * channels + ds
    H += at - channels  # a token's decay meets the state in front of it
    DX += at
    DDECAY += at
    dys = token_rows(DY, ts, high, inside, DY_T, STEPS)
    logs = token_rows(DECAY, ts, high, inside, G_T, STEPS)
    states = logs
    if OF_DECAYS:
        states = earlier_rows(H, ts, high, inside, channels, STEPS)
    behind = tl.load(ENDS + z * channels + ds, mask=inside, other=0.0)
    for _ in range(0, length, TILE):
        DY -= TILE * DY_T
        DECAY -= TILE * G_T
        further = inside & (ts - TILE >= first)
        next_dys = token_rows(DY, ts - TILE, high, further, DY_T, STEPS)
        next_logs = token_rows(DECAY, ts - TILE, high, further, G_T, STEPS)
        next_states = next_logs
        initial = 0.0
        if OF_DECAYS:
            H -= TILE * channels
            next_states = earlier_rows(H, ts - TILE, high, further, channels, STEPS)
            initial = tl.load(STATE + b * channels + ds + 0 * ts, mask=inside & (ts == 0), other=0.0)
        decays = decays_of(logs, BORDERS, ts, high, PACKED, STEPS)
        end = tl.zeros([RUNS, BD], tl.float32)
        total = tl.full([RUNS, BD], 1.0, tl.float32)
        for j in tl.static_range(STEPS - 1, -1, -1):
            end = (end + dys[j].to(tl.float32)) * decays[j]
            total *= decays[j]
        total_before, end_before = in_front(total, end)
        grad = behind * total_before + end_before
        for j in tl.static_range(STEPS - 1, -1, -1):
            there = inside & (ts + j < high)
            dx = grad + dys[j].to(tl.float32)
            tl.store(DX + j * channels, dx.to(DX.dtype.element_ty), mask=there)
            grad = dx * decays[j]
            if OF_DECAYS:
                before = states[j].to(tl.float32)
                if j == 0:
                    before += initial
                tl.store(DDECAY + j * channels, (grad * before).to(DDECAY.dtype.element_ty), mask=there)
        behind = last_of(grad, RUNS)
        DX -= TILE * channels
        DDECAY -= TILE * channels
        ts -= TILE
        dys = next_dys
        logs = next_logs
        states = next_states
    if first == 0:
        tl.store(DSTATE + b * channels + ds, behind, mask=inside)


@torch.compiler.disable
@on_own_device
def hgrn(x: Tensor, log_decay: Tensor, *, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments and results of `statex.kernels.hgrn`, but packed sequences start from zero, and the state is that of the last."""
    batch, tokens, channels = x.shape
    if initial_state is None:
        state = torch.zeros(batch, channels, dtype=torch.float32, device=x.device)
    else:
        state = initial_state.float().contiguous()
    borders = None if cu_seqlens is None else _borders(cu_seqlens, tokens, x.device)
    h, final = _Scan.apply(unit_stride(x), unit_stride(log_decay), state, borders)
    return h, final


def _borders(cu_seqlens: Tensor, tokens: int, device: torch.device) -> Tensor:
    """1 for the first token of every packed sequence, else 0, `[T]`."""
    borders = torch.zeros(tokens + 1, dtype=torch.int32, device=device)  # borders at T belong to empty sequences at the end
    return borders.index_fill_(0, cu_seqlens.to(device, torch.int64), 1)[:tokens]


class _Pass:
    """How kernels go through rows `[B, T, D]`, and their launches."""

    def __init__(self, x: Tensor, log_decay: Tensor, borders: Tensor | None) -> None:
        self.batch, self.tokens, self.channels = x.shape
        self.log_decay, self.borders = log_decay, x if borders is None else borders
        self.packed = borders is not None
        self.tiles = {name: tile.shortened(self.tokens) for name, tile in TILES.items()}
        self.length = self._length()
        self.stretches = ceil_div(self.tokens, self.length)

    def _length(self) -> int:
        """Tokens in a stretch, whole tiles."""
        programs = self.batch * ceil_div(self.channels, TILES["forward"].channels)
        stretches = 1 if programs >= PROGRAMS else max(1, min(ceil_div(WANTED, programs), self.tokens // SHORTEST))
        return pad_to(ceil_div(self.tokens, stretches), max(tile.runs * tile.steps for tile in self.tiles.values()))

    def launch(self, name: str, kernel: Any, rows: Tensor, *tensors: Tensor, **flags: bool) -> None:
        """`rows` and the decays come with their strides."""
        tile = self.tiles[name]
        grid = (ceil_div(self.channels, tile.channels) * self.stretches * self.batch,)
        kernel[grid](
            rows, self.log_decay, self.borders, *tensors, rows.stride(0), self.log_decay.stride(0), self.tokens, self.length,
            self.channels, rows.stride(1), self.log_decay.stride(1), PACKED=self.packed, RUNS=tile.runs, STEPS=tile.steps,
            BD=tile.channels, num_warps=tile.warps, **flags,
        )  # fmt: skip

    def starts(self, rows: Tensor, state: Tensor, *, backward: bool) -> Tensor:
        """States in front of every stretch, `[B, stretches, D]`; backward the gradients behind each, of output gradients `rows`."""
        if self.stretches == 1:
            return state
        ends, totals = (state.new_empty(self.batch, self.stretches, self.channels) for _ in range(2))
        self.launch("walk", walk_runs, rows, ends, totals, BACKWARD=backward)
        join_stretches[(ceil_div(self.channels, JOIN), self.batch)](
            ends, totals, state, self.channels, self.stretches, BACKWARD=backward, STEPS=4, BLOCK=JOIN, num_warps=4
        )
        return ends


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_decay, state, borders):
        """Rows `[B, T, D]`, the state `[B, D]`."""
        run = _Pass(x, log_decay, borders)
        h, final = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(state)
        run.launch("forward", scan_runs, x, run.starts(x, state, backward=False), h, final)
        of_decays = ctx.needs_input_grad[1]
        ctx.save_for_backward(log_decay, borders, *((h, state) if of_decays else ()))
        return h, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dfinal):
        log_decay, borders, *kept = ctx.saved_tensors
        dh, dfinal = unit_stride(dh), dfinal.contiguous()
        run = _Pass(dh, log_decay, borders)
        dx, dstate = torch.empty(dh.shape, dtype=dh.dtype, device=dh.device), torch.empty_like(dfinal)
        ddecay = torch.empty(dh.shape, dtype=log_decay.dtype, device=dh.device) if kept else None
        h, state = kept or (dh, dfinal)
        ends = run.starts(dh, dfinal, backward=True)
        run.launch(
            "backward", run_gradients, dh, h, state, ends, dx, dx if ddecay is None else ddecay, dstate, OF_DECAYS=bool(kept)
        )
        return dx, ddecay, dstate, None
