"""The (gated) delta rule behind one call: its backends, its checks, and one token of generation."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import chunked_delta, reference_delta, triton_backend
from .checks import check_delta, check_delta_step
from .empty import empty_result
from .packed import run_in_buckets

FORMS: dict[str, ModuleType] = {"reference": reference_delta, "chunked": chunked_delta}
"""Backend name to the module that holds its `delta_rule`; Triton's is `fused/delta.py`."""


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The delta rule (arXiv 2406.06484), with a log-decay the gated one (arXiv 2412.06464).

    With S' = exp(log_decay_t) S_{t-1}: S_t = S' + beta_t k_tᵀ (v_t - k_t S') and o_t = scale · q_t S_t, per value head, computed in
    float32 (float64 for float64 values) whatever autocast says. Keys must come normalised: a step multiplies what the state holds
    under k_t by 1 - beta_t |k_t|², which must lie in [-1, 1]. Triton kernels multiply in bfloat16 where values are bfloat16, with
    float32 sums and states, and round wider keys such that this factor stays as it is.

    `torch.func` needs the reference, gradients of gradients the reference or the chunked form.

    Args:
        q: `[B, T, Hq, K]`; Hq divides Hk, and head h of H reads query h // (H / Hq).
        k: `[B, T, Hk, K]`; Hk divides H, and head h of H writes under key h // (H / Hk). K may be of any size.
        v: `[B, T, H, V]`.
        beta: `[B, T, H]`, how much of what a key holds gives way to the new value: in [0, 1], up to 2 for negative eigenvalues.
        log_decay: `[B, T, H]`, nats, at most 0; -inf forgets everything; None: no decay.
        scale: factor on q.
        initial_state: `[N, H, K, V]`, zeros by default.
        output_final_state: also return the state after the last token.
        cu_seqlens: borders `[N + 1]` of N sequences packed into one row (B = 1), from 0 to T. States do not cross borders.
        backend: "auto" (Triton on CUDA devices, else chunked), "triton", "chunked" (any device) or "reference" (float64, one
            token at a time).

    Returns:
        o `[B, T, H, V]` in the dtype of `v`, and the final state `[N, H, K, V]` in float32 (float64), or None.

    Raises:
        ValueError: dtypes that are not real floating point, sizes of 0 (but for batch and T), shapes or devices that disagree,
            borders that do not run from 0 to T, a log-decay above 0, a backend that is unknown or cannot take them.
    """
    module = _form(backend, k, v)
    state_shape = check_delta(q, k, v, beta, log_decay, initial_state, cu_seqlens)
    if v.numel() == 0:
        return empty_result((v, q, k, beta, log_decay), v.shape, state_shape, initial_state, output_final_state)
    with torch.autocast(v.device.type, enabled=False):
        if cu_seqlens is None or module is reference_delta or (initial_state is None and not output_final_state):
            return module.delta_rule(
                q, k, v, beta, log_decay, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
                cu_seqlens=cu_seqlens,
            )  # fmt: skip

        def run(rows: tuple[Tensor, ...], state: Tensor | None) -> tuple[Tensor, Tensor | None]:
            gates = rows[4] if log_decay is not None else None
            return module.delta_rule(*rows[:4], gates, scale=scale, initial_state=state, output_final_state=True)

        rows = (q, k, v, beta) if log_decay is None else (q, k, v, beta, log_decay)
        o, final = run_in_buckets(run, rows, initial_state, cu_seqlens)
        return o, final if output_final_state else None


def _form(backend: str, k: Tensor, v: Tensor) -> ModuleType:
    """The module that computes the rule for such keys and values. Raises `ValueError` where the backend is unknown or cannot."""
    name = triton_backend.chosen(backend, (*FORMS, "triton"), v, lambda: triton_backend.why_no_delta_rule(k, v))
    return triton_backend.MODULES["delta"] if name == "triton" else FORMS[name]


@torch.no_grad()
def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, *, scale: float
) -> Tensor:
    """One token of `delta_rule`. No gradients.

    Args:
        q: `[B, Hq, K]`.
        k: `[B, Hk, K]`.
        v: `[B, H, V]`.
        beta, log_decay: `[B, H]`.
        state: `[B, H, K, V]`, float32 (or float64); updated in place.

    Returns:
        `[B, H, V]` in the dtype of `v`.

    Raises:
        ValueError: dtypes that are not real floating point, sizes of 0 but for the batch, shapes or devices that disagree.
    """
    check_delta_step(q, k, v, beta, log_decay, state)
    if (kernel := triton_backend.step_kernel(state, "delta_step")) is not None:
        return kernel.delta_step(q, k, v, beta, log_decay, state, scale=scale)
    heads, dtype = v.shape[1], state.dtype
    queries, keys = (x.to(dtype).repeat_interleave(heads // x.shape[1], 1)[:, :, None] for x in (q, k))
    if log_decay is not None:
        state.mul_(log_decay.to(dtype).exp()[..., None, None])
    write = beta.to(dtype)[..., None, None] * (v.to(dtype)[:, :, None] - keys @ state)
    state.addcmul_(keys.mT, write)
    return (scale * (queries @ state)).squeeze(2).to(v.dtype)
