"""What the tests of surgery share: small checkpoints, a quiet `expand`, logits and gradients of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import statex
from statex.checkpoints import open_checkpoint
from statex.checkpoints.dialects import default_dialect
from statex.surgery import ExpansionSummary, expand_checkpoint
from tests.fixtures import WRITERS

TOKENS = 24

MERGE = {"operator": "merge_heads", "layers": "all"}
WIDEN = {"operator": "widen_state", "layers": "all"}
LIFT = {"operator": "lift_keys", "layers": "all", "factor": 2}

GLA_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two kv heads": {"num_kv_heads": 2},
    "four of eight kv heads, short conv": {"num_heads": 8, "num_kv_heads": 4, "expand_k": 1.0, "use_short_conv": True},
    "two kv heads, short conv with bias": {"num_kv_heads": 2, "use_short_conv": True, "conv_bias": True},
    "unfused norm": {"fuse_norm": False},
    "no gate, no norm weight": {"use_output_gate": False, "elementwise_affine": False},
    "clamped decay, feature map, tied": {"clamp_min": -0.1, "feature_map": "relu", "tie_word_embeddings": True},
}
MAMBA2_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two groups": {"n_groups": 2},
    "eight groups, biases": {"n_groups": 8, "use_bias": True},
    "no conv bias, tied": {"n_groups": 2, "use_conv_bias": False, "tie_word_embeddings": True},
}


def write(family: str, path: Path, **overrides: Any) -> Path:
    """A random checkpoint of two layers; every tensor is random."""
    writer = WRITERS[f"{family} ({default_dialect(family).name})"]
    return writer(path, **{"num_hidden_layers": 2, **overrides})


def expand(path: Path, out: Path, *operations: dict[str, Any], seed: int = 0, **kwargs: Any) -> ExpansionSummary:
    """Expand by a list of plan entries."""
    return expand_checkpoint(path, out, {"seed": seed, "operations": list(operations)}, progress=False, **kwargs)


def tokens(vocabulary: int = 48, batch: int = 2, length: int = TOKENS) -> Tensor:
    """`[batch, length]` token ids, the same at every call."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(path: Path, dtype: torch.dtype = torch.float64, backend: str = "auto") -> Tensor:
    """`[batch, length, vocabulary]` of a checkpoint's model."""
    return statex.load(path, dtype=dtype, backend=backend)(tokens()).logits


def largest_difference(a: Path, b: Path, dtype: torch.dtype = torch.float64) -> float:
    """Largest difference of two checkpoints' logits, which are of the order of 1."""
    return float((logits(a, dtype) - logits(b, dtype)).abs().max())


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by canonical name."""
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.load(name) for name in checkpoint.tensors}


def provenance(path: Path) -> dict[str, Any]:
    """What an expanded checkpoint says about itself."""
    with open_checkpoint(path) as checkpoint:
        return checkpoint.provenance
