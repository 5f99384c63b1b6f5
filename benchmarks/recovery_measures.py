"""What `recovery.py` measures of a model: text, recall, how far new numbers opened, and what a step and a token cost."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from recovery_extras import mixings
from torch import Tensor
from torch.nn import functional as F

from statex.evals.capacity import LEVELS, capacity_curves
from statex.evals.mqar_rows import IGNORE
from statex.evals.result import ACCURACY, Cell, TaskResult, make_cell
from statex.families.description import ModelDescription
from statex.models import StatexForCausalLM
from statex.surgery import mamba2_rows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from pretrain_tiny import Mixture, logits

TEXT, MORE_TEXT, MQAR, KEY_VALUE, NEEDLE = "books", "more books", "mqar", "key_value", "needle"
OPENED, COST = "opened", "cost"
NUMBER = slice(-7, -2)
"""Where the five digits of the answer stand in a row of `needle_rows`."""
WINDOWS_AT_ONCE = 128
TIMED_STEPS, TIMED_TOKENS, PROMPT = 20, 32, 64
DECODED_ROWS = (1, 64)


@dataclass(frozen=True)
class Measured:
    """One number.

    Attributes:
        step, tokens, train_s: of the run's training so far; `train_s` is wall-clock on a device that other runs may share.
        value: infinite for a capacity beyond the most pairs that were asked for, 0 for one below the fewest.
    """

    step: int
    tokens: int
    train_s: float
    task: str
    metric: str
    value: float


Numbers = Iterator[tuple[str, str, float]]
"""(task, metric, value)."""


@torch.no_grad()
def read_text(model: StatexForCausalLM, held_out: Tensor, window: int, task: str) -> Numbers:
    """Bits per byte of held-out windows, each read from an empty state, and of the first and the last quarter of them."""
    windows = held_out[: len(held_out) // window * window].view(-1, window)
    nats = torch.zeros(window - 1, dtype=torch.float64, device=windows.device)
    for part in windows.split(WINDOWS_AT_ONCE):
        losses = F.cross_entropy(logits(model, part)[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten(), reduction="none")
        nats += losses.double().view(len(part), -1).sum(0)
    bits = nats.cpu().numpy() / math.log(2) / len(windows)
    quarter = window // 4
    yield task, "bits_per_byte", float(bits.mean())
    yield task, "bits_first_quarter", float(bits[: quarter - 1].mean())
    yield task, "bits_last_quarter", float(bits[-quarter:].mean())


@torch.no_grad()
def recall(model: StatexForCausalLM, mixture: Mixture, counts: list[int], rows: int) -> Numbers:
    """MQAR accuracy by number of pairs, and the number of pairs that is recalled to 50 % and to 90 %."""
    cells = []
    for pairs in counts:
        ids, labels = mixture.mqar(pairs, rows)
        hits = (logits(model, ids)[:, :-1].argmax(-1) == labels[:, 1:]) & (labels[:, 1:] != IGNORE)
        right = hits.sum(1).cpu().numpy().astype(float)
        cells.append(make_cell(ACCURACY, {"num_pairs": pairs}, right, np.full(rows, pairs), inputs=""))
        yield MQAR, f"accuracy_{pairs}", cells[-1].value
    yield from capacities(MQAR, cells, chance=1 / len(mixture.values))


@torch.no_grad()
def look_up(model: StatexForCausalLM, mixture: Mixture, rows: int) -> Numbers:
    """Key-value text by number of entries: numbers told to the line's end, of all and of the one asked first; digits behind right
    ones, a tenth of them by chance; capacities as of MQAR.
    """
    source, cells = mixture.key_value_rows, []
    for entries in source.counts:
        hits = source.score(partial(logits, model), *source.draw(entries, rows, mixture.generator)).cpu().numpy()
        exact = hits.all(2)
        cells.append(make_cell(ACCURACY, {"num_pairs": entries}, exact.sum(1), np.full(rows, entries), inputs=""))
        yield KEY_VALUE, f"exact_{entries}", cells[-1].value
        yield KEY_VALUE, f"first_{entries}", float(exact[:, 0].mean())
        yield KEY_VALUE, f"digits_{entries}", float(hits[..., : source.digits].mean())
    yield from capacities(KEY_VALUE, cells, chance=0.1**source.digits)


def capacities(name: str, cells: list[Cell], chance: float) -> Numbers:
    """The number of pairs that is recalled to 50 % and to 90 %."""
    task = TaskResult(name, ACCURACY, {"num_pairs": "key-value pairs"}, cells, chance=chance)
    for curve in capacity_curves(task, resamples=1):
        for level in LEVELS:
            found = curve.capacity(level)
            outside = math.inf if found.beyond == "above" else 0.0
            yield name, f"capacity_{100 * level:.0f}", outside if found.value is None else found.value


@torch.no_grad()
def find_needles(model: StatexForCausalLM, rows: Tensor) -> Numbers:
    """Of the numbers that windows `[rows, window]` state and ask for: the share found whole, and that of digits behind right ones.

    A tenth of the digits is right by chance.
    """
    hits = torch.cat([logits(model, part)[:, :-1].argmax(-1) == part[:, 1:] for part in rows.split(WINDOWS_AT_ONCE)])[:, NUMBER]
    yield NEEDLE, "exact", hits.all(1).double().mean().item()
    yield NEEDLE, "digits", hits.double().mean().item()


@torch.no_grad()
def opened(model: StatexForCausalLM, source: ModelDescription) -> Numbers:
    """Root mean squares of what surgery added: M between heads, γ, and new rows of queries over old ones."""
    foreign = [mixing.detach()[:, mask] for mixing, mask, _ in mixings(model)]
    gates = [p.detach() for name, p in model.named_parameters() if name.endswith("lift_gamma")]
    for metric, numbers in (("mixing_rms", foreign), ("gamma_rms", gates)):
        if numbers:
            yield OPENED, metric, _rms(torch.cat([x.flatten() for x in numbers]))
    shares = []
    for block, before in zip(model.model.layers, source.layers, strict=True):
        layer, own = block.mixer.layer, before.query_heads * before.key_dim
        if source.family == "mamba2":
            queries = mamba2_rows.split_rows(mamba2_rows.PROJECTION, block.mixer.in_proj.weight, layer)[2]
            own = before.key_heads * before.key_dim
        else:
            queries = block.mixer.q_proj.weight
        if len(queries) > own:
            rows = queries.unflatten(0, (-1, before.key_dim * len(queries) // own))
            shares.append(_rms(rows[:, before.key_dim :]) / _rms(rows[:, : before.key_dim]))
    if shares:
        yield OPENED, "new_query_rows", sum(shares) / len(shares)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@torch.no_grad()
def state_sizes(model: StatexForCausalLM, ids: Tensor) -> list[int]:
    """Numbers of one sequence's state, layer by layer, as the cache holds them after reading `ids` `[1, T]`."""
    model.eval()
    states = [layer.recurrent for layer in model(ids, use_cache=True).past_key_values.layers]
    model.train()
    return [0 if state is None else state.numel() for state in states]


