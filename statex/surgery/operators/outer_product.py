"""outer_product: HGRN's vector state becomes HGRN2's matrices, heads of n channels, with no new parameters or one a channel
(docs/surgery.md, "outer_product").

Inherit and reinit make layers of HGRN2 (arXiv 2404.07904); preserve, which keeps the vector's reading and adds the matrix's, is
this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...families.description import LayerDescription
from ..lazy import LazyTensor
from ..operator import Context, Operator, Options, Tensors, require_factor

GAIN = "mixer.outer_gain"
GATE, QUERY = "mixer.g_proj.weight", "mixer.q_proj.weight"
CONV, CONV_BIAS = "mixer.{}_conv1d.weight", "mixer.{}_conv1d.bias"
LARGEST_DEFAULT = 128
"""Channels of a head that fla's HGRN2 has when its config does not say."""


@dataclass(frozen=True)
class OuterProductOptions(Options):
    """Options of outer_product."""

    factor: int | None = field(
        default=None,
        metadata={"help": "channels n of a head, whose state is n × n; when left out 128, or the most up to it that divides"},
    )


def default_factor(layer: LayerDescription) -> int:
    """The largest divisor of the channels up to `LARGEST_DEFAULT`."""
    return max(n for n in range(1, LARGEST_DEFAULT + 1) if layer.value_heads % n == 0)


def check(layer: LayerDescription, options: OuterProductOptions, context: Context) -> None:
    """Raise `PlanError` where the layer cannot be expanded as asked."""
    if layer.outer is not None:
        raise context.error(
            f"its state is {layer.key_dim} × {layer.value_dim} a head already",
            "expand the unexpanded checkpoint by a larger factor, or use lift_keys",
        )
    factor, channels = require_factor(options, context), layer.value_heads
    if channels % factor:
        powers = [str(2**power) for power in range(1, 8) if channels % 2**power == 0]
        fix = f"use {' or '.join(powers)}" if powers else f"use a divisor of {channels}"
        raise context.error(f"heads of {factor} channels do not divide its {channels} channels", fix)
    if options.init != "preserve" and channels != context.model.hidden_size:
        raise context.error(
            f"its {channels} channels are not hidden_size ({context.model.hidden_size}) many, and `{options.init}` makes a layer of"
            " HGRN2, which has no expand_ratio for its width",
            "use preserve",
        )


def apply(
    layer: LayerDescription, tensors: Tensors, options: OuterProductOptions, context: Context
) -> tuple[LayerDescription, dict[str, LazyTensor]]:
    """Group `factor` consecutive channels into a head. Its state's diagonal is the vector that HGRN keeps."""
    width, channels = require_factor(options, context), layer.value_heads
    heads = channels // width
    outer = layer.replace(query_heads=heads, key_heads=heads, value_heads=heads, key_dim=width, value_dim=width, scale=width**-0.5)
    result = dict(tensors)
    if options.init == "preserve":
        result[GAIN] = LazyTensor((channels,), torch.float32, lambda: torch.zeros(channels), status="new")
        return outer.replace(outer="added"), result
    gate = result.pop(GATE)
    if options.init == "inherit":
        result[QUERY] = gate
    else:
        result[QUERY] = context.fresh(QUERY, gate, gate.shape)
    for name, fill in ((CONV, _last_tap), (CONV_BIAS, torch.zeros_like)):
        alike = result.get(name.format("f"))
        if alike is not None:  # HGRN's gate has no convolution
            result[name.format("q")] = _query_convolution(name.format("q"), alike, fill, options, context)
    return outer.replace(outer="alone"), result


def _query_convolution(
    name: str, alike: LazyTensor, fill: Callable[[Tensor], Tensor], options: OuterProductOptions, context: Context
) -> LazyTensor:
    """The query's convolution, of the shape and dtype of the forget gate's: it passes its input on, or is drawn."""

    def make() -> Tensor:
        if options.init == "reinit":
            return context.draw(name, alike.shape).to(alike.dtype)
        return fill(torch.empty(alike.shape, dtype=alike.dtype))

    return LazyTensor(alike.shape, alike.dtype, make, status="new")


def _last_tap(kernel: Tensor) -> Tensor:
    kernel = torch.zeros_like(kernel)
    kernel[..., -1] = 1
    return kernel


OPERATOR = Operator(
    name="outer_product",
    summary="turns a vector state into matrices, heads of n channels, so that the state is n times as large",
    stage=10,
    options=OuterProductOptions,
    default_factor=default_factor,
    default_layers="all",
    check=check,
    apply=apply,
)
