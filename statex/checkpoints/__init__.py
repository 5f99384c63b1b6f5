"""Checkpoint files: lazy reading in every dialect, atomic sharded writing, inspection, native export. No torch at import."""

from __future__ import annotations

from .inspection import Inspection, inspect_checkpoint
from .native_export import export_native
from .reader import Checkpoint, canonical_config, open_checkpoint
from .tensor_info import TensorInfo
from .writer import CheckpointWriter, OutputFolder

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Inspection",
    "OutputFolder",
    "TensorInfo",
    "canonical_config",
    "export_native",
    "inspect_checkpoint",
    "open_checkpoint",
]
