"""Unexpanded Mamba computes what transformers' MambaForCausalLM computes.

Tolerance: 2e-5 of the largest logit. Both run in fp32 and sum in a different order; seen: under 1e-6.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from statex.families import get_family
from statex.models import StatexForCausalLM
from tests.models.build import CONFIGS, randomise, tokens
from tests.models.test_equals_transformers import assert_equal_logits

PUBLISHED_130M_LAYER = {
    "hidden_size": 768, "state_size": 16, "time_step_rank": 48, "num_hidden_layers": 1, "vocab_size": 64,
    "tie_word_embeddings": True,
}  # fmt: skip


def pair(**overrides: Any) -> tuple[StatexForCausalLM, MambaForCausalLM]:
    config = {key: value for key, value in (CONFIGS["mamba"] | overrides).items() if key != "intermediate_size"}
    theirs = randomise(MambaForCausalLM(MambaConfig(**{key: value for key, value in config.items() if key != "model_type"}))).eval()
    renamed = {
        name.replace("backbone.", "model.").replace(".norm.weight", ".mixer_norm.weight").replace("norm_f", "norm"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    ours = StatexForCausalLM.from_description(get_family("mamba").describe(config, {}))
    ours.load_state_dict(renamed)
    return ours.eval(), theirs


@pytest.mark.parametrize(
    "overrides",
    [{}, {"use_bias": True, "use_conv_bias": False}, {"expand": 3, "conv_kernel": 3, "state_size": 5}, {"time_step_rank": "auto"}],
    ids=str,
)
@torch.no_grad()
def test_logits_equal_mamba_for_causal_lm(overrides: dict[str, Any]) -> None:
    ours, theirs = pair(**overrides)
    ids = tokens(2, 19)
    assert_equal_logits(ours(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_logits_equal_at_the_published_layer_shape_of_130m() -> None:
    ours, theirs = pair(**PUBLISHED_130M_LAYER)
    ids = tokens(1, 70)
    assert_equal_logits(ours(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_left_padding_is_masked_as_in_mamba_for_causal_lm() -> None:
    ours, theirs = pair()
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    padded, expected = ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
    assert_equal_logits(padded[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_generation_says_what_mamba_for_causal_lm_says() -> None:
    ours, theirs = pair()
    ids = tokens(2, 6)
    told = [model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0) for model in (ours, theirs)]
    assert torch.equal(*told)


@torch.no_grad()
def test_gradients_of_the_loss_equal_mamba_for_causal_lm() -> None:
    ours, theirs = pair()
    ids = tokens(2, 9)
    with torch.enable_grad():
        for model in (ours, theirs):
            model(input_ids=ids, labels=ids).loss.backward()
    for name in (
        "in_proj.weight",
        "conv1d.weight",
        "x_proj.weight",
        "dt_proj.weight",
        "dt_proj.bias",
        "A_log",
        "D",
        "out_proj.weight",
    ):
        got = ours.get_parameter(f"model.layers.0.mixer.{name}").grad
        want = theirs.get_parameter(f"backbone.layers.0.mixer.{name}").grad
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
