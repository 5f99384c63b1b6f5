"""Reports as a reader gets them: one HTML file, Markdown, JSON, and tables in a model card."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps

import statex
from statex.errors import EvaluationError
from statex.evals import EvalResult, evaluate
from statex.evals.diagnosis import Diagnosis
from statex.evals.diagnosis.findings import LayerFinding
from statex.evals.diagnosis.memory import LayerMemory
from statex.evals.plots import COLOURS, HEAT, MARKERS, state_plot, task_figures
from statex.evals.reports import add_to_card, html, markdown, result_document
from statex.evals.reports.document import Code, Document, Heading, Notes, Paragraph, Table
from statex.evals.result import ACCURACY, BITS_PER_BYTE, TaskResult, make_cell
from statex.evals.statistics import Difference

from ..fixtures import write_gla
from .models import BYTES
from .test_capacity import task

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags nest and collects what a test wants to know."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def result(name: str, scale: float, state: int) -> EvalResult:
    """Recall by pairs, by needle, and bits per byte, made up."""
    rng = np.random.default_rng(int(scale))
    needles = [
        make_cell(ACCURACY, {"length": length, "depth": depth}, rng.integers(0, 2, 8), np.ones(8, dtype=int), f"{length}-{depth}")
        for length in (256, 512)
        for depth in (0.0, 0.5, 1.0)
    ]
    text = [make_cell(BITS_PER_BYTE, {"length": n}, 900 + rng.normal(0, 9, 8), np.full(8, 500), f"t{n}") for n in (256, 512)]
    tasks = {
        "mqar": task(scale, rows=8),
        "niah": TaskResult("niah", ACCURACY, {"length": "tokens", "depth": "depth"}, needles),
        "perplexity": TaskResult("perplexity", BITS_PER_BYTE, {"length": "window (tokens)"}, text, notes=["a <note> & more"]),
    }
    plan = {"seed": 0, "operations": [{"operator": "lift_keys", "layers": [0], "factor": 4}]} if state > 100 else None
    checkpoint = {"name": name, "path": name, "state_elements": state, "sha256": {"model.safetensors": "abc123"}, "plan": plan}
    return EvalResult(
        checkpoint, tasks, {"seed": 0, "dtype": "float32"}, {"statex": "0"}, {"device": "cpu"}, "2030-01-01T00:00:00+00:00"
    )


@pytest.fixture(scope="module")
def small() -> EvalResult:
    return result("small", 20, 100)


@pytest.fixture(scope="module")
def large() -> EvalResult:
    return result("large <b>", 60, 400)


@pytest.fixture(scope="module")
def both(small: EvalResult, large: EvalResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for each, name in ((small, "small"), (large, "large")):
        each.save(folder / name)
    found = Difference(0.3, 0.2, 0.4, 0.001, "paired t test")
    layers = [
        LayerFinding(i, "2 × [4, 4]", 32, found, [found, found], LayerMemory([2.0], [0.5], 4, [9.0], 64), []) for i in range(2)
    ]
    checkpoint = {"name": "small"}
    settings = {"window": 16, "probe": "mqar"}
    Diagnosis(
        checkpoint, "MQAR", 8, 0.6, 0.1, found, layers, {"seed": 0, "operations": []}, ["expand all"], settings, {}, {}, "now"
    ).save(folder / "diagnosis")
    return folder


@pytest.fixture(scope="module")
def joint(both: Path) -> Path:
    """One report of two evaluations, one given as a folder and one as a file, and a diagnosis."""
    paths = statex.report([both / "small" / "results.json", both / "large", both / "diagnosis" / "diagnosis.json"], both / "joint")
    assert [path.name for path in paths[:3]] == ["report.html", "report.md", "report.json"]
    assert {path.name for path in paths} == {path.name for path in (both / "joint").iterdir()}
    return both / "joint"


def test_one_file_holds_everything_and_asks_for_nothing_else(joint: Path) -> None:
    text = (joint / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:image/svg+xml;base64,", "#")), (tag, target)
        assert tag not in ("script", "link", "iframe")
    assert not re.search(r"url\(|@import", text)
    for words in ("mqar: capacity", "items held, times small", "lift_keys", "abc123", "Provenance of small", "recall lost by head"):
        assert words in page.text


def test_names_and_notes_cannot_break_the_page(large: EvalResult) -> None:
    page = Page(html.render(result_document(large)))
    assert "large <b>" in page.text
    assert "a <note> & more" in page.text
    assert not [tag for tag, _ in page.tags if tag in ("b", "note")]


def test_every_figure_has_words_for_those_who_do_not_see_it_and_is_a_vector_graphic(small: EvalResult) -> None:
    images = [attributes for tag, attributes in Page(html.render(result_document(small))).tags if tag == "img"]
    assert len(images) == 4
    for image in images:
        assert "small" in (image["alt"] or "")
        assert base64.b64decode((image["src"] or "").split(",")[1]).startswith(b"<?xml")


def test_links_of_the_contents_lead_somewhere(joint: Path) -> None:
    page = Page((joint / "report.html").read_text(encoding="utf-8"))
    targets = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    places = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert targets == places
    assert len(targets) > 4


def test_equal_results_give_equal_pages(small: EvalResult) -> None:
    text = replace(small, tasks={"perplexity": small.tasks["perplexity"]})
    assert html.render(result_document(text)) == html.render(result_document(text))


def test_the_json_of_a_report_holds_the_results_and_their_comparison(joint: Path, small: EvalResult) -> None:
    told = json.loads((joint / "report.json").read_text(encoding="utf-8"))
    assert EvalResult.from_dict(told["results"][0]) == small
    assert told["diagnoses"][0]["gaining_layers"] == [0, 1]
    (half,) = (ratio for ratio in told["comparison"]["capacity_ratios"] if ratio["level"] == 0.5)
    assert half["low"] < 3 < half["high"]
    assert {row["differences"][1]["test"] for row in told["comparison"]["rows"]} >= {"exact sign test (McNemar)"}


def test_markdown_names_figures_that_lie_beside_it(both: Path) -> None:
    text = (both / "small" / "report.md").read_text(encoding="utf-8")
    named = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert named == ["mqar.png", "mqar_capacity.png", "niah.png", "perplexity.png"]
    assert all((both / "small" / name).is_file() for name in named)
    for line in re.findall(r"(?m)^\|.*$", text):
        assert line.endswith("|")


def test_blocks_read_the_same_in_markdown() -> None:
    table = Table(["a|b", "n"], [["x|y", "1"]], title="T", caption="c")
    document = Document("D", [Heading("H"), Paragraph("p", strong=True), Notes(["one"]), table, Code("k: v\n")])
    rows = "**T**\n\n| a\\|b | n |\n| :--- | ---: |\n| x\\|y | 1 |\n\n*c*"
    assert markdown.render(document) == f"# D\n\n## H\n\n**p**\n\n- one\n\n{rows}\n\n```yaml\nk: v\n```\n"


def test_one_folder_alone_is_reported(both: Path, tmp_path: Path) -> None:
    page, *_ = statex.report(str(both / "small"), tmp_path / "out")
    assert page.name == "report.html"


def test_nothing_and_what_is_no_result_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="nothing to report"):
        statex.report([], tmp_path / "out")
    with pytest.raises(EvaluationError, match="no evaluation result here"):
        statex.report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lines_differ_in_more_than_colour(small: EvalResult, large: EvalResult) -> None:
    (axes,) = task_figures([("a", small.tasks["mqar"]), ("b", large.tasks["mqar"])])["mqar"].axes
    lines = [line for line in axes.get_lines() if line.get_marker() in MARKERS]
    assert len({line.get_marker() for line in lines}) == 2
    assert len({line.get_linestyle() for line in lines}) == 2


def test_the_palette_stays_apart_for_the_colour_blind() -> None:
    """Machado et al. (2009), full deuteranopia and protanopia: the first four colours stay at least 20 of 255 apart."""
    matrices = {
        "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    }
    colours = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS[:4]])
    for matrix in matrices.values():
        seen = colours @ np.array(matrix).T
        apart = [np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]]
        assert min(apart) > 20


def test_heat_maps_state_their_values(small: EvalResult) -> None:
    axes = task_figures([("small", small.tasks["niah"])])["niah"].axes[0]
    texts = {text.get_text() for text in axes.texts}
    assert texts == {f"{cell.value:.2f}" for cell in small.tasks["niah"].cells}


def test_heat_maps_read_the_same_in_grey() -> None:
    colours = np.array(colormaps[HEAT](np.linspace(0, 1, 64)))[:, :3]
    lightness = colours @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > 0).all()


def test_capacity_by_state_needs_two_checkpoints(small: EvalResult, large: EvalResult) -> None:
    assert state_plot([("small", small)], "mqar") is None
    figure = state_plot([("small", small), ("large", large)], "mqar")
    assert figure is not None
    assert {text.get_text() for text in figure.axes[0].texts} == {"small", "large"}


def test_a_card_takes_the_tables_and_replaces_them_later(tmp_path: Path) -> None:
    folder = write_gla(tmp_path / "tiny", vocab_size=259)
    BYTES.save_pretrained(folder)
    card = folder / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# tiny\n\nWords.\n", encoding="utf-8")
    measured = evaluate(folder, ["mqar"], samples=2, num_pairs=[2], out=tmp_path / "out", progress=False)
    assert add_to_card(tmp_path / "out", folder) == card
    first = card.read_text(encoding="utf-8")
    assert first.startswith("---\nlicense: mit\n---\n\n# tiny\n\nWords.\n\n<!-- statex results: begin -->\n\n## Results")
    assert "| mqar |" in first
    card.write_text(f"{first}\nMore words.\n", encoding="utf-8")
    add_to_card(measured, folder)
    again = card.read_text(encoding="utf-8")
    assert again == f"{first}\nMore words.\n"
    assert again.count("## Results") == 1


def test_a_card_refuses_results_of_other_weights(tmp_path: Path, small: EvalResult) -> None:
    folder = write_gla(tmp_path / "tiny")
    with pytest.raises(EvaluationError, match="measured other weights"):
        add_to_card(small, folder)
    BYTES.save_pretrained(other := write_gla(tmp_path / "bare", vocab_size=259))
    measured = evaluate(other, ["mqar"], samples=1, num_pairs=[2], progress=False)
    with pytest.raises(EvaluationError, match="no model card"):
        add_to_card(measured, other)


def test_provenance_tells_how_a_checkpoint_was_expanded_and_trained(tmp_path: Path) -> None:
    source = write_gla(tmp_path / "tiny", vocab_size=259)
    statex.expand(source, tmp_path / "big", operator="lift_keys", factor=2, layers="1", progress=False)
    config = json.loads((tmp_path / "big" / "config.json").read_text())
    config["statex"]["provenance"]["finetune"] = [{"steps": 180, "tokens": 737280, "final_loss": 1.25, "recipe": {}}]
    (tmp_path / "big" / "config.json").write_text(json.dumps(config))
    measured = evaluate(tmp_path / "big", ["mqar"], tokenizer=BYTES, samples=2, num_pairs=[2], progress=False)
    text = markdown.render(result_document(measured))
    assert f"| expanded | yes, from {source} |" in text
    assert "| fine-tuned | steps 180, tokens 737,280, final loss 1.25 |" in text
    assert "operator: lift_keys" in text
