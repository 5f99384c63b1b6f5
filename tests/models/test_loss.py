"""The loss in pieces equals the loss of all logits, in value and in gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from statex.models import loss
from statex.models.loss import next_token_loss


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("divisor", [None, 7.0])
def test_pieces_give_the_loss_and_the_gradients_of_the_whole(
    pieces: int, divisor: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, vocab = nn.Linear(6, 11, bias=False), 11
    hidden, labels = torch.randn(2, 8, 6, requires_grad=True), torch.randint(0, vocab, (2, 8))
    labels[0, 3] = labels[1, 0] = -100
    logits = head(hidden)[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum") / (divisor or (targets >= 0).sum())
    wanted = torch.autograd.grad(expected, [hidden, head.weight])
    monkeypatch.setattr(loss, "LOGITS", 16 * vocab // pieces)
    found = next_token_loss(head, hidden, labels, vocab, divisor)
    torch.testing.assert_close(found, expected)
    for gradient, other in zip(torch.autograd.grad(found, [hidden, head.weight]), wanted, strict=True):
        torch.testing.assert_close(gradient, other)


def test_no_label_gives_no_loss_and_no_nan() -> None:
    head = nn.Linear(6, 11, bias=False)
    assert next_token_loss(head, torch.randn(1, 4, 6), torch.full((1, 4), -100), 11, None) == 0
