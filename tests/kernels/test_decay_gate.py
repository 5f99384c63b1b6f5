"""GLA's decay gate: Triton's kernels against the PyTorch form in float64, this against its equation.

In Triton's interpreter on a CPU, or as they are on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from statex.kernels import pointwise
from statex.kernels.pointwise import low_rank_log_decay
from tests.kernels.inputs import distance, in_float64

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-6
"""float32, and sums over less than 200 numbers."""

NARROW = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4}
"""For what is rounded to these dtypes once, by 1.7e-3 or 2e-4 in the mean."""

HALVED = 1e-5 if DEVICE == "cuda" else 5e-5
"""For gradients of which what is multiplied is rounded to 2^-17, twice with bfloat16 rows; the interpreter cuts off."""

KINDS: dict[str, dict[str, Any]] = {
    "rank 1": {"rank": 1},
    "rank 3": {"rank": 3},
    "rank 16": {"rank": 16},
    "rank 40": {"rank": 40, "channels": 20},
    "clamped": {"least": -0.05},
    "one token": {"tokens": 1},
    "a few channels": {"channels": 5, "hidden": 7},
}


def gate_inputs(
    tokens: int = 50, hidden: int = 33, rank: int = 16, channels: int = 130, strength: float = 1.0, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    inputs = {
        "x": torch.randn(2, tokens, hidden),
        "down": torch.randn(rank, hidden) / hidden**0.5,
        "up": strength * torch.randn(channels, rank) / rank**0.5,
        "bias": torch.randn(channels),
    }
    return inputs, {"normalizer": 16, **options}


def results(
    inputs: dict[str, Tensor], options: dict[str, Any], autocast: bool = False, counted: Tensor | None = None
) -> dict[str, Tensor]:
    """Log-decays, and the gradient of every input by a fixed weighting of them, or of those `counted`."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        out = low_rank_log_decay(**leaves, **options)
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    if counted is not None:
        weighting = weighting * counted
    gradients = torch.autograd.grad((out * weighting).sum(), list(leaves.values()))
    return {"result": out.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_equal_in_float64(inputs: dict[str, Tensor], options: dict[str, Any], changed: dict[str, float] | None = None) -> None:
    tolerances = dict.fromkeys(("x", "down", "up"), HALVED) | (changed or {})
    on_device = {name: x.to(DEVICE) for name, x in inputs.items()}
    expected = results(in_float64({name: x.cpu() for name, x in inputs.items()}), options)
    for name, ours in results(on_device, options).items():
        assert ours.dtype == (torch.float32 if name == "result" else inputs[name].dtype), name
        assert distance(ours.cpu(), expected[name]) < tolerances.get(name, TOLERANCE), name


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels' module, which is taken on a CPU too."""
    pytest.importorskip("triton")
    from statex.kernels.fused import decay_gate

    def kernels(_: str, *tensors: Tensor, module: str) -> Any:
        assert module == "decay_gate"
        return None if any(x.dtype == torch.float64 for x in tensors) else decay_gate

    monkeypatch.setattr(pointwise, "_kernels", kernels)
    return decay_gate


@pytest.fixture
def cut(fused: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Weights are cut for any number of bfloat16 rows."""
    monkeypatch.setattr(fused, "FEW", 0)
    return fused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("fused")
def test_log_decays_and_their_gradients_equal_the_float64_form(kind: str) -> None:
    assert_equal_in_float64(*gate_inputs(**KINDS[kind]))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("cut")
def test_narrow_rows_meet_weights_of_which_no_digit_is_lost(kind: str, dtype: torch.dtype) -> None:
    inputs, options = gate_inputs(**KINDS[kind])
    inputs["x"] = inputs["x"].to(dtype)
    assert_equal_in_float64(inputs, options, {"x": NARROW[dtype]})


@pytest.mark.parametrize("tokens", [1, 32, 33, 70])
@pytest.mark.usefixtures("fused")
def test_few_bfloat16_rows_are_as_exact_as_many(tokens: int) -> None:
    inputs, options = gate_inputs(tokens)
    inputs["x"] = inputs["x"].bfloat16()
    assert_equal_in_float64(inputs, options, {"x": NARROW[torch.bfloat16]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("cut")
def test_gates_of_any_strength_are_exact(dtype: torch.dtype) -> None:
    """Open ones too, number by number: a channel that forgets 1e-8 nats a token forgets 1e-4 over ten thousand."""
    gates = torch.tensor([-200.0, -88.0, -30.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 5.0, 9.0, 17.0, 30.0, 80.0, 200.0])
    inputs = {"x": torch.ones(70, 1, dtype=dtype), "down": torch.ones(1, 1), "up": gates[:, None], "bias": torch.zeros(14)}
    ours = low_rank_log_decay(**{name: x.to(DEVICE) for name, x in inputs.items()}, normalizer=16).cpu()
    expected = low_rank_log_decay(**in_float64(inputs), normalizer=16)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-37)
    strong = results({name: x.to(DEVICE) for name, x in inputs.items()}, {"normalizer": 16})
    assert all(x.isfinite().all() for x in strong.values())


@pytest.mark.usefixtures("fused")
def test_gates_of_mixed_strength_have_the_gradients_of_the_float64_form() -> None:
    assert_equal_in_float64(*gate_inputs(strength=60.0))


@pytest.mark.usefixtures("fused")
def test_a_gate_at_the_bound_passes_its_gradient_and_one_below_it_none() -> None:
    weights = {"down": torch.ones(1, 1), "up": torch.tensor([[-200.0], [-201.0]]), "bias": torch.zeros(2)}
    found = results(
        {name: x.to(DEVICE) for name, x in ({"x": torch.ones(1, 1)} | weights).items()}, {"normalizer": 1, "least": -200.0}
    )
    assert found["result"].tolist() == [[-200.0, -200.0]]
    assert found["bias"][0] != 0
    assert found["bias"][1] == 0


@pytest.mark.usefixtures("cut")
def test_rows_are_shared_out_to_few_programs(monkeypatch: pytest.MonkeyPatch, cut: Any) -> None:
    monkeypatch.setattr(cut, "FORWARD_PROGRAMS", 7)
    monkeypatch.setattr(cut, "BACKWARD_PROGRAMS", 7)
    for dtype in (torch.float32, torch.bfloat16):
        inputs, options = gate_inputs(150)
        inputs["x"] = inputs["x"].to(dtype)
        assert_equal_in_float64(inputs, options, {} if dtype == torch.float32 else {"x": NARROW[dtype]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("cut")
def test_tensors_in_any_memory_layout_are_accepted(dtype: torch.dtype) -> None:
    inputs, options = gate_inputs()
    inputs = {name: x.to(DEVICE, dtype if name == "x" else None) for name, x in inputs.items()}
    expected = low_rank_log_decay(**inputs, **options)
    apart = {name: torch.stack([x, x], -1).flatten(-2)[..., ::2] for name, x in inputs.items()}
    torch.testing.assert_close(low_rank_log_decay(**apart, **options), expected)
    wide = torch.cat([inputs["x"], inputs["x"]], -1)[..., :33]
    torch.testing.assert_close(low_rank_log_decay(**inputs | {"x": wide}, **options), expected)
    transposed = inputs["x"].transpose(0, 1)
    torch.testing.assert_close(low_rank_log_decay(**inputs | {"x": transposed}, **options), expected.transpose(0, 1))
    turned = {name: inputs[name].t().contiguous().t() for name in ("down", "up")}
    torch.testing.assert_close(low_rank_log_decay(**inputs | turned, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", ["x", "down", "up", "bias", "up and bias", "x and down", "none"])
def test_gradients_that_nobody_wants_are_not_made(
    trained: str, dtype: torch.dtype, cut: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, options = gate_inputs()
    inputs = {name: x.to(DEVICE, dtype if name == "x" else None) for name, x in inputs.items()}
    everything, names = results(inputs, options), trained.split(" and ")
    made = []
    kernel = cut.log_decay_gradients

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **flags: made.append((flags["BACK"], flags["SUMMED"])) or kernel[grid](*args, **flags)

    monkeypatch.setattr(cut, "log_decay_gradients", Watched())
    leaves = {name: x.clone().requires_grad_(name in names) for name, x in inputs.items()}
    out = low_rank_log_decay(**leaves, **options)
    assert out.requires_grad == (trained != "none")
    if out.requires_grad:
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
        assert made == [(bool({"x", "down"} & set(names)), bool({"up", "bias"} & set(names)))]
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in names), name
        assert leaf.grad is None or torch.equal(leaf.grad, everything[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["fused", "PyTorch"])
def test_narrow_weights_count_as_they_are_and_get_gradients_of_their_dtype(
    form: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if form == "fused":
        request.getfixturevalue("cut")
    inputs, options = gate_inputs()
    assert_equal_in_float64(
        {name: x.to(dtype) for name, x in inputs.items()}, options, dict.fromkeys(("x", "down", "up", "bias"), NARROW[dtype])
    )


@pytest.mark.parametrize("form", ["fused", "PyTorch"])
def test_autocast_rounds_nothing(form: str, request: pytest.FixtureRequest) -> None:
    if form == "fused":
        request.getfixturevalue("fused")
    inputs, options = gate_inputs()
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    expected = results(inputs, options)
    for name, x in results(inputs, options, autocast=True).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("cut")
def test_the_kernels_gradients_are_not_rounded_by_autocast_around_them(dtype: torch.dtype) -> None:
    inputs, options = gate_inputs()
    inputs = {name: x.to(DEVICE, dtype if name == "x" else None) for name, x in inputs.items()}
    expected = results(inputs, options)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = results(inputs, options)
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


@pytest.mark.parametrize("form", ["fused", "PyTorch"])
@pytest.mark.parametrize("shape", [(0, 33), (2, 0, 33), (33,)], ids=str)
def test_any_number_of_tokens_is_accepted(form: str, shape: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    if form == "fused":
        request.getfixturevalue("fused")
    inputs, options = gate_inputs()
    found = results({name: x.to(DEVICE) for name, x in (inputs | {"x": torch.randn(shape)}).items()}, options)
    assert found["result"].shape == (*shape[:-1], 130)
    assert found["x"].shape == shape
    assert found["up"].any() == (shape == (33,))


def test_a_rank_above_what_the_kernels_hold_takes_the_pytorch_form(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "low_rank_log_decay", None)
    assert_equal_in_float64(*gate_inputs(rank=fused.MOST_RANK + 1))


@pytest.mark.usefixtures("cut")
def test_a_checkpointed_gate_has_the_same_gradients() -> None:
    inputs, options = gate_inputs()
    leaves = [x.to(DEVICE, torch.bfloat16 if name == "x" else None).requires_grad_() for name, x in inputs.items()]

    def summed(*leaves: Tensor) -> Tensor:
        return low_rank_log_decay(*leaves, **options).square().sum()

    expected = torch.autograd.grad(summed(*leaves), leaves)
    found = torch.autograd.grad(checkpoint(summed, *leaves, use_reentrant=False), leaves)
    assert all(map(torch.equal, found, expected))


def test_log_decays_follow_their_equation() -> None:
    inputs, _ = gate_inputs()
    x, down, up, bias = in_float64(inputs).values()
    gates = torch.einsum("bth,rh,cr->btc", x, down, up) + bias
    expected = -torch.log1p(torch.exp(-gates)) / 5
    torch.testing.assert_close(low_rank_log_decay(x, down, up, bias, normalizer=5), expected)
    torch.testing.assert_close(low_rank_log_decay(x, down, up, bias, normalizer=5, least=-0.1), expected.clamp(min=-0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down": torch.zeros(16, 32)}, r"down must be \[rank, 33\], got \[16, 32\]"),
        ({"down": torch.zeros(33)}, r"down must be \[rank, 33\], got \[33\]"),
        ({"up": torch.zeros(130, 15)}, r"up must be \[channels, 16\], got \[130, 15\]"),
        ({"bias": torch.zeros(1)}, r"bias must be \[130\], got \[1\]"),
        ({"x": torch.zeros(2, 5, 33).int()}, r"x must be of a real floating-point dtype, got torch\.int32"),
        ({"up": torch.zeros(130, 16, device="meta")}, "up is on meta and x on cpu: move them to one device"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(changes: dict[str, Tensor], message: str) -> None:
    inputs, options = gate_inputs()
    with pytest.raises(ValueError, match=message):
        low_rank_log_decay(**inputs | changes, **options)


def test_the_kernels_are_taken_on_cuda_devices_where_triton_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from statex.kernels import triton_backend
    from statex.kernels.fused import decay_gate

    called = []
    kernel = decay_gate.low_rank_log_decay
    monkeypatch.setattr(decay_gate, "low_rank_log_decay", lambda *args, **options: called.append(1) or kernel(*args, **options))
    inputs, options = gate_inputs()
    low_rank_log_decay(**{name: x.to(DEVICE) for name, x in inputs.items()}, **options)
    assert len(called) == (DEVICE == "cuda")
    monkeypatch.setattr(triton_backend, "MODULES", {})
    low_rank_log_decay(**{name: x.to(DEVICE) for name, x in inputs.items()}, **options)
    assert len(called) == (DEVICE == "cuda")
