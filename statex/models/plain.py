"""Modules that do what their class says and nothing else, so that a kernel may compute them in their stead."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn


def plain_layers(sequence: nn.Module) -> list[nn.Linear]:
    """The layers of a plain sequence of plain linear layers, for what computes it otherwise; none of any other module."""
    layers = list(sequence.children()) if type(sequence) is nn.Sequential and _is_called_alone(sequence) else []
    plain = [layer for layer in layers if is_plain_linear(layer)]
    return plain if len(plain) == len(layers) else []


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling it is a product with its weight and its bias, whole and as they are: no adapter, hook or quantised layer."""
    if type(layer) is not nn.Linear or not _is_called_alone(layer):
        return False
    tensors = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    return all(type(x) in (Tensor, nn.Parameter) for x in tensors) and layer.weight.shape == (layer.out_features, layer.in_features)


def _is_called_alone(module: nn.Module) -> bool:
    """Whether nothing sees its call, or answers it, but its class: no hook, and no `forward` set from outside."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)
