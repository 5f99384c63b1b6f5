"""The training loop, on accelerate directly rather than on transformers' `Trainer`.

`Trainer` resumes by drawing and throwing away all batches before the checkpoint, and cannot put a stream that packs a weighted
mixture lazily back to where it was; its optimizer groups, its loss under gradient accumulation (rows differ in how many labels
they hold) and its checkpoint layout would all have to be overridden too. Here each source says where it is, a checkpoint stores
that, and the loop is one screen; accelerate brings the device, data parallelism (`accelerate launch`, torchrun) and collectives.
"""

from __future__ import annotations

import gc
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn

from ..errors import RecipeError, RunStopped, TrainingError
from ..models import StatexForCausalLM
from ..models.activations import CudaMemory, FittedCheckpointing
from ..models.named import pick_device
from ..models.openness import opened
from .data.packing import Batch, Packer
from .guard import LossGuard
from .optimizer import build_optimizer, learning_rate, set_learning_rate
from .reporting import Reporter
from .schema import Recipe
from .store import RunStore


@dataclass
class Progress:
    """What a run has done so far; stored in its checkpoints."""

    step: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    """Of the losses since the last line of the log."""
    loss_count: int = 0
    last_loss: float = float("nan")
    first_eval: float | None = None
    last_eval: float | None = None


class Pace:
    """Tokens per second of training alone."""

    def __init__(self) -> None:
        self.tokens, self.clock = 0, time.perf_counter()

    def restart(self) -> float:
        """Tokens per second since the last call."""
        now = time.perf_counter()
        rate = self.tokens / (now - self.clock)
        self.tokens, self.clock = 0, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        started = time.perf_counter()
        yield
        self.clock += time.perf_counter() - started


