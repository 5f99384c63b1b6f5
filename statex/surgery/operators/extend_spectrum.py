"""extend_spectrum: the eigenvalues of a step reach below 0, so that a state can flip (docs/surgery.md, "extend_spectrum").

Inherit and reinit have the form of arXiv 2411.12537, eigenvalues in [-1, 1]; preserve, which learns how far they reach, is this
project's. The state keeps its size. What a mixer does with the description is its own: a decay a becomes (1+s)·a - s, a step of the
delta rule r·β.
"""

from __future__ import annotations

import torch

from ...families.description import LayerDescription
from ..lazy import LazyTensor
from ..operator import Context, Operator, Options, Tensors

RHO = "mixer.spectrum_rho"
EIGENVALUES: dict[str, tuple[str, ...]] = {
    "gla": ("mixer.gk_proj.0.weight", "mixer.gk_proj.1.weight", "mixer.gk_proj.1.bias"),
    "mamba2": ("mixer.A_log", "mixer.dt_bias"),
    "mamba": ("mixer.A_log", "mixer.dt_proj.weight", "mixer.dt_proj.bias"),
    "hgrn2": ("mixer.f_proj.weight",),
    "delta_net": ("mixer.b_proj.weight",),
    "gated_deltanet": ("mixer.b_proj.weight",),
}
"""The tensors that set the eigenvalues, which reinit draws afresh. A family is a line here, a `RHO` among its tensors, and a mixer
that reads `LayerDescription.spectrum`."""


def check(layer: LayerDescription, options: Options, context: Context) -> None:
    """Raise `PlanError` where the layer's spectrum cannot be extended as asked."""
    if options.factor not in (None, 1):
        raise context.error(
            f"extend_spectrum leaves the state's size alone, and factor {options.factor} asks to change it", "leave the factor out"
        )
    if layer.spectrum is not None:
        reach = "to -1" if layer.spectrum == "fixed" else "as far below 0 as it learns to"
        raise context.error(f"its spectrum is extended already, {reach}", "leave this layer out")


def apply(
    layer: LayerDescription, tensors: Tensors, options: Options, context: Context
) -> tuple[LayerDescription, dict[str, LazyTensor]]:
    """Extend the spectrum: to -1 for good, or (preserve) by as much as a new number ρ, 0 at first, comes to say."""
    if options.init == "preserve":
        extended = layer.replace(spectrum="learned")
        shape = context.spec(RHO).shape(context.model, extended)
        return extended, dict(tensors) | {RHO: LazyTensor(shape, torch.float32, lambda: torch.zeros(shape), status="new")}
    result = dict(tensors)
    if options.init == "reinit":
        present = [name for name in EIGENVALUES[context.family.name] if name in tensors]
        result |= {name: context.fresh(name, tensors[name], tensors[name].shape) for name in present}
    return layer.replace(spectrum="fixed"), result


OPERATOR = Operator(
    name="extend_spectrum",
    summary="lets eigenvalues reach below 0, so that a state can flip and count; its size stays",
    stage=40,
    options=Options,
    default_factor=lambda layer: 1,
    default_layers="all",
    check=check,
    apply=apply,
)
