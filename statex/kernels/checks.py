"""Cheap checks of the kernels' inputs. Values are read only where that does not stall a device."""

from __future__ import annotations

import torch
from torch import Tensor


def check_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    mixing: Tensor | None,
    lift_gamma: Tensor | None,
    spectrum: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[int, ...]:
    """The shape of the states. Raises `ValueError` on inputs that `gla` cannot mean."""
    check_tensors(
        q=q, k=k, v=v, log_decay=log_decay, mixing=mixing, lift_gamma=lift_gamma, spectrum=spectrum, initial_state=initial_state
    )
    _expect_axes("[B, T, H, D]", q=q, k=k, v=v, log_decay=log_decay)
    batch, tokens, heads, key_dim = k.shape
    query_heads, value_dim = q.shape[2], v.shape[-1]
    _expect_positive(Hq=query_heads, H=heads, K=key_dim, V=value_dim)
    _expect("q", q, (batch, tokens, query_heads, key_dim))
    _expect("v", v, (batch, tokens, heads, value_dim))
    _expect("log_decay", log_decay, (batch, tokens, heads, key_dim))
    _require(query_heads % heads == 0, f"{query_heads} query heads cannot share {heads} key heads: not a multiple")
    if mixing is not None:
        _check_mixing(mixing, heads, key_dim, value_dim)
    factor = _checked_factor(lift_gamma, "query heads", query_heads, key_dim)
    _check_spectrum(spectrum, (heads, key_dim))
    sequences = check_cu_seqlens(cu_seqlens, batch, tokens)
    state_shape = (sequences, heads, factor * key_dim, value_dim)
    _expect_each(state_shape, initial_state=initial_state)
    _require(not (_readable(log_decay) and bool((log_decay > 0).any())), "log_decay must be at most 0: states would grow for ever")
    return state_shape


def check_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    lift_gamma: Tensor | None,
    spectrum: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[int, ...]:
    """The shape of the states. Raises `ValueError` on inputs that `ssd` cannot mean."""
    check_tensors(x=x, dt=dt, A=A, B=B, C=C, D=D, lift_gamma=lift_gamma, spectrum=spectrum, initial_state=initial_state)
    _expect_axes("[B, T, H, D]", x=x, B=B, C=C)
    batch, tokens, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    _expect_positive(H=heads, P=head_dim, G=groups, N=d_state)
    _expect("dt", dt, (batch, tokens, heads))
    _expect("A", A, (heads,))
    _expect_each((batch, tokens, groups, d_state), B=B, C=C)
    _require(heads % groups == 0, f"{heads} heads cannot share {groups} groups of B and C: not a multiple")
    _expect_each((heads,), D=D)
    factor = _checked_factor(lift_gamma, "groups", groups, d_state)
    _check_spectrum(spectrum, (heads,))
    sequences = check_cu_seqlens(cu_seqlens, batch, tokens)
    state_shape = (sequences, heads, factor * d_state, head_dim)
    _expect_each(state_shape, initial_state=initial_state)
    _require(not (_readable(A) and bool((A > 0).any())), "A must be at most 0: states would grow for ever")
    _require(not (_readable(dt) and bool((dt < 0).any())), "dt must be at least 0: pass it after softplus")
    return state_shape


def check_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[int, ...]:
    """The shape of the states. Raises `ValueError` on inputs that `delta_rule` cannot mean."""
    check_tensors(q=q, k=k, v=v, beta=beta, log_decay=log_decay, initial_state=initial_state)
    _expect_axes("[B, T, H, D]", q=q, k=k, v=v)
    batch, tokens, heads, value_dim = v.shape
    query_heads, (key_heads, key_dim) = q.shape[2], k.shape[2:]
    _expect_positive(Hq=query_heads, Hk=key_heads, H=heads, K=key_dim, V=value_dim)
    _expect("k", k, (batch, tokens, key_heads, key_dim))
    _expect("q", q, (batch, tokens, query_heads, key_dim))
    _require(heads % key_heads == 0, f"{heads} value heads cannot share {key_heads} key heads: not a multiple")
    _require(key_heads % query_heads == 0, f"{key_heads} key heads cannot share {query_heads} query heads: not a multiple")
    _expect("beta", beta, (batch, tokens, heads))
    if log_decay is not None:
        _expect("log_decay", log_decay, (batch, tokens, heads))
        grows = _readable(log_decay) and bool((log_decay > 0).any())
        _require(not grows, "log_decay must be at most 0: states would grow for ever")
    sequences = check_cu_seqlens(cu_seqlens, batch, tokens)
    state_shape = (sequences, heads, key_dim, value_dim)
    _expect_each(state_shape, initial_state=initial_state)
    return state_shape


