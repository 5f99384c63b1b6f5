"""The one backbone: embedding, pre-norm blocks with a mixer and, where the family has one, a gated MLP, final norm, head."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..families.description import LayerDescription, ModelDescription
from ..kernels import BACKENDS
from .cache import StatexCache
from .components import GatedMLP, Mixer, ResidualRMSNorm, RMSNorm, ShortConvolution, TokenLayout
from .configuration import StatexConfig
from .delta_rule import DeltaNetMixer, GatedDeltaNetMixer
from .gla import GLAMixer
from .hgrn import HGRNMixer
from .loss import next_token_loss
from .mamba import MambaMixer
from .mamba2 import Mamba2Mixer
from .token_graph import CURRENT, TokenGraph, can_capture, current_graph

MIXERS: dict[str, type[Mixer]] = {
    "gla": GLAMixer,
    "mamba2": Mamba2Mixer,
    "delta_net": DeltaNetMixer,
    "gated_deltanet": GatedDeltaNetMixer,
    "hgrn": HGRNMixer,
    "hgrn2": HGRNMixer,
    "mamba": MambaMixer,
}
"""Mixer of each family. A new family adds its file and a line here."""


class StatexBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)) where there is an MLP."""

    def __init__(self, model: ModelDescription, layer: LayerDescription, index: int) -> None:
        super().__init__()
        self.index = index
        self.residual_in_fp32 = model.residual_in_fp32
        self.mixer_norm = ResidualRMSNorm(model.hidden_size, model.norm_eps)
        self.mixer = MIXERS[model.family](model, layer)
        self.has_mlp = model.intermediate_size is not None
        if model.intermediate_size is not None:
            self.mlp_norm = ResidualRMSNorm(model.hidden_size, model.norm_eps)
            self.mlp = GatedMLP(model.hidden_size, model.intermediate_size, model.hidden_act)

    def forward(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        lower_bound: Tensor | None = None,
        past_key_values: StatexCache | None = None,
    ) -> Tensor:
        """`[B, T, hidden] -> [B, T, hidden]`; `lower_bound` goes to mixers that have one."""
        state = None if past_key_values is None else past_key_values.layers[self.index]
        if self.residual_in_fp32:
            hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        bounds = {} if lower_bound is None else {"lower_bound": lower_bound}
        residual, x = self.mixer_norm(hidden_states)
        update = self.mixer(x, layout, state, **bounds)
        if self.has_mlp:
            residual, x = self.mlp_norm(residual, update)
            update = self.mlp(x)
        return residual + update


class StatexPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about any `statex` model."""

    config_class = StatexConfig
    config: StatexConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["StatexBlock"]  # noqa: RUF012
    _is_stateful = True
    _keep_in_fp32_modules_strict = sorted(
        {"lower_bounds"} | {rf"mixer\.{name}" for mixer in MIXERS.values() for name in mixer.keep_in_fp32}
    )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights but those that stay fp32, one of which may be the first."""
        return next(self.get_input_embeddings().parameters()).dtype

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mixer):
            module.reset_own_parameters()
        elif isinstance(module, ShortConvolution):
            module.reset_parameters()
        elif isinstance(module, StatexModel) and module.lower_bounds is not None:
            init.zeros_(module.lower_bounds)

    def set_backend(self, backend: str) -> None:
        """Choose the kernels of all mixers' recurrences: `auto`, `reference`, `chunked`, `triton`.

        Norms, gates, short convolutions and the loss take theirs by device, whatever is chosen here; so does a generated token.
        Raises `ValueError` on any other name.
        """
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; choose one of auto, {', '.join(BACKENDS)}")
        for module in self.modules():
            if isinstance(module, Mixer):
                module.backend = backend


