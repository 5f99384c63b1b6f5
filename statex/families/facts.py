"""Reading a config with care: typed keys with defaults, and agreement between what it says and what the tensors' shapes mean."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import CheckpointError, ExportError
from .base import Shape
from .description import LayerDescription, ModelDescription, Spectrum

MEND = "Restore the config.json that belongs to these weights, or mend the key"
"""What to do about a config that cannot be true."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Facts:
    """A config in a family's own keys beside the shapes of a checkpoint's tensors.

    Args:
        config: the config; keys that it lacks, or that are None, take the default of the family's reference code.
        defaults: those defaults.
        shapes: shapes by canonical tensor name; empty for a model that has no tensors yet, and then nothing is cross-checked.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
        self.config, self.defaults, self.shapes = config, defaults, shapes

    def get(self, key: str) -> Any:
        """The config's value, or the default where the key is absent or None."""
        value = self.config.get(key)
        return self.defaults.get(key) if value is None else value

    def integer(self, key: str, *, optional: bool = False) -> Any:
        """A positive whole number; with `optional` None is a value too. Raises `CheckpointError` on anything else."""
        value = self.get(key)
        if (value is None and optional) or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        raise CheckpointError(f"{key} must be a positive whole number, not {value!r}", where="config.json", fix=MEND)

    def number(self, key: str) -> float:
        """A real number, infinity included (`{"__float__": "Infinity"}` is how transformers writes it)."""
        return as_number(key, self.get(key))

    def flag(self, key: str) -> bool:
        """True or False. Raises `CheckpointError` on anything else."""
        value = self.get(key)
        if isinstance(value, bool):
            return value
        raise CheckpointError(f"{key} must be true or false, not {value!r}", where="config.json", fix=MEND)

    def agree(self, said: str, expected: int, tensor: str, axis: int) -> None:
        """Check that a tensor has the size along `axis` that the config asks for.

        Args:
            said: the config key or formula behind `expected`, for the message.
        Raises:
            CheckpointError: names both sides.
        """
        shape = self.shapes.get(tensor)
        if shape is not None and (len(shape) <= axis or shape[axis] != expected):
            raise CheckpointError(
                f"config.json and the tensors disagree: {said} means {expected}, but {tensor} has shape {list(shape)}",
                where=tensor,
                fix=MEND,
            )

    def layers(self) -> int:
        """num_hidden_layers, after checking that the tensors hold layers 0 to n-1."""
        count = int(self.integer("num_hidden_layers"))
        held = {int(match[1]) for match in map(_LAYER.match, self.shapes) if match}
        if self.shapes and (len(held) != count or held != set(range(count))):
            found = f"layers {min(held)} to {max(held)} ({len(held)} in all)" if held else "none"
            raise CheckpointError(
                f"config.json and the tensors disagree: num_hidden_layers is {count}, but the weights hold {found}",
                where="config.json",
                fix="Restore the config.json that belongs to these weights, or the missing shards",
            )
        return count

    def tied(self) -> bool:
        """tie_word_embeddings; a config that does not say is tied when there is no `lm_head.weight`."""
        if self.config.get("tie_word_embeddings") is None and self.shapes:
            return "lm_head.weight" not in self.shapes
        return self.flag("tie_word_embeddings")


def as_number(key: str, value: Any) -> float:
    """`value` as a float. Raises `CheckpointError` when it is none."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        value = {"Infinity": float("inf"), "-Infinity": float("-inf")}.get(value["__float__"], value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise CheckpointError(f"{key} must be a number, not {value!r}", where="config.json", fix=MEND)


def divide(total: int, parts: int, what: str) -> int:
    """`total / parts`, which must be whole. Raises `CheckpointError` with `what` in it."""
    if total % parts:
        raise CheckpointError(f"{what}: {total} is not a multiple of {parts}", where="config.json", fix=MEND)
    return total // parts


def uniform_layer(
    model: ModelDescription, tensors: Iterable[tuple[str, str, str]], spectra: Collection[Spectrum | None] = (None,)
) -> LayerDescription:
    """The one description that all layers share, as every stock checkpoint needs.

    Args:
        tensors: (field of the layer description, tensor that it needs, operator and init that bring it), for kinds of tensors that
            no stock checkpoint has; a layer uses one when the field differs from `LayerDescription`'s default.
        spectra: what a stock config can say of the eigenvalues' range.
    Raises:
        ExportError: names the layers that carry such a tensor, or the layers and fields that differ.
    """
    for field, tensor, origin in tensors:
        default = LayerDescription.__dataclass_fields__[field].default
        carriers = [index for index, layer in enumerate(model.layers) if getattr(layer, field) != default]
        if carriers:
            raise ExportError(
                f"{_layers(carriers)} the tensor {tensor} ({origin}), which no stock {model.family} checkpoint can hold",
                fix="Export with --to hf, which carries the code",
            )
    extended = [index for index, layer in enumerate(model.layers) if layer.spectrum not in spectra]
    if extended:
        raise ExportError(
            f"{_layers(extended)} eigenvalues below 0 (extend_spectrum), which no stock {model.family} config can ask for",
            fix="Export with --to hf, which carries the code",
        )
    first = model.layers[0]
    for index, layer in enumerate(model.layers):
        if layer != first:
            field = next(name for name in layer.__dataclass_fields__ if getattr(layer, name) != getattr(first, name))
            alike = sum(other == first for other in model.layers)
            raise ExportError(
                f"layers differ, and a stock {model.family} config describes all at once: layer {index} has {field} ="
                f" {getattr(layer, field)}, layer 0 has {getattr(first, field)} ({alike} of {len(model.layers)} are like layer 0)",
                fix="Expand all layers by the same factor, or export with --to hf",
            )
    return first


def _layers(indices: list[int]) -> str:
    names = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"layer {names} carries" if len(indices) == 1 else f"layers {names} carry"


def changed_keys(source: Mapping[str, Any], defaults: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """`source` with only those of the `wanted` keys written that it does not mean already.

    A key that is absent or None means its default; numbers that differ by rounding only mean the same.
    """

    def means(key: str, value: Any) -> bool:
        said = defaults.get(key) if source.get(key) is None else source[key]
        return bool(said == value or (isinstance(said, float) and isinstance(value, (int, float)) and math.isclose(said, value)))

    return dict(source) | {key: value for key, value in wanted.items() if not means(key, value)}
