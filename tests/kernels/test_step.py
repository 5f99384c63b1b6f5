"""One token at a time, in place, against the chunked forms."""

from __future__ import annotations

import pytest
import torch

from statex.kernels import gla, gla_step, ssd, ssd_step
from tests.kernels.inputs import distance, gla_inputs, ssd_inputs
from tests.kernels.test_chunked import FORMS, SSD_FORMS


@pytest.mark.parametrize("form", FORMS)
def test_gla_steps_equal_chunks(form: str) -> None:
    inputs = gla_inputs(70, "strong", **FORMS[form])
    expected, final = gla(**inputs, scale=0.4, output_final_state=True)
    state = inputs.pop("initial_state")
    fixed = {name: inputs.pop(name) for name in ("mixing", "lift_gamma") if name in inputs}
    steps = [gla_step(*(x[:, t] for x in inputs.values()), state, scale=0.4, **fixed) for t in range(70)]
    assert distance(torch.stack(steps, 1), expected) < 1e-5
    assert distance(state, final) < 1e-5


@pytest.mark.parametrize("form", SSD_FORMS)
def test_ssd_steps_equal_chunks(form: str) -> None:
    inputs = ssd_inputs(70, "strong", **SSD_FORMS[form])
    expected, final = ssd(**inputs, output_final_state=True)
    state = inputs.pop("initial_state")
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    fixed = {"D": inputs["D"], "lift_gamma": inputs.get("lift_gamma")}
    steps = [ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, **fixed) for t in range(70)]
    assert distance(torch.stack(steps, 1), expected) < 1e-5
    assert distance(state, final) < 1e-5


def test_a_step_keeps_the_dtype_of_its_inputs_and_the_memory_of_its_state() -> None:
    inputs = gla_inputs(1)
    state = inputs.pop("initial_state")
    address, before = state.data_ptr(), state.clone()
    o = gla_step(*(x[:, 0].bfloat16() for x in inputs.values()), state, scale=0.4)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert state.data_ptr() == address
    assert not torch.equal(state, before)


def test_a_state_of_another_shape_is_refused() -> None:
    inputs = gla_inputs(1, lift=2)
    inputs.pop("initial_state")
    gamma = inputs.pop("lift_gamma")
    with pytest.raises(ValueError, match=r"state has shape \[2, 2, 6, 10\], expected \[2, 2, 12, 10\]"):
        gla_step(*(x[:, 0] for x in inputs.values()), torch.zeros(2, 2, 6, 10), scale=1.0, lift_gamma=gamma)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 5)}, r"q must be \[1, 2, 6\], got \[1, 2, 5\]"),
        ({"log_decay": torch.zeros(1, 2, 1)}, r"log_decay must be \[1, 2, 6\]"),
        ({"k": torch.zeros(1, 2, 6, device="meta")}, "k is on meta and q on cpu"),
    ],
)
def test_rows_of_one_token_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    rows = {name: torch.zeros(1, 2, width) for name, width in (("q", 6), ("k", 6), ("v", 10), ("log_decay", 6))}
    with pytest.raises(ValueError, match=message):
        gla_step(**rows | change, state=torch.zeros(1, 2, 6, 10), scale=1.0)