def check_hgrn(x: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """The shape of the states. Raises `ValueError` on inputs that `hgrn` cannot mean."""
    check_tensors(x=x, log_decay=log_decay, initial_state=initial_state)
    _require(x.dim() == 3, f"x must be [B, T, D], got {_shape(x)}")
    batch, tokens, channels = x.shape
    _expect_positive(D=channels)
    _expect("log_decay", log_decay, (batch, tokens, channels))
    sequences = check_cu_seqlens(cu_seqlens, batch, tokens)
    state_shape = (sequences, channels)
    _expect_each(state_shape, initial_state=initial_state)
    _require(not (_readable(log_decay) and bool((log_decay > 0).any())), "log_decay must be at most 0: states would grow for ever")
    return state_shape


def check_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    lift_gamma: Tensor | None,
    spectrum: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[int, ...]:
    """The shape of the states. Raises `ValueError` on inputs that `selective_scan` cannot mean."""
    check_tensors(x=x, dt=dt, A=A, B=B, C=C, D=D, lift_gamma=lift_gamma, spectrum=spectrum, initial_state=initial_state)
    _expect_axes("[B, T, D]", x=x, B=B, C=C)
    batch, tokens, channels = x.shape
    d_state = B.shape[-1]
    _expect_positive(I=channels, N=d_state)
    _expect("dt", dt, (batch, tokens, channels))
    _expect("A", A, (channels, d_state))
    _expect_each((batch, tokens, d_state), B=B, C=C)
    _expect_each((channels,), D=D)
    factor = _checked_factor(lift_gamma, "group", 1, d_state)
    _check_spectrum(spectrum, (channels,))
    sequences = check_cu_seqlens(cu_seqlens, batch, tokens)
    state_shape = (sequences, 1, factor * d_state, channels)
    _expect_each(state_shape, initial_state=initial_state)
    _require(not (_readable(A) and bool((A > 0).any())), "A must be at most 0: states would grow for ever")
    _require(not (_readable(dt) and bool((dt < 0).any())), "dt must be at least 0: pass it after softplus")
    return state_shape


def check_gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    mixing: Tensor | None,
    lift_gamma: Tensor | None,
    spectrum: Tensor | None,
) -> None:
    """Raises `ValueError` on one token's rows and states `[B, H, factor * K, V]` that do not fit together."""
    check_tensors(q=q, k=k, v=v, log_decay=log_decay, state=state, mixing=mixing, lift_gamma=lift_gamma, spectrum=spectrum)
    _expect_axes("[B, H, D]", q=q, k=k, v=v)
    batch, heads, key_dim = k.shape
    query_heads, value_dim = q.shape[1], v.shape[-1]
    _expect_positive(Hq=query_heads, H=heads, K=key_dim, V=value_dim)
    _require(query_heads % heads == 0, f"{query_heads} query heads cannot share {heads} key heads: not a multiple")
    _expect("q", q, (batch, query_heads, key_dim))
    _expect("v", v, (batch, heads, value_dim))
    _expect("log_decay", log_decay, (batch, heads, key_dim))
    if mixing is not None:
        _check_mixing(mixing, heads, key_dim, value_dim)
    _expect_each((heads, key_dim), spectrum=spectrum)
    factor = _checked_factor(lift_gamma, "query heads", query_heads, key_dim)
    _expect("state", state, (batch, heads, factor * key_dim, value_dim))


def check_ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    lift_gamma: Tensor | None,
    spectrum: Tensor | None,
) -> None:
    """Raises `ValueError` on one token's rows and states `[B, H, factor * N, P]` that do not fit together."""
    check_tensors(x=x, dt=dt, A=A, B=B, C=C, state=state, D=D, lift_gamma=lift_gamma, spectrum=spectrum)
    _expect_axes("[B, H, D]", x=x, B=B, C=C)
    batch, heads, head_dim = x.shape
    groups, d_state = B.shape[1:]
    _expect_positive(H=heads, P=head_dim, G=groups, N=d_state)
    _expect("dt", dt, (batch, heads))
    _expect("A", A, (heads,))
    _expect_each((batch, groups, d_state), B=B, C=C)
    _require(heads % groups == 0, f"{heads} heads cannot share {groups} groups of B and C: not a multiple")
    _expect_each((heads,), D=D, spectrum=spectrum)
    factor = _checked_factor(lift_gamma, "groups", groups, d_state)
    _expect("state", state, (batch, heads, factor * d_state, head_dim))