@contextmanager
def _few_objects_to_collect() -> Iterator[None]:
    """Keeps Python's garbage collector off all that exists: some 400,000 objects once torch and transformers are imported, which it
    would go through every few steps, a fifth of a second each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def make_accelerator(device: str | None) -> Accelerator:
    """An accelerator for this process; `device="cpu"` keeps it off a GPU. Raises
    `StatexError` for a device that is not there, `RecipeError` but for plain data parallelism."""
    # Masters stay fp32 and autocast is opened by the loop: accelerate's own would copy all logits to fp32.
    place = None if device is None else pick_device(device)
    if place is not None and place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)
    accelerator = Accelerator(mixed_precision="no", cpu=place is not None and place.type == "cpu")
    if place is not None and place.type != accelerator.device.type:
        raise RecipeError(f"accelerate does not train on {device} here", where="--device", fix="Leave it out, or name cpu.")
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise RecipeError(f"distributed training of the kind {kind.value} is not supported", fix="Use plain data parallelism.")
    return accelerator


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast: bf16 where a GPU computes in it natively (sm80 or later) or where it is asked for, else fp32."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and native) else torch.float32


def accumulation_steps(recipe: Recipe, devices: int) -> int:
    """Forward passes of a step on each device. Raises `RecipeError` when tokens_per_step is no whole number of batches."""
    training = recipe.training
    if training.tokens_per_step is None:
        return training.gradient_accumulation or 1
    batch = recipe.data.sequence_length * training.batch_size * devices
    steps, rest = divmod(training.tokens_per_step, batch)
    if rest or not steps:
        nearest = max(1, round(training.tokens_per_step / batch)) * batch
        raise RecipeError(
            f"{training.tokens_per_step} tokens are no whole number of batches of {batch} tokens",
            where="training.tokens_per_step",
            fix=f"A batch is sequence_length x batch_size x devices; choose a multiple, e.g. {nearest}.",
        )
    return steps


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


class Trainer:
    """Trains a model in place.

    Args:
        model: fp32 weights, already frozen where the recipe says so.
        recipe: lengths, rates and cadences.
        roles, undecayed, rows: of the parameters by name; see `optimizer`.
        packer, evaluation: rows to train on, and held-out rows (None: no evaluation).
        accelerator, store: where to run, and the run's folder.
    """

    def __init__(
        self,
        model: StatexForCausalLM,
        recipe: Recipe,
        roles: dict[str, Any],
        undecayed: set[str],
        rows: Mapping[str, Sequence[slice]],
        *,
        packer: Packer,
        evaluation: Packer | None,
        accelerator: Accelerator,
        store: RunStore,
    ) -> None:
        self.recipe, self.packer, self.evaluation, self.accelerator, self.store = recipe, packer, evaluation, accelerator, store
        training = recipe.training
        self.accumulation = accumulation_steps(recipe, accelerator.num_processes)
        self.tokens_per_step = recipe.data.sequence_length * training.batch_size * self.accumulation * accelerator.num_processes
        self.total = recipe.schedule.max_steps or -(-(recipe.schedule.max_tokens or 0) // self.tokens_per_step)
        self.model = model.to(accelerator.device)
        self.fitted = self._checkpointed(training.gradient_checkpointing)
        self.told_kept: int | None = None
        self.optimizer = build_optimizer(self.model, roles, undecayed, recipe.optimizer, rows)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.parallel = accelerator.prepare_model(self.model)
        dtype = compute_dtype(training.precision, accelerator.device)
        self.autocast = {"device_type": accelerator.device.type, "dtype": torch.bfloat16, "enabled": dtype == torch.bfloat16}
        self.guard = LossGuard(training.spike_guard)
        self.progress = Progress()
        self.evaluation_start = evaluation.state() if evaluation else {}
        self.stop_signal: int | None = None

    def _checkpointed(self, wanted: bool | str) -> FittedCheckpointing | None:
        """Enable gradient checkpointing where it is wanted; what fits it to the GPU's memory where that is left to it."""
        device = self.accelerator.device
        if not wanted or (wanted == "auto" and device.type != "cuda"):
            return None
        # transformers renamed this in its later 5.x. No layer draws random numbers, so none have to be drawn again.
        enable = getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
        return FittedCheckpointing(self.model, CudaMemory(device)) if wanted == "auto" else None

    def state(self) -> dict[str, Any]:
        """Everything but the weights that decides how the run goes on. To be called by every process."""
        cuda = torch.cuda.get_rng_state(self.accelerator.device) if self.accelerator.device.type == "cuda" else None
        own = {"packer": self.packer.state(), "rng": torch.get_rng_state(), "cuda_rng": cuda}
        return {
            "progress": dict(vars(self.progress)),
            "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state(),
            "processes": gather_object([own]) if self.accelerator.num_processes > 1 else [own],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises `RecipeError` when the number of processes or the parameters changed."""
        processes = len(state["processes"])
        if processes != self.accelerator.num_processes:
            raise RecipeError(
                f"the run was started with {processes} processes and is resumed with {self.accelerator.num_processes}",
                where=str(self.store.out),
                fix="Resume with as many: each has its own place in the data.",
            )
        names = [group["param_names"] for group in state["optimizer"]["param_groups"]]
        if names != [group["param_names"] for group in self.optimizer.param_groups]:
            what = "the run was started from a checkpoint with other parameters"
            raise RecipeError(what, where=str(self.store.out), fix="Name the checkpoint that it was started from.")
        own = state["processes"][self.accelerator.process_index]
        self.progress = Progress(**state["progress"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state(state["guard"])
        self.packer.load_state(own["packer"])
        torch.set_rng_state(own["rng"])
        if own["cuda_rng"] is not None and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], self.accelerator.device)

    def train(self, reporter: Reporter | None) -> Progress:
        """Train to the end of the schedule. `reporter` is None in all processes but the first.

        Raises:
            TrainingError: the loss is not finite or spikes, or the disk is full.
            RunStopped: a signal (Ctrl-C) asked to stop.
        """
        progress, recipe = self.progress, self.recipe
        self.parallel.train()
        with self._signals(), _few_objects_to_collect():
            if progress.step == 0 and self.evaluation:
                progress.first_eval = self._evaluate()
                if reporter:
                    reporter.log({"step": 0, "eval_loss": progress.first_eval})
            pace = Pace()
            while progress.step < self.total:
                with self.fitted.step() if self.fitted else nullcontext():
                    grad_norm, stop = self._step()
                pace.tokens += self.tokens_per_step
                last = progress.step == self.total
                record = self._record(grad_norm, pace) if last or _due(recipe.logging.every, progress.step) else {}
                with pace.paused():
                    if self.evaluation and (last or _due(recipe.evaluation.every, progress.step)):
                        progress.last_eval = record["eval_loss"] = self._evaluate()
                    if reporter:
                        self._tell_kept(reporter)
                        reporter.step(progress.step)
                        if record:
                            reporter.log({"step": progress.step, **record})
                    if self.guard.calm and (last or stop or _due(recipe.training.save_every, progress.step)):
                        self._save()
                if stop and not last:
                    raise self._stopped()
        return progress

    def _record(self, grad_norm: float, pace: Pace) -> dict[str, float]:
        """A line of the log, which starts the next one."""
        progress = self.progress
        mean = progress.loss_sum / progress.loss_count
        progress.loss_sum, progress.loss_count = 0.0, 0
        rate = self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["multiplier"]
        record = {"loss": mean, "lr": rate, "tokens": progress.tokens, "tokens_per_s": pace.restart(), "grad_norm": grad_norm}
        distance = opened(self.model)
        return record if distance is None else record | {"opened": distance}

    def _tell_kept(self, reporter: Reporter) -> None:
        """How many layers are checkpointed, once that is known and when it changes."""
        if self.fitted is not None and self.fitted.settled and self.fitted.kept != self.told_kept:
            self.told_kept, layers = self.fitted.kept, len(self.fitted.layers)
            reporter.tell(f"gradient checkpointing in {layers - self.told_kept} of {layers} layers")

    def _step(self) -> tuple[float, bool]:
        """One optimizer step: the gradient's norm before clipping, and whether a process was asked to stop."""
        progress, training = self.progress, self.recipe.training
        batches = [self.packer.batch(training.batch_size) for _ in range(self.accumulation)]
        processes = self.accelerator.num_processes
        labelled = float(sum(batch.labelled for batch in batches))
        if processes > 1:
            labelled = float(self._sum(labelled)[0])
        losses = self._gradients(batches, labelled / processes)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.optimizer.clip_norm)
        loss_value, grad_norm = torch.stack([torch.stack(losses).sum(), norm]).tolist()
        stop = self.stop_signal is not None
        if processes > 1:
            total, stopped = self._sum(loss_value / processes, float(stop)).tolist()
            loss_value, stop = total, stopped > 0
        trouble = self.guard.check(loss_value, grad_norm)
        if trouble:
            self._fail(trouble)
        rate = learning_rate(progress.step + 1, self.total, self.recipe.optimizer.learning_rate, self.recipe.schedule)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += self.tokens_per_step
        progress.loss_sum += loss_value
        progress.loss_count += 1
        progress.last_loss = loss_value
        return grad_norm, stop

    def _gradients(self, batches: Sequence[Batch], divisor: float) -> list[torch.Tensor]:
        """Losses of the batches, whose gradients are summed. If memory runs out, all layers are checkpointed and it begins anew."""
        try:
            return self._losses(batches, divisor)
        except torch.OutOfMemoryError as error:
            # Other processes wait for this one's gradients, not for it to begin anew.
            if self.accelerator.num_processes > 1 or self.fitted is None or not self.fitted.retreat():
                what, where = "the memory does not suffice for a batch", str(self.accelerator.device)
                fix = "Set training.gradient_checkpointing to true, or training.batch_size or data.sequence_length lower"
                raise TrainingError(what, where=where, fix=fix) from error
        self.optimizer.zero_grad(set_to_none=True)
        return self._gradients(batches, divisor)

    def _losses(self, batches: Sequence[Batch], divisor: float) -> list[torch.Tensor]:
        losses = []
        for index, batch in enumerate(batches):
            waits = index + 1 < len(batches) and self.accelerator.num_processes > 1
            with self.accelerator.no_sync(self.parallel) if waits else nullcontext():
                # Data parallelism averages gradients over processes, so that each divides by its share of the labels.
                loss = self._forward(batch, divisor)
                loss.backward()
            losses.append(loss.detach())
        return losses

    def _forward(self, batch: Batch, divisor: float) -> torch.Tensor:
        with torch.autocast(**self.autocast):
            loss: torch.Tensor = self.parallel(
                **batch.inputs(self.accelerator.device), num_items_in_batch=divisor, return_logits=False
            ).loss
        return loss

    def _sum(self, *values: float) -> torch.Tensor:
        """Sums over all processes."""
        # MPS knows no fp64; counts of labels stay exact in fp32 up to 16 million.
        total: torch.Tensor = self.accelerator.reduce(torch.tensor(values, device=self.accelerator.device), "sum")
        return total

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Loss on the same held-out rows each time."""
        assert self.evaluation is not None
        self.evaluation.load_state(self.evaluation_start)
        self.parallel.eval()
        loss, labelled, tokens = 0.0, 0.0, 0
        while tokens < self.recipe.evaluation.tokens:
            batch = self.evaluation.batch(self.recipe.training.batch_size)
            loss += float(self._forward(batch, 1.0))
            labelled += batch.labelled
            tokens += batch.input_ids.numel()
        self.parallel.train()
        if self.accelerator.num_processes > 1:
            loss, labelled = self._sum(loss, labelled).tolist()
        return loss / labelled

    def _save(self) -> None:
        """A resumable checkpoint, of finite weights only."""
        if not bool(nn.utils.get_total_norm(self.parameters).isfinite()):
            self._fail("the weights are not finite")
        state = self.state()
        if self.accelerator.is_main_process:
            self.store.save(self.progress.step, self.model.state_dict(), state)
        self.accelerator.wait_for_everyone()

    def _fail(self, trouble: str) -> NoReturn:
        kept = self.store.latest()
        start = f"The last good checkpoint is {kept}: start again from it or from the source" if kept else "Start again"
        fix = f"{start}, with a lower optimizer.learning_rate or longer schedule.warmup_steps"
        if self.progress.step == 0:
            # Nothing was learnt yet that a learning rate could have spoilt.
            fix = "Check the weights of the source, or set training.precision to fp32"
        raise TrainingError(f"{trouble} (step {self.progress.step + 1})", where=str(self.store.out), fix=fix)

    def _stopped(self) -> RunStopped:
        kept, fix = self.store.latest(), "No checkpoint was saved; start again with --force."
        if kept is not None:
            command = shlex.join(["statex", "finetune", self.store.source.name, "-o", str(self.store.out), "--resume"])
            fix = f"The last good checkpoint is {kept}. Go on from it with: {command}"
        told = f"stopped after step {self.progress.step} of {self.total}"
        return RunStopped(told, where=str(self.store.out), fix=fix, signal=self.stop_signal or signal.SIGINT)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and a cluster's SIGTERM end the run after the step at hand; a second one ends it at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.stop_signal = number
            for name, handler in before.items():
                signal.signal(name, handler)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception) or self.stop_signal is None:
                raise
            raise self._stopped() from error
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)
