from __future__ import annotations

import pytest
import torch

from statex.kernels import lift


def test_features_are_products_with_rolled_channels_over_their_rms() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    rms = (14 / 3 + 1e-4) ** 0.5
    assert torch.allclose(lift(x, 3), torch.tensor([3.0, 2.0, 6.0, 2.0, 6.0, 3.0]) / rms)


def test_a_zero_key_has_zero_features_and_finite_gradients() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    features = lift(x, 2)
    features.sum().backward()
    assert torch.equal(features, torch.zeros(2, 4))
    assert torch.isfinite(x.grad).all()


def test_half_precision_is_squared_in_float32() -> None:
    x = torch.full((4,), 300.0, dtype=torch.float16)  # 300² overflows float16
    assert torch.allclose(lift(x, 2), torch.full((4,), 300.0, dtype=torch.float16), rtol=1e-3)


@pytest.mark.parametrize("factor", [1, 5])
def test_a_factor_that_adds_nothing_or_repeats_rolls_is_refused(factor: int) -> None:
    with pytest.raises(ValueError, match=r"lift factor must lie in 2\.\.4"):
        lift(torch.zeros(4), factor)
