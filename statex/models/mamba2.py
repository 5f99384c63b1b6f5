"""Mamba-2 (arXiv 2405.21060), in the form of transformers' and state-spaces' checkpoints, with a state of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..families.description import LayerDescription, ModelDescription
from ..kernels import ssd, ssd_step
from ..kernels.pointwise import time_steps
from .cache import LayerState
from .components import GroupedRMSNorm, Mixer, ShortConvolution, TokenLayout, spectrum


class Mamba2Mixer(Mixer):
    """S_t = exp(dt_t A) S_{t-1} + dt_t B_t^T x_t, y_t = C_t S_t + D x_t; y · SiLU(z) normed per group.

    B and C, the key and the query, are shared by the heads of a group. With `lift` they carry products of their channels. With
    `spectrum`, decays reach below 0.
    """

    keep_in_fp32 = ("A_log", "dt_bias", "D", "lift_gamma", "spectrum_rho")

    def __init__(self, model: ModelDescription, layer: LayerDescription) -> None:
        super().__init__(model, layer)
        options = model.mixer
        self.layer = layer
        heads, channels, keys = layer.value_heads, layer.value_heads * layer.value_dim, layer.key_heads * layer.key_dim
        # Rows of in_proj: [z | x | B | C | dt]; the convolution runs over [x | B | C].
        self.splits = (channels, channels + 2 * keys, heads)
        self.in_proj = nn.Linear(model.hidden_size, sum(self.splits), bias=options["use_bias"])
        self.conv1d = ShortConvolution(channels + 2 * keys, options["conv_size"], options["conv_bias"])
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.lift_gamma: nn.Parameter | None = None
        if layer.lift > 1:
            self.lift_gamma = nn.Parameter(torch.empty(layer.key_heads, (layer.lift - 1) * layer.key_dim))
        self.spectrum_rho = nn.Parameter(torch.empty(heads)) if layer.spectrum == "learned" else None
        self.norm = GroupedRMSNorm(channels, layer.norm_groups, model.norm_eps, channels, "silu", gate_first=True)
        self.out_proj = nn.Linear(channels, model.hidden_size, bias=options["use_bias"])
        self.time_step_limit = options["time_step_limit"]
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """S4D-real decays, time steps from 0.001 to 0.1, nothing lifted, no decay below 0."""
        heads = self.A_log.shape[0]
        init.copy_(self.A_log, torch.arange(1, heads + 1, device=self.A_log.device).log())
        steps = torch.logspace(-3, -1, heads, device=self.dt_bias.device)
        init.copy_(self.dt_bias, steps + torch.log(-torch.expm1(-steps)))
        init.ones_(self.D)
        if self.lift_gamma is not None:
            init.zeros_(self.lift_gamma)
        if self.spectrum_rho is not None:
            init.zeros_(self.spectrum_rho)

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None) -> Tensor:
        """See `Mixer.forward`."""
        layer = self.layer
        z, xBC, dt = self.in_proj(x).split(self.splits, dim=-1)
        keys = layer.key_heads * layer.key_dim
        values, B, C = self.conv1d(xBC, layout, state, sizes=(self.splits[0], keys, keys))
        values = values.unflatten(-1, (layer.value_heads, layer.value_dim))
        B, C = (channels.unflatten(-1, (layer.key_heads, layer.key_dim)) for channels in (B, C))
        with torch.autocast(x.device.type, enabled=False):
            # A padded token takes a time step of 0: the state neither decays nor grows.
            dt = layout.zero_padding(time_steps(dt, self.dt_bias, *self.time_step_limit))
            y = self._scan(values, dt, B, C, layout, state)
        return self.out_proj(self.norm(y.flatten(-2), z))

    def _scan(self, values: Tensor, dt: Tensor, B: Tensor, C: Tensor, layout: TokenLayout, state: LayerState | None) -> Tensor:
        A = -torch.exp(self.A_log.to(dt.dtype))
        reach = spectrum(self.layer, self.spectrum_rho, self.layer.value_heads, device=values.device)
        options = {"D": self.D, "lift_gamma": self.lift_gamma, "spectrum": reach}
        past = None if state is None else state.recurrent
        # The step writes into the state, which autograd could not undo.
        if past is not None and values.shape[1] == 1 and not torch.is_grad_enabled():
            return ssd_step(values[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], past, **options)[:, None]
        y, final = ssd(
            values, dt, A, B, C, **options, initial_state=past, output_final_state=state is not None,
            cu_seqlens=layout.cu_seqlens, backend=self.backend,
        )  # fmt: skip
        if state is not None:
            state.recurrent = final
        return y
