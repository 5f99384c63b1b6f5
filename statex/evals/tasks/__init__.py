"""The tasks, one file each. A new one is a line here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ...errors import EvaluationError
from ..task import Task
from .mqar import MQAR
from .niah import NeedleInAHaystack
from .passkey import Passkey
from .perplexity import Perplexity

TASKS: dict[str, Task] = {task.name: task for task in (MQAR(), Passkey(), NeedleInAHaystack(), Perplexity())}
"""All tasks by name."""


def get_tasks(names: Sequence[str] | None, *, have_data: bool) -> list[Task]:
    """Tasks by name, in the order given; None means all that can run (those that need data only with data).

    Raises:
        EvaluationError: an unknown name (the nearest is suggested), or no name.
    """
    if names is None:
        return [task for task in TASKS.values() if have_data or not task.needs_data]
    names = [name.strip() for name in names]
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise EvaluationError(f"there is no task {name!r}", where="tasks", fix=f"{hint}There are {', '.join(TASKS)}")
    if not names:
        raise EvaluationError("no task is asked for", where="tasks", fix=f"Give some of {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(names)]
