"""What users of transformers do with any model: casts, hidden states by config, packed batches, masks, caches of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from statex.models.cache import StatexCache
from tests.models.build import build, every_model, tokens


@every_model
@torch.no_grad()
def test_a_model_generates_the_same_while_it_trains_with_checkpointing(name: str) -> None:
    model, ids = build(name), tokens(2, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    model.train().gradient_checkpointing_enable()
    assert model.generate(ids, **options).equal(expected)


def test_checkpointing_refuses_to_go_on_from_a_cache_with_gradients() -> None:
    model, ids = build("gla"), tokens(1, 4)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cannot go on from past_key_values"):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("name", ["hgrn", "hgrn2", "gla", "mamba2"])
def test_a_half_precision_model_says_so_and_is_saved_as_it_is(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "fp32")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    assert half.dtype == half.model.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert {name: x.dtype for name, x in again.named_parameters()} == {name: x.dtype for name, x in half.named_parameters()}


@every_model
@torch.no_grad()
def test_a_model_that_is_cast_as_a_whole_runs_and_stays_close(name: str) -> None:
    model, ids = build(name), tokens(2, 5)
    exact = model(ids).logits
    logits = model.to(torch.bfloat16)(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - exact).norm() < 0.15 * exact.norm()  # decays too are rounded to 8 bits


@pytest.mark.parametrize("name", ["gla", "delta_net", "gated_deltanet", "mamba", "mamba2", "hgrn"])
def test_adapters_on_all_layers_of_a_cast_model_train(name: str) -> None:
    model = get_peft_model(build(name).to(torch.bfloat16), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids = tokens(2, 5)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@every_model
@pytest.mark.parametrize("keys", [{"position_ids"}, {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}])
@torch.no_grad()
def test_padding_free_batches_of_transformers_keep_sequences_apart(name: str, keys: set[str]) -> None:
    model, sequences = build(name), [tokens(5).tolist(), tokens(3).tolist(), tokens(1).tolist()]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": ids} for ids in sequences])
    logits = model(**{key: value for key, value in batch.items() if key in keys | {"input_ids"}}).logits
    alone = [model(torch.tensor([ids])).logits for ids in sequences]
    torch.testing.assert_close(logits, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


@every_model
@torch.no_grad()
def test_left_padding_read_a_token_at_a_time_is_still_padding(name: str) -> None:
    model, ids = build(name), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache, options = None, {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    for token in range(6):
        outputs = model(ids[:, token : token + 1], attention_mask=mask[:, : token + 1], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
    torch.testing.assert_close(outputs.logits, model(ids, attention_mask=mask).logits[:, -1:], rtol=1e-4, atol=1e-4)
    assert model.generate(ids, prefill_chunk_size=1, **options).equal(model.generate(ids, **options))


@torch.no_grad()
def test_hidden_states_come_back_where_the_config_asks_for_them() -> None:
    model, ids = build("gla"), tokens(1, 4)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3
    assert model(ids, output_hidden_states=False).hidden_states is None


@torch.no_grad()
def test_caches_and_masks_that_do_not_fit_are_refused() -> None:
    model, ids = build("gla"), tokens(2, 4)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="has read 2 rows, now there are 1"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="has 3 layers, the model 2"):
        model(ids, past_key_values=StatexCache(3))
    for mask in (torch.ones(1, 4), torch.ones(2, 3), torch.ones(2)):
        with pytest.raises(ValueError, match="attention_mask must be"):
            model(ids, attention_mask=mask)
