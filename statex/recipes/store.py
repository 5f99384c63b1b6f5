"""The folder of a run: recipe, log, resumable checkpoints, and at the end the fine-tuned checkpoint itself.

OUT/config.json, *.safetensors, tokenizer ...   the result; absent until the run is complete
OUT/checkpoints/step-N/                         the last two resumable states; each is also a checkpoint in fp32
OUT/recipe.yaml, log.csv, tensorboard/          what was run, and how it went
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoints import Checkpoint, CheckpointWriter, TensorInfo, canonical_config
from ..errors import CheckpointError, RecipeError, TrainingError
from .library import dump_recipe, load_recipe
from .schema import Recipe

STATE_FILE = "training_state.pt"
RECIPE_FILE = "recipe.yaml"
KEPT = 2
RESUME_MAY_CHANGE = ("description", "logging", "evaluation", "training.save_every", "training.spike_guard")
"""Keys that change no weight, so that a resumed run may set them."""


class RunStore:
    """Writes and reads the folder of one run.

    Args:
        out: the folder.
        source: the checkpoint that the run starts from; its config, dtypes and tokenizer go into the result.
    """

    def __init__(self, out: Path, source: Checkpoint) -> None:
        self.out, self.source = out, source
        self.checkpoints = out / "checkpoints"
        self.log = out / "log.csv"

    def create(self, recipe: Recipe) -> None:
        """Make the folder and write the recipe as run."""
        fresh, partial = not self.checkpoints.exists(), self.out / f".partial-{RECIPE_FILE}"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            partial.write_text(dump_recipe(recipe), encoding="utf-8")
            partial.replace(self.out / RECIPE_FILE)
        except OSError as error:
            if fresh:
                shutil.rmtree(self.out, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
            fix = "Make room, or choose another -o"
            raise TrainingError(f"cannot write the run's folder: {error.strerror}", where=str(self.out), fix=fix) from error

    def latest(self) -> Path | None:
        """The newest resumable checkpoint."""
        return max(self._saved(), key=_step_of, default=None)

    def save(self, step: int, weights: Mapping[str, torch.Tensor], state: dict[str, Any]) -> Path:
        """Write a resumable checkpoint, complete or not at all, and drop all but the last two."""
        target, partial = self.checkpoints / f"step-{step}", self.checkpoints / f".partial-step-{step}"
        with self._errors(target):
            shutil.rmtree(partial, ignore_errors=True)
            try:
                self._write(partial, canonical_config(self.source), weights, dtype="float32")
                torch.save(state, partial / STATE_FILE)
                if target.exists():
                    shutil.rmtree(target)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        for old in sorted(self._saved(), key=_step_of)[:-KEPT]:
            shutil.rmtree(old)
        return target

    def load(self, path: Path) -> dict[str, Any]:
        """The training state of a resumable checkpoint."""
        try:
            state: dict[str, Any] = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError) as error:
            fix = f"Remove the folder {path} to resume from the one before."
            raise TrainingError("the training state cannot be read", where=str(path / STATE_FILE), fix=fix) from error
        return state

    def finish(self, weights: Mapping[str, torch.Tensor], finetune: dict[str, Any], card: str) -> None:
        """Write the result in the source's dtypes beside its place, then move it there, config.json last."""
        config = canonical_config(self.source)
        provenance = config["statex"].get("provenance", {})
        config["statex"]["provenance"] = {**provenance, "finetune": [*provenance.get("finetune", []), finetune]}
        partial = self.checkpoints / ".partial-result"
        with self._errors(self.out):
            shutil.rmtree(partial, ignore_errors=True)
            try:
                self._write(partial, config, weights, card=card)
                for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                    path.replace(self.out / path.name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def _write(
        self,
        folder: Path,
        config: dict[str, Any],
        weights: Mapping[str, torch.Tensor],
        *,
        dtype: str | None = None,
        card: str | None = None,
    ) -> None:
        """A checkpoint of the source's tensors, in one dtype or in those of the source."""
        declared = {name: TensorInfo(info.shape, dtype or info.dtype) for name, info in self.source.tensors.items()}
        plan = self.source.path / "plan.yaml"
        carried = [*self.source.carried_files, *([plan] if plan.is_file() else [])]
        metadata = {"statex_source": self.source.name, "statex_version": __version__}
        with CheckpointWriter(folder, declared, metadata=metadata) as writer:
            for name, info in declared.items():
                writer.add(name, weights[name].detach().cpu().to(info.torch_dtype))
            writer.finish(config, carried, {} if card is None else {"README.md": card})

    @contextmanager
    def _errors(self, where: Path) -> Iterator[None]:
        """A write that fails ends the run, and the message says what is left."""
        try:
            yield
        except (CheckpointError, OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            reason = error.what if isinstance(error, CheckpointError) else str(error).splitlines()[0]
            kept = self.latest()
            resume = (
                f"The last good checkpoint is {kept}; go on from it with --resume."
                if kept
                else "No checkpoint was saved before; start again with --force."
            )
            raise TrainingError(f"cannot write a checkpoint: {reason}", where=str(where), fix=f"Make room. {resume}") from error

    def _saved(self) -> list[Path]:
        return [path for path in self.checkpoints.glob("step-*") if (path / STATE_FILE).is_file()]


def check_out(out: Path, source: Path | None, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse a folder in use, with `force` one that no earlier run wrote, or that holds `source` or other `inputs` of this run.

    Raises `RecipeError`.
    """
    if source is not None and out.resolve() == source.resolve():
        raise RecipeError("the result would overwrite the checkpoint it starts from", where=str(out), fix="Choose another -o.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    resumable = any(out.glob(f"checkpoints/step-*/{STATE_FILE}")) and not (out / "config.json").exists()
    if not force:
        go_on = "go on with --resume, " if resumable else ""
        raise RecipeError(
            "the output folder exists already", where=str(out), fix=f"Choose another, {go_on}or start over with --force."
        )
    if not (out / RECIPE_FILE).is_file() or not (out / "checkpoints").is_dir():
        raise RecipeError(
            "the output folder was not written by a fine-tuning run", where=str(out), fix="Remove it yourself, or choose another."
        )
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        raise RecipeError("the checkpoint to start from lies in the folder to overwrite", where=str(out), fix="Choose another -o.")
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise RecipeError("what the run reads lies in the folder to overwrite", where=str(path), fix="Choose another -o.")


def remove_run(out: Path) -> None:
    """Remove what `check_out` let pass."""
    if out.exists():
        shutil.rmtree(out)


def resumed_recipe(out: Path, overrides: Any) -> Recipe:
    """The recipe of an interrupted run, with overrides of what changes no weight. Raises `RecipeError`."""
    if not any(out.glob(f"checkpoints/step-*/{STATE_FILE}")):
        raise RecipeError("there is no run to resume", where=str(out), fix="Start it without --resume.")
    if (out / "config.json").exists():
        raise RecipeError("this run is complete", where=str(out), fix="Fine-tune its result into another folder to train longer.")
    saved, wanted = load_recipe(out / RECIPE_FILE), load_recipe(out / RECIPE_FILE, overrides)
    before, after = (dict(_flat(recipe.model_dump(mode="json"))) for recipe in (saved, wanted))
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    fixed = [key for key in changed if not any(key == free or key.startswith(free + ".") for free in RESUME_MAY_CHANGE)]
    if fixed:
        raise RecipeError(
            f"a resumed run cannot change {', '.join(fixed)}",
            where=str(out),
            fix=f"Leave it out; these may change: {', '.join(RESUME_MAY_CHANGE)}.",
        )
    return wanted


def _flat(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested mappings by their dotted paths."""
    if not isinstance(values, dict):
        return [(prefix, values)]
    return [leaf for key, value in values.items() for leaf in _flat(value, f"{prefix}.{key}" if prefix else key)]


def _step_of(path: Path) -> int:
    match = re.search(r"(\d+)$", path.name)
    return int(match[1]) if match else -1
