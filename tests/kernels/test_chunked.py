"""The chunked forms against the float64 reference: values and gradients, at any gate strength."""

from __future__ import annotations

import functools

import pytest
import torch

from statex.kernels import chunking, gla, ssd
from tests.kernels.inputs import DECAYS, distance, gla_inputs, gradients, in_float64, ssd_inputs

LENGTHS = (1, 15, 63, 64, 65, 255, 257)
TOLERANCE = 1e-5
FORMS = {
    "plain": {},
    "grouped queries": {"group": 2},
    "scalar mixing": {"mixing": "scalar"},
    "channel mixing": {"mixing": "channel"},
    "lift": {"lift": 3},
    "all, scalar": {"group": 2, "mixing": "scalar", "lift": 2},
    "all, channel": {"group": 2, "mixing": "channel", "lift": 2},
}
SSD_FORMS = {"one group": {"groups": 1}, "two groups": {"groups": 2}, "lift": {"groups": 2, "lift": 3}}

scaled_gla = functools.partial(gla, scale=0.4)


@pytest.fixture(params=["one segment", "many segments", "without looking at the gates"])
def every_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of one chunk each, recomputed in the backward; and the path of compiled code, which may not look at values."""
    if request.param == "many segments":
        monkeypatch.setitem(chunking.SEGMENT_ELEMENTS, "cpu", 1)
    if request.param == "without looking at the gates":
        monkeypatch.setattr(chunking, "MILD", 0.0)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_gla_equals_reference_at_any_length_and_gate(tokens: int, decay: str) -> None:
    inputs = gla_inputs(tokens, decay, key_dim=5, value_dim=7)
    o, state = scaled_gla(**inputs, output_final_state=True)
    expected, expected_state = scaled_gla(**in_float64(inputs), output_final_state=True, backend="reference")
    assert distance(o, expected) < TOLERANCE
    assert distance(state, expected_state) < TOLERANCE


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_ssd_equals_reference_at_any_length_and_gate(tokens: int, decay: str) -> None:
    inputs = ssd_inputs(tokens, decay, d_state=5, head_dim=7)
    y, state = ssd(**inputs, output_final_state=True)
    expected, expected_state = ssd(**in_float64(inputs), output_final_state=True, backend="reference")
    assert distance(y, expected) < TOLERANCE
    assert distance(state, expected_state) < TOLERANCE


@pytest.mark.usefixtures("every_path")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", ["mild", "mixed"])
def test_every_gradient_of_gla_equals_the_references(form: str, decay: str) -> None:
    inputs = gla_inputs(150, decay, **FORMS[form])
    expected = gradients(scaled_gla, in_float64(inputs), backend="reference")
    for name, gradient in gradients(scaled_gla, inputs).items():
        assert distance(gradient, expected[name]) < TOLERANCE, name


@pytest.mark.usefixtures("every_path")
@pytest.mark.parametrize("form", SSD_FORMS)
@pytest.mark.parametrize("decay", ["mild", "mixed"])
def test_every_gradient_of_ssd_equals_the_references(form: str, decay: str) -> None:
    inputs = ssd_inputs(150, decay, **SSD_FORMS[form])
    expected = gradients(ssd, in_float64(inputs), backend="reference")
    for name, gradient in gradients(ssd, inputs).items():
        assert distance(gradient, expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("decay", ["strong", "violent"])
@pytest.mark.parametrize(("kernel", "make"), [(scaled_gla, gla_inputs), (ssd, ssd_inputs)])
def test_gradients_stay_exact_where_gates_close(kernel: functools.partial, make: functools.partial, decay: str) -> None:
    inputs = make(70, decay)
    expected = gradients(kernel, in_float64(inputs), backend="reference")
    for name, gradient in gradients(kernel, inputs).items():
        assert torch.isfinite(gradient).all(), name
        assert distance(gradient, expected[name]) < TOLERANCE, name


@pytest.mark.parametrize(("kernel", "make"), [(scaled_gla, gla_inputs), (ssd, ssd_inputs)])
def test_rows_of_many_chunks_equal_the_reference(kernel: functools.partial, make: functools.partial) -> None:
    tokens = (chunking.MAX_SEQUENTIAL_CHUNKS + 5) * chunking.CHUNKS[0] + 3
    inputs = make(tokens, "mixed", batch=1)
    output, state = kernel(**inputs, output_final_state=True)
    expected, expected_state = kernel(**in_float64(inputs), output_final_state=True, backend="reference")
    assert distance(output, expected) < TOLERANCE
    assert distance(state, expected_state) < TOLERANCE


def test_gla_forgets_everything_at_minus_infinity_without_nan() -> None:
    inputs = gla_inputs(80, "mild")
    inputs["log_decay"][:, 37] = -torch.inf
    o, state = scaled_gla(**inputs, output_final_state=True)
    later = {name: x[:, 37:] for name, x in inputs.items() if name != "initial_state"}
    alone, alone_state = scaled_gla(**later, output_final_state=True)
    assert distance(o[:, 37:], alone) < TOLERANCE
    assert distance(state, alone_state) < TOLERANCE
    assert all(torch.isfinite(gradient).all() for gradient in gradients(scaled_gla, inputs).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_outputs_come_in_the_dtype_of_the_inputs_and_states_wide(dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in gla_inputs(70).items()}
    o, state = scaled_gla(**inputs, output_final_state=True)
    expected, expected_state = scaled_gla(**in_float64(inputs), output_final_state=True, backend="reference")
    assert o.dtype == dtype
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert distance(o, expected) < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-14}[dtype]
    assert distance(state, expected_state) < (1e-14 if dtype == torch.float64 else TOLERANCE)


@pytest.mark.parametrize(("kernel", "make"), [(scaled_gla, gla_inputs), (ssd, ssd_inputs)])
def test_autocast_does_not_reach_inside(kernel: functools.partial, make: functools.partial) -> None:
    inputs = make(70)
    expected, _ = kernel(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = kernel(**inputs)
    assert torch.equal(output, expected)


@pytest.mark.parametrize(("kernel", "make"), [(scaled_gla, gla_inputs), (ssd, ssd_inputs)])
def test_compiles_into_one_graph(kernel: functools.partial, make: functools.partial) -> None:
    inputs = make(70, "mixed")
    compiled = torch.compile(lambda inputs: kernel(**inputs)[0], backend="eager", fullgraph=True)
    expected, _ = kernel(**in_float64(inputs), backend="reference")
    assert distance(compiled(inputs), expected) < TOLERANCE


def test_a_row_may_be_cut_anywhere_and_carried_on() -> None:
    inputs = ssd_inputs(200, "strong")
    whole, final = ssd(**inputs, output_final_state=True)
    state, parts = inputs.pop("initial_state"), []
    for start, end in ((0, 1), (1, 90), (90, 200)):
        piece = {name: x[:, start:end] if x.dim() > 2 else x for name, x in inputs.items()}
        part, state = ssd(**piece, initial_state=state, output_final_state=True)
        parts.append(part)
    assert distance(torch.cat(parts, 1), whole) < TOLERANCE
    assert distance(state, final) < TOLERANCE


@pytest.mark.parametrize(("kernel", "make"), [(scaled_gla, gla_inputs), (ssd, ssd_inputs)])
def test_final_state_is_returned_only_on_request(kernel: functools.partial, make: functools.partial) -> None:
    assert kernel(**make(10))[1] is None
