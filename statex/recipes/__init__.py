"""Fine-tuning by recipe: YAML with a strict schema, packed data, and a trainer that resumes exactly.

Recipes are listed and checked without torch; it is imported by the first use of `finetune`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .library import RecipeInfo, check_recipe, copy_recipe, dump_recipe, list_recipes, load_recipe, recipe_text
from .schema import Recipe

if TYPE_CHECKING:
    from .run import FinetuneResult, finetune

__all__ = [
    "FinetuneResult",
    "Recipe",
    "RecipeInfo",
    "check_recipe",
    "copy_recipe",
    "dump_recipe",
    "finetune",
    "list_recipes",
    "load_recipe",
    "recipe_text",
]


def __getattr__(name: str) -> Any:
    if name in ("FinetuneResult", "finetune"):
        from . import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
