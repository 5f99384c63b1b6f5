"""HGRN and HGRN2 (arXiv 2311.04823, 2404.07904), in the form of fla's checkpoints, and what lies between the two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..families.description import LayerDescription, ModelDescription
from ..kernels import gla, gla_step, hgrn
from .cache import LayerState
from .components import GroupedRMSNorm, Mixer, ShortConvolution, TokenLayout, spectrum


class HGRNMixer(Mixer):
    """S_t = Diag(f_t) S_{t-1} + (1 - f_t)^T i_t with forget gates f, which give keys and decays both.

    What is read of it, `LayerDescription.outer` says. HGRN's vector state h is the diagonal of S, so without `outer` nothing else
    is kept: o = norm(h) · silu(g) with i = silu(W_i x). `alone` is HGRN2: o = norm(q S) with q = silu(W_q x) and i = W_i x. `added`
    is HGRN that reads the whole of S beside: o = norm(h + λ · q S) · silu(g) with q = silu(g), λ in `outer_gain`.

    With `mixing` and `lift` as in GLA. With `spectrum`, decays reach below 0; keys stay 1 - f of the plain f.
    """

    keep_in_fp32 = ("outer_gain", "mixing", "lift_gamma", "spectrum_rho")

    def __init__(self, model: ModelDescription, layer: LayerDescription) -> None:
        super().__init__(model, layer)
        options = model.mixer
        self.layer = layer
        keys, values = layer.key_heads * layer.key_dim, layer.value_heads * layer.value_dim
        self.q_proj = nn.Linear(model.hidden_size, keys, bias=False) if layer.outer == "alone" else None
        self.f_proj = nn.Linear(model.hidden_size, keys, bias=False)
        self.i_proj = nn.Linear(model.hidden_size, values, bias=False)
        self.g_proj = nn.Linear(model.hidden_size, values, bias=False) if layer.outer != "alone" else None
        self.o_proj = nn.Linear(values, model.hidden_size, bias=False)
        weight_channels = values // layer.norm_groups if options["elementwise_affine"] else None
        self.g_norm = GroupedRMSNorm(values, layer.norm_groups, model.norm_eps, weight_channels)
        self.convolved = options["use_short_conv"]
        if self.convolved:
            channels = {"f": keys, "i": values} | ({"q": keys} if layer.outer == "alone" else {})
            for name, width in channels.items():
                convolution = ShortConvolution(width, options["conv_size"], options["conv_bias"], activate=False)
                self.add_module(f"{name}_conv1d", convolution)
        self._add_expansion_parameters()

    def _add_expansion_parameters(self) -> None:
        layer = self.layer
        self.outer_gain: nn.Parameter | None = None
        self.mixing: nn.Parameter | None = None
        self.lift_gamma: nn.Parameter | None = None
        self.spectrum_rho: nn.Parameter | None = None
        if layer.outer == "added":
            self.outer_gain = nn.Parameter(torch.empty(layer.value_heads * layer.value_dim))
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
        """Of S its diagonal is read only, of merged heads each its own block, and nothing lifted; no decay is below 0."""
        for parameter in (self.outer_gain, self.lift_gamma, self.spectrum_rho):
            if parameter is not None:
                init.zeros_(parameter)
        if self.mixing is not None:
            _, rows, blocks = self.mixing.shape
            identity = torch.eye(blocks, device=self.mixing.device).repeat_interleave(rows // blocks, dim=0)
            init.copy_(self.mixing, identity.expand_as(self.mixing))

    def forward(self, x: Tensor, layout: TokenLayout, state: LayerState | None = None, lower_bound: Tensor | None = None) -> Tensor:
        """See `Mixer.forward`; `lower_bound` `[channels]` is the least that a forget gate can be, None for 0."""
        f, values = (self._project(name, x, layout, state) for name in "fi")
        gate: Tensor | None = None
        if self.g_proj is None:
            q = F.silu(self._project("q", x, layout, state))
        else:
            values, q = F.silu(values), F.silu(self.g_proj(x))
            gate = q
        with torch.autocast(x.device.type, enabled=False):
            keys, log_decay = forget(f, lower_bound)
            # A padded token writes nothing and forgets nothing.
            keys, log_decay = layout.zero_padding(keys), layout.zero_padding(log_decay)
            if self.layer.outer is None:
                o = self._diagonal(keys, values, log_decay, layout, state)
            else:
                o = self._outer(q, keys, values, log_decay, layout, state)
        return self.o_proj(self.g_norm(o, gate))

    def _project(self, name: str, x: Tensor, layout: TokenLayout, state: LayerState | None) -> Tensor:
        projected: Tensor = self.get_submodule(f"{name}_proj")(x)
        if self.convolved:
            projected = self.get_submodule(f"{name}_conv1d")(projected, layout, state, name)
        return projected

    def _diagonal(self, keys: Tensor, values: Tensor, log_decay: Tensor, layout: TokenLayout, state: LayerState | None) -> Tensor:
        """h `[B, T, channels]`, with h in `state` as the states of heads of one channel."""
        past = None if state is None or state.recurrent is None else state.recurrent.flatten(1)
        h, final = self._scan(keys, values, log_decay, past, layout, keep=state is not None)
        if state is not None and final is not None:
            state.recurrent = final[..., None, None]
        return h

    def _scan(
        self, keys: Tensor, values: Tensor, log_decay: Tensor, past: Tensor | None, layout: TokenLayout, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        # In half precision as it is written and read, so that memory moves half as much; decays and the state stay fp32.
        written = (keys * values.to(keys.dtype)).to(values.dtype)
        h, final = hgrn(
            written, log_decay, initial_state=past, output_final_state=keep, cu_seqlens=layout.cu_seqlens, backend=self.backend
        )
        return h, final

    def _outer(
        self, q: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, layout: TokenLayout, state: LayerState | None
    ) -> Tensor:
        """q S `[B, T, channels]`, or, `added`, h + λ · q S."""
        past = None if state is None else state.recurrent
        # h is the diagonal of S before this call's tokens, and S is changed in place below.
        diagonal = None if past is None or self.outer_gain is None else self._diagonal_of(past)
        read = self._attend(q, keys, values, log_decay, layout, state)
        if self.outer_gain is None:
            return read
        h, _ = self._scan(keys, values, log_decay, diagonal, layout, keep=False)
        return h + (self.outer_gain * read.to(self.outer_gain.dtype)).to(h.dtype)

    def _diagonal_of(self, state: Tensor) -> Tensor:
        """h `[B, channels]` of states `[B, H, lift * n, n]`: the plain part of a lifted key comes first."""
        return state[:, :, : self.layer.key_dim].diagonal(dim1=-2, dim2=-1).flatten(1).clone()

    def _attend(
        self, q: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, layout: TokenLayout, state: LayerState | None
    ) -> Tensor:
        layer = self.layer
        reach = spectrum(layer, self.spectrum_rho, layer.key_heads, layer.key_dim, device=q.device)
        scale, expansion = layer.scale, {"mixing": self.mixing, "lift_gamma": self.lift_gamma, "spectrum": reach}
        # Keys of half precision, as in fla, keep the matrix products in half precision; decays stay fp32.
        q, keys, log_decay = (part.unflatten(-1, (-1, layer.key_dim)) for part in (q, keys.to(values.dtype), log_decay))
        values = values.unflatten(-1, (layer.value_heads, layer.value_dim))
        past = None if state is None else state.recurrent
        # The step writes into the state, which autograd could not undo.
        if past is not None and q.shape[1] == 1 and not torch.is_grad_enabled():
            return gla_step(q[:, 0], keys[:, 0], values[:, 0], log_decay[:, 0], past, scale=scale, **expansion).flatten(1)[:, None]
        o, final = gla(
            q, keys, values, log_decay, scale=scale, **expansion, initial_state=past, output_final_state=state is not None,
            cu_seqlens=layout.cu_seqlens, backend=self.backend,
        )  # fmt: skip
        if state is not None:
            state.recurrent = final
        return o.flatten(-2)


def forget(logits: Tensor, lower_bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a forget gate f = b + (1 - b) · sigmoid(logits) lets in, 1 - f, and log f, both fp32 (fp64 for fp64 logits).

    Args:
        logits: `[B, T, channels]`.
        lower_bound: b `[channels]` in [0, 1], None for 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    keys, log_decay = torch.sigmoid(-logits), F.logsigmoid(logits)
    if lower_bound is None:
        return keys, log_decay
    limits = torch.finfo(logits.dtype)
    # The logarithms of b and 1 - b must exist; no gate notices.
    bound = lower_bound.to(logits.dtype).clamp(limits.tiny, 1 - limits.eps)
    # Both terms are rounded, so that a gate that is all but open comes out a little above 1.
    return (1 - bound) * keys, torch.logaddexp(bound.log(), torch.log1p(-bound) + log_decay).clamp(max=0)
