"""Every mistake ends in a message that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from statex.kernels import (
    delta_rule,
    delta_rule_step,
    gla,
    gla_step,
    hgrn,
    lift,
    selective_scan,
    selective_scan_step,
    ssd,
    ssd_step,
)
from statex.kernels.pointwise import (
    gated_product,
    norm,
    residual_norm,
    short_convolution,
    short_convolution_parts,
    short_convolution_step,
    time_steps,
)
from tests.kernels.delta_inputs import delta_inputs
from tests.kernels.inputs import gla_inputs, ssd_inputs
from tests.kernels.test_scans import hgrn_inputs, scan_inputs

GLA_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "three dimensions": ({"k": torch.zeros(2, 8, 6)}, r"k must be \[B, T, H, D\], got \[2, 8, 6\]"),
    "shorter values": ({"v": torch.zeros(2, 7, 2, 10)}, r"v must be \[2, 8, 2, 10\], got \[2, 7, 2, 10\]"),
    "scalar decays": ({"log_decay": torch.zeros(2, 8, 2, 1)}, r"log_decay must be \[2, 8, 2, 6\]"),
    "query heads": ({"q": torch.zeros(2, 8, 3, 6)}, "3 query heads cannot share 2 key heads"),
    "growing": ({"log_decay": torch.full((2, 8, 2, 6), 0.1)}, "log_decay must be at most 0"),
    "mixing rows": ({"mixing": torch.zeros(2, 3, 2)}, r"mixing must be \[2, 2, 2\] or \[2, 6, 2\]"),
    "mixing blocks": ({"mixing": torch.zeros(2, 6, 4)}, "4 blocks, which do not divide K = 6 and V = 10"),
    "gamma heads": ({"lift_gamma": torch.zeros(1, 6)}, r"lift_gamma must be \[2 query heads, a multiple of 6\]"),
    "gamma length": ({"lift_gamma": torch.zeros(2, 7)}, r"a multiple of 6\], got \[2, 7\]"),
    "state of the unlifted key": ({"lift_gamma": torch.zeros(2, 6)}, r"initial_state must be \[2, 2, 12, 10\]"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 8])}, "the batch is 2"),
    "spectrum": ({"spectrum": torch.zeros(2, 5)}, r"spectrum must be \[2, 6\], got \[2, 5\]"),
}
SSD_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "groups": ({name: torch.zeros(2, 8, 3, 6) for name in ("B", "C")}, "4 heads cannot share 3 groups"),
    "C differs": ({"C": torch.zeros(2, 8, 2, 5)}, r"C must be \[2, 8, 2, 6\]"),
    "dt": ({"dt": torch.zeros(2, 8, 4, 1)}, r"dt must be \[2, 8, 4\]"),
    "growing": ({"A": torch.ones(4)}, "A must be at most 0"),
    "dt before softplus": ({"dt": torch.full((2, 8, 4), -1.0)}, "dt must be at least 0"),
    "D": ({"D": torch.zeros(4, 10)}, r"D must be \[4\]"),
    "state": ({"initial_state": torch.zeros(2, 4, 10, 6)}, r"initial_state must be \[2, 4, 6, 10\]"),
}

RECURRENCES = ("gla", "ssd", "delta rule", "selective scan", "hgrn")

Call = tuple[Callable[..., Any], Callable[[], dict[str, Any]]]
CALLS: dict[str, Call] = {
    "gla": (gla, lambda: gla_inputs(8, mixing="channel", lift=2) | {"scale": 1.0}),
    "ssd": (ssd, lambda: ssd_inputs(8, lift=2)),
    "delta rule": (delta_rule, lambda: delta_inputs(8) | {"scale": 1.0}),
    "selective scan": (selective_scan, lambda: scan_inputs(8, lift=2, signed=True)),
    "hgrn": (hgrn, lambda: hgrn_inputs(8)),
    "gla step": (gla_step, lambda: step_inputs(gla_inputs(1, mixing="channel", lift=2)) | {"scale": 1.0}),
    "ssd step": (ssd_step, lambda: step_inputs(ssd_inputs(1, lift=2))),
    "delta rule step": (delta_rule_step, lambda: step_inputs(delta_inputs(1)) | {"scale": 1.0}),
    "selective scan step": (selective_scan_step, lambda: step_inputs(scan_inputs(1, lift=2, signed=True))),
    "time steps": (time_steps, lambda: {"x": torch.zeros(2, 6), "bias": torch.zeros(6)}),
    "residual_norm": (
        residual_norm, lambda: {"x": torch.zeros(2, 6), "update": torch.zeros(2, 6), "weight": torch.zeros(6), "eps": 1e-5}
    ),
    "norm": (norm, lambda: {"x": torch.zeros(2, 6), "weight": torch.zeros(6), "gate": torch.zeros(2, 6), "groups": 2, "eps": 1e-5}),
    "gated product": (gated_product, lambda: {"gate": torch.zeros(2, 6), "up": torch.zeros(2, 6), "activation": None}),
    "short convolution": (
        short_convolution,
        lambda: {
            "x": torch.zeros(2, 5, 6), "taps": torch.zeros(6, 4), "bias": torch.zeros(6),
            "since_start": torch.arange(5),
        },
    ),
    "short convolution parts": (
        short_convolution_parts, lambda: {"x": torch.zeros(2, 5, 6), "taps": torch.zeros(6, 4), "bias": None, "sizes": (2, 4)}
    ),
    "short convolution step": (
        short_convolution_step,
        lambda: {"x": torch.zeros(2, 6), "state": torch.zeros(2, 6, 3), "taps": torch.zeros(6, 4), "bias": torch.zeros(6)},
    ),
}  # fmt: skip


EMPTY: list[tuple[str, dict[str, Any], str]] = [
    ("gla", {name: torch.zeros(2, 8, 2, 0) for name in ("q", "k", "log_decay")}, "K = 0"),
    ("gla", {name: torch.zeros(2, 8, 0, 6) for name in ("k", "v", "log_decay")}, "H = 0"),
    ("gla", {"q": torch.zeros(2, 8, 0, 6)}, "Hq = 0"),
    ("gla", {"v": torch.zeros(2, 8, 2, 0)}, "V = 0"),
    ("gla", {"mixing": torch.zeros(2, 6, 0)}, "f = 0"),
    ("ssd", {name: torch.zeros(2, 8, 0, 6) for name in ("B", "C")}, "G = 0"),
    ("ssd", {name: torch.zeros(2, 8, 2, 0) for name in ("B", "C")}, "N = 0"),
    ("ssd", {"x": torch.zeros(2, 8, 0, 10)}, "H = 0"),
    ("ssd", {"x": torch.zeros(2, 8, 4, 0)}, "P = 0"),
    ("delta rule", {name: torch.zeros(2, 8, 2, 0) for name in ("q", "k")}, "K = 0"),
    ("delta rule", {"k": torch.zeros(2, 8, 0, 6)}, "Hk = 0"),
    ("delta rule", {"q": torch.zeros(2, 8, 0, 6)}, "Hq = 0"),
    ("delta rule", {"v": torch.zeros(2, 8, 0, 10)}, "H = 0"),
    ("delta rule", {"v": torch.zeros(2, 8, 2, 0)}, "V = 0"),
    ("selective scan", {"x": torch.zeros(2, 8, 0)}, "I = 0"),
    ("selective scan", {name: torch.zeros(2, 8, 0) for name in ("B", "C")}, "N = 0"),
    ("hgrn", {name: torch.zeros(2, 8, 0) for name in ("x", "log_decay")}, "D = 0"),
    ("gla step", {"k": torch.zeros(2, 0, 6)}, "H = 0"),
    ("ssd step", {name: torch.zeros(2, 0, 6) for name in ("B", "C")}, "G = 0"),
    ("delta rule step", {"k": torch.zeros(2, 0, 6)}, "Hk = 0"),
    ("selective scan step", {name: torch.zeros(2, 0) for name in ("B", "C")}, "N = 0"),
]


def step_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of one token, from rows of one token."""
    rows = ("q", "k", "v", "beta", "log_decay", "x", "dt", "B", "C")
    state = inputs.pop("initial_state")
    return {name: x[:, 0] if name in rows else x for name, x in inputs.items()} | {"state": state}


