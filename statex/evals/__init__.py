"""Recall and language-modelling measurements, comparisons of several checkpoints, and the check that two compute one function.

The names below are imported when first used, so that importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import Comparison, compare
    from .diagnosis import Diagnosis, auto_layers, diagnose
    from .result import EvalResult, load_result
    from .runner import evaluate
    from .tasks import SUITES, TASKS
    from .verification import VerifyReport, verify

_PLACES = {
    "Comparison": "comparison",
    "compare": "comparison",
    "Diagnosis": "diagnosis",
    "auto_layers": "diagnosis",
    "diagnose": "diagnosis",
    "EvalResult": "result",
    "load_result": "result",
    "evaluate": "runner",
    "SUITES": "tasks",
    "TASKS": "tasks",
    "VerifyReport": "verification",
    "verify": "verification",
}

__all__ = [
    "SUITES",
    "TASKS",
    "Comparison",
    "Diagnosis",
    "EvalResult",
    "VerifyReport",
    "auto_layers",
    "compare",
    "diagnose",
    "evaluate",
    "load_result",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PLACES[name]}", __name__), name)
    globals()[name] = value
    return value
