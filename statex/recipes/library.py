"""Recipes by name or file: list, load with `extends` and overrides, copy, validate. Needs no torch."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import RecipeError
from .schema import MqarEntry, Recipe, TextEntry, TrackingEntry

SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class RecipeInfo:
    """A line of `statex recipes ls`."""

    name: str
    description: str
    path: Path


def list_recipes() -> list[RecipeInfo]:
    """The recipes that ship with the package, by name."""
    return [RecipeInfo(path.stem, load_recipe(path).description, path) for path in sorted(SHIPPED.glob("*.yaml"))]


def recipe_path(name_or_file: str | Path) -> Path:
    """The file of a shipped recipe, or the file itself. Raises `RecipeError` where there is neither."""
    shipped = SHIPPED / f"{name_or_file}.yaml"
    if Path(str(name_or_file)).name == str(name_or_file) and shipped.is_file():
        return shipped
    if Path(name_or_file).is_file():
        return Path(name_or_file)
    names = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    raise RecipeError(
        f"no recipe '{name_or_file}'",
        fix=f"{_did_you_mean(str(name_or_file), names)}Give a YAML file or one of: {', '.join(names)}.",
    )


def recipe_text(name_or_file: str | Path) -> str:
    """The text of a recipe, comments and all."""
    return _read_text(recipe_path(name_or_file))


def copy_recipe(name: str | Path, dest: str | Path, *, force: bool = False) -> Path:
    """Copy a recipe to a file (or into a folder) to edit; returns the file. Raises `RecipeError` when it exists already."""
    source, target = recipe_path(name), Path(dest)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not force:
        raise RecipeError("the file exists already", where=str(target), fix="Choose another name, or overwrite it with --force.")
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(_read_text(source), encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        fix = "Make room, or choose another place"
        raise RecipeError(f"cannot write the copy: {error.strerror}", where=str(target), fix=fix) from error
    return target


def load_recipe(name_or_file: str | Path, overrides: str | Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read, merge and check a recipe; this is also what `statex recipes validate` does.

    Args:
        name_or_file: a shipped recipe's name or a YAML file, which may say `extends: NAME_OR_FILE` and then only what differs.
        overrides: `key.path=value` (values as in YAML, list items by their index), one or several, or a mapping from key paths to
            values.

    Raises:
        RecipeError: no such recipe, not YAML, unknown keys (the message names the nearest one), values of the wrong type or range.
    """
    path = recipe_path(name_or_file)
    values = _merged(path, ())
    overrides = [overrides] if isinstance(overrides, str) else overrides
    pairs = overrides.items() if isinstance(overrides, Mapping) else (_parse_override(text) for text in overrides)
    for key, value in pairs:
        _set(values, key, value)
    return check_recipe(values, where=str(path))


def check_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Values -> Recipe, with pydantic's complaints as one `RecipeError`."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems, fixes = [], []
        for item in error.errors():
            key = _dotted(item["loc"])
            if item["type"] == "extra_forbidden":
                problems.append(f"unknown key '{key}'")
                fixes.append(_did_you_mean(key, list(known_keys())))
            elif item["type"] == "missing":
                problems.append(f"'{key}' is missing")
            else:
                problems.append(f"'{key}': {item['msg'].removeprefix('Value error, ')}")
        fix = "".join(dict.fromkeys(fixes)) + "`statex recipes show recovery` is an example with all keys explained."
        raise RecipeError("; ".join(problems), where=where, fix=fix) from None


def dump_recipe(recipe: Recipe) -> str:
    """YAML text that `load_recipe` reads back as the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """All keys of the schema as dotted paths; entries of a mixture stand under `data.mixture.0`."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")
        elif name == "mixture":
            for entry in (TextEntry, MqarEntry, TrackingEntry):
                yield from known_keys(entry, f"{prefix}{name}.0.")


def _did_you_mean(word: str, choices: list[str]) -> str:
    """A sentence with the nearest choice, by the last part of its name first and by its place second; empty when none is near."""

    def nearness(choice: str) -> tuple[float, float]:
        leaf = difflib.SequenceMatcher(None, _leaf(word), _leaf(choice)).ratio()
        return leaf, difflib.SequenceMatcher(None, word, choice).ratio()

    best = max(choices, key=nearness, default="")
    if not best or nearness(best)[0] < 0.6:
        return ""
    return f"Did you mean '{best.replace('.0.', '.N.')}'? "


def _dotted(loc: tuple[int | str, ...]) -> str:
    """Where pydantic found an error, without the entry kinds that it puts behind the index of a mixture."""
    kept = [str(part) for before, part in zip((None, *loc), loc, strict=False) if not isinstance(before, int)]
    return ".".join(kept)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2].lower()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe: {error}", where=str(path), fix="It must be UTF-8 text") from error


def _merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe file laid over the one that it extends, if any."""
    try:
        values = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        what = f"not valid YAML: {' '.join(str(error).split())}"
        raise RecipeError(what, where=str(path), fix="Mend that line") from None
    if not isinstance(values, dict):
        raise RecipeError("a recipe is a mapping of sections", where=str(path), fix="`statex recipes show recovery` is an example.")
    base = values.pop("extends", None)
    if base is None:
        return values
    if path in seen:
        raise RecipeError("the recipe extends itself", where=str(path), fix="Remove one `extends` line.")
    beside = path.parent / str(base)
    parent = beside if beside.is_file() else recipe_path(str(base))
    return _laid_over(_merged(parent, (*seen, path)), values)


def _laid_over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; everything else, lists included, is replaced."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"'{text}' does not set anything", fix="Write --set key.path=value, e.g. --set schedule.max_steps=200.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        return key.strip(), value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted path in nested mappings and lists; unknown names are left to the schema to complain about."""
    *parents, last = key.split(".")
    node: Any = values
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, key)]
        else:
            if not isinstance(node.get(part), dict | list):
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise RecipeError(f"'{part}' in '{key}' holds a value, not a section", fix=_did_you_mean(key, list(known_keys())))
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _index(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(f"'{part}' in '{key}' is not an index of a list of {len(items)}", fix="Lists count from 0.")
    return int(part)
