"""Draw a tensor by the `Init` that its family declares. Importing this file does not import torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from .base import Init, Shape
from .description import ModelDescription

if TYPE_CHECKING:
    import torch

_Args = dict[str, float]


def keyed_generator(seed: int, name: str, purpose: str = "") -> torch.Generator:
    """A CPU generator for one tensor: the same whatever the shard order, the threads or the other layers do.

    Args:
        seed: of the plan, or of the model.
        name: full canonical tensor name.
        purpose: tells apart several draws into one tensor, such as the row ranges of two successive widenings: with one key for
            both, the second would draw the first one's rows again, and equal rows never part.
    """
    import torch

    digest = hashlib.sha256(f"{seed}\n{name}\n{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw(init: Init, shape: Shape, *, model: ModelDescription, generator: torch.Generator | None = None) -> torch.Tensor:
    """A fresh fp32 tensor.

    Kinds: `zeros`; `ones`; `normal` (std); `xavier_uniform` (gain); `kaiming_uniform` (a; with depth_power p scaled by layers^p);
    `mamba_A_log`: log of a uniform draw from [low, high]; `mamba_dt_bias`: softplus of it is log-uniform between the model's
    time_step_min and time_step_max, not under time_step_floor; `s4d_real`: log of 1, 2, ... along the last dimension;
    `identity`: a mixing matrix, `[heads, rows, blocks, ...]`, that lets value block j use the rows of key block j only.

    Raises:
        ValueError: unknown kind.
    """
    import torch

    if init.kind not in _KINDS:
        raise ValueError(f"unknown init {init.kind!r}; known: {', '.join(_KINDS)}")
    tensor = torch.empty(shape, dtype=torch.float32)
    with torch.no_grad():
        _KINDS[init.kind](tensor, dict(init.args), model, generator)
    return tensor


def _zeros(tensor: torch.Tensor, args: _Args, model: ModelDescription, generator: torch.Generator | None) -> None:
    tensor.zero_()


def _ones(tensor: torch.Tensor, args: _Args, model: ModelDescription, generator: torch.Generator | None) -> None:
    tensor.fill_(1.0)


def _normal(tensor: torch.Tensor, args: _Args, model: ModelDescription, generator: torch.Generator | None) -> None:
    tensor.normal_(0.0, args["std"], generator=generator)


def _xavier_uniform(tensor: torch.Tensor, args: _Args, model: ModelDescription, generator: torch.Generator | None) -> None:
    fan_in, fan_out = math.prod(tensor.shape[1:]), tensor.shape[0] * math.prod(tensor.shape[2:])
    bound = args["gain"] * math.sqrt(6 / (fan_in + fan_out))
    tensor.uniform_(-bound, bound, generator=generator)


def _kaiming_uniform(tensor: torch.Tensor, args: _Args, model: ModelDescription, generator: torch.Generator | None) -> None:
    fan_in = math.prod(tensor.shape[1:])
    bound = math.sqrt(6 / ((1 + args["a"] ** 2) * fan_in)) * len(model.layers) ** args.get("depth_power", 0.0)
    tensor.uniform_(-bound, bound, generator=generator)


def _mamba_a_log(tensor: torch.Tensor, args: _Args, model: ModelDescription, generator: torch.Generator | None) -> None:
    tensor.uniform_(args["low"], args["high"], generator=generator).log_()


def _mamba_dt_bias(tensor: torch.Tensor, args: _Args, model: ModelDescription, generator: torch.Generator | None) -> None:
    low, high, floor = (model.mixer[key] for key in ("time_step_min", "time_step_max", "time_step_floor"))
    step = tensor.uniform_(math.log(low), math.log(high), generator=generator).exp_().clamp_(min=floor)
    # The inverse of softplus: log(exp(step) - 1), written so that small steps keep their digits.
    step.add_(step.neg().expm1().neg().log())


def _s4d_real(tensor: torch.Tensor, args: _Args, model: ModelDescription, generator: torch.Generator | None) -> None:
    import torch

    tensor.copy_(torch.arange(1, tensor.shape[-1] + 1).log())


def _identity(tensor: torch.Tensor, args: _Args, model: ModelDescription, generator: torch.Generator | None) -> None:
    rows, blocks = tensor.shape[1:3]
    tensor.zero_()
    for block in range(blocks):
        tensor[:, block * rows // blocks : (block + 1) * rows // blocks, block] = 1.0


_KINDS: dict[str, Callable[[torch.Tensor, _Args, ModelDescription, torch.Generator | None], None]] = {
    "zeros": _zeros,
    "ones": _ones,
    "normal": _normal,
    "xavier_uniform": _xavier_uniform,
    "kaiming_uniform": _kaiming_uniform,
    "mamba_A_log": _mamba_a_log,
    "mamba_dt_bias": _mamba_dt_bias,
    "s4d_real": _s4d_real,
    "identity": _identity,
}
