"""How the projects that publish checkpoints name their config keys and tensors: one table each, in both directions.

A dialect's names and canonical names correspond one to one, so what is imported can be exported again, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ..errors import CheckpointError
from ..families.gla import DEFAULTS as GLA_DEFAULTS
from . import mamba_ssm

_TIED = "lm_head"

FLA_NAMES = (
    ("model.embeddings.", "model.embeddings."),
    ("model.lower_bounds", "model.lower_bounds"),
    ("model.layers.{i}.mixer_norm.", "model.layers.{i}.attn_norm."),
    ("model.layers.{i}.mixer.", "model.layers.{i}.attn."),
    ("model.layers.{i}.mlp_norm.", "model.layers.{i}.mlp_norm."),
    ("model.layers.{i}.mlp.", "model.layers.{i}.mlp."),
    ("model.norm.", "model.norm."),
    ("lm_head.", "lm_head."),
)

MAMBA_NAMES = (
    ("model.embeddings.", "backbone.embeddings."),
    ("model.layers.{i}.mixer_norm.", "backbone.layers.{i}.norm."),
    ("model.layers.{i}.mixer.", "backbone.layers.{i}.mixer."),
    ("model.norm.", "backbone.norm_f."),
    ("lm_head.", "lm_head."),
)

_STATE_SPACES_EMBEDDING = ("model.embeddings.", "backbone.embedding.")


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config)


def _take(family_config: Mapping[str, Any], source: Mapping[str, Any] | None) -> dict[str, Any]:
    return dict(family_config)


def _no_choice(config: Mapping[str, Any]) -> dict[str, bool]:
    return {}


def _is_of_type(model_type: str, config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == model_type


def _is_flas_mamba(config: Mapping[str, Any]) -> bool:
    """fla writes mamba and mamba2 under the same model types with keys and defaults of its own; it always names its time steps."""
    return "dt_min" in config and "time_step_min" not in config


def _is_transformers_mamba(model_type: str, config: Mapping[str, Any]) -> bool:
    return _is_of_type(model_type, config) and not _is_flas_mamba(config)


def _gla_norm_name(config: Mapping[str, Any]) -> dict[str, bool]:
    """fla names the output norm after what it is fused with."""
    fused = config.get("fuse_norm", True) and config.get("use_output_gate", True)
    return {"g_norm_swish_gate": bool(fused and config.get("hidden_act", GLA_DEFAULTS["hidden_act"]) == "swish")}


@dataclass(frozen=True)
class Dialect:
    """One project's way to write a family.

    Attributes:
        name, family: `fla`, `transformers` or `mamba_ssm`, and the family's name.
        matches: whether a config.json is of this dialect.
        names: (prefix of canonical names, prefix of this dialect's names); `{i}` stands for a layer's number.
        variants: rows that replace those of the same canonical prefix, by the flag of `Checkpoint.source_tensors` that asks for it.
        default_variants: those flags for a checkpoint that has no source, from its config.
        to_family: this dialect's config -> config in the family's own keys.
        from_family: (config in the family's keys, source config in this dialect or None) -> this dialect's config.
        weights: the kind of weight file that the dialect's own project can read.
    """

    name: str
    family: str
    matches: Callable[[Mapping[str, Any]], bool]
    names: tuple[tuple[str, str], ...]
    variants: Mapping[str, tuple[str, str]]
    default_variants: Callable[[Mapping[str, Any]], dict[str, bool]] = _no_choice
    to_family: Callable[[Mapping[str, Any]], dict[str, Any]] = _identity
    from_family: Callable[[Mapping[str, Any], Mapping[str, Any] | None], dict[str, Any]] = _take
    weights: Literal["safetensors", "bin"] = "safetensors"

    def source_tensors(self, native_names: set[str]) -> dict[str, bool]:
        """What must be remembered of a checkpoint's tensor names so that `to_native` can give them back."""
        found = {flag: any(map(_prefix(native).match, native_names)) for flag, (_, native) in self.variants.items()}
        return {_TIED: "lm_head.weight" in native_names, **found}

    def to_canonical(self, name: str, source_tensors: Mapping[str, bool]) -> str | None:
        """The canonical name of one of this dialect's tensors; None for a name that the dialect does not have."""
        canonical = _translate(name, [(native, canonical) for canonical, native in self._rows(source_tensors)])
        # Where a variant is in use, the plain spelling is not one of the dialect's names: two would become one.
        return canonical if canonical is not None and self.to_native(canonical, source_tensors) == name else None

    def to_native(self, name: str, source_tensors: Mapping[str, bool]) -> str | None:
        """Inverse of `to_canonical`."""
        return _translate(name, self._rows(source_tensors))

    def _rows(self, source_tensors: Mapping[str, bool]) -> list[tuple[str, str]]:
        rows = dict(self.names)
        rows.update(row for flag, row in self.variants.items() if source_tensors.get(flag))
        return list(rows.items())


def _prefix(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(re.escape("{i}"), r"(?P<i>0|[1-9]\d*)"))


def _translate(name: str, rows: list[tuple[str, str]]) -> str | None:
    """Replace the longest prefix that matches."""
    matches = [(match, target) for source, target in rows if (match := _prefix(source).match(name))]
    if not matches:
        return None
    match, target = max(matches, key=lambda pair: pair[0].end())
    return target.replace("{i}", match.groupdict().get("i") or "") + name[match.end() :]


DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        name="fla",
        family="gla",
        matches=lambda config: config.get("model_type") == "gla",
        names=FLA_NAMES,
        variants={"g_norm_swish_gate": ("model.layers.{i}.mixer.g_norm.", "model.layers.{i}.attn.g_norm_swish_gate.")},
        default_variants=_gla_norm_name,
    ),
    *(
        Dialect(name="fla", family=family, matches=partial(_is_of_type, family), names=FLA_NAMES, variants={})
        for family in ("delta_net", "gated_deltanet", "hgrn", "hgrn2")
    ),
    *(
        Dialect(
            name="transformers",
            family=family,
            matches=partial(_is_transformers_mamba, family),
            names=MAMBA_NAMES,
            # transformers reads this older spelling too.
            variants={"embedding": _STATE_SPACES_EMBEDDING},
        )
        for family in ("mamba2", "mamba")
    ),
    *(
        Dialect(
            name="mamba_ssm",
            family=family,
            matches=partial(mamba_ssm.matches, family),
            names=(_STATE_SPACES_EMBEDDING, *MAMBA_NAMES[1:]),
            variants={},
            to_family=partial(mamba_ssm.to_family, family),
            from_family=partial(mamba_ssm.from_family, family),
            weights="bin",
        )
        for family in ("mamba2", "mamba")
    ),
)
"""All of them; a family's first is where its models go that never were native checkpoints."""


