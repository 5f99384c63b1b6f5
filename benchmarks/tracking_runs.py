"""The runs of `state_tracking.py`: what a run is, its data, its training, and the three kinds of run."""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import Captured
from torch import Tensor
from torch.nn import functional as F
from transformers import ByT5Tokenizer

import statex
from statex.evals.tracking_rows import PROBLEMS, group_table, symbol_ids
from statex.families import ModelDescription, get_family
from statex.models import StatexForCausalLM

BOOKS = Path(statex.__file__).parent / "assets"
BYTE_OFFSET, VOCABULARY = 3, 264  # ByT5: pad, eos and unk come before the bytes; padded to a multiple of 8
NO_SURGERY, BELOW_ZERO = "no surgery", "[-1, 1]"
FIRST = "line"
"""The recipe that all lines of the CSV had before there was a second."""
GROUPS = {"parity": "Z2", "modular_addition": "Z5", "s3_words": "S3", "a5_words": "A5"}
LENGTHS = (40, 64, 128, 256)
SHORTEST, LONGEST, KNOWN, SOLVED = 6, 40, 0.95, 0.999
GROW_EVERY = 5
READ_AT_ONCE = 128
"""Words; Mamba's states over 256 symbols of as many take 0.3 GB, several times, for each run that shares the device."""
DRAWN_AT_ONCE = 20
"""Batches of words; a word takes a dozen launches, whatever their number."""
RATE_FACTORS = (1.0, 30.0)
"""On the learning rate of all weights, and of ρ, which has far to go from 0, where the function is the source's."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    cosine: bool = False
    """The learning rate falls to 0 along a cosine, otherwise to a tenth along a line."""
    still: bool = False
    """Of models from nothing the short convolutions read the current symbol alone, from the first step to the last."""
    smoothing: float = 0.0
    """Share of an answer's probability that the loss spreads over all answers. A loss that is never 0 still tells an eigenvalue a
    little off -1 from -1, since the logits of short words and of long ones cannot both be right."""
    check_every: int = 200
    """Steps between looks at words of 256."""
    early: bool = False
    """The run ends at the first look that finds them solved."""


RECIPES = {FIRST: Recipe(check_every=50, early=True), "steady": Recipe(cosine=True, still=True, smoothing=0.2)}
"""By the name in the CSV."""
SHAPES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 16},
    "mamba2": {"state_size": 16, "num_heads": 8, "n_groups": 1, "expand": 2},
    "delta_net": {"num_heads": 4},
    "gla": {"num_heads": 4, "use_short_conv": True},
}
"""Families, and what of their configs differs from the defaults."""


@dataclass(frozen=True)
class Spec:
    """One run, and the line of the CSV that it makes; equal specs are the same run."""

    stage: str
    problem: str
    family: str
    arm: str
    seed: int
    learning_rate: float
    steps: int
    layers: int
    hidden: int
    batch: int
    recipe: str

    def description(self) -> ModelDescription:
        """The model, its spectrum as the arm says."""
        config = SHAPES[self.family] | {"hidden_size": self.hidden, "vocab_size": VOCABULARY, "num_hidden_layers": self.layers}
        config |= {"tie_word_embeddings": False}
        if self.family == "mamba2":
            config |= {"head_dim": 2 * self.hidden // config["num_heads"]}
        elif self.family != "mamba":
            config |= {"intermediate_size": 2 * self.hidden}
        described = get_family(self.family).describe(config, {})
        spectrum = "fixed" if self.arm == BELOW_ZERO else None
        return replace(described, layers=tuple(layer.replace(spectrum=spectrum) for layer in described.layers))


@dataclass(frozen=True)
class Place:
    """Where runs take place, and how much is read to measure them."""

    device: torch.device
    work: Path
    """Folder of the models that runs leave for others."""
    width: int
    """Bytes of a row of text."""
    text_windows: int
    """Rows of held-out text that are read."""
    words: int
    """Words that the accuracy after a run is measured on."""

    def base(self, spec: Spec) -> Path:
        """Folder of the text model that `spec` leaves, or starts from."""
        return self.work / f"{spec.family}-{spec.layers}x{spec.hidden}-{spec.recipe}-{spec.seed}"


OUTCOMES = ("solved_at", *(f"accuracy_{length}" for length in LENGTHS), "bits_before", "bits_after", "seconds", "device", "torch")
"""Columns of the CSV behind the fields of `Spec`."""


class Words:
    """Words over a group and their products, drawn on the device."""

    def __init__(self, problem: str, device: torch.device, seed: int) -> None:
        spec, ids = PROBLEMS[problem], symbol_ids(ByT5Tokenizer(extra_ids=0))
        self.tokens = torch.from_numpy(ids[spec.first : spec.first + spec.symbols]).to(device)
        self.table = torch.from_numpy(group_table(GROUPS[problem])).to(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Token ids of symbols and of the product after each, both `[rows, length]`."""
        symbols = torch.randint(len(self.tokens), (rows, length), device=self.tokens.device, generator=self.generator)
        products, reach = symbols, 1
        while reach < length:  # products over twice as many symbols each time
            products = torch.cat([products[:, :reach], self.table[products[:, :-reach], products[:, reach:]]], 1)
            reach *= 2
        return self.tokens[symbols], self.tokens[products]


