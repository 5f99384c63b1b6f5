"""The driver of the state-tracking benchmark: its data are right, its runs share a device, and what is done is not done again."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from statex.evals.tracking_rows import group_table
from statex.models import StatexForCausalLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not beside the tests")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def bench(results: Path, **sizes: Any) -> Any:
    from state_tracking import Bench
    from tracking_runs import Place

    place = Place(torch.device("cpu"), results.parent / "work", width=32, text_windows=2, words=4)
    return Bench(place, results, "parity", **{"at_once": 2, "layers": 1, "hidden": 16, "batch": 4, "scale": 0.0} | sizes)


def training(spec: Any) -> Any:
    from tracking_runs import Training, Words

    model = StatexForCausalLM.from_description(spec.description(), seed=0)
    return Training(spec, model, Words(spec.problem, torch.device("cpu"), 0), None, 32)


@pytest.mark.parametrize(("problem", "group"), [("parity", "Z2"), ("s3_words", "S3"), ("a5_words", "A5")])
def test_words_on_the_device_have_the_products_of_a_loop(problem: str, group: str) -> None:
    from tracking_runs import Words

    words = Words(problem, torch.device("cpu"), seed=0)
    ids, answers = words.draw(3, 37)
    number = {token: index for index, token in enumerate(words.tokens.tolist())}
    for row, told in zip(ids.tolist(), answers.tolist(), strict=True):
        state = 0
        for token, answer in zip(row, told, strict=True):
            state = int(group_table(group)[state, number[token]])
            assert number[answer] == state


def test_held_convolutions_read_the_current_symbol_alone_and_stay_so() -> None:
    from tracking_runs import BELOW_ZERO, SHAPES, hold_convolutions

    for family in SHAPES:
        run = training(bench(Path("unused")).spec("confirm", family, BELOW_ZERO, 0, 1e-2))
        hold_convolutions(run.model)
        taps = {name: weight for name, weight in run.model.named_parameters() if "conv1d" in name and weight.dim() > 1}
        before = {name: weight.detach().clone() for name, weight in taps.items()}
        for _ in run.run():
            pass
        assert taps
        for name, weight in taps.items():
            assert weight[..., :-1].eq(0).all()
            assert not torch.equal(weight[..., -1], before[name][..., -1])


def test_the_loss_is_the_cross_entropy_to_answers_with_a_share_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracking_runs
    from torch.nn import functional as F

    monkeypatch.setitem(tracking_runs.RECIPES, "smooth", tracking_runs.Recipe(smoothing=0.3))
    bench_ = replace(bench(Path("unused"), recipe="smooth"), problem="s3_words")
    run = training(bench_.spec("confirm", "delta_net", "[-1, 1]", 0, 0.0))
    run._next(0.5)
    with torch.no_grad():
        logits = run.model(run.ids, use_cache=False).logits[:, : run.length]
    aims = torch.zeros_like(logits)
    aims[..., run.words.tokens] = 0.3 / 6
    aims.scatter_add_(-1, run.answers[:, : run.length, None], torch.full((4, run.length, 1), 0.7))
    told: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: told.append(loss.detach()))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    run._work()
    torch.testing.assert_close(told[0], F.cross_entropy(logits.flatten(0, 1), aims.flatten(0, 1)))


@pytest.mark.parametrize(("recipe", "steps", "last_rate"), [("line", 50, 1e-3), ("steady", 120, 0.0)])
def test_only_the_first_recipe_ends_early_and_only_its_rate_stays_above_zero(
    recipe: str, steps: int, last_rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tracking_runs

    monkeypatch.setattr(tracking_runs, "accuracies", lambda *_: dict.fromkeys(tracking_runs.LENGTHS, 1.0))
    monkeypatch.setattr(tracking_runs.Training, "_work", lambda _: None)
    run = training(bench(Path("unused"), recipe=recipe, scale=0.06).spec("confirm", "mamba", "[-1, 1]", 0, 1e-2))
    assert sum(1 for _ in run.run()) == steps
    run._next(1.0)
    assert float(run.rates[0]) == pytest.approx(last_rate)


def test_solved_at_is_the_check_from_which_on_all_find_the_words_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracking_runs

    shares = iter((1.0, 0.99, 1.0, 1.0))
    monkeypatch.setattr(tracking_runs, "accuracies", lambda *_: {tracking_runs.LENGTHS[-1]: next(shares)})
    monkeypatch.setattr(tracking_runs.Training, "_work", lambda _: None)
    run = training(bench(Path("unused"), scale=0.4).spec("confirm", "mamba", "[-1, 1]", 0, 1e-2)).run()
    told = []

    def drive() -> Generator[None, None, None]:
        told.append((yield from run))

    assert len(list(drive())) == 800
    assert told == [600]


def test_runs_of_another_recipe_are_other_runs_and_choose_no_rate_for_it(tmp_path: Path) -> None:
    from dataclasses import asdict

    from state_tracking import best_rates
    from tracking_runs import OUTCOMES

    asked = []

    def train(place: Any, spec: Any) -> Generator[None, None, dict[str, Any]]:
        asked.append(spec.recipe)
        yield
        return asdict(spec) | dict.fromkeys(OUTCOMES, "") | {"accuracy_256": 1.0}

    for recipe in ("line", "steady", "line"):
        bench_ = bench(tmp_path / "runs.csv", recipe=recipe)
        bench_.run([bench_.spec("screen", "mamba", "[-1, 1]", 0, 1e-2 if recipe == "line" else 1e-3)], train)
    assert asked == ["line", "steady"]
    assert best_rates(bench_) == {("mamba", "[-1, 1]"): 1e-2}


def test_runs_take_turns_and_the_next_starts_when_one_ends() -> None:
    from side_by_side import run_side_by_side

    told = []

    def run(name: str, steps: int) -> Generator[None, None, str]:
        for step in range(steps):
            told.append(f"{name}{step}")
            yield
        return name

    runs = [partial(run, "a", 3), partial(run, "b", 1), partial(run, "c", 2)]
    assert list(run_side_by_side(runs, torch.device("cpu"), at_once=2)) == ["b", "a", "c"]
    assert told == ["a0", "b0", "a1", "a2", "c0", "c1"]


def test_what_the_csv_holds_is_not_run_again_and_an_interruption_loses_one_run_at_most(tmp_path: Path) -> None:
    from dataclasses import asdict

    from tracking_runs import OUTCOMES

    bench_, asked = bench(tmp_path / "runs.csv"), []

    def train(place: Any, spec: Any, fails: bool = False) -> Generator[None, None, dict[str, Any]]:
        asked.append(spec.seed)
        yield
        if fails and spec.seed == 2:
            raise KeyboardInterrupt
        return asdict(spec) | dict.fromkeys(OUTCOMES, 0.5)

    specs = [bench_.spec("confirm", "mamba", "[0, 1]", seed, 1e-3) for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        bench_.run(specs, partial(train, fails=True))
    kept = {int(line["seed"]) for line in bench_.lines()}
    assert kept == {0, 1}
    asked.clear()
    bench_.run(specs, train)
    assert asked == [2, 3]
    assert [int(line["seed"]) for line in bench_.lines()] == [0, 1, 2, 3]


def test_the_screen_chooses_the_rate_that_reads_furthest(tmp_path: Path) -> None:
    from dataclasses import asdict

    from state_tracking import best_rates
    from tracking_runs import OUTCOMES

    bench_ = bench(tmp_path / "runs.csv")
    outcomes = {1e-3: (0.6, ""), 3e-3: (0.999, "700"), 1e-2: (0.999, "300")}

    def train(place: Any, spec: Any) -> Generator[None, None, dict[str, Any]]:
        yield
        share, solved = outcomes[spec.learning_rate]
        return asdict(spec) | dict.fromkeys(OUTCOMES, "") | {"accuracy_256": share, "solved_at": solved}

    bench_.run([bench_.spec("screen", "mamba", "[-1, 1]", 0, rate) for rate in outcomes], train)
    assert best_rates(bench_) == {("mamba", "[-1, 1]"): 1e-2}


def test_surgery_runs_from_a_text_model_to_a_line_for_each_arm(tmp_path: Path) -> None:
    """`preserve` starts where the text model ended, `inherit` does not."""
    from tracking_runs import fine_tuned, text_base

    bench_ = bench(tmp_path / "runs.csv")
    bench_.run([bench_.spec("base", "delta_net", "[0, 1]", 1, 1e-3)], text_base)
    bench_.run([bench_.spec("surgery", "delta_net", arm, 1, 1e-3) for arm in ("no surgery", "preserve", "inherit")], fine_tuned)
    lines = {line["arm"]: line for line in bench_.lines()}
    base, control, preserve, inherit = (lines[arm] for arm in ("[0, 1]", "no surgery", "preserve", "inherit"))
    assert base["bits_after"] == control["bits_before"] == preserve["bits_before"]
    assert inherit["bits_before"] != base["bits_after"]
    assert all(float(line["bits_after"]) > 0 for line in (control, preserve, inherit))
