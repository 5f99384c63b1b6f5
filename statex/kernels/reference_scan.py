"""The specification of the elementwise recurrences: one token at a time, in float64. Slow; the scans are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .lift import lift_factor, lifted_key, lifted_query
from .reference import run_sequences, state_dtype_of


def hgrn(
    x: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h_t = exp(log_decay_t) ∘ h_{t-1} + x_t; arguments as in `statex.kernels.hgrn`."""
    out_dtype, state_dtype = x.dtype, state_dtype_of(x)
    x, decay = x.double(), log_decay.double().exp()

    def run(start: int, end: int, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(start, end):
            state = decay[:, t] * state + x[:, t]
            outputs.append(state)
        return torch.stack(outputs, 1) if outputs else x[:, :0], state

    h, state = run_sequences(run, (x.shape[0], x.shape[-1]), x, initial_state, cu_seqlens)
    return h.to(out_dtype), state.to(state_dtype) if output_final_state else None


def selective_scan(
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
    """Mamba's state space model (arXiv 2312.00752); arguments as in `statex.kernels.selective_scan`.

    S_t[n, i] = a_t[n, i] S_{t-1}[n, i] + B_t[n] dt_t[i] x_t[i] with a = exp(dt A), and y_t = C_t S_t + D x_t.
    """
    out_dtype, state_dtype = x.dtype, state_dtype_of(x)
    factor = lift_factor(lift_gamma, B.shape[-1])
    x, dt, rates = x.double(), dt.double(), A.double().T.repeat(factor, 1)
    keys, queries = lifted_key(B.double(), factor), lifted_query(C.double(), None if lift_gamma is None else lift_gamma.double())
    reach = x.new_zeros(x.shape[-1]) if spectrum is None else spectrum.double()

    def run(start: int, end: int, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(start, end):
            decay = (1 + reach) * (dt[:, t, None] * rates).exp() - reach
            state = state * decay[:, None] + (keys[:, t, :, None] * (dt[:, t] * x[:, t])[:, None])[:, None]
            outputs.append(torch.einsum("bn,bhni->bi", queries[:, t], state))
        return torch.stack(outputs, 1) if outputs else x[:, :0], state

    y, state = run_sequences(run, (x.shape[0], 1, keys.shape[-1], x.shape[-1]), x, initial_state, cu_seqlens)
    if D is not None:
        y = y + D.double() * x
    return y.to(out_dtype), state.to(state_dtype) if output_final_state else None
