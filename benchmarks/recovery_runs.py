"""The runs of `recovery.py`: surgery on a base, training whose steps are replayed CUDA graphs, and measurements along the run."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recovery_arms import AUTO, find
from recovery_extras import prepare, teaching_weight
from recovery_graphs import Backward, batch_loss
from recovery_measures import MORE_TEXT, PROMPT, TEXT, Measured, cost, find_needles, look_up, opened, read_text, recall, state_sizes
from recovery_reading import ReadingRows
from torch import Tensor, nn

import statex
from statex.checkpoints import open_checkpoint
from statex.errors import RecipeError
from statex.families.description import ModelDescription
from statex.models import StatexForCausalLM
from statex.recipes.optimizer import (
    build_optimizer,
    freeze,
    learning_rate,
    set_learning_rate,
    training_roles,
    undecayed_names,
)
from statex.recipes.schema import Multipliers, Optimizer, Schedule
from statex.surgery.new_rows import new_rows
from statex.surgery.plan import parse_layers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from pretrain_tiny import BYTE_OFFSET, PAIRS, PRESETS, Mixture, Preset, logits, needle_rows, reach, read_bytes

DATA_SEED, EVALUATION_SEED = 1000, 2**31
"""The first is added to a run's seed for the generator of its data; the second draws held-out rows, the same for all runs."""
STOPS = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Shares of the run at which is measured."""
AHEAD = 2
"""Steps of a run that may wait for the device."""
SCRATCH_WARM_UP = 200
"""Steps, as in examples/pretrain_tiny.py."""


class TimeUp(Exception):
    """The time limit ended a run."""


@dataclass(frozen=True)
class Spec:
    """One run; equal specs are the same lines of the CSV."""

    base: str
    arm: str
    seed: int
    steps: int
    batch: float
    """Of the tokens of a step of the base's training."""

    @property
    def name(self) -> str:
        """For files and logs."""
        return f"{self.base}-{self.arm}-seed{self.seed}-{self.steps}x{self.batch:g}"


@dataclass(frozen=True)
class Base:
    """A checkpoint that runs start from, and what it was trained on."""

    name: str
    folder: Path
    auto: tuple[int, ...] | None = None
    """Layers that recall attribution names, where they need not be measured."""

    @cached_property
    def description(self) -> ModelDescription:
        """What it computes."""
        with open_checkpoint(self.folder) as checkpoint:
            return checkpoint.description

    @property
    def preset(self) -> Preset:
        """The mixture, and the length, of the base's own training."""
        return PRESETS["mamba2" if self.description.family == "mamba2" else "gla"]


@dataclass
class Place:
    """Where runs take place, and how much is read."""

    device: torch.device
    work: Path
    bases: dict[str, Base]
    data: Path
    test: Path
    backend: str = "chunked"
    eager: bool = False
    window: int = 512
    text_rows: int | None = None
    """Of a step; by default the base's, like `mqar_tokens`."""
    mqar_tokens: int | None = None
    max_pairs: int = 128
    eval_rows: int = 256
    oracles: dict[str, Path] = field(default_factory=dict)
    """Checkpoints with a large state from the start, by the base whose ceiling they are."""
    reading: ReadingRows | None = None
    """Questions on real text, as a further part of every step and of every measurement."""
    reading_rows: int = 16
    key_value_tokens: int = 0
    """Of key-value text in every step, for bases that were trained with it; it is measured in any case."""
    max_entries: int = 32
    digits: int = 4
    """Of the numbers in it."""
    interim_bytes: int = 400_000
    final_bytes: int = 1_500_000
    base_steps: int | None = None
    """Steps that a base has behind it; by default its preset's."""
    at_once: int = 1
    deadline: float = float("inf")
    auto: dict[str, list[int]] = field(default_factory=dict)

    @cached_property
    def mixture(self) -> Mixture:
        """The data, read once for all runs."""
        preset = replace(
            PRESETS["gla"], window=self.window, max_pairs=self.max_pairs, max_entries=self.max_entries, digits=self.digits
        )
        return Mixture(preset, self.data, self.device, seed=0)

    @cached_property
    def held_out(self) -> Tensor:
        """Token ids of the held-out books."""
        return torch.from_numpy(read_bytes(self.test)[: self.final_bytes]).to(self.device).long() + BYTE_OFFSET

    @cached_property
    def needles(self) -> Tensor:
        """Held-out windows that end with a question for a number, and with the number, `[eval_rows, window]`."""
        rows = needle_rows(read_bytes(self.test)[: self.final_bytes], self.window, self.eval_rows, EVALUATION_SEED)
        return torch.from_numpy(rows).to(self.device).long() + BYTE_OFFSET

    def steps(self, spec: Spec) -> int:
        """Of a run, which from scratch reads what the base has read, too."""
        base = self.bases[spec.base]
        arm = find(base.description.family, spec.arm)
        if arm.given:
            return 0
        return spec.steps + (round((self.base_steps or base.preset.steps) / spec.batch) if arm.scratch else 0)

    def draw(self, base: Base, batch: float, seed: int) -> Mixture:
        """The base's mixture in steps of `batch` times its tokens, drawn by a generator of its own."""
        preset, mixture = base.preset, copy.copy(self.mixture)
        rows, tokens = self.text_rows or preset.text_rows, self.mqar_tokens or preset.mqar_tokens
        mixture.preset = replace(
            preset, window=self.window, max_pairs=self.max_pairs, text_rows=max(1, round(rows * batch / 8)) * 8,
            mqar_tokens=max(4 * self.max_pairs, round(tokens * batch)), key_value_tokens=round(self.key_value_tokens * batch),
        )  # fmt: skip
        mixture.generator = torch.Generator(self.device).manual_seed(seed)
        return mixture

    def layers(self, base: Base, operator: str) -> list[int]:
        """What recall attribution names, measured once for each base."""
        if base.auto is not None:
            return list(base.auto)
        if base.name not in self.auto:
            self.auto[base.name] = statex.auto_layers(base.folder, operator=operator, device=str(self.device), progress=False)
        return self.auto[base.name]


