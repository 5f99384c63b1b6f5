"""Reports as files, and one report of several results and diagnoses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EvaluationError
from ..comparison import compare
from ..diagnosis import Diagnosis, load_diagnosis
from ..diagnosis.findings import DIAGNOSIS_FILE
from ..listed import listed
from ..result import EvalResult, load_result, write_text, writing
from . import html, markdown
from .comparing import comparison_document
from .diagnosing import diagnosis_document
from .document import Block, Document, Heading, Picture
from .evaluating import result_document

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 200
HTML_FILE, MARKDOWN_FILE, JSON_FILE = "report.html", "report.md", "report.json"


def write_document(document: Document, folder: Path) -> list[Path]:
    """Write `report.html`, `report.md` and a PNG for each figure into a folder that exists; returns their paths, PNGs first."""
    paths = [save_figure(picture.figure, folder / f"{picture.name}.png") for picture in document.pictures]
    for name, text in ((HTML_FILE, html.render(document)), (MARKDOWN_FILE, markdown.render(document))):
        write_text(folder / name, text)
        paths.append(folder / name)
    return paths


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=DPI)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def report(sources: str | Path | Sequence[str | Path], out: str | Path) -> list[Path]:
    """One report of evaluations and diagnoses: HTML, Markdown, JSON and figures in folder `out`; returns their paths, the HTML
    first.

    Several evaluations are compared with the first, on the tasks that they share.

    Args:
        sources: one or several folders that `statex eval -o` or `statex diagnose -o` wrote, or their JSON files.
    Raises:
        EvaluationError: no source, or one that is neither.
    """
    loaded = [_load(Path(source)) for source in listed(sources)]
    if not loaded:
        raise EvaluationError("there is nothing to report", where="report", fix="Give folders that `statex eval -o` wrote")
    results = [each for each in loaded if isinstance(each, EvalResult)]
    diagnoses = [each for each in loaded if isinstance(each, Diagnosis)]
    documents, told = [], {"results": [each.to_dict() for each in results], "diagnoses": [each.to_dict() for each in diagnoses]}
    if len(results) == 1:
        documents.append(result_document(results[0]))
    elif results:
        comparison = compare(results)
        told["comparison"] = comparison.to_dict()  # type: ignore[assignment]
        documents.append(comparison_document(comparison))
    documents += [diagnosis_document(each) for each in diagnoses]
    with writing(out) as folder:
        write_text(folder / JSON_FILE, json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        *figures, page, text = write_document(_joined(documents), folder)
        return [page, text, folder / JSON_FILE, *figures]


def _joined(documents: list[Document]) -> Document:
    """Several documents as one, their pictures numbered apart."""
    if len(documents) == 1:
        return documents[0]
    blocks: list[Block] = []
    for number, document in enumerate(documents, 1):
        blocks += [Heading(document.title), *(_apart(block, number) for block in document.blocks)]
    return Document("; ".join(document.title for document in documents), blocks)


def _apart(block: Block, number: int) -> Block:
    if isinstance(block, Picture):
        return replace(block, name=f"{number}_{block.name}")
    return replace(block, level=3) if isinstance(block, Heading) else block


def _load(path: Path) -> EvalResult | Diagnosis:
    """Whatever lies there."""
    if path.name == DIAGNOSIS_FILE or (path / DIAGNOSIS_FILE).is_file():
        return load_diagnosis(path)
    if path.is_file() and _is_diagnosis(path):
        return load_diagnosis(path)
    return load_result(path)


def _is_diagnosis(path: Path) -> bool:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "probe" in data
