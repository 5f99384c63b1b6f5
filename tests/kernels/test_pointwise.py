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
"""All is computed in float32, so only results are rounded, to 2^-9 or 2^-12; the interpreter cuts bfloat16 off."""

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
    """The output, and the gradient of every input by a fixed weighting of it, which is exact in narrow dtypes."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = call(**leaves, **options)
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
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


RESIDUALS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "no update": (torch.float32, None),
    "an update of its own dtype": (torch.float32, torch.float32),
    "a narrow update": (torch.float32, torch.bfloat16),
    "a wide update": (torch.bfloat16, torch.float32),
    "all narrow": (torch.bfloat16, torch.bfloat16),
}
"""Dtypes of the residual stream and of what is added to it."""


@pytest.mark.parametrize("used", ["both", "sum", "norm"])
@pytest.mark.parametrize("kind", RESIDUALS)
def test_a_fused_residual_norm_and_its_gradients_equal_the_float64_form(kind: str, used: str, fused: list[str]) -> None:
    own, other = RESIDUALS[kind]
    dtype = torch.promote_types(own, other or own)
    x, update, weight = torch.randn(2, 37, 24), torch.randn(2, 37, 24), torch.randn(24)
    inputs = {"x": x.to(own)} | ({} if other is None else {"update": update.to(other)}) | {"weight": weight}
    weights = {"sum": torch.randn(2, 37, 24), "norm": torch.randn(2, 37, 24)}

    def all_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: each.detach().requires_grad_() for name, each in inputs.items()}
        arguments = {"update": None} | leaves
        outputs = dict(zip(("sum", "norm"), pointwise.residual_norm(**arguments, eps=1e-5, dtype=dtype), strict=True))
        loss = sum((each * weights[name].to(each)).sum() for name, each in outputs.items() if used in (name, "both"))
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=used == "sum")
        found = outputs | {f"d{name}": each for name, each in zip(leaves, gradients, strict=True)}
        return {name: each.detach().cpu() for name, each in found.items() if each is not None}

    ours, expected = all_of({name: each.to(DEVICE) for name, each in inputs.items()}), all_of(in_float64(inputs))
    assert ours.keys() == expected.keys()
    for name, each in ours.items():
        rounded = torch.bfloat16 in (dtype, each.dtype)
        assert distance(each, expected[name]) < (NARROW_TOLERANCE[torch.bfloat16] if rounded else TOLERANCE), name
    assert fused
    assert ours["sum"].dtype == dtype
    assert all(ours[f"d{name}"].dtype == each.dtype for name, each in inputs.items() if f"d{name}" in ours)


def test_a_residual_norm_is_the_sum_and_its_norm() -> None:
    x, update, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 12), (5, 12), (12,)))
    total, normed = pointwise.residual_norm(x, update, weight, eps=1e-3)
    torch.testing.assert_close(total, x + update)
    torch.testing.assert_close(normed, F.rms_norm(x + update, (12,), weight, 1e-3))
    total, normed = pointwise.residual_norm(x, None, weight, eps=1e-3, dtype=torch.float32)
    assert torch.equal(total, x)
    torch.testing.assert_close(normed, F.rms_norm(x, (12,), weight, 1e-3).float())


def test_norms_follow_their_equations() -> None:
    x, gate, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 12), (5, 12), (12,)))
    silu = gate * torch.sigmoid(gate)
    behind = F.rms_norm(x.view(5, 3, 4), (4,), eps=1e-3).flatten(1) * weight * silu
    torch.testing.assert_close(pointwise.norm(x, weight, eps=1e-3, groups=3, gate=gate), behind)
    in_front = F.rms_norm((x * silu).view(5, 3, 4), (4,), eps=1e-3).flatten(1) * weight
    torch.testing.assert_close(pointwise.norm(x, weight, eps=1e-3, groups=3, gate=gate, gate_first=True), in_front)


def steps(x: Tensor, bias: Tensor, **limits: float) -> Tensor:
    return pointwise.time_steps(x, bias, **limits)


LIMITS: list[dict[str, float]] = [{}, {"low": 0.3}, {"low": 0.3, "high": 2.0}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_fused_time_steps_and_their_gradients_equal_the_float64_form(
    limits: dict[str, float], dtype: torch.dtype, fused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from statex.kernels.fused import pointwise as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    x, bias = torch.randn(2, 41, 70).to(dtype), torch.randn(70)
    for each, tolerance in ((x, TOLERANCE), (20 * x, TOLERANCE)):
        leaves = {"x": each.to(DEVICE).requires_grad_(), "bias": bias.to(DEVICE).requires_grad_()}
        exact = {name: leaf.detach().cpu().double().requires_grad_() for name, leaf in leaves.items()}
        weights = torch.randn(x.shape)
        ours, expected = steps(**leaves, **limits), steps(**exact, **limits)
        gradients = torch.autograd.grad((ours * weights.to(DEVICE)).sum(), list(leaves.values()))
        wanted = torch.autograd.grad((expected * weights).sum(), list(exact.values()))
        assert ours.dtype == torch.float32
        assert distance(ours.detach().cpu(), expected.detach()) < tolerance
        for name, found, right in zip(leaves, gradients, wanted, strict=True):
            assert found.dtype == leaves[name].dtype
            assert distance(found.cpu(), right) < (tolerance if found.dtype == torch.float32 else NARROW_TOLERANCE[dtype]), name
    assert fused


def test_fused_time_steps_keep_the_digits_of_small_ones(fused: list[str]) -> None:
    x = torch.tensor([[-80.0, -30.0, -9.0, 0.0, 30.0]], device=DEVICE)
    ours = steps(x, torch.zeros(5, device=DEVICE))
    torch.testing.assert_close(ours.cpu().double(), F.softplus(x.cpu().double(), threshold=100), rtol=3e-6, atol=0)


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
    "two taps": {"width": 2, "bias": False, "activation": "sigmoid"},
    "more taps than tokens": {"tokens": 3, "width": 5, "activation": "silu"},
    "packed": {"starts": (0, 1, 3, 16, 20), "activation": "silu"},
    "packed, plain": {"starts": (0, 15), "activation": None},
}


def convolution_inputs(
    tokens: int = 21, width: int = 4, bias: bool = True, starts: tuple[int, ...] | None = None, **options: Any
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


def convolution_in_parts(
    x: Tensor, taps: Tensor, bias: Tensor | None = None, since_start: Tensor | None = None, **options: Any
) -> Tensor:
    since = None if since_start is None else since_start.to(x.device)
    parts = pointwise.short_convolution_parts(x, taps, bias, (5, 2, 3), since, **options)
    assert [part.shape[-1] for part in parts] == [5, 2, 3]
    return torch.cat([parts[0], 2 * parts[2]], -1)  # nothing reads the second part


@pytest.mark.parametrize("kind", ["plain", "activated", "packed"])
def test_a_fused_convolution_cut_into_parts_equals_the_float64_form(kind: str, fused: list[str]) -> None:
    assert_equal_in_float64(convolution_in_parts, *convolution_inputs(**CONVOLUTIONS[kind]))
    assert "convolution" in fused


@pytest.mark.parametrize("dtype", NARROW_TOLERANCE, ids=str)
def test_a_fused_convolution_of_narrow_inputs_rounds_only_its_results(dtype: torch.dtype, fused: list[str]) -> None:
    inputs, options = convolution_inputs(activation="silu")
    assert_equal_in_float64(convolution, inputs, options, NARROW_TOLERANCE[dtype], dtype)
    inputs = {name: x.to(DEVICE, dtype if name == "x" else None) for name, x in inputs.items()}
    expected, ours = results(convolution, in_float64(inputs), options), results(convolution, inputs, options)
    for name in ("taps", "bias"):  # in float32, so that their gradients tell what was rounded on the way
        assert distance(ours[name], expected[name]) < TOLERANCE, name


STRETCHED: dict[str, dict[str, Any]] = {
    "whole": {"tokens": 24, "activation": "silu"},
    "the last of one token": {"tokens": 17, "width": 8, "activation": "silu"},
    "borders at and around those of sequences": {"starts": (0, 7, 8, 17), "activation": "silu"},
    "sequences longer than two": {"starts": (0, 2), "activation": None},
}


@pytest.mark.parametrize("kind", STRETCHED)
def test_a_fused_convolution_cuts_time_into_stretches(kind: str, fused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from statex.kernels.fused import convolution as kernels

    monkeypatch.setattr(kernels, "STRETCHES", (8, 8))
    assert_equal_in_float64(convolution, *convolution_inputs(**STRETCHED[kind]))


def test_stretches_get_shorter_where_there_are_few_programs() -> None:
    kernels = pytest.importorskip("statex.kernels.fused.convolution")
    longest, shortest = kernels.STRETCHES
    assert kernels.stretch(16, 4096, 8192) == longest
    assert kernels.stretch(1, 4096, 8192) == longest // 4
    assert kernels.stretch(1, 5, 8192) == shortest >= kernels.MOST_TAPS


@pytest.mark.parametrize("shape", [(0, 5, 10), (2, 0, 10), (2, 5, 0)], ids=str)
def test_a_fused_convolution_of_nothing_has_gradients_of_zero(shape: tuple[int, ...], fused: list[str]) -> None:
    inputs = {"x": torch.randn(shape), "taps": torch.randn(shape[-1], 4), "bias": torch.randn(shape[-1])}
    found = results(convolution, {name: x.to(DEVICE) for name, x in inputs.items()}, {"activation": "silu"})
    assert found["result"].shape == found["x"].shape == shape
    assert not found["taps"].any()
    assert not found["bias"].any()


@pytest.mark.parametrize("kind", [kind for kind, options in CONVOLUTIONS.items() if "starts" not in options])
def test_a_convolution_equals_torchs(kind: str) -> None:
    inputs, options = convolution_inputs(**CONVOLUTIONS[kind])
    x, taps = inputs["x"], inputs["taps"]
    width = taps.shape[1]
    expected = F.conv1d(F.pad(x.mT, (width - 1, 0)), taps[:, None], inputs.get("bias"), groups=10).mT
    if options["activation"]:
        expected = getattr(F, options["activation"])(expected)
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
        assert distance(call(x, **arguments), call(x.contiguous(), **arguments)) < TOLERANCE  # strides may be compiled in
    assert torch.equal(pointwise.gated_product(gate, x, "silu"), pointwise.gated_product(gate.contiguous(), x.contiguous(), "silu"))
    weight, close = torch.ones(16, device=DEVICE), gate.contiguous()
    sums = (pointwise.residual_norm(*each, weight, eps=1e-5) for each in ((x, close), (close, x)))
    assert all(map(torch.equal, *sums))


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
