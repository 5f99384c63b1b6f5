"""One small hierarchy of errors. Every message says what is wrong, where, and what to do about it."""

from __future__ import annotations


class StatexError(Exception):
    """Base of all errors that a user can cause and mend.

    Args:
        what: what is wrong, one sentence without a full stop.
        where: the file, tensor, layer or key that it concerns.
        fix: what the user can do about it.
    """

    exit_code = 1
    """Of the command that it ends."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        message = what if where is None else f"{what} ({where})"
        super().__init__(message if fix is None else f"{message}. {fix[:1].upper()}{fix[1:].rstrip('.')}")


class CheckpointError(StatexError):
    """A checkpoint cannot be read or written: missing, truncated, inconsistent, of an unknown family or dialect."""


class PlanError(StatexError):
    """An expansion plan cannot be carried out on this checkpoint."""


class RecipeError(StatexError):
    """A fine-tuning recipe or its data is not usable."""


class TrainingError(StatexError):
    """A fine-tuning run had to stop (NaN, loss spike); the last good checkpoint is kept."""


class RunStopped(TrainingError):
    """A fine-tuning run was asked to stop (Ctrl-C, SIGTERM); the message says what was kept and how to go on.

    Args:
        signal: number of the signal.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, signal: int = 2) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = 128 + signal


class EvaluationError(StatexError):
    """An evaluation cannot be run as asked."""


class ExportError(StatexError):
    """A checkpoint cannot be written in the format asked for; the message says precisely why."""