FITTING: list[tuple[str, dict[str, Any], str]] = [
    ("gla step", {"q": torch.zeros(2, 2, 5)}, r"q must be \[2, 2, 6\], got \[2, 2, 5\]"),
    ("gla step", {"q": torch.zeros(2, 3, 6)}, "3 query heads cannot share 2 key heads"),
    ("gla step", {"k": torch.zeros(2, 1, 2, 6)}, r"k must be \[B, H, D\], got \[2, 1, 2, 6\]"),
    ("gla step", {"v": torch.zeros(1, 2, 10)}, r"v must be \[2, 2, 10\]"),
    ("gla step", {"log_decay": torch.zeros(2, 2, 1)}, r"log_decay must be \[2, 2, 6\]"),
    ("gla step", {"lift_gamma": torch.zeros(1, 6)}, r"lift_gamma must be \[2 query heads, a multiple of 6\]"),
    ("gla step", {"lift_gamma": None}, r"state must be \[2, 2, 6, 10\], got \[2, 2, 12, 10\]"),
    ("gla step", {"mixing": torch.zeros(1, 6, 2)}, r"mixing must be \[2, 2, 2\] or \[2, 6, 2\]"),
    ("gla step", {"spectrum": torch.zeros(2, 1)}, r"spectrum must be \[2, 6\]"),
    ("ssd step", {"x": torch.zeros(2, 4)}, r"x must be \[B, H, D\]"),
    ("ssd step", {"dt": torch.zeros(2, 4, 1)}, r"dt must be \[2, 4\]"),
    ("ssd step", {"A": torch.zeros(3)}, r"A must be \[4\]"),
    ("ssd step", {"C": torch.zeros(2, 2, 5)}, r"C must be \[2, 2, 6\]"),
    ("ssd step", {"D": torch.zeros(1)}, r"D must be \[4\]"),
    ("ssd step", {"spectrum": torch.zeros(1)}, r"spectrum must be \[4\]"),
    ("ssd step", {"lift_gamma": torch.zeros(4, 6)}, r"lift_gamma must be \[2 groups, a multiple of 6\]"),
    ("ssd step", {"state": torch.zeros(2, 4, 6, 10)}, r"state must be \[2, 4, 12, 10\]"),
    ("delta rule step", {"q": torch.zeros(2, 2, 5)}, r"q must be \[2, 2, 6\], got \[2, 2, 5\]"),
    ("delta rule step", {"k": torch.zeros(2, 1, 2, 6)}, r"k must be \[B, H, D\], got \[2, 1, 2, 6\]"),
    ("delta rule step", {"q": torch.zeros(2, 3, 6), "k": torch.zeros(2, 3, 6)}, "2 value heads cannot share 3 key heads"),
    ("delta rule step", {"q": torch.zeros(2, 3, 6)}, "2 key heads cannot share 3 query heads"),
    ("delta rule step", {"beta": torch.zeros(2, 1)}, r"beta must be \[2, 2\]"),
    ("delta rule step", {"log_decay": torch.zeros(2, 2, 6)}, r"log_decay must be \[2, 2\]"),
    ("delta rule step", {"state": torch.zeros(2, 2, 10, 6)}, r"state must be \[2, 2, 6, 10\]"),
    ("selective scan step", {"x": torch.zeros(2, 1, 6)}, r"x must be \[B, D\]"),
    ("selective scan step", {"B": torch.zeros(2, 1, 4)}, r"B must be \[B, D\]"),
    ("selective scan step", {"dt": torch.zeros(2, 1)}, r"dt must be \[2, 6\]"),
    ("selective scan step", {"A": torch.zeros(4, 6)}, r"A must be \[6, 4\]"),
    ("selective scan step", {"C": torch.zeros(2, 5)}, r"C must be \[2, 4\]"),
    ("selective scan step", {"D": torch.zeros(1)}, r"D must be \[6\]"),
    ("selective scan step", {"spectrum": torch.zeros(1)}, r"spectrum must be \[6\]"),
    ("selective scan step", {"lift_gamma": torch.zeros(2, 4)}, r"lift_gamma must be \[1 group, a multiple of 4\]"),
    ("selective scan step", {"lift_gamma": None}, r"state must be \[2, 1, 4, 6\], got \[2, 1, 8, 6\]"),
    ("time steps", {"bias": torch.zeros(1)}, r"bias must be \[6\], got \[1\]"),
    ("residual_norm", {"weight": torch.zeros(3)}, r"weight must be \[6\], got \[3\]"),
    ("residual_norm", {"update": torch.zeros(1, 6)}, r"update must be \[2, 6\], got \[1, 6\]"),
    ("norm", {"groups": 4}, "4 groups do not divide 6 channels"),
    ("norm", {"groups": 0}, "0 groups do not divide 6 channels"),
    ("norm", {"weight": torch.zeros(2)}, r"weight must be \[6\] or \[3\], got \[2\]"),
    ("norm", {"gate": torch.zeros(2, 3)}, r"gate must be \[2, 6\], got \[2, 3\]"),
    ("gated product", {"gate": torch.zeros(1, 6)}, r"gate must be \[2, 6\], got \[1, 6\]"),
    ("short convolution", {"x": torch.zeros(5, 6)}, r"x must be \[B, T, channels\]"),
    ("short convolution", {"taps": torch.zeros(4, 6)}, r"taps must be \[6, width\], got \[4, 6\]"),
    ("short convolution parts", {"sizes": (2, 3)}, r"sizes must add up to 6 channels, got \(2, 3\)"),
    ("short convolution", {"bias": torch.zeros(1)}, r"bias must be \[6\]"),
    ("short convolution", {"since_start": torch.arange(2)}, r"since_start must be \[5\]"),
    ("short convolution step", {"x": torch.zeros(2, 1, 6)}, r"x must be \[B, channels\], got \[2, 1, 6\]"),
    ("short convolution step", {"taps": torch.zeros(4, 6)}, r"taps must be \[6, width\], got \[4, 6\]"),
    ("short convolution step", {"bias": torch.zeros(1)}, r"bias must be \[6\]"),
    ("short convolution step", {"state": torch.zeros(2, 6, 4)}, r"state must be \[2, 6, 3\], got \[2, 6, 4\]"),
    ("short convolution step", {"state": torch.zeros(2, 6, 3).half()}, "state is torch.float16 and x torch.float32"),
]


