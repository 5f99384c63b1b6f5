"""The runs of `hgrn_outer_product.py`: what a run is, how its model begins, and its training."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import statex
from statex.families import ModelDescription, get_family
from statex.models import StatexForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from pretrain_tiny import (  # noqa: E402
    BYTE_OFFSET,
    IGNORE,
    PAIRS,
    VOCAB,
    Backward,
    Mixture,
    Preset,
    evaluate,
    learning_rate,
    logits,
    read_bytes,
)

BASE, CONTINUED, SCRATCH = "base", "continued", "HGRN2 from scratch"
PRESERVE, OPENED, INHERIT = "preserve", "preserve, opened", "inherit"
GAIN_RATE = 10.0
"""Learning rate of λ over that of the weights: it must open within a short run."""
OPENING = 0.1
"""Share of a run over which λ is led from 0 to √n, beside what it learns, by `OPENED`; with √n the reading of S counts in full."""
EVALUATION_SEED = 2**31
MEMORY = (8.0, 256.0)
"""Tokens that a new model's channels remember, the least and the most."""
WIDTH, GATE_WIDTH = 0.5, 2.0
"""Standard deviation of what a new mixer's projections, and those to its gates, make of inputs of variance 1."""


@dataclass(frozen=True)
class Spec:
    """One run; equal specs are the same line of the CSV."""

    arm: str
    factor: int
    seed: int
    start: str
    hidden: int
    layers: int
    base_steps: int
    tune_steps: int
    tune_rate: float
    text_rows: int
    mqar_tokens: int

    @property
    def base(self) -> Spec | None:
        """The run whose model this one starts from."""
        return None if self.arm in (BASE, SCRATCH) else replace(self, arm=BASE, factor=1)

    @property
    def name(self) -> str:
        """For files and logs."""
        return f"{self.arm.replace(',', '').replace(' ', '_')}-x{self.factor}-seed{self.seed}"

    @property
    def steps(self) -> int:
        """Steps that this run itself trains."""
        return {BASE: self.base_steps, SCRATCH: self.base_steps + self.tune_steps}.get(self.arm, self.tune_steps)

    def preset(self, window: int) -> Preset:
        """The mixture's sizes."""
        return Preset(
            "hgrn", self.hidden, self.layers, heads=1, key_dim=1, steps=self.steps, window=window, text_rows=self.text_rows,
            mqar_tokens=self.mqar_tokens,
        )  # fmt: skip


@dataclass(frozen=True)
class Place:
    """What all runs of a command share."""

    data: Path
    test: Path
    work: Path
    window: int
    rate: float
    """Learning rate of what is trained from nothing; `Spec.tune_rate` is that of the rest."""
    warmup: int
    test_bytes: int | None
    compile: bool


def description(spec: Spec, family: str) -> ModelDescription:
    """An HGRN, or an HGRN2 of heads of `factor` channels; both with short convolutions, without which pairs do not form.

    With the start `long`, a bias on the gates' convolution takes the place of lower bounds.
    """
    config = {
        "hidden_size": spec.hidden,
        "vocab_size": VOCAB,
        "num_hidden_layers": spec.layers,
        "tie_word_embeddings": True,
        "use_short_conv": True,
        "use_lower_bound": spec.start == "stock",
    }
    described = get_family(family).describe(config | ({"expand_ratio": spec.factor} if family == "hgrn2" else {}), {})
    return replace(described, mixer={**described.mixer, "conv_bias": spec.start == "long"})


@torch.no_grad()
def new_model(spec: Spec, family: str) -> StatexForCausalLM:
    """A fresh model; with the start `long`, one whose gates remember.

    A key is 1 - f. Where gates begin at one f the keys of all tokens are much alike and of one sign: every query reads the sum of
    all values, and training stays there. So a channel's gate gets a bias, such that it remembers some number of tokens, drawn
    log-uniformly (as in arXiv 1804.11188); then 1 - f is nearly an exponential of the input, and a token's few large keys are its
    own. Projections are as wide as the usual deviation of 0.02 makes them in large models, so that tokens differ from the start.
    """
    model = StatexForCausalLM.from_description(description(spec, family), seed=spec.seed)
    if spec.start == "stock":
        return model
    draws = torch.Generator().manual_seed(spec.seed)
    for name, parameter in model.named_parameters():
        if "mixer" in name and name.endswith("_proj.weight"):
            width = GATE_WIDTH if "f_proj" in name else WIDTH
            parameter.normal_(0, width * spec.hidden**-0.5, generator=draws)
        elif name.endswith("f_conv1d.bias"):
            least, most = MEMORY
            tokens = least * (most / least) ** torch.rand(parameter.shape, generator=draws)
            parameter.copy_((tokens - 1).log())
        elif name.endswith("conv1d.bias"):
            parameter.zero_()
    return model


