"""Whether free text answers a question: containment and F1, as the recall literature scores (arXiv 2402.18668, 1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

Accepted = Sequence[Sequence[str]]
"""Right answers: any of them will do, and each is made of spans that must all be there (one, but for DROP's lists)."""


def contains(told: str, accepted: Accepted, *, whole_words: bool = False) -> bool:
    """Whether the text holds every span of some right answer, whatever the case of its letters.

    Args:
        whole_words: a span counts only between other words, for answers as short as "2".
    """
    border = r"(?<!\w){}(?!\w)" if whole_words else "{}"
    return any(all(re.search(border.format(re.escape(span)), told, re.IGNORECASE) for span in spans) for spans in accepted)


def f1(told: str, accepted: Accepted) -> float:
    """Harmonic mean of precision and recall over words, against the nearest right answer (SQuAD's normalisation)."""
    return max((_f1(normalise(told).split(), normalise(" ".join(spans)).split()) for spans in accepted), default=0.0)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _f1(told: list[str], right: list[str]) -> float:
    if not told or not right:
        return float(told == right)
    common = sum((Counter(told) & Counter(right)).values())
    return 0.0 if common == 0 else 2 * common / (len(told) + len(right))
