"""Which calls go to the Triton kernels, and that these run on the device of their tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from statex.kernels import pointwise, triton_backend
from tests.kernels.test_bad_inputs import CALLS

pytest.importorskip("triton")

from statex.kernels.fused import convolution, layout
from statex.kernels.fused import pointwise as fused_pointwise

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
OPTIONS: dict[str, dict[str, Any]] = {
    name: {"backend": "triton"} for name in ("gla", "ssd", "delta rule", "selective scan", "hgrn")
}


def first_result(name: str, device: str) -> Tensor:
    torch.manual_seed(0)
    call, make = CALLS[name]
    inputs = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in make().items()}
    result = call(**inputs, **OPTIONS.get(name, {}))
    return result[0] if isinstance(result, tuple) else result


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations that choose their kernels by device take Triton's on any."""
    monkeypatch.setattr(pointwise, "_kernels", lambda *_, module="pointwise": triton_backend.MODULES[module])
    for where in ("statex.kernels.step", "statex.kernels.triton_backend"):
        monkeypatch.setattr(f"{where}.step_kernel", lambda _, name="step": triton_backend.MODULES[name])


@ON_CPU
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("fused")
def test_a_call_makes_the_device_of_its_tensors_current(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        asked.append(x.device)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    first_result(name, "cpu")
    assert asked == [torch.device("cpu")]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", CALLS)
def test_a_second_gpu_computes_the_same_while_the_first_is_current(name: str) -> None:
    expected, found = first_result(name, "cuda:0"), first_result(name, "cuda:1")
    assert found.device == torch.device("cuda:1")
    assert torch.equal(found.cpu(), expected.cpu())


@pytest.mark.parametrize(
    ("device", "dtype", "shared_memory", "backend"),
    [
        ("cuda", torch.bfloat16, 1 << 20, "triton"),
        ("cuda", torch.bfloat16, 48 << 10, "chunked"),
        ("cuda", torch.float64, 1 << 20, "chunked"),
        ("cpu", torch.bfloat16, 1 << 20, "chunked"),
    ],
)
def test_auto_takes_triton_on_cuda_devices_that_can(
    device: str, dtype: torch.dtype, shared_memory: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_backend, "_shared_memory", lambda _: shared_memory)
    with FakeTensorMode():
        x = torch.empty(1, 2, 3, 4, dtype=dtype, device=device)
    for obstacle in (lambda: triton_backend.why_not(x), lambda: triton_backend.why_no_delta_rule(x, x)):
        assert triton_backend.chosen("auto", ("chunked", "triton"), x, obstacle) == backend


@pytest.mark.parametrize(
    ("devices", "dtype", "activation", "fused"),
    [
        (("cuda", "cuda"), torch.bfloat16, "silu", True),
        (("cuda", "cuda"), torch.float32, "identity", True),
        (("cuda", "cuda"), torch.float16, "gelu", False),
        (("cuda", "cuda"), torch.float64, "silu", False),
        (("cpu", "cpu"), torch.float32, "silu", False),
    ],
)
def test_norms_gates_and_convolutions_are_fused_where_the_kernels_take_them(
    devices: tuple[str, str], dtype: torch.dtype, activation: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeTensorMode():
        tensors = [torch.empty(4, dtype=dtype, device=device) for device in devices]
    assert pointwise._kernels(activation, tensors[0], None, tensors[1]) is (fused_pointwise if fused else None)
    assert pointwise._kernels(activation, *tensors, module="convolution") is (convolution if fused else None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert pointwise._kernels(activation, *tensors) is None


def test_nothing_is_launched_for_empty_tensors() -> None:
    with FakeTensorMode():
        x = torch.empty(0, 4, device="cuda")
    assert pointwise._kernels("silu", x) is None
    assert triton_backend.step_kernel(x) is None


def test_rows_and_taps_beyond_what_the_kernels_hold_take_the_pytorch_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("launched")

    monkeypatch.setattr(pointwise, "_kernels", lambda *_, module="pointwise": triton_backend.MODULES[module])
    monkeypatch.setattr(fused_pointwise, "norm", refuse)
    monkeypatch.setattr(convolution, "short_convolution", refuse)
    channels = fused_pointwise.LONGEST_ROW + 1
    assert pointwise.norm(torch.randn(2, channels), None, eps=1e-5).shape == (2, channels)
    taps = torch.randn(3, convolution.MOST_TAPS + 1)
    assert pointwise.short_convolution(torch.randn(1, 5, 3), taps, None).shape == (1, 5, 3)
    with pytest.raises(AssertionError, match="launched"):
        pointwise.norm(torch.randn(2, channels - 1), None, eps=1e-5)
    with pytest.raises(AssertionError, match="launched"):
        pointwise.short_convolution(torch.randn(1, 5, 3), taps[:, 1:], None)


@pytest.mark.parametrize("name", [name for name in CALLS if name.endswith("step") or name == "short convolution"])
@pytest.mark.usefixtures("fused")
def test_a_batch_beyond_one_grid_is_refused_before_a_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "PROGRAMS", 1)
    with pytest.raises(ValueError, match="split the batch"):
        first_result(name, "cpu")
