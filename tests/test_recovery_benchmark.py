"""The driver of the recovery benchmark: its arms are what they say, its runs are shared, resumed, and do not stop one another."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import statex
from statex.models.components import GroupedRMSNorm

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not beside the tests")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def shared_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A small place on two random bases; the data are read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from recovery import ASSETS, DRY, random_bases
        from recovery_runs import Place

        folder = tmp_path_factory.mktemp("recovery")
        books = ASSETS / "books_train.jsonl.gz", ASSETS / "books_test.jsonl.gz"
        yield Place(torch.device("cpu"), folder, random_bases(folder), *books, at_once=2, **DRY)


def new_queue(place: Any, specs: list[Any], claims: Path, **changes: Any) -> Any:
    from recovery_queue import Queue

    claims.mkdir(exist_ok=True)
    return Queue(
        list(specs), claims, **{"worker": "0", "deadline": time.time() + 600, "step_seconds": 0.0, "length": place.steps} | changes
    )


def prepared(place: Any, base: str, arm: str) -> Any:
    from recovery_runs import Run, Spec

    run = Run(place, Spec(base, arm, 0, 2, 1.0))
    for _ in run.prepare():
        pass
    run.model.eval()
    return run


def outputs(run: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = run.model(run.place.held_out[:40].view(2, 20), use_cache=False).logits
    return logits


def test_arms_have_names_of_their_own_and_extras_that_exist() -> None:
    from recovery_arms import ARMS
    from recovery_extras import DISTILLED, EXTRAS, named

    names = [(arm.family, arm.name) for arm in ARMS]
    assert len(set(names)) == len(names)
    assert {name for arm in ARMS for name, _ in named(arm.extra)} <= {*EXTRAS, DISTILLED}


def test_the_surgery_of_every_arm_applies_to_the_committed_bases() -> None:
    from recovery import BASES
    from recovery_arms import ARMS, AUTO, MAMBA2

    for arm in ARMS:
        base = BASES["mamba2-books" if arm.family == MAMBA2 else "gla-quickstart"]
        plan = {"operations": [entry | ({"layers": [0]} if entry["layers"] == AUTO else {}) for entry in arm.plan]}
        if arm.plan and base.exists():
            statex.expand(base, None, plan=plan, dry_run=True)


def test_arms_are_chosen_by_name_pattern_and_axis() -> None:
    from recovery_arms import ARMS, choose

    assert [arm.name for arm in choose(["lift4", "lpt@3e-*"])][:2] == ["lift4", "lift4"]
    assert {arm.axis for arm in choose(["baseline"])} == {"baseline"}
    assert not any(arm.scratch for arm in choose([]))
    assert any(arm.scratch for arm in ARMS)
    with pytest.raises(SystemExit, match="no arm"):
        choose(["lift5"])


def test_runs_leave_their_lines_and_are_not_done_again(shared_place: Any, tmp_path: Path) -> None:
    from recovery import RUN, lines, missing, work, work_list

    results = tmp_path / "runs.csv"
    specs = work_list(shared_place.bases, ["lift4", "oracle-widen4"], [0], [2], 1.0)
    assert len(specs) == 4
    work(shared_place, RUN, new_queue(shared_place, specs[:2], tmp_path / "a"), results)
    assert missing(specs, results, RUN) == specs[2:]
    work(shared_place, RUN, new_queue(shared_place, missing(specs, results, RUN), tmp_path / "b"), results)
    assert not missing(specs, results, RUN)
    told = lines(results)
    assert {line["task"] for line in told} == {"books", "more books", "mqar", "key_value", "needle", "opened", "run"}
    lifted = [line for line in told if line["arm"] == "lift4" and line["base"] == "gla-quickstart"]
    assert {(line["factor"], line["layers"]) for line in lifted} == {("4.0", "0 1 2 3")}
    opened = [float(line["value"]) for line in lifted if line["metric"] == "gamma_rms"]
    assert opened[0] == 0 < opened[-1]
    assert max(int(line["step"]) for line in told if line["arm"] == "oracle-widen4") == shared_place.base_steps + 2


def test_a_failing_run_is_tried_again_and_stops_no_other(
    shared_place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recovery import ERROR, RUN, lines, work, work_list
    from recovery_runs import Run

    tried = []

    def train(run: Any) -> Any:
        tried.append((run.spec.arm, run.eager))
        yield
        if run.spec.arm == "lift4":
            raise RuntimeError("out of luck\nand more")
        return (yield from own(run))

    own = Run.train
    monkeypatch.setattr(Run, "train", train)
    base = {"gla-quickstart": shared_place.bases["gla-quickstart"]}
    specs = work_list(base, ["lift4", "lpt@1e-3"], [0], [2], 1.0)
    work(shared_place, RUN, new_queue(shared_place, specs, tmp_path / "claims"), tmp_path / "runs.csv")
    assert sorted(tried) == [("lift4", False), ("lift4", True), ("lpt@1e-3", False)]
    ends = [(line["arm"], line["metric"]) for line in lines(tmp_path / "runs.csv") if line["task"] in (ERROR, RUN)]
    assert sorted(ends) == [("lift4", "RuntimeError: out of luck"), ("lpt@1e-3", "done")]


def test_no_two_processes_take_the_same_run_and_none_takes_one_that_ends_too_late(shared_place: Any, tmp_path: Path) -> None:
    from recovery import work_list
    from recovery_queue import release

    specs = work_list(shared_place.bases, ["baseline"], [0], [100], 1.0)
    first, second = (new_queue(shared_place, specs, tmp_path / "claims", worker=name) for name in "01")
    taken = [next(first), next(second), next(first)]
    assert taken == specs[:3]
    release(tmp_path / "claims", "0")
    assert next(new_queue(shared_place, specs, tmp_path / "claims")) == taken[0]
    with pytest.raises(StopIteration):
        next(new_queue(shared_place, specs, tmp_path / "late", step_seconds=7.0))


def test_blocks_are_whole_after_a_torn_write(tmp_path: Path) -> None:
    from recovery_lines import append, lines

    path = tmp_path / "runs.csv"
    append(path, [{"arm": "a", "value": 1.0}])
    with path.open("a") as file:
        file.write("gla,12")
    append(path, [{"arm": "b", "value": 2.0}, {"arm": "c", "value": 3.0}])
    assert [(line["arm"], line["value"]) for line in lines(path)] == [("a", "1.0"), ("b", "2.0"), ("c", "3.0")]


@pytest.mark.parametrize(
    ("base", "arm"),
    [
        ("mamba2-books", "widen4-control"),
        ("mamba2-books", "widen4-orthogonal"),
        ("gla-quickstart", "widen4-orthogonal"),
        ("gla-quickstart", "merge-annealed"),
    ],
)
def test_extras_leave_the_function_alone_at_first(shared_place: Any, base: str, arm: str) -> None:
    run = prepared(shared_place, base, arm)
    if run.advance is not None:
        run.advance(0.0)
    torch.testing.assert_close(outputs(run), outputs(prepared(shared_place, base, "lpt@1e-3")), atol=1e-5, rtol=0)


def test_the_control_has_the_parameters_of_the_wider_state_and_the_state_of_the_base(shared_place: Any) -> None:
    wide, control = (prepared(shared_place, "mamba2-books", arm) for arm in ("widen4", "widen4-control"))
    assert control.parameters == wide.parameters
    assert (wide.factor, control.factor) == (4, 1)
    for step in range(2):
        control.step(step)
    mixer, old = control.model.model.layers[0].mixer, shared_place.bases["mamba2-books"].description.layers[0].key_dim
    new = mixer.conv1d.weight.detach()[-3 * old :, 0]
    assert (new != 0).all()
    assert new.unique(dim=0).shape == new.shape


def test_an_annealed_merge_ends_as_the_stock_model(shared_place: Any) -> None:
    run = prepared(shared_place, "gla-quickstart", "merge-annealed")
    run.advance(1.0)
    torch.testing.assert_close(outputs(run), outputs(prepared(shared_place, "gla-quickstart", "merge-inherit")), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_channels", [6, 24])
def test_an_annealed_norm_goes_from_heads_to_a_merged_head(weight_channels: int, dtype: torch.dtype) -> None:
    from recovery_extras import AnnealedNorm

    norms = [GroupedRMSNorm(24, groups, 1e-5, 24, "silu") for groups in (4, 2)]
    x, gate, weight = torch.randn(2, 24, dtype=dtype), torch.randn(2, 24, dtype=dtype), torch.randn(weight_channels)
    for norm in norms:
        norm.weight.data = weight.repeat(24 // weight_channels)
    annealing = GroupedRMSNorm(24, 4, 1e-5, weight_channels, "silu")
    annealing.weight.data = weight
    annealing.__class__, annealing.blocks = AnnealedNorm, 2
    for share, expected in zip((0.0, 1.0), norms, strict=True):
        annealing.share = torch.tensor(share)
        torch.testing.assert_close(annealing(x, gate), expected(x, gate))


@pytest.mark.parametrize("base", ["mamba2-books", "gla-quickstart"])
def test_faster_rows_go_ten_times_as_far_and_old_rows_as_far_as_ever(shared_place: Any, base: str) -> None:
    moved = {}
    for arm in ("widen4@3e-4", "widen4@3e-4-rows10"):
        run = prepared(shared_place, base, arm)
        parameters = {name: parameter.detach() for name, parameter in run.model.named_parameters()}
        before = {name: parameter.clone() for name, parameter in parameters.items()}
        run.step(0)
        moved[arm] = {name: parameters[name] - before[name] for name in parameters}
    plain, fast = moved.values()
    assert run.new_rows
    for name, runs in run.new_rows.items():
        for rows in runs:
            plain[name][rows] *= 10
    assert any(plain[name][rows].abs().max() > 0 for name, runs in run.new_rows.items() for rows in runs)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-3)


def test_an_oracle_is_measured_and_told_with_the_tokens_behind_it(shared_place: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    from recovery import RUN, lines, work, work_list

    base = shared_place.bases["gla-quickstart"]
    statex.expand(base.folder, tmp_path / "x4" / "checkpoint", operator="widen_state", layers="all", progress=False)
    (tmp_path / "x4" / "curve.json").write_text('[{"tokens": 5}, {"tokens": 98765}]')
    place = replace(shared_place, oracles={"gla-quickstart": tmp_path / "x4" / "checkpoint"})
    specs = work_list({base.name: base}, ["oracle"], [0], [2], 1.0)
    work(place, RUN, new_queue(place, specs, tmp_path / "claims"), tmp_path / "runs.csv")
    told = lines(tmp_path / "runs.csv")
    assert {(line["tokens"], line["step"], line["factor"]) for line in told} == {("98765", "0", "4.0")}
    assert {"books", "mqar", "needle"} <= {line["task"] for line in told}


def test_needles_are_found_by_a_model_that_reads_ahead_and_their_digits_alone_count(
    shared_place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import recovery_measures

    stub: Any = None

    def told(off_by: torch.Tensor) -> dict[str, float]:
        def sure(model: Any, ids: torch.Tensor) -> torch.Tensor:
            ahead = (ids + off_by)[:, 1:]
            return torch.nn.functional.pad(torch.nn.functional.one_hot(ahead, 300), (0, 0, 0, 1))

        monkeypatch.setattr(recovery_measures, "logits", sure)
        return {metric: value for _, metric, value in recovery_measures.find_needles(stub, shared_place.needles)}

    width = shared_place.needles.shape[1]
    everywhere, last_digit = torch.ones(width, dtype=torch.long), torch.zeros(width, dtype=torch.long)
    everywhere[-7:-2], last_digit[-3] = 0, 1
    assert told(everywhere) == {"exact": 1.0, "digits": 1.0}
    assert told(last_digit) == {"exact": 0.0, "digits": 0.8}


def test_all_arms_read_the_same_rows(shared_place: Any) -> None:
    first, second = (prepared(shared_place, "gla-quickstart", arm) for arm in ("lpt@1e-3", "widen2+lift2"))
    for (ids, _), (others, _) in zip(first.batches(4), second.batches(4), strict=True):
        assert torch.equal(ids, others)
    assert first.draws.integers(100) == second.draws.integers(100)


def test_a_captured_step_reads_each_batch_and_adds_to_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's graphs, whose replay is the work on the tensors that were captured."""
    from contextlib import nullcontext

    from recovery_graphs import WARM_UP, Backward

    weight, calls = torch.nn.Parameter(torch.randn(5, 3)), []

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(ids)
        return (weight[ids] * labels[..., None]).square().sum()

    class Graph:
        def replay(self) -> None:
            loss(*next(entry[1:] for entry in captured.graphs.values() if entry[0] is self)).backward()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    captured = Backward(loss, torch.device("cpu"), eager=False)
    captured.eager = False
    batches = [(torch.randint(5, shape), torch.randint(3, shape)) for shape in ((2, 4), (3, 2), (2, 4))]
    for batch in batches:
        captured.capture(*batch)
    assert len(calls) == 2 * (WARM_UP + 1)
    assert weight.grad is not None
    storage = weight.grad.zero_().data_ptr()
    for batch in batches:
        captured(*batch)
    assert weight.grad.data_ptr() == storage
    wanted = torch.autograd.grad(sum(loss(*batch) for batch in batches), weight)[0]
    torch.testing.assert_close(weight.grad, wanted)


