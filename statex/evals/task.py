"""What a task is: it plans its jobs (and refuses what cannot be done) before any model runs; a job scores rows and gives cells.

To add a task, write one file in `tasks/` with a class that has the members of `Task`, and add it to a suite in `tasks/__init__.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .result import Cell
from .stems import Advance
from .text import Encoder, Haystack, read_documents, source_name

if TYPE_CHECKING:
    from .subject import Subject


@dataclass(frozen=True)
class Options:
    """What the user chose, the same for all tasks; each task reads what concerns it."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    num_pairs: tuple[int, ...]
    samples: int
    seed: int
    data: str | Path | tuple[str | Path, ...] | None = None
    data_dir: str | Path | None = None
    shots: tuple[int, ...] | None = None
    needles: int = 4
    lengths_given: bool = True
    """Whether the user chose the lengths; else a task may have others that suit it better."""


@dataclass(frozen=True)
class Job:
    """Rows that are scored together and the cells that come of them (a needle at all depths of one length)."""

    label: str
    rows: int
    run: Callable[[Subject, Advance], list[Cell]]


@dataclass(frozen=True)
class Schedule:
    """A task made concrete: its jobs, and what its report says (see `TaskResult`)."""

    jobs: Sequence[Job]
    axes: dict[str, str]
    metric: str
    chance: float | None = None
    notes: tuple[str, ...] = ()


class Context:
    """What tasks plan with: tokenizer, options, and the data, which are read once."""

    def __init__(self, tokenizer: Encoder, options: Options) -> None:
        self.tokenizer, self.options = tokenizer, options

    @property
    def source(self) -> str:
        """The data's name for messages and notes."""
        return source_name(self.options.data)

    @cached_property
    def documents(self) -> list[str]:
        """Texts of `data`; none if it was not given. Raises `EvaluationError` if it cannot be read or is empty."""
        return [] if self.options.data is None else read_documents(self.options.data)

    @cached_property
    def haystack(self) -> Haystack:
        """The documents as one text to draw stretches from."""
        return Haystack(self.tokenizer, self.documents, self.source)

    def rng(self, task: str, *numbers: int) -> np.random.Generator:
        """The generator of one row: it depends on seed, task and the row's numbers, not on order or on other rows."""
        return np.random.default_rng([self.options.seed, zlib.crc32(task.encode()), *numbers])


class Task(Protocol):
    """A measurement."""

    name: str
    needs_data: bool

    def schedule(self, context: Context) -> Schedule:
        """Plan the jobs. Raises `EvaluationError` for options that cannot be met."""
