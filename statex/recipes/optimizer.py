"""AdamW's parameter groups by role, rows that move further than their parameter, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..families import Role, get_family
from ..families.description import ModelDescription
from .schema import Optimizer, Schedule

TrainingRole = Literal["new", "expanded", "rest"]
UNDECAYED: frozenset[Role] = frozenset({"decay", "mixing", "lift", "norm", "bias"})
"""Roles of tensors that weight decay would pull away from where they mean something."""


def training_roles(names: Collection[str], provenance: Mapping[str, Any]) -> dict[str, TrainingRole]:
    """Each parameter's role in the run, from what surgery wrote down; all are `rest` in a checkpoint without surgery."""
    new, expanded = set(provenance.get("new", ())), set(provenance.get("expanded", ()))
    return {name: "new" if name in new else "expanded" if name in expanded else "rest" for name in names}


def undecayed_names(description: ModelDescription) -> set[str]:
    """Canonical names of the tensors that are never weight-decayed."""
    tensors = get_family(description.family).tensors(description)
    return {name for name, (_, role) in tensors.items() if role in UNDECAYED}


def freeze(model: nn.Module, roles: Mapping[str, TrainingRole], options: Optimizer) -> None:
    """Stop gradients of the roles whose multiplier is 0. Raises `RecipeError` when nothing is left to train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(options.multipliers, roles[name]) > 0)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        found = ", ".join(sorted(set(roles.values())))
        raise RecipeError(
            "no parameter has a learning rate",
            where="optimizer.multipliers",
            fix=f"The checkpoint has parameters of these roles: {found}; give one a multiplier above 0.",
        )


def build_optimizer(
    model: nn.Module,
    roles: Mapping[str, TrainingRole],
    undecayed: Collection[str],
    options: Optimizer,
    rows: Mapping[str, Sequence[slice]],
) -> torch.optim.AdamW:
    """AdamW with a group for each role and decay, whose `multiplier` scales the learning rate, and with `rows` (of `new_rows`) that
    move `options.multipliers.rows` times as far in each step."""
    groups: list[dict[str, Any]] = []
    for role in get_args(TrainingRole):
        for decayed in (True, False):
            members = [
                (name, parameter)  # AdamW keeps the names as the group's `param_names`
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and roles[name] == role and (name not in undecayed) == decayed
            ]
            if members:
                groups.append(
                    {
                        "params": members,
                        "role": role,
                        "multiplier": getattr(options.multipliers, role),
                        "weight_decay": options.weight_decay if decayed else 0.0,
                    }
                )
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps, fused=True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = [(trained[name], run) for name, runs in rows.items() if name in trained for run in runs]
    if parts and options.multipliers.rows != 1:
        _move_further(optimizer, parts, options.multipliers.rows)
    return optimizer


def _move_further(optimizer: torch.optim.Optimizer, parts: Sequence[tuple[nn.Parameter, slice]], factor: float) -> None:
    """Let rows of parameters move `factor` times as far in a step as the optimizer moves them.

    A step of AdamW, weight decay included, is proportional to the rate, so that this is the step at `factor` times the rate.
    Nothing is kept from one step to the next that a resumed run would lack.
    """
    before = [parameter.detach()[rows].clone() for parameter, rows in parts]

    def now() -> list[Tensor]:
        # Views of this very moment: a model that accelerate moves, if only from cpu to cpu:0, has its parameters elsewhere then.
        return [parameter.detach()[rows] for parameter, rows in parts]

    @torch.no_grad()
    def remember(*step: Any) -> None:
        torch._foreach_copy_(before, now())

    @torch.no_grad()
    def go_on(*step: Any) -> None:
        torch._foreach_lerp_(now(), before, 1 - factor)  # before + factor (now - before)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(go_on)


def learning_rate(step: int, total: int, peak: float, schedule: Schedule) -> float:
    """Rate of the update number `step` (1 … total): linear warm-up, then a cosine to `min_ratio * peak` at the last step."""
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's rate to `rate` times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]
