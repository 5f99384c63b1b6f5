"""Sequences packed into one row do not see each other."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.models.build import build, every_model, tokens

BORDERS = [0, 5, 6, 8, 9, 16]
"""Sequences shorter than the convolution among them."""


@every_model
def test_packed_sequences_give_the_logits_of_separate_ones(name: str) -> None:
    model, ids = build(name), tokens(1, 16)
    packed = model(ids, cu_seqlens=torch.tensor(BORDERS)).logits
    separate = [model(ids[:, start:end]).logits for start, end in pairwise(BORDERS)]
    torch.testing.assert_close(packed, torch.cat(separate, dim=1), rtol=1e-4, atol=1e-4)


@every_model
def test_packed_sequences_give_the_gradients_of_separate_ones(name: str) -> None:
    model, ids = build(name), tokens(1, 16)
    weights = torch.randn(1, 16, 48)
    (model(ids, cu_seqlens=torch.tensor(BORDERS)).logits * weights).sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for start, end in pairwise(BORDERS):
        (model(ids[:, start:end]).logits * weights[:, start:end]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-3, atol=1e-4 * parameter.grad.abs().max().item())


@every_model
def test_a_sequence_gets_no_gradient_from_its_neighbours(name: str) -> None:
    model = build(name)
    embeddings = model.get_input_embeddings()(tokens(1, 16)).detach().requires_grad_()
    model(inputs_embeds=embeddings, cu_seqlens=torch.tensor(BORDERS)).logits[:, 6:8].sum().backward()
    sizes = embeddings.grad[0].abs().sum(-1)
    reached = sizes > 1e-6 * sizes.max()  # gradients of decays may cancel to rounding only
    assert reached.nonzero().flatten().tolist() == [6, 7]


@every_model
@torch.no_grad()
def test_rows_of_a_batch_can_be_packed_with_borders_counted_over_all_of_them(name: str) -> None:
    model, ids = build(name), tokens(2, 8)
    batched = model(ids, cu_seqlens=torch.tensor([0, 3, 8, 16])).logits
    flat = model(ids.view(1, 16), cu_seqlens=torch.tensor([0, 3, 8, 16])).logits
    assert batched.shape == (2, 8, 48)
    torch.testing.assert_close(batched.view(1, 16, 48), flat)


def test_a_cache_of_packed_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="packed rows"):
        build("gla")(tokens(1, 6), cu_seqlens=torch.tensor([0, 2, 6]), use_cache=True)


@torch.no_grad()
def test_padding_after_the_last_sequence_of_a_row_changes_no_logits() -> None:
    model, ids = build("mamba2"), tokens(1, 10)
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    packed = model(ids, attention_mask=mask, cu_seqlens=torch.tensor([0, 4, 7, 10])).logits
    torch.testing.assert_close(packed[:, 4:7], model(ids[:, 4:7]).logits, rtol=1e-4, atol=1e-4)
