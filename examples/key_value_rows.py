"""Key-value text as training rows: a phone book in the form of `statex eval --tasks phone_book`, then its entries in another order.

Layout and question are the task's own. Names are not: they are made-up syllables (`Kab`), all of one length, so that rows are
drawn in one go, and none is a name of the task. Only the numbers asked for, each with the line's end behind it, count in the loss.

Who never reads a name can still tell a number that has not been told yet: the last one for sure, 1 + 1/2 + ... + 1/n of n in the
mean, and the first one with probability 1/n. What is above that was looked up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from statex.evals.mqar_rows import IGNORE
from statex.evals.tasks.retrieval import PHONE_BOOK

BYTE_OFFSET = 3  # ByT5: pad, eos and unk come before the bytes
ENTRIES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
ROWS_AT_ONCE = 64


class KeyValueRows:
    """Draws rows on the device.

    Args:
        most: entries of a row.
        digits: of a number.

    Attributes:
        counts: numbers of entries, those of `ENTRIES` up to `most`.
    """

    def __init__(self, most: int, device: torch.device, digits: int) -> None:
        self.counts, self.digits = [n for n in ENTRIES if n <= most], digits
        names = [f"{first}{vowel}{last}".title() for first in CONSONANTS for vowel in VOWELS for last in CONSONANTS]
        self.questions = torch.tensor([token_ids(PHONE_BOOK.question(name)) for name in names], device=device)
        self.opening, self.closing, self.end = (
            torch.tensor(token_ids(part), device=device)
            for part in (PHONE_BOOK.opening.format(), PHONE_BOOK.closing.format(), PHONE_BOOK.end)
        )
        self.asked = self.questions.shape[1]

    def width(self, entries: int) -> int:
        """Bytes of a row."""
        return len(self.opening) + len(self.closing) + 2 * entries * (self.asked + self.digits + len(self.end))

    def draw(self, entries: int, rows: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Ids and labels `[rows, width(entries)]`."""
        device = self.questions.device
        names = torch.rand(rows, len(self.questions), device=device, generator=generator).topk(entries, dim=1).indices
        numbers = torch.randint(10, (rows, entries, self.digits), device=device, generator=generator) + ord("0") + BYTE_OFFSET
        told = torch.cat([self.questions[names], numbers, self.end.expand(rows, entries, -1)], dim=2)
        order = torch.rand(rows, entries, device=device, generator=generator).argsort(1)
        again = told.gather(1, order[..., None].expand_as(told))
        answers = again.clone()
        answers[..., : self.asked] = IGNORE
        opening, closing = (part.expand(rows, -1) for part in (self.opening, self.closing))
        book = torch.cat([opening, told.flatten(1), closing], dim=1)
        ids, labels = (
            torch.cat(parts, dim=1) for parts in ((book, again.flatten(1)), (torch.full_like(book, IGNORE), answers.flatten(1)))
        )
        return ids, labels

    @torch.no_grad()
    def score(self, logits: Callable[[Tensor], Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        """Which bytes of the answers are right, those before given: `[rows, entries, digits and the line's end]`."""
        hits = []
        for part, wanted in zip(ids.split(ROWS_AT_ONCE), labels[:, 1:].split(ROWS_AT_ONCE), strict=True):
            right = logits(part)[:, :-1].argmax(-1) == wanted
            hits.append(right[wanted != IGNORE].view(len(part), -1, self.digits + len(self.end)))
        return torch.cat(hits)


def token_ids(text: str) -> list[int]:
    """Of a byte tokenizer."""
    return [byte + BYTE_OFFSET for byte in text.encode()]
