"""What some arms of `recovery.py` do beyond surgery and learning rates: to the new numbers at the start or along the run, to the
loss, or to the way that a mixer uses its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statex.families.description import ModelDescription
from statex.kernels.pointwise import gated_product, norm
from statex.models import StatexForCausalLM
from statex.models.components import GroupedRMSNorm
from statex.models.mamba2 import Mamba2Mixer
from statex.surgery import mamba2_rows

Advance = Callable[[float], None]
"""Called in front of each step, and after the last, with the share of the run that is done."""
Extra = Callable[[StatexForCausalLM, ModelDescription, float, int], Advance | None]
"""(model after surgery, description before it, the arm's number, seed) -> what it does along the run, if anything.

All changes are made in place, on tensors that a captured graph goes on reading.
"""

SCHEDULED, ANNEALED = 0.5, 0.75
"""Share of the run over which new numbers are led."""


def mixings(model: StatexForCausalLM) -> Iterator[tuple[nn.Parameter, Tensor, float]]:
    """Mixing matrices `[heads, f or K, f]`, where they join a head with another (True), and f^-½."""
    for block in model.model.layers:
        mixing = getattr(block.mixer, "mixing", None)
        if mixing is not None:
            rows, blocks = mixing.shape[1:]
            foreign = torch.eye(blocks, device=mixing.device).repeat_interleave(rows // blocks, 0) == 0
            yield mixing, foreign, blocks**-0.5


@torch.no_grad()
def noise(model: StatexForCausalLM, source: ModelDescription, std: float, seed: int) -> None:
    """Foreign heads and lifted keys are read from the start, by numbers drawn from N(0, std)."""
    generator = torch.Generator().manual_seed(seed)
    for mixing, foreign, _ in mixings(model):
        mixing.add_(torch.randn(mixing.shape, generator=generator).to(mixing) * std * foreign)
    for name, parameter in model.named_parameters():
        if name.endswith("lift_gamma"):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)


def scheduled(model: StatexForCausalLM, source: ModelDescription, number: float, seed: int) -> Advance:
    """Foreign heads are read by a number that grows to f^-½ over the first half of the run, and is free after it."""
    found = list(mixings(model))

    @torch.no_grad()
    def advance(done: float) -> None:
        for mixing, foreign, end in found if done <= SCHEDULED else ():
            mixing.masked_fill_(foreign, end * done / SCHEDULED)

    return advance


class AnnealedNorm(GroupedRMSNorm):
    """A norm per source head that becomes, as `share` goes from 0 to 1, the norm over all channels of a merged head."""

    blocks: int
    share: Tensor

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """`[..., channels] -> [..., channels]`; both norms have the same weight, that of a source head repeated."""
        weight, wide = self.weight, torch.promote_types(x.dtype, torch.float32)
        if weight is not None:
            weight = weight.repeat(x.shape[-1] // len(weight))
        per_head, merged = (norm(x, weight, eps=self.eps, groups=n, dtype=wide) for n in (self.groups, self.groups // self.blocks))
        normed = torch.lerp(per_head, merged, self.share.to(wide))
        return (normed if gate is None else gated_product(gate, normed, self.activation)).to(x.dtype)


def annealed(model: StatexForCausalLM, source: ModelDescription, number: float, seed: int) -> Advance:
    """M goes from the identity to f^-½ everywhere, and the norm from per head to merged: the end is a stock checkpoint."""
    found, norms = list(mixings(model)), []
    for block in model.model.layers:
        if getattr(block.mixer, "mixing", None) is not None:
            block.mixer.mixing.requires_grad_(False)
            per_head = block.mixer.g_norm
            per_head.__class__, per_head.blocks = AnnealedNorm, block.mixer.layer.blocks
            per_head.share = torch.zeros((), device=model.device)
            norms.append(per_head)

    @torch.no_grad()
    def advance(done: float) -> None:
        share = min(1.0, done / ANNEALED)
        for mixing, foreign, end in found:
            mixing.masked_fill_(foreign, share * end).masked_fill_(~foreign, 1 - share + share * end)
        for annealing in norms:
            annealing.share.fill_(share)

    return advance


@torch.no_grad()
def orthogonal(model: StatexForCausalLM, source: ModelDescription, number: float, seed: int) -> None:
    """New rows of keys are made orthogonal to the head's old ones and to each other, at the old ones' mean length."""
    for block, before in zip(model.model.layers, source.layers, strict=True):
        mixer, layer = block.mixer, block.mixer.layer
        if layer.key_dim == before.key_dim:
            continue
        if source.family == "mamba2":
            rows = mamba2_rows.split_rows(mamba2_rows.PROJECTION, mixer.in_proj.weight, layer)[1]
        else:
            rows = mixer.k_proj.weight
        for group in rows.unflatten(0, (layer.key_heads, -1)):
            old, new = group.tensor_split([before.key_dim])
            basis = torch.linalg.qr(group.T.double()).Q.T[before.key_dim :]
            new.copy_(basis * old.norm(dim=1).mean())


class SumOfSets(Mamba2Mixer):
    """Mamba-2 whose B and C are each the sum of several sets of rows: the parameters of a wider state, and the state as it was."""

    sets = 1

    def _scan(self, values: Tensor, dt: Tensor, B: Tensor, C: Tensor, *rest: object) -> Tensor:
        B, C = (x.unflatten(-1, (self.sets, -1)).sum(-2) for x in (B, C))
        return super()._scan(values, dt, B, C, *rest)  # type: ignore[arg-type]


@torch.no_grad()
def sum_of_sets(model: StatexForCausalLM, source: ModelDescription, number: float, seed: int) -> None:
    """The control of widen_state: as many new parameters, live and silent at first alike, in B and C of the old length.

    New rows are drawn and their taps and biases zero, so that silu(0) = 0 adds nothing and the taps have a gradient. (With zero
    rows and copied taps, as in the wider state, all new rows of C would get the same gradient, and be one.)
    """
    generator = torch.Generator().manual_seed(seed)
    for block, before in zip(model.model.layers, source.layers, strict=True):
        mixer, layer = block.mixer, block.mixer.layer
        mixer.__class__, mixer.sets = SumOfSets, int(number)
        for rows in mamba2_rows.split_rows(mamba2_rows.PROJECTION, mixer.in_proj.weight, layer)[1:3]:
            old, new = rows.unflatten(0, (layer.key_heads, -1)).tensor_split([before.key_dim], dim=1)
            new.copy_(torch.randn(new.shape, generator=generator).to(old) * old.std())
        convolution = [tensor for tensor in (mixer.conv1d.weight, mixer.conv1d.bias) if tensor is not None]
        for tensor in convolution:
            for channels in mamba2_rows.split_rows(mamba2_rows.CONV, tensor, layer)[1:3]:
                channels.unflatten(0, (layer.key_heads, -1))[:, before.key_dim :].zero_()


@torch.no_grad()
def recombined(model: StatexForCausalLM, source: ModelDescription, number: float, seed: int) -> None:
    """New rows of Mamba-2's B are random combinations of the head's old ones, as long as these: they read what B reads."""
    generator = torch.Generator().manual_seed(seed)
    for block, before in zip(model.model.layers, source.layers, strict=True):
        layer = block.mixer.layer
        for group in mamba2_rows.split_rows(mamba2_rows.PROJECTION, block.mixer.in_proj.weight, layer)[1].unflatten(
            0, (layer.key_heads, -1)
        ):
            old, new = group.tensor_split([before.key_dim])
            weights = torch.randn(len(new), len(old), generator=generator).to(old)
            mixed = weights @ F.normalize(old, dim=1)
            new.copy_(F.normalize(mixed, dim=1) * old.norm(dim=1).mean())


EXTRAS: dict[str, Extra] = {
    "noise": noise,
    "scheduled": scheduled,
    "annealed": annealed,
    "orthogonal": orthogonal,
    "sum_of_sets": sum_of_sets,
    "recombined": recombined,
}
DISTILLED = "distilled"
"""The extra that changes the loss: the model before surgery teaches, with the arm's number as the weight of the divergence."""


def named(extra: str) -> list[tuple[str, float]]:
    """What an arm's extra asks for: `name` or `name:number`, several with commas."""
    parts = (part.partition(":") for part in extra.split(",") if part)
    return [(name, float(number or 0)) for name, _, number in parts]


def prepare(extra: str, model: StatexForCausalLM, source: ModelDescription, seed: int) -> Advance | None:
    """Carry out an arm's extra on the model after surgery."""
    made = [EXTRAS[name](model, source, number, seed) for name, number in named(extra) if name in EXTRAS]
    along = [advance for advance in made if advance is not None]

    def advance(done: float) -> None:
        for one in along:
            one(done)

    return advance if along else None


def teaching_weight(extra: str) -> float:
    """The weight of the teacher's part in the loss; 0 without one."""
    return dict(named(extra)).get(DISTILLED, 0.0)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats a token, of logits `[..., vocabulary]`."""
    known, guessed = (F.log_softmax(logits.float().flatten(0, -2), -1) for logits in (teacher, student))
    return F.kl_div(guessed, known, reduction="batchmean", log_target=True)
