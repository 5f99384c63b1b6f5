"""The recipe as it will be run: overrides applied, and its open text entries filled with the data that was named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..evals.listed import listed
from .library import load_recipe
from .schema import Entry, Recipe, TextEntry

Paths = str | Path | Sequence[str | Path] | None
"""Files, folders or hub ids: one, several, or none named."""


def settle(
    recipe: str | Path | Recipe | None, data: Paths, held_out: Paths, overrides: str | Sequence[str] | Mapping[str, Any] = ()
) -> Recipe:
    """A complete recipe.

    Args:
        recipe: name, file or object; None is `recovery`.
        data: replaces the text entries without a path or, where each has one, all text entries; synthetic entries stay.
        held_out: the same in the evaluation's mixture, which gets a text entry like the training data's if it has none.

    Raises:
        RecipeError: an entry stays open, or `data` finds no entry to fill; and all that `load_recipe` raises.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError("overrides apply to a recipe's name or file", fix="Change the Recipe object instead.")
        loaded = recipe
    else:
        loaded = load_recipe("recovery" if recipe is None else recipe, overrides)
    mixture, held_out_mixture = loaded.data.mixture, loaded.evaluation.mixture
    if held_out is not None and not _texts(held_out_mixture):
        like = (_texts(mixture) or [TextEntry()])[0]
        held_out_mixture = [like.model_copy(update={"path": None}), *held_out_mixture]
    filled = {
        "data": loaded.data.model_copy(update={"mixture": _filled(mixture, listed(data), "--data")}),
        "evaluation": loaded.evaluation.model_copy(update={"mixture": _filled(held_out_mixture, listed(held_out), "--held-out")}),
    }
    return loaded.model_copy(update=filled)


def _filled(mixture: Sequence[Entry], paths: list[str | Path] | None, option: str) -> list[Entry]:
    """The mixture with an entry for each path, which share the weight of those that they replace."""
    texts = _texts(mixture)
    open_texts = [entry for entry in texts if entry.path is None]
    if not paths:
        if open_texts:
            raise RecipeError("the recipe leaves its text open", fix=f"Name a file, a folder or a hub id with {option}.")
        return list(mixture)
    replaced = open_texts or texts
    if not replaced:
        raise RecipeError(f"the recipe has no text entry for {option} to fill", fix="Add `- kind: text` to its mixture.")
    weight = sum(entry.weight for entry in replaced) / len(paths)
    fills = [replaced[0].model_copy(update={"path": str(path), "weight": weight}) for path in paths]
    return [*fills, *(entry for entry in mixture if not any(entry is old for old in replaced))]


def _texts(mixture: Sequence[Entry]) -> list[TextEntry]:
    return [entry for entry in mixture if isinstance(entry, TextEntry)]
