"""Decoding: what the cache holds, and that using it changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from statex.models import StatexCache, StatexForCausalLM
from statex.models.token_graph import TokenGraph, is_hooked
from tests.models.build import DESCRIPTIONS, build, every_model, tokens

TIGHT = {"rtol": 1e-4, "atol": 1e-4}


def generate(model: StatexForCausalLM, ids: torch.Tensor, **options: object) -> torch.Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, **options)


def left_padded(ids: torch.Tensor, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows: `padding` pads then the first tokens of `ids`, and `ids` itself."""
    rows = ids.repeat(2, 1)
    rows[0, padding:], rows[0, :padding] = ids[0, : ids.shape[1] - padding], 0
    mask = torch.ones_like(rows)
    mask[0, :padding] = 0
    return rows, mask


@every_model
@torch.no_grad()
def test_reading_in_pieces_gives_the_logits_of_reading_at_once(name: str) -> None:
    model, ids = build(name), tokens(2, 12)
    cache = StatexCache(len(model.model.layers))
    pieces = [ids[:, :5], ids[:, 5:6], ids[:, 6:10], ids[:, 10:11], ids[:, 11:]]
    logits = torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits, **TIGHT)
    assert cache.get_seq_length() == 12


@every_model
@torch.no_grad()
def test_states_have_the_sizes_of_each_layer_description(name: str) -> None:
    model = build(name)
    cache = model(tokens(3, 7), use_cache=True).past_key_values
    for layer, state in zip(DESCRIPTIONS[name].layers, cache.layers, strict=True):
        assert state.recurrent.shape == (3, *layer.state_shape)
        assert state.recurrent.dtype == torch.float32
        assert all(conv.shape[-1] == 3 and conv.untyped_storage().nbytes() == conv.nbytes for conv in state.conv.values())


@every_model
@torch.no_grad()
def test_greedy_generation_with_cache_equals_generation_without(name: str) -> None:
    model, ids = build(name), tokens(2, 5)
    assert generate(model, ids).equal(generate(model, ids, use_cache=False))


@every_model
@torch.no_grad()
def test_beam_search_with_cache_equals_beam_search_without(name: str) -> None:
    model, ids = build(name), tokens(2, 5)
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert generate(model, ids, **options).equal(generate(model, ids, use_cache=False, **options))


@every_model
@torch.no_grad()
def test_sampling_with_cache_equals_sampling_without(name: str) -> None:
    model, ids = build(name), tokens(2, 5)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(generate(model, ids, do_sample=True, top_k=20, num_return_sequences=2, use_cache=use_cache))
    assert drawn[0].equal(drawn[1])
    assert len({tuple(row.tolist()) for row in drawn[0]}) > 1


@every_model
@torch.no_grad()
def test_a_left_padded_prompt_gives_the_generation_of_the_bare_prompt(name: str) -> None:
    model, ids = build(name), tokens(1, 7)
    rows, mask = left_padded(ids, 3)
    together = generate(model, rows, attention_mask=mask)
    assert together[0, 7:].equal(generate(model, ids[:, :4])[0, 4:])
    assert together[1].equal(generate(model, ids)[0])


@every_model
@torch.no_grad()
def test_left_padding_leaves_the_states_of_the_bare_prompt(name: str) -> None:
    model, ids = build(name), tokens(1, 7)
    rows, mask = left_padded(ids, 3)
    padded = model(rows, attention_mask=mask, use_cache=True).past_key_values
    bare = model(ids[:, :4], use_cache=True).past_key_values
    for left, right in zip(padded.layers, bare.layers, strict=True):
        torch.testing.assert_close(left.recurrent[:1], right.recurrent, **TIGHT)
        for conv in left.conv:
            torch.testing.assert_close(left.conv[conv][:1], right.conv[conv], **TIGHT)


@torch.no_grad()
def test_a_prompt_can_be_read_in_chunks_and_a_dialogue_continued() -> None:
    model, ids = build("gla-expanded"), tokens(2, 9)
    expected = generate(model, ids)
    assert generate(model, ids, prefill_chunk_size=4).equal(expected)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    assert generate(model, ids, past_key_values=cache).equal(expected)


