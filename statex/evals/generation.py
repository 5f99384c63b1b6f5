"""Greedy continuation of many prompts at once, for tasks whose answers are free text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .branching import read_ragged
from .stems import Advance

if TYPE_CHECKING:
    from ..models.cache import StatexCache
    from .subject import Subject

ROWS = 32
"""Rows that are continued at once where states are at hand: a step of one token costs little more for many rows than for one."""

Step = Callable[[Tensor | None], Tensor]
"""Gives the logits `[B, vocabulary]` of the next tokens, being told the tokens `[B]` chosen before (None at first)."""


def generate(
    subject: Subject,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    stops: Sequence[str],
    header: np.ndarray | None,
    advance: Advance,
) -> list[str]:
    """See `Subject.generate`."""
    texts, memory = [""] * len(prompts), None
    if header is not None and len(header):
        if subject.branches:
            memory = subject.new_cache()
            read_ragged(subject, memory, [header])
        else:
            prompts = [np.concatenate([header, prompt]) for prompt in prompts]
    for batch in _batches(subject, prompts, max_new_tokens):
        rows = [prompts[i] for i in batch]
        step = _from_states(subject, rows, memory) if subject.branches else _from_whole_rows(subject, rows)
        for i, text in zip(batch, _continue(subject, step, len(rows), max_new_tokens, stops), strict=True):
            texts[i] = text
        advance(len(batch))
    return texts


def _continue(subject: Subject, step: Step, rows: int, max_new_tokens: int, stops: Sequence[str]) -> list[str]:
    """Texts of `rows` continuations, token by token until all have stopped."""
    end = getattr(subject.tokenizer, "eos_token_id", None)
    # Rows that pad a vocabulary have no token, and say no more than special tokens do.
    said = set(subject.tokenizer.get_vocab().values()).difference(subject.tokenizer.all_special_ids)
    written: list[list[int]] = [[] for _ in range(rows)]
    texts, unfinished = [""] * rows, set(range(rows))
    token: Tensor | None = None
    for _ in range(max_new_tokens):
        logits = step(token)
        subject.check_finite(logits)
        token = logits.argmax(-1)
        for i, new in enumerate(token.tolist()):
            if i not in unfinished:
                continue
            if new == end:
                unfinished.discard(i)
            elif new in said:
                written[i].append(new)
                text = subject.tokenizer.decode(written[i])
                found = [place for stop in stops if (place := text.find(stop)) >= 0]
                texts[i] = text[: min(found)] if found else text
                if found:
                    unfinished.discard(i)
        if not unfinished:
            break
    return texts


def _from_states(subject: Subject, rows: Sequence[np.ndarray], memory: StatexCache | None) -> Step:
    """Rows that go on from a memory, or from nothing; each step reads one token a row."""
    cache = subject.new_cache() if memory is None else memory.branch(torch.zeros(len(rows), dtype=torch.int64))
    read_ragged(subject, cache, [row[:-1] for row in rows])
    last = subject.tensor(np.stack([row[-1:] for row in rows]))

    def step(token: Tensor | None) -> Tensor:
        return subject.forward(last if token is None else token[:, None], 1, cache)[:, -1]

    return step


def _from_whole_rows(subject: Subject, rows: Sequence[np.ndarray]) -> Step:
    """Rows that are read again at every step, for models whose memory is not ours to copy; padded on the right."""
    growing = [row.tolist() for row in rows]

    def step(token: Tensor | None) -> Tensor:
        if token is not None:
            for row, new in zip(growing, token.tolist(), strict=True):
                row.append(new)
        sizes = [len(row) for row in growing]
        ids = np.zeros((len(sizes), max(sizes)), dtype=np.int64)
        for line, row in zip(ids, growing, strict=True):
            line[: len(row)] = row
        first = min(sizes) - 1
        logits = subject.forward(subject.tensor(ids), max(sizes) - first)
        return torch.stack([logits[i, size - 1 - first] for i, size in enumerate(sizes)])

    return step


def _batches(subject: Subject, prompts: Sequence[np.ndarray], max_new_tokens: int) -> Iterator[list[int]]:
    """Prompts of similar length; those of one token, which leave nothing to read before it, by themselves."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        size = len(prompts[i])
        most = subject.rows_at_once(size + max_new_tokens, size - len(prompts[batch[0]]) + 1 if batch else 1)
        if subject.branches and subject.batch_size is None:
            # Prompts are read in pieces, so the batch is not bound by their length.
            most = max(most, min(ROWS, subject.rows_at_once(1, 1)))
        if batch and (len(batch) >= most or (len(prompts[batch[0]]) == 1) != (size == 1)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