class StatexModel(StatexPreTrainedModel):
    """The backbone without the head."""

    def __init__(self, config: StatexConfig) -> None:
        super().__init__(config)
        description = config.description
        self.embeddings = nn.Embedding(description.vocab_size, description.hidden_size)
        self.lower_bounds: nn.Parameter | None = None
        if description.lower_bound_channels is not None:
            self.lower_bounds = nn.Parameter(torch.zeros(len(description.layers), description.lower_bound_channels))
        self.layers = nn.ModuleList(StatexBlock(description, layer, index) for index, layer in enumerate(description.layers))
        self.norm = RMSNorm(description.hidden_size, description.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        assert isinstance(value, nn.Embedding)
        self.embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StatexCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[B, T, hidden]` after the final norm; see `StatexForCausalLM.forward` for the arguments."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        shape = hidden_states.shape[:2]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if cu_seqlens is None and past_key_values is None:
            cu_seqlens = _packed_borders(shape, **kwargs)
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training and cu_seqlens is None
        past_key_values = self._cache(past_key_values, bool(use_cache), cu_seqlens, shape[0])
        mask = _local_mask(attention_mask, shape)
        if cu_seqlens is not None:
            hidden_states = hidden_states.flatten(0, 1)[None]
            mask = None if mask is None else mask.flatten()[None]
        layout = TokenLayout(mask, cu_seqlens)
        visited = []
        for block, lower_bound in zip(self.layers, self._bounds_by_layer(), strict=True):
            if output_hidden_states:
                visited.append(hidden_states)
            # By position: what is named past_key_values a checkpointed block is never given, not even to generate.
            hidden_states = block(hidden_states, layout, lower_bound, past_key_values)
        hidden_states = self.norm(hidden_states)
        if past_key_values is not None:
            past_key_values.advance(shape[1])
        if output_hidden_states:
            visited.append(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states.view(*shape, hidden_states.shape[-1]),
            past_key_values=past_key_values,
            hidden_states=tuple(visited) if output_hidden_states else None,
        )

    def _bounds_by_layer(self) -> list[Tensor | None]:
        """Least forget gates `[channels]` of each layer, rising from 0 in the first: None where that is so for all channels."""
        if self.lower_bounds is None:
            return [None] * len(self.layers)
        with torch.autocast(self.lower_bounds.device.type, enabled=False):
            shares = self.lower_bounds.softmax(0)
            return [None, *(shares[1:].cumsum(0)).unbind(0)]

    def _cache(
        self, past_key_values: StatexCache | None, use_cache: bool, cu_seqlens: Tensor | None, batch: int
    ) -> StatexCache | None:
        if past_key_values is not None:
            if not isinstance(past_key_values, StatexCache):
                raise ValueError(f"past_key_values must be a StatexCache, not a {type(past_key_values).__name__}")
            if len(past_key_values.layers) != len(self.layers):
                raise ValueError(f"past_key_values has {len(past_key_values.layers)} layers, the model {len(self.layers)}")
            if (read := next(iter(past_key_values.tensors), None)) is not None and len(read) != batch:
                raise ValueError(f"past_key_values has read {len(read)} rows, now there are {batch}")
        if cu_seqlens is not None and (use_cache or past_key_values is not None):
            raise ValueError("a cache holds one state per row, packed rows (cu_seqlens) have several; run with use_cache=False")
        # A checkpointed block runs twice, and must not read what its first run left in the cache.
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if past_key_values is not None and past_key_values.is_initialized:
                raise ValueError("gradient checkpointing cannot go on from past_key_values; run without gradients, or without it")
            return None
        if past_key_values is None and use_cache:
            return StatexCache(len(self.layers))
        return past_key_values


def _local_mask(attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The mask of the tokens at hand `[B, T]`, or None where nothing is padded.

    Whether a mask is all ones can be seen for free on a CPU only; elsewhere looking would make the host wait for the device.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != shape[0] or attention_mask.shape[1] < shape[1]:
        raise ValueError(f"attention_mask must be [{shape[0]}, {shape[1]} or more tokens], not {list(attention_mask.shape)}")
    local = attention_mask[:, attention_mask.shape[1] - shape[1] :]
    if not torch.compiler.is_compiling() and local.device.type == "cpu" and bool(local.all()):
        return None
    return local


def _packed_borders(
    shape: torch.Size, cu_seq_lens_q: Tensor | None = None, position_ids: Tensor | None = None, **_: Any
) -> Tensor | None:
    """Borders of packed sequences, `cu_seqlens`, from what transformers' padding-free collators give; None where nothing is packed.

    Args:
        shape: `[B, T]`.
        cu_seq_lens_q: such borders themselves.
        position_ids: `[1, T]`, which start again at 0 with every sequence. Rows of a batch are not taken for packed.
    """
    if cu_seq_lens_q is not None:
        return cu_seq_lens_q
    if position_ids is None or position_ids.shape != shape or shape[0] != 1 or shape[1] < 2 or torch.compiler.is_compiling():
        return None
    inner = 1 + position_ids[0, 1:].eq(0).nonzero()[:, 0]
    return torch.cat([inner.new_zeros(1), inner, inner.new_tensor([shape[1]])]) if len(inner) else None


class StatexForCausalLM(StatexPreTrainedModel, GenerationMixin):
    """The backbone with a language modelling head; loads expanded and unexpanded checkpoints of every family."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: StatexConfig) -> None:
        super().__init__(config)
        self.model = StatexModel(config)
        self.lm_head = nn.Linear(self.model.embeddings.embedding_dim, self.model.embeddings.num_embeddings, bias=False)
        self.post_init()

    @classmethod
    def from_description(
        cls, description: ModelDescription, seed: int = 0, *, device: torch.device | str = "cpu", **config_keys: Any
    ) -> StatexForCausalLM:
        """A new fp32 model in training mode whose weights are drawn by the inits that the family's file declares.

        Args:
            seed: keys every draw together with the tensor's name, so equally named and shaped tensors of two models are equal.
            config_keys: further keys of the config, such as `eos_token_id`.
        """
        from .initialization import draw_weights

        model = cls.empty(StatexConfig.from_description(description, **config_keys), dtype=torch.float32, device=device)
        draw_weights(model, seed)
        return model.train()

    @classmethod
    def empty(cls, config: StatexConfig, *, dtype: torch.dtype, device: torch.device | str) -> StatexForCausalLM:
        """A model in evaluation mode whose weights are allocated but not set, decay parameters in fp32 at least."""
        with torch.device("meta"):
            model = cls(config)
        fp32 = re.compile("|".join(cls._keep_in_fp32_modules_strict))
        for name, parameter in model.named_parameters():
            wide = torch.promote_types(dtype, torch.float32)
            parameter.data = torch.empty_like(parameter, dtype=wide if fp32.search(name) else dtype)
        model.to_empty(device=device)
        model.tie_weights()
        return model.eval()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # it knows no state sizes

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any) -> None:  # type: ignore[override]
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = StatexCache(len(self.model.layers))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. On a GPU one token's forward is captured and replayed as a CUDA graph, unless `disable_compile`."""
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None) or self.generation_config
        wanted = not kwargs.get("disable_compile", config.disable_compile) and can_capture(self)
        # A graph takes every single token for a real one, which the first of a prompt that is read one by one may not be.
        wanted = wanted and kwargs.get("prefill_chunk_size", config.prefill_chunk_size) != 1
        token = CURRENT.set(TokenGraph() if wanted else None)
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            CURRENT.reset(token)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; keeps the description's vocabulary in step."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.description = replace(self.config.description, vocab_size=embeddings.num_embeddings)
        return embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StatexCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits and, with `labels`, the loss.

        Args:
            input_ids: `[B, T]`; or inputs_embeds: `[B, T, hidden]`.
            attention_mask: `[B, >= T]`, 0 at padded tokens, which change no recurrent state; pad on the left to generate. Short
                convolutions see zeros in their place, so that padding behind a token is not the same as none.
            past_key_values: what an earlier call returned; changed in place.
            labels: `[B, T]`, shifted here (the logits at t are scored by the label at t+1), -100 where no loss is wanted.
            use_cache: whether to return `past_key_values`; by default as in the config, but not in training, with labels or packed
                rows.
            logits_to_keep: only the last n positions' logits (0: all), or those at an index tensor.
            return_logits: False where `labels` are given and the loss alone is wanted: the logits then never exist all at once.
            cu_seqlens: `[N + 1]` borders of sequences packed one after another into the B rows, counted over all B·T tokens, from 0
                to B·T: states and convolutions restart at each. Row ends should be among them. The caller sets the label of each
                sequence's first token to -100.
            kwargs: `num_items_in_batch` divides the summed loss, as the Trainer wants under gradient accumulation. `cu_seq_lens_q`
                or `position_ids` of transformers' padding-free collators stand for `cu_seqlens`.
        """
        if use_cache is None and labels is not None:
            use_cache = False
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (graph := current_graph()) is not None and input_ids is not None and past_key_values is not None:
            bare = inputs_embeds is None and labels is None and cu_seqlens is None and not output_hidden_states
            if bare and input_ids.shape[1] == 1 and past_key_values.is_initialized:
                logits = graph(partial(self._token_logits, cache=past_key_values), input_ids, past_key_values)
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss: Tensor | None = None
        if labels is not None and not return_logits:
            divisor = kwargs.get("num_items_in_batch")
            loss = next_token_loss(self.lm_head, hidden_states, labels, self.config.description.vocab_size, divisor)
            return CausalLMOutputWithPast(loss=loss, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _token_logits(self, input_ids: Tensor, cache: StatexCache) -> Tensor:
        """Logits behind one token a row, `[B, 1] -> [B, 1, vocabulary]`."""
        return self.lm_head(self.model(input_ids=input_ids, past_key_values=cache, use_cache=True).last_hidden_state)
