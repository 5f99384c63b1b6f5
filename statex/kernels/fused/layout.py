"""What the recurrences choose alike: chunks, segments, tiles, operand types, devices; and padding to whole blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

BLOCK = 64
CHUNKS = (64, 256)
"""Shortest and longest chunk."""

SEGMENT_BYTES = 768 << 20
"""Scratch of one segment. Segments follow one another; between them float32 states and scores of token pairs are kept."""

SEGMENT_TOKENS = 1 << 15
"""Longest segment: offsets inside a segment stay below 2^31."""

FORGET = -300.0
"""Nats in front of the first token of a packed sequence: exp(-300) is 0 in float32, so nothing crosses the border."""

TILES_WANTED = 100
"""Fewer tiles of the state than this leave a large GPU idle; then tiles are made smaller."""


@dataclass(frozen=True)
class Operands:
    """How matrix products are made: the dtype of scratch operands, and Triton's `input_precision` for float32 ones."""

    dtype: torch.dtype
    precision: str


@dataclass(frozen=True)
class Launch:
    """Tile of the result that a program makes, and Triton's warps and pipeline stages."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    registers: int | None = None
    """Most registers of a thread, where fewer let more programs run side by side."""

    def options(self, rows: int, columns: int) -> dict[str, int]:
        """Triton's options for the tile in use: fewer warps where it is smaller than wanted."""
        warps = self.num_warps if rows * columns >= self.rows * self.columns else min(self.num_warps, 4)
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": warps, "num_stages": self.num_stages, **limit}


LAUNCHES = {
    "carry": Launch(128, 128, 8, 4),
    "carry by head": Launch(128, 64, 4, 3),
    "read": Launch(128, 256, 8, 3),
    "read by head": Launch(64, 64, 4, 3),
    "project": Launch(128, 256, 8, 3),
    "pairs": Launch(64, 64, 4, 3),
    "block gradients": Launch(64, 64, 4, 3),
    "pair gradients": Launch(64, 64, 4, 3),
    "scores": Launch(64, 64, 4, 2),
    "rows": Launch(64, 64, 4, 2, 128),
    "mixed rows": Launch(64, 64, 4, 2, 168),
    "lifted rows": Launch(64, 32, 4, 2, 168),
    "row gradients": Launch(64, 64, 4, 2),
    "decay gradients": Launch(64, 64, 4, 2),
}
"""For bfloat16. Nothing is tuned at run time, so that the first step comes soon. Compilers have been wrong at single tile sizes:
`pytest -m gpu tests/kernels/test_cuda.py` compares all of these with float64 at the sizes of released models."""

SHARED_MEMORY = 160 << 10
"""Bytes of shared memory that a program may need: what `carry` takes backward in time, compiled for an H100 by Triton 3.6."""

PROGRAMS = 65_535
"""Programs along the last dimension of a CUDA grid."""


