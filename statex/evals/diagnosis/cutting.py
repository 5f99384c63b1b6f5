"""Cut the long memory of a layer, or of one head, while the rest of the model stays as it is.

A cut mixer computes every token from the last few tokens alone: its input is laid out in overlapping windows of 2·w tokens, each
run from an empty state, and the second half of each window's outputs is kept. A token then sees itself and w to 2w - 1 tokens
before it: short convolutions and local memory are whole, and nothing older reaches it. This needs nothing of a family but the
    mixer's interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...families.description import LayerDescription
from ...models.cache import LayerState
from ...models.components import Mixer, TokenLayout

Compute = Callable[[Tensor, TokenLayout], Tensor]
"""`[B, T, hidden]` and the layout of its tokens -> `[B, T, channels]`."""


@contextmanager
def cut_layer(mixer: Mixer, window: int) -> Iterator[None]:
    """While open, the mixer reads only `window` to 2·window - 1 tokens back. It then takes no cache and no packed rows."""
    whole = mixer.forward

    def cut(x: Tensor, layout: TokenLayout, state: LayerState | None = None, **more: Any) -> Tensor:
        _require_plain(layout, state)
        return windowed(lambda x, layout: whole(x, layout, None, **more), x, window)

    with _replaced_forward(mixer, cut):
        yield


@contextmanager
def cut_layers(mixers: list[Mixer], window: int) -> Iterator[None]:
    """`cut_layer` for several mixers at once."""
    with ExitStack() as stack:
        for mixer in mixers:
            stack.enter_context(cut_layer(mixer, window))
        yield


class HeadCuts:
    """One layer's heads cut in turn, on the same rows each time, at the cost of the layers behind it only.

    `recording` is open while the rows are run once; then each `cut` answers the same calls, in the same order, from what was
    recorded: the layer's input, and what its output projection reads from the whole and from the cut memory.
    """

    def __init__(self, blocks: Sequence[nn.Module], index: int, projection: nn.Linear, window: int) -> None:
        mixer = blocks[index].mixer
        assert isinstance(mixer, Mixer)
        self.before, self.block, self.mixer = blocks[:index], blocks[index], mixer
        self.projection, self.window = projection, window
        self._calls: list[tuple[Tensor, Tensor, Tensor]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what a cut needs of every call that is made while this is open. The model gives what it gives."""
        through, whole = self.block.forward, self.mixer.forward
        hidden: list[Tensor] = []

        def mix(x: Tensor, layout: TokenLayout, state: LayerState | None = None, **more: Any) -> Tensor:
            def before_projection(x: Tensor, layout: TokenLayout) -> Tensor:
                seen: list[Tensor] = []
                with _hooked(self.projection, seen):
                    whole(x, layout, None, **more)
                return seen[-1]

            _require_plain(layout, state)
            read = before_projection(x, layout)
            self._calls.append((hidden.pop(), read, windowed(before_projection, x, self.window)))
            return cast(Tensor, self.projection(read))

        def pass_through(hidden_states: Tensor, *rest: Any, **options: Any) -> Tensor:
            hidden.append(hidden_states)
            return cast(Tensor, through(hidden_states, *rest, **options))

        with _replaced_forward(self.mixer, mix), _replaced_forward(self.block, pass_through):
            yield

    @contextmanager
    def cut(self, channels: slice) -> Iterator[None]:
        """While open, these channels of the output projection's input, those of one head, come from the cut memory."""
        through, calls = self.block.forward, iter(self._calls)
        current: list[tuple[Tensor, Tensor]] = []

        def mix(x: Tensor, layout: TokenLayout, state: LayerState | None = None, **more: Any) -> Tensor:
            whole, short = current.pop()
            read = whole.clone()
            read[..., channels] = short[..., channels]
            return cast(Tensor, self.projection(read))

        def replay(hidden_states: Tensor, *rest: Any, **options: Any) -> Tensor:
            hidden_states, *reads = next(calls)
            current.append((reads[0], reads[1]))
            return cast(Tensor, through(hidden_states, *rest, **options))

        with ExitStack() as stack:
            for block in self.before:
                stack.enter_context(_replaced_forward(block, lambda hidden_states, *rest, **options: hidden_states))
            stack.enter_context(_replaced_forward(self.mixer, mix))
            stack.enter_context(_replaced_forward(self.block, replay))
            yield


def windowed(compute: Compute, x: Tensor, window: int) -> Tensor:
    """`compute` on `x` `[B, T, hidden]` with every token seeing `window` to 2·window - 1 tokens back -> `[B, T, channels]`."""
    batch, tokens, _ = x.shape
    if tokens <= window:
        return compute(x, TokenLayout())
    blocks = -(-tokens // window)
    padded = F.pad(x, (0, 0, window, blocks * window - tokens))
    windows = padded.unfold(1, 2 * window, window).transpose(2, 3).flatten(0, 1)
    mask = torch.ones(batch, blocks, 2 * window, dtype=torch.bool, device=x.device)
    mask[:, 0, :window] = False
    outputs = compute(windows, TokenLayout(mask.flatten(0, 1)))[:, window:]
    return outputs.reshape(batch, blocks * window, -1)[:, :tokens]


@torch.no_grad()
def output_projection(mixer: Mixer, hidden_size: int) -> nn.Linear:
    """The linear module that a mixer calls last: its input still holds the heads side by side."""
    called: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: called.append(module))
        for module in mixer.modules()
        if isinstance(module, nn.Linear)
    ]
    weight = next(mixer.parameters())
    try:
        mixer.forward(torch.zeros(1, 1, hidden_size, dtype=_activations(mixer), device=weight.device), TokenLayout(), None)
    finally:
        for handle in handles:
            handle.remove()
    return cast(nn.Linear, called[-1])


def head_channels(layer: LayerDescription, projection: nn.Linear) -> list[slice]:
    """The channels of each head in the output projection's input; of a merged head, those of each source head.

    None where channels are no heads: one number each (a diagonal state), or not a whole number of heads.
    """
    size = layer.value_dim // layer.blocks
    if size < 2 or projection.in_features % size:
        return []
    return [slice(start, start + size) for start in range(0, projection.in_features, size)]


def _activations(mixer: Mixer) -> torch.dtype:
    """The dtype that the mixer computes in: that of its projections (decays may be kept in fp32)."""
    return next(module.weight.dtype for module in mixer.modules() if isinstance(module, nn.Linear))


def _require_plain(layout: TokenLayout, state: LayerState | None) -> None:
    if state is not None or layout.padded is not None or layout.cu_seqlens is not None:
        raise AssertionError("a cut mixer takes whole rows from an empty state, without padding, packing or a cache")


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _hooked(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield
    finally:
        handle.remove()
