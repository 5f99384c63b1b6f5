"""What a fine-tuned checkpoint says about itself: README.md, and an entry in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from .. import __version__
from ..checkpoints import Checkpoint
from .schema import Entry, Recipe, TextEntry, TrackingEntry
from .trainer import Progress


def run_provenance(done: Progress, recipe: Recipe, source: Checkpoint) -> dict[str, Any]:
    """The run, for the list `provenance.finetune` of config.json."""
    return {
        "source": source.name,
        "source_sha256": source.sha256(),
        "recipe": recipe.model_dump(mode="json"),
        "steps": done.step,
        "tokens": done.tokens,
        "final_loss": done.last_loss,
        "eval_before": done.first_eval,
        "eval_after": done.last_eval,
        "statex_version": __version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
    }


def model_card(name: str, told: Mapping[str, Any], recipe: Recipe, source: Checkpoint) -> str:
    """Markdown with the hub's front matter; `told` is `run_provenance`."""
    front = ["---", "library_name: statex", "tags:", "- statex", f"- {source.family.name}", "pipeline_tag: text-generation", "---"]
    multipliers = ", ".join(f"{role} ×{value:g}" for role, value in recipe.optimizer.multipliers)
    held_out = []
    if told["eval_before"] is not None:
        held_out = [f"- Held-out loss: {told['eval_before']:.4f} before, {told['eval_after']:.4f} after (nats per token)."]
    return "\n".join(
        [
            *front,
            "",
            f"# {name}",
            "",
            f"`{source.name}`, fine-tuned with statex {told['statex_version']}, torch {told['torch_version']}.",
            recipe.description,
            "",
            f"- Data: {'; '.join(_entry(entry) for entry in recipe.data.mixture)}.",
            f"- Steps: {told['steps']:,}; tokens: {told['tokens']:,}; sequence length: {recipe.data.sequence_length:,}.",
            f"- Learning rate: {recipe.optimizer.learning_rate:g} ({multipliers}).",
            f"- Loss of the last step: {told['final_loss']:.4f} nats per token.",
            *held_out,
            "",
            "`recipe.yaml` is the recipe as run, `log.csv` the curve.",
            "",
            "## Source",
            "",
            *(f"- `{file}`: sha256 `{digest}`" for file, digest in told["source_sha256"].items()),
            "",
        ]
    )


def _entry(entry: Entry) -> str:
    if isinstance(entry, TextEntry):
        return f"`{entry.path}` (weight {entry.weight:g})"
    if isinstance(entry, TrackingEntry):
        return f"words of {', '.join(entry.problems)}, up to {entry.longest} symbols (weight {entry.weight:g})"
    return f"synthetic recall rows of {', '.join(map(str, entry.num_pairs))} pairs (weight {entry.weight:g})"