def test_costs_are_told_of_steps_and_tokens(shared_place: Any, tmp_path: Path) -> None:
    from recovery import COST, lines, missing, work, work_list

    specs = work_list({"gla-quickstart": shared_place.bases["gla-quickstart"]}, ["lift2"], [0], [2], 1.0)
    work(shared_place, COST, new_queue(shared_place, specs, tmp_path / "claims"), tmp_path / "costs.csv")
    told = {line["metric"]: float(line["value"]) for line in lines(tmp_path / "costs.csv")}
    assert told["train_ms"] > 0
    assert told["decode_ms_batch_1"] > 0
    assert not missing(specs, tmp_path / "costs.csv", COST)


def test_text_is_compared_with_the_best_run_without_surgery_on_the_same_seeds() -> None:
    from recovery_measures import MORE_TEXT
    from recovery_table import best_text

    slow, fast = (
        {seed: {(MORE_TEXT, "bits_per_byte"): bits} for seed, bits in runs.items()} for runs in ({"0": 2.0, "1": 1.8}, {"0": 1.9})
    )
    assert best_text([slow, fast], ["0"]) == 1.9
    assert best_text([slow, fast], ["1"]) == 1.8
    assert best_text([slow, fast], ["0", "1"]) == pytest.approx(1.9)
    assert math.isnan(best_text([slow, fast], ["2"]))
