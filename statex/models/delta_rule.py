"""DeltaNet (arXiv 2406.06484) and Gated DeltaNet (arXiv 2412.06464), in the form of fla's checkpoints, with states of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..families.description import LayerDescription, ModelDescription
from ..kernels import delta_rule, delta_rule_step, lift
from ..kernels.pointwise import time_steps
from .cache import LayerState
from .components import GroupedRMSNorm, Mixer, ShortConvolution, TokenLayout, wide_input

CONVOLVED = ("q", "k", "v")
NORM_FLOOR = 1e-6
"""As in fla: under the root of the sum of squares, and the least sum of sizes, that queries and keys are divided by."""


class DeltaNetMixer(Mixer):
    """S_t = S_{t-1} + b_t k_t^T (v_t - k_t S_{t-1}), read by q_t; b_t = r · sigmoid(b); output normed per value head.

    With `mixing`, each value head has keys of its own, in which it mixes those of all source heads; a query is that of all source
    heads side by side. With `lift`, keys and queries carry products of their channels. With `spectrum`, r may exceed 1 and
    eigenvalues 1 - b_t reach below 0.
    """

    keep_in_fp32 = ("a_proj", "b_proj", "A_log", "dt_bias", "mixing", "lift_gamma", "spectrum_rho")

    def __init__(self, model: ModelDescription, layer: LayerDescription) -> None:
        super().__init__(model, layer)
        options = model.mixer
        self.layer = layer
        keys, values = layer.key_heads * layer.key_dim, layer.value_heads * layer.value_dim
        self.q_proj = nn.Linear(model.hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(model.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(model.hidden_size, values, bias=False)
        self.b_proj = nn.Linear(model.hidden_size, layer.value_heads, bias=False) if options["use_beta"] else None
        self.g_proj = nn.Linear(model.hidden_size, values, bias=False) if options["use_gate"] else None
        weight_channels = values // layer.norm_groups
        self.o_norm = GroupedRMSNorm(values, layer.norm_groups, model.norm_eps, weight_channels, options["gate_fn"])
        self.o_proj = nn.Linear(values, model.hidden_size, bias=False)
        self.qk_activation, self.qk_norm = options["qk_activation"], options["qk_norm"]
        self.convolved = options["use_short_conv"]
        if self.convolved:
            activated = (self.qk_activation == "silu", self.qk_activation == "silu", True)
            for name, channels, activate in zip(CONVOLVED, (keys, keys, values), activated, strict=True):
                convolution = ShortConvolution(channels, options["conv_size"], options["conv_bias"], activate)
                self.add_module(f"{name}_conv1d", convolution)
        self._add_decay_parameters(model.hidden_size)
        self._add_expansion_parameters()
        self.reset_own_parameters()

    def _add_decay_parameters(self, hidden_size: int) -> None:
        """None: nothing decays."""

    def _add_expansion_parameters(self) -> None:
        layer = self.layer
        self.mixing: nn.Parameter | None = None
        self.lift_gamma: nn.Parameter | None = None
        self.spectrum_rho: nn.Parameter | None = None
        if layer.mixing is not None:
            rows = layer.blocks if layer.mixing == "scalar" else layer.key_dim
            values = layer.value_heads // (layer.key_heads * layer.blocks)
            self.mixing = nn.Parameter(torch.empty(layer.key_heads, rows, layer.blocks, values))
        if layer.lift > 1:
            self.lift_gamma = nn.Parameter(torch.empty(layer.key_heads, (layer.lift - 1) * layer.key_dim))
        if layer.spectrum == "learned":
            self.spectrum_rho = nn.Parameter(torch.empty(layer.value_heads))

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Each value is written under the keys of its own source head, nothing is lifted, no eigenvalue is below 0."""
        if self.mixing is not None:
            rows, blocks = self.mixing.shape[1:3]
            identity = torch.eye(blocks, device=self.mixing.device).repeat_interleave(rows // blocks, dim=0)
            init.copy_(self.mixing, identity[..., None].expand_as(self.mixing))
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
        else:
            v = F.silu(v)
        q, k = self._activate(q), self._activate(k)
        with torch.autocast(x.device.type, enabled=False):
            q = self._queries(q.unflatten(-1, (layer.query_heads, layer.key_dim)))
            k = self._keys(k.unflatten(-1, (layer.key_heads, layer.key_dim)))
            v = v.unflatten(-1, (layer.value_heads, layer.value_dim))
            # A padded token neither writes nor decays.
            beta = layout.zero_padding(self._beta(x))
            log_decay = self._log_decay(x)
            o = self._attend(q, k, v, beta, None if log_decay is None else layout.zero_padding(log_decay), layout, state)
        return self.o_proj(self.o_norm(o.flatten(-2), None if self.g_proj is None else self.g_proj(x)))

    def _activate(self, x: Tensor) -> Tensor:
        match self.qk_activation:
            case "silu":
                return x if self.convolved else F.silu(x)
            case "relu":
                return F.relu(x)
            case "elu":  # plus 1, which makes its negative side exp(x)
                return torch.where(x < 0, x.clamp_max(0).exp(), x + 1)
        return x

    def _queries(self, q: Tensor) -> Tensor:
        """`[B, T, H, K] -> [B, T, H, lift · K]` in fp32 or wider: each source head normalised on its own."""
        blocks = self._normalise(_wide(q).unflatten(-1, (self.layer.blocks, -1)))
        q = blocks.flatten(-2)
        return q if self.lift_gamma is None else torch.cat([q, lift(q, self.layer.lift)], -1)

    def _keys(self, k: Tensor) -> Tensor:
        """`[B, T, H, K] -> [B, T, H or value heads, lift · K]`: normalised once, behind all that is mixed and added.

        So |k| = 1 however far mixing and gates open, and a step's eigenvalue stays 1 - beta.
        """
        k = _wide(k)
        if self.lift_gamma is not None:
            k = torch.cat([k, self.lift_gamma * lift(k, self.layer.lift)], -1)
        if self.mixing is not None:
            per_channel = self.mixing.flatten(2).mT
            if self.layer.mixing == "scalar":
                per_channel = per_channel.repeat_interleave(self.layer.key_dim // self.layer.blocks, -1)
            k = (k.unsqueeze(-2) * per_channel.repeat(1, 1, self.layer.lift)).flatten(2, 3)
        return self._normalise(k)

    def _normalise(self, x: Tensor) -> Tensor:
        if self.qk_norm == "sum":
            return x / x.abs().sum(-1, keepdim=True).clamp_min(NORM_FLOOR)
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_FLOOR)

    def _beta(self, x: Tensor) -> Tensor:
        """`[B, T, value heads]`."""
        if self.b_proj is None:
            beta = _wide(x).new_ones(*x.shape[:2], self.layer.value_heads)
        else:
            beta = _wide(self.b_proj(wide_input(x, self.b_proj))).sigmoid()
        if self.layer.spectrum is None:
            return beta
        return beta * (2 if self.spectrum_rho is None else 2 * self.spectrum_rho.sigmoid())

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """`[B, T, value heads]`; None where nothing decays."""
        return None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, layout: TokenLayout, state: LayerState | None
    ) -> Tensor:
        scale, past = self.layer.scale, None if state is None else state.recurrent
        # The step writes into the state, which autograd could not undo.
        if past is not None and q.shape[1] == 1 and not torch.is_grad_enabled():
            decay = None if log_decay is None else log_decay[:, 0]
            return delta_rule_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], decay, past, scale=scale)[:, None]
        o, final = delta_rule(
            q, k, v, beta, log_decay, scale=scale, initial_state=past, output_final_state=state is not None,
            cu_seqlens=layout.cu_seqlens, backend=self.backend,
        )  # fmt: skip
        if state is not None:
            state.recurrent = final
        return o


class GatedDeltaNetMixer(DeltaNetMixer):
    """DeltaNet whose state decays by exp(-exp(A_log) softplus(a + dt_bias)) before a token writes, a number for each value head."""

    def _add_decay_parameters(self, hidden_size: int) -> None:
        self.a_proj = nn.Linear(hidden_size, self.layer.value_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.layer.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.layer.value_heads))

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """As in DeltaNet; decays spread over the range that fla draws them from."""
        super().reset_own_parameters()
        heads = self.A_log.shape[0]
        init.copy_(self.A_log, torch.linspace(1, 16, heads, device=self.A_log.device).log())
        steps = torch.logspace(-3, -1, heads, device=self.dt_bias.device)
        init.copy_(self.dt_bias, steps + torch.log(-torch.expm1(-steps)))

    def _log_decay(self, x: Tensor) -> Tensor:
        return -self.A_log.exp() * time_steps(self.a_proj(wide_input(x, self.a_proj)), self.dt_bias)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
