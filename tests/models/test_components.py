"""The short convolution and its state: tokens read one by one, whatever the mode, are the tokens read at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from statex.models.cache import LayerState
from statex.models.components import ShortConvolution, TokenLayout

TOKENS, CHANNELS = 6, 10


def convolution_and_rows() -> tuple[ShortConvolution, Tensor]:
    layer = ShortConvolution(CHANNELS, 4, bias=True)
    torch.nn.init.normal_(layer.bias)
    return layer, torch.randn(2, TOKENS, CHANNELS, requires_grad=True)


def one_by_one(layer: ShortConvolution, x: Tensor, state: LayerState) -> Tensor:
    return torch.cat([layer(token, TokenLayout(), state) for token in x.split(1, 1)], 1)


def test_tokens_one_by_one_have_the_gradients_of_all_at_once() -> None:
    layer, x = convolution_and_rows()
    weights = torch.randn(2, TOKENS, CHANNELS)
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad((layer(x, TokenLayout()) * weights).sum(), leaves)
    found = torch.autograd.grad((one_by_one(layer, x, LayerState()) * weights).sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_without_gradients_a_token_moves_the_state_on_in_place() -> None:
    layer, x = convolution_and_rows()
    state = LayerState()
    first = layer(x[:, :1], TokenLayout(), state)
    place = state.conv["conv"].data_ptr()
    rest = one_by_one(layer, x[:, 1:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), layer(x, TokenLayout()))
    assert state.conv["conv"].data_ptr() == place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_a_state_of_another_dtype_is_read_in_that_of_the_token(dtype: torch.dtype) -> None:
    layer, x = convolution_and_rows()
    x = x.bfloat16().float()  # so that no dtype rounds it
    state = LayerState()
    layer(x[:, :-1], TokenLayout(), state)
    state.map(lambda held: held.to(dtype))
    torch.testing.assert_close(layer(x[:, -1:], TokenLayout(), state), layer(x, TokenLayout())[:, -1:])
    assert state.conv["conv"].dtype == x.dtype