def find_dialect(config: Mapping[str, Any], where: str) -> Dialect:
    """The dialect of a native config.json. Raises `CheckpointError` when there is none."""
    for dialect in DIALECTS:
        if dialect.matches(config):
            return dialect
    if "ssm_cfg" in config and "model_type" not in config:
        layer = config["ssm_cfg"].get("layer") if isinstance(config["ssm_cfg"], dict) else config["ssm_cfg"]
        what = f"the state-spaces layer {layer!r} is not supported"
    elif config.get("model_type") in ("mamba", "mamba2"):
        what = f"fla's own {config['model_type']} config (dt_min, norm_eps) is not supported"
    elif config.get("model_type") is None:
        what = "config.json names no model_type and no ssm_cfg"
    else:
        what = f"the model type {config['model_type']!r} is not supported"
    supported = ", ".join(f"{dialect.family} ({dialect.name})" for dialect in DIALECTS)
    raise CheckpointError(what, where=where, fix=f"Supported are {supported}")


def dialect_of(name: str, family: str) -> Dialect:
    """The dialect `name`, which must be one of `family`. Raises `CheckpointError` otherwise."""
    known = {dialect.name: dialect for dialect in DIALECTS if dialect.family == family}
    if name not in known:
        raise CheckpointError(f"{family} has no dialect {name!r}", fix=f"Choose one of: {', '.join(known)}")
    return known[name]


def default_dialect(family: str) -> Dialect:
    """The dialect of a model that never was a native checkpoint."""
    return next(dialect for dialect in DIALECTS if dialect.family == family)
