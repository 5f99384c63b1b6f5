"""The HGRN benchmark: how its models begin, and its table, runs of one size beside each other, never beside runs of another."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "hgrn_outer_product.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the benchmarks are not beside the tests")


SIZES: dict[str, Any] = {
    "start": "long",
    "hidden": 32,
    "layers": 2,
    "base_steps": 2,
    "tune_steps": 20,
    "tune_rate": 0.0,
    "text_rows": 8,
    "mqar_tokens": 512,
}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


@pytest.mark.parametrize("family", ["hgrn", "hgrn2"])
def test_channels_of_new_models_remember_eight_to_256_tokens_each_its_own_number(family: str) -> None:
    from hgrn_runs import Spec, new_model

    model = new_model(Spec("base", 16, seed=0, **SIZES), family)
    for layer in model.model.layers:
        tokens = 1 / (1 - torch.sigmoid(layer.mixer.f_conv1d.bias))
        assert 8 <= tokens.min() < 20
        assert 100 < tokens.max() <= 256
        assert layer.mixer.i_conv1d.bias.count_nonzero() == 0


def test_opened_gains_are_led_to_the_root_of_the_factor_and_weights_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a learning rate of 0, so that nothing else moves."""
    import hgrn_runs

    models, make = [], hgrn_runs.model_of

    def keep(*order: Any) -> Any:
        models.append(make(*order))
        return models[-1]

    monkeypatch.setattr(hgrn_runs, "model_of", keep)
    books = Path(hgrn_runs.statex.__file__).parent / "assets" / "books_test.jsonl.gz"
    place = hgrn_runs.Place(books, books, tmp_path, window=512, rate=0.0, warmup=1, test_bytes=1024, compile=False)
    for arm, factor in (("base", 1), ("preserve, opened", 16)):
        hgrn_runs.train(hgrn_runs.Spec(arm, factor, seed=0, **SIZES), place)
    (base, opened) = (dict(model.named_parameters()) for model in models)
    gains = [p for name, p in opened.items() if name.endswith("outer_gain")]
    assert len(gains) == 2
    assert all(torch.allclose(gain, torch.tensor(4.0)) for gain in gains)
    assert all(opened[name].equal(p) for name, p in base.items())


def test_runs_of_other_sizes_are_tables_of_their_own_and_seeds_are_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, figure = tmp_path / "runs.csv", tmp_path / "figure.png"
    sizes = {"start": "long", "hidden": 128, "layers": 4, "tune_steps": 10, "tune_rate": 0.01, "text_rows": 8, "mqar_tokens": 512}
    measured = {"tokens": 1_000_000, "state_elements": 512, "bits_per_byte": 2.0}
    runs = [
        *[("base", 1, 100, 0, 0.5), ("base", 1, 100, 1, 0.7), ("preserve", 16, 100, 0, 0.8), ("HGRN2 from scratch", 16, 100, 0, 1)],
        *[("base", 1, 200, 0, 0.9), ("HGRN2 from scratch", 16, 200, 0, 1)],
    ]
    with results.open("w", newline="") as file:
        rows = [
            {"arm": arm, "factor": factor, "seed": seed, "base_steps": steps, **sizes, **measured, "recall_2": recall}
            for arm, factor, steps, seed, recall in runs
        ]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(sys, "argv", ["hgrn_outer_product.py", "--table", "--results", str(results), "--figure", str(figure)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    first, second = capsys.readouterr().out.split("200 + 10 steps")
    assert "| HGRN | 512 | 2 | 1 M | 2.0000 | 60.0 |" in first
    assert "| preserve ×16 | 512 | 1 | 1 M | 2.0000 | 80.0 |" in first
    assert "| HGRN | 512 | 1 | 1 M | 2.0000 | 90.0 |" in second
    assert figure.stat().st_size > 0
