"""Norms, gates and short convolutions: Triton's one-pass kernels against the PyTorch forms in float64, these against closed forms.

In Triton's interpreter on a CPU, or as they are on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from statex.kernels import pointwise
from tests.kernels.inputs import distance, in_float64

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-6
"""float32, and sums over less than 100 numbers."""

NARROW_TOLERANCE = {torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3, torch.float16: 1e-3}
"""All is computed in float32, so only results are rounded, to 2^-9 or 2^-12; the interpreter cuts bfloat16 off where a GPU rounds.
A convolution's gradient in front of its activation is rounded too."""

NORMS: dict[str, dict[str, Any]] = {
    "plain": {"weight": None},
    "weighted": {},
    "in groups": {"groups": 3},
    "in groups that share a weight": {"groups": 3, "weight": "shared"},
    "gated behind": {"gated": True, "groups": 2},
    "gated behind, without weight": {"gated": True, "weight": None},
    "gated in front": {"gated": True, "gate_first": True, "groups": 2},
    "gated by silu's other name": {"gated": True, "activation": "swish"},
    "gated by a sigmoid": {"gated": True, "activation": "sigmoid", "groups": 2, "weight": "shared"},
    "gated by what comes activated": {"gated": True, "activation": None},
}


def norm_inputs(
    rows: int = 7, channels: int = 66, groups: int = 1, weight: str | None = "full", gated: bool = False, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    inputs = {"x": torch.randn(2, rows, channels)}
    if weight is not None:
        inputs["weight"] = torch.randn(channels // groups if weight == "shared" else channels)
    if gated:
        inputs["gate"] = torch.randn(2, rows, channels)
    return inputs, {"groups": groups, "eps": 1e-5, **options}


def norm(x: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    return pointwise.norm(x, weight, **options)


def results(call: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """The output, and the gradient of every input by a fixed weighting of it."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = call(**leaves, **options)
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad((out * weighting).sum(), list(leaves.values()))
    return {"result": out.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels, on a CPU too; the list names the modules that were asked for."""
    pytest.importorskip("triton")
    from statex.kernels import triton_backend

    asked: list[str] = []

    def kernels(activation: str | None, *tensors: Tensor | None, module: str = "pointwise") -> Any:
        asked.append(module)
        narrow = all(x is None or x.dtype != torch.float64 for x in tensors)
        return triton_backend.MODULES[module] if narrow else None

    monkeypatch.setattr(pointwise, "_kernels", kernels)
    return asked


def assert_equal_in_float64(
    call: Any, inputs: dict[str, Tensor], options: dict[str, Any], tolerance: float = TOLERANCE, dtype: torch.dtype = torch.float32
) -> None:
    on_device = {name: x.to(DEVICE, dtype) for name, x in inputs.items()}
    expected = results(call, in_float64({name: x.cpu() for name, x in on_device.items()}), options)
    for name, ours in results(call, on_device, options).items():
        assert ours.dtype == dtype, name
        assert distance(ours.cpu(), expected[name]) < tolerance, name


@pytest.mark.parametrize("kind", NORMS)
def test_a_fused_norm_and_its_gradients_equal_the_float64_form(kind: str, fused: list[str]) -> None:
    assert_equal_in_float64(norm, *norm_inputs(**NORMS[kind]))
    assert fused


@pytest.mark.parametrize("dtype", NARROW_TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["weighted", "gated behind", "gated in front"])
def test_a_fused_norm_of_narrow_inputs_rounds_only_its_results(kind: str, dtype: torch.dtype, fused: list[str]) -> None:
    assert_equal_in_float64(norm, *norm_inputs(**NORMS[kind]), NARROW_TOLERANCE[dtype], dtype)


@pytest.mark.parametrize("sizes", [(1, 12), (300, 16), (3, 1000), (0, 8)], ids=str)
def test_a_fused_norm_takes_any_number_of_rows_and_channels(sizes: tuple[int, int], fused: list[str]) -> None:
    inputs, options = norm_inputs(*sizes, gated=True, groups=2)
    if sizes[0]:
        assert_equal_in_float64(norm, inputs, options)
    else:
        assert results(norm, inputs, options)["weight"].eq(0).all()


def test_a_fused_norm_shares_rows_out_to_few_programs(fused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from statex.kernels.fused import pointwise as kernels

    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    assert_equal_in_float64(norm, *norm_inputs(50, 16, groups=2, gated=True))


def test_a_norm_returns_the_dtype_that_is_asked_for(fused: list[str]) -> None:
    inputs, options = norm_inputs()
    wide = norm(**{name: x.to(DEVICE) for name, x in inputs.items()}, **options)
    narrow = norm(**{name: x.to(DEVICE) for name, x in inputs.items()}, **options, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert distance(narrow.float(), wide) < 8e-3


def test_norms_follow_their_equations() -> None:
    x, gate, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 12), (5, 12), (12,)))
    silu = gate * torch.sigmoid(gate)
    behind = F.rms_norm(x.view(5, 3, 4), (4,), eps=1e-3).flatten(1) * weight * silu
    torch.testing.assert_close(pointwise.norm(x, weight, eps=1e-3, groups=3, gate=gate), behind)
    in_front = F.rms_norm((x * silu).view(5, 3, 4), (4,), eps=1e-3).flatten(1) * weight
    torch.testing.assert_close(pointwise.norm(x, weight, eps=1e-3, groups=3, gate=gate, gate_first=True), in_front)


@pytest.mark.parametrize("activation", ["silu", "sigmoid", "identity"])
def test_a_fused_gated_product_and_its_gradients_equal_the_float64_form(activation: str, fused: list[str]) -> None:
    inputs = {"gate": torch.randn(2, 5, 1100), "up": torch.randn(2, 5, 1100)}
    assert_equal_in_float64(pointwise.gated_product, inputs, {"activation": activation})


def test_any_activation_of_transformers_gates_a_product() -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(pointwise.gated_product(gate, up, "gelu"), F.gelu(gate) * up)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"bias": False, "activation": None},
    "activated": {"activation": "silu"},
    "one tap": {"width": 1, "activation": "silu"},
    "more taps than tokens": {"tokens": 3, "width": 5, "activation": "silu"},
    "packed": {"starts": (0, 1, 3, 40, 69), "activation": "silu"},
    "packed, plain": {"starts": (0, 33), "activation": None},
}


def convolution_inputs(
    tokens: int = 70, width: int = 4, bias: bool = True, starts: tuple[int, ...] | None = None, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    inputs = {"x": torch.randn(2, tokens, 10), "taps": torch.randn(10, width)}
    if bias:
        inputs["bias"] = torch.randn(10)
    if starts is not None:
        since = torch.arange(tokens) - torch.tensor([max(s for s in starts if s <= t) for t in range(tokens)])
        options["since_start"] = since.to(DEVICE)
    return inputs, options


def convolution(x: Tensor, taps: Tensor, bias: Tensor | None = None, since_start: Tensor | None = None, **options: Any) -> Tensor:
    since = None if since_start is None else since_start.to(x.device)
    return pointwise.short_convolution(x, taps, bias, since, **options)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_fused_convolution_and_its_gradients_equal_the_float64_form(kind: str, fused: list[str]) -> None:
    assert_equal_in_float64(convolution, *convolution_inputs(**CONVOLUTIONS[kind]))
    assert "convolution" in fused


@pytest.mark.parametrize("dtype", NARROW_TOLERANCE, ids=str)
def test_a_fused_convolution_of_narrow_inputs_rounds_little(dtype: torch.dtype, fused: list[str]) -> None:
    assert_equal_in_float64(convolution, *convolution_inputs(activation="silu"), NARROW_TOLERANCE[dtype], dtype)


def test_a_fused_convolution_shares_tokens_out_to_few_programs(fused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from statex.kernels.fused import convolution as kernels

    monkeypatch.setattr(kernels, "ROWS", 8)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    assert_equal_in_float64(convolution, *convolution_inputs(activation="silu", starts=(0, 20)))


@pytest.mark.parametrize("kind", [kind for kind, options in CONVOLUTIONS.items() if "starts" not in options])
def test_a_convolution_equals_torchs(kind: str) -> None:
    inputs, options = convolution_inputs(**CONVOLUTIONS[kind])
    x, taps = inputs["x"], inputs["taps"]
    width = taps.shape[1]
    expected = F.conv1d(F.pad(x.mT, (width - 1, 0)), taps[:, None], inputs.get("bias"), groups=10).mT
    if options["activation"]:
        expected = F.silu(expected)
    torch.testing.assert_close(convolution(**inputs, **options), expected)


@pytest.mark.parametrize("form", ["fused", "PyTorch"])
@pytest.mark.parametrize("kind", [kind for kind, options in CONVOLUTIONS.items() if "starts" not in options])
def test_a_convolution_token_by_token_equals_all_at_once(kind: str, form: str, request: pytest.FixtureRequest) -> None:
    asked = request.getfixturevalue("fused") if form == "fused" else []
    inputs, options = convolution_inputs(**CONVOLUTIONS[kind])
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    x, taps = inputs.pop("x"), inputs.pop("taps")
    rest, width = inputs, taps.shape[1]
    # Channels of a wider row, and a state whose tokens lie apart, as a row's last tokens do.
    x, state = torch.stack([x, x], -2).flatten(2)[..., :10], torch.zeros(2, width - 1, 10, device=DEVICE).mT
    place = state.data_ptr()
    tokens = [pointwise.short_convolution_step(row, state, taps, rest.get("bias"), options["activation"]) for row in x.unbind(1)]
    assert distance(torch.stack(tokens, 1), convolution(x.double(), **in_float64({"taps": taps} | rest), **options)) < TOLERANCE
    recent = F.pad(x, (0, 0, width - 1, 0)).mT[..., x.shape[1] :]
    assert torch.equal(state, recent)
    assert state.data_ptr() == place
    assert ("convolution" in asked) == (form == "fused")


def test_slices_of_wider_rows_are_taken_as_they_are(fused: list[str]) -> None:
    wide = torch.randn(2, 9, 40, device=DEVICE)
    x, gate = wide[..., :16], wide[..., 20:36]
    for call, arguments in (
        (pointwise.norm, {"weight": None, "eps": 1e-5, "gate": gate}),
        (pointwise.short_convolution, {"taps": torch.randn(16, 4, device=DEVICE), "bias": None}),
    ):
        assert torch.equal(call(x, **arguments), call(x.contiguous(), **arguments))
    assert torch.equal(pointwise.gated_product(gate, x, "silu"), pointwise.gated_product(gate.contiguous(), x.contiguous(), "silu"))


def test_weights_and_borders_in_any_memory_layout_are_accepted(fused: list[str]) -> None:
    x, wide = torch.randn(1, 9, 16, device=DEVICE), torch.randn(16, 8, device=DEVICE)
    since = torch.arange(9, device=DEVICE).repeat_interleave(2)[::2]
    apart = {"weight": wide[:, 0], "taps": wide[:, ::2], "bias": wide[:, 1], "since_start": since}
    close = {name: each.contiguous() for name, each in apart.items()}
    for call, names, options in (
        (pointwise.norm, ("weight",), {"eps": 1e-5}),
        (pointwise.short_convolution, ("taps", "bias", "since_start"), {}),
    ):
        expected = call(x, **{name: close[name] for name in names}, **options)
        assert torch.equal(call(x, **{name: apart[name] for name in names}, **options), expected)
