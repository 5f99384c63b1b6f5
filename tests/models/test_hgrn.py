"""Forget gates of HGRN and HGRN2 at their ends."""

from __future__ import annotations

import pytest
import torch

from statex.models.hgrn import forget


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounded_gates_are_at_most_one_however_far_they_open_and_keys_are_the_rest(dtype: torch.dtype) -> None:
    logits = torch.linspace(-60, 60, 600, dtype=dtype)[:, None].requires_grad_()
    bounds = torch.rand(2000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    keys, log_decay = forget(logits, bounds)
    unclamped = torch.logaddexp(bounds.log(), torch.log1p(-bounds) + torch.nn.functional.logsigmoid(logits))
    assert (unclamped > 0).any()
    assert log_decay.max() == 0
    torch.testing.assert_close(keys + log_decay.exp(), torch.ones_like(keys))
    log_decay.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