class Run:
    """One arm on one base with one seed."""

    def __init__(self, place: Place, spec: Spec, eager: bool = False) -> None:
        self.place, self.spec, self.base, self.eager = place, spec, place.bases[spec.base], eager
        self.arm = find(self.base.description.family, spec.arm)
        self.seed = spec.seed + DATA_SEED
        self.data = place.draw(self.base, spec.batch, self.seed)
        self.reading = None if place.reading is None else place.reading.keyed(self.seed)
        self.pairs = [n for n in PAIRS if n <= self.data.preset.max_pairs]
        self.counts = [self.pairs, *([self.data.key_value_rows.counts] if place.key_value_tokens else [])]
        self.steps = place.steps(spec)
        self.layers: list[int] = []
        self.queued: deque[torch.cuda.Event] = deque()
        multipliers = Multipliers(new=self.arm.new, expanded=self.arm.expanded, rows=self.arm.rows, rest=self.arm.rest)
        self.options = Optimizer(learning_rate=self.arm.rate, multipliers=multipliers)
        warm_up = min(SCRATCH_WARM_UP, self.steps // 2) if self.arm.scratch else max(1, self.steps // 20)
        self.schedule = Schedule(max_steps=max(1, self.steps), warmup_steps=warm_up)

    def prepare(self) -> Generator[None, None, None]:
        """Surgery, roles and rates, and the captured steps."""
        place, arm = self.place, self.arm
        self.model, provenance = self._model()
        description = self.model.config.description
        roles = training_roles([name for name, _ in self.model.named_parameters()], provenance)
        freeze(self.model, roles, self.options)
        self.advance = prepare(arm.extra, self.model, self.base.description, self.spec.seed)
        self.new_rows = new_rows(description, provenance)
        self.optimizer = build_optimizer(self.model, roles, undecayed_names(description), self.options, self.new_rows)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        weight, teacher = teaching_weight(arm.extra), None
        if weight:
            teacher = statex.load(self.base.folder, dtype=torch.float32, device=place.device, backend=place.backend)
            teacher.requires_grad_(False)
        text = torch.Size((self.data.preset.text_rows, self.data.preset.window))
        self.backward = Backward(partial(batch_loss, self.model, teacher, weight, text), place.device, self.eager)
        if not self.backward.eager and self.steps:
            rows, self.data.generator = self.data.generator, torch.Generator(place.device).manual_seed(0)
            for numbers in zip_longest(*self.counts, fillvalue=self.pairs[0]):  # every shape once
                for ids, labels in self.batches(*numbers):
                    self.backward.capture(ids, labels)
                    yield
            self.data.generator = rows
            self.reading = None if place.reading is None else place.reading.keyed(self.seed)
            torch._foreach_zero_([p.grad for p in self.trained if p.grad is not None])
        probe = self.place.held_out[:8].view(1, -1)
        sizes, own = state_sizes(self.model, probe), [layer.state_elements for layer in self.base.description.layers]
        self.state, self.factor = sum(sizes), max(size / before for size, before in zip(sizes, own, strict=True))
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.draws = np.random.default_rng([self.seed, 2])

    def _model(self) -> tuple[StatexForCausalLM, dict[str, Any]]:
        """The model that training starts with, and what surgery wrote down."""
        place, folder = self.place, self.base.folder
        if self.arm.given:
            folder = self._oracle()
        if self.arm.plan:
            folder = place.work / f"{self.spec.name}-expanded"
            plan = {"operations": [self._resolved(entry) for entry in self.arm.plan]}
            self.layers = sorted({i for entry in plan["operations"] for i in self._indices(entry["layers"])})
            statex.expand(self.base.folder, folder, plan=plan, seed=self.spec.seed, force=True, progress=False)
        with open_checkpoint(folder) as checkpoint:
            description, provenance = checkpoint.description, checkpoint.provenance
        if self.arm.scratch:
            model = StatexForCausalLM.from_description(description, seed=self.spec.seed, device=place.device)
        else:
            model = statex.load(folder, dtype=torch.float32, device=place.device)
        if self.arm.plan:
            shutil.rmtree(folder)
        model.set_backend(place.backend)
        return model.train(), provenance

    def _oracle(self) -> Path:
        if self.base.name not in self.place.oracles:
            raise RecipeError("no oracle is given", where=self.base.name, fix=f"Name one with --oracle {self.base.name}=FOLDER")
        return self.place.oracles[self.base.name]

    def _tokens_behind(self) -> int:
        """Tokens that an oracle has read, as examples/pretrain_tiny.py left them beside its checkpoint; 0 for other arms."""
        if not self.arm.given:
            return 0
        record = self._oracle().parent / "curve.json"
        if not record.exists():
            raise RecipeError(
                "an oracle's tokens are unknown", where=str(record), fix="Leave curve.json of its pretraining beside its folder"
            )
        return int(json.loads(record.read_text())[-1]["tokens"])

    def _resolved(self, entry: dict[str, Any]) -> dict[str, Any]:
        measured = entry["layers"] == AUTO
        return entry | ({"layers": self.place.layers(self.base, entry["operator"])} if measured else {})

    def _indices(self, layers: Any) -> tuple[int, ...]:
        return parse_layers(layers, len(self.base.description.layers), self.arm.name)

    def batches(self, num_pairs: int, entries: int = 1) -> list[tuple[Tensor, Tensor]]:
        """What a step reads."""
        preset = self.data.preset
        parts = [self.data.joined(num_pairs)] if preset.joined else self.data.apart(num_pairs)
        if preset.key_value_tokens:
            parts.append(self.data.key_value(entries))
        return parts if self.reading is None else [*parts, self.reading.draw(self.place.reading_rows)]

    def step(self, step: int) -> int:
        """One update, number `step` from 0; returns the tokens that it read."""
        set_learning_rate(self.optimizer, learning_rate(step + 1, self.steps, self.options.learning_rate, self.schedule))
        tokens = 0
        drawn = [int(self.draws.choice(self._reach(counts, step))) for counts in self.counts]
        for ids, labels in self.batches(*drawn):
            self.backward(ids, labels)
            tokens += ids.numel()
        nn.utils.clip_grad_norm_(self.trained, self.options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # graphs write into these very tensors
        return tokens

    def train(self) -> Generator[None, None, list[Measured]]:
        """Train and measure, a yield after each step; returns all that was measured."""
        yield from self.prepare()
        stops = {round(share * self.steps) for share in STOPS}
        told, tokens, seconds, began = list[Measured](), self._tokens_behind(), 0.0, time.monotonic()
        for step in range(self.steps + 1):
            if self.advance is not None:
                self.advance(step / max(1, self.steps))
            if step in stops:
                self._wait()
                seconds += time.monotonic() - began
                told += [Measured(step, tokens, seconds, *number) for number in self.measure(last=step == self.steps)]
                began = time.monotonic()
                yield
            if step < self.steps:
                if time.time() > self.place.deadline:
                    raise TimeUp(f"stopped at step {step} of {self.steps}")
                tokens += self.step(step)
                yield from self._pace()
        return told

    def _pace(self) -> Generator[None, None, None]:
        """Let others go on until the device has all but a few of this run's steps behind it: a long queue would hold up all."""
        if self.place.device.type == "cuda":
            self.queued.append(torch.cuda.Event())
            self.queued[-1].record()
        yield
        while len(self.queued) > AHEAD:
            if self.queued[0].query():
                self.queued.popleft()
            else:
                yield

    def measure(self, last: bool) -> list[tuple[str, str, float]]:
        """Text, recall and openness, on the same held-out rows for all runs; more text at the end."""
        place, model = self.place, self.model
        model.eval()
        told = list(read_text(model, place.held_out[: place.interim_bytes], place.window, TEXT))
        if last:
            told += read_text(model, place.held_out, place.window, MORE_TEXT)
        rows = place.draw(self.base, self.spec.batch, EVALUATION_SEED)
        told += recall(model, rows, self.pairs, place.eval_rows)
        told += look_up(model, rows, place.eval_rows)
        told += find_needles(model, place.needles)
        told += opened(model, self.base.description) if not self.arm.given else ()
        if place.reading is not None:
            told += place.reading.score(partial(logits, model))
        model.train()
        return told

    def cost(self) -> Generator[None, None, list[Measured]]:
        """What a step and a token cost; to be run alone on a device."""
        if self.place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.place.device)
        yield from self.prepare()
        tokens = self.step(0)
        ids = self.place.held_out[: 2 * PROMPT].view(1, -1)
        return [Measured(0, 0, 0.0, *number) for number in cost(self.model, lambda: self.step(1), ids, tokens)]

    def _reach(self, counts: list[int], step: int) -> list[int]:
        """Numbers of pairs or entries that rows may have: from scratch few come first, as in the base's own training."""
        return reach(counts, step, self.steps) if self.arm.scratch else counts

    def _wait(self) -> None:
        if self.place.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
