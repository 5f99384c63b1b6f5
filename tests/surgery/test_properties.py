"""Whatever the shapes, factors and options: `preserve` keeps the function, and dry runs tell what is written."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.surgery.helpers import expand, largest_difference, tensors, write

few = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])

spectra = st.sampled_from(
    [[], [{"operator": "extend_spectrum", "layers": "all"}], [{"operator": "extend_spectrum", "layers": [0]}]]
)


@st.composite
def gla_cases(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """GLA shapes with kv heads that a factor divides, and merges, widenings and lifts, with or without a longer spectrum."""
    factor, rest = draw(st.sampled_from([2, 3])), draw(st.sampled_from([1, 2]))
    kv_heads, queries, key_dim = factor * rest, draw(st.sampled_from([1, 2])), draw(st.sampled_from([3, 4]))
    heads = kv_heads * queries
    config = {
        "hidden_size": heads * key_dim,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "expand_k": 1.0,
        "expand_v": draw(st.sampled_from([1.0, 2.0])),
        "use_short_conv": draw(st.booleans()),
        "conv_bias": draw(st.booleans()),
        "use_output_gate": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }
    merge = {"operator": "merge_heads", "factor": factor, "layers": draw(st.sampled_from(["all", [1]]))}
    merge["mixing"] = draw(st.sampled_from(["scalar", "channel"]))
    widen = {"operator": "widen_state", "factor": draw(st.integers(2, 3)), "zero": draw(st.sampled_from(["B", "C"]))}
    widen["layers"] = draw(st.sampled_from(["all", [1]]))
    lift = {"operator": "lift_keys", "factor": 2, "layers": draw(st.sampled_from(["all", [0]]))}
    plans = [[merge], [lift], [merge, lift], [widen], [widen, lift], [merge, widen, lift]]
    return config, draw(st.sampled_from(plans)) + draw(spectra)


@st.composite
def mamba2_cases(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Mamba-2 shapes with any groups, and a widening, a lift or both, with or without a longer spectrum."""
    groups, per_group, head_dim = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2])), draw(st.sampled_from([4, 6]))
    heads = groups * per_group
    config = {
        "hidden_size": heads * head_dim // 2,
        "num_heads": heads,
        "head_dim": head_dim,
        "n_groups": groups,
        "state_size": draw(st.sampled_from([5, 8])),
        "use_bias": draw(st.booleans()),
        "use_conv_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }
    widen = {"operator": "widen_state", "factor": draw(st.integers(2, 4)), "zero": draw(st.sampled_from(["B", "C"]))}
    widen["layers"] = draw(st.sampled_from(["all", [1]]))
    lift = {"operator": "lift_keys", "factor": draw(st.sampled_from([2, 3])), "layers": draw(st.sampled_from(["all", [0]]))}
    return config, draw(st.sampled_from([[widen], [lift], [widen, lift]])) + draw(spectra)


@pytest.mark.parametrize("family", ["gla", "mamba2"])
@few
@given(data=st.data())
def test_preserve_keeps_the_function_and_dry_runs_tell_the_truth(family: str, data: st.DataObject) -> None:
    config, plan = data.draw({"gla": gla_cases, "mamba2": mamba2_cases}[family]())
    with tempfile.TemporaryDirectory() as folder:
        base, out = write(family, Path(folder) / "base", **config), Path(folder) / "out"
        dry = expand(base, out, *plan, dry_run=True)
        wet = expand(base, out, *plan)
        assert dry.to_dict() == wet.to_dict() | {"out": None}
        assert sum(tensor.numel() for tensor in tensors(out).values()) == dry.after.parameters
        assert largest_difference(base, out) < 1e-10
