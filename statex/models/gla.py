"""Gated linear attention (arXiv 2312.06635), in the form of fla's `gla` checkpoints, with heads of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from ..families.description import LayerDescription, ModelDescription
from ..kernels import gla, gla_step
from ..kernels.pointwise import log_decay, low_rank_log_decay
from .cache import LayerState
from .components import GroupedRMSNorm, Mixer, ShortConvolution, TokenLayout, spectrum, wide_input
from .plain import plain_layers

CONVOLVED = ("q", "k", "v")


class GLAMixer(Mixer):
    """S_t = Diag(a_t) S_{t-1} + k_t^T v_t, read by q_t; decays a_t = sigmoid(gk)^(1/normalizer); output normed per group and gated.

    With `mixing`, value block j of a head reads key block i through M_ij. With `lift`, keys and queries carry products of their
    channels. With `spectrum`, decays reach below 0.
    """

    keep_in_fp32 = ("gk_proj", "mixing", "lift_gamma", "spectrum_rho")

    def __init__(self, model: ModelDescription, layer: LayerDescription) -> None:
        super().__init__(model, layer)
        options = model.mixer
        self.layer = layer
        keys, values = layer.key_heads * layer.key_dim, layer.value_heads * layer.value_dim
        queries, outputs = layer.query_heads * layer.key_dim, layer.query_heads * layer.value_dim
        self.q_proj = nn.Linear(model.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(model.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(model.hidden_size, values, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(model.hidden_size, options["gate_low_rank_dim"], bias=False),
            nn.Linear(options["gate_low_rank_dim"], keys, bias=True),
        )
        self.g_proj = nn.Linear(model.hidden_size, outputs, bias=False) if options["use_output_gate"] else None
        self.o_proj = nn.Linear(outputs, model.hidden_size, bias=False)
        weight_channels = outputs // layer.norm_groups if options["elementwise_affine"] else None
        self.g_norm = GroupedRMSNorm(outputs, layer.norm_groups, model.norm_eps, weight_channels, options["gate_fn"])
        self.convolved = options["use_short_conv"]
        if self.convolved:
            for name, channels in zip(CONVOLVED, (queries, keys, values), strict=True):
                self.add_module(f"{name}_conv1d", ShortConvolution(channels, options["conv_size"], options["conv_bias"]))
        self.feature_map = ACT2FN[options["feature_map"]] if options["feature_map"] is not None else None
        self.gate_logit_normalizer = options["gate_logit_normalizer"]
        self.clamp_min = options["clamp_min"]
        self._add_expansion_parameters()

    def _add_expansion_parameters(self) -> None:
        layer = self.layer
        self.mixing: nn.Parameter | None = None
        self.lift_gamma: nn.Parameter | None = None
        self.spectrum_rho: nn.Parameter | None = None
        if layer.mixing is not None:
            rows = layer.blocks if layer.mixing == "scalar" else layer.key_dim
            self.mixing = nn.Parameter(torch.empty(layer.key_heads, rows, layer.blocks))
        if layer.lift > 1:
            self.lift_gamma = nn.Parameter(torch.empty(layer.query_heads, (layer.lift - 1) * layer.key_dim))
        if layer.spectrum == "learned":
            self.spectrum_rho = nn.Parameter(torch.empty(layer.key_heads, layer.blocks))
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Each value block reads its own key block, and nothing lifted; no decay is below 0."""
        if self.mixing is not None:
            _, rows, blocks = self.mixing.shape
            identity = torch.eye(blocks, device=self.mixing.device).repeat_interleave(rows // blocks, dim=0)
            init.copy_(self.mixing, identity.expand_as(self.mixing))
        if self.lift_gamma is not None:
            init.zeros_(self.lift_gamma)
        if self.spectrum_rho is not None:
            init.zeros_(self.spectrum_rho)

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None) -> Tensor:
        """See `Mixer.forward`."""
        layer = self.layer
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.convolved:
            named = zip(CONVOLVED, (q, k, v), strict=True)
            q, k, v = (self.get_submodule(f"{name}_conv1d")(channels, layout, state, name) for name, channels in named)
        if self.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        q = q.unflatten(-1, (layer.query_heads, layer.key_dim))
        k = layout.zero_padding(k).unflatten(-1, (layer.key_heads, layer.key_dim))
        v = v.unflatten(-1, (layer.value_heads, layer.value_dim))
        with torch.autocast(x.device.type, enabled=False):
            log_decay = layout.zero_padding(self._log_decay(x)).unflatten(-1, (layer.key_heads, layer.key_dim))
            o = self._attend(q, k, v, log_decay, layout, state)
        return self.o_proj(self.g_norm(o.flatten(-2), None if self.g_proj is None else self.g_proj(x)))

    def _log_decay(self, x: Tensor) -> Tensor:
        bounds = {"normalizer": self.gate_logit_normalizer, "least": self.clamp_min}
        layers = [] if torch.compiler.is_compiling() else plain_layers(self.gk_proj)
        if layers:
            down, up = layers
            return low_rank_log_decay(x, down.weight, up.weight, up.bias, **bounds)
        # What adapters, quantisers and trainers hang there sees its calls. What is compiled is fused by the compiler.
        gates = self.gk_proj(wide_input(x, self.gk_proj))
        return log_decay(gates.to(torch.promote_types(gates.dtype, torch.float32)), **bounds)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, layout: TokenLayout, state: LayerState | None) -> Tensor:
        reach = spectrum(self.layer, self.spectrum_rho, self.layer.key_heads, self.layer.key_dim, device=q.device)
        scale, expansion = self.layer.scale, {"mixing": self.mixing, "lift_gamma": self.lift_gamma, "spectrum": reach}
        past = None if state is None else state.recurrent
        # The step writes into the state, which autograd could not undo.
        if past is not None and q.shape[1] == 1 and not torch.is_grad_enabled():
            return gla_step(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], past, scale=scale, **expansion)[:, None]
        o, final = gla(
            q, k, v, log_decay, scale=scale, **expansion, initial_state=past, output_final_state=state is not None,
            cu_seqlens=layout.cu_seqlens, backend=self.backend,
        )  # fmt: skip
        if state is not None:
            state.recurrent = final
        return o
