"""A subject as lm-evaluation-harness sees a model. Imports lm-eval; `harness.py` imports this file when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM

from ..errors import EvaluationError
from .stems import stem_of
from .subject import Subject
from .text import encode, start_ids

Pair = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation) as text, and the token ids of both."""


class SubjectLM(TemplateLM):
    """Requests are scored as our own tasks are: contexts that several continuations share are read once, and states have no length
    limit, so nothing is truncated."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject
        self.tokenizer: Any = subject.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        start = start_ids(self.subject.tokenizer)
        if len(start):
            return int(start[-1])
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids with what the tokenizer puts before a text, unless told not to; nothing is put behind it."""
        plain: list[int] = encode(self.subject.tokenizer, string).tolist()
        return plain if add_special_tokens is False else [*start_ids(self.subject.tokenizer).tolist(), *plain]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **options: Any) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(index)
        stems = [
            stem_of([(np.array([*context, *requests[i][2]], dtype=np.int64), len(requests[i][2])) for i in indices])
            for context, indices in groups.items()
        ]
        found: dict[int, tuple[float, bool]] = {}
        for indices, scores in zip(groups.values(), self.subject.score_stems(stems), strict=True):
            found |= {i: (-float(score.nats.sum()), bool(score.correct.all())) for i, score in zip(indices, scores, strict=True)}
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each read in one go."""
        rows = [encode(self.subject.tokenizer, request.args[0]) for request in requests]
        stems = [stem_of([(np.concatenate([[self.prefix_token_id], row]), len(row))]) for row in rows]
        return [-float(scores[0].nats.sum()) for scores in self.subject.score_stems(stems)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations. Raises `EvaluationError` for tasks that draw at random."""
        texts = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            options = request.args[1]
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise EvaluationError(
                    "a task of lm-eval draws its answers at random", where="lm_eval", fix="Choose tasks with greedy answers"
                )
            until = options.get("until") or ["\n\n"]
            stops = (until,) if isinstance(until, str) else tuple(until)
            groups.setdefault((int(options.get("max_gen_toks", 256)), stops), []).append(index)
        for (most, stops), indices in groups.items():
            prompts = [np.array(self.tok_encode(requests[i].args[0]), dtype=np.int64) for i in indices]
            for i, text in zip(indices, self.subject.generate(prompts, max_new_tokens=most, stops=stops), strict=True):
                texts[i] = text
        return texts
