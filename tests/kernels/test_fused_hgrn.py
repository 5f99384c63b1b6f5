"""HGRN's scan in Triton, forward and backward, against the float64 reference: in Triton's interpreter on a CPU, as is on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from statex.kernels import hgrn, triton_backend
from tests.kernels.inputs import DECAYS, distance, in_float64, log_decays, results

pytest.importorskip("triton")

from statex.kernels.fused import hgrn as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5
"""float32 throughout."""

NARROW_TOLERANCE = {torch.bfloat16: 3e-3 if DEVICE == "cuda" else 8e-3, torch.float16: 1e-3}
"""Every sum is float32, so only results are rounded, to 2^-9 or 2^-12; the interpreter cuts bfloat16 off where a GPU rounds."""

CHANNELS = len(DECAYS) + 1


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow, and tiles must meet. No stretches: those tests ask for them."""
    tiles = {"walk": (4, 2), "forward": (4, 2), "backward": (2, 4)}
    monkeypatch.setattr(fused, "TILES", {name: fused.Tile(8, *sizes, warps=1) for name, sizes in tiles.items()})
    monkeypatch.setattr(fused, "PROGRAMS", 1)


@pytest.fixture
def stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "PROGRAMS", 1 << 10)
    monkeypatch.setattr(fused, "SHORTEST", 5)