def check_delta_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor) -> None:
    """Raises `ValueError` on one token's rows and states `[B, H, K, V]` that do not fit together."""
    check_tensors(q=q, k=k, v=v, beta=beta, log_decay=log_decay, state=state)
    _expect_axes("[B, H, D]", q=q, k=k, v=v)
    batch, heads, value_dim = v.shape
    query_heads, (key_heads, key_dim) = q.shape[1], k.shape[1:]
    _expect_positive(Hq=query_heads, Hk=key_heads, H=heads, K=key_dim, V=value_dim)
    _expect("q", q, (batch, query_heads, key_dim))
    _expect("k", k, (batch, key_heads, key_dim))
    _require(heads % key_heads == 0, f"{heads} value heads cannot share {key_heads} key heads: not a multiple")
    _require(key_heads % query_heads == 0, f"{key_heads} key heads cannot share {query_heads} query heads: not a multiple")
    _expect_each((batch, heads), beta=beta, log_decay=log_decay)
    _expect("state", state, (batch, heads, key_dim, value_dim))


def check_selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    lift_gamma: Tensor | None,
    spectrum: Tensor | None,
) -> None:
    """Raises `ValueError` on one token's rows and states `[B, 1, factor * N, I]` that do not fit together."""
    check_tensors(x=x, dt=dt, A=A, B=B, C=C, state=state, D=D, lift_gamma=lift_gamma, spectrum=spectrum)
    _expect_axes("[B, D]", x=x, B=B)
    (batch, channels), d_state = x.shape, B.shape[1]
    _expect_positive(I=channels, N=d_state)
    _expect("dt", dt, (batch, channels))
    _expect("A", A, (channels, d_state))
    _expect_each((batch, d_state), B=B, C=C)
    _expect_each((channels,), D=D, spectrum=spectrum)
    factor = _checked_factor(lift_gamma, "group", 1, d_state)
    _expect("state", state, (batch, 1, factor * d_state, channels))


