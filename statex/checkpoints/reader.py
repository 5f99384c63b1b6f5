"""Open a checkpoint of any dialect: headers only, then one tensor at a time. Torch is imported when a tensor is read."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..families import get_family
from ..families.base import Family
from ..families.description import ModelDescription
from .dialects import default_dialect, dialect_of, find_dialect
from .hub import carried_files, locate
from .tensor_info import TensorInfo
from .weights import Weights, find_weights, read_json

if TYPE_CHECKING:
    from torch import Tensor

STATEX = "statex"
"""model_type of canonical checkpoints, and the key of their block in config.json."""

_RESTORE = "Restore the config.json that belongs to these weights"
_TENSOR_NAME = re.compile(r"\b(?:model|lm_head)\.[\w.]*\w")
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_QUANTISED_NAMES = {
    "GPTQ or AWQ": (".qweight", ".qzeros", ".g_idx"),
    "bitsandbytes": (".SCB", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"),
}
_NAMED_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes"}


class Checkpoint:
    """A checkpoint on disk, under canonical names; made by `open_checkpoint`.

    Attributes:
        path: the folder. name: the folder as given, or the hub id.
        config: config.json as it stands. source_config: config.json of the native checkpoint that it is or came from ({}: none).
        family, dialect, description: what it is. `dialect` is the source's.
        tensors: shape and dtype by canonical name; a tied `lm_head.weight` is left out.
        source_tensors: what is needed to give the source's tensor names back (`lm_head`, `g_norm_swish_gate`, `embedding`).
        provenance: how it was made ({} for a checkpoint that statex has not changed).
        weight_files, carried_files: its files.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.family: Family
        self.dialect: str
        self.description: ModelDescription
        self.source_config: dict[str, Any]
        self.source_tensors: dict[str, bool]
        self.provenance: dict[str, Any]
        self.config = read_json(path / "config.json")
        _refuse_quantised_config(self.config, path)
        self.is_canonical = self.config.get("model_type") == STATEX
        self._weights: Weights = find_weights(path)
        self.weight_files = list(self._weights.files)
        self.carried_files = carried_files(path)
        try:
            _refuse_quantised_tensors(self._weights.tensors)
            if self.is_canonical:
                self._describe_canonical()
            else:
                self._describe_native()
            self._tied_head = self._names_in_files.pop("lm_head.weight", None) if self.description.tie_word_embeddings else None
            self.tensors = {name: self._weights.tensors[native] for name, native in self._names_in_files.items()}
            self._check_tensors()
        except CheckpointError as error:
            where = f"{name}: {error.where}" if error.where else name
            raise CheckpointError(error.what, where=where, fix=error.fix) from error

    def _describe_native(self) -> None:
        dialect = find_dialect(self.config, "config.json")
        self.family, self.dialect = get_family(dialect.family), dialect.name
        self.source_config, self.provenance = self.config, {}
        self.source_tensors = dialect.source_tensors(set(self._weights.tensors))
        translated = {name: dialect.to_canonical(name, self.source_tensors) for name in self._weights.tensors}
        self._names_in_files = {canonical: name for name, canonical in translated.items() if canonical is not None}
        self._unknown = [name for name, canonical in translated.items() if canonical is None]
        shapes = {name: self._weights.tensors[native].shape for name, native in self._names_in_files.items()}
        try:
            self.description = self.family.describe(dialect.to_family(self.config), shapes)
        except CheckpointError as error:
            what = _TENSOR_NAME.sub(lambda match: self._name_for_user(match[0]), error.what)
            raise CheckpointError(what, where=error.where, fix=error.fix) from error

    def _describe_canonical(self) -> None:
        block = self._read_block()
        self.dialect = dialect_of(block.get("dialect") or default_dialect(self.family.name).name, self.family.name).name
        self.source_config = block.get("source_config") or {}
        self.source_tensors = block.get("source_tensors") or {}
        self.provenance = block.get("provenance") or {}
        self._names_in_files = {name: name for name in self._weights.tensors}
        self._unknown = []

    def _read_block(self) -> dict[str, Any]:
        """The `statex` block of a canonical config, its description taken in."""
        block = self.config.get(STATEX)
        if not isinstance(block, dict) or not isinstance(block.get("description"), dict):
            raise CheckpointError(
                f"model_type is {STATEX}, but there is no `{STATEX}` block with a description", where="config.json", fix=_RESTORE
            )
        if block.get("version", 1) != 1:
            raise CheckpointError(
                f"the checkpoint's format is version {block['version']}", where="config.json", fix="Update statex to read it"
            )
        try:
            self.description = ModelDescription.from_dict(block["description"])
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"the layer descriptions cannot be read: {error}", where="config.json", fix=_RESTORE) from error
        self.family = get_family(self.description.family)
        return block

    def _check_tensors(self) -> None:
        """Names and shapes against what the description asks for."""
        try:
            expected = {name: shape for name, (shape, _) in self.family.tensors(self.description).items()}
        except (KeyError, TypeError, ZeroDivisionError) as error:
            what = f"the layer descriptions cannot be read: {error!r}"
            raise CheckpointError(what, where="config.json", fix=_RESTORE) from error
        missing = sorted(map(self._name_for_user, expected.keys() - self.tensors.keys()))
        extra = sorted([*self._unknown, *map(self._name_for_user, self.tensors.keys() - expected.keys())])
        parts = [
            f"{what} ({len(names)}): {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
            for what, names in (
                ("missing tensors that config.json asks for", missing),
                ("tensors that config.json does not mention", extra),
            )
            if names
        ]
        if parts:
            raise CheckpointError(
                f"config.json and the tensors disagree: {'; '.join(parts)}",
                fix="Restore the missing file, or the config.json of these weights",
            )
        for name, shape in expected.items():
            if self.tensors[name].shape != shape:
                raise CheckpointError(
                    f"config.json and the tensors disagree: it gives {self._name_for_user(name)} the shape"
                    f" {list(shape)}, and the file has {list(self.tensors[name].shape)}",
                    fix=_RESTORE,
                )

    def _name_for_user(self, name: str) -> str:
        """What the user's files call a canonical tensor, or would."""
        if self.is_canonical:
            return name
        return dialect_of(self.dialect, self.family.name).to_native(name, self.source_tensors) or name

    @property
    def is_expanded(self) -> bool:
        """Whether a plan was applied to it already."""
        return bool(self.provenance.get("plan"))

    @property
    def has_tied_head_tensor(self) -> bool:
        """Whether the files hold `lm_head.weight` although it is tied to the embedding."""
        return self._tied_head is not None

    def load(self, name: str) -> Tensor:
        """One tensor by its canonical name, in memory of its own and in the dtype that is stored.

        Raises:
            KeyError: no tensor of that name.
            CheckpointError: the file cannot be read, or a tied head differs from the embedding.
        """
        tensor = self._weights.load(self._names_in_files[name])
        if name == "model.embeddings.weight" and self._tied_head is not None:
            head = self._weights.load(self._tied_head)
            if not _same_bytes(head, tensor):
                raise CheckpointError(
                    f"the config ties lm_head to the embedding, but {self._tied_head} holds other values",
                    where=self.name,
                    fix="Set tie_word_embeddings (tie_embeddings) to false in its config.json",
                )
        return tensor

    def sha256(self) -> dict[str, str]:
        """Hash of every weight file and of config.json, by file name; reads all of them once."""
        hashes = {}
        for path in [self.path / "config.json", *self.weight_files]:
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return hashes

    def close(self) -> None:
        """Let go of mapped files."""
        self._weights.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_checkpoint(path_or_hub_id: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint in any dialect, or one that statex wrote; reads headers only.

    Args:
        path_or_hub_id: a folder, or a model on the Hugging Face Hub (downloaded into its cache).
        revision: the hub's branch, tag or commit.
    Raises:
        CheckpointError: missing, truncated, inconsistent, quantised, or of an unknown family or dialect.
    """
    return Checkpoint(*locate(path_or_hub_id, revision))


def canonical_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json of this checkpoint under canonical names: the family's own keys and the `statex` block.

    Surgery changes `["statex"]["description"]` and `["statex"]["provenance"]` of the result, which is the caller's own.
    """
    if checkpoint.is_canonical:
        # Code that an export carries beside its weights does not come along.
        return {key: copy.deepcopy(value) for key, value in checkpoint.config.items() if key != "auto_map"}
    dialect = dialect_of(checkpoint.dialect, checkpoint.family.name)
    family_config = dialect.to_family(copy.deepcopy(checkpoint.source_config))
    # Code of the source's own modelling files does not belong to the statex model.
    family_config.pop("auto_map", None)
    return {
        **family_config,
        "model_type": STATEX,
        "architectures": ["StatexForCausalLM"],
        STATEX: {
            "version": 1,
            "description": checkpoint.description.to_dict(),
            "dialect": checkpoint.dialect,
            "source_config": copy.deepcopy(checkpoint.source_config),
            "source_tensors": dict(checkpoint.source_tensors),
            "provenance": {},
        },
    }


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    import torch

    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _refuse_quantised_config(config: Mapping[str, Any], path: Path) -> None:
    block = config.get("quantization_config")
    if block is not None:
        method = str(block.get("quant_method", "")) if isinstance(block, dict) else ""
        raise _refuse_quantised(_NAMED_METHODS.get(method.lower(), method or "an unnamed method"), str(path / "config.json"))


def _refuse_quantised_tensors(tensors: Mapping[str, TensorInfo]) -> None:
    for name, info in tensors.items():
        for method, endings in _QUANTISED_NAMES.items():
            if name.endswith(endings):
                raise _refuse_quantised(method, name)
        if info.dtype not in _FLOATS:
            raise _refuse_quantised(info.dtype, name)


def _refuse_quantised(method: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint is quantised ({method}), and quantised weights cannot be expanded",
        where=where,
        fix="Use the original weights in bf16, fp16 or fp32",
    )
