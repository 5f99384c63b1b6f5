"""What is read off states, against states and decays that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from statex.evals.diagnosis.memory import half_life, measure_memory, state_ranks
from statex.models.cache import LayerState
from statex.models.components import Mixer, TokenLayout
from statex.models.openness import measure_openness
from tests.models.build import DESCRIPTIONS, build, every_model, tokens


class Decaying(Mixer):
    """Two heads that forget at known rates and store what they read on the diagonal, or, as vectors, in their first row."""

    keep_in_fp32 = ()

    def __init__(self, decays: list[float], size: int = 4) -> None:
        nn.Module.__init__(self)
        self.decays, self.size = torch.tensor(decays), size

    def reset_own_parameters(self) -> None:
        pass

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None) -> Tensor:
        assert state is not None
        kept = torch.zeros(len(x), len(self.decays), self.size, self.size) if state.recurrent is None else state.recurrent
        for t in range(x.shape[1]):
            kept = kept * self.decays[:, None, None] + torch.eye(self.size) * x[:, t].mean(-1)[:, None, None, None]
        state.recurrent = kept
        return x


class One(nn.Module):
    """A model that is one mixer."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, input_ids: Tensor, **options: object) -> Tensor:
        return self.mixer(1 + input_ids[..., None].float(), TokenLayout(), LayerState())


def test_half_lives_are_those_of_the_decays() -> None:
    mixer = Decaying([0.9, 0.99, 1.0, 0.1])
    (found,) = measure_memory(One(mixer), [mixer], torch.randint(0, 9, (3, 400)))
    expected = [math.log(0.5) / math.log(0.9), math.log(0.5) / math.log(0.99)]
    assert found.half_life[:2] == pytest.approx(expected, rel=1e-3)
    assert found.half_life[2] == math.inf
    assert found.half_life[3] == pytest.approx(0.3, abs=0.01)
    assert found.horizon == 200
    assert found.effective_rank == pytest.approx([4] * 4)
    assert found.occupied == [1] * 4


def test_a_half_life_is_read_between_two_times() -> None:
    assert half_life([1, 2, 4, 8], [1.0, 0.9, 2**-0.5, 2**-1.5]) == pytest.approx(6)
    assert half_life([1, 2], [0.9, 0.6]) == math.inf
    assert half_life([1], [0.0]) < 0.1


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equal_directions_give_their_number_as_rank(rank: int) -> None:
    left, right = torch.linalg.qr(torch.randn(16, rank))[0], torch.linalg.qr(torch.randn(8, rank))[0]
    ranks, occupied, limit = state_ranks((left @ right.T).expand(5, 2, 16, 8))
    assert limit == 8
    assert ranks == pytest.approx([rank] * 2, rel=1e-3)
    assert occupied == [rank / 8] * 2


def test_occupation_counts_directions_until_99_percent_of_the_energy() -> None:
    state = torch.diag(torch.tensor([1.0, 0.3, 0.05, 0.01]))
    ranks, occupied, _ = state_ranks(state.expand(1, 1, 4, 4))
    assert occupied == [0.5]
    assert 1 < ranks[0] < 3
    assert state_ranks(torch.zeros(1, 1, 4, 4))[0] == [1.0]


def test_vectors_are_judged_together_and_numbers_not_at_all() -> None:
    vectors = torch.eye(6)[None, :, :, None]
    assert state_ranks(vectors) == ([pytest.approx(6)], [1.0], 6)
    assert state_ranks(torch.randn(2, 7, 1, 1)) == ([], [], 1)


@every_model
def test_every_family_can_be_looked_at(name: str) -> None:
    model = build(name)
    blocks = [block.mixer for block in model.model.layers]
    found = measure_memory(model, blocks, tokens(3, 64))
    for layer, memory in zip(DESCRIPTIONS[name].layers, found, strict=True):
        assert len(memory.half_life) == layer.state_shape[0]
        assert all(tokens > 0 for tokens in memory.half_life)
        assert all(1 <= rank <= memory.rank_limit + 1e-6 for rank in memory.effective_rank)
        assert all(0 < share <= 1 for share in memory.occupied)


@every_model
def test_what_is_left_of_a_state_is_what_an_empty_start_lacks(name: str) -> None:
    """A recurrence is linear in its initial state: started from twice the state, twice as much is left."""
    model = build(name).double()
    x = torch.randn(1, 24, model.config.description.hidden_size, dtype=torch.float64)
    for block in model.model.layers:
        ends = []
        for factor in (0, 1, 2):
            state = LayerState()
            with torch.no_grad():
                block.mixer(x[:, :12], TokenLayout(), state)
                assert state.recurrent is not None
                state.recurrent.mul_(factor)
                block.mixer(x[:, 12:], TokenLayout(), state)
            ends.append(state.recurrent)
        torch.testing.assert_close(ends[2] - ends[0], 2 * (ends[1] - ends[0]), rtol=1e-5, atol=1e-7)


def test_gates_of_a_fresh_expansion_are_shut_and_opening_them_is_measured() -> None:
    for name in ("gla-expanded", "mamba2-expanded"):
        description, model = DESCRIPTIONS[name], build(name)
        for layer, block in zip(description.layers, model.model.layers, strict=True):
            block.mixer.reset_own_parameters()
            shut = measure_openness(description, layer, block.mixer)
            assert [each.rms for each in shut] == [0] * len(shut)
            assert bool(shut) == (layer.lift > 1 or layer.mixing is not None)
            for parameter in (block.mixer.lift_gamma, getattr(block.mixer, "mixing", None)):
                if parameter is not None:
                    with torch.no_grad():
                        parameter += 0.25
            opened = measure_openness(description, layer, block.mixer)
            assert [(each.rms, each.largest) for each in opened] == [pytest.approx((0.25, 0.25))] * len(opened)
            assert {each.role for each in opened} <= {"lift", "mixing"}


def test_a_stock_layer_has_nothing_to_open() -> None:
    for name in ("gla", "mamba2"):
        model = build(name)
        for layer, block in zip(DESCRIPTIONS[name].layers, model.model.layers, strict=True):
            assert measure_openness(DESCRIPTIONS[name], layer, block.mixer) == []
