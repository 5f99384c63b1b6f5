"""A tensor's shape and dtype, known without reading it and without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CODES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""safetensors' dtype codes and torch's names for them."""

SIZES = {name: int("".join(filter(str.isdigit, code.split("_")[0])) or 8) // 8 for code, name in CODES.items()}
"""Bytes of one element."""

CODE_OF = {name: code for code, name in CODES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype; `dtype` is torch's name (`bfloat16`), and a torch.dtype is taken for its name."""

    shape: tuple[int, ...]
    dtype: str

    def __init__(self, shape: Any, dtype: Any) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in shape))
        object.__setattr__(self, "dtype", str(dtype).removeprefix("torch."))

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size as stored."""
        return self.numel * SIZES[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