def cost(model: StatexForCausalLM, step: Callable[[], object], ids: Tensor, window_tokens: int) -> Numbers:
    """Milliseconds of a training step and of a decoded token, and the memory of both, on a device that nothing else uses.

    Args:
        step: a training step of `window_tokens` tokens.
        ids: token ids to decode behind, `[rows, T]`.
    """
    yield COST, "train_ms", 1000 * _seconds(step, TIMED_STEPS, ids.device)
    yield COST, "train_tokens", window_tokens
    if ids.is_cuda:
        yield COST, "peak_memory_mib", torch.cuda.max_memory_allocated(ids.device) / 2**20
    model.eval()
    for rows in DECODED_ROWS:
        prompt = ids[:1, :PROMPT].expand(rows, -1).contiguous()
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            cache = model(prompt, use_cache=True).past_key_values
            seconds = _seconds(lambda: model(prompt[:, :1], past_key_values=cache, use_cache=True), TIMED_TOKENS, ids.device)  # noqa: B023
        yield COST, f"decode_ms_batch_{rows}", 1000 * seconds


def _seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Mean wall-clock of one call, after a few that do not count."""
    for _ in range(3):
        work()
    clocks = []
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clocks.append(time.perf_counter())
        for _ in range(times if len(clocks) == 1 else 0):
            work()
    return (clocks[1] - clocks[0]) / times
