"""The driver of the needle grid's timing runs, keeps its rows and goes on where it stopped."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "needle_grid.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the benchmarks are not beside the tests")


def test_each_length_is_a_row_and_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid.csv"
    options = ["--shape", "gla-tiny", "--dtype", "float32", "--samples", "1", "--out", str(out)]
    for longest in ("512", "1024"):
        monkeypatch.setattr(sys, "argv", ["needle_grid.py", *options, "--longest", longest])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = list(csv.DictReader(out.open()))
    assert [int(row["length"]) for row in rows] == [256, 512, 1024]
    assert len(capsys.readouterr().out.splitlines()) == 3
    # From about a thousand tokens on, what prompts begin with is read once.
    assert int(rows[-1]["tokens_read"]) < 0.75 * int(rows[-1]["tokens_of_all_prompts"])
    assert all(float(row["seconds"]) > 0 and int(row["peak_mib"]) > 0 for row in rows)
