"""`StatexConfig`: the family's own config keys plus the `statex` block, of which the model reads the description only."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..families.description import ModelDescription


class StatexConfig(PreTrainedConfig):
    """Config of a `statex` model.

    Any key of the source model's config may be present beside these, for tools that look there for sizes. `hidden_size`,
    `vocab_size`, `num_hidden_layers` and `tie_word_embeddings` always follow the description.

    Attributes:
        statex: `{"version": 1, "description": ModelDescription.to_dict(), ...}`. Absent only in the empty config that transformers
            builds to compare with when it saves.
        initializer_range: standard deviation of a Linear or Embedding that a checkpoint did not hold.
    """

    model_type = "statex"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    statex: dict[str, Any] | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    num_hidden_layers: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.statex is not None:
            self._follow(self.description)

    def _follow(self, description: ModelDescription) -> None:
        self.hidden_size = description.hidden_size
        self.vocab_size = description.vocab_size
        self.num_hidden_layers = len(description.layers)
        self.tie_word_embeddings = description.tie_word_embeddings

    @property
    def description(self) -> ModelDescription:
        """What the model computes. Raises `ValueError` when the config has no `statex` block."""
        if self.statex is None:
            raise ValueError("this config has no `statex` block, which says what the model computes")
        return ModelDescription.from_dict(self.statex["description"])

    @description.setter
    def description(self, description: ModelDescription) -> None:
        self.statex = {**(self.statex or {"version": 1}), "description": description.to_dict()}
        self._follow(description)

    @classmethod
    def from_description(cls, description: ModelDescription, **keys: Any) -> StatexConfig:
        """A config around a description; `keys` are further config keys (token ids, ...)."""
        return cls(statex={"version": 1, "description": description.to_dict()}, architectures=["StatexForCausalLM"], **keys)
