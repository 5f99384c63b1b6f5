"""Calls without a sequence or without a token, which no backend has to know."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_result(
    inputs: tuple[Tensor | None, ...],
    shape: tuple[int, ...],
    state_shape: tuple[int, ...],
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """An output without elements, and the states as they were.

    Args:
        inputs: all but the states; the output has the first one's dtype.
        shape: of the output.
        state_shape: of the states.
        initial_state: zeros where None.
        output_final_state: None stands for the states without it.
    """
    first = inputs[0]
    assert first is not None
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    # Sums over no elements: a zero that gives every input a gradient of zeros, whatever its values.
    nothing = sum(x[:0].sum() for x in (*inputs, initial_state) if x is not None)
    state = first.new_zeros(state_shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    return first.new_zeros(shape) + nothing, state + nothing if output_final_state else None
