"""Tensors that are known by shape and dtype and read only when written: what lets a plan run dry and a checkpoint stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Status = Literal["rest", "expanded", "new"]
"""`new`: the source has no tensor of this name. `expanded`: the source has it, and surgery grew, repeated or redrew its values.
`rest`: every value is the source's, in the source's order or permuted. Recipes give each its own learning rate."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor's shape, dtype and provenance, with the function that makes its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    status: Status = "rest"

    def load(self) -> Tensor:
        """The values; nothing is kept, so every call makes them again.

        Raises:
            AssertionError: an operator promised another shape or dtype than it made.
        """
        tensor = self.make()
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise AssertionError(f"promised {self.dtype} {list(self.shape)}, made {tensor.dtype} {list(tensor.shape)}")
        return tensor

    def then(
        self, change: Callable[[Tensor], Tensor], *, shape: tuple[int, ...] | None = None, status: Status = "expanded"
    ) -> LazyTensor:
        """This tensor with `change` applied after loading.

        A permutation (`status="rest"`) of a tensor that an earlier operator expanded leaves it expanded.
        """
        kept = self.status if status == "rest" or self.status == "new" else status
        return LazyTensor(self.shape if shape is None else shape, self.dtype, lambda: change(self.load()), kept)

    def replaced(self, make: Callable[[], Tensor], shape: tuple[int, ...]) -> LazyTensor:
        """A tensor of the same name and dtype with values that owe nothing to these, which are not read."""
        return LazyTensor(shape, self.dtype, make, "new" if self.status == "new" else "expanded")

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size as stored."""
        return self.elements * self.dtype.itemsize
