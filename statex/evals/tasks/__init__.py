"""The tasks, one file for each kind, and the suites that they form. A new task is a line in its suite."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from ...errors import EvaluationError
from ..task import Task
from .choices import CHOICES, Lambada
from .copying import Copying
from .factbook import Factbook
from .many_shot import MANY_SHOT
from .mqar import MQAR, MQARGrid
from .niah import NEEDLES
from .passkey import Passkey
from .perplexity import Perplexity
from .position import PerplexityByPosition
from .reading import READING
from .retrieval import LOOKUPS
from .tracking import TRACKING

SUITES: dict[str, tuple[Task, ...]] = {
    "recall": (MQAR(), MQARGrid(), Passkey(), *NEEDLES, *LOOKUPS, Copying()),
    "reading": (*READING, Factbook()),
    "icl": MANY_SHOT,
    "quality": (Perplexity(), PerplexityByPosition(), Lambada(), *CHOICES),
    "tracking": TRACKING,
}
"""What is measured together: tasks by suite."""

TASKS: dict[str, Task] = {task.name: task for tasks in SUITES.values() for task in tasks}
"""All tasks by name."""

DEFAULT = ("mqar", "passkey", "niah", "perplexity")
"""What runs when nothing is asked for: a few minutes on a small model."""


def get_tasks(names: Sequence[str] | None, *, have_data: bool) -> list[Task]:
    """Tasks by name, in the order given; None means the default ones that can run (those that need data only with data).

    Raises:
        EvaluationError: an unknown name (the nearest is suggested), or no name.
    """
    if names is None:
        return [TASKS[name] for name in DEFAULT if have_data or not TASKS[name].needs_data]
    return [TASKS[name] for name in _known(names, TASKS, "task")]


def get_suites(names: Sequence[str]) -> list[Task]:
    """The tasks of suites by name, in order. Raises `EvaluationError` as `get_tasks`."""
    return [task for name in _known(names, SUITES, "suite") for task in SUITES[name]]


def _known(names: Iterable[str], table: Mapping[str, object], kind: str) -> list[str]:
    found = list(dict.fromkeys(name.strip() for name in names))
    for name in found:
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise EvaluationError(f"there is no {kind} {name!r}", where=f"{kind}s", fix=f"{hint}There are {', '.join(table)}")
    if not found:
        raise EvaluationError(f"no {kind} is asked for", where=f"{kind}s", fix=f"Give some of {', '.join(table)}")
    return found
