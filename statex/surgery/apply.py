"""Carry out a plan: headers in, lazy tensors through the operators, and one tensor at a time out to a new folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..checkpoints import Checkpoint, CheckpointWriter, OutputFolder, TensorInfo, canonical_config, open_checkpoint
from ..errors import PlanError
from ..families.description import ModelDescription
from .card import model_card
from .lazy import LazyTensor, Status
from .operator import Context
from .plan import Plan, resolve_plan
from .summary import ExpansionRow, ExpansionSummary, backbone_cost, layer_cost

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYER = "model.layers.{}."

Choice = Callable[[list[int]], Iterable[int]]
"""Of the layers that can take an operation, those that shall."""


@dataclass(frozen=True)
class Expansion:
    """A plan worked out on a checkpoint's headers: nothing has been read but shapes.

    Attributes:
        description: of the expanded model.
        tensors: all tensors of the expanded checkpoint by canonical name, in the source's order, new ones behind their layer.
        summary: the numbers for tables.
    """

    description: ModelDescription
    tensors: dict[str, LazyTensor]
    summary: ExpansionSummary

    def names(self, status: Status) -> list[str]:
        """The tensors of one status."""
        return [name for name, tensor in self.tensors.items() if tensor.status == status]


def expand_checkpoint(
    path: str | Path,
    out: str | Path | None,
    plan: Plan | Mapping[str, Any] | str | Path | None = None,
    *,
    operator: str | None = None,
    factor: int | None = None,
    layers: str | int | Iterable[int] | Choice | None = None,
    init: str | None = None,
    seed: int | None = None,
    options: Mapping[str, Any] | None = None,
    plan_file: str | Path | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: bool = True,
) -> ExpansionSummary:
    """Write an expanded copy of a checkpoint. Memory: one tensor and what surgery makes of it, whatever the checkpoint's size.

    Args:
        path: a checkpoint folder or hub id.
        out: the folder to write; None only with `dry_run`.
        plan: a whole plan, as data or as a file; or `plan_file`; or one operation from `operator`, `factor`, `layers`, `init` and
            `options`. What is left out is the family's plan in the StateX paper (arXiv 2509.22630), with init `preserve`. `layers`
            may be a function, for choices that take long: it is called when all that can be refused has been, with the layers that
            can take the operation, and returns those to expand.
        seed: of every random draw; each draw depends on the seed and its tensor's name only.
        options: the operator's further options, such as `{"mixing": "scalar"}`.
        revision: of a hub id.
        dry_run: read headers only and write nothing.
        force: replace `out` if it exists.
        progress: show a progress bar on a terminal.

    Raises:
        PlanError: the plan cannot be carried out on this checkpoint.
        CheckpointError: the source cannot be read, or `out` exists or cannot be written.
    """
    with open_checkpoint(path, revision=revision) as checkpoint:
        if out is None and not dry_run:
            raise ValueError("out is None, which only a dry run allows")
        target = None if dry_run or out is None else Path(out)
        if not isinstance(plan, Plan):
            told: dict[str, Any] = {
                "operator": operator, "factor": factor, "init": init, "seed": seed, "options": options,
                "plan": plan, "plan_file": plan_file,
            }  # fmt: skip
            if callable(layers):
                layers = _chosen(checkpoint, layers, told, target, force)
            plan = resolve_plan(checkpoint, **told, layers=layers)
        source = str(path)
        with _told_of_earlier_expansions(checkpoint):
            expansion = work_out(checkpoint, plan, source=source, out=target)
        if target is None:
            return expansion.summary
        _write(checkpoint, expansion, plan, target, source=source, force=force, progress=progress)
        return expansion.summary


def try_layers(
    checkpoint: Checkpoint, layers: Iterable[int], **operation: Any
) -> tuple[dict[int, Expansion], dict[int, PlanError]]:
    """One operation, as `resolve_plan` takes it, on each layer alone: what it gives where it can be carried out, else why not."""
    able, unable = {}, {}
    for layer in layers:
        try:
            able[layer] = work_out(checkpoint, resolve_plan(checkpoint, **operation, layers=[layer]))
        except PlanError as error:
            unable[layer] = error
    return able, unable


def _chosen(checkpoint: Checkpoint, choose: Choice, told: Mapping[str, Any], out: Path | None, force: bool) -> list[int]:
    """Ask for the layers when nothing is left to refuse: the operation goes on some layer, and `out` can be written."""
    able, unable = try_layers(checkpoint, range(len(checkpoint.description.layers)), **told)
    if not able:
        with _told_of_earlier_expansions(checkpoint):
            raise next(iter(unable.values()))
    if out is not None:
        least = min(sum(tensor.bytes for tensor in expansion.tensors.values()) for expansion in able.values())
        OutputFolder(out, force=force, need=least, protect=[checkpoint.path]).discard()
    return list(choose(list(able)))


@contextmanager
def _told_of_earlier_expansions(checkpoint: Checkpoint) -> Iterator[None]:
    """A plan that fails on an expanded checkpoint mostly fails because of that."""
    try:
        yield
    except PlanError as error:
        if not checkpoint.is_expanded:
            raise
        what = f"the checkpoint is expanded already, and this plan does not go on top: {error.what}"
        raise PlanError(what, where=error.where, fix=error.fix) from error


def work_out(checkpoint: Checkpoint, plan: Plan, *, source: str = "", out: Path | None = None) -> Expansion:
    """Run every operation of a plan on lazy tensors; reads no tensor.

    Raises:
        PlanError: an operator cannot be applied to a layer as asked.
    """
    family, model = checkpoint.family, checkpoint.description
    outside, by_layer = _group_by_layer(_lazy_tensors(checkpoint), len(model.layers))
    before = after = backbone_cost(outside, tied=model.tie_word_embeddings)
    described, rows, changed = [], [], {}
    for index, layer in enumerate(model.layers):
        tensors = by_layer[index]
        cost = layer_cost(layer, tensors, family)
        before += cost
        context = Context(family, model, index, plan.seed)
        for operation in plan.for_layer(index):
            run, options = operation.operator, operation.options
            run.check(layer, options, context)
            new_layer, tensors = run.apply(layer, tensors, options, context)
            new_cost = layer_cost(new_layer, tensors, family)
            rows.append(ExpansionRow(index, run.name, options.init, options.factor or 1, layer, new_layer, cost, new_cost))
            layer, cost = new_layer, new_cost
        after += cost
        described.append(layer)
        changed.update({LAYER.format(index) + name: tensor for name, tensor in tensors.items()})
    description = ModelDescription(**{**vars(model), "layers": tuple(described)})
    tensors = _in_source_order(checkpoint, outside | changed)
    _require_agreement(checkpoint, description, tensors)
    summary = ExpansionSummary(source, out, family.name, plan.to_dict(), before, after, tuple(rows))
    return Expansion(description, tensors, summary)


def _lazy_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The checkpoint's tensors, with the status that an earlier expansion left them."""
    marks: dict[str, Status] = dict.fromkeys(checkpoint.provenance.get("expanded", ()), "expanded")
    marks |= dict.fromkeys(checkpoint.provenance.get("new", ()), "new")

    def reader(name: str) -> Callable[[], torch.Tensor]:
        return lambda: checkpoint.load(name)

    return {
        name: LazyTensor(tuple(info.shape), info.torch_dtype, reader(name), marks.get(name, "rest"))
        for name, info in checkpoint.tensors.items()
    }


