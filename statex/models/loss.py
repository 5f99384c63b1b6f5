"""The language-model loss without all logits at once: 64 K tokens times 50 K words would be 13 GB in float32."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import triton_backend
from .plain import is_plain_linear

LOGITS = 1 << 27
"""Logits that may exist at one time."""

IGNORED = -100

DTYPES = {torch.float32, torch.bfloat16, torch.float16}
"""What the Triton kernel takes."""


def next_token_loss(
    head: nn.Module, hidden_states: Tensor, labels: Tensor, vocab_size: int, divisor: Tensor | float | None
) -> Tensor:
    """Cross-entropy of the next tokens in nats; logits exist a piece at a time.

    On CUDA devices a plain linear head goes with the loss: logits are made once and turned into their gradients in place
    (`kernels.fused.linear_loss`). Elsewhere, and behind other heads, pieces are made, used and, in the backward pass, made again.

    Args:
        head: maps hidden states to logits.
        hidden_states: `[B, T, hidden]`.
        labels: `[B, T]`, shifted here; -100 where no loss is wanted.
        vocab_size: logits per token.
        divisor: of the summed loss; None: the number of labels.

    Raises:
        ValueError: not one label a token.
    """
    if labels.shape != hidden_states.shape[:2]:  # the kernel would read other memory
        raise ValueError(f"labels must be {list(hidden_states.shape[:2])}, one a token, got {list(labels.shape)}")
    # The last position's label is taken from nowhere, so that all pieces have hidden states of one shape.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().to(hidden_states.device)
    rows = hidden_states.flatten(0, 1)
    if divisor is None:
        divisor = (targets != IGNORED).sum().clamp_min(1)
    kernels = _kernels(head, rows)
    if kernels is not None:
        loss: Tensor = kernels.mean_loss(rows, head.weight, targets, divisor)
        return loss
    pieces = list(zip(rows.split(max(1, LOGITS // vocab_size)), targets.split(max(1, LOGITS // vocab_size)), strict=True))
    if len(pieces) == 1 or not torch.is_grad_enabled():
        losses = [_piece(head, *piece) for piece in pieces]
    else:
        losses = [checkpoint(_piece, head, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.stack(losses).sum() / divisor


def _piece(head: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(rows).float(), targets, ignore_index=IGNORED, reduction="sum")


def _kernels(head: nn.Module, rows: Tensor) -> ModuleType | None:
    """The Triton kernels, where they take such rows and calling the head is a product with its weight and nothing else."""
    if torch.compiler.is_compiling() or not rows.is_cuda or not _is_plain(head, rows):
        return None
    return triton_backend.MODULES.get("linear_loss")


def _is_plain(head: nn.Module, rows: Tensor) -> bool:
    """Whether it is one product, without a bias, with a weight that the rows can meet as it is."""
    if not is_plain_linear(head) or head.bias is not None:
        return False
    weight = head.weight
    return (
        {weight.dtype, rows.dtype} <= DTYPES
        and weight.device == rows.device
        and weight.shape[1] == rows.shape[-1]
        and (weight.dtype == rows.dtype or torch.is_autocast_enabled(rows.device.type))
    )