def inputs_of(tokens: int, *, batch: int = 1, states: int | None = None) -> dict[str, Tensor]:
    """A channel of every strength of decays, and one with a token that forgets everything."""
    decays = [log_decays(decay, batch, tokens, 1) for decay in (*DECAYS, "mild")]
    decays[-1][:, tokens // 2] = -torch.inf
    return {
        "x": torch.randn(batch, tokens, CHANNELS),
        "log_decay": torch.cat(decays, -1),
        "initial_state": torch.randn(states or batch, CHANNELS),
    }


def on_device(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: x.to(DEVICE, dtype if name == "x" else None) for name, x in inputs.items()}


def assert_channels_match(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Each by itself: a strong decay's gradient is tiny beside a weak one's."""
    for n in range(expected.shape[-1]):
        assert distance(found[..., n].cpu(), expected[..., n]) < tolerance, (what, n)


def assert_results_match(inputs: dict[str, Tensor], tolerance: float = TOLERANCE, dtype: torch.dtype = torch.float32) -> None:
    rounded = {name: x.cpu() for name, x in on_device(inputs, dtype).items()}
    expected = results(hgrn, in_float64(rounded), backend="reference")
    for name, found in results(hgrn, on_device(inputs, dtype), backend="triton").items():
        assert_channels_match(found, expected[name], tolerance, name)


def assert_values_match(inputs: dict[str, Tensor], **options: Any) -> None:
    expected = hgrn(**in_float64(inputs), output_final_state=True, backend="reference", **options)
    found = hgrn(**on_device(inputs), output_final_state=True, backend="triton", **on_device(options))
    for what, ours, theirs in zip(("h", "state"), found, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert_channels_match(ours, theirs, TOLERANCE, what)


def test_every_gradient_equals_the_references_at_any_strength_of_decays() -> None:
    assert_results_match(inputs_of(21, batch=2))


@pytest.mark.usefixtures("stretches")
def test_stretches_meet_without_a_trace_whatever_scratch_held_before(monkeypatch: pytest.MonkeyPatch) -> None:
    make_empty, make_new = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: make_empty(*sizes, **options).fill_(torch.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *sizes, **options: make_new(x, *sizes, **options).fill_(torch.nan))
    inputs = inputs_of(21)
    assert fused._Pass(inputs["x"], inputs["log_decay"], None).stretches == 3
    assert_results_match(inputs)


def test_channels_beyond_a_tile_and_a_row_of_few_tokens_are_their_own_programs() -> None:
    inputs = {name: torch.cat([x, x.flip(-1)], -1) for name, x in inputs_of(3).items()}
    assert_results_match(inputs)


@pytest.mark.parametrize("tokens", [1, 2, 8, 9])
def test_any_length_equals_the_reference(tokens: int) -> None:
    assert_values_match(inputs_of(tokens))


BORDERS = torch.tensor([0, 1, 1, 12, 16, 18, 18])


@pytest.mark.usefixtures("stretches")
def test_packed_sequences_do_not_meet() -> None:
    inputs = inputs_of(18)
    del inputs["initial_state"]
    leaves, exact = ({name: x.requires_grad_() for name, x in each.items()} for each in (on_device(inputs), in_float64(inputs)))
    found, _ = hgrn(**leaves, cu_seqlens=BORDERS.to(DEVICE), backend="triton")
    expected, _ = hgrn(**exact, cu_seqlens=BORDERS, backend="reference")
    weights = torch.randn(expected.shape)
    (found * weights.to(DEVICE)).sum().backward()
    (expected * weights).sum().backward()
    assert_channels_match(found.detach(), expected.detach(), TOLERANCE, "h")
    for name, leaf in leaves.items():
        assert_channels_match(leaf.grad, exact[name].grad, TOLERANCE, name)


def test_packed_sequences_start_from_their_own_states() -> None:
    assert_values_match(inputs_of(18, states=6), cu_seqlens=BORDERS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_keep_their_dtype_and_lose_only_the_rounding_of_results(dtype: torch.dtype) -> None:
    inputs = inputs_of(9)
    h, state = hgrn(**on_device(inputs, dtype), output_final_state=True, backend="triton")
    assert h.dtype == dtype
    assert state is not None
    assert state.dtype == torch.float32
    assert_results_match(inputs, NARROW_TOLERANCE[dtype], dtype)


def test_rows_in_any_memory_layout_are_accepted() -> None:
    inputs = inputs_of(9, batch=2)
    inputs["x"] = inputs["x"].mT.contiguous().mT
    inputs["log_decay"] = torch.cat([inputs["log_decay"], torch.zeros(2, 9, 3)], -1)[..., :CHANNELS]
    assert_values_match(inputs)


@pytest.mark.parametrize("learned", [True, False])
def test_results_are_kept_only_for_the_gradient_of_decays(learned: bool) -> None:
    inputs = on_device(inputs_of(9))
    inputs["x"].requires_grad_()
    inputs["log_decay"].requires_grad_(learned)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        h, _ = hgrn(**inputs, backend="triton")
    assert any(x.data_ptr() == h.data_ptr() for x in kept) is learned
    h.sum().backward()
    expected = torch.ones_like(h)
    for t in reversed(range(8)):
        expected[:, t] += inputs["log_decay"].detach()[:, t + 1].exp() * expected[:, t + 1]
    assert distance(inputs["x"].grad, expected) < TOLERANCE


def test_stretches_are_whole_tiles_and_enough_to_fill_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for batch, tokens, channels in ((4, 4096, 2048), (1, 65536, 256), (1, 5000, 64), (3, 7, 100_000), (1, 1, 1)):
        rows = torch.empty(1, 1, 1).expand(batch, tokens, channels)
        run = fused._Pass(rows, rows, None)
        assert (run.stretches - 1) * run.length < tokens <= run.stretches * run.length
        assert all(run.length % (tile.runs * tile.steps) == 0 for tile in run.tiles.values())
        programs = batch * run.stretches * -(-channels // fused.TILES["forward"].channels)
        assert programs >= fused.PROGRAMS or run.length < 2 * fused.SHORTEST


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a machine without a GPU")
def test_auto_stays_with_pytorch_on_a_cpu_and_float64_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(5)
    with pytest.raises(ValueError, match="'triton' has no float64; use auto or chunked"):
        hgrn(**in_float64(inputs), backend="triton")
    monkeypatch.setattr(triton_backend, "MODULES", {})
    hgrn(**inputs)
    with pytest.raises(ValueError, match=r"needs Triton \(pip install 'statex\[gpu\]'\)"):
        hgrn(**inputs, backend="triton")
