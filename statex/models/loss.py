"""The language-model loss without all logits at once: 64 K tokens times 50 K words would be 13 GB in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS = 1 << 27
"""Logits that may exist at one time."""

IGNORED = -100


def next_token_loss(
    head: nn.Module, hidden_states: Tensor, labels: Tensor, vocab_size: int, divisor: Tensor | float | None
) -> Tensor:
    """Cross-entropy of the next tokens in nats; pieces of logits are made, used and, in the backward pass, made again.

    Args:
        head: maps hidden states to logits.
        hidden_states: `[B, T, hidden]`.
        labels: `[B, T]`, shifted here; -100 where no loss is wanted.
        vocab_size: logits per token.
        divisor: of the summed loss; None: the number of labels.
    """
    # The last position's label is taken from nowhere, so that all pieces have hidden states of one shape.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().to(hidden_states.device)
    rows = hidden_states.flatten(0, 1)
    if divisor is None:
        divisor = (targets != IGNORED).sum().clamp_min(1)
    pieces = list(zip(rows.split(max(1, LOGITS // vocab_size)), targets.split(max(1, LOGITS // vocab_size)), strict=True))
    if len(pieces) == 1 or not torch.is_grad_enabled():
        losses = [_piece(head, *piece) for piece in pieces]
    else:
        losses = [checkpoint(_piece, head, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.stack(losses).sum() / divisor


def _piece(head: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(rows).float(), targets, ignore_index=IGNORED, reduction="sum")
