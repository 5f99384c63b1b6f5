"""What all commands of `statex` share: values read from words, results and errors told on a terminal."""

from __future__ import annotations

import errno
import os
import sys
from types import FrameType
from typing import Any, NoReturn

import typer

from .errors import StatexError


def numbers(text: str | None, kind: type, option: str) -> list[Any] | None:
    """A comma-separated list of numbers, or None."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "4,16,64" if kind is int else "0,0.5,1"
        raise StatexError(f"{text!r} is no list of numbers", where=option, fix=f"Separate them by commas: {example}") from None


def key_values(items: list[str] | None) -> dict[str, Any] | None:
    """KEY=VALUE words as a dict, values read as YAML (so that `true` and `4` are what they look like)."""
    if not items:
        return None
    import yaml

    found = {}
    for item in items:
        key, equals, value = item.partition("=")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not key or not equals:
            raise StatexError(f"{item!r} sets nothing", where="--set", fix="Write KEY=VALUE, such as mixing=scalar")
    return found


def show(result: Any) -> None:
    """Print a table, or a dict as JSON."""
    from rich.console import Console

    if isinstance(result, dict):
        import json

        typer.echo(json.dumps(result, indent=2))
    else:
        # A file or a pipe has no width that a table must fit; names may hold brackets, which are no markup.
        Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160, markup=False).print(result)


def say(line: str) -> None:
    from rich.console import Console

    Console(soft_wrap=True, highlight=False, markup=False).print(line)


def fail(message: str, code: int = 1) -> NoReturn:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), message))
    raise SystemExit(code)


class Interrupted(BaseException):
    """A signal asked to stop. No KeyboardInterrupt, which typer would answer without a word."""

    def __init__(self, number: int) -> None:
        self.number = number


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


def message(error: BaseException) -> tuple[str, int]:
    """What to tell about an error, and the exit code."""
    if isinstance(error, Interrupted):
        notes = "".join(f". {note}" for note in getattr(error, "__notes__", ()))
        return f"interrupted. What was complete is kept, nothing is left half-written{notes}", 128 + error.number
    if isinstance(error, StatexError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full. Free some space and run again", 1
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # a GPU's, which is no MemoryError
        return "the memory does not suffice. Ask for smaller sizes or use a larger machine", 1
    return f"unexpected {type(error).__name__}: {error}. Run again with --debug and report the traceback", 1
