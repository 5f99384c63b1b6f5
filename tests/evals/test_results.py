"""From a checkpoint folder to files, and from files to a comparison."""

from __future__ import annotations

import csv
import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType

from statex.errors import EvaluationError, StatexError
from statex.evals import EvalResult, compare, evaluate, load_result
from statex.evals.passage import PASSAGE
from statex.evals.result import ACCURACY

from ..fixtures import write_gla, write_hgrn
from .models import BYTES, Rule, knows_nothing, random_model, random_recurrent_model, recalls

OPTIONS = {"lengths": [256, 320], "depths": [0, 1], "num_pairs": [2, 4], "progress": False}


def text_of(table: RenderableType) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def width_of(png: Path) -> int:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">I", data[16:20])[0]


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(PASSAGE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def good(book: Path) -> EvalResult:
    return evaluate(Rule(recalls), tokenizer=BYTES, data=book, samples=6, name="good", **OPTIONS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bad(book: Path) -> EvalResult:
    return evaluate(Rule(knows_nothing), tokenizer=BYTES, data=book, samples=6, name="bad", **OPTIONS)  # type: ignore[arg-type]


def test_a_checkpoint_folder_is_measured_by_its_own_tokenizer_and_identified(tmp_path: Path) -> None:
    folder = write_gla(tmp_path / "tiny-gla", vocab_size=259)
    BYTES.save_pretrained(folder)
    result = evaluate(folder, ["mqar"], samples=2, num_pairs=[2], out=tmp_path / "out", progress=False)
    assert result.name == "tiny-gla"
    assert result.checkpoint["family"] == "gla"
    assert result.checkpoint["state_elements"] == 3 * 16 * 32 // 4
    assert set(result.checkpoint["sha256"]) == {"config.json", "model.safetensors"}
    assert result.settings["dtype"] == "float32"
    assert {"statex", "torch", "transformers"} <= set(result.versions)
    assert load_result(tmp_path / "out") == result


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_gla(tmp_path / "tiny-gla", vocab_size=259)
    with pytest.raises(StatexError, match="holds no tokenizer") as caught:
        evaluate(folder, ["mqar"], progress=False)
    assert str(folder) in str(caught.value)
    assert evaluate(folder, ["mqar"], tokenizer=BYTES, samples=1, num_pairs=[2], progress=False).tasks["mqar"].cells[0].n == 2


def test_a_loaded_model_needs_a_tokenizer_and_known_names_for_dtype_and_device() -> None:
    with pytest.raises(EvaluationError, match="comes without a tokenizer"):
        evaluate(random_model(), ["mqar"], progress=False)
    with pytest.raises(StatexError, match="'int8' is not a dtype"):
        evaluate(random_model(), ["mqar"], tokenizer=BYTES, dtype="int8", progress=False)
    with pytest.raises(StatexError, match=r"torch\.int8 is not a dtype"):
        evaluate(random_model(), ["mqar"], tokenizer=BYTES, dtype=torch.int8, progress=False)
    with pytest.raises(StatexError, match="the device cannot be used"):
        evaluate(random_model(), ["mqar"], tokenizer=BYTES, device="abacus", progress=False)
    with pytest.raises(StatexError, match="the device cannot be used"):
        evaluate("nowhere", ["mqar"], tokenizer=BYTES, device="abacus", progress=False)


def test_a_loaded_model_is_evaluated_in_another_dtype_as_a_copy_and_stays_as_it_is() -> None:
    model = random_recurrent_model().train()
    model.model.norm.eval()
    before = [(weight, weight.dtype, weight.data.clone()) for weight in model.parameters()]
    modes = [module.training for module in model.modules()]
    result = evaluate(model, "mqar", num_pairs=2, samples=1, tokenizer=BYTES, dtype="bfloat16", progress=False)
    assert result.settings["dtype"] == "bfloat16"
    assert all(weight.dtype == dtype and weight.equal(data) for weight, dtype, data in before)
    assert [module.training for module in model.modules()] == modes


def test_a_model_whose_first_parameter_stays_fp32_is_reported_in_the_dtype_of_its_weights(tmp_path: Path) -> None:
    folder = write_hgrn(tmp_path / "hgrn", vocab_size=259)
    result = evaluate(folder, "mqar", num_pairs=2, samples=1, tokenizer=BYTES, dtype="bfloat16", progress=False)
    assert result.settings["dtype"] == "bfloat16"


def test_one_value_alone_is_a_list_of_one() -> None:
    options = {"lengths": 256, "depths": 0.0, "num_pairs": 2, "shots": 2, "samples": 1, "progress": False}
    result = evaluate(random_model(), "mqar", suites="icl", tokenizer=BYTES, **options)  # type: ignore[arg-type]
    assert "mqar" in result.tasks
    assert len(result.tasks) > 1
    assert [result.settings[key] for key in ("lengths", "depths", "num_pairs", "shots")] == [[256], [0.0], [2], [2]]
    with pytest.raises(EvaluationError, match="0 is not a whole number from 1"):
        evaluate(random_model(), "mqar", num_pairs=0, tokenizer=BYTES, progress=False)


def test_tasks_that_need_data_are_left_out_when_none_is_named(good: EvalResult) -> None:
    assert list(good.tasks) == ["mqar", "passkey", "niah", "perplexity"]
    without = evaluate(random_model(), tokenizer=BYTES, samples=1, **OPTIONS)  # type: ignore[arg-type]
    assert list(without.tasks) == ["mqar", "passkey", "niah"]


def test_results_survive_the_file(good: EvalResult, tmp_path: Path) -> None:
    paths = good.save(tmp_path / "deep" / "folder")
    figures = ["mqar.png", "passkey.png", "niah.png", "perplexity.png"]
    assert [path.name for path in paths] == ["results.json", *figures, "report.html", "report.md"]
    assert all(width_of(path) > 600 for path in paths[1:5])
    assert load_result(paths[0]) == load_result(paths[0].parent) == good
    assert not list(paths[0].parent.glob(".*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no evaluation result here"),
        ("{", "not valid JSON"),
        ("[]", "schema version None"),
        ('{"schema_version": 99}', "schema version 99, this statex reads 1"),
        ('{"schema_version": 1, "tasks": {}}', "lacks or misnames a field"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        load_result(tmp_path)


def test_every_cell_has_its_interval_and_sample_size(good: EvalResult) -> None:
    for task in good.tasks.values():
        for cell in task.cells:
            assert cell.low is not None
            assert cell.high is not None
            assert cell.low <= cell.value <= cell.high
            assert cell.n == sum(cell.weights)
            assert len(cell.outcomes) == cell.rows
            assert (cell.correct is not None) == (task.metric == ACCURACY)
    assert {cell.n for cell in good.tasks["passkey"].cells} == {6}
    assert [cell.n for cell in good.tasks["mqar"].cells] == [12, 24]


def test_tables_show_values_intervals_and_notes(good: EvalResult) -> None:
    text = text_of(good.table())
    assert "1.00 [0.61, 1.00]" in text
    assert "haystack: book.txt" in text
    assert "6 prompts a cell" in text
    assert "bits per byte" in text


def test_a_comparison_shows_the_gain_and_writes_its_files(good: EvalResult, bad: EvalResult, tmp_path: Path) -> None:
    for result in (good, bad):
        result.save(tmp_path / result.name)
    comparison = compare([tmp_path / "bad", tmp_path / "good"], tmp_path / "out")
    assert comparison.names == ["bad", "good"]
    text = text_of(comparison.table())
    assert "+1.00 [+0.86, +1.00] better" in text
    names = {path.name for path in comparison.paths}
    figures = {f"compare_{task}.png" for task in ("mqar", "passkey", "niah", "perplexity")}
    grids = {f"compare_{task}_{number}.png" for task in ("passkey", "niah") for number in (1, 2)}
    assert names == {"compare.json", "compare.csv", "report.html", "report.md"} | figures | grids
    assert all(path.stat().st_size > 0 for path in comparison.paths)
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    (row,) = (row for row in rows if row["at"] == "num_pairs=4" and row["checkpoint"] == "good")
    assert (row["value"], row["difference"], row["n"]) == ("1.0", "1.0", "24")
    assert len(json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]) == len(comparison.rows)


def test_a_result_compared_with_itself_shows_no_difference(good: EvalResult) -> None:
    comparison = compare([good, good])
    assert comparison.names == ["good (1)", "good (2)"]
    text = text_of(comparison.table())
    assert "no difference shown" in text
    assert "better" not in text
    assert "worse" not in text
    assert all(row.differences[1] is not None and row.differences[1].value == 0 for row in comparison.rows)


def test_a_table_is_judged_as_a_whole_and_its_questions_together(good: EvalResult, bad: EvalResult) -> None:
    """Six rows that all gained give p = 2/2^6 = 0.031: enough for one comparison, and after correction not for two."""
    comparison = compare([bad, good])
    sizes = [row.differences[1] for row in comparison.rows if row.task == "mqar" and row.at]
    assert [(gain.p, gain.adjusted, gain.shown) for gain in sizes if gain] == [(2 / 2**6, 4 / 2**6, False)] * 2
    together = comparison.summary("mqar")
    assert together is not None
    gain = together.differences[1]
    assert gain is not None
    assert (gain.value, gain.p, gain.adjusted, gain.shown) == (1, 2 / 2**6, None, True)
    assert comparison.summary("perplexity") is None


def test_results_on_other_inputs_are_not_paired(good: EvalResult) -> None:
    other = evaluate(Rule(knows_nothing), ["mqar"], tokenizer=BYTES, samples=6, seed=1, num_pairs=[2, 4], progress=False)
    comparison = compare([good, other])
    assert all(row.differences[1] is None for row in comparison.rows)
    assert "other inputs" in text_of(comparison.table())


def test_needles_are_compared_at_every_depth_and_over_all(good: EvalResult, bad: EvalResult) -> None:
    points = [row.at for row in compare([good, bad]).rows if row.task == "niah"]
    expected = [[{"length": length, "depth": 0.0}, {"length": length, "depth": 1.0}, {"length": length}] for length in (256, 320)]
    assert points == [*expected[0], *expected[1], {}]
    pooled = good.tasks["niah"].pooled(length=256)
    assert (pooled.n, pooled.rows, pooled.correct) == (12, 6, 12)


def test_comparisons_that_make_no_sense_are_refused(good: EvalResult, book: Path) -> None:
    with pytest.raises(EvaluationError, match="two results or more"):
        compare([good])
    with pytest.raises(EvaluationError, match="1 names are given for 2 results"):
        compare([good, good], names=["one"])
    for alone in (good, "results"):
        with pytest.raises(EvaluationError, match="two results or more"):
            compare(alone, "other")  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="1 names are given for 2 results"):
        compare([good, good], names="ab")
    other = evaluate(random_model(), ["mqar"], tokenizer=BYTES, samples=1, num_pairs=[3], progress=False)
    perplexity = evaluate(random_model(), ["perplexity"], tokenizer=BYTES, data=book, lengths=[64], samples=2, progress=False)
    with pytest.raises(EvaluationError, match="no grid point of any task in common"):
        compare([other, perplexity])


def test_importing_evals_and_its_tasks_imports_no_torch() -> None:
    code = "import sys, statex.evals as e; e.TASKS; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
