"""Rows of real text for `recovery.py`: questions on Factbook pages and SQuAD paragraphs, as the suite `reading` puts them.

Only answers count in the loss. An answer is right if every byte of it, and the line's end behind it, is the model's first choice
given the ones before: what greedy decoding would write. Training and test rows share no country and no article.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from statex.evals.mqar_rows import IGNORE
from statex.evals.tasks.factbook import LONGEST_ANSWER, is_held_out
from statex.evals.tasks.reading import squad_question

BYTE_OFFSET, PAD = 3, 0  # ByT5: pad, eos and unk come before the bytes
QUESTIONS = 8
"""Fields of a page that are asked for, at most."""

Pieces = list[tuple[str, bool]]
"""Parts of a row, and whether each is an answer."""


class ReadingRows:
    """Training rows on the device, and held-out ones to score a model with.

    Args:
        folder: holds `factbook.jsonl.gz`, `squad_train.jsonl.gz` and `squad_dev.jsonl.gz`.
        width: bytes of a row; pages are cut to it at a field, longer paragraphs are left out.
        train, test: rows of each of the two tasks.
    """

    def __init__(self, folder: Path, width: int, device: torch.device, seed: int, train: int = 16_384, test: int = 512) -> None:
        countries = read(folder / "factbook.jsonl.gz")
        pages = [[row for row in countries if is_held_out(row) is held_out] for held_out in (False, True)]
        squad = [read(folder / f"squad_{part}.jsonl.gz") for part in ("train", "dev")]
        rng = np.random.default_rng([seed, 3])
        self.generator = torch.Generator(device).manual_seed(seed)
        self.train: dict[str, tuple[Tensor, Tensor]] = {}
        self.test: dict[str, tuple[Tensor, Tensor]] = {}
        # The test rows are the same for every seed.
        for kept, which, rows, source in ((self.train, 0, train, rng), (self.test, 1, test, np.random.default_rng(0))):
            kept["factbook"] = on(device, drawn(pages[which], factbook_row, rows, width, source))
            kept["squad"] = on(device, drawn(squad[which], squad_row, rows, width, source))

    def keyed(self, seed: int) -> ReadingRows:
        """The same rows, drawn by a generator of its own."""
        other = copy.copy(self)
        other.generator = torch.Generator(self.generator.device).manual_seed(seed)
        return other

    def draw(self, rows: int) -> tuple[Tensor, Tensor]:
        """Ids and labels `[rows, width]`, half of them of each task."""
        parts = []
        for ids, labels in self.train.values():
            chosen = torch.randint(len(ids), (rows // len(self.train),), device=ids.device, generator=self.generator)
            parts.append((ids[chosen].long(), labels[chosen].long()))
        return torch.cat([ids for ids, _ in parts]), torch.cat([labels for _, labels in parts])

    def score(self, logits: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, str, float]]:
        """(task, metric, value): `exact`, the share of right answers, and `bits`, bits per byte of the right answers."""
        for task, (ids, labels) in self.test.items():
            exact, bits = score(logits, ids, labels)
            yield task, "exact", exact
            yield task, "bits", bits


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def factbook_row(country: dict[str, Any], width: int, rng: np.random.Generator) -> Pieces | None:
    """A page of some fields in any order, then some of the short ones again; None if too few fit."""
    fields = [(name, " ".join(str(text).split())) for name, text in country["fields"].items()]
    pieces: Pieces = [(f"{country['country']}\n\n", False)]
    closing = f"\nFrom the page on {country['country']} above:\n"
    left, told = width - len((pieces[0][0] + closing).encode()), []
    for i in rng.permutation(len(fields)):
        name, text = fields[i]
        size = len(f"{name}: {text}\n".encode())
        short = bool(text) and len(text) <= LONGEST_ANSWER
        # Room for the question, which repeats the line of its field.
        if (2 if short else 1) * size > left or (not short and size > width // 4):
            continue
        left -= (2 if short else 1) * size
        pieces.append((f"{name}: {text}\n", False))
        told += [(name, text)] if short else []
    if len(told) < 2:
        return None
    pieces.append((closing, False))
    for i in rng.permutation(len(told))[:QUESTIONS]:
        pieces += [(f"{told[i][0]}:", False), (f" {told[i][1]}\n", True)]
    return pieces


def squad_row(row: dict[str, Any], width: int, rng: np.random.Generator) -> Pieces | None:
    """A paragraph, a question and its first answer; None if they do not fit."""
    question = squad_question(row)
    answer = f" {question.accepted[0][0]}\n"
    return None if len((question.prompt + answer).encode()) > width else [(question.prompt, False), (answer, True)]


def drawn(
    sources: list[dict[str, Any]],
    make: Callable[[dict[str, Any], int, np.random.Generator], Pieces | None],
    rows: int,
    width: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels `[rows, width]` as int16, of sources taken in turn in a random order."""
    ids, labels = np.full((rows, width), PAD, np.int16), np.full((rows, width), IGNORE, np.int16)
    made, order, misses = 0, rng.permutation(len(sources)), 0
    while made < rows:
        pieces = make(sources[order[(made + misses) % len(sources)]], width, rng)
        if pieces is None:
            misses += 1
            if misses > 100 * rows:
                raise ValueError(f"no source fits rows of {width} bytes")
            continue
        at = 0
        for text, is_answer in pieces:
            part = np.frombuffer(text.encode(), np.uint8).astype(np.int16) + BYTE_OFFSET
            ids[made, at : at + len(part)] = part
            if is_answer:
                labels[made, at : at + len(part)] = part
            at += len(part)
        made += 1
    return ids, labels


def on(device: torch.device, arrays: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Arrays as tensors on the device."""
    ids, labels = (torch.from_numpy(array).to(device) for array in arrays)
    return ids, labels


@torch.no_grad()
def score(logits: Callable[[Tensor], Tensor], ids: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of answers whose every byte is the first choice, and bits per byte of answers."""
    right = asked = 0
    nats = counted = 0.0
    for row, wanted in zip(ids.long().split(64), labels.long().split(64), strict=True):
        predicted, target = logits(row)[:, :-1].float(), wanted[:, 1:]
        counts = target != IGNORE
        nats += float(F.cross_entropy(predicted.flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="sum"))
        counted += int(counts.sum())
        # Answers are runs of counted bytes; a run's number is how many runs began up to it.
        begins = counts & ~F.pad(counts, (1, 0))[:, :-1]
        runs = begins.flatten().cumsum(0)[counts.flatten()] - 1
        wrong = torch.zeros(int(begins.sum()), dtype=torch.bool, device=ids.device)
        wrong[runs[(predicted.argmax(-1) != target).flatten()[counts.flatten()]]] = True
        right, asked = right + int((~wrong).sum()), asked + len(wrong)
    return right / asked, nats / counted / math.log(2)
