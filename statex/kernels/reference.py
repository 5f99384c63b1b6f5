"""The specification: both recurrences, one token at a time, in float64. Slow; every other backend is tested against it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .lift import channel_mixing, lift_factor, lifted_key, lifted_query
from .signed import extended


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    mixing: Tensor | None = None,
    lift_gamma: Tensor | None = None,
    spectrum: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention (arXiv 2312.06635); arguments as in `statex.kernels.gla`.

    S_t = Diag(exp(log_decay_t)) S_{t-1} + k_tᵀ v_t and o_t = scale · q_t S_t.
    """
    batch, _, heads, key_dim = k.shape
    group = q.shape[2] // heads
    factor = lift_factor(lift_gamma, key_dim)
    out_dtype, state_dtype = q.dtype, state_dtype_of(q)
    q, k, v = q.double(), lifted_key(k.double(), factor), v.double()
    decay = _decay(log_decay.double(), spectrum).repeat(1, 1, 1, factor)
    q = lifted_query(q, None if lift_gamma is None else lift_gamma.double())
    q = scale * q.unflatten(2, (heads, group))
    blocks = 1 if mixing is None else mixing.shape[-1]
    gains = q.new_ones(heads, k.shape[-1], 1) if mixing is None else channel_mixing(mixing.double(), factor, key_dim)

    def run(start: int, end: int, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(start, end):
            state = state * decay[:, t, :, :, None] + k[:, t, :, :, None] * v[:, t, :, None, :]
            read = torch.einsum("bhgk,hkj,bhkjv->bhgjv", q[:, t], gains, state.unflatten(-1, (blocks, -1)))
            outputs.append(read.flatten(3).flatten(1, 2))
        return torch.stack(outputs, 1) if outputs else q.new_zeros(batch, 0, heads * group, v.shape[-1]), state

    o, state = run_sequences(run, (batch, heads, k.shape[-1], v.shape[-1]), q, initial_state, cu_seqlens)
    return o.to(out_dtype), state.to(state_dtype) if output_final_state else None


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    lift_gamma: Tensor | None = None,
    spectrum: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2's state space model (arXiv 2405.21060); arguments as in `statex.kernels.ssd`.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_tᵀ x_t and y_t = C_t S_t + D x_t.
    """
    batch, _, heads, head_dim = x.shape
    per_group = heads // B.shape[2]
    out_dtype, state_dtype = x.dtype, state_dtype_of(x)
    x, dt = x.double(), dt.double()
    decay = _decay(dt * A.double(), spectrum)
    keys = lifted_key(B.double(), lift_factor(lift_gamma, B.shape[-1])).repeat_interleave(per_group, 2)
    queries = lifted_query(C.double(), None if lift_gamma is None else lift_gamma.double()).repeat_interleave(per_group, 2)

    def run(start: int, end: int, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(start, end):
            write = keys[:, t, :, :, None] * (dt[:, t, :, None] * x[:, t])[:, :, None, :]
            state = state * decay[:, t, :, None, None] + write
            outputs.append(torch.einsum("bhn,bhnp->bhp", queries[:, t], state))
        return torch.stack(outputs, 1) if outputs else x.new_zeros(batch, 0, heads, head_dim), state

    y, state = run_sequences(run, (batch, heads, keys.shape[-1], head_dim), x, initial_state, cu_seqlens)
    if D is not None:
        y = y + D.double()[:, None] * x
    return y.to(out_dtype), state.to(state_dtype) if output_final_state else None


def run_sequences(
    run: Callable[[int, int, Tensor], tuple[Tensor, Tensor]],
    state_shape: tuple[int, ...],
    like: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Runs the loop over the whole batch, or over each packed sequence from a state of its own."""
    borders = [0, like.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = state_shape[0] if cu_seqlens is None else len(borders) - 1
    states = like.new_zeros(sequences, *state_shape[1:]) if initial_state is None else initial_state.double()
    if cu_seqlens is None:
        return run(0, like.shape[1], states)
    results = [run(start, end, states[n : n + 1]) for n, (start, end) in enumerate(pairwise(borders))]
    return torch.cat([o for o, _ in results], 1), torch.cat([state for _, state in results], 0)


def _decay(log_decay: Tensor, spectrum: Tensor | None) -> Tensor:
    return log_decay.exp() if spectrum is None else extended(log_decay, spectrum.double())


def state_dtype_of(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
