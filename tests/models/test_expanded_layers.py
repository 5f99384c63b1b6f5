"""Mixers read the layer description alone, so what surgery adds can be checked against the plain layer it came from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from statex.families import ModelDescription
from statex.models import StatexForCausalLM
from tests.models.build import build, describe, tokens


def loaded(description: ModelDescription, source: StatexForCausalLM) -> StatexForCausalLM:
    """A model of `description` with the source's tensors where it has them; the rest as `reset_own_parameters` leaves it."""
    model = StatexForCausalLM.from_description(description)
    for block in model.model.layers:
        block.mixer.reset_own_parameters()
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith(("mixing", "lift_gamma")) for name in missing)
    return model.eval()


@pytest.mark.parametrize("mixing", ["scalar", "channel"])
@pytest.mark.parametrize("conv", [False, True])
@torch.no_grad()
def test_merged_heads_that_read_their_own_block_compute_the_source(mixing: str, conv: bool) -> None:
    description = describe("gla", use_short_conv=conv)
    source, ids = build(description), tokens(2, 11)
    heads = description.layers[0].query_heads
    layers = tuple(
        replace(
            layer, query_heads=heads // factor, key_heads=heads // factor, value_heads=heads // factor,
            key_dim=layer.key_dim * factor, value_dim=layer.value_dim * factor, blocks=factor, mixing=mixing,
        )
        for layer, factor in zip(description.layers, (heads, 2), strict=True)
    )  # fmt: skip
    merged = loaded(replace(description, layers=layers), source)
    expected = source(ids).logits
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    merged.model.layers[0].mixer.mixing[:, :, 0] += 0.5
    assert not torch.allclose(merged(ids).logits, expected, atol=1e-2)


@pytest.mark.parametrize("family", ["gla", "mamba2"])
@torch.no_grad()
def test_lifted_keys_with_gamma_zero_compute_the_source(family: str) -> None:
    description = describe(family)
    source, ids = build(description), tokens(2, 11)
    lifted = loaded(replace(description, layers=tuple(replace(layer, lift=3) for layer in description.layers)), source)
    expected = source(ids).logits
    torch.testing.assert_close(lifted(ids).logits, expected, rtol=1e-4, atol=1e-4)
    lifted.model.layers[0].mixer.lift_gamma += 0.5
    assert not torch.allclose(lifted(ids).logits, expected, atol=1e-2)


@torch.no_grad()
def test_norm_groups_and_scale_follow_the_description_not_the_head_sizes() -> None:
    description = describe("gla")
    source, ids = build(description), tokens(1, 8)
    for change in ({"norm_groups": 8}, {"scale": 2.0}):
        layers = tuple(replace(layer, **change) for layer in description.layers)
        model = StatexForCausalLM.from_description(replace(description, layers=layers))
        halves = {
            name: tensor[: tensor.shape[0] // 2] for name, tensor in source.state_dict().items() if name.endswith("g_norm.weight")
        }
        model.load_state_dict(source.state_dict() | (halves if "norm_groups" in change else {}))
        assert not torch.allclose(model(ids).logits, source(ids).logits, atol=1e-2), change