@torch.no_grad()
def test_generation_from_embeddings_equals_generation_from_tokens() -> None:
    model, ids = build("mamba2-expanded"), tokens(2, 5)
    from_embeddings = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert from_embeddings.equal(generate(model, ids)[:, 5:])


@torch.no_grad()
def test_cache_batch_operations_pick_and_repeat_sequences() -> None:
    model, ids = build("gla-expanded"), tokens(3, 6)
    cache = model(ids, use_cache=True).past_key_values
    assert cache.batch_size == 3
    order = torch.tensor([2, 0])
    for change, rows in [
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(order), [2, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ]:
        changed = copy.deepcopy(cache)
        change(changed)
        following = tokens(1, 1).expand(len(rows), 1)
        expected = model(torch.cat([ids[rows], following], dim=1)).logits[:, -1:]
        torch.testing.assert_close(model(following, past_key_values=changed).logits, expected, **TIGHT)


@torch.no_grad()
def test_reset_forgets_and_crop_is_refused() -> None:
    model, ids = build("gla"), tokens(1, 6)
    cache = model(ids, use_cache=True).past_key_values
    assert cache.nbytes == sum(state.recurrent.nbytes + sum(conv.nbytes for conv in state.conv.values()) for state in cache.layers)
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


@torch.no_grad()
def test_a_foreign_cache_is_refused_by_name() -> None:
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="StatexCache, not a DynamicCache"):
        build("gla")(tokens(1, 3), past_key_values=DynamicCache())


@every_model
def test_a_token_read_with_gradients_leaves_the_graph_of_earlier_tokens_whole(name: str) -> None:
    model, ids = build(name), tokens(1, 5)
    first = model(ids[:, :4], use_cache=True)
    second = model(ids[:, 4:], past_key_values=first.past_key_values)
    (first.logits.sum() + second.logits.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_model
@torch.no_grad()
def test_a_mask_of_ones_changes_nothing(name: str) -> None:
    model, ids = build(name), tokens(2, 6)
    assert model(ids, attention_mask=torch.ones_like(ids)).logits.equal(model(ids).logits)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@every_model
@torch.no_grad()
def test_tokens_replayed_as_a_graph_equal_those_run_kernel_by_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []
    capture = TokenGraph._capture
    monkeypatch.setattr(TokenGraph, "_capture", lambda graph, *rest: (capture(graph, *rest), captured.append(graph)))
    model, (ids, mask) = build(name).cuda(), left_padded(tokens(1, 5).cuda(), 2)
    options = {"attention_mask": mask, "max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    replayed, plain = (generate(model, ids, disable_compile=disabled, **options) for disabled in (False, True))
    assert len(captured) == 1
    assert replayed.sequences.equal(plain.sequences)
    torch.testing.assert_close(replayed.logits, plain.logits, rtol=0, atol=0)


@pytest.mark.gpu
@on_a_gpu
@torch.no_grad()
def test_beam_search_on_a_gpu_which_exchanges_states_equals_that_without_graphs() -> None:
    model, ids = build("gla").cuda(), tokens(2, 5).cuda()
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12}
    assert generate(model, ids, **options).equal(generate(model, ids, disable_compile=True, **options))


@pytest.mark.gpu
@on_a_gpu
@torch.no_grad()
def test_hooks_see_every_token_that_is_generated() -> None:
    model, ids = build("gla").cuda(), tokens(2, 5).cuda()
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    generate(model, ids, max_new_tokens=8)
    assert seen == [5, *[1] * 7]


def test_gradient_checkpointing_leaves_no_hook_that_a_graph_would_miss() -> None:
    model = build("gla")
    model.gradient_checkpointing_enable()
    assert not is_hooked(model)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_any_other_hook_is_seen_until_it_is_removed(register: str) -> None:
    model = build("gla")
    model.gradient_checkpointing_enable()
    handle = getattr(model.lm_head, register)(lambda *_: None)
    assert is_hooked(model)
    handle.remove()
    assert not is_hooked(model)


def test_a_module_that_accelerate_offloads_counts_as_hooked() -> None:
    model = build("gla")
    model.lm_head._hf_hook = object()
    assert is_hooked(model)
