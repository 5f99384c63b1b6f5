"""Write `pytorch_model.bin`, the only weight file that mamba_ssm itself reads, without holding a model in memory."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .tensor_info import TensorInfo
from .weights import BIN
from .writer import OutputFolder, tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT = 64


def write_bin(
    output: OutputFolder, tensors: Mapping[str, TensorInfo], load: Callable[[str], Tensor], aliases: Mapping[str, str]
) -> None:
    """Write all tensors into one file.

    torch.save wants them all at once, so each is written to a scratch file first and handed over as a mapped range of it.

    Args:
        tensors: shape and dtype by name. load: name -> values.
        aliases: further names for tensors; they share storage, as tied weights do in the files of state-spaces.
    Raises:
        CheckpointError: the disk is full or gone.
    """
    import torch

    scratch = output.folder / f"{BIN}.scratch"
    with output.errors():
        places = _fill(scratch, tensors, load)
        with scratch.open("rb") as file:
            region = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped = {
            name: torch.frombuffer(region, dtype=info.torch_dtype, count=info.numel, offset=places[name]).reshape(info.shape)
            for name, info in tensors.items()
        }
        try:
            torch.save(mapped | {alias: mapped[name] for alias, name in aliases.items()}, output.folder / BIN)
        except RuntimeError as error:
            # torch's zip writer reports a failed write in its own words, the disk's being full among them.
            if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
                raise
            raise OSError(errno.ENOSPC, str(error)) from error
        scratch.unlink()


def _fill(path: Path, tensors: Mapping[str, TensorInfo], load: Callable[[str], Tensor]) -> dict[str, int]:
    """Write the values of all tensors one behind the other; returns where each begins."""
    places: dict[str, int] = {}
    with path.open("wb") as file:
        for name in tensors:
            places[name] = file.tell()
            file.write(tensor_bytes(load(name)))
            file.write(bytes(-file.tell() % _ALIGNMENT))
    return places