def check_norm(x: Tensor, weight: Tensor | None, gate: Tensor | None, groups: int) -> None:
    """Raises `ValueError` on inputs that `pointwise.norm` cannot mean."""
    check_tensors(x=x, weight=weight, gate=gate)
    channels = x.shape[-1]
    _require(groups > 0 and channels % groups == 0, f"{groups} groups do not divide {channels} channels")
    if weight is not None:
        fits = weight.dim() == 1 and len(weight) in (channels, channels // groups)
        _require(fits, f"weight must be [{channels}] or [{channels // groups}], got {_shape(weight)}")
    if gate is not None:
        _expect("gate", gate, tuple(x.shape))


def check_residual_norm(x: Tensor, update: Tensor | None, weight: Tensor) -> None:
    """Raises `ValueError` on inputs that `pointwise.residual_norm` cannot mean."""
    check_tensors(x=x, update=update, weight=weight)
    _expect("weight", weight, (x.shape[-1],))
    _expect_each(tuple(x.shape), update=update)


def check_gated_product(gate: Tensor, up: Tensor) -> None:
    """Raises `ValueError` on inputs that `pointwise.gated_product` cannot mean."""
    check_tensors(gate=gate, up=up)
    _expect("gate", gate, tuple(up.shape))


def check_time_steps(x: Tensor, bias: Tensor) -> None:
    """Raises `ValueError` on inputs that `pointwise.time_steps` cannot mean."""
    check_tensors(x=x, bias=bias)
    _expect("bias", bias, (x.shape[-1],))


def check_convolution(
    x: Tensor, taps: Tensor, bias: Tensor | None, since_start: Tensor | None, sizes: tuple[int, ...] | None = None
) -> None:
    """Raises `ValueError` on inputs that `pointwise.short_convolution_parts` cannot mean."""
    check_tensors(x=x, taps=taps, bias=bias)
    check_device(x=x, since_start=since_start)
    _require(x.dim() == 3, f"x must be [B, T, channels], got {_shape(x)}")
    _, tokens, channels = x.shape
    _require(taps.dim() == 2 and len(taps) == channels, f"taps must be [{channels}, width], got {_shape(taps)}")
    _expect_each((channels,), bias=bias)
    _expect_each((tokens,), since_start=since_start)
    _require(sizes is None or sum(sizes) == channels, f"sizes must add up to {channels} channels, got {sizes}")


def check_convolution_step(x: Tensor, state: Tensor, taps: Tensor, bias: Tensor | None) -> None:
    """Raises `ValueError` on inputs that `pointwise.short_convolution_step` cannot mean."""
    _require(x.dim() == 2, f"x must be [B, channels], got {_shape(x)}")
    check_convolution(x[:, None], taps, bias, None)
    check_tensors(x=x, state=state)
    _expect("state", state, (*x.shape, taps.shape[1] - 1))
    _require(state.dtype == x.dtype, f"state is {state.dtype} and x {x.dtype}: the tokens it holds are of one dtype")


def check_low_rank(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> None:
    """Raises `ValueError` on inputs that `pointwise.low_rank_log_decay` cannot mean."""
    check_tensors(x=x, down=down, up=up, bias=bias)
    hidden = x.shape[-1]
    _require(down.dim() == 2 and down.shape[1] == hidden, f"down must be [rank, {hidden}], got {_shape(down)}")
    rank = len(down)
    _require(up.dim() == 2 and up.shape[1] == rank, f"up must be [channels, {rank}], got {_shape(up)}")
    _expect("bias", bias, (len(up),))


def check_tensors(**tensors: Tensor | None) -> None:
    """Raises `ValueError` unless all are of real floating point, and lie on one device."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a real floating-point dtype, got {tensor.dtype}")
    check_device(**tensors)


def check_device(**tensors: Tensor | None) -> None:
    """Raises `ValueError` unless all lie on one device: a kernel would read another device's addresses."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    (first, device), *others = devices.items()
    for name, other in others:
        if other != device:
            raise ValueError(f"{name} is on {other} and {first} on {device}: move them to one device")


def check_cu_seqlens(cu_seqlens: Tensor | None, batch: int, tokens: int) -> int:
    """Number of states: the batch, or the packed sequences. Raises `ValueError` unless borders rise from 0 to T in one row."""
    if cu_seqlens is None:
        return batch
    _require(isinstance(cu_seqlens, Tensor), f"cu_seqlens must be a tensor, got a {type(cu_seqlens).__name__}")
    _require(batch == 1, f"cu_seqlens packs sequences into one row, but the batch is {batch}: flatten it to [1, B*T, ...]")
    _require(
        cu_seqlens.dim() == 1 and len(cu_seqlens) >= 2 and not cu_seqlens.is_floating_point(),
        f"cu_seqlens must be a vector of at least two integers, got {_shape(cu_seqlens)} of {cu_seqlens.dtype}",
    )
    if _readable(cu_seqlens):
        borders = cu_seqlens.tolist()
        whole = borders[0] == 0 and borders[-1] == tokens
        _require(whole, f"cu_seqlens must run from 0 to T = {tokens}, got {borders[0]} to {borders[-1]}")
        _require(borders == sorted(borders), "cu_seqlens must not fall")
    return len(cu_seqlens) - 1


def _check_mixing(mixing: Tensor, heads: int, key_dim: int, value_dim: int) -> None:
    _require(mixing.dim() == 3, f"mixing must be [H, f, f] or [H, K, f], got {_shape(mixing)}")
    blocks = mixing.shape[-1]
    _expect_positive(f=blocks)
    fits = mixing.shape[0] == heads and mixing.shape[1] in (blocks, key_dim)
    _require(fits, f"mixing must be [{heads}, {blocks}, {blocks}] or [{heads}, {key_dim}, {blocks}], got {_shape(mixing)}")
    divides = key_dim % blocks == 0 and value_dim % blocks == 0
    _require(divides, f"mixing has {blocks} blocks, which do not divide K = {key_dim} and V = {value_dim}")


def _checked_factor(lift_gamma: Tensor | None, rows_name: str, rows: int, key_dim: int) -> int:
    if lift_gamma is None:
        return 1
    fits = lift_gamma.dim() == 2 and lift_gamma.shape[0] == rows and lift_gamma.shape[1] > 0 and lift_gamma.shape[1] % key_dim == 0
    _require(fits, f"lift_gamma must be [{rows} {rows_name}, a multiple of {key_dim}], got {_shape(lift_gamma)}")
    return 1 + lift_gamma.shape[1] // key_dim


def _check_spectrum(spectrum: Tensor | None, shape: tuple[int, ...]) -> None:
    if spectrum is not None:
        _expect("spectrum", spectrum, shape)
        within = not _readable(spectrum) or bool((spectrum.abs() <= 1).all())
        _require(within, "spectrum must lie in [-1, 1]: beyond, states would grow for ever")


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    _require(tuple(tensor.shape) == shape, f"{name} must be {list(shape)}, got {_shape(tensor)}")


def _expect_each(shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Each that is given has this shape."""
    for name, tensor in tensors.items():
        if tensor is not None:
            _expect(name, tensor, shape)


def _expect_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size == 0:
            raise ValueError(f"sizes must be positive, got {name} = 0")


def _expect_axes(axes: str, **tensors: Tensor) -> None:
    """Each has as many dimensions as `axes`, for example `[B, T, D]`, names."""
    for name, tensor in tensors.items():
        _require(tensor.dim() == axes.count(",") + 1, f"{name} must be {axes}, got {_shape(tensor)}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
