"""What recall attribution asks the model: key-value rows (MQAR), or the second reading of a passage of real text.

MQAR is for models that have learnt to look up keys. Any language model with a memory predicts a passage better the second time, so
the copy probe works on checkpoints that never saw synthetic rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...errors import EvaluationError
from ..mqar_rows import draw_row, token_pools
from ..statistics import Difference, paired_difference
from ..subject import Subject
from ..task import Context
from ..text import Haystack, start_ids

PAIRS = (128, 64, 32, 16, 8, 4)
"""Loads that are tried for MQAR, the heaviest first."""
ENOUGH = 0.5
"""The heaviest load with at least this recall is asked: memory is in use there, and much can be lost."""
COPY_TOKENS = 192
"""Length of the passage that is read twice. Its second reading is this far from the first, well beyond a short window."""
COPY_SKIP = 8
"""First tokens of the second reading that are not scored: nothing says yet that it is one."""


@dataclass(frozen=True)
class Probe:
    """Rows of token ids `[N, T]` and which of the last `keep` tokens are answers, `[keep]`."""

    name: str
    label: str
    ids: np.ndarray
    answers: np.ndarray

    @property
    def keep(self) -> int:
        """Tokens at the end of a row that are scored."""
        return len(self.answers)

    @property
    def asked(self) -> np.ndarray:
        """Answers of each row `[N]`."""
        return np.full(len(self.ids), int(self.answers.sum()))

    @torch.inference_mode()
    def right(self, subject: Subject) -> np.ndarray:
        """Right answers of each row `[N]`, from whole rows: a cut mixer takes no cache. Raises `EvaluationError` on NaN."""
        at_once = subject.whole_rows_at_once(self.ids.shape[1], self.keep)
        counts = []
        for start in range(0, len(self.ids), at_once):
            rows = subject.tensor(self.ids[start : start + at_once])
            # The logits of the last position predict a token after the row; the others each predict their successor.
            logits = subject.forward(rows, self.keep + 1)[:, :-1]
            subject.check_finite(logits)
            counts.append((logits.argmax(-1) == rows[:, -self.keep :]).cpu().numpy()[:, self.answers].sum(1))
        return np.concatenate(counts)


@dataclass(frozen=True)
class Recalled:
    """What a subject got right `[N]` of a probe."""

    probe: Probe
    right: np.ndarray

    @property
    def share(self) -> float:
        """Recall."""
        return float(self.right.sum() / self.probe.asked.sum())

    def lost_by(self, right: np.ndarray) -> Difference:
        """How much more this is than `right` `[N]` of a cut model."""
        return paired_difference(right.tolist(), self.right.tolist(), self.probe.asked.tolist(), proportions=True)


def mqar_probe(context: Context, num_pairs: int) -> Probe:
    """Rows of `num_pairs` keys and values, then the keys in another order. Raises `ValueError` for more pairs than keys."""
    pools, start = token_pools(context.tokenizer), start_ids(context.tokenizer)
    rows = [draw_row(pools, num_pairs, context.rng("diagnose", num_pairs, row))[0] for row in range(context.options.samples)]
    ids = np.stack([np.concatenate([start, row]) for row in rows]).astype(np.int64)
    return Probe("mqar", f"MQAR, {num_pairs} key-value pairs", ids, np.tile([False, True], num_pairs))


def copy_probe(context: Context, haystack: Haystack) -> Probe:
    """Passages of text, each read twice; answers are the tokens of the second reading. Raises `EvaluationError` for short text."""
    start = start_ids(context.tokenizer)
    drawn = [haystack.draw(COPY_TOKENS, context.rng("diagnose", row)) for row in range(context.options.samples)]
    ids = np.stack([np.concatenate([start, passage, passage]) for passage in drawn])
    answers = np.arange(COPY_TOKENS) >= COPY_SKIP
    return Probe("copy", f"second reading of {COPY_TOKENS} tokens of text", ids, answers)


PROBES = ("mqar", "copy")


def choose_probe(name: str | None, subject: Subject, context: Context, haystack: Haystack) -> Recalled:
    """The probe asked for, with the whole model's recall; by default MQAR where the model can do it, else copying.

    Raises:
        EvaluationError: an unknown probe, or a vocabulary too small for MQAR.
    """
    if name not in (None, *PROBES):
        raise EvaluationError(f"there is no probe {name!r}", where="probe", fix=f"Give {' or '.join(PROBES)}, or leave it out")
    if name != "copy":
        most = len(token_pools(context.tokenizer).keys)
        loads = [load for load in PAIRS if load <= most]
        for load in loads:
            probe = mqar_probe(context, load)
            recalled = Recalled(probe, probe.right(subject))
            if recalled.share >= ENOUGH or (name == "mqar" and load == loads[-1]):
                return recalled
        if name == "mqar":
            raise EvaluationError(f"the vocabulary gives {most} keys", where="probe", fix="Use the probe `copy`")
    probe = copy_probe(context, haystack)
    return Recalled(probe, probe.right(subject))
