"""State tracking: rows of symbols whose answer is a state that every symbol changes, drawn as token ids.

Four problems are words over a group, whose answer after each symbol is the product so far: parity (Z2), addition modulo 5 (Z5), and
the permutations S3 and A5 (arXiv 2404.08819). The fifth is arithmetic modulo 5 with brackets (arXiv 2207.02098), which needs a
stack. A linear recurrence with eigenvalues in [0, 1] cannot even solve parity (arXiv 2411.12537).

The evaluation tasks, the training documents of a recipe and the benchmark draw from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np

from .mqar_rows import IGNORE, Tokenizer

MODULUS = 5
OPERATORS = "+-*"
NO_ANSWER = -1


@dataclass(frozen=True)
class Problem:
    """One problem over `symbols` symbols, of which the first `answers` are answers too.

    Attributes:
        name: of the evaluation task and in recipes.
        first: its symbols follow those of the problems before it, so that one model can learn all.
        draw: (length, generator) -> symbols `[length]` and the answer after each, `NO_ANSWER` where none is asked.
        shortest: the least length; others are rounded down to what the problem can make.
        notes: for reports.
    """

    name: str
    symbols: int
    answers: int
    first: int
    draw: Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]
    shortest: int = 1
    notes: tuple[str, ...] = ()


def draw_row(problem: Problem, vocabulary: np.ndarray, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One row of at most `length` symbols with its last answer behind them, as (ids, labels).

    Labels hold the answer after a symbol one position on (transformers shifts them), and `IGNORE` where there is none. The last id
    is the last answer, so that scoring a row's last token scores it.

    Raises:
        ValueError: a length that the problem cannot make.
    """
    if length < problem.shortest:
        raise ValueError(f"a row of {problem.name} has at least {problem.shortest} symbols, not {length}")
    symbols, answers = problem.draw(length, rng)
    tokens = vocabulary[problem.first : problem.first + problem.symbols]
    ids = np.append(tokens[symbols], tokens[answers[-1]])
    labels = np.full_like(ids, IGNORE)
    asked = answers != NO_ANSWER
    labels[1:][asked] = tokens[answers[asked]]
    return ids, labels


def symbol_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Token ids of all problems' symbols, from the vocabulary's upper half: of a byte tokenizer, bytes that no English text holds.

    Raises:
        ValueError: the vocabulary is too small.
    """
    special = set(tokenizer.all_special_ids)
    ids = np.array([i for i in range(len(tokenizer)) if i not in special])
    needed = sum(problem.symbols for problem in PROBLEMS.values())
    if len(ids) < needed:
        raise ValueError(f"the vocabulary has {len(ids)} ordinary tokens, the problems have {needed} symbols")
    start = min(len(ids) // 2, len(ids) - needed)
    return ids[start : start + needed]


@cache
def group_table(name: str) -> np.ndarray:
    """Multiplication table `[n, n]` of Z2, Z5, S3 or A5; element 0 is the identity, and entry (a, b) is a, then b."""
    if name.startswith("Z"):
        order = int(name[1:])
        return np.add.outer(np.arange(order), np.arange(order)) % order
    elements = [p for p in permutations(range(int(name[1:]))) if name[0] == "S" or _is_even(p)]
    number = {element: index for index, element in enumerate(elements)}
    return np.array([[number[tuple(b[i] for i in a)] for b in elements] for a in elements])


def _is_even(permutation: tuple[int, ...]) -> bool:
    inversions = sum(a > b for i, a in enumerate(permutation) for b in permutation[i:])
    return inversions % 2 == 0


def _word(group: str) -> Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]:
    """Words of independent, uniform elements and their products so far."""

    def draw(length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        table = group_table(group)
        symbols = rng.integers(len(table), size=length)
        products, state = np.empty(length, dtype=np.int64), 0
        for position, symbol in enumerate(symbols):
            state = table[state, symbol]
            products[position] = state
        return symbols, products

    return draw


def _arithmetic(length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An expression in brackets and its value, asked at the `=` in its end. Symbols: 0 to 4, + - * ( ) =."""
    # n operators take n + 1 digits, n operators and n pairs of brackets; then the `=`.
    text, value = _expression((length - 2) // 4, rng)
    symbols = np.array([SYMBOLS.index(character) for character in f"{text}="])
    answers = np.full(len(symbols), NO_ANSWER)
    answers[-1] = value
    return symbols, answers


SYMBOLS = "01234" + OPERATORS + "()="


def _expression(operators: int, rng: np.random.Generator) -> tuple[str, int]:
    """A random expression with that many operators, each in brackets with its operands, and its value modulo 5."""
    if operators == 0:
        digit = int(rng.integers(MODULUS))
        return str(digit), digit
    left = int(rng.integers(operators))
    (a, x), (b, y) = _expression(left, rng), _expression(operators - 1 - left, rng)
    operator = OPERATORS[rng.integers(len(OPERATORS))]
    value = {"+": x + y, "-": x - y, "*": x * y}[operator] % MODULUS
    return f"({a}{operator}{b})", value


PROBLEMS: dict[str, Problem] = {
    "parity": Problem("parity", 2, 2, 0, _word("Z2")),
    "modular_addition": Problem("modular_addition", MODULUS, MODULUS, 2, _word("Z5")),
    "modular_arithmetic": Problem(
        "modular_arithmetic",
        len(SYMBOLS),
        MODULUS,
        7,
        _arithmetic,
        shortest=2,
        notes=("a row of n symbols has (n - 2) / 4 operators, rounded down; products make 0 the likeliest answer",),
    ),
    "s3_words": Problem("s3_words", 6, 6, 18, _word("S3")),
    "a5_words": Problem("a5_words", 60, 60, 24, _word("A5")),
}
"""All problems by name. A new one goes to the end, so that the others keep their tokens."""
