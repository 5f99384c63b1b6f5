"""`finetune`: a checkpoint, a recipe and data in; a checkpoint of the same kind out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..checkpoints import Checkpoint, open_checkpoint
from ..errors import RecipeError
from ..models import load
from ..models.named import load_tokenizer
from ..surgery.new_rows import new_rows
from .card import model_card, run_provenance
from .data.packing import Packer
from .data.readers import Shard
from .data.sources import open_sources
from .optimizer import freeze, training_roles, undecayed_names
from .reporting import Reporter
from .schema import Entry, Recipe, TextEntry
from .settle import Paths, settle
from .store import RunStore, check_out, remove_run, resumed_recipe
from .trainer import Trainer, accumulation_steps, make_accelerator

TRAIN, HELD_OUT = 0, 1
"""Purposes of random draws: training and evaluation never share a row."""


@dataclass(frozen=True)
class FinetuneResult:
    """What a run did.

    Attributes:
        out, log: the fine-tuned checkpoint, and its log.csv.
        steps, tokens: of the whole run. seconds: of this call.
        final_loss: of the last step, nats per token.
        eval_before, eval_after: held-out loss before the first and after the last step; None without held-out data.
    """

    out: Path
    log: Path
    steps: int
    tokens: int
    seconds: float
    final_loss: float
    eval_before: float | None
    eval_after: float | None


def finetune(
    checkpoint: str | Path,
    recipe: str | Path | Recipe | None = None,
    data: Paths = None,
    out: str | Path = "finetuned",
    *,
    held_out: Paths = None,
    overrides: Sequence[str] | Mapping[str, Any] | None = None,
    resume: bool = False,
    force: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> FinetuneResult:
    """Fine-tune a checkpoint, expanded or not, native or canonical, into `out` (layout: `statex.recipes.store`).

    Args:
        checkpoint: folder or hub id.
        recipe: a shipped recipe's name, a file, or a `Recipe`; by default `recovery`.
        data: files, folders or hub ids that stand in for the recipe's text entries; its synthetic entries stay.
        held_out: the same for its evaluation.
        overrides: `key.path=value`, laid over the recipe.
        resume: continue an interrupted run in `out` with its own recipe and data; losses go on bit for bit (on a CPU).
        force: overwrite an earlier run in `out`.
        device: `cpu` to stay off a GPU; by default the GPU where there is one.
        progress: tell the loss on the console.

    Raises:
        RecipeError: recipe, data, tokenizer or output folder cannot be used; nothing was written.
        CheckpointError: the checkpoint cannot be read.
        TrainingError: the run stopped (NaN, loss spike, full disk, Ctrl-C); the message names the last good checkpoint.
    """
    started, out = time.perf_counter(), Path(out)
    accelerator = make_accelerator(device)
    if resume:
        if recipe is not None or data is not None or held_out is not None:
            raise RecipeError(
                "a resumed run keeps its recipe and data", where=str(out), fix="Leave out --recipe and --data with --resume."
            )
        settled = resumed_recipe(out, overrides or ())
    else:
        settled = settle(recipe, data, held_out, overrides or ())
        if accelerator.is_main_process:
            read = [entry.path for entry in (*settled.data.mixture, *settled.evaluation.mixture) if isinstance(entry, TextEntry)]
            named = [*read, settled.data.tokenizer, *([recipe] if isinstance(recipe, str | Path) else [])]
            inputs = [Path(path) for path in named if path is not None and Path(path).exists()]
            check_out(out, Path(checkpoint) if Path(checkpoint).exists() else None, force=force, inputs=inputs)
    with open_checkpoint(checkpoint) as source:
        store = RunStore(out, source)
        trainer = _trainer(settled, source, store, accelerator, store.latest() if resume else None)
        reporter = None
        if accelerator.is_main_process:
            if not resume:
                remove_run(out)
            store.create(settled)
            reporter = Reporter(out, start=trainer.progress.step, total=trainer.total, progress=progress)
        try:
            done = trainer.train(reporter)
        finally:
            if reporter:
                reporter.close()
        if accelerator.is_main_process:
            told = run_provenance(done, settled, source)
            store.finish(trainer.model.state_dict(), told, model_card(out.name, told, settled, source))
        accelerator.wait_for_everyone()
    return FinetuneResult(
        out=out,
        log=store.log,
        steps=done.step,
        tokens=done.tokens,
        seconds=time.perf_counter() - started,
        final_loss=done.last_loss,
        eval_before=done.first_eval,
        eval_after=done.last_eval,
    )


def _trainer(recipe: Recipe, source: Checkpoint, store: RunStore, accelerator: Accelerator, resume_from: Path | None) -> Trainer:
    """Everything that a run needs, checked before anything is written."""
    accumulation_steps(recipe, accelerator.num_processes)
    tokenizer = _tokenizer(recipe, source)
    shard = Shard(accelerator.process_index, accelerator.num_processes)
    packer = _packer(recipe, recipe.data.mixture, tokenizer, TRAIN, shard)
    evaluation = _packer(recipe, recipe.evaluation.mixture, tokenizer, HELD_OUT, shard) if recipe.evaluation.mixture else None
    torch.manual_seed(recipe.training.seed + accelerator.process_index)
    model = load(resume_from or source.path, dtype=torch.float32)
    roles = training_roles([name for name, _ in model.named_parameters()], source.provenance)
    freeze(model, roles, recipe.optimizer)
    trainer = Trainer(
        model,
        recipe,
        roles,
        undecayed_names(source.description),
        new_rows(source.description, source.provenance),
        packer=packer,
        evaluation=evaluation,
        accelerator=accelerator,
        store=store,
    )
    if resume_from:
        trainer.load_state(store.load(resume_from))
    return trainer


def _tokenizer(recipe: Recipe, source: Checkpoint) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer or the checkpoint's own."""
    where, fix = recipe.data.tokenizer or str(source.path), "Name the model's own with --set data.tokenizer=FOLDER_OR_HUB_ID"
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(where, fix=fix)
    if len(tokenizer) > source.description.vocab_size:
        raise RecipeError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {source.description.vocab_size}", where=where, fix=fix
        )
    return tokenizer


def _packer(recipe: Recipe, mixture: Sequence[Entry], tokenizer: PreTrainedTokenizerBase, purpose: int, shard: Shard) -> Packer:
    length = recipe.data.sequence_length
    sources = open_sources(mixture, tokenizer, longest=length, seed=(recipe.training.seed, purpose), shard=shard)
    padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    return Packer(sources, length, padding)
