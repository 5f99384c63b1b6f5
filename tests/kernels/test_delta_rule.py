"""The delta rule: the reference against closed forms and fla, the chunked form against the reference, the step against both."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from statex.kernels import chunking, delta_rule, delta_rule_step
from statex.kernels.chunked_delta import unit_lower_inverse
from tests.kernels.delta_inputs import HEADS, delta_inputs
from tests.kernels.inputs import DECAYS, distance, gradients, in_float64

TOLERANCE = 1e-5
"""fp32 against the float64 reference, relative; seen: under 2e-6."""
BORDERS = [0, 1, 2, 66, 130, 131, 193, 193, 320, 321]
GATES = (None, *DECAYS)

rule = functools.partial(delta_rule, scale=0.4)
reference = functools.partial(rule, backend="reference")


def fla_naive(path: str) -> ModuleType:
    """One file of fla alone: importing fla as a package needs triton."""
    pytest.importorskip("einops")
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        pytest.skip("fla-core is not installed")
    spec = importlib.util.spec_from_file_location("fla_naive", Path(package.submodule_search_locations[0]) / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("decay", DECAYS)
def test_reference_equals_flas_naive_gated_recurrence(decay: str) -> None:
    inputs = delta_inputs(33, decay)
    o, state = reference(**inputs, output_final_state=True)
    naive = fla_naive("ops/gated_delta_rule/naive.py").naive_recurrent_gated_delta_rule
    rows = {name: inputs[name] for name in ("q", "k", "v", "beta", "initial_state")}
    theirs = naive(**rows, g=inputs["log_decay"], scale=0.4, output_final_state=True)
    assert distance(o, theirs[0]) < 2e-6
    assert distance(state, theirs[1]) < 2e-6


def test_reference_equals_flas_naive_ungated_recurrence() -> None:
    inputs = delta_inputs(33, None)
    o, state = delta_rule(**inputs, scale=6**-0.5, output_final_state=True, backend="reference")
    naive = fla_naive("ops/delta_rule/naive.py").delta_rule_recurrence
    heads_first = {name: inputs[name].transpose(1, 2) for name in ("q", "k", "v", "beta")}
    theirs = naive(**heads_first, initial_state=inputs["initial_state"])
    assert distance(o, theirs[0].transpose(1, 2)) < 2e-6
    assert distance(state, theirs[1]) < 2e-6


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_beta_one_and_orthonormal_keys_make_a_table_that_forgets_what_is_overwritten(backend: str) -> None:
    """Closed form: each read gives the value written last under that key, and nothing of any other."""
    slots, tokens = 8, 150
    written = torch.randint(slots, (tokens,))
    v = torch.randn(1, tokens, 1, 5, dtype=torch.float64)
    k = torch.eye(slots, dtype=torch.float64)[written][None, :, None]
    asked = written.roll(7)
    q = torch.eye(slots, dtype=torch.float64)[asked][None, :, None]
    o, _ = delta_rule(q, k, v, torch.ones(1, tokens, 1, dtype=torch.float64), scale=1.0, backend=backend)
    table: dict[int, torch.Tensor] = {}
    for t in range(tokens):
        table[int(written[t])] = v[0, t, 0]
        assert torch.allclose(o[0, t, 0], table.get(int(asked[t]), torch.zeros(5, dtype=torch.float64)), atol=1e-12), t


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_beta_two_flips_the_sign_of_what_a_key_holds(backend: str) -> None:
    """Closed form: without values, a token multiplies the state by 1 - 2 = -1 along its key, which counts tokens modulo 2."""
    bits = torch.rand(1, 300, 1) < 0.5
    k = torch.zeros(1, 300, 1, 4)
    k[..., 0] = 1
    state = torch.zeros(1, 1, 4, 3)
    state[..., 0, :] = 1
    o, _ = delta_rule(k, k, torch.zeros(1, 300, 1, 3), 2.0 * bits, scale=1.0, initial_state=state, backend=backend)
    parity = 1 - 2 * (bits[0, :, 0].cumsum(0) % 2)
    assert torch.allclose(o[0, :, 0], parity[:, None].float().expand(-1, 3), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 257])
@pytest.mark.parametrize("decay", GATES)
def test_chunks_equal_the_reference_at_any_length_and_gate(tokens: int, decay: str | None) -> None:
    inputs = delta_inputs(tokens, decay, key_dim=5, value_dim=7)
    o, state = rule(**inputs, output_final_state=True)
    expected, expected_state = reference(**in_float64(inputs), output_final_state=True)
    assert distance(o, expected) < TOLERANCE
    assert distance(state, expected_state) < TOLERANCE


@pytest.mark.parametrize("segment_elements", [1, 1 << 40])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("decay", [None, "mixed"])
def test_every_gradient_equals_the_references(
    heads: str, decay: str | None, segment_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunking.SEGMENT_ELEMENTS, "cpu", segment_elements)
    inputs = delta_inputs(150, decay, heads=heads)
    expected = gradients(reference, in_float64(inputs))
    for name, gradient in gradients(rule, inputs).items():
        assert distance(gradient, expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("decay", ["strong", "violent"])
def test_gradients_stay_exact_where_gates_close(decay: str) -> None:
    inputs = delta_inputs(70, decay)
    expected = gradients(reference, in_float64(inputs))
    for name, gradient in gradients(rule, inputs).items():
        assert torch.isfinite(gradient).all(), name
        assert distance(gradient, expected[name]) < TOLERANCE, name


def test_minus_infinity_forgets_everything_without_nan() -> None:
    inputs = delta_inputs(80)
    inputs["log_decay"][:, 37] = -torch.inf
    o, state = rule(**inputs, output_final_state=True)
    later = {name: x[:, 37:] for name, x in inputs.items() if name != "initial_state"}
    alone, alone_state = rule(**later, output_final_state=True)
    assert distance(o[:, 37:], alone) < TOLERANCE
    assert distance(state, alone_state) < TOLERANCE
    assert all(torch.isfinite(gradient).all() for gradient in gradients(rule, inputs).values())


def test_keys_of_more_than_256_channels_work() -> None:
    inputs = delta_inputs(140, "mild", key_dim=320, value_dim=24, batch=1)
    expected = gradients(reference, in_float64(inputs))
    for name, gradient in gradients(rule, inputs).items():
        assert distance(gradient, expected[name]) < TOLERANCE, name


def test_repeated_keys_that_are_always_flipped_stay_accurate() -> None:
    """The worst case for the inverse: few distinct keys, eigenvalues at -1. Its Neumann series would lose all digits here."""
    inputs = delta_inputs(512, None, key_dim=16)
    inputs["k"] = inputs["k"][:, torch.randint(3, (512,))]
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0)
    expected, _ = reference(**in_float64(inputs))
    assert distance(rule(**inputs)[0], expected) < 1e-4


def test_the_inverse_of_a_unit_triangle_and_its_gradient_are_right() -> None:
    square = torch.randn(3, 16, 16, dtype=torch.float64) / 4
    inverse, unit = unit_lower_inverse(square), torch.eye(16, dtype=torch.float64)
    assert torch.allclose(inverse @ (unit + square.tril(-1)), unit, atol=1e-12)
    assert torch.autograd.gradcheck(unit_lower_inverse, square[:1, :8, :8].clone().requires_grad_())


@pytest.mark.parametrize("segment_elements", [1, 1 << 40])
@pytest.mark.parametrize("decay", [None, "mild", "mixed"])
def test_packed_rows_equal_the_reference(decay: str | None, segment_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunking.SEGMENT_ELEMENTS, "cpu", segment_elements)
    inputs = delta_inputs(BORDERS[-1], decay, heads="both", batch=1)
    del inputs["initial_state"]
    borders = torch.tensor(BORDERS)
    expected, _ = reference(**in_float64(inputs), cu_seqlens=borders)
    assert distance(rule(**inputs, cu_seqlens=borders)[0], expected) < TOLERANCE


@pytest.mark.parametrize("decay", [None, "strong"])
def test_packed_rows_with_states_of_their_own_equal_the_reference(decay: str | None) -> None:
    inputs, borders = delta_inputs(BORDERS[-1], decay, batch=1, states=len(BORDERS) - 1), torch.tensor(BORDERS)
    expected = gradients(reference, in_float64(inputs), cu_seqlens=borders)
    for name, gradient in gradients(rule, inputs, cu_seqlens=borders).items():
        assert distance(gradient, expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("decay", [None, "mild"])
def test_no_gradient_crosses_a_border(decay: str | None) -> None:
    inputs = delta_inputs(BORDERS[-1], decay, batch=1)
    del inputs["initial_state"]
    rows = {name: x.requires_grad_() for name, x in inputs.items()}
    start, end = 131, 193
    rule(**inputs, cu_seqlens=torch.tensor(BORDERS))[0][:, start:end].sum().backward()
    for name, x in rows.items():
        assert x.grad[:, start:end].abs().max() > 0, name
        assert x.grad[:, :start].abs().max() == 0, name
        assert x.grad[:, end:].abs().max() == 0, name


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("decay", [None, "strong"])
def test_steps_equal_chunks(heads: str, decay: str | None) -> None:
    inputs = delta_inputs(70, decay, heads=heads)
    expected, final = rule(**inputs, output_final_state=True)
    state = inputs.pop("initial_state")
    gates = inputs.pop("log_decay", None)
    steps = []
    for t in range(70):
        rows = {name: x[:, t] for name, x in inputs.items()}
        steps.append(delta_rule_step(**rows, log_decay=None if gates is None else gates[:, t], state=state, scale=0.4))
    assert distance(torch.stack(steps, 1), expected) < TOLERANCE
    assert distance(state, final) < TOLERANCE


@pytest.mark.parametrize("decay", [None, "mixed"])
def test_compiles_into_one_graph_and_its_backward_too(decay: str | None) -> None:
    inputs = delta_inputs(70, decay)
    expected = gradients(reference, in_float64(inputs))
    compiled = torch.compile(rule, backend="aot_eager", fullgraph=True)
    for name, gradient in gradients(compiled, inputs).items():
        assert distance(gradient, expected[name]) < TOLERANCE, name


def test_a_row_may_be_cut_anywhere_and_carried_on() -> None:
    inputs = delta_inputs(200, "strong")
    whole, final = rule(**inputs, output_final_state=True)
    state, parts = inputs.pop("initial_state"), []
    for start, end in ((0, 1), (1, 90), (90, 200)):
        part, state = rule(**{name: x[:, start:end] for name, x in inputs.items()}, initial_state=state, output_final_state=True)
        parts.append(part)
    assert distance(torch.cat(parts, 1), whole) < TOLERANCE
    assert distance(state, final) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_outputs_come_in_the_dtype_of_the_values_and_states_wide(dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in delta_inputs(70).items()}
    o, state = rule(**inputs, output_final_state=True)
    expected, _ = reference(**in_float64(inputs))
    assert o.dtype == dtype
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert distance(o, expected) < {torch.bfloat16: 4e-3, torch.float64: 1e-13}[dtype]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rule(**inputs)[0], o)


def test_memory_kept_for_the_backward_is_linear_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.kernels.test_chunking import saved_elements

    monkeypatch.setitem(chunking.SEGMENT_ELEMENTS, "cpu", 1)
    short, long = (saved_elements(rule, delta_inputs(tokens, batch=1)) for tokens in (512, 2048))
    row = sum(x.numel() for x in delta_inputs(2048, batch=1).values())
    assert long < 4.5 * short
    assert long < 3 * row  # the inputs, a state for every segment, and little else


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "three dimensions": ({"k": torch.zeros(2, 8, 6)}, r"k must be \[B, T, H, D\], got \[2, 8, 6\]"),
    "shorter keys": ({"k": torch.zeros(2, 7, 2, 6)}, r"k must be \[2, 8, 2, 6\], got \[2, 7, 2, 6\]"),
    "key heads": ({name: torch.zeros(2, 8, 3, 6) for name in ("q", "k")}, "2 value heads cannot share 3 key heads"),
    "query heads": ({"q": torch.zeros(2, 8, 4, 6)}, "2 key heads cannot share 4 query heads"),
    "beta": ({"beta": torch.zeros(2, 8, 2, 1)}, r"beta must be \[2, 8, 2\]"),
    "vector decays": ({"log_decay": torch.zeros(2, 8, 2, 6)}, r"log_decay must be \[2, 8, 2\]"),
    "growing": ({"log_decay": torch.full((2, 8, 2), 0.1)}, "log_decay must be at most 0"),
    "state": ({"initial_state": torch.zeros(2, 2, 10, 6)}, r"initial_state must be \[2, 2, 6, 10\]"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 8])}, "the batch is 2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        delta_rule(**(delta_inputs(8) | {"scale": 1.0} | changes))


def test_a_step_refuses_a_state_of_another_shape() -> None:
    inputs = {name: x[:, 0] for name, x in delta_inputs(1).items() if name != "initial_state"}
    with pytest.raises(ValueError, match=r"state must be \[2, 2, 6, 10\], got \[2, 2, 5, 10\]"):
        delta_rule_step(**inputs, state=torch.zeros(2, 2, 5, 10), scale=1.0)
