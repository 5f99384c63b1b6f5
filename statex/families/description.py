"""What a model computes, as data: one `LayerDescription` per mixer, one `ModelDescription` around them.

Surgery rewrites these, `config.json` stores them (key `statex`), and model, cache, export and reports read the same list. Nothing
here says how a layer came about: operator and init are provenance, which mixers never read. Standard library only: an export with
remote code carries this file along.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

Mixing = Literal["scalar", "channel"]
Spectrum = Literal["fixed", "learned"]
Outer = Literal["added", "alone"]


@dataclass(frozen=True)
class LayerDescription:
    """One mixer: how many heads read and write how large a state.

    A layer keeps `value_heads` states of `[state_key_dim, value_dim]` each. Heads of keys may be shared by several states (Mamba-2:
    `key_heads` = n_groups), and a state may be read by several queries (GLA with num_kv_heads < num_heads).
    """

    query_heads: int
    key_heads: int
    value_heads: int
    key_dim: int
    """Channels of a key as projected (Mamba-2: d_state), before lifting."""
    value_dim: int
    """Channels of a value (Mamba-2: head_dim)."""
    scale: float
    """Factor on q·S. GLA: head_k_dim^-½ of the *source* head after a function-preserving merge. Mamba-2: 1."""
    norm_groups: int
    """Groups over which the output norm averages, out of query_heads·value_dim (GLA) or value_heads·value_dim channels."""
    blocks: int = 1
    """Source heads f inside each merged head (of `mixing`); the key and the value of a head are split into this many blocks."""
    mixing: Mixing | None = None
    """How value block j reads key block i: None (all blocks alike), a scalar M[i, j], or a vector over key channels M[·, j]. Delta
    rule: how it is written under key block i, and a value block is one or more value heads."""
    lift: int = 1
    """Keys and queries carry this many parts: themselves and lift-1 products of channels (docs/surgery.md)."""
    spectrum: Spectrum | None = None
    """Eigenvalues of a step: None: in [0, 1]; `fixed`: in [-1, 1]; `learned`: the tensor `mixer.spectrum_rho` says how far they
    reach below 0, a number per source head (Mamba: per channel)."""
    outer: Outer | None = None
    """HGRN and HGRN2, S_t = Diag(f_t) S_{t-1} + (1 - f_t)ᵀ i_t: what the layer's output reads. None: of a state of one number per
    channel, that number. `alone`: q_t S_t (HGRN2). `added`: the diagonal, which is HGRN's state, and λ ∘ q_t S_t with λ in
    `mixer.outer_gain`."""

    @property
    def state_key_dim(self) -> int:
        """Key channels of the stored state, K: `key_dim * lift`."""
        return self.key_dim * self.lift

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of one sequence's state in this layer, `[heads, K, V]`."""
        return self.value_heads, self.state_key_dim, self.value_dim

    @property
    def state_elements(self) -> int:
        """Elements of one sequence's state in this layer, convolution states aside."""
        heads, key_dim, value_dim = self.state_shape
        return heads * key_dim * value_dim

    def replace(self, **changes: Any) -> LayerDescription:
        """A copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class ModelDescription:
    """The backbone around the mixers, in names that no family owns."""

    family: str
    """Key into `statex.families.FAMILIES`; picks the mixer."""
    hidden_size: int
    vocab_size: int
    norm_eps: float
    tie_word_embeddings: bool
    layers: tuple[LayerDescription, ...]
    intermediate_size: int | None = None
    """Channels of the gated MLP; None where the family has no MLP (Mamba-2)."""
    hidden_act: str = "silu"
    """Activation of the gated MLP."""
    residual_in_fp32: bool = False
    lower_bound_channels: int | None = None
    """Channels of the table of lower bounds on the decays, a row per layer (HGRN, HGRN2); None where there is none."""
    mixer: dict[str, Any] = field(default_factory=dict)
    """Options that all mixers of the model share; only the family's own file and mixer know their names."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` is its inverse."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelDescription:
        """Inverse of `to_dict`. Raises `TypeError` on unknown or missing fields, and on layers of impossible values."""
        return cls(**{**data, "layers": tuple(map(_layer, data["layers"]))})


_CHOICES: dict[str, tuple[str, ...]] = {"mixing": get_args(Mixing), "spectrum": get_args(Spectrum), "outer": get_args(Outer)}


def _layer(data: dict[str, Any]) -> LayerDescription:
    layer = LayerDescription(**data)
    for name, value in vars(layer).items():
        if name in _CHOICES:
            possible = value is None or value in _CHOICES[name]
        else:
            possible = type(value) in ((int, float) if name == "scale" else (int,)) and 0 < value < math.inf
        if not possible:
            raise TypeError(f"{name} = {value!r}")
    return layer