def on_own_device(function: Callable[P, R]) -> Callable[P, R]:
    """`function` on the device of its first argument, a tensor: Triton launches on the current device, wherever tensors lie."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # compiled code sees to it
            return function(*args, **options)
        with torch.cuda.device_of(args[0]):
            return function(*args, **options)

    return call


def launch_of(name: str, how: Operands) -> Launch:
    """The launch of a kernel; float32 operands take twice the shared memory, and get tiles half as long and wide."""
    launch = LAUNCHES[name]
    if how.dtype != torch.float32:
        return launch
    rows, columns = (max(min(size, BLOCK), size // 2) for size in (launch.rows, launch.columns))
    return Launch(rows, columns, 4, 2)


def require_grid(programs: int) -> None:
    """Raises `ValueError` where batch, heads and readers are more than one launch can hold."""
    if programs > PROGRAMS:
        raise ValueError(f"batch, heads and readers make {programs:,} programs, and CUDA allows {PROGRAMS:,}: split the batch")


def operands(*tensors: Tensor) -> Operands:
    """bfloat16 inputs are multiplied as they are; float16 ones in TF32, whose mantissa is as long; others near float32."""
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes == {torch.bfloat16}:
        return Operands(torch.bfloat16, "tf32")
    if dtypes <= {torch.float16, torch.bfloat16}:
        return Operands(torch.float32, "tf32")
    return Operands(torch.float32, "tf32x3")


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow a call with these inputs, so that what it needs is kept."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, made for kernels, takes microseconds outside of them, with every launch."""
    return -(-a // b)


def power_of_2(size: int) -> int:
    """The smallest power of 2 that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def pad_to(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return ceil_div(size, multiple) * multiple


def padded(x: Tensor, dim: int, size: int) -> Tensor:
    """`x` with zeros appended along `dim`, or `x` itself where it is long enough."""
    missing = size - x.shape[dim]
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x


def padded_parts(x: Tensor, parts: int, width: int) -> Tensor:
    """The last dimension as `parts` pieces, each with zeros appended up to `width`."""
    if x.shape[-1] == parts * width:
        return x
    return padded(x.unflatten(-1, (parts, -1)), x.dim(), width).flatten(-2)


def without_padding(x: Tensor, parts: int, width: int) -> Tensor:
    """The last dimension's pieces cut back to `width` channels each; inverse of `padded_parts`."""
    if x.shape[-1] == parts * width:
        return x
    return x.unflatten(-1, (parts, -1))[..., :width].flatten(-2)


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def chunk_length(tokens: int, key_dim: int, value_dim: int, wide: bool) -> int:
    """Tokens in a chunk: K·V / (K + V); with fewer the traffic of states grows faster than the work inside chunks shrinks. float32
    states weigh twice."""
    balanced = key_dim * value_dim // (key_dim + value_dim) * (2 if wide else 1)
    length = min(max(1 << max(balanced - 1, 0).bit_length(), CHUNKS[0]), CHUNKS[1])
    while length > CHUNKS[0] and length // 2 >= tokens:
        length //= 2
    return length


def segments(tokens: int, chunk: int, bytes_per_token: int) -> list[tuple[int, int]]:
    """Borders of runs of whole chunks whose scratch fits."""
    longest = max(chunk, min(SEGMENT_BYTES // bytes_per_token, SEGMENT_TOKENS) // chunk * chunk)
    count = ceil_div(tokens, longest)
    length = pad_to(ceil_div(tokens, count), chunk)
    return list(_ranges(tokens, length))


def _ranges(tokens: int, length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, tokens, length):
        yield start, min(start + length, tokens)


def tile(size: int, *wanted: int) -> int:
    """The first of `wanted` that divides `size`."""
    return next(width for width in wanted if size % width == 0)


def state_tiles(launch: Launch, key_dim: int, value_dim: int, states: int, width: int) -> tuple[int, int]:
    """Tile of the state that a program carries, of columns that divide `width`: as large as keeps the device busy."""
    bk, bv = tile(key_dim, launch.rows, 128, 64), tile(width, launch.columns, 128, 64, 32)
    while key_dim // bk * (value_dim // bv) * states < TILES_WANTED and max(bk, bv) > 64:
        bk, bv = (bk, bv // 2) if bv > 64 else (bk // 2, bv)
    return bk, bv


def forget_at_borders(log_decay: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Log-decays `[1, T, ...]` with FORGET at the first token of every packed sequence but the first; no gradient goes there."""
    if cu_seqlens is None:
        return log_decay
    tokens = log_decay.shape[1]
    # Borders at T belong to empty sequences at the end: one slot more takes them.
    first = torch.zeros(tokens + 1, dtype=torch.bool, device=log_decay.device)
    first.index_fill_(0, cu_seqlens.to(log_decay.device, torch.int64), True)  # an assignment would make the host wait
    return log_decay.masked_fill(first[:tokens].view(1, -1, *[1] * (log_decay.dim() - 2)), FORGET)