def _group_by_layer(tensors: Mapping[str, LazyTensor], layers: int) -> tuple[dict[str, LazyTensor], list[dict[str, LazyTensor]]]:
    """Tensors outside the layers by full name, and those of each layer by their name within it."""
    outside: dict[str, LazyTensor] = {}
    inside: list[dict[str, LazyTensor]] = [{} for _ in range(layers)]
    for name, tensor in tensors.items():
        parts = name.split(".", 3)
        if name.startswith("model.layers."):
            inside[int(parts[2])][parts[3]] = tensor
        else:
            outside[name] = tensor
    return outside, inside


def _in_source_order(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Read the source front to back; tensors that it lacks come last."""
    known = [name for name in checkpoint.tensors if name in tensors]
    return {name: tensors[name] for name in (*known, *(name for name in tensors if name not in checkpoint.tensors))}


def _require_agreement(checkpoint: Checkpoint, description: ModelDescription, tensors: Mapping[str, LazyTensor]) -> None:
    """An operator that makes other tensors than the family declares for its description is a bug, not a user's mistake."""
    declared = {name: tuple(shape) for name, (shape, _) in checkpoint.family.tensors(description).items()}
    made = {name: tensor.shape for name, tensor in tensors.items()}
    if declared != made:
        wrong = sorted(name for name in declared.keys() | made.keys() if declared.get(name) != made.get(name))
        raise AssertionError(f"surgery made {made.get(wrong[0])} for {wrong[0]}, the description asks for {declared.get(wrong[0])}")


def _write(
    checkpoint: Checkpoint, expansion: Expansion, plan: Plan, out: Path, *, source: str, force: bool, progress: bool
) -> None:
    declared = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in expansion.tensors.items()}
    metadata = {"statex_plan": plan.to_yaml(), "statex_source": source, "statex_version": __version__}
    with CheckpointWriter(out, declared, metadata=metadata, force=force, protect=[checkpoint.path]) as writer:
        with _progress_bar(sum(tensor.bytes for tensor in expansion.tensors.values()), progress) as advance:
            for name, tensor in expansion.tensors.items():
                writer.add(name, tensor.load())
                advance(tensor.bytes)
        provenance = _provenance(checkpoint, expansion, plan, source)
        config = canonical_config(checkpoint)
        config["statex"] |= {"description": expansion.description.to_dict(), "provenance": provenance}
        card = model_card(expansion.summary, provenance, hub_id=None if Path(source).exists() else source)
        writer.finish(config, checkpoint.carried_files, {"plan.yaml": plan.to_yaml(), "README.md": card})


def _provenance(checkpoint: Checkpoint, expansion: Expansion, plan: Plan, source: str) -> dict[str, Any]:
    """What the checkpoint says about how it was made; of an expansion of an expansion, the earlier one too."""
    told: dict[str, Any] = {
        "plan": plan.to_dict(),
        "new": expansion.names("new"),
        "expanded": expansion.names("expanded"),
        "source": source,
        "source_sha256": checkpoint.sha256(),
        "statex_version": __version__,
        "torch_version": torch.__version__,
    }
    return told | ({"previous": checkpoint.provenance} if checkpoint.is_expanded else {})


@contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar over bytes on standard error, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("expanding"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("expanding", total=total)
        yield lambda count: bar.advance(task, count)