def model_of(spec: Spec, place: Place) -> StatexForCausalLM:
    """The model that a run starts with."""
    if spec.base is None:
        family = "hgrn" if spec.arm == BASE else "hgrn2"
        return new_model(spec, family)
    base = place.work / spec.base.name
    if spec.arm == CONTINUED:
        return statex.load(base, dtype=torch.float32)
    expanded, init = place.work / spec.name, INHERIT if spec.arm == INHERIT else PRESERVE
    statex.expand(base, expanded, operator="outer_product", factor=spec.factor, init=init, seed=spec.seed, force=True)
    return statex.load(expanded, dtype=torch.float32)


def make_optimizer(model: StatexForCausalLM) -> torch.optim.AdamW:
    """Weight decay on matrices only; each group with its factor on the learning rate."""
    gains = [p for name, p in model.named_parameters() if name.endswith("outer_gain")]
    matrices = [p for p in model.parameters() if p.ndim == 2 and min(p.shape) > 16]
    rest = [p for p in model.parameters() if not any(p is other for other in (*gains, *matrices))]
    groups = [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for parameters, decay, factor in ((matrices, 0.1, 1.0), (rest, 0.0, 1.0), (gains, 0.0, GAIN_RATE))
        if parameters
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


@torch.no_grad()
def lead(model: StatexForCausalLM, distance: float) -> None:
    """Move every λ by `distance`."""
    for name, parameter in model.named_parameters():
        if name.endswith("outer_gain"):
            parameter.add_(distance)


def train(spec: Spec, place: Place) -> dict[str, Any]:
    """Carry out one run; returns its line of the CSV."""
    began, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = model_of(spec, place).train()
    model.to(device)
    model.set_backend("chunked")  # what compiles into few launches
    if device.type == "cuda" and place.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    preset = spec.preset(place.window)
    mixture = Mixture(preset, place.data, device, seed=1 + spec.seed + (0 if spec.base is None else 1000))
    backward, optimizer = Backward(model, (preset.text_rows, preset.window)), make_optimizer(model)
    draws, counts = np.random.default_rng([spec.seed, 2]), [n for n in PAIRS if n <= preset.max_pairs]
    tokens, rate = 0, place.rate if spec.base is None else spec.tune_rate
    for step in range(spec.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(step, spec.steps, rate, place.warmup)
        # Few pairs early: the recall circuit forms on short rows and is then stretched.
        reach = counts[: max(3, math.ceil(len(counts) * min(1.0, step / (0.3 * spec.steps))))]
        num_pairs = int(draws.choice(reach))
        ids = mixture.text()
        text_loss = backward(ids, ids)
        rows, answers = mixture.mqar(num_pairs, preset.mqar_tokens // (4 * num_pairs))
        backward(rows, answers)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # graphs write into these very tensors
        if spec.arm == OPENED and step < OPENING * spec.steps:
            lead(model, spec.factor**0.5 / math.ceil(OPENING * spec.steps))
        tokens += ids.numel() + rows.numel()
        if step % 200 == 0:
            told = {"text_bits": round(text_loss.item() / math.log(2), 3), "recall_16": round(recall(model, mixture, 16, 32), 3)}
            progress = {"run": spec.name, "step": step, **told, "seconds": round(time.monotonic() - began, 1)}
            print(json.dumps(progress), file=sys.stderr, flush=True)
    mixture.generator.manual_seed(EVALUATION_SEED)  # the same rows for every run
    test = torch.from_numpy(read_bytes(place.test)[: place.test_bytes]).to(device).long() + BYTE_OFFSET
    scores = evaluate(model, mixture, test, rows=256 if device.type == "cuda" else 2)
    if spec.arm == BASE:
        model.cpu().save_pretrained(place.work / spec.name)
    before = 0 if spec.base is None else tokens * spec.base_steps // max(spec.steps, 1)
    layers = model.config.description.layers
    return {
        **asdict(spec),
        "tokens": before + tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_elements": sum(layer.state_elements for layer in layers),
        "bits_per_byte": scores["bits_per_byte"],
        **{f"recall_{pairs}": accuracy for pairs, accuracy in scores["mqar"].items()},
        "seconds": round(time.monotonic() - began, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
    }


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def recall(model: StatexForCausalLM, mixture: Mixture, num_pairs: int, rows: int) -> float:
    """Share of values recalled in fresh rows; what is drawn for training stays as it is."""
    before = mixture.generator.get_state()
    ids, labels = mixture.mqar(num_pairs, rows)
    mixture.generator.set_state(before)
    asked = labels[:, 1:] != IGNORE
    return float((logits(model, ids)[:, :-1].argmax(-1) == labels[:, 1:])[asked].float().mean())
