"""Recurrences of the families behind one call each, on any device.

Layout: rows `[B, T, H, D]`, states `[N, H, K, V]`, N being the batch or the number of packed sequences. This package imports
nothing else of the project.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import chunked_gla, chunked_ssd, reference, signed, triton_backend
from .checks import check_gla, check_ssd
from .delta import delta_rule, delta_rule_step
from .empty import empty_result
from .hgrn import hgrn
from .lift import lift
from .packed import run_in_buckets
from .selective_scan import selective_scan, selective_scan_step
from .step import gla_step, ssd_step

__all__ = [
    "BACKENDS",
    "delta_rule",
    "delta_rule_step",
    "gla",
    "gla_step",
    "hgrn",
    "lift",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
]

BACKENDS: dict[str, dict[str, ModuleType]] = {
    "reference": {"gla": reference, "ssd": reference},
    "chunked": {"gla": chunked_gla, "ssd": chunked_ssd},
    "triton": triton_backend.MODULES,
}
"""Backend name to the modules that hold its `gla` and `ssd`. A new backend is a line here.

The delta rule, the selective scan and HGRN's scan have backends of the same names, listed in their own modules."""


def _module(backend: str, operation: str, x: Tensor) -> ModuleType:
    """The module that computes `operation` on tensors like `x`. Raises `ValueError` where the backend is unknown or cannot."""
    return BACKENDS[triton_backend.chosen(backend, BACKENDS, x, partial(triton_backend.why_not, x))][operation]


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention (arXiv 2312.06635), with the readings that surgery adds.

    S_t = Diag(exp(log_decay_t)) S_{t-1} + k_tᵀ v_t and o_t = scale · q_t S_t, per head, computed in float32 (float64 for float64
    inputs) whatever autocast says.

    Args:
        q: `[B, T, Hq, K]`; Hq is a multiple of H, and query head h reads the state of head h // (Hq / H).
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        log_decay: `[B, T, H, K]`, nats, at most 0; -inf forgets everything.
        scale: factor on q.
        mixing: `[H, f, f]` or `[H, K, f]`. Value block j (of f) is read as scale · Σ_i (q_i ∘ M_ij) S_ij over key blocks i.
        lift_gamma: `[Hq, (factor - 1) * K]`. Keys become `[k ; lift(k)]`, queries `[q ; lift_gamma ∘ lift(q)]`, decays repeat.
        spectrum: `[H, K]` in [-1, 1], how far eigenvalues reach below 0: decays a become (1 + spectrum)·a - spectrum.
        initial_state: `[N, H, factor * K, V]`, zeros by default.
        output_final_state: also return the state after the last token.
        cu_seqlens: borders `[N + 1]` of N sequences packed into one row (B = 1), from 0 to T. States do not cross borders.
        backend: "auto" (Triton on CUDA devices, else chunked), "triton", "chunked" (any device) or "reference" (float64, one
            token at a time).

    Returns:
        o `[B, T, Hq, V]` in the dtype of `q`, and the final state `[N, H, factor * K, V]` in float32 (float64), or None.

    Raises:
        ValueError: dtypes that are not real floating point, sizes of 0 (but for batch and T), shapes or devices that disagree,
            borders that do not run from 0 to T, a log-decay above 0, a backend that is unknown or cannot take them.
    """
    module = _module(backend, "gla", q)
    state_shape = check_gla(q, k, v, log_decay, mixing, lift_gamma, spectrum, initial_state, cu_seqlens)
    if q.numel() == 0:
        inputs = (q, k, v, log_decay, mixing, lift_gamma, spectrum)
        return empty_result(inputs, (*q.shape[:3], v.shape[-1]), state_shape, initial_state, output_final_state)
    options: dict[str, Any] = {
        "scale": scale, "mixing": mixing, "lift_gamma": lift_gamma, "initial_state": initial_state,
        "output_final_state": output_final_state, "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    with torch.autocast(q.device.type, enabled=False):
        if module is reference:
            return reference.gla(q, k, v, log_decay, spectrum=spectrum, **options)
        if spectrum is not None:
            return signed.gla(partial(_gla, module), q, k, v, log_decay, spectrum=spectrum, **options)
        return _gla(module, q, k, v, log_decay, **options)


def _gla(module: ModuleType, *rows: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """A backend's `gla`, packed sequences with states of their own included."""
    if not _needs_buckets(**options):
        return module.gla(*rows, **options)

    def run(rows: tuple[Tensor, ...], state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return module.gla(*rows, **options | {"initial_state": state, "output_final_state": True, "cu_seqlens": None})

    o, final = run_in_buckets(run, rows, options["initial_state"], options["cu_seqlens"])
    return o, final if options["output_final_state"] else None


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Mamba-2's state space model (arXiv 2405.21060).

    S_t = exp(dt_t A) S_{t-1} + dt_t B_tᵀ x_t and y_t = C_t S_t + D x_t, per head, computed in float32 (float64 for float64 inputs)
    whatever autocast says.

    Args:
        x: `[B, T, H, P]`.
        dt: `[B, T, H]`, after softplus.
        A: `[H]`, at most 0.
        B, C: `[B, T, G, N]`; head h reads group h // (H / G).
        D: `[H]`, the skip connection, or None.
        lift_gamma: `[G, (factor - 1) * N]`. B becomes `[B ; lift(B)]` and C `[C ; lift_gamma ∘ lift(C)]`.
        spectrum: `[H]`, as in `gla`.
        initial_state: `[sequences, H, factor * N, P]`, zeros by default.
        output_final_state: also return the state after the last token.
        cu_seqlens: borders of sequences packed into one row, as in `gla`.
        backend: as in `gla`.

    Returns:
        y `[B, T, H, P]` in the dtype of `x`, and the final state `[sequences, H, factor * N, P]` in float32 (float64), or None.

    Raises:
        ValueError: dtypes that are not real floating point, sizes of 0 (but for batch and T), shapes or devices that disagree,
            borders that do not run from 0 to T, A above 0 or dt below 0, a backend that is unknown or cannot take them.
    """
    module = _module(backend, "ssd", x)
    state_shape = check_ssd(x, dt, A, B, C, D, lift_gamma, spectrum, initial_state, cu_seqlens)
    if x.numel() == 0:
        inputs = (x, dt, A, B, C, D, lift_gamma, spectrum)
        return empty_result(inputs, x.shape, state_shape, initial_state, output_final_state)
    options: dict[str, Any] = {
        "D": D, "lift_gamma": lift_gamma, "initial_state": initial_state,
        "output_final_state": output_final_state, "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        if module is reference:
            return reference.ssd(x, dt, A, B, C, spectrum=spectrum, **options)
        if spectrum is not None:
            return signed.ssd(partial(_ssd, module), x, dt, A, B, C, spectrum=spectrum, **options)
        return _ssd(module, x, dt, A, B, C, **options)


def _ssd(
    module: ModuleType, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, log_decay: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """A backend's `ssd`, packed sequences with states of their own included."""
    if not _needs_buckets(**options):
        return module.ssd(x, dt, A, B, C, log_decay=log_decay, **options)

    def run(rows: tuple[Tensor, ...], state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x, dt, B, C, *decays = rows
        own = {"initial_state": state, "output_final_state": True, "cu_seqlens": None}
        return module.ssd(x, dt, A, B, C, log_decay=decays[0] if decays else None, **options | own)

    rows = (x, dt, B, C) if log_decay is None else (x, dt, B, C, log_decay)
    y, final = run_in_buckets(run, rows, options["initial_state"], options["cu_seqlens"])
    return y, final if options["output_final_state"] else None


def _needs_buckets(cu_seqlens: Tensor | None, initial_state: Tensor | None, output_final_state: bool, **options: Any) -> bool:
    """Backends run packed sequences from zero states and return none."""
    return cu_seqlens is not None and (initial_state is not None or output_final_state)
