"""The result table in a checkpoint's model card."""

from __future__ import annotations

from pathlib import Path

from ...checkpoints import open_checkpoint
from ...errors import EvaluationError
from ..result import EvalResult, load_result, write_text
from .document import Table
from .evaluating import summary_table, task_blocks
from .markdown import render_block

BEGIN, END = "<!-- statex results: begin -->", "<!-- statex results: end -->"
CARD = "README.md"


def add_to_card(result: str | Path | EvalResult, checkpoint: str | Path) -> Path:
    """Write an evaluation's tables into the `README.md` of the checkpoint that it measured, instead of those of an earlier one.

    Returns:
        The card.
    Raises:
        EvaluationError: the result is of other weights, or the folder has no card.
        CheckpointError: the checkpoint cannot be read.
    """
    measured = result if isinstance(result, EvalResult) else load_result(result)
    folder = Path(checkpoint)
    with open_checkpoint(checkpoint) as files:
        if files.sha256() != measured.checkpoint.get("sha256"):
            raise EvaluationError(
                f"the result measured other weights than these ({measured.checkpoint.get('path', measured.name)})",
                where=str(checkpoint),
                fix="Evaluate this checkpoint, or give the folder that was evaluated",
            )
    card = folder / CARD
    if not card.is_file():
        raise EvaluationError("the folder has no model card", where=str(card), fix="Make a README.md there first")
    text = card.read_text(encoding="utf-8")
    section = card_section(measured)
    before, begin, rest = text.partition(BEGIN)
    if begin:
        _, _, after = rest.partition(END)
        write_text(card, before + section + after)
    else:
        write_text(card, f"{text.rstrip()}\n\n{section}\n")
    return card


def card_section(result: EvalResult) -> str:
    """The section as Markdown, between two comments by which it is found again."""
    tables = [block for task in result.tasks.values() for block in task_blocks(result.name, task) if isinstance(block, Table)]
    told = ", ".join(f"{package} {version}" for package, version in result.versions.items())
    parts = [
        BEGIN,
        "## Results",
        f"Measured by `statex eval` on {result.created[:10]} ({told}; {result.machine.get('device')}, "
        f"{result.settings.get('dtype')}, seed {result.settings.get('seed')}).",
        *(render_block(table) for table in (summary_table(result), *tables)),
        END,
    ]
    return "\n\n".join(parts)
