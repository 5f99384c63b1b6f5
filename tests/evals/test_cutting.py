"""Cutting the long memory of layers and heads, on every family: the oracle is the mixer itself on shorter rows."""

from __future__ import annotations

import pytest
import torch

from statex.evals.diagnosis.attribution import mixers_of
from statex.evals.diagnosis.cutting import HeadCuts, cut_layer, cut_layers, head_channels, output_projection
from statex.models import StatexForCausalLM
from statex.models.components import TokenLayout
from tests.models.build import DESCRIPTIONS, build, every_model, tokens

WINDOW, LENGTH = 5, 18


def mixers(model: StatexForCausalLM) -> list:
    return [block.mixer for block in model.model.layers]


@every_model
@torch.no_grad()
def test_a_cut_layer_computes_each_token_from_the_last_few_alone(name: str) -> None:
    model = build(name)
    for mixer in mixers(model):
        x = torch.randn(2, LENGTH, model.config.description.hidden_size)
        with cut_layer(mixer, WINDOW):
            cut = mixer(x, TokenLayout(), None)
        for t in range(LENGTH):
            start = max(0, (t // WINDOW - 1) * WINDOW)
            alone = mixer(x[:, start : t + 1], TokenLayout(), None)[:, -1]
            torch.testing.assert_close(cut[:, t], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(cut[:, -1], mixer(x, TokenLayout(), None)[:, -1], rtol=1e-4, atol=1e-5)


@every_model
@torch.no_grad()
def test_a_window_as_long_as_the_row_changes_nothing(name: str) -> None:
    model, ids = build(name), tokens(2, LENGTH)
    whole = model(ids, use_cache=False).logits
    with cut_layers(mixers(model), LENGTH):
        torch.testing.assert_close(model(ids, use_cache=False).logits, whole)


@every_model
@torch.no_grad()
def test_all_heads_cut_are_the_layer_cut_and_none_is_the_whole_model(name: str) -> None:
    model, ids = build(name), tokens(3, LENGTH)
    whole = model(ids, use_cache=False).logits
    for index, mixer in enumerate(mixers(model)):
        projection = output_projection(mixer, model.config.description.hidden_size)
        cuts = HeadCuts(model.model.layers, index, projection, WINDOW)
        with cuts.recording():
            torch.testing.assert_close(model(ids, use_cache=False).logits, whole)
        with cut_layer(mixer, WINDOW):
            layer_cut = model(ids, use_cache=False).logits
        for channels, expected in ((slice(None), layer_cut), (slice(0, 0), whole)):
            with cuts.cut(channels):
                torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_heads_cut_in_turn_add_up_in_what_the_layer_gives() -> None:
    """Behind the output projection a layer is a sum over heads, so the changes of single cuts add up to that of the layer's."""
    model, ids = build("gla"), tokens(2, LENGTH)
    index, size = len(model.model.layers) - 1, model.config.description.hidden_size
    block = model.model.layers[index]
    projection = output_projection(block.mixer, size)
    channels = head_channels(model.config.description.layers[index], projection)
    assert len(channels) == 4
    cuts, given = HeadCuts(model.model.layers, index, projection, WINDOW), []
    with cuts.recording():
        model(ids, use_cache=False)
    block.mixer.register_forward_hook(lambda module, inputs, output: given.append(output))
    model(ids, use_cache=False)
    for part in [*channels, slice(None)]:
        with cuts.cut(part):
            model(ids, use_cache=False)
    whole, *single, together = given
    torch.testing.assert_close(sum(each - whole for each in single), together - whole, rtol=1e-4, atol=1e-5)


@every_model
@torch.no_grad()
def test_a_model_is_itself_again_after_cutting(name: str) -> None:
    model, ids = build(name), tokens(1, LENGTH)
    whole = model(ids, use_cache=False).logits
    projection = output_projection(mixers(model)[0], model.config.description.hidden_size)
    cuts = HeadCuts(model.model.layers, 0, projection, WINDOW)
    with pytest.raises(KeyboardInterrupt), cuts.recording(), cut_layer(mixers(model)[1], WINDOW):
        raise KeyboardInterrupt
    assert torch.equal(model(ids, use_cache=False).logits, whole)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@every_model
def test_the_projection_that_is_found_is_the_last_of_its_mixer(name: str) -> None:
    model = build(name)
    for mixer in mixers(model):
        projection = output_projection(mixer, model.config.description.hidden_size)
        assert projection in (getattr(mixer, "o_proj", None), getattr(mixer, "out_proj", None))


def test_a_merged_head_counts_as_its_source_heads() -> None:
    model = build("gla-expanded")
    first = DESCRIPTIONS["gla-expanded"].layers[0]
    assert (first.query_heads, first.blocks) == (1, 4)
    channels = head_channels(first, output_projection(mixers(model)[0], 32))
    assert [part.stop - part.start for part in channels] == [8] * 4


def test_a_cut_layer_takes_no_cache() -> None:
    from statex.evals.subject import Subject
    from tests.evals.models import BYTES

    model = build("gla")
    assert mixers_of(Subject(model, BYTES)) == mixers(model)
    with cut_layer(mixers(model)[0], WINDOW), pytest.raises(AssertionError, match="from an empty state"):
        model(tokens(1, 4), use_cache=True)
