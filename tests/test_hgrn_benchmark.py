"""The table of the HGRN benchmark: runs of one size beside each other, never beside runs of another."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "hgrn_outer_product.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the benchmarks are not beside the tests")


def test_runs_of_other_sizes_are_tables_of_their_own_and_seeds_are_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, figure = tmp_path / "runs.csv", tmp_path / "figure.png"
    sizes = {"hidden": 128, "layers": 4, "tune_steps": 10, "text_rows": 8, "mqar_tokens": 512}
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