class Books:
    """The embedded books as bytes."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.train, self.test = (read_bytes(BOOKS / f"books_{part}.jsonl.gz").to(device) for part in ("train", "test"))
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, rows: int, width: int) -> Tensor:
        """Windows of the training books as token ids `[rows, width]`."""
        device = self.train.device
        starts = torch.randint(len(self.train) - width, (rows,), device=device, generator=self.generator)
        return self.train[starts[:, None] + torch.arange(width, device=device)].long() + BYTE_OFFSET

    @torch.no_grad()
    def bits_per_byte(self, model: StatexForCausalLM, width: int, windows: int) -> float:
        """Of the first windows of the held-out books."""
        rows = self.test[: width * windows].view(-1, width).long() + BYTE_OFFSET
        nats = [next_token_loss(model, part).double() * len(part) for part in rows.split(64)]
        return float(torch.stack(nats).sum()) / len(rows) / math.log(2)


def read_bytes(path: Path) -> Tensor:
    """All texts of a gzipped JSONL file as bytes `[n]`."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return torch.from_numpy(
            np.frombuffer(bytearray("\n\n".join(json.loads(line)["text"] for line in lines).encode()), np.uint8)
        )


def next_token_loss(model: StatexForCausalLM, ids: Tensor) -> Tensor:
    """Mean nats a token."""
    return F.cross_entropy(model(ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def accuracies(model: StatexForCausalLM, words: Words, rows: int) -> dict[int, float]:
    """Share of right answers after the last symbol, by length."""
    ids, answers = words.draw(rows, LENGTHS[-1])
    last = torch.tensor(LENGTHS, device=ids.device) - 1
    predicted = torch.cat([model(part, use_cache=False, logits_to_keep=last).logits.argmax(-1) for part in ids.split(READ_AT_ONCE)])
    return dict(zip(LENGTHS, (predicted == answers[:, last]).float().mean(0).tolist(), strict=True))


class Training:
    """A model's captured steps on words, text, or both; a step's loss is their sum.

    Words get longer: a step counts the answers of the first L symbols, and L grows from 6 to 40 as soon as the model knows the L-th
    answer, or else, whether it does or not, from 60 % of the run to 80 %. All words have the same shape, so that one captured step
    serves them all.
    """

    def __init__(self, spec: Spec, model: StatexForCausalLM, words: Words | None, books: Books | None, width: int) -> None:
        self.spec, self.model, self.words, self.books = spec, model, words, books
        self.recipe = RECIPES[spec.recipe]
        model.set_backend("chunked")  # these models are too small for tiles of 64
        device = model.device
        self.rates = [torch.zeros((), device=device) for _ in RATE_FACTORS]
        groups: list[list[Tensor]] = [[], []]
        for name, parameter in model.named_parameters():
            groups[name.endswith("spectrum_rho")].append(parameter)
        options = [{"params": group, "lr": rate} for group, rate in zip(groups, self.rates, strict=True) if group]
        # No weight decay: to hold a state over 256 symbols a step's eigenvalue has to come as near to 1 or -1 as it can.
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(options, betas=(0.9, 0.99), weight_decay=0.0, fused=on_gpu, capturable=on_gpu)
        self.ids = torch.zeros(spec.batch, LONGEST, dtype=torch.long, device=device)
        self.answers, self.weights = torch.zeros_like(self.ids), torch.zeros(LONGEST, device=device)
        self.text = torch.zeros(max(1, spec.batch // 8), width, dtype=torch.long, device=device)
        self.step = Captured(self._work, device)
        self.right, self.length = torch.zeros(LONGEST, device=device), SHORTEST
        self.drawn: list[tuple[Tensor, Tensor]] = []

    def _work(self) -> None:
        loss = torch.zeros((), device=self.model.device)
        if self.words is not None:
            logits, smoothing = self.model(self.ids, use_cache=False).logits, self.recipe.smoothing
            logs = logits.log_softmax(-1)
            nats = -logs.gather(-1, self.answers[..., None])[..., 0]
            if smoothing:
                nats = (1 - smoothing) * nats - smoothing * logs.index_select(-1, self.words.tokens).mean(-1)
            loss = loss + (nats.mean(0) * self.weights).sum()
            self.right.copy_((logits.argmax(-1) == self.answers).float().mean(0))
        if self.books is not None:
            loss = loss + next_token_loss(self.model, self.text)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def run(self) -> Generator[None, None, int | None]:
        """All steps, a yield after each; returns the step from which on every check finds the words solved, if the last one does.

        Checks read other words than those that are measured at the end. Nothing is chosen by them unless the recipe stops early.
        """
        solved: int | None = None
        alone = self.words is not None and self.books is None  # with text, the loss on it is the question, too
        check = Words(self.spec.problem, self.model.device, self.spec.seed + 1000) if alone else None
        for step in range(1, self.spec.steps + 1):
            self._next(step / self.spec.steps)
            self.step()
            yield
            if self.words is not None and step % GROW_EVERY == 0:
                self._grow(step / self.spec.steps)
            if check is not None and step % self.recipe.check_every == 0:
                share = accuracies(self.model, check, 512)[LENGTHS[-1]]
                solved = None if share < SOLVED else solved or step
                if solved is not None and self.recipe.early:
                    break
        return solved

    def _grow(self, progress: float) -> None:
        """Lengthen the words by a quarter if the last answer is known, and to where the run has to be by now."""
        if float(self.right[self.length - 1]) > KNOWN:
            self.length = min(LONGEST, self.length + 1 + self.length // 4)
        self.length = max(self.length, round(LONGEST * min(1.0, (progress - 0.6) / 0.2)))

    def _next(self, progress: float) -> None:
        """Draw the next batch and set the learning rate: a short warm-up, then as the recipe says."""
        falling = (1 + math.cos(math.pi * progress)) / 2 if self.recipe.cosine else 1 - 0.9 * progress
        rate = self.spec.learning_rate * min(1.0, progress / 0.05) * falling
        for tensor, factor in zip(self.rates, RATE_FACTORS, strict=True):
            tensor.fill_(rate * factor)
        if self.words is not None:
            self.weights.zero_()[: self.length].fill_(1 / self.length)
            if not self.drawn:
                batch, longest = self.ids.shape
                drawn = self.words.draw(DRAWN_AT_ONCE * batch, longest)
                self.drawn = list(zip(*(part.split(batch) for part in drawn), strict=True))
            ids, answers = self.drawn.pop()
            self.ids.copy_(ids)
            self.answers.copy_(answers)
        if self.books is not None:
            self.text.copy_(self.books.draw(*self.text.shape))


def hold_convolutions(model: StatexForCausalLM) -> None:
    """Empty all taps of short convolutions but the current token's, and let no gradient reach them.

    A convolution over four symbols makes what a step writes, and in Mamba how far it decays, depend on the three before. Such
    differences add up in a state that forgets nothing, at random over a word: too little to be seen in 40 symbols.
    """
    for name, parameter in model.named_parameters():
        if "conv1d" in name and parameter.dim() > 1:
            current = torch.zeros_like(parameter)
            current[..., -1] = 1
            with torch.no_grad():
                parameter.mul_(current)
            parameter.register_hook(current.mul)


def from_nothing(place: Place, spec: Spec) -> Generator[None, None, dict[str, Any]]:
    """A model trained on words alone."""
    began = time.monotonic()
    model = StatexForCausalLM.from_description(spec.description(), seed=spec.seed, device=place.device)
    if RECIPES[spec.recipe].still:
        hold_convolutions(model)
    words = Words(spec.problem, place.device, spec.seed)
    solved = yield from Training(spec, model, words, None, place.width).run()
    return _line(place, spec, began, model, solved_at=solved)


def text_base(place: Place, spec: Spec) -> Generator[None, None, dict[str, Any]]:
    """A language model with eigenvalues in [0, 1], kept for `fine_tuned`."""
    began = time.monotonic()
    model = StatexForCausalLM.from_description(spec.description(), seed=spec.seed, device=place.device)
    books = Books(place.device, spec.seed)
    yield from Training(spec, model, None, books, place.width).run()
    model.save_pretrained(place.base(spec))
    return _line(place, spec, began, model, bits_after=books.bits_per_byte(model, place.width, place.text_windows))


def fine_tuned(place: Place, spec: Spec) -> Generator[None, None, dict[str, Any]]:
    """That model after surgery (the arm is its init) or without, trained on text and words."""
    began, source = time.monotonic(), place.base(spec)
    if spec.arm != NO_SURGERY:
        target = source.with_name(f"{source.name}-{spec.arm}")
        statex.expand(source, target, operator="extend_spectrum", layers="all", init=spec.arm, force=True, progress=False)
        source = target
    model = statex.load(source, device=place.device).train()
    books = Books(place.device, spec.seed + 1)
    before = books.bits_per_byte(model, place.width, place.text_windows)
    words = Words(spec.problem, place.device, spec.seed)
    yield from Training(spec, model, words, books, place.width).run()
    after = books.bits_per_byte(model, place.width, place.text_windows)
    return _line(place, spec, began, model, bits_before=before, bits_after=after)


def _line(place: Place, spec: Spec, began: float, model: StatexForCausalLM, **outcomes: float | None) -> dict[str, Any]:
    """A line of the CSV, with the accuracy of the model as it is."""
    shares = accuracies(model, Words(spec.problem, place.device, spec.seed + 2000), place.words)
    outcomes |= {f"accuracy_{length}": share for length, share in shares.items()}
    told: dict[str, Any] = {
        name: round(value, 4) if isinstance(value, float) else value for name, value in outcomes.items() if value is not None
    }
    device = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "CPU"
    told |= {"seconds": round(time.monotonic() - began, 1), "device": device, "torch": torch.__version__}
    return asdict(spec) | dict.fromkeys(OUTCOMES, "") | told
