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
