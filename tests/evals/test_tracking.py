"""State tracking: rows are right by an evaluation of their own, an oracle scores 100 %, and a blind model is at chance."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from statex.errors import EvaluationError
from statex.evals import EvalResult, evaluate
from statex.evals.mqar_rows import IGNORE
from statex.evals.tasks.tracking import LENGTHS
from statex.evals.tracking_rows import NO_ANSWER, PROBLEMS, SYMBOLS, Problem, draw_row, group_table, symbol_ids
from tests.evals.models import BYTES, VOCABULARY, Rule

GROUPS = {"parity": "Z2", "modular_addition": "Z5", "s3_words": "S3", "a5_words": "A5"}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
ORDERS = {"Z2": 2, "Z5": 5, "S3": 6, "A5": 60}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_tables_are_groups(name: str, order: int) -> None:
    table = group_table(name)
    elements = np.arange(order)
    assert table.shape == (order, order)
    assert np.array_equal(table[0], elements)
    assert np.array_equal(table[:, 0], elements)
    assert all(np.array_equal(np.sort(row), elements) for row in (*table, *table.T))
    a, b, c = np.meshgrid(elements, elements, elements)
    assert np.array_equal(table[table[a, b], c], table[a, table[b, c]])


@pytest.mark.parametrize(("name", "abelian"), [("Z2", True), ("Z5", True), ("S3", False), ("A5", False)])
def test_only_the_cyclic_groups_commute(name: str, abelian: bool) -> None:
    assert np.array_equal(group_table(name), group_table(name).T) == abelian


def test_a5_has_no_normal_subgroup_so_that_no_shorter_state_will_do() -> None:
    """A5 is simple: the conjugates of any element but the identity generate all of it."""
    table = group_table("A5")
    inverse = (table == 0).argmax(1)
    for element in (1, 7, 31):
        reached = {int(table[table[inverse[x], element], x]) for x in range(60)}
        while True:
            more = reached | {int(table[a, b]) for a, b in itertools.product(reached, reached)}
            if more == reached:
                break
            reached = more
        assert len(reached) == 60


@pytest.mark.parametrize(("name", "modulus"), [("parity", 2), ("modular_addition", 5)])
def test_sums_are_running_sums(name: str, modulus: int) -> None:
    symbols, answers = PROBLEMS[name].draw(100, rng())
    assert np.array_equal(answers, symbols.cumsum() % modulus)


@pytest.mark.parametrize("length", [2, 6, 9, 40, 123])
def test_expressions_have_the_value_that_python_gives_them(length: int) -> None:
    for seed in range(10):
        symbols, answers = PROBLEMS["modular_arithmetic"].draw(length, rng(seed))
        text = "".join(SYMBOLS[symbol] for symbol in symbols)
        assert text.endswith("=")
        assert len(text) == 4 * ((length - 2) // 4) + 2
        assert answers[-1] == eval(text[:-1]) % 5
        assert (answers[:-1] == NO_ANSWER).all()


@every_problem
def test_labels_hold_the_answer_one_position_on_and_the_last_token_is_the_last_answer(problem: Problem) -> None:
    vocabulary = symbol_ids(BYTES)
    ids, labels = draw_row(problem, vocabulary, 30, rng(4))
    symbols, answers = problem.draw(30, rng(4))
    tokens = vocabulary[problem.first : problem.first + problem.symbols]
    assert np.array_equal(ids[:-1], tokens[symbols])
    assert labels[0] == IGNORE
    assert np.array_equal(labels[1:], np.where(answers == NO_ANSWER, IGNORE, tokens[answers]))
    assert ids[-1] == labels[-1] == tokens[answers[-1]]


def test_problems_share_no_token_with_each_other_or_with_english() -> None:
    vocabulary = symbol_ids(BYTES)
    taken = [vocabulary[p.first : p.first + p.symbols].tolist() for p in PROBLEMS.values()]
    flat = list(itertools.chain(*taken))
    assert len(set(flat)) == len(flat) == len(vocabulary)
    assert min(flat) >= 0x80 + 3
    assert not set(flat) & set(BYTES.all_special_ids)


class Counting:
    """A tokenizer with too few tokens."""

    all_special_ids = (0,)

    def __len__(self) -> int:
        return 50


def test_a_vocabulary_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="has 49 ordinary tokens, the problems have 84 symbols"):
        symbol_ids(Counting())


def tracks(row: Tensor) -> Tensor:
    """The right answer after every symbol, by following the state (an expression: by reading it at its end)."""
    vocabulary = symbol_ids(BYTES)
    numbers = [int(np.flatnonzero(vocabulary == token)[0]) for token in row.tolist()]
    problem = next(p for p in PROBLEMS.values() if p.first <= numbers[0] < p.first + p.symbols)
    symbols = [number - problem.first for number in numbers]
    logits = torch.zeros(len(row), VOCABULARY)
    if problem.name == "modular_arithmetic":
        text = "".join(SYMBOLS[symbol] for symbol in symbols)
        end = text.index("=")
        logits[end, vocabulary[problem.first + eval(text[:end]) % 5]] = 1
        return logits
    table, state = group_table(GROUPS[problem.name]), 0
    for position, symbol in enumerate(symbols):
        state = int(table[state, symbol])
        logits[position, vocabulary[problem.first + state]] = 1
    return logits


def guesses(row: Tensor) -> Tensor:
    """One of the problem's answers, blindly."""
    vocabulary = symbol_ids(BYTES)
    number = int(np.flatnonzero(vocabulary == int(row[0]))[0])
    problem = next(p for p in PROBLEMS.values() if p.first <= number < p.first + p.symbols)
    logits = torch.zeros(len(row), VOCABULARY)
    answers = torch.from_numpy(vocabulary[problem.first : problem.first + problem.answers])
    logits[:, answers] = torch.rand(len(row), len(answers))
    return logits


def measured(rule: Any, **options: Any) -> EvalResult:
    return evaluate(Rule(rule), tokenizer=BYTES, suites=["tracking"], progress=False, **options)


def test_the_suite_has_all_problems_and_its_own_lengths_unless_others_are_given() -> None:
    result = measured(tracks, samples=2)
    assert list(result.tasks) == list(PROBLEMS)
    assert all([cell.at["length"] for cell in task.cells] == list(LENGTHS) for task in result.tasks.values())
    result = measured(tracks, samples=2, lengths=[7, 12])
    assert all([cell.at["length"] for cell in task.cells] == [7, 12] for task in result.tasks.values())


def test_a_model_that_follows_the_state_scores_everything() -> None:
    for name, task in measured(tracks, samples=10, lengths=[6, 40]).tasks.items():
        assert [cell.value for cell in task.cells] == [1.0, 1.0], name


def test_a_blind_model_is_at_chance() -> None:
    """200 rows of two lengths: within four standard deviations of 1 over the number of answers."""
    for name, task in measured(guesses, samples=100, lengths=[10, 20]).tasks.items():
        share = sum(cell.correct for cell in task.cells) / 200
        assert task.chance == 1 / PROBLEMS[name].answers
        assert abs(share - task.chance) < 4 * (task.chance * (1 - task.chance) / 200) ** 0.5, name


def test_a_row_too_short_for_an_expression_is_refused() -> None:
    with pytest.raises(EvaluationError, match="modular_arithmetic is asked for at 1 symbols and has rows of 2 and more"):
        evaluate(Rule(tracks), ["modular_arithmetic"], tokenizer=BYTES, lengths=[1], progress=False)
