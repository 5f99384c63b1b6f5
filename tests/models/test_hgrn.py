"""Forget gates of HGRN and HGRN2 at their ends, and what HGRN's scan is called with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statex.models import hgrn as module
from statex.models.hgrn import forget
from tests.models.build import build, tokens


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


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_the_scan_reads_half_precision_as_it_is_and_takes_the_models_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scan, asked = module.hgrn, list[tuple[Any, ...]]()

    def spied(x: torch.Tensor, log_decay: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        h, final = scan(x, log_decay, **options)
        asked.append((x.dtype, log_decay.dtype, h.dtype, None if final is None else final.dtype, options["backend"]))
        return h, final

    monkeypatch.setattr(module, "hgrn", spied)
    model = build("hgrn")
    model.set_backend(backend)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(2, 5), use_cache=True)
    narrow, wide = torch.bfloat16, torch.float32
    assert set(asked) == {(narrow, wide, narrow, wide, backend)}
