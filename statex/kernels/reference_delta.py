"""The specification of the delta rule: one token at a time, in float64. Slow; every other backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import run_sequences, state_dtype_of


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The (gated) delta rule; arguments as in `statex.kernels.delta_rule`.

    With S' = exp(log_decay_t) S_{t-1}: S_t = S' + beta_t k_tᵀ (v_t - k_t S') and o_t = scale · q_t S_t.
    """
    batch, _, heads, value_dim = v.shape
    out_dtype, state_dtype = v.dtype, state_dtype_of(v)
    q, k = (x.double().repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    v, beta = v.double(), beta.double()
    decay = torch.ones_like(beta) if log_decay is None else log_decay.double().exp()

    def run(start: int, end: int, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(start, end):
            state = state * decay[:, t, :, None, None]
            held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
            state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * (v[:, t] - held))[:, :, None, :]
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return torch.stack(outputs, 1) if outputs else v.new_zeros(batch, 0, heads, value_dim), state

    o, state = run_sequences(run, (batch, heads, k.shape[-1], value_dim), v, initial_state, cu_seqlens)
    return o.to(out_dtype), state.to(state_dtype) if output_final_state else None