@pytest.mark.parametrize("mistake", GLA_MISTAKES)
def test_gla_names_the_mistake(mistake: str) -> None:
    changes, message = GLA_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        gla(**(gla_inputs(8) | {"scale": 1.0} | changes))


@pytest.mark.parametrize("mistake", SSD_MISTAKES)
def test_ssd_names_the_mistake(mistake: str) -> None:
    changes, message = SSD_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        ssd(**(ssd_inputs(8) | changes))


@pytest.mark.parametrize(("name", "changes", "message"), FITTING)
def test_tensors_that_do_not_fit_together_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    call, make = CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(**make() | changes)


@pytest.mark.parametrize("name", CALLS)
def test_every_tensor_must_lie_on_the_device_of_the_first(name: str) -> None:
    call, make = CALLS[name]
    first, *others = (key for key, x in make().items() if isinstance(x, torch.Tensor))
    for key in others:
        inputs = make()
        inputs[key] = inputs[key].to("meta")
        with pytest.raises(ValueError, match=f"{key} is on meta and {first} on cpu: move them to one device"):
            call(**inputs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_every_tensor_must_be_of_real_floating_point(name: str, dtype: torch.dtype) -> None:
    call, make = CALLS[name]
    for key in (key for key, x in make().items() if isinstance(x, torch.Tensor) and x.is_floating_point()):
        inputs = make()
        inputs[key] = inputs[key].to(dtype)
        with pytest.raises(ValueError, match=f"^{key} must be of a real floating-point dtype, got {dtype}"):
            call(**inputs)


def test_features_of_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x must be of a real floating-point dtype, got torch\.int64"):
        lift(torch.arange(6), 2)


@pytest.mark.parametrize(("name", "changes", "size"), EMPTY)
def test_sizes_other_than_batch_and_tokens_must_be_positive(name: str, changes: dict[str, Any], size: str) -> None:
    call, make = CALLS[name]
    with pytest.raises(ValueError, match=f"sizes must be positive, got {size}"):
        call(**make() | changes)


@pytest.mark.parametrize("name", RECURRENCES)
def test_borders_must_be_a_tensor(name: str) -> None:
    call, make = CALLS[name]
    with pytest.raises(ValueError, match="cu_seqlens must be a tensor, got a list"):
        call(**make(), cu_seqlens=[0, 8])


@pytest.mark.parametrize("name", RECURRENCES)
def test_an_unknown_backend_is_answered_with_those_there_are(name: str) -> None:
    call, make = CALLS[name]
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose one of auto, reference, chunked, triton"):
        call(**make(), backend="cuda")


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        (torch.tensor([0, 7]), "cu_seqlens must run from 0 to T = 8, got 0 to 7"),
        (torch.tensor([1, 8]), "got 1 to 8"),
        (torch.tensor([0, 5, 3, 8]), "cu_seqlens must not fall"),
        (torch.tensor([0.0, 8.0]), "at least two integers"),
        (torch.tensor([8]), "at least two integers"),
    ],
)
def test_borders_must_rise_from_zero_to_the_end(borders: torch.Tensor, message: str) -> None:
    inputs = gla_inputs(8, batch=1)
    del inputs["initial_state"]
    with pytest.raises(ValueError, match=message):
        gla(**inputs, scale=1.0, cu_seqlens=borders)
