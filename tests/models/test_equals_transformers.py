"""Unexpanded Mamba-2 computes what transformers' Mamba2ForCausalLM computes.

Tolerance: 2e-5 of the largest logit. Both run in fp32 and sum the chunks of the scan in a different order; seen: under 3e-6.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import Mamba2Config, Mamba2ForCausalLM

from statex.families import get_family
from statex.models import StatexForCausalLM
from tests.models.build import CONFIGS, randomise, tokens

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason=f"transformers {transformers.__version__} norms all channels of a grouped Mamba-2 at once",
)

TOLERANCE = 2e-5
PUBLISHED_130M_LAYER = {
    "hidden_size": 768, "num_heads": 24, "head_dim": 64, "n_groups": 1, "state_size": 128, "num_hidden_layers": 1, "vocab_size": 64,
    "tie_word_embeddings": True,
}  # fmt: skip


def pair(**overrides: Any) -> tuple[StatexForCausalLM, Mamba2ForCausalLM]:
    config = CONFIGS["mamba2"] | overrides
    theirs = randomise(
        Mamba2ForCausalLM(Mamba2Config(**{key: value for key, value in config.items() if key != "model_type"}))
    ).eval()
    renamed = {
        name.replace("backbone.", "model.").replace(".norm.weight", ".mixer_norm.weight").replace("mixer.mixer_norm", "mixer.norm")
        .replace("norm_f", "norm"): tensor
        for name, tensor in theirs.state_dict().items()
    }  # fmt: skip
    ours = StatexForCausalLM.from_description(get_family("mamba2").describe(config, {}))
    ours.load_state_dict(renamed)
    return ours, theirs


def assert_equal_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.parametrize(
    "overrides", [{"n_groups": 1}, {"n_groups": 8}, {"n_groups": 2, "use_bias": True, "use_conv_bias": False}], ids=str
)
@torch.no_grad()
def test_logits_equal_mamba2_for_causal_lm(overrides: dict[str, Any]) -> None:
    ours, theirs = pair(**overrides)
    ids = tokens(2, 19)
    assert_equal_logits(ours(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_logits_equal_at_the_published_layer_shape_of_130m() -> None:
    ours, theirs = pair(**PUBLISHED_130M_LAYER)
    ids = tokens(1, 70)
    assert_equal_logits(ours(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_time_steps_are_clamped_as_in_mamba2_for_causal_lm() -> None:
    limited, theirs = pair(time_step_limit=(0.05, 0.1))
    free, _ = pair()
    ids = tokens(1, 12)
    assert_equal_logits(limited(ids).logits, theirs(ids).logits)
    assert not torch.allclose(free(ids).logits, theirs(ids).logits, atol=1e-3)


@torch.no_grad()
def test_left_padding_is_masked_as_in_mamba2_for_causal_lm() -> None:
    ours, theirs = pair(n_groups=2)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    padded, expected = ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
    assert_equal_logits(padded[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_gradients_of_the_loss_equal_mamba2_for_causal_lm() -> None:
    ours, theirs = pair(n_groups=2)
    ids = tokens(2, 9)
    with torch.enable_grad():
        for model in (ours, theirs):
            model(input_ids=ids, labels=ids).loss.backward()
    for mine, other in [
        ("in_proj.weight", "in_proj.weight"),
        ("A_log", "A_log"),
        ("dt_bias", "dt_bias"),
        ("norm.weight", "norm.weight"),
    ]:
        got = ours.get_parameter(f"model.layers.0.mixer.{mine}").grad
        want = theirs.get_parameter(f"backbone.layers.0.mixer.{other}").grad
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
