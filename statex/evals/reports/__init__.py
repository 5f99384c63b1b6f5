"""Reports: what a result, a comparison or a diagnosis says, as a document, and its files.

The names below are imported when first used: tables for a terminal need no matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .card import add_to_card
    from .comparing import comparison_document
    from .diagnosing import diagnosis_document
    from .evaluating import result_document
    from .files import report, write_document

_PLACES = {
    "add_to_card": "card",
    "comparison_document": "comparing",
    "diagnosis_document": "diagnosing",
    "result_document": "evaluating",
    "report": "files",
    "write_document": "files",
}

__all__ = ["add_to_card", "comparison_document", "diagnosis_document", "report", "result_document", "write_document"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
