"""Mamba (arXiv 2312.00752), in the form of transformers' and state-spaces' checkpoints, with a state of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..families.description import LayerDescription, ModelDescription
from ..kernels import selective_scan, selective_scan_step
from ..kernels.pointwise import gated_product
from .cache import LayerState
from .components import Mixer, ShortConvolution, TokenLayout, spectrum, wide_input


class MambaMixer(Mixer):
    """S_t = exp(dt_t A) ∘ S_{t-1} + B_t^T (dt_t x_t), y_t = C_t S_t + D x_t, y · SiLU(z); every channel has its own A and dt.

    B and C, the key and the query, are shared by all channels. With `lift` they carry products of their channels. With `spectrum`,
    decays reach below 0.
    """

    keep_in_fp32 = ("A_log", "dt_proj", "D", "lift_gamma", "spectrum_rho")

    def __init__(self, model: ModelDescription, layer: LayerDescription) -> None:
        super().__init__(model, layer)
        options = model.mixer
        self.layer = layer
        channels, d_state, rank = layer.value_dim, layer.key_dim, options["time_step_rank"]
        self.in_proj = nn.Linear(model.hidden_size, 2 * channels, bias=options["use_bias"])  # rows [x | z]
        self.conv1d = ShortConvolution(channels, options["conv_size"], options["conv_bias"])
        self.splits = (rank, d_state, d_state)  # rows of x_proj: [dt | B | C]
        self.x_proj = nn.Linear(channels, sum(self.splits), bias=False)
        self.dt_proj = nn.Linear(rank, channels, bias=True)
        self.A_log = nn.Parameter(torch.empty(channels, d_state))
        self.D = nn.Parameter(torch.empty(channels))
        self.lift_gamma = nn.Parameter(torch.empty(1, (layer.lift - 1) * d_state)) if layer.lift > 1 else None
        self.spectrum_rho = nn.Parameter(torch.empty(channels)) if layer.spectrum == "learned" else None
        self.out_proj = nn.Linear(channels, model.hidden_size, bias=options["use_bias"])
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """S4D-real decays, time steps from 0.001 to 0.1 before the projection adds to them, nothing lifted, no decay below 0."""
        device = self.A_log.device
        init.copy_(self.A_log, torch.arange(1, self.layer.key_dim + 1, device=device).log().expand_as(self.A_log))
        steps = torch.logspace(-3, -1, self.layer.value_dim, device=device)
        init.copy_(self.dt_proj.bias, steps + torch.log(-torch.expm1(-steps)))
        init.ones_(self.D)
        for parameter in (self.lift_gamma, self.spectrum_rho):
            if parameter is not None:
                init.zeros_(parameter)

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None) -> Tensor:
        """See `Mixer.forward`."""
        values, z = self.in_proj(x).chunk(2, dim=-1)
        # What follows a convolution sees padding's biases and neighbours, which must not choose dt, B and C.
        values = layout.zero_padding(self.conv1d(values, layout, state))
        low, B, C = self.x_proj(values).split(self.splits, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            # A padded token takes a time step of 0: the state neither decays nor grows.
            dt = layout.zero_padding(F.softplus(self.dt_proj(wide_input(low, self.dt_proj))))
            y = self._scan(values, dt, B, C, layout, state)
        return self.out_proj(gated_product(z, y, "silu"))

    def _scan(self, values: Tensor, dt: Tensor, B: Tensor, C: Tensor, layout: TokenLayout, state: LayerState | None) -> Tensor:
        A = -torch.exp(self.A_log.to(dt.dtype))
        reach = spectrum(self.layer, self.spectrum_rho, self.layer.value_dim, device=values.device)
        options = {"D": self.D, "lift_gamma": self.lift_gamma, "spectrum": reach}
        past = None if state is None else state.recurrent
        # The step writes into the state, which autograd could not undo.
        if past is not None and values.shape[1] == 1 and not torch.is_grad_enabled():
            return selective_scan_step(values[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], past, **options)[:, None]
        y, final = selective_scan(
            values, dt, A, B, C, **options, initial_state=past, output_final_state=state is not None,
            cu_seqlens=layout.cu_seqlens, backend=self.backend,
        )  # fmt: skip
        if state is not None:
            state.recurrent = final
        return y
