"""Options that take several values, and one alone as well."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def listed(values: Any) -> Any:
    """Values as a list; a string, a path, a number or a result alone is a list of one, and None, nothing given, stays None."""
    if values is None:
        return None
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
