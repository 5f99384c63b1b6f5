"""Mamba's selective scan behind one call, and one token of generation.

Every element of the state decays at its own rate, so there is no form by matrix products: the scan goes element by element. What
it makes, `[B, t, N, I]`, exists for one segment of tokens at a time, and is made again in the backward pass. On CUDA devices Triton
kernels keep it in registers (`fused/selective_scan.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference_scan, triton_backend
from .checks import check_selective_scan, check_selective_scan_step
from .chunking import Packing, run_segments
from .elementwise import linear_scan
from .empty import empty_result
from .lift import lift_factor, lifted_key, lifted_query
from .packed import run_in_buckets


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Mamba's state space model (arXiv 2312.00752).

    S_t[n, i] = exp(dt_t[i] A[i, n]) S_{t-1}[n, i] + B_t[n] dt_t[i] x_t[i] and y_t = C_t S_t + D x_t, computed in float32 (float64
    for float64 inputs) whatever autocast says.

    `torch.func` needs the reference, gradients of gradients the reference or the chunked form.

    Args:
        x: `[B, T, I]`.
        dt: `[B, T, I]`, after softplus.
        A: `[I, N]`, at most 0.
        B, C: `[B, T, N]`, shared by all channels.
        D: `[I]`, the skip connection, or None.
        lift_gamma: `[1, (factor - 1) * N]`. B becomes `[B ; lift(B)]` and C `[C ; lift_gamma ∘ lift(C)]`; A repeats.
        spectrum: `[I]` in [-1, 1], how far eigenvalues reach below 0: decays a become (1 + spectrum)·a - spectrum.
        initial_state: `[sequences, 1, factor * N, I]`, zeros by default.
        output_final_state: also return the state after the last token.
        cu_seqlens: borders `[sequences + 1]` of sequences packed into one row (B = 1), from 0 to T. States do not cross borders.
        backend: "auto" (Triton on CUDA devices, else chunked), "triton", "chunked" (any device) or "reference" (float64, one
            token at a time).

    Returns:
        y `[B, T, I]` in the dtype of `x`, and the final state `[sequences, 1, factor * N, I]` in float32 (float64), or None.

    Raises:
        ValueError: dtypes that are not real floating point, sizes of 0 (but for batch and T), shapes or devices that disagree,
            borders that do not run from 0 to T, A above 0 or dt below 0, a backend that is unknown or cannot take them.
    """
    scan = _form(backend, x)
    state_shape = check_selective_scan(x, dt, A, B, C, D, lift_gamma, spectrum, initial_state, cu_seqlens)
    if x.numel() == 0:
        inputs = (x, dt, A, B, C, D, lift_gamma, spectrum)
        return empty_result(inputs, x.shape, state_shape, initial_state, output_final_state)
    with torch.autocast(x.device.type, enabled=False):
        if scan is None:
            return reference_scan.selective_scan(
                x, dt, A, B, C, D=D, lift_gamma=lift_gamma, spectrum=spectrum, initial_state=initial_state,
                output_final_state=output_final_state, cu_seqlens=cu_seqlens,
            )  # fmt: skip

        def run(rows: Rows, state: Tensor | None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return scan(rows, (A, D, lift_gamma, spectrum), state, cu_seqlens)

        if cu_seqlens is None or (initial_state is None and not output_final_state):
            y, state = run((x, dt, B, C), initial_state, cu_seqlens)
        else:
            y, state = run_in_buckets(run, (x, dt, B, C), initial_state, cu_seqlens)
        return y, state if output_final_state else None


Rows = tuple[Tensor, ...]
Shared = tuple[Tensor | None, ...]
Form = Callable[[Rows, Shared, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def _form(backend: str, x: Tensor) -> Form | None:
    """What scans tensors like `x`; None is the reference. Raises `ValueError` where the backend is unknown or cannot."""
    forms = {"reference": None, "chunked": _scan, "triton": _fused_scan}
    return forms[triton_backend.chosen(backend, forms, x, lambda: triton_backend.why_not(x, shared_memory=0))]


def _fused_scan(rows: Rows, shared: Shared, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    x, dt, B, C = rows
    A, D, lift_gamma, spectrum = shared
    assert A is not None
    keys, queries, rates = _lifted(B, C, A, lift_gamma, torch.float32)
    initial = None if state is None else state.squeeze(1)
    y, final = triton_backend.MODULES["selective_scan"].selective_scan(
        x, dt, rates, keys, queries, D=D, spectrum=spectrum, initial_state=initial, cu_seqlens=cu_seqlens
    )
    return y, final[:, None]


def _scan(rows: Rows, shared: Shared, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    x, _, B, _ = rows
    batch, _, channels = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state_dim = B.shape[-1] * lift_factor(shared[2], B.shape[-1])
    initial = x.new_zeros(batch, state_dim, channels, dtype=dtype) if state is None else state.to(dtype).squeeze(1)
    elements = 8 * batch * state_dim * channels  # decays, updates, states, and in the backward pass their gradients
    y, final = run_segments(_segment, rows, shared, initial, chunk=1, elements_per_token=elements, cu_seqlens=cu_seqlens)
    return y, final[:, None]


def _segment(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    lift_gamma: Tensor | None,
    spectrum: Tensor | None,
    state: Tensor,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, t, I]` and the state `[B, N, I]` after a run of tokens."""
    dtype, out_dtype = state.dtype, x.dtype
    x, dt = x.to(dtype), dt.to(dtype)
    keys, queries, rates = _lifted(B, C, A, lift_gamma, dtype)
    decay = _decay(dt[:, :, None] * rates, spectrum)
    if packing is not None:
        decay = decay.masked_fill(~packing.passes[:, None, None], 0)
    states = linear_scan(decay, keys[..., None] * (dt * x)[:, :, None], state)
    y = (queries[:, :, None] @ states).squeeze(2)
    if D is not None:
        y = torch.addcmul(y, D.to(dtype), x)
    return y.to(out_dtype), states[:, -1].clone()


def _lifted(B: Tensor, C: Tensor, A: Tensor, lift_gamma: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and queries `[..., factor * N]`, and A transposed and repeated over their parts, `[factor * N, I]`."""
    factor = lift_factor(lift_gamma, B.shape[-1])
    gamma = None if lift_gamma is None else lift_gamma.to(dtype)
    return lifted_key(B.to(dtype), factor), lifted_query(C.to(dtype), gamma), A.to(dtype).T.repeat(factor, 1)


def _decay(log_decay: Tensor, spectrum: Tensor | None) -> Tensor:
    decay = log_decay.exp()
    return decay if spectrum is None else decay + spectrum.to(decay) * (decay - 1)


@torch.no_grad()
def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    lift_gamma: Tensor | None = None,
    spectrum: Tensor | None = None,
) -> Tensor:
    """One token of `selective_scan`. No gradients.

    Args:
        x, dt: `[B, I]`, dt after softplus.
        A: `[I, N]`.
        B, C: `[B, N]`.
        state: `[B, 1, factor * N, I]`, float32 (or float64); updated in place.
        D, lift_gamma, spectrum: as in `selective_scan`.

    Returns:
        `[B, I]` in the dtype of `x`.

    Raises:
        ValueError: dtypes that are not real floating point, sizes of 0 but for the batch, shapes or devices that disagree.
    """
    check_selective_scan_step(x, dt, A, B, C, state, D, lift_gamma, spectrum)
    if (kernel := triton_backend.step_kernel(state, "scan_step")) is not None:
        return kernel.scan_step(x, dt, A, B, C, state, D=D, lift_gamma=lift_gamma, spectrum=spectrum)
    dtype = state.dtype
    keys, queries, rates = _lifted(B, C, A, lift_gamma, dtype)
    values, steps = x.to(dtype), dt.to(dtype)
    held = state.squeeze(1)
    held.mul_(_decay(steps[:, None] * rates, spectrum)).addcmul_(keys[..., None], (steps * values)[:, None])
    y = (queries[:, None] @ held).squeeze(1)
    return (y if D is None else torch.addcmul(y, D.to(dtype), values)).to(x.dtype)
